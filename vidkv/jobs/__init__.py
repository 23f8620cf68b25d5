"""Jobs that survive: a store of them, the folders they live in, and the workers that do them."""
