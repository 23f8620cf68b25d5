"""Pictures and videos to start from: what is accepted, and that they become the VAE's own latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import CHANNELS, HEIGHT, WIDTH, build_vae, generator, relative_l2
from vidkv.conditioning import (
    PIECE,
    as_pixels,
    encode_pixels,
    usable_frames,
)
from vidkv.errors import InputError
from vidkv.models.tiny_vae import TinyVideoDecoder
from vidkv.models.vae import pixel_frames


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


class TestPixels:
    def test_every_kind_is_the_same_video(self) -> None:
        wanted = pixels(1, 3, 8, 6, 3)
        pictures = [Image.fromarray(frame.numpy()) for frame in wanted[0]]
        for value in (wanted, wanted[0], wanted.numpy(), wanted[0].numpy(), pictures, tuple(pictures)):
            assert torch.equal(as_pixels(value, 8, 6), wanted)
        for value in (pictures[0], wanted[0, 0], wanted[0, 0].numpy()):
            assert torch.equal(as_pixels(value, 8, 6), wanted[:, :1])

    def test_transparency_and_grey_become_colours(self) -> None:
        grey = Image.fromarray(pixels(8, 6).numpy())
        assert torch.equal(as_pixels(grey, 8, 6), as_pixels(grey.convert("RGB"), 8, 6))
        clear = Image.fromarray(pixels(8, 6, 4).numpy())
        assert as_pixels(clear, 8, 6).shape == (1, 1, 8, 6, 3)

    @pytest.mark.parametrize("tensor", [True, False])
    def test_another_size_is_cropped_around_the_middle_not_stretched(self, tensor: bool) -> None:
        """Twice as wide as wanted: of four stripes the outer two go, the inner two stay in their places."""
        stripes = torch.zeros(16, 64, 3, dtype=torch.uint8)
        for i, value in enumerate((250, 50, 150, 250)):
            stripes[:, 16 * i : 16 * i + 16] = value
        value: Any = stripes if tensor else Image.fromarray(stripes.numpy())
        found = as_pixels(value, 8, 16)[0, 0, :, :, 0].float()
        assert found.shape == (8, 16)
        assert float((found[:, 2:6] - 50).abs().max()) < 2
        assert float((found[:, 10:14] - 150).abs().max()) < 2

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("picture.png", "is str; give PIL images"),
            (None, "is NoneType"),
            ([], "is list"),
            (torch.zeros(8, 6, 3), r"\(8, 6, 3\) torch.float32"),
            (np.zeros((8, 6, 3)), r"\(8, 6, 3\) torch.float64"),
            (torch.zeros(8, 6, dtype=torch.uint8), r"\(8, 6\) torch.uint8"),
            (torch.zeros(3, 8, 6, dtype=torch.uint8), r"\(3, 8, 6\); give \(frames, height, width, 3\)"),
            (torch.zeros(0, 8, 6, 3, dtype=torch.uint8), r"\(0, 8, 6, 3\)"),
            (torch.zeros(2, 1, 8, 6, 3, dtype=torch.uint8), r"\(2, 1, 8, 6, 3\)"),
        ],
    )
    def test_anything_else(self, value: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            as_pixels(value, 8, 6)


class TestEncoding:
    @pytest.mark.parametrize("frames", [1, 5, PIECE + 1, PIECE + 5, 2 * PIECE + 1])
    def test_equals_diffusers_encoder(self, frames: int) -> None:
        """Over the seams of the pieces too."""
        vae, given = build_vae(), pixels(1, frames, HEIGHT, WIDTH, 3)
        found = encode_pixels(vae, given, torch.device("cpu"))
        with torch.no_grad():
            raw = vae.encode((given.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode()
        mean, deviation = (
            torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        wanted = ((raw - mean) / deviation).transpose(1, 2)
        assert found.shape == (1, 1 + (frames - 1) // 4, CHANNELS, HEIGHT // 8, WIDTH // 8)
        assert relative_l2(found, wanted) < 1e-5

    def test_a_decoder_alone_cannot(self) -> None:
        decoder = TinyVideoDecoder(latent_channels=CHANNELS, channels=(8, 6, 4, 4))
        with pytest.raises(InputError, match="TinyVideoDecoder cannot encode a picture"):
            encode_pixels(decoder, pixels(1, 1, HEIGHT, WIDTH, 3), torch.device("cpu"))


class TestUsableFrames:
    @pytest.mark.parametrize(("first", "chunk"), [(3, 3), (1, 3), (1, 1), (8, 8)])
    @pytest.mark.parametrize("most", [2, 9, 21])
    def test_the_longest_prefix_of_whole_chunks(self, first: int, chunk: int, most: int) -> None:
        whole = [pixel_frames(first + n * chunk) for n in range(40) if n == 0 or first + n * chunk <= most]
        for frames in range(1, 120):
            fitting = [count for count in whole if count <= frames]
            if fitting:
                assert usable_frames(frames, first, chunk, most) == max(fitting)
            else:
                with pytest.raises(InputError, match=f"has {frames} frames; .* at least {whole[0]}"):
                    usable_frames(frames, first, chunk, most)
