"""How far two videos are apart, chunk by chunk: what the comparison of caches measures.

Between the pictures: PSNR, SSIM and the largest difference. On either side: brightness and saturation
against its own first chunk, and in the embedded world what the pictures show. PSNR and SSIM say how soon and
how far two rollouts part, not which of them is the better video: from the same noise the smallest difference
grows until the two show different, equally good motion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vidkv.drift import drift, look
from vidkv.errors import InputError
from vidkv.models.bounce.metrics import RolloutMetrics, measure
from vidkv.models.bounce.parser import Parsed, Seen, parse_frames
from vidkv.models.bounce.prompts import WORLDS, ScenePrompt, World, parse
from vidkv.models.bounce.world import SIZE

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

LEVELS = 255
DIVERGED_DB = 30.0
"""Two videos have parted with the first chunk whose PSNR is below this."""
DIVERGED_PX = 1.0
"""In the embedded world: with the first chunk in which an object is further from its like than this."""
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2
LUMA = np.array([0.299, 0.587, 0.114])
WORLD_CHUNKS = 160
"""World metrics look at so many chunks from the start: they follow objects through all of them at once."""
WORLD_GROWTH = 1.25
"""They are measured anew once there are so many times the chunks."""
WORLD_METRICS = (
    "identity", "colour", "shape", "colour_delta_e", "count_error", "luminance_drift", "trajectory_rmse",
    "speed_error", "teleports", "judged",
)  # fmt: skip


def squared_error(a: Frames, b: Frames) -> float:
    """Mean over pixels, channels and frames of (a - b)², in 8-bit levels."""
    difference = a.astype(np.int32) - b
    return float(np.mean(difference * difference))


def psnr(error: float) -> float:
    """10 log10(255² / mean squared error) in dB; infinite where there is none."""
    return 10 * math.log10(LEVELS**2 / error) if error else math.inf


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity of two clips (frames, height, width, 3): 1 where they are equal.

    The index of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE Transactions on Image Processing 13 (4), 2004, with their constants: of
    BT.601 brightness x and y in levels of 255,

        (2 μx μy + C1) (2 σxy + C2) / ((μx² + μy² + C1) (σx² + σy² + C2)),  C1 = (0.01·255)², C2 = (0.03·255)²

    with means, variances and covariance under a Gaussian window of 11x11 pixels and σ = 1.5, where all of
    it lies inside the picture (in smaller pictures the largest odd window that does); mean over places and
    frames.
    """
    side = min(SSIM_WINDOW, *(length - 1 + length % 2 for length in a.shape[1:3]))
    # a frame at a time stays within the processor's cache
    values = [_ssim_frame(x @ LUMA, y @ LUMA, side) for x, y in zip(a, b, strict=True)]
    return float(np.mean(values))


def _ssim_frame(x: Floats, y: Floats, side: int) -> float:
    mean_x, mean_y = _blurred(x, side), _blurred(y, side)
    square_x, square_y, product = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    variance_x, variance_y = _blurred(x * x, side) - square_x, _blurred(y * y, side) - square_y
    covariance = _blurred(x * y, side) - product
    likeness = (2 * product + SSIM_C1) * (2 * covariance + SSIM_C2)
    likeness /= (square_x + square_y + SSIM_C1) * (variance_x + variance_y + SSIM_C2)
    return float(likeness.mean())


def _blurred(plane: Floats, side: int) -> Floats:
    """Gaussian means where the whole window lies inside, (height - side + 1, width - side + 1)."""
    for axis in (0, 1):
        length = plane.shape[axis] - side + 1
        total = np.zeros(tuple(length if i == axis else plane.shape[i] for i in (0, 1)))
        for offset, weight in enumerate(_weights(side)):
            total += weight * plane.take(range(offset, offset + length), axis)
        plane = total
    return plane


@cache
def _weights(side: int) -> tuple[float, ...]:
    at = np.arange(side) - side // 2
    weights = np.exp(-(at**2) / (2 * SSIM_SIGMA**2))
    return tuple((weights / weights.sum()).tolist())


@dataclass(frozen=True, slots=True)
class ChunkFidelity:
    """Two videos over one chunk.

    Attributes:
        frames: in the chunk.
        error: see `squared_error`.
        ssim: see `ssim`.
        max_difference: the largest of all pixels and channels, in levels.
        luma, saturation: of either side, percent of full scale against its own first chunk, see
            `vidkv.drift`.
    """

    frames: int
    error: float
    ssim: float
    max_difference: int
    luma: tuple[float, float]
    saturation: tuple[float, float]

    @property
    def psnr(self) -> float:
        return psnr(self.error)


@dataclass
class Fidelity:
    """Two videos, chunk by chunk from the first.

        fidelity = Fidelity()
        for a, b in zip(chunks_a, chunks_b):
            print(fidelity.add(a, b).psnr)

    Attributes:
        chunks: those added.
    """

    chunks: list[ChunkFidelity] = field(default_factory=list)
    _first: list[dict[str, float]] = field(default_factory=list)

    def add(self, a: Frames, b: Frames) -> ChunkFidelity:
        """Compare the next chunk of both, (frames, height, width, 3) uint8.

        Raises:
            InputError: the two have different shapes.
        """
        if a.shape != b.shape or not len(a):
            raise InputError(f"chunks of shapes {a.shape} and {b.shape} cannot be compared pixel by pixel")
        seen = [look(torch.from_numpy(np.ascontiguousarray(frames))) for frames in (a, b)]
        self._first = self._first or seen
        moved = [drift(first, now) for first, now in zip(self._first, seen, strict=True)]
        largest = int(np.abs(a.astype(np.int16) - b).max())
        chunk = ChunkFidelity(
            len(a), squared_error(a, b), ssim(a, b) if largest else 1.0, largest,
            (moved[0]["luma"], moved[1]["luma"]), (moved[0]["saturation"], moved[1]["saturation"]),
        )  # fmt: skip
        self.chunks.append(chunk)
        return chunk

    @property
    def identical(self) -> bool:
        """No pixel differs so far."""
        return all(chunk.error == 0 for chunk in self.chunks)

    @property
    def psnr(self) -> float:
        """Of all frames together, NaN without any."""
        frames = sum(chunk.frames for chunk in self.chunks)
        return psnr(sum(c.error * c.frames for c in self.chunks) / frames) if frames else math.nan

    @property
    def ssim(self) -> float:
        """Mean over all frames, NaN without any."""
        frames = sum(chunk.frames for chunk in self.chunks)
        return sum(c.ssim * c.frames for c in self.chunks) / frames if frames else math.nan

    @property
    def diverged_at(self) -> int | None:
        """The first chunk below DIVERGED_DB; None if there is none."""
        return next((i for i, chunk in enumerate(self.chunks) if chunk.psnr < DIVERGED_DB), None)


# --- the embedded world ---


@dataclass
class WorldSide:
    """What one video of the embedded world shows.

    Attributes:
        curves: by name of WORLD_METRICS, (chunks,), NaN without evidence; see `RolloutMetrics`.
        returned, right: objects that were hidden or out of view and came back or should have, and those of
            them that came back as they were.
    """

    curves: dict[str, Floats]
    returned: int
    right: int


class WorldFidelity:
    """What two videos of the embedded world show, as far as WORLD_CHUNKS.

    Args:
        world: of the model.

    Attributes:
        chunks: that `sides` covers.
        sides: of both videos; empty until `update` has looked.
        diverged_at: the first chunk in which both show an object whole at places more than DIVERGED_PX apart,
            or in different shapes, or only one shows it at all; None so far.
    """

    def __init__(self, world: World) -> None:
        self.world, self.chunks = world, 0
        self.sides: list[WorldSide] = []
        self.diverged_at: int | None = None
        self._edges = [0]
        self._parsed: tuple[list[Parsed], list[Parsed]] = ([], [])

    @property
    def added(self) -> int:
        """Chunks that were looked at."""
        return len(self._edges) - 1

    def add(self, a: Frames, b: Frames) -> None:
        """The next chunk of both, (frames, 64, 64, 3); from WORLD_CHUNKS on nothing happens."""
        if self.added >= WORLD_CHUNKS:
            return
        parsed = parse_frames(a), parse_frames(b)
        if self.diverged_at is None and parted(*parsed):
            self.diverged_at = self.added
        for parts, part in zip(self._parsed, parsed, strict=True):
            parts.append(part)
        self._edges.append(self._edges[-1] + len(a))

    def update(self, texts: Sequence[Sequence[str]], last: bool) -> None:
        """Measure anew once enough has been added.

        Args:
            texts: by video, the prompt of every chunk that was added.
            last: nothing more will be.

        Raises:
            PromptError: a prompt is none of that world.
        """
        enough = last or self.added >= min(WORLD_CHUNKS, WORLD_GROWTH * self.chunks)
        if self.added > self.chunks and enough:
            self.sides = [
                _measured(joined(parts), _scenes(side[: self.added], self.world), self._edges)
                for side, parts in zip(texts, self._parsed, strict=True)
            ]
            self.chunks = self.added


Scene = tuple[int, ScenePrompt, int | None]
"""What is judged as one rollout: first chunk, prompt, and the chunk whose prompt brought its event."""


def _measured(parsed: Parsed, scenes: Sequence[Scene], edges: Sequence[int]) -> WorldSide:
    parts: list[RolloutMetrics] = []
    ends = [*(first for first, _, _ in scenes[1:]), len(edges) - 1]
    for (first, prompt, event), end in zip(scenes, ends, strict=True):
        begun = edges[first]
        chunks = [slice(edges[c] - begun, edges[c + 1] - begun) for c in range(first, end)]
        frames = parsed[begun : edges[end]]
        parts.append(measure(frames, prompt, chunks, None if event is None else event - first))
    curves = {name: np.concatenate([getattr(part, name) for part in parts]) for name in WORLD_METRICS}
    returns = [item for part in parts for item in part.returns]
    return WorldSide(curves, len(returns), sum(item.right for item in returns))


def _scenes(texts: Sequence[str], world: World) -> list[Scene]:
    scenes: list[Scene] = []
    chunk = 0
    for text, run in groupby(texts):
        prompt = parse(text, world)
        first, before, _ = scenes[-1] if scenes else (0, None, None)
        told = before is not None and before.event is None and prompt.event is not None
        if before is not None and told and (before.objects, before.family) == (prompt.objects, prompt.family):
            # the same scene goes on, and now something is to happen in it
            scenes[-1] = (first, prompt, chunk)
        else:
            scenes.append((chunk, prompt, None))
        chunk += len(list(run))
    return scenes


def joined(parts: Sequence[Parsed]) -> Parsed:
    """One clip of several that follow one another."""
    return Parsed(
        [objects for part in parts for objects in part.objects],
        np.concatenate([part.bar for part in parts]),
        np.concatenate([part.ground for part in parts]),
        np.concatenate([part.luminance for part in parts]),
    )


def parted(a: Parsed, b: Parsed) -> bool:
    """Whether two clips show different states."""
    return any(_differ(x, y) or _differ(y, x) for x, y in zip(a.objects, b.objects, strict=True))


def _differ(some: Sequence[Seen], others: Sequence[Seen]) -> bool:
    """Whether something that is seen whole is elsewhere, of another shape or not at all among the others."""
    for seen in some:
        like = [other for other in others if other.colour == seen.colour]
        if seen.whole and not like:
            return True
        # what is cut says neither where it is nor what it is
        if seen.whole and all(other.whole for other in like):
            near = min(like, key=lambda other: math.hypot(other.x - seen.x, other.y - seen.y))
            if near.shape != seen.shape or math.hypot(near.x - seen.x, near.y - seen.y) > DIVERGED_PX:
                return True
    return False


def world_of(grammar: Any) -> World | None:
    """The embedded world that a model's `prompt_grammar` names; None for free text."""
    name = str(grammar or "")
    return WORLDS.get(name.removeprefix("bounce:")) if name.startswith("bounce:") else None


def is_world_sized(height: int, width: int) -> bool:
    """Whether pictures of this size can be read back."""
    return (height, width) == (SIZE, SIZE)
