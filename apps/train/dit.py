"""Stages 2 to 4: the causal transformer of the embedded world and its text encoder.

Diffusion forcing gives every chunk a noise level of its own; teacher forcing denoises each chunk given
slightly noisy clean history; self-rollout denoises given history that the model itself made, through the
cache that a rollout uses, towards the simulator's exact continuation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from vidkv.apps.train.common import Progress, Stage
from vidkv.apps.train.latents import CHUNK, Clips, draw_clips
from vidkv.attention import BlockCausalAttention
from vidkv.cache import CacheSpec
from vidkv.models.bounce.text import build_text_encoder
from vidkv.models.text import embed
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "ffn_dim": 704,
    "num_layers": 6,
}
FRAMES = 42
GRID = 4
SPEC = CacheSpec(window=21, sink=3)
SCHEDULE = FlowSchedule(
    steps=(1000, 750, 500, 250),
    shift=3.0,
    first_chunk_steps=(1000, 937, 875, 812, 750, 625, 500, 375, 250, 125),
    sampler="euler",
)
HISTORY_NOISE = 0.12


class Student(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = CausalWanTransformer3DModel(**CONFIG)
        self.text_encoder = build_text_encoder()
        for block in self.transformer.blocks:
            nn.init.zeros_(block.scale_shift_table)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    def text(self, ids: Tensor, mask: Tensor, event_frame: Tensor, frames: int) -> TextContext:
        """Context in which frames before the event read the first prompt and later ones the second."""
        n, _, tokens = ids.shape
        states = embed(self.text_encoder, ids.flatten(0, 1), mask.flatten(0, 1))
        after = torch.arange(frames, device=ids.device) >= event_frame[:, None]
        allowed = torch.stack([~after, after], -1).repeat_interleave(tokens, -1)
        return self.transformer.encode_text(states.view(n, 2 * tokens, -1), allowed)

    def prompt(self, ids: Tensor, mask: Tensor) -> TextContext:
        """Context of one prompt per clip, as a rollout has it."""
        return self.transformer.encode_text(embed(self.text_encoder, ids, mask))


def noise_levels(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Half of the levels continuous under the timestep shift, half those that a rollout visits."""
    u = torch.rand(shape, device=device)
    continuous = SCHEDULE.shift * u / (1 + (SCHEDULE.shift - 1) * u)
    visited = _visited_levels(device)
    chosen = visited[torch.randint(len(visited), shape, device=device)]
    return torch.where(torch.rand(shape, device=device) < 0.5, continuous, chosen)


@cache
def _visited_levels(device: torch.device) -> Tensor:
    """Kept on the device: a copy from the host cannot be part of a CUDA graph."""
    return torch.tensor(SCHEDULE.sigmas(1) + SCHEDULE.sigmas(0), device=device)


def _expand(levels: Tensor, chunks: Sequence[int]) -> Tensor:
    """(b, chunks) to (b, frames)."""
    return torch.cat([levels[:, i : i + 1].expand(-1, n) for i, n in enumerate(chunks)], 1)


def _mix(clean: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents at levels (b, f), and the flow that leads from clean to noise."""
    noise = torch.randn_like(clean)
    return torch.lerp(clean, noise, levels[:, :, None, None, None]), noise - clean


def diffusion_forcing(
    student: Student, attention: BlockCausalAttention, chunks: Sequence[int],
    latents: Tensor, ids: Tensor, mask: Tensor, event_frame: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Every chunk at its own noise level, history included (Diffusion Forcing, arXiv 2407.01392)."""
    frames = sum(chunks)
    latents = latents[:, :frames]
    levels = _expand(noise_levels((latents.shape[0], len(chunks)), latents.device), chunks)
    noisy, flow = _mix(latents, levels)
    text = student.text(ids, mask, event_frame, frames)
    predicted = student.transformer(noisy, 1000 * levels, text, attention)
    return {"loss": (predicted.float() - flow).square().mean()}


def given_history(
    student: Student, attention: BlockCausalAttention, chunks: Sequence[int],
    latents: Tensor, ids: Tensor, mask: Tensor, event_frame: Tensor,
    history: Tensor | None = None, weight: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Denoise every chunk given finished history at timestep 0: teacher forcing, or self-rollout.

    Args:
        history: what to read instead of the clip itself, (b, f, c, h, w).
        weight: (b, f) of each frame in the loss.
    """
    frames = sum(chunks)
    latents = latents[:, :frames]
    b, device = latents.shape[0], latents.device
    seen = latents if history is None else history[:, :frames]
    seen_levels = _expand(HISTORY_NOISE * torch.rand(b, len(chunks), device=device).square(), chunks)
    seen, _ = _mix(seen, seen_levels)
    levels = _expand(noise_levels((b, len(chunks)), device), chunks)
    noisy, flow = _mix(latents, levels)
    text = student.text(ids, mask, event_frame, frames)
    both = TextContext(text.keys, text.values, text.mask.repeat(1, 2, 1) if text.mask is not None else None)
    timestep = torch.cat([torch.zeros_like(levels), 1000 * levels], 1)
    predicted = student.transformer(torch.cat([seen, noisy], 1), timestep, both, attention)
    error = (predicted[:, frames:].float() - flow).square().mean((2, 3, 4))
    if weight is None:
        return {"loss": error.mean()}
    weight = weight[:, :frames]
    return {"loss": (error * weight).sum() / weight.sum().clamp_min(1.0)}


Chunking = tuple[str, tuple[int, ...]]
WHOLE: Chunking = ("chunks", (CHUNK,) * (FRAMES // CHUNK))
FROM_IMAGE: Chunking = ("image", (1,) + (CHUNK,) * (FRAMES // CHUNK - 1))


class Trainer:
    """The stages in order, over one pool of clips.

    Args:
        folder: checkpoints, the curve, and `pipeline/` with the finished parts.
        vae: trained; frozen here.
        clips: how many to hold; `refresh` of them are drawn anew every 50 steps.
        init: a pipeline folder whose transformer and text encoder to start from.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, vae: AutoencoderKLWan, clips: int, batch: int,
        refresh: int, init: Path | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.folder, self.accelerator, self.batch, self.refresh = folder, accelerator, batch, refresh
        self.vae = vae.to(accelerator.device).requires_grad_(False).eval()
        self.generator = torch.Generator(accelerator.device).manual_seed(2)
        self.student = load_parts(init) if init else Student()
        self.clips = self._draw(clips)
        self.next_fresh = 0

    def run(
        self, name: str, loss: Callable[..., dict[str, Tensor]], history: bool, steps: int,
        minutes: float | None, peak: float,
    ) -> None:  # fmt: skip
        """Diffusion or teacher forcing."""
        stage = self._stage(name, steps, minutes, peak)
        attention = {c: self._attention(c, history) for c in (WHOLE, FROM_IMAGE)}
        for step in stage.progress:
            chunking = FROM_IMAGE if step % 4 == 3 else WHOLE
            inputs = self.clips.pick(self._index(self.batch))
            if chunking is FROM_IMAGE:
                inputs = (*inputs[:3], torch.full_like(inputs[3], FRAMES))
            losses = partial(loss, stage.raw, attention[chunking], chunking[1])
            self._log(stage, stage.update(chunking[0], losses, *inputs))
        self._finish(stage)

    def run_self_rollout(self, steps: int, minutes: float | None, peak: float, reuse: int = 3) -> None:
        """Train on history that the model rolled out itself; each rollout serves `reuse` batches."""
        stage = self._stage("self_rollout", steps, minutes, peak)
        attention = self._attention(WHOLE, history=True)
        losses = partial(given_history, stage.raw, attention, WHOLE[1])
        while stage.progress.fraction < 1:
            inputs = self.clips.pick(self._index(self.batch * reuse))
            actor = copy.deepcopy(stage.raw).to(torch.bfloat16 if stage.on_gpu else torch.float32)
            history, weight, drift = self.roll_out(actor, *inputs)
            for part in torch.randperm(self.batch * reuse, device=history.device).split(self.batch):
                batch = [tensor[part] for tensor in (*inputs, history, weight)]
                self._log(stage, stage.update("self_rollout", losses, *batch) | {"drift": drift})
                stage.progress.step += 1
        self._finish(stage)

    @torch.no_grad()
    def roll_out(
        self, student: Student, latents: Tensor, ids: Tensor, mask: Tensor, event_frame: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Continue true prefixes of random length with the model, through the KV cache.

        Returns:
            history (b, f, c, h, w); weight (b, f), small where the rollout has left the true path, since
            its continuation is not the right answer there; mean squared distance from the true path.
        """
        b, frames = latents.shape[:2]
        seeds = torch.randint(2**31, (b,)).tolist()
        prefix = int(torch.randint(1, 4, (1,)))
        before, after = student.prompt(ids[:, 0], mask[:, 0]), student.prompt(ids[:, 1], mask[:, 1])
        size = (latents.shape[2], latents.shape[3], latents.shape[4])
        rollout = Rollout(student.transformer, before, SPEC, SCHEDULE, size, seeds, CHUNK)
        made = []
        for start in range(0, frames, CHUNK):
            rollout.set_text(_switch(before, after, event_frame <= start))
            true = latents[:, start : start + CHUNK]
            if start < prefix * CHUNK:
                rollout.append(true)
                made.append(true)
            else:
                made.append(rollout.step_chunk(noise=torch.randn_like(true)).latents.float())
        history = torch.cat(made, 1)
        distance = (history - latents).square().mean((2, 3, 4)).view(b, -1, CHUNK).mean(2)
        before_chunk = torch.cat([torch.zeros_like(distance[:, :1]), distance[:, :-1]], 1)
        usual = before_chunk.median(0).values.clamp_min(0.02)
        weight = 1 / (1 + (before_chunk / (1.5 * usual)).pow(4))
        return history, weight.repeat_interleave(CHUNK, 1), distance.mean()

    def _draw(self, number: int) -> Clips:
        return draw_clips(self.vae, number, FRAMES, self.generator)

    def _index(self, number: int) -> Tensor:
        return torch.randint(len(self.clips), (number,), generator=self.generator, device=self.generator.device)

    def _attention(self, chunking: Chunking, history: bool) -> BlockCausalAttention:
        return BlockCausalAttention(GRID, GRID, SPEC, chunking[1], history, self.accelerator.device)

    def _stage(self, name: str, steps: int, minutes: float | None, peak: float) -> Stage:
        return Stage(name, self.student, self.folder, self.accelerator, Progress(steps, minutes), peak)

    def _log(self, stage: Stage, values: dict[str, Tensor]) -> None:
        step = stage.progress.step
        if step % 100 == 0:
            stage.log(**values)
        if self.refresh and step % 50 == 49:
            fresh = self._draw(self.refresh)
            self.next_fresh = self.next_fresh if self.next_fresh + self.refresh <= len(self.clips) else 0
            self.clips.replace(self.next_fresh, fresh)
            self.next_fresh += self.refresh
        if step % 2000 == 1999:
            stage.save()

    def _finish(self, stage: Stage) -> None:
        stage.save()
        stage.use_average()
        self.student = stage.raw
        save_parts(self.student, self.folder / "pipeline")


def _switch(before: TextContext, after: TextContext, changed: Tensor) -> TextContext:
    """Per batch element, the first context or the second."""
    pick = changed[:, None, None, None]
    keys = [torch.where(pick, b, a) for a, b in zip(before.keys, after.keys, strict=True)]
    values = [torch.where(pick, b, a) for a, b in zip(before.values, after.values, strict=True)]
    return replace(before, keys=keys, values=values)


def save_parts(student: Student, folder: Path) -> None:
    """Transformer and text encoder in float16, as they ship."""
    half = Student()
    half.load_state_dict(student.state_dict())
    half.transformer.half().save_pretrained(folder / "transformer")
    half.text_encoder.half().save_pretrained(folder / "text_encoder")


def load_parts(folder: Path) -> Student:
    """A student with the float16 weights that `save_parts` wrote."""
    student = Student()
    transformer = CausalWanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    student.transformer.load_state_dict(transformer.state_dict())
    student.text_encoder.load_state_dict(encoder.state_dict())
    return student
