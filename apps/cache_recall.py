"""Does a cache still know what left the view some time ago? Asked with gaps of known length.

A camera of the embedded world pans away from an object and back. The true video up to the chunk in which the
object comes into view again is every cache's history, so that nothing depends on how well the model has
drawn it so far; that chunk is denoised, and the object must be where the truth has it, in its colour. Else
only the prompt tells of it, which names its colour and shape but not its place. Free runs cannot ask this:
the prompt does not say how fast the camera is, and the embedded model loses objects of its own accord.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vidkv.apps.evaluate import Tell, begin
from vidkv.cache import CacheSpec, KVCache
from vidkv.conditioning import encode_pixels
from vidkv.models.bounce.metrics import FIRST_CHUNK, LATER_CHUNK, PLACE_TOLERANCE
from vidkv.models.bounce.parser import parse_frames
from vidkv.models.bounce.prompts import COLOURS, ScenePrompt, World
from vidkv.models.bounce.world import SIZE, Scenes, render, sample_scenes, simulate
from vidkv.models.vae_decoders import streaming_decoder
from vidkv.pipeline import CausalVideoPipeline

GAPS = (13, 25, 37, 49, 61, 73, 97)
"""Edges of the bins, in pixel frames; in the world's slowest pan nothing is away for longer than 94."""
CHUNKS = 11
"""A gap ends within so many."""
CANDIDATES = 512


@dataclass(frozen=True)
class Absence:
    """A scene in which an object is away.

    Attributes:
        scene: of one video.
        prompt: of it.
        index: of the object.
        gap: pixel frames in which nothing of it is in view.
        chunk: in which it comes back.
    """

    scene: Scenes
    prompt: ScenePrompt
    index: int
    gap: int
    chunk: int

    @property
    def frames(self) -> int:
        """Pixel frames to the end of that chunk."""
        return FIRST_CHUNK + self.chunk * LATER_CHUNK

    @property
    def colour(self) -> str:
        return COLOURS[int(self.scene.colour[0, self.index])]


def absences(world: World, per_bin: int, seed: int = 7000) -> list[Absence]:
    """For every bin of GAPS so many scenes, by the chunk in which the object comes back.

    Before that chunk begins nothing of the object is in view; when it ends its centre is.
    """
    generator = torch.Generator().manual_seed(seed)
    bins: dict[int, list[Absence]] = {low: [] for low in GAPS[:-1]}
    while min(len(found) for found in bins.values()) < per_bin:
        scenes = sample_scenes(CANDIDATES, generator, "camera", world=world)
        for absence in _absent(scenes):
            found = bins[max(low for low in GAPS if low <= absence.gap)]
            if len(found) < per_bin:
                found.append(absence)
    return sorted((a for found in bins.values() for a in found), key=lambda absence: absence.chunk)


def _absent(scenes: Scenes) -> list[Absence]:
    """The first absence of a named object in every scene that has one of a length within GAPS."""
    place = simulate(scenes, FIRST_CHUNK + CHUNKS * LATER_CHUNK).in_view[..., 0]
    away = (place < -scenes.radius[:, None] - 1) | (place > SIZE + scenes.radius[:, None] + 1)
    prompts, found = scenes.prompts(), []
    for i, prompt in enumerate(prompts):
        for index in range(int(scenes.named[i])):
            row = away[i, :, index].int()
            gone = int(row.argmax())
            back = gone + int((row[gone:] == 0).int().argmax())
            chunk = 1 + (back - FIRST_CHUNK) // LATER_CHUNK
            end = FIRST_CHUNK + chunk * LATER_CHUNK - 1
            if not 0 < gone < back or end >= len(row) or not GAPS[0] <= back - gone < GAPS[-1]:
                continue
            if 0 <= float(place[i, end, index]) <= SIZE:
                found.append(Absence(scenes[i : i + 1], prompt, index, back - gone, chunk))
                break
    return found


@torch.no_grad()
def recall(
    pipe: CausalVideoPipeline, absent: Sequence[Absence], specs: Sequence[CacheSpec], batch: int, tell: Tell
) -> list[list[bool]]:
    """Whether each object is back where it belongs, by spec.

    Right is an object of its colour no further than PLACE_TOLERANCE pixels from where it is in the true
    picture, in the last frame of its chunk; for one that is partly in view both are centres of what is seen.
    """
    right: list[list[bool]] = [[] for _ in specs]
    groups = _groups(absent, batch)
    for number, group in enumerate(groups):
        seeds = range(number * batch, number * batch + len(group))
        pixels = torch.cat([_true_frames(absence) for absence in group])
        latents = encode_pixels(pipe.vae, pixels, pipe.transformer.device).to(pipe.transformer.dtype)
        *history, _ = torch.split(latents, pipe.entry.chunk_frames, 1)
        decoder = streaming_decoder(pipe.vae)
        for part in history:
            decoder.feed(part)
        for spec, found in zip(specs, right, strict=True):
            made = decoder.copy().feed(_denoised(pipe, group, seeds, history, spec))
            found += [
                _is_back(absence, shown, truth)
                for absence, shown, truth in zip(group, made[:, -1:].cpu(), pixels[:, -1:], strict=True)
            ]
        tell(number + 1, len(groups), "absences, batches")
    return right


def _groups(absent: Sequence[Absence], batch: int) -> list[list[Absence]]:
    """Batches of scenes whose objects come back in the same chunk."""
    groups: list[list[Absence]] = []
    for absence in absent:
        if not groups or len(groups[-1]) == batch or groups[-1][0].chunk != absence.chunk:
            groups.append([])
        groups[-1].append(absence)
    return groups


def _true_frames(absence: Absence) -> Tensor:
    """(1, frames, 64, 64, 3) uint8."""
    path = simulate(absence.scene, absence.frames)
    return (render(absence.scene, path) * 255).round().to(torch.uint8)


def _denoised(
    pipe: CausalVideoPipeline,
    group: Sequence[Absence],
    seeds: Sequence[int],
    history: Sequence[Tensor],
    spec: CacheSpec,
) -> Tensor:
    """Clean latents (b, f, c, h, w) of the chunk after a given history."""
    with begin(pipe, seeds, spec, KVCache, decode=False) as rollout:
        pipe.set_prompt(rollout, [absence.prompt.text() for absence in group])
        for part in history:
            rollout.append(part)
        return rollout.denoise()


def _is_back(absence: Absence, shown: Tensor, truth: Tensor) -> bool:
    """Args: shown, truth: (1, 64, 64, 3) uint8."""
    found, wanted = (
        [seen for seen in parse_frames(frames).objects[0] if seen.colour == absence.colour]
        for frames in (shown, truth)
    )
    return any(math.hypot(a.x - b.x, a.y - b.y) <= PLACE_TOLERANCE for a in found for b in wanted)


def by_gap(absent: Sequence[Absence], right: Sequence[bool]) -> dict[str, list[bool]]:
    """Right or wrong by bin of GAPS."""
    bins: dict[str, list[bool]] = {}
    for low, high in pairwise(GAPS):
        rows = zip(absent, right, strict=True)
        bins[f"{low}-{high - 1}"] = [ok for absence, ok in rows if low <= absence.gap < high]
    return bins
