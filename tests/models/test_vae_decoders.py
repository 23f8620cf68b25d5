"""Which decoder a network gets, and that what it keeps is what is planned."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from tests.tiny import CHANNELS, build_vae, noise
from vidkv.decoding import Decoder
from vidkv.errors import InputError
from vidkv.models.registry import MODELS
from vidkv.models.tiny_vae import StreamingTinyDecoder, TinyVideoDecoder
from vidkv.models.vae import StreamingDecoder
from vidkv.models.vae_decoders import feature_bytes, streaming_decoder
from vidkv.models.vae_tiles import TiledDecoder, Tiling

TILINGS = [Tiling(), Tiling(4, 4), Tiling(4, None, 2), Tiling(3, 4, sliced=True), Tiling(sliced=True)]


def build_tiny(large: bool = False) -> TinyVideoDecoder:
    return TinyVideoDecoder(CHANNELS, 2, large, channels=(8, 6, 4, 4)).eval().requires_grad_(False)


def build(kind: str) -> nn.Module:
    if kind.startswith("tiny"):
        return build_tiny(large=kind == "tiny, large")
    return build_vae(**({"is_residual": True, "decoder_base_dim": 8} if kind == "residual" else {}))


def kept_bytes(decoder: Decoder) -> int:
    return sum(tensor.nbytes for tensor in decoder.state().values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [("wan", StreamingDecoder), ("residual", StreamingDecoder), ("tiny", StreamingTinyDecoder)],
)
def test_picks_by_network(kind: str, decoder: type) -> None:
    assert type(streaming_decoder(build(kind))) is decoder
    assert type(streaming_decoder(build(kind), Tiling(4, 4))) is TiledDecoder


def test_refuses_other_networks() -> None:
    for tiling in (Tiling(), Tiling(4, 4)):
        with pytest.raises(InputError, match="Linear has no streaming decoder"):
            streaming_decoder(nn.Linear(2, 2), tiling)
    with pytest.raises(InputError, match="Linear has no streaming decoder"):
        feature_bytes(nn.Linear(2, 2), 4, 4)


@pytest.mark.parametrize("kind", ["wan", "residual", "tiny", "tiny, large"])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_planned_bytes_are_kept_bytes(kind: str, tiling: Tiling) -> None:
    vae = build(kind)
    decoder: Decoder = streaming_decoder(vae, tiling)
    for frames in (1, 2, 3):
        decoder.feed(noise(2, frames, CHANNELS, 5, 7))
    assert kept_bytes(decoder) == feature_bytes(vae, 5, 7, batch=2, tiling=tiling)
    assert 2 * feature_bytes(vae, 5, 7, 2, tiling, torch.bfloat16) == kept_bytes(decoder)


def test_offloaded_tiles_count_once() -> None:
    vae, tiling = build("wan"), Tiling(4, 4, offload=True)
    assert feature_bytes(vae, 4, 10, tiling=tiling) == feature_bytes(vae, 4, 4)
    assert feature_bytes(vae, 4, 10, tiling=Tiling(4, 4)) == 3 * feature_bytes(vae, 4, 4)


@pytest.mark.parametrize(
    ("name", "latent", "gigabytes"),
    [("wan2.1-1.3b", (60, 104), 1.89), ("longlive2-5b", (44, 80), 3.22)],
)
def test_the_released_networks_at_full_size(name: str, latent: tuple[int, int], gigabytes: float) -> None:
    """Wan 2.1 at 480x832 and Wan 2.2 at 704x1280, decoded without data: shapes are all that is left."""
    with init_empty_weights():
        vae = AutoencoderKLWan(**MODELS[name].vae)
    decoder = streaming_decoder(vae)
    with torch.device("meta"):
        frames = [decoder.feed(torch.empty(1, n, vae.config.z_dim, *latent)) for n in (1, 2)]
    stride = vae.config.scale_factor_spatial
    assert [tuple(f.shape) for f in frames] == [
        (1, n, latent[0] * stride, latent[1] * stride, 3) for n in (1, 8)
    ]
    assert feature_bytes(vae, *latent) == kept_bytes(decoder)
    half = feature_bytes(vae, *latent, dtype=torch.bfloat16)
    assert half / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_tiny_networks_at_full_size() -> None:
    with init_empty_weights():
        vae = TinyVideoDecoder()
    decoder = streaming_decoder(vae)
    with torch.device("meta"):
        decoder.feed(torch.empty(1, 2, 16, 60, 104))
    assert feature_bytes(vae, 60, 104) == kept_bytes(decoder) == 4 * 3 * 60 * 104 * (256 + 128 * 4 + 64 * 16)
