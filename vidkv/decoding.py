"""What turns finished latents into frames, and doing so beside the next chunk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from vidkv.errors import NumericsError


class Decoder(Protocol):
    """A streaming decoder: latent frames in, pixel frames out.

    Attributes:
        finite: () bool, whether all of what `feed` decoded last was numbers.
    """

    finite: Tensor

    def feed(self, latents: Tensor) -> Tensor: ...
    def flush(self) -> Tensor: ...
    def reset(self) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: Mapping[str, Tensor], grid: tuple[int, int, int] | None = None) -> None: ...
    def copy(self) -> Decoder: ...


class LaterFrames:
    """Frames that a second stream decodes.

    Args:
        decoder: in the state after the chunk before.
        latents: (b, f, c, h, w) on the current stream.
        before: the chunk before, whose stream is used.
    """

    def __init__(self, decoder: Decoder, latents: Tensor, before: LaterFrames | None) -> None:
        self.decode_s = 0.0
        self.stream: torch.cuda.Stream | None = None
        if latents.device.type != "cuda":
            started = time.perf_counter()
            self.frames, self.finite = decoder.feed(latents), decoder.finite
            self.decode_s = time.perf_counter() - started
            return
        self.stream = (before.stream if before else None) or torch.cuda.Stream(latents.device)
        self.begun, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self.stream):
            self.begun.record()
            on_device, self.finite = decoder.feed(latents), decoder.finite
            # else the allocator would give them to the current stream while this one still reads them
            latents.record_stream(self.stream)
            self.frames = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self.frames.copy_(on_device, non_blocking=True)
            self.ended.record()

    def wait(self) -> Tensor:
        """(b, pixel frames, height, width, 3) uint8 on the CPU; `decode_s` is known from then on.

        Raises:
            NumericsError: NaN or Inf among them.
        """
        if self.stream is not None:
            self.ended.synchronize()
            self.decode_s = self.begun.elapsed_time(self.ended) / 1000
        check_decoded(self.finite)
        return self.frames


def check_decoded(finite: Tensor) -> None:
    """Waits for the device.

    Raises:
        NumericsError: what was decoded is not.
    """
    if not bool(finite):
        raise NumericsError("NaN or Inf in decoded frames; the decoder has to be reset or restored")
