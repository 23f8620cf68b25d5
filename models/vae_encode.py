"""Streaming encode with diffusers' Wan VAEs: feed pixel frames as they come, get latent frames.

The first pixel frame of a video becomes one latent frame, every four after it one more (Wan 2.1 and
2.2). Every convolution keeps its last inputs, so a film of any length is encoded in the memory of four
frames: for image-to-video, and for extending a long video.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify
from einops import rearrange
from torch import Tensor

from vidkv.errors import InputError
from vidkv.models.vae import Statistics


class StreamingEncoder:
    """Frames in, latents out, with memory that does not grow.

        encoder = StreamingEncoder(vae)
        for frames in pieces:                   # of any number of frames
            latents = encoder.feed(frames)      # piece 0 of nine frames: three; later ones of twelve: three
        rest = encoder.flush()                  # what is left of a group of four

    Args:
        vae: a Wan VAE; its `latents_mean` and `latents_std` normalise.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self._statistics = Statistics(vae.config.latents_mean, vae.config.latents_std)
        self._group = 2 ** sum(vae.config.temperal_downsample)
        self.reset()

    def reset(self) -> None:
        """Forget everything fed so far: the next frame is the first of a video."""
        convolutions: int = self.vae._cached_conv_counts["encoder"]
        self._features: list[Tensor | None] = [None] * convolutions
        self._begun = False
        self._pending: Tensor | None = None
        self._size: tuple[int, int, int] | None = None

    @property
    def pending_frames(self) -> int:
        """Frames fed that wait for the rest of their group."""
        return 0 if self._pending is None else self._pending.shape[2]

    @torch.no_grad()
    def feed(self, frames: Tensor) -> Tensor:
        """Encode the next frames; those that fill no group wait for the next call.

        Args:
            frames: (batch, frames, height, width, 3), uint8 or floating in [-1, 1].

        Returns:
            (batch, latent frames, channels, latent height, latent width) float32: the posterior's mean,
            normalised as the transformer sees it; of no frames where no group is full.

        Raises:
            InputError: another shape or type, a size that the network cannot halve, or another size than
                before.
        """
        self._size = self._check(frames)
        latents, taken = [], 0
        while taken < frames.shape[1]:
            wanted = (self._group if self._begun else 1) - self.pending_frames
            piece = self._pixels(frames[:, taken : taken + wanted])
            taken += wanted
            self._pending = piece if self._pending is None else torch.cat([self._pending, piece], 2)
            if piece.shape[2] == wanted:
                latents.append(self._encode(self._pending))
                self._pending, self._begun = None, True
        return torch.cat(latents, 1) if latents else self._nothing(frames.device)

    @torch.no_grad()
    def flush(self) -> Tensor:
        """Encode the frames that wait, the last one repeated to fill their group; the video ends here.

        Returns:
            (batch, 1 or 0 latent frames, channels, latent height, latent width) float32.
        """
        if self._pending is None:
            return self._nothing(self.vae.device)
        missing = self._group - self.pending_frames
        last = self._pending[:, :, -1:].expand(-1, -1, missing, -1, -1)
        group = torch.cat([self._pending, last], 2)
        self._pending = None
        return self._encode(group)

    def _encode(self, group: Tensor) -> Tensor:
        if self.vae.config.patch_size is not None:
            group = patchify(group, patch_size=self.vae.config.patch_size)
        moments = self.vae.quant_conv(self.vae.encoder(group, feat_cache=self._features, feat_idx=[0]))
        mean = rearrange(moments.chunk(2, 1)[0], "b c f h w -> b f c h w")
        return self._statistics.normalise(mean.float())

    def _pixels(self, frames: Tensor) -> Tensor:
        x = rearrange(frames, "b f h w c -> b c f h w").to(self.vae.device)
        if not x.is_floating_point():
            x = x.float().div_(127.5).sub_(1)
        return x.to(self.vae.dtype)

    def _nothing(self, device: torch.device) -> Tensor:
        batch, height, width = self._size or (0, 0, 0)
        stride = spatial_stride(self.vae)
        return torch.empty(batch, 0, self.vae.config.z_dim, height // stride, width // stride, device=device)

    def _check(self, frames: Tensor) -> tuple[int, int, int]:
        shape = tuple(frames.shape)
        if len(shape) != 5 or shape[-1] != 3 or 0 in (shape[0], *shape[2:]):
            raise InputError(f"frames are {shape}; the encoder takes (batch, frames, height, width, 3)")
        if frames.dtype != torch.uint8 and not frames.is_floating_point():
            raise InputError(f"frames are {frames.dtype}; give uint8, or floating numbers in [-1, 1]")
        size, stride = (shape[0], shape[2], shape[3]), spatial_stride(self.vae)
        if size[1] % stride or size[2] % stride:
            raise InputError(
                f"frames of {size[1]}x{size[2]} pixels; height and width must be multiples of {stride}: "
                "scale or crop them"
            )
        if self._size not in (None, size):
            raise InputError(
                f"frames of (batch, height, width) {size} follow {self._size}; reset the encoder for another "
                "video"
            )
        return size


def spatial_stride(vae: AutoencoderKLWan) -> int:
    """Pixels per latent row, counted on the network's levels."""
    return int(2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1))


def encode_image(vae: AutoencoderKLWan, image: Tensor) -> Tensor:
    """One image as the first latent frame of a video.

    Args:
        image: (height, width, 3) or (batch, height, width, 3), uint8 or floating in [-1, 1].

    Returns:
        (batch, 1, channels, latent height, latent width) float32, normalised.

    Raises:
        InputError: as `StreamingEncoder.feed`.
    """
    if image.ndim not in (3, 4):
        raise InputError(f"the image is {tuple(image.shape)}; give (height, width, 3) or a batch of them")
    batch = image if image.ndim == 4 else image[None]
    return StreamingEncoder(vae).feed(batch[:, None])
