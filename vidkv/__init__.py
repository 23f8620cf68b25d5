"""vidkv: long video from a causal video diffusion transformer, with a KV cache that stays small."""

__version__ = "0.1.0"
