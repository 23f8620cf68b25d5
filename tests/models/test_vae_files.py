"""Published VAE files: sizes are read off shapes, and what does not fit is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import noise, randomise
from vidkv.errors import CheckpointError
from vidkv.models.checkpoints.layouts import to_diffusers, vae_pairs
from vidkv.models.families import longlive2
from vidkv.models.tiny_vae import TinyVideoDecoder
from vidkv.models.vae_decoders import streaming_decoder
from vidkv.models.vae_files import load_tiny_decoder, load_wan_vae

PRUNED: dict[str, dict[str, Any]] = {
    "Wan 2.1": {"base_dim": 4},
    "Wan 2.2": longlive2.VAE | {"base_dim": 4, "decoder_base_dim": 8},
}
STATISTICS = inspect.signature(AutoencoderKLWan.__init__).parameters["latents_mean"].default


def build_wan(kind: str) -> AutoencoderKLWan:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**PRUNED[kind])
    randomise(vae, spread=0.05)
    return vae.eval().requires_grad_(False)


def build_tiny(**settings: Any) -> TinyVideoDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyVideoDecoder(**({"channels": (8, 6, 4, 4)} | settings))
    randomise(model, spread=0.1)
    return model.eval().requires_grad_(False)


def wan_names(vae: AutoencoderKLWan) -> dict[str, str]:
    """diffusers' names to Wan's, by trying every name that Wan's numbering can make."""
    kinds = [f"residual.{i}.{t}" for i in (0, 2, 3, 6) for t in ("weight", "bias", "gamma")]
    kinds += [f"{p}.{t}" for p in ("shortcut", "resample.1", "time_conv") for t in ("weight", "bias")]
    kinds += [f"{p}.{t}" for p in ("norm", "to_qkv", "proj") for t in ("weight", "bias", "gamma")]
    sides = [
        f"{side}.{part}.{i}" for side in ("encoder", "decoder") for part in ("middle",) for i in range(3)
    ]
    sides += [f"encoder.downsamples.{i}" for i in range(12)] + [f"decoder.upsamples.{i}" for i in range(16)]
    names = [f"{side}.{kind}" for side in sides for kind in kinds]
    for name in ("conv1", "conv2", "encoder.conv1", "decoder.conv1", "encoder.head.2", "decoder.head.2"):
        names += [f"{name}.weight", f"{name}.bias"]
    names += ["encoder.head.0.gamma", "decoder.head.0.gamma"]
    known = vae.state_dict()
    back = {new: old for old in names for new in convert_wan_vae_to_diffusers({old: None}) if new in known}
    assert set(back) == set(known)
    return back


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


class TestWanVae:
    @pytest.mark.parametrize("kind", PRUNED)
    def test_the_width_is_read_off(self, kind: str, tmp_path: Path) -> None:
        vae = build_wan(kind)
        loaded = load_wan_vae(save(vae.state_dict(), tmp_path / "lightvae.safetensors"))
        ours = {name: value for name, value in vae.config.items() if not name.startswith("_")}
        found = {name: loaded.config[name] for name in ours}
        assert found == ours | {"decoder_base_dim": ours["decoder_base_dim"] or ours["base_dim"]}
        latents = noise(1, 2, vae.config.z_dim, 2, 3)
        assert torch.equal(streaming_decoder(loaded).feed(latents), streaming_decoder(vae).feed(latents))
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())

    def test_wans_own_names(self, tmp_path: Path) -> None:
        vae = build_wan("Wan 2.1")
        names = wan_names(vae)
        tensors = {names[name]: tensor for name, tensor in vae.state_dict().items()}
        loaded = load_wan_vae(save(tensors, tmp_path / "lightvaew2_1.safetensors"))
        for name, tensor in vae.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_wan_22s_own_names(self, tmp_path: Path) -> None:
        vae = build_wan("Wan 2.2")
        pairs = {new: old for old, new in vae_pairs(dict(vae.config)).items()}
        names = to_diffusers(vae.state_dict(), pairs)
        assert "decoder.upsamples.0.upsamples.3.resample.1.weight" in names.values()
        tensors = {names[name]: tensor for name, tensor in vae.state_dict().items()}
        loaded = load_wan_vae(save(tensors, tmp_path / "vae.safetensors"))
        for name, tensor in vae.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_precision_is_the_files(self, tmp_path: Path) -> None:
        vae = build_wan("Wan 2.1").bfloat16()
        assert load_wan_vae(save(vae.state_dict(), tmp_path / "v.safetensors")).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda t: t.pop("decoder.conv_out.bias"), "decoder.conv_out.bias is None"),
            (lambda t: t.update(more=torch.ones(3)), r"more is \(3,\), .* has None"),
            (
                lambda t: t.update({"decoder.norm_out.gamma": torch.ones(5)}),
                r"decoder.norm_out.gamma is \(5,\)",
            ),
            (lambda t: t.pop("post_quant_conv.weight"), "neither post_quant_conv.weight nor"),
            (lambda t: t.update({"post_quant_conv.weight": torch.ones(5, 5, 1, 1, 1)}), "5 latent channels"),
            (lambda t: t.update({"encoder.conv_in.weight": torch.ones(4)}), r"conv_in.weight is \(4,\)"),
        ],
    )
    def test_what_does_not_fit(
        self, damage: Callable[[dict[str, Tensor]], object], words: str, tmp_path: Path
    ) -> None:
        tensors = dict(build_wan("Wan 2.1").state_dict())
        damage(tensors)
        with pytest.raises(CheckpointError, match=words):
            load_wan_vae(save(tensors, tmp_path / "vae.safetensors"))


class TestTinyDecoder:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"latent_channels": 48, "patch_size": 2},
            {"latent_channels": 48, "patch_size": 2, "large": True},
        ],
        ids=["taew2_1", "taew2_2", "taew2_2_super"],
    )
    def test_sizes_are_read_off(self, settings: dict[str, Any], tmp_path: Path) -> None:
        """The file's encoder is no part of it."""
        vae = build_tiny(**settings)
        tensors = vae.state_dict() | {"encoder.0.weight": torch.ones(3)}
        loaded = load_tiny_decoder(save(tensors, tmp_path / "tae.safetensors"))
        assert loaded.config.latents_mean is None
        latents = noise(1, 2, loaded.config.latent_channels, 2, 3)
        assert torch.equal(loaded(latents), vae(latents))
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())

    def test_published_width(self, tmp_path: Path) -> None:
        vae = TinyVideoDecoder().bfloat16()
        loaded = load_tiny_decoder(save(vae.state_dict(), tmp_path / "taew2_1.safetensors"))
        assert list(loaded.config.channels) == [256, 128, 64, 64] and loaded.dtype == torch.bfloat16

    def test_a_split_that_is_not_used(self, tmp_path: Path) -> None:
        """Files whose first level can double the frames: the later frame is the one."""
        vae = build_tiny()
        tensors, name = dict(vae.state_dict()), "decoder.7.conv.weight"
        tensors[name] = torch.cat([torch.full_like(tensors[name], 9.0), tensors[name]])
        loaded = load_tiny_decoder(save(tensors, tmp_path / "taehv.safetensors"))
        assert torch.equal(loaded(noise(1, 2, 16, 2, 3)), vae(noise(1, 2, 16, 2, 3)))

    def test_lighttae_takes_denormalised_latents(self, tmp_path: Path) -> None:
        path = save(build_tiny().state_dict(), tmp_path / "lighttaew2_1.safetensors")
        assert list(load_tiny_decoder(path).config.latents_mean) == STATISTICS
        assert load_tiny_decoder(path, denormalised=False).config.latents_mean is None
        other = save(build_tiny(latent_channels=48).state_dict(), tmp_path / "mine.safetensors")
        assert list(load_tiny_decoder(other, denormalised=True).config.latents_std) == longlive2.DEVIATION

    def test_unknown_statistics(self, tmp_path: Path) -> None:
        path = save(build_tiny(latent_channels=12).state_dict(), tmp_path / "lighttae.safetensors")
        with pytest.raises(CheckpointError, match="12 latent channels"):
            load_tiny_decoder(path)
        assert load_tiny_decoder(path, denormalised=False).config.latent_channels == 12

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda t: t.pop("decoder.3.conv.2.bias"), "decoder.3.conv.2.bias is None"),
            (lambda t: t.update({"decoder.99.weight": torch.ones(2)}), r"decoder.99.weight is \(2,\)"),
            (
                lambda t: t.update({"decoder.7.conv.weight": torch.ones(4, 8, 1, 1)}),
                "decoder.7.conv.weight is",
            ),
            (lambda t: t.pop("decoder.22.weight"), "lacks the first and last convolution"),
            (lambda t: t.update({"decoder.22.weight": torch.ones(5, 4, 3, 3)}), "yields 5 channels"),
        ],
    )
    def test_what_does_not_fit(
        self, damage: Callable[[dict[str, Tensor]], object], words: str, tmp_path: Path
    ) -> None:
        tensors = dict(build_tiny().state_dict())
        damage(tensors)
        with pytest.raises(CheckpointError, match=words):
            load_tiny_decoder(save(tensors, tmp_path / "tae.safetensors"))


@pytest.mark.parametrize("load", [load_tiny_decoder, load_wan_vae])
def test_only_safetensors(load: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "taew2_1.pth"
    torch.save(build_tiny().state_dict(), path)
    with pytest.raises(CheckpointError, match=r"taew2_1.pth is no .safetensors file; .*vidkv convert"):
        load(path)
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no header")
    with pytest.raises(CheckpointError, match="damaged"):
        load(damaged)
