"""Networks without memory, to ask for names and shapes, or to be filled tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import init_empty_weights

BUILDING = threading.RLock()
"""Held while networks are built: accelerate's context changes torch's modules for all threads at once, so
that one thread's plan would take the memory from another one's weights."""


@contextmanager
def empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Networks built inside have their parameters, and if asked for their buffers, on the meta device."""
    with BUILDING, init_empty_weights(include_buffers=include_buffers):
        yield
