"""Three-axis rotary position embedding of Wan, split so that time can be applied late.

Wan rotates interleaved channel pairs of each head: the first pairs by the frame index, the next by the
row, the last by the column (Wan 2.1 `rope_apply`; diffusers `WanRotaryPosEmbed`). The three rotations
act on different channels, so they commute: a key can be stored with row and column applied and get its
frame rotation when it is read. Phases are computed in float64 from the position, not looked up, so
there is no last frame.

Shapes: q, k are (batch, frames, tokens, heads, head_dim); tokens run row by row over the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10_000.0


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels that turn with time, row and column; 44, 42, 42 at head_dim 128 and 24, 20, 20 at 64."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _frequencies(channels: int, device: torch.device | str | None) -> Tensor:
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    return THETA**-exponent


def _phases(positions: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    angles = positions.double()[:, None] * _frequencies(channels, positions.device)
    phases = torch.polar(torch.ones_like(angles), angles)
    return phases if dtype == torch.float64 else phases.to(torch.complex64)


def temporal_phases(head_dim: int, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit complex numbers (frames, time pairs) for positions (frames,), which may be negative."""
    return _phases(positions, axis_channels(head_dim)[0], dtype)


def spatial_phases(
    head_dim: int,
    height: int,
    width: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit complex numbers (height * width tokens, row pairs + column pairs)."""
    _, row_channels, column_channels = axis_channels(head_dim)
    rows = _phases(torch.arange(height, device=device), row_channels, dtype)
    columns = _phases(torch.arange(width, device=device), column_channels, dtype)
    grid = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(grid, -1).flatten(0, 1)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Turn interleaved pairs of the last axis; phases broadcast against (…, pairs). float32 inside."""
    work = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(work.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * phases).flatten(-2).to(x.dtype)


def rotate_first(x: Tensor, phases: Tensor) -> Tensor:
    """Turn the first pairs of the last axis, those of time; phases broadcast against (…, pairs)."""
    turned = 2 * phases.shape[-1]
    return torch.cat([rotate(x[..., :turned], phases), x[..., turned:]], -1)


def rotate_last(x: Tensor, phases: Tensor) -> Tensor:
    """Turn the last pairs of the last axis, those of row and column; phases as in `rotate_first`."""
    left = x.shape[-1] - 2 * phases.shape[-1]
    return torch.cat([x[..., :left], rotate(x[..., left:], phases)], -1)


def rotate_temporal(x: Tensor, phases: Tensor) -> Tensor:
    """Rotate by frame. x: (batch, frames, tokens, heads, head_dim); phases: (frames, time pairs)."""
    return rotate_first(x, phases[:, None, None])


def rotate_spatial(x: Tensor, phases: Tensor) -> Tensor:
    """Rotate by row and column. x: (batch, frames, tokens, heads, head_dim); phases: (tokens, pairs)."""
    return rotate_last(x, phases[:, None])


def rotate_full(x: Tensor, temporal: Tensor, spatial: Tensor) -> Tensor:
    """Both rotations at once; phases as in `rotate_temporal` and `rotate_spatial`."""
    frames, tokens = temporal.shape[0], spatial.shape[0]
    both = torch.cat([temporal[:, None].expand(-1, tokens, -1), spatial[None].expand(frames, -1, -1)], -1)
    return rotate(x, both[:, :, None])
