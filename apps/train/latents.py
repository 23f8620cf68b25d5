"""The training set of the transformer: clips of the world, encoded as they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from einops import rearrange
from torch import Tensor

from vidkv.apps.train.vae import as_video
from vidkv.models.bounce.prompts import SHAPES, ScenePrompt, World
from vidkv.models.bounce.text import build_tokenizer
from vidkv.models.bounce.world import Scenes, Trajectory, render, sample_scenes, simulate
from vidkv.models.text import tokenize
from vidkv.models.vae import encode_clip, normalise, pixel_frames

CHUNK = 3
ENCODED_FRAMES = 10_000


@dataclass
class Clips:
    """Encoded clips; the first axis of every tensor is the clip.

    Attributes:
        latents: (n, frames, 16, 8, 8) float16, normalised.
        ids, mask: (n, 2, tokens): the prompt before and after the event (twice the same without one).
        event_frame: (n,) first latent frame under the second prompt; the number of frames without one.
        impostor: as latents: the same motion with other colours, shapes and sizes. (n, 0, 16, 8, 8) where
            none were drawn.
    """

    latents: Tensor
    ids: Tensor
    mask: Tensor
    event_frame: Tensor
    impostor: Tensor

    def __len__(self) -> int:
        return self.latents.shape[0]

    def pick(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(latents, ids, mask, event_frame, impostor) of some clips, latents in float32."""
        return (
            self.latents[index].float(), self.ids[index], self.mask[index], self.event_frame[index],
            self.impostor[index].float(),
        )  # fmt: skip

    def replace(self, start: int, other: Clips) -> None:
        """Overwrite clips from `start` on."""
        for field in fields(self):
            getattr(self, field.name)[start : start + len(other)] = getattr(other, field.name)


def draw_clips(
    vae: AutoencoderKLWan,
    number: int,
    frames: int,
    generator: torch.Generator,
    world: World,
    impostors: bool = False,
) -> Clips:
    """Draw, render and encode `number` clips of `frames` latent frames; events where they fit."""
    device = generator.device
    pixel = pixel_frames(frames)
    chunks = torch.arange(2, max(2, frames // CHUNK - 1))
    events = pixel_frames(CHUNK) + 12 * (chunks - 1) if len(chunks) else None
    scenes = sample_scenes(number, generator, event_frames=events, world=world)
    path = simulate(scenes, pixel)
    latents = _encode(vae, scenes, path)
    impostor = _encode(vae, _disguise(scenes, world, generator), path) if impostors else latents[:, :0]
    ids, mask = _tokens(scenes.prompts(), generator)
    happens = scenes.event_frame >= 0
    event_frame = torch.where(happens, (scenes.event_frame - 9) // 4 + CHUNK, frames)
    return Clips(latents, ids.to(device), mask.to(device), event_frame, impostor)


def _disguise(scenes: Scenes, world: World, generator: torch.Generator) -> Scenes:
    """The same scenes with other colours, shapes and sizes; trajectories stay as they were."""

    def other(values: Tensor, kinds: int) -> Tensor:
        step = torch.randint(1, kinds, values.shape, generator=generator, device=values.device)
        return (values + step) % kinds

    size, device = scenes.radius.shape, scenes.radius.device
    scale = 0.8 + 0.4 * torch.rand(size, generator=generator, device=device)
    return replace(
        scenes,
        colour=other(scenes.colour, len(world.colours)),
        event_colour=other(scenes.event_colour, len(world.colours)),
        shape=other(scenes.shape, len(SHAPES)),
        radius=scenes.radius * scale,
    )


@torch.no_grad()
def _encode(vae: AutoencoderKLWan, scenes: Scenes, path: Trajectory) -> Tensor:
    parts, batch = [], max(1, ENCODED_FRAMES // path.camera.shape[1])
    for start in range(0, len(scenes), batch):
        part = slice(start, start + batch)
        clip = render(scenes[part], Trajectory(path.position[part], path.camera[part]))
        latents = encode_clip(vae, as_video(clip)).mode()
        parts.append(normalise(vae, rearrange(latents, "b c f h w -> b f c h w")).half())
    return torch.cat(parts)


def _tokens(prompts: list[ScenePrompt], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both prompts of each clip; half of the events are told by the clause, half by the new scene."""
    clause = (torch.rand(len(prompts), generator=generator, device=generator.device) < 0.5).tolist()
    before = [ScenePrompt(p.objects, p.family).text() for p in prompts]
    after = [(p if told else p.after_event()).text() for p, told in zip(prompts, clause, strict=True)]
    ids, mask = tokenize(build_tokenizer(), [*before, *after])
    n = len(prompts)
    return torch.stack([ids[:n], ids[n:]], 1), torch.stack([mask[:n], mask[n:]], 1)
