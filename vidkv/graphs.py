"""Denoising passes as CUDA graphs: once the window is full, every pass launches the same kernels.

A pass of the 1.3B model launches some two thousand kernels; where the processor issues them no faster than
the GPU works them off, replaying a recording of them is what keeps the GPU busy.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from vidkv.attention import CachedAttention
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext

log = logging.getLogger(__name__)


@dataclass
class _Recording:
    """One captured pass and the tensors it reads and writes.

    Attributes:
        attention: whose slots and phases the kernels read.
        pages_read, lossy_pages_read: what one pass adds to the cache's counters.
    """

    graph: torch.cuda.CUDAGraph
    x: Tensor
    times: Tensor
    text: TextContext
    source: TextContext
    attention: CachedAttention
    flow: Tensor
    pages_read: int
    lossy_pages_read: int


class RecordedPasses:
    """The transformer, recorded for each way of reading that comes back; called as the transformer is.

    A pass is recorded when it is asked for the second time over a full window. Until then, and for whatever
    changes its shape, the transformer itself is called.

    Args:
        transformer: on a GPU, not offloaded, and with the weights it has: a recording knows no others.
    """

    def __init__(self, transformer: CausalWanTransformer3DModel) -> None:
        self.transformer = transformer
        self._recordings: dict[object, _Recording] = {}
        self._seen: set[object] = set()

    @torch.no_grad()
    def __call__(self, x: Tensor, times: Tensor, text: TextContext, attention: CachedAttention) -> Tensor:
        """The flow (b, f, c, h, w), likewise."""
        if not attention.steady or text.mask is not None:
            return self.transformer(x, times, text, attention)
        key = attention.signature(), tuple(x.shape), tuple(text.keys[0].shape)
        recording = self._recordings.get(key)
        if recording is None:
            if key not in self._seen:
                # what is chosen and compiled at a first call must not be while recording
                self._seen.add(key)
                return self.transformer(x, times, text, attention)
            recording = self._recordings[key] = self._record(x, times, text, attention)
        else:
            recording.attention.take(attention)
            cache = attention.cache
            cache.pages_read += recording.pages_read
            cache.lossy_pages_read += recording.lossy_pages_read
        recording.x.copy_(x)
        recording.times.copy_(times)
        if recording.source is not text:
            for mine, theirs in zip(
                (*recording.text.keys, *recording.text.values), (*text.keys, *text.values), strict=True
            ):
                mine.copy_(theirs)
            recording.source = text
        recording.graph.replay()
        # the next replay writes there again
        return recording.flow.clone()

    def _record(self, x: Tensor, times: Tensor, text: TextContext, attention: CachedAttention) -> _Recording:
        cache = attention.cache
        before = cache.pages_read, cache.lossy_pages_read
        x, times = x.clone(), times.clone()
        own = TextContext([k.clone() for k in text.keys], [v.clone() for v in text.values])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flow = self.transformer(x, times, own, attention)
        counts = cache.pages_read - before[0], cache.lossy_pages_read - before[1]
        log.debug("recorded a pass of %d pages", counts[0])
        return _Recording(graph, x, times, own, text, attention, flow, *counts)
