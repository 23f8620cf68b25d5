"""Stage 1: the causal 3-D VAE of the embedded world, of diffusers' Wan class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from einops import rearrange
from torch import Tensor

from vidkv.apps.train.common import SAVE_STEPS, Progress, Stage, recover, replacing
from vidkv.models.bounce.world import Scenes, Trajectory, render, sample_scenes, simulate
from vidkv.models.checkpoints.folders import verify
from vidkv.models.families.bounce import BOUNCE
from vidkv.models.vae import decode_clip, encode_clip

KL_WEIGHT = 3e-6
GUIDE_WEIGHT = 0.03
WHITENING_FLOOR = 0.1
POOL_FRAMES = 140
OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))
"""Lightness, red against green, yellow against blue."""


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
    """Train the VAE and write it to `pipeline/vae`, with the latents' deviation in its configuration.

    One that is there is returned as it is: a transformer may have learned on its latents.

    Args:
        steps, minutes: the stage ends at whichever comes first.
        batch, frames: clips per step and pixel frames per clip (4n+1).
        init: a saved VAE to start from instead of random weights.
    """
    finished = folder / "pipeline" / "vae"
    if recover(finished):
        verify(finished, AutoencoderKLWan)
        return AutoencoderKLWan.from_pretrained(finished, dtype=torch.float32)
    torch.manual_seed(0)
    generator = torch.Generator(accelerator.device).manual_seed(1)
    vae = AutoencoderKLWan.from_pretrained(init, dtype=torch.float32) if init else build()
    stage = Stage("vae", vae, folder, accelerator, Progress(steps, minutes), peak, generator)
    pool = ClipPool(generator)
    for step in stage.progress:
        values = stage.update("vae", partial(losses, stage.raw), pool.clips(batch, frames))
        if step % 100 == 0:
            stage.log(**values)
        if step % SAVE_STEPS == SAVE_STEPS - 1:
            stage.save(step + 1)
    stage.save(stage.progress.step)
    vae = stage.use_average().eval()
    whiten(vae, pool)
    psnr = reconstruction_psnr(vae, pool)
    stage.log(final_psnr_db=psnr)
    with replacing(finished) as target:
        vae.save_pretrained(target)
    return vae


def losses(vae: AutoencoderKLWan, clips: Tensor) -> dict[str, Tensor]:
    """Error of the reconstruction, a light pull of the latents to N(0, 1), and a guide to colour.

    The objects are brighter than any background and a tenth of the picture, so bright pixels weigh up to
    five times as much. Left to itself an encoder spends its latents on outlines and keeps hues close
    together, where a flow model confuses them: three channels are drawn to the cell's average colour.
    """
    posterior = encode_clip(vae, clips)
    error = decode_clip(vae, posterior.sample()).float() - clips
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    weight = 3 + 2 * clips.amax(1, keepdim=True)
    weighted = (weight * (error.square() + 0.1 * error.abs())).mean()
    guide = (mean[:, :3] - average_colour(clips)).square().mean()
    loss = weighted + KL_WEIGHT * kl + GUIDE_WEIGHT * guide
    psnr = -10 * (error.square().mean() / 4).log10()
    return {"loss": loss, "psnr_db": psnr, "kl": kl, "guide": guide}


def average_colour(clips: Tensor) -> Tensor:
    """Opponent colours averaged over each latent cell: 8x8 pixels of the first frame or of four frames.

    Args:
        clips: (b, 3, 4n+1, h, w) in [-1, 1].

    Returns:
        (b, 3, n+1, h/8, w/8), about four times the average.
    """
    first = F.avg_pool3d(clips[:, :, :1], (1, 8, 8))
    rest = F.avg_pool3d(clips[:, :, 1:], (4, 8, 8))
    red, green, blue = torch.cat([first, rest], 2).unbind(1)
    return 4 * torch.stack([r * red + g * green + b * blue for r, g, b in OPPONENT], 1)


@torch.no_grad()
def whiten(vae: AutoencoderKLWan, pool: ClipPool, clips: int = 512) -> None:
    """Decorrelate the latents, in place, by a matrix folded into the VAE's two 1x1x1 convolutions.

    A flow model's squared error counts every direction by its variance; with correlated channels a few
    directions would be most of it, and shape and hue the rest. The matrix is the symmetric inverse root
    of the covariance, with a floor under its eigenvalues. Posterior spreads are left as they are.
    Writes the latents' new mean and deviation to the configuration.
    """
    batch = min(64, clips)
    parts = [encode_clip(vae, pool.clips(batch, 33)).mode().double() for _ in range(clips // batch)]
    latents = torch.cat(parts)
    flat = rearrange(latents, "b c f h w -> (b f h w) c")
    mean, covariance = flat.mean(0), flat.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    root = (values + WHITENING_FLOOR * values.mean()).sqrt()
    forward, back = (vectors * power @ vectors.T for power in (1 / root, root))
    c = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    assert encode.bias is not None and decode.bias is not None
    encode.weight[:c] = torch.einsum("oi,ixyzw->oxyzw", forward, encode.weight[:c].double())
    encode.bias[:c] = forward @ (encode.bias[:c].double() - mean)
    decode.bias += decode.weight[:, :, 0, 0, 0].double() @ mean
    decode.weight.copy_(torch.einsum("oixyz,iw->owxyz", decode.weight.double(), back))
    deviation = (flat - mean).matmul(forward).std(0)
    vae.register_to_config(latents_mean=[0.0] * c, latents_std=deviation.tolist())


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, pool: ClipPool) -> float:
    """PSNR in dB, full range 1, of clips longer than any the VAE was trained on."""
    clips = pool.clips(64, 65)
    error = decode_clip(vae, encode_clip(vae, clips).mode()).clamp(-1, 1) - clips
    return float(-10 * (error.square().mean() / 4).log10())
