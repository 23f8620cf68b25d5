"""Stages 2 to 4: the causal transformer of the embedded world and its text encoder.

Diffusion forcing gives every chunk a noise level of its own; teacher forcing denoises each chunk given
slightly noisy clean history; self-rollout denoises given history that the model itself made, through the
cache that a rollout uses, towards the simulator's exact continuation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from vidkv.apps.train.common import SAVE_STEPS, Progress, Stage
from vidkv.apps.train.latents import CHUNK, Clips, draw_clips
from vidkv.attention import BlockCausalAttention
from vidkv.cache import CacheSpec
from vidkv.models.bounce.prompts import World
from vidkv.models.bounce.text import build_text_encoder
from vidkv.models.families.bounce import BOUNCE
from vidkv.models.text import embed
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

FRAMES = 42
GRID = 4
SPEC = CacheSpec(window=21, sink=3)
SCHEDULE = FlowSchedule(
    steps=(1000, 750, 500, 250),
    shift=3.0,
    first_chunk_steps=tuple(range(1000, 0, -25)),
    sampler="euler",
    first_chunk_guidance=2.0,
    guided_down_to=0.3,
)
HISTORY_NOISE = 0.12
MOST_DRIFT = 0.4
REFRESH_STEPS = 500
SELF_ROLLOUT_SHARE = 0.35


class Student(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = CausalWanTransformer3DModel(**BOUNCE.transformer)
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
    latents: Tensor, ids: Tensor, mask: Tensor, event_frame: Tensor, impostor: Tensor,
    history: Tensor | None = None, weight: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Denoise every chunk given finished history at timestep 0: teacher forcing, or self-rollout.

    Args:
        impostor: the clip with other colours, shapes and sizes, into which history drifts.
        history: what to read instead of the clip itself, (b, f, c, h, w).
        weight: (b, f) of each frame in the loss.
    """
    frames = sum(chunks)
    latents = latents[:, :frames]
    b, device = latents.shape[0], latents.device
    if history is None:
        seen = torch.lerp(latents, impostor[:, :frames], _drift(b, chunks, device))
    else:
        seen = history[:, :frames]
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


def _drift(batch: int, chunks: Sequence[int], device: torch.device) -> Tensor:
    """How far each frame of the history has drifted from itself, (b, f, 1, 1, 1).

    Independent noise on history averages out over a window; what goes wrong in a long rollout does not:
    hue and outline walk away and stay away. So half of the clips remember themselves as a mixture with
    an impostor, the first chunk (which stays as the sink) least, and learn to hold on to it and the prompt.
    """
    most = MOST_DRIFT * torch.rand(batch, 1, device=device) * (torch.rand(batch, 1, device=device) < 0.5)
    share = most * (0.5 + 0.5 * torch.rand(batch, len(chunks), device=device))
    share[:, 0] *= 0.25
    return _expand(share, chunks)[:, :, None, None, None]


@dataclass(frozen=True)
class Lesson:
    """One kind of training step.

    Attributes:
        name: key of its CUDA graph.
        chunks: latent frames per chunk.
        batch: clips per step.
        history: denoise given finished history (teacher forcing), or every chunk at its own level.
        openings: take clips from the pool of first chunks.
    """

    name: str
    chunks: tuple[int, ...]
    batch: int
    history: bool
    openings: bool = False


def lessons(frames: int, batch: int, history: bool) -> list[Lesson]:
    """A cycle of steps on clips of `frames` latent frames.

    First chunks get steps of their own: they alone must be made from the prompt, and in a clip of
    fourteen chunks they are too few to learn it from. Given history, one step in six starts from a single
    frame, as image-to-video will.
    """
    count = frames // CHUNK
    kind = "given" if history else "forced"
    whole = Lesson(f"{kind}{frames}", (CHUNK,) * count, batch, history)
    image = Lesson(f"{kind}{frames}, image", (1, *[CHUNK] * (count - 1), CHUNK - 1), batch, history)
    first = first_chunks(batch)
    return [first, whole, whole, first, whole, image] if history else [first, first, first, whole]


def first_chunks(batch: int) -> Lesson:
    """First chunks alone, as many tokens per step as a few whole clips have."""
    return Lesson("first", (CHUNK,), batch * 4, False, openings=True)


class Trainer:
    """The stages in order, over two pools of clips that are renewed while training.

    Args:
        folder: checkpoints, the curve, and `pipeline/` with the finished parts.
        vae: trained; frozen here.
        world: how much variety.
        clips, openings: how many whole clips and first chunks to draw before the first step.
        batch: whole clips per step.
        refresh: how many of the whole clips are replaced after every REFRESH_STEPS steps.
        init: a pipeline folder whose transformer and text encoder to start from.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, vae: AutoencoderKLWan, world: World, clips: int,
        openings: int, batch: int, refresh: int, init: Path | None = None, seed: int = 2,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.folder, self.accelerator, self.batch = folder, accelerator, batch
        self.refresh, self.world = refresh, world
        self.vae = vae.to(accelerator.device).requires_grad_(False).eval()
        self.generator = torch.Generator(accelerator.device).manual_seed(seed)
        self.student = load_parts(init) if init else Student()
        if accelerator.device.type == "cuda":
            for block in self.student.transformer.blocks:
                block.compile(dynamic=False)
        self.clips = self._draw(clips, FRAMES)
        self.openings = self._draw(openings, CHUNK)
        self.replaced = 0

    def run(self, name: str, cycle: Sequence[Lesson], steps: int, minutes: float | None, peak: float) -> None:
        """Diffusion or teacher forcing, as the lessons say."""
        stage = self._stage(name, steps, minutes, peak)
        attention = {lesson: self._attention(lesson) for lesson in set(cycle)}
        for step in stage.progress:
            lesson = cycle[step % len(cycle)]
            self._log(stage, lesson.name, self._teach(stage, lesson, attention[lesson]))
        self._finish(stage)

    def _teach(
        self, stage: Stage[Student], lesson: Lesson, attention: BlockCausalAttention
    ) -> dict[str, Tensor]:
        pool = self.openings if lesson.openings else self.clips
        latents, ids, mask, event_frame, impostor = pool.pick(self._index(pool, lesson.batch))
        if lesson.chunks[0] != CHUNK:
            event_frame = torch.full_like(event_frame, FRAMES)
        inputs = [latents, ids, mask, event_frame] + ([impostor] if lesson.history else [])
        loss = given_history if lesson.history else diffusion_forcing
        losses = partial(loss, stage.raw, attention, lesson.chunks)
        return stage.update(lesson.name, losses, *inputs)

    def run_self_rollout(
        self, steps: int, minutes: float | None, peak: float, frames: int = FRAMES, reuse: int = 4
    ) -> None:
        """Train on history that the model rolled out itself; each rollout serves `reuse` batches.

        Every second step is followed by one of first chunks, which no history can teach. The weights that
        come out lie a third of the way from where the stage began to where it ended: at the end objects
        keep their identity but motion has got worse, since a history that has strayed and the true
        continuation do not fit; on the way, identity is won and motion not yet lost (interpolation of
        weights as in WiSE-FT, arXiv 2109.01903).
        """
        begun = copy.deepcopy(self.student)
        stage = self._stage("self_rollout", steps, minutes, peak)
        first = first_chunks(self.batch)
        first_attention = self._attention(first)
        lesson = Lesson(f"self{frames}", (CHUNK,) * (frames // CHUNK), self.batch, history=True)
        losses = partial(given_history, stage.raw, self._attention(lesson), lesson.chunks)
        while stage.progress.fraction < 1:
            latents, ids, mask, event_frame, impostor = self.clips.pick(
                self._index(self.clips, self.batch * reuse)
            )
            latents = latents[:, :frames]
            actor = copy.deepcopy(stage.raw).to(torch.bfloat16 if stage.on_gpu else torch.float32)
            history, weight, drift = self.roll_out(actor, latents, ids, mask, event_frame)
            for part in torch.randperm(self.batch * reuse, device=history.device).split(self.batch):
                inputs = (latents, ids, mask, event_frame, impostor, history, weight)
                batch = [tensor[part] for tensor in inputs]
                self._log(stage, lesson.name, stage.update(lesson.name, losses, *batch) | {"drift": drift})
                stage.progress.step += 1
                if stage.progress.step % 2:
                    self._teach(stage, first, first_attention)
        self._finish(stage)
        with torch.no_grad():
            for ended, start in zip(self.student.parameters(), begun.parameters(), strict=True):
                ended.copy_(torch.lerp(start.to(ended.device), ended, SELF_ROLLOUT_SHARE))
        save_parts(self.student, self.folder / "pipeline")

    @torch.no_grad()
    def roll_out(
        self,
        student: Student,
        latents: Tensor,
        ids: Tensor,
        mask: Tensor,
        event_frame: Tensor,
        prefix: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Continue true prefixes of `prefix` (by default one to three) chunks through the KV cache.

        Returns:
            history (b, f, c, h, w); weight (b, f), small where the rollout has left the true path, since
            its continuation is not the right answer there; mean squared distance from the true path.
        """
        b, frames = latents.shape[:2]
        seeds = torch.randint(2**31, (b,)).tolist()
        prefix = prefix or int(torch.randint(1, 4, (1,)))
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

    def _draw(self, number: int, frames: int) -> Clips:
        return draw_clips(self.vae, number, frames, self.generator, self.world, impostors=frames > CHUNK)

    def _index(self, pool: Clips, number: int) -> Tensor:
        return torch.randint(len(pool), (number,), generator=self.generator, device=self.generator.device)

    def _attention(self, lesson: Lesson) -> BlockCausalAttention:
        return BlockCausalAttention(GRID, GRID, SPEC, lesson.chunks, lesson.history, self.accelerator.device)

    def _stage(self, name: str, steps: int, minutes: float | None, peak: float) -> Stage[Student]:
        progress = Progress(steps, minutes)
        return Stage(name, self.student, self.folder, self.accelerator, progress, peak, self.generator)

    def _log(self, stage: Stage[Student], lesson: str, values: dict[str, Tensor]) -> None:
        step = stage.progress.step
        if step % 50 < 2:
            stage.log(lesson=lesson, **values)
        if self.refresh and step % REFRESH_STEPS == REFRESH_STEPS - 1:
            start = self.replaced % len(self.clips)
            self.clips.replace(start, self._draw(min(self.refresh, len(self.clips) - start), FRAMES))
            self.replaced += self.refresh
        if step % SAVE_STEPS == SAVE_STEPS - 1:
            stage.save(step + 1)

    def _finish(self, stage: Stage[Student]) -> None:
        stage.save(stage.progress.step)
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
    transformer = CausalWanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    student.transformer.load_state_dict(transformer.state_dict())
    student.text_encoder.load_state_dict(encoder.state_dict())
    return student
