"""The training set of the transformer: clips of the world, encoded as they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from einops import rearrange
from torch import Tensor

from vidkv.apps.train.vae import as_video
from vidkv.models.bounce.prompts import ScenePrompt, World
from vidkv.models.bounce.text import build_tokenizer
from vidkv.models.bounce.world import Trajectory, render, sample_scenes, simulate
from vidkv.models.text import tokenize
from vidkv.models.vae import encode_clip, normalise, pixel_frames

CHUNK = 3


@dataclass
class Clips:
    """Encoded clips; the first axis of every tensor is the clip.

    Attributes:
        latents: (n, frames, 16, 8, 8) float16, normalised.
        ids, mask: (n, 2, tokens): the prompt before and after the event (twice the same without one).
        event_frame: (n,) first latent frame under the second prompt; the number of frames without one.
    """

    latents: Tensor
    ids: Tensor
    mask: Tensor
    event_frame: Tensor

    def __len__(self) -> int:
        return self.latents.shape[0]

    def pick(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(latents, ids, mask, event_frame) of some clips."""
        return self.latents[index].float(), self.ids[index], self.mask[index], self.event_frame[index]

    def append(self, other: Clips) -> None:
        """Add clips."""
        for name in ("latents", "ids", "mask", "event_frame"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def replace(self, start: int, other: Clips) -> None:
        """Overwrite clips from `start` on."""
        stop = start + len(other)
        for name in ("latents", "ids", "mask", "event_frame"):
            getattr(self, name)[start:stop] = getattr(other, name)


def draw_clips(
    vae: AutoencoderKLWan,
    number: int,
    frames: int,
    generator: torch.Generator,
    world: World,
    batch: int = 64,
) -> Clips:
    """Draw, render and encode `number` clips of `frames` latent frames; events where they fit."""
    device = generator.device
    pixel = pixel_frames(frames)
    chunks = torch.arange(2, max(2, frames // CHUNK - 1))
    events = pixel_frames(CHUNK) + 12 * (chunks - 1) if len(chunks) else None
    scenes = sample_scenes(number, generator, event_frames=events, world=world)
    path = simulate(scenes, pixel)
    latents = []
    for start in range(0, number, batch):
        part = slice(start, start + batch)
        clip = render(scenes[part], Trajectory(path.position[part], path.camera[part]))
        latents.append(_encode(vae, clip))
    ids, mask = _tokens(scenes.prompts(), generator)
    happens = scenes.event_frame >= 0
    event_frame = torch.where(happens, (scenes.event_frame - 9) // 4 + CHUNK, frames)
    return Clips(torch.cat(latents), ids.to(device), mask.to(device), event_frame)


@torch.no_grad()
def _encode(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    latents = encode_clip(vae, as_video(clip)).mode()
    return normalise(vae, rearrange(latents, "b c f h w -> b f c h w")).half()


def _tokens(prompts: list[ScenePrompt], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both prompts of each clip; half of the events are told by the clause, half by the new scene."""
    clause = (torch.rand(len(prompts), generator=generator, device=generator.device) < 0.5).tolist()
    before = [ScenePrompt(p.objects, p.family).text() for p in prompts]
    after = [(p if told else p.after_event()).text() for p, told in zip(prompts, clause, strict=True)]
    ids, mask = tokenize(build_tokenizer(), [*before, *after])
    n = len(prompts)
    return torch.stack([ids[:n], ids[n:]], 1), torch.stack([mask[:n], mask[n:]], 1)
