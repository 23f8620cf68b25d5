"""Stage 1: the causal 3-D VAE of the embedded world, of diffusers' Wan class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from einops import rearrange
from torch import Tensor

from vidkv.apps.train.common import Progress, Stage
from vidkv.models.bounce.world import Scenes, Trajectory, render, sample_scenes, simulate
from vidkv.models.registry import BOUNCE
from vidkv.models.vae import decode_clip, encode_clip

KL_WEIGHT = 3e-5
POOL_FRAMES = 140


class ClipPool:
    """Simulated scenes from which short clips are drawn; simulating is dear, drawing is not."""

    def __init__(self, generator: torch.Generator, size: int = 4096, refresh: int = 200) -> None:
        self.generator, self.size, self.refresh = generator, size, refresh
        self.served = 0
        self.scenes: Scenes | None = None
        self.path: Trajectory | None = None

    def clips(self, number: int, frames: int) -> Tensor:
        """(b, 3, frames, 64, 64) in [-1, 1]."""
        if self.scenes is None or self.served % self.refresh == 0:
            event = torch.arange(20, 120)
            self.scenes = sample_scenes(self.size, self.generator, event_frames=event)
            self.path = simulate(self.scenes, POOL_FRAMES)
        assert self.path is not None
        self.served += 1
        device = self.generator.device
        index = torch.randint(self.size, (number,), generator=self.generator, device=device)
        start = int(torch.randint(POOL_FRAMES - frames, (1,), generator=self.generator, device=device))
        path = Trajectory(self.path.position[index], self.path.camera[index])
        return as_video(render(self.scenes[index], path, start, start + frames))


def as_video(frames: Tensor) -> Tensor:
    """(b, f, h, w, 3) in [0, 1] to the VAE's (b, 3, f, h, w) in [-1, 1]."""
    return rearrange(frames, "b f h w c -> b c f h w") * 2 - 1


def build() -> AutoencoderKLWan:
    return AutoencoderKLWan(**BOUNCE.vae)


def train(
    folder: Path,
    accelerator: Accelerator,
    steps: int,
    minutes: float | None,
    batch: int,
    frames: int = 17,
    peak: float = 2e-3,
    init: Path | None = None,
) -> AutoencoderKLWan:
    """Train the VAE and write it, with the latents' mean and deviation in its configuration.

    Args:
        steps, minutes: the stage ends at whichever comes first.
        batch, frames: clips per step and pixel frames per clip (4n+1).
        init: a saved VAE to start from instead of random weights.
    """
    torch.manual_seed(0)
    generator = torch.Generator(accelerator.device).manual_seed(1)
    vae = AutoencoderKLWan.from_pretrained(init) if init else build()
    stage = Stage("vae", vae, folder, accelerator, Progress(steps, minutes), peak)
    pool = ClipPool(generator)
    for step in stage.progress:
        values = stage.update("vae", partial(losses, stage.raw), pool.clips(batch, frames))
        if step % 100 == 0:
            stage.log(**values)
        if step % 1000 == 999:
            stage.save()
    stage.save()
    vae = stage.use_average().eval()
    mean, deviation = latent_statistics(vae, pool)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    psnr = reconstruction_psnr(vae, pool)
    stage.log(final_psnr_db=psnr)
    vae.save_pretrained(folder / "pipeline" / "vae")
    return vae


def losses(vae: AutoencoderKLWan, clips: Tensor) -> dict[str, Tensor]:
    """Squared and absolute error of the reconstruction, and a light pull of the latents to N(0, 1)."""
    posterior = encode_clip(vae, clips)
    error = decode_clip(vae, posterior.sample()).float() - clips
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse, l1 = error.square().mean(), error.abs().mean()
    loss = mse + 0.1 * l1 + KL_WEIGHT * kl
    return {"loss": loss, "psnr_db": -10 * (mse / 4).log10(), "l1": l1, "kl": kl}


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, pool: ClipPool) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the latents, (16,) each."""
    latents = torch.cat([encode_clip(vae, pool.clips(64, 33)).mode().float() for _ in range(8)])
    return latents.mean((0, 2, 3, 4)).cpu(), latents.std((0, 2, 3, 4)).cpu()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, pool: ClipPool) -> float:
    """PSNR in dB, full range 1, of clips longer than any the VAE was trained on."""
    clips = pool.clips(64, 65)
    error = decode_clip(vae, encode_clip(vae, clips).mode()).clamp(-1, 1) - clips
    return float(-10 * (error.square().mean() / 4).log10())
