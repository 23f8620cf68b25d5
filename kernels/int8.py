"""Symmetric INT8 codes with fp16 scales: the torch reference of the cache's quantizer.

x ≈ code · scale with code in [-127, 127] and scale = max|x| / 127 over one group. The scale is rounded
*up* to fp16 before coding, so no code is clipped and |x - x̂| <= scale / 2 holds for every element.
Beyond 127 times the largest fp16 number, about 8.3 million, elements saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127.0


def scale_of(x: Tensor, dim: int) -> Tensor:
    """fp16 scales over `dim` (kept with size 1), rounded up; groups of zeros get the smallest scale."""
    return round_up(x.abs().amax(dim, keepdim=True).float() / LEVELS)


def round_up(scale: Tensor) -> Tensor:
    """float32 scales as fp16, none of them smaller; at least the smallest normal one."""
    limit = torch.finfo(torch.float16)
    exact = scale.clamp(limit.smallest_normal, limit.max)
    rounded = exact.to(torch.float16)
    next_half = (rounded.view(torch.int16) + 1).view(torch.float16)
    return torch.where(rounded.float() < exact, next_half, rounded)


def quantize(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Codes (int8, shape of x) and scales (fp16, size 1 on `dim`)."""
    scale = scale_of(x, dim)
    codes = (x.float() / scale.float()).round_().clamp_(-LEVELS, LEVELS)
    return codes.to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code · scale, computed in float32."""
    return (codes.float() * scale.float()).to(dtype)
