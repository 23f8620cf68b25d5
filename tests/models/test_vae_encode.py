"""Streaming encode is diffusers' encode, however the film is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from einops import rearrange
from torch import Tensor

from tests.tiny import CHANNELS, build_vae, noise, relative_l2
from vidkv.errors import InputError
from vidkv.models.vae import StreamingDecoder, normalise
from vidkv.models.vae_encode import StreamingEncoder, encode_image, spatial_stride

VAES: dict[str, dict[str, Any]] = {
    "bounce": {},
    "no patches": {"patch_size": None, "in_channels": 3, "out_channels": 3},
    "wider below": {"dim_mult": [1, 2, 2], "num_res_blocks": 2},
    "Wan 2.1": {
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "patch_size": None,
        "in_channels": 3,
        "out_channels": 3,
    },
    "residual, Wan 2.2": {
        "is_residual": True,
        "decoder_base_dim": 4,
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
    },
}
HEIGHT, WIDTH = 32, 48


@pytest.fixture(params=VAES)
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return build_vae(**VAES[request.param])


def film(frames: int, batch: int = 1) -> Tensor:
    """(batch, frames, height, width, 3) in (-1, 1)."""
    return noise(batch, frames, HEIGHT, WIDTH, 3).tanh()


def stock_encode(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """diffusers' encode, normalised: (batch, latent frames, channels, h, w)."""
    with torch.no_grad():
        posterior = vae.encode(rearrange(frames, "b f h w c -> b c f h w"), return_dict=False)[0]
    return normalise(vae, rearrange(posterior.mode(), "b c f h w -> b f c h w"))


def same(found: Tensor, wanted: Tensor) -> bool:
    """What was computed at float64 and handed out at float32.

    Kernels that a processor picks by layout sum float32 in other orders, so that is not what is compared.
    """
    assert wanted.dtype == torch.float64
    return found.shape == wanted.shape and relative_l2(found.double(), wanted) <= 1e-7


class TestEncode:
    @pytest.mark.parametrize(
        ("pieces", "latent_frames"),
        [
            ([17], [5]),
            ([1, 4, 4, 4, 4], [1, 1, 1, 1, 1]),
            ([1] * 17, [1, 0, 0, 0] * 4 + [1]),
            ([2, 7, 3, 5], [1, 2, 0, 2]),
        ],
        ids=str,
    )
    def test_streams_what_diffusers_encodes(
        self, vae: AutoencoderKLWan, pieces: list[int], latent_frames: list[int]
    ) -> None:
        vae, frames = vae.double(), film(17, batch=2).double()
        wanted = stock_encode(vae, frames)
        encoder = StreamingEncoder(vae)
        parts = [encoder.feed(piece) for piece in frames.split(pieces, 1)]
        assert [part.shape[1] for part in parts] == latent_frames
        assert float(wanted.std()) > 0.1 and encoder.pending_frames == 0
        assert same(torch.cat(parts, 1), wanted)

    def test_bytes_are_numbers(self, vae: AutoencoderKLWan) -> None:
        frames = torch.randint(0, 256, (1, 5, HEIGHT, WIDTH, 3), dtype=torch.uint8)
        found = StreamingEncoder(vae).feed(frames)
        assert relative_l2(found, stock_encode(vae, frames / 127.5 - 1)) <= 1e-6
        mixed = StreamingEncoder(vae)
        parts = [mixed.feed(frames[:, :3]), mixed.feed(frames[:, 3:] / 127.5 - 1)]
        assert relative_l2(torch.cat(parts, 1), found) <= 1e-6

    def test_an_image_is_the_first_frame(self, vae: AutoencoderKLWan) -> None:
        vae, frames = vae.double(), film(5).double()
        wanted = stock_encode(vae, frames)[:, :1]
        assert same(encode_image(vae, frames[:, 0]), wanted)
        assert same(encode_image(vae, frames[0, 0]), wanted)

    def test_flush_repeats_the_last_frame(self, vae: AutoencoderKLWan) -> None:
        vae, frames = vae.double(), film(7).double()
        encoder = StreamingEncoder(vae)
        parts = [encoder.feed(frames)]
        assert encoder.pending_frames == 2
        parts.append(encoder.flush())
        padded = torch.cat([frames, frames[:, -1:], frames[:, -1:]], 1)
        assert same(torch.cat(parts, 1), stock_encode(vae, padded))
        assert encoder.pending_frames == 0 and encoder.flush().shape[1] == 0

    def test_reset_begins_a_new_video(self, vae: AutoencoderKLWan) -> None:
        encoder = StreamingEncoder(vae)
        first = encoder.feed(film(6))
        assert not torch.equal(encoder.feed(film(5))[:, :2], first)
        encoder.reset()
        assert torch.equal(encoder.feed(film(6)), first)

    def test_half_precision_is_normalised_in_full(self) -> None:
        exact = StreamingEncoder(build_vae()).feed(film(5))
        half = StreamingEncoder(build_vae().bfloat16()).feed(film(5))
        assert half.dtype == torch.float32 and 0 < relative_l2(half, exact) < 3e-2

    def test_memory_does_not_grow(self, vae: AutoencoderKLWan) -> None:
        encoder, sizes = StreamingEncoder(vae), []
        for _ in range(5):
            encoder.feed(film(6))
            kept = [f for f in encoder._features if f is not None]
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept), "no cache holds a clip"
            sizes.append(sum(t.nbytes for t in kept))
        assert len(set(sizes)) == 1

    def test_what_it_encodes_the_decoder_takes(self, vae: AutoencoderKLWan) -> None:
        """Layout and normalisation agree: the round trip is diffusers' own."""
        frames = film(5)
        found = StreamingDecoder(vae).decode(StreamingEncoder(vae).feed(frames)).clamp(-1, 1)
        with torch.no_grad():
            wanted = vae(rearrange(frames, "b f h w c -> b c f h w")).sample
        assert relative_l2(found, wanted) <= 1e-5

    def test_never_looks_at_a_value(self, vae: AutoencoderKLWan) -> None:
        """Tensors without data pass: nothing is copied to the host, nothing branches on a number."""
        stride = spatial_stride(vae)
        latents = StreamingEncoder(vae.to("meta")).feed(film(6).to("meta"))
        assert latents.shape == (1, 2, CHANNELS, HEIGHT // stride, WIDTH // stride)


class TestInputs:
    @pytest.mark.parametrize(
        ("frames", "words"),
        [
            (torch.zeros(1, 1, 3, 16, 16), r"frames are \(1, 1, 3, 16, 16\)"),
            (torch.zeros(1, 16, 16, 3), r"frames are \(1, 16, 16, 3\)"),
            (torch.zeros(0, 1, 16, 16, 3), r"frames are \(0, 1"),
            (torch.zeros(1, 1, 16, 16, 3, dtype=torch.int64), "int64; give uint8"),
            (torch.zeros(1, 1, 20, 16, 3), "20x16 pixels; .* multiples of 8"),
            (torch.zeros(1, 1, 16, 24, 3), r"\(1, 16, 24\) follow \(1, 16, 16\)"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refused(self, frames: Tensor, words: str) -> None:
        encoder = StreamingEncoder(build_vae())
        encoder.feed(torch.zeros(1, 1, 16, 16, 3))
        with pytest.raises(InputError, match=words):
            encoder.feed(frames)

    def test_an_image_of_two_dimensions(self) -> None:
        with pytest.raises(InputError, match=r"the image is \(16, 16\)"):
            encode_image(build_vae(), torch.zeros(16, 16))
