"""`vidkv train bounce`: the stages in order, from nothing or from a pipeline, to a pipeline that ships."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from vidkv.apps.train import vae as vae_stage
from vidkv.apps.train.dit import FRAMES, SCHEDULE, Trainer, lessons
from vidkv.errors import InputError
from vidkv.loading import find_model
from vidkv.models.bounce.prompts import WORLDS
from vidkv.models.bounce.text import build_tokenizer
from vidkv.models.checkpoints.folders import verify
from vidkv.pipeline import CausalVideoPipeline

STEPS = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """Sizes and shares of one kind of hardware; the clock decides how many steps a stage gets.

    Attributes:
        vae_batch: clips of 17 frames per VAE step.
        batch: whole clips per transformer step.
        clips, openings: whole clips and first chunks drawn before the transformer's first step.
        refresh: whole clips renewed every 500 steps.
        reuse: batches that one self-rollout serves.
        shares: of the minutes, for VAE, diffusion forcing, teacher forcing on half clips, on whole
            clips, and self-rollout; a stage with no share is left out.
        peaks: highest learning rate of each.
    """

    vae_batch: int
    batch: int
    clips: int
    openings: int
    refresh: int
    reuse: int
    shares: tuple[float, float, float, float, float]
    peaks: tuple[float, float, float, float, float]


RECIPES = {
    "gpu": Recipe(
        16, 64, 8192, 65_536, 512, 16, (0.22, 0.08, 0.3, 0.15, 0.25), (1.5e-3, 1.2e-3, 1e-3, 5e-4, 3e-4)
    ),
    "cpu": Recipe(4, 8, 512, 4096, 64, 4, (0.3, 0.1, 0.4, 0.1, 0.1), (1e-3, 1e-3, 7e-4, 4e-4, 2e-4)),
}


def train(out: Path, world: str, recipe: str, minutes: float, init: Path | None) -> dict[str, Any]:
    """Train, or go on training, until the minutes are spent.

    Args:
        out: checkpoints by stage, `curve.jsonl`, and `pipeline/` once all stages are done.
        world, recipe: keys of WORLDS and RECIPES.
        minutes: of all stages together, those of earlier runs into `out` counted in.
        init: a pipeline folder to start from; its VAE is kept as it is.

    Returns:
        Where the pipeline lies and the last line of the curve.

    Raises:
        InputError: an unknown world or recipe, no time, or the GPU's recipe without a GPU.
    """
    if world not in WORLDS:
        raise InputError(f"world={world!r}; choose {' or '.join(WORLDS)}")
    if recipe not in RECIPES:
        raise InputError(f"recipe={recipe!r}; choose {' or '.join(RECIPES)}")
    if not minutes > 0:
        raise InputError(f"minutes={minutes}; give a positive number")
    if recipe == "gpu" and not torch.cuda.is_available():
        raise InputError(f"recipe={recipe!r} needs a CUDA GPU and torch sees none; use --recipe cpu")
    settings = RECIPES[recipe]
    accelerator = Accelerator(cpu=recipe == "cpu", mixed_precision="bf16")
    vae_minutes, *rest = (minutes * share for share in settings.shares)
    if init is not None:
        init = find_model(init)
        verify(init / "vae", AutoencoderKLWan)
        vae = AutoencoderKLWan.from_pretrained(init / "vae", dtype=torch.float32)
    else:
        vae = vae_stage.train(
            out,
            Accelerator(cpu=recipe == "cpu"),
            STEPS,
            vae_minutes,
            settings.vae_batch,
            peak=settings.peaks[0],
        )
    trainer = Trainer(
        out, accelerator, vae, WORLDS[world], settings.clips, settings.openings, settings.batch,
        settings.refresh, init=init,
    )  # fmt: skip
    half = FRAMES // 2
    plans = (
        ("diffusion_forcing", lessons(half, settings.batch, history=False)),
        ("teacher_forcing_half", lessons(half, settings.batch, history=True)),
        ("teacher_forcing", lessons(FRAMES, settings.batch, history=True)),
    )
    for (name, cycle), share, peak in zip(plans, rest, settings.peaks[1:], strict=False):
        if share:
            trainer.run(name, cycle, STEPS, share, peak)
    if rest[3]:
        trainer.run_self_rollout(STEPS, rest[3], settings.peaks[4], reuse=settings.reuse)
    return {"pipeline": str(assemble(out, trainer, vae, world)), "last": _last_row(out / "curve.jsonl")}


def assemble(out: Path, trainer: Trainer, vae: AutoencoderKLWan, world: str) -> Path:
    """Write all parts in float16 as a pipeline folder."""
    first = SCHEDULE.first_chunk_steps
    pipe = CausalVideoPipeline(
        transformer=trainer.student.transformer.cpu().half(),
        vae=vae.cpu().half(),
        text_encoder=trainer.student.text_encoder.cpu().half(),
        tokenizer=build_tokenizer(),
        model="bounce",
        steps=list(SCHEDULE.steps),
        shift=SCHEDULE.shift,
        warp=SCHEDULE.warp,
        first_chunk_steps=list(first) if first else None,
        sampler=SCHEDULE.sampler,
        first_chunk_guidance=SCHEDULE.first_chunk_guidance,
        guided_down_to=SCHEDULE.guided_down_to,
        prompt_grammar=f"bounce:{world}",
    )
    folder = out / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def _last_row(curve: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(curve.read_text().splitlines()[-1])
    return row
