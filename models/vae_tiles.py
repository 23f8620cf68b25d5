"""Streaming decode in spatial tiles, for cards that cannot hold a whole frame's layers.

Tiles overlap and are blended. Each keeps its own feature caches from call to call, where diffusers' tiled
decode begins every call anew and so cannot stream. A tile sees zeros, not the picture, past its edges, and
attention inside the network stays within it: the result is close to the untiled one, not equal.

Between calls all tiles' caches together are larger than the untiled ones, by the overlaps; what tiles
save is the working memory of one decode. With `offload` only one tile's caches are on the device at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Protocol, Self

import torch
from torch import Tensor

from vidkv.errors import InputError, StateError
from vidkv.models.vae import as_bytes

Grid = tuple[int, int, int]
"""(batch, height, width) of latents."""


class Streaming(Protocol):
    """What decodes one tile: `vae.StreamingDecoder` or `tiny_vae.StreamingTinyDecoder`."""

    def decode(self, latents: Tensor) -> Tensor: ...
    def reset(self) -> None: ...
    def to(self, device: torch.device) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: Mapping[str, Tensor], grid: Grid | None = None) -> None: ...
    def copy(self) -> Self: ...


@dataclass(frozen=True)
class Tiling:
    """How a grid of latents is cut.

    Attributes:
        rows, columns: of a tile at most, in latents; None for all.
        overlap: rows and columns that neighbours share at least; None for a quarter of a tile.
        sliced: whether each element of a batch is decoded alone.
        offload: whether the caches of tiles at rest lie in host memory.
    """

    rows: int | None = None
    columns: int | None = None
    overlap: int | None = None
    sliced: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        sizes = [size for size in (self.rows, self.columns) if size is not None]
        if any(size < 2 for size in sizes):
            raise InputError(f"a tile of {self.rows} x {self.columns} latents; it needs at least 2 x 2")
        if self.overlap is not None and not 0 <= self.overlap <= min(sizes, default=0) // 2:
            raise InputError(
                f"overlap={self.overlap} of tiles of {self.rows} x {self.columns} latents; it lies between "
                "0 and half a tile"
            )

    def cut(self, grid: Grid) -> list[Tile]:
        """The tiles of a grid, row by row for each part of the batch."""
        batch, height, width = grid
        parts = [(i, i + 1) for i in range(batch)] if self.sliced else [(0, batch)]
        return [
            Tile(part, rows, columns)
            for part in parts
            for rows in self._spans(height, self.rows)
            for columns in self._spans(width, self.columns)
        ]

    def _spans(self, length: int, size: int | None) -> list[tuple[int, int]]:
        """Spans of equal length, as few and then as short as cover it all, evenly spread."""
        if size is None or size >= length:
            return [(0, length)]
        overlap = size // 4 if self.overlap is None else self.overlap
        count = ceil((length - overlap) / (size - overlap))
        size = ceil((length + (count - 1) * overlap) / count)
        starts = [i * (length - size) // (count - 1) for i in range(count)]
        return [(start, start + size) for start in starts]


@dataclass(frozen=True)
class Tile:
    """Part of a grid of latents: from and to, the end exclusive."""

    batch: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def grid(self) -> Grid:
        """Its own (batch, height, width)."""
        (b0, b1), (r0, r1), (c0, c1) = self.batch, self.rows, self.columns
        return b1 - b0, r1 - r0, c1 - c0


class TiledDecoder:
    """Latents in, frames out, tile by tile; used as `vae.StreamingDecoder` is.

    Args:
        build: makes the decoder of one tile, in its first state.
        tiling: how to cut.
    """

    def __init__(self, build: Callable[[], Streaming], tiling: Tiling) -> None:
        self._build, self.tiling = build, tiling
        self.reset()

    def reset(self) -> None:
        """Forget everything fed so far: the next latent frame is the first of a video."""
        self.finite = torch.tensor(True)
        self._grid: Grid | None = None
        self._decoders: list[Streaming] = []
        self._weights: dict[tuple[int, int, int, int], Tensor] = {}

    @torch.no_grad()
    def feed(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames.

        Args:
            latents: (batch, frames, channels, height, width), as the transformer sees them.

        Returns:
            (batch, pixel frames, height, width, 3) uint8 on the latents' device.
        """
        pixels = self.decode(latents)
        self.finite = pixels.isfinite().all()
        return as_bytes(pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As `feed`, before rounding: (batch, 3, pixel frames, height, width) float32, nothing clamped."""
        if latents.ndim != 5 or 0 in latents.shape:
            raise InputError(
                f"latents are {tuple(latents.shape)}; the decoder takes (batch, frames, channels, height, "
                "width)"
            )
        grid = latents.shape[0], latents.shape[3], latents.shape[4]
        if self._grid not in (None, grid):
            raise InputError(
                f"latents of (batch, height, width) {grid} follow {self._grid}; reset the decoder for "
                "another video"
            )
        if self._grid is None:
            self._grid, self._decoders = grid, [self._build() for _ in self.tiling.cut(grid)]
        tiles, out = self.tiling.cut(grid), None
        for tile, decoder in zip(tiles, self._decoders, strict=True):
            part = latents[slice(*tile.batch), :, :, slice(*tile.rows), slice(*tile.columns)]
            if self.tiling.offload:
                decoder.to(latents.device)
            pixels = decoder.decode(part)
            if self.tiling.offload:
                decoder.to(torch.device("cpu"))
            scale = pixels.shape[3] // part.shape[3]
            if out is None:
                out = pixels.new_zeros(
                    grid[0], 3, pixels.shape[2], grid[1] * scale, grid[2] * scale, dtype=torch.float32
                )
            weights = [
                self._weight(tiles, tile, axis, scale, latents.device).view(shape)
                for axis, shape in ((1, (-1, 1)), (2, (1, -1)))
            ]
            rows, columns = ((a * scale, b * scale) for a, b in (tile.rows, tile.columns))
            target = out[slice(*tile.batch), :, :, slice(*rows), slice(*columns)]
            target += pixels.float() * weights[0] * weights[1]
        assert out is not None  # a grid has a tile
        return out

    def _weight(self, tiles: list[Tile], tile: Tile, axis: int, scale: int, device: torch.device) -> Tensor:
        """What a tile counts for along one axis, 1 for rows and 2 for columns; all tiles sum to one.

        Computed at the first call and kept: it is the same for every frame.
        """
        spans = sorted({(t.rows, t.columns)[axis - 1] for t in tiles})
        own = (tile.rows, tile.columns)[axis - 1]
        key = (axis, *own, scale)
        if key not in self._weights:
            lines = torch.stack([_ramp(span, spans[-1][1], scale) for span in spans])
            share = lines[spans.index(own)] / lines.sum(0)
            self._weights[key] = share[own[0] * scale : own[1] * scale].float().to(device)
        return self._weights[key]

    def flush(self) -> Tensor:
        """The frames still held back: none, (0, 0, 0, 3) uint8."""
        return torch.empty(0, 0, 0, 3, dtype=torch.uint8)

    def state(self) -> dict[str, Tensor]:
        """The caches of all tiles as named tensors, for safetensors."""
        if self.tiling.offload and torch.cuda.is_available():
            # copies to the host may still be under way
            torch.cuda.synchronize()
        tensors = {
            f"{i}.{name}": tensor
            for i, decoder in enumerate(self._decoders)
            for name, tensor in decoder.state().items()
        }
        return tensors | {"grid": torch.tensor(self._grid or (0, 0, 0))}

    def copy(self) -> TiledDecoder:
        """An independent decoder in the same state."""
        other = TiledDecoder(self._build, self.tiling)
        other.restore(self.state())
        return other

    def restore(self, state: Mapping[str, Tensor], grid: Grid | None = None) -> None:
        """Go on from a `state()` of a decoder with the same tiling.

        Args:
            grid: (batch, height, width) of the latents to come; None takes what the state has.

        Raises:
            StateError: it is of another network, grid or tiling, or damaged; nothing has changed.
        """
        saved = state.get("grid")
        if saved is None or saved.dtype != torch.int64 or saved.shape != (3,) or bool((saved < 0).any()):
            raise StateError(f"the saved decoder's grid is {saved}; the state is damaged or was not tiled")
        begun = tuple(saved.tolist())
        if any(begun) and grid not in (None, begun):
            raise StateError(f"the saved decoder's grid is {begun}, this rollout needs {grid}")
        tiles = self.tiling.cut(begun) if all(begun) else []
        known = {"grid", *(f"{i}." for i in range(len(tiles)))}
        strange = sorted(name for name in state if name != "grid" and name.split(".")[0] + "." not in known)
        if strange or any(begun) != all(begun):
            raise StateError(
                f"the saved decoder holds {(strange or ['no tile'])[0]} on a grid of {begun}, which is no "
                f"part of {len(tiles)} tiles; restore with the tiling it was saved with, not {self.tiling}"
            )
        decoders = [self._build() for _ in tiles]
        for i, (tile, decoder) in enumerate(zip(tiles, decoders, strict=True)):
            mine = {name.split(".", 1)[1]: t for name, t in state.items() if name.split(".")[0] == str(i)}
            decoder.restore(mine, tile.grid)
            if not torch.equal(mine["fed_frames"], state["0.fed_frames"]):
                raise StateError(
                    f"the saved decoder's {i}.fed_frames is {mine['fed_frames']}, unlike 0.fed_frames"
                )
            if self.tiling.offload:
                decoder.to(torch.device("cpu"))
        self.reset()
        self._grid, self._decoders = begun if tiles else None, decoders


def _ramp(span: tuple[int, int], length: int, scale: int) -> Tensor:
    """How far each pixel line lies inside a tile, zero outside it; (length x scale) float64.

    Ends that are the picture's own count as far away.
    """
    (start, end), far = span, length * scale
    at = torch.arange(far, dtype=torch.float64) + 0.5
    left = at - start * scale if start else torch.full_like(at, far)
    right = end * scale - at if end < length else torch.full_like(at, far)
    return torch.minimum(left, right).clamp(min=0)
