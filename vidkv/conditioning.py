"""An image or a video to start from, as latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from vidkv.errors import InputError
from vidkv.models.vae_encode import StreamingEncoder

PIECE = 16
"""Frames that are moved to the device at a time."""


def as_pixels(value: Any, height: int, width: int) -> Tensor:
    """(1, frames, height, width, 3) uint8 of an image or a video.

    Args:
        value: a PIL image or a list of them; or a uint8 tensor or array (height, width, 3), (frames, height,
            width, 3) or with a batch of one before that. Pictures of another size are scaled and cropped.

    Raises:
        InputError: anything else.
    """
    from PIL import Image, ImageOps

    pictures = list(value) if isinstance(value, list | tuple) else [value]
    if pictures and all(isinstance(picture, Image.Image) for picture in pictures):
        fitted = [ImageOps.fit(picture.convert("RGB"), (width, height)) for picture in pictures]
        value = torch.from_numpy(np.stack([np.asarray(picture) for picture in fitted]))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or not 3 <= value.ndim <= 5:
        kind = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the picture to start from is {kind}; give PIL images or uint8 (frames, h, w, 3)")
    pixels = value.reshape(1, -1, *value.shape[-3:])
    if pixels.shape[-1] != 3 or not pixels.shape[1] or (value.ndim == 5 and len(value) != 1):
        raise InputError(
            f"the picture to start from is {tuple(value.shape)}; give (frames, height, width, 3)"
        )
    if tuple(pixels.shape[2:4]) != (height, width):
        return as_pixels([Image.fromarray(frame.cpu().numpy()) for frame in pixels[0]], height, width)
    return pixels


def encode_pixels(vae: nn.Module, pixels: Tensor, device: torch.device) -> Tensor:
    """Normalised latents (b, f, c, h, w) of pixels (b, 4 n + 1 frames, height, width, 3) uint8.

    They are encoded a group of frames after the other, in memory that does not grow with the video.

    Raises:
        InputError: the VAE has no encoder.
    """
    if not isinstance(vae, AutoencoderKLWan):
        raise InputError(f"{type(vae).__name__} cannot encode a picture; load the model with its own VAE")
    encoder = StreamingEncoder(vae)
    starts = range(0, pixels.shape[1], PIECE)
    latents = [encoder.feed(pixels[:, start : start + PIECE].to(device)) for start in starts]
    latents.append(encoder.flush())
    return torch.cat([part for part in latents if part.shape[1]], 1)


def usable_frames(frames: int, first: int, chunk: int, most: int) -> int:
    """Pixel frames at the end of a video that make a prefix of whole chunks.

    Args:
        frames: it has.
        first, chunk: latent frames of the first chunk and of the others.
        most: latent frames that are of use.

    Raises:
        InputError: it is too short.
    """
    latent = min(1 + (frames - 1) // 4, max(first, most))
    if latent < first:
        raise InputError(
            f"the video to go on from has {frames} frames; this model needs at least {4 * (first - 1) + 1}"
        )
    latent = first + (latent - first) // chunk * chunk
    return 4 * (latent - 1) + 1
