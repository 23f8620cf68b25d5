"""VAE weights as they are published on their own: tiny decoders, and Wan VAEs of any width.

Sizes are read off the shapes in the file's header; every tensor must have its place and every place its
tensor. Pickles are not read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file

from vidkv.errors import CheckpointError
from vidkv.models.checkpoints.empty import empty_weights
from vidkv.models.checkpoints.folders import file_shapes
from vidkv.models.checkpoints.layouts import to_diffusers, vae_pairs
from vidkv.models.families import longlive2, wan21
from vidkv.models.tiny_vae import SplitTime, TinyVideoDecoder

Shapes = dict[str, tuple[int, ...]]
DENORMALISED = "lighttae"
"""Files of this name take denormalised latents; LightX2V tells them apart by name too."""


def load_wan_vae(path: Path) -> AutoencoderKLWan:
    """A Wan VAE of any width: Wan 2.1's own, or one with fewer channels (LightX2V's `lightvaew2_1`).

    Args:
        path: .safetensors with diffusers' names or Wan's own.

    Returns:
        The network in evaluation mode at the file's precision, on the CPU.

    Raises:
        CheckpointError: no safetensors file, or not of this kind of network.
    """
    _require_safetensors(path)
    shapes = file_shapes(path)
    known = _known(path, shapes)
    names = {name: name for name in shapes}
    if "decoder.conv1.weight" in shapes:
        names = to_diffusers(shapes, vae_pairs(known))
    found = {names[name]: shape for name, shape in shapes.items()}
    config = known | _widths(path, found)
    with empty_weights():
        model = AutoencoderKLWan(**config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path}: {name} is {found.get(name)}, a Wan VAE of base_dim={config['base_dim']} has "
                f"{wanted.get(name)}; name the file of a Wan VAE"
            )
    weights = {names[name]: tensor for name, tensor in load_file(path).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _known(path: Path, shapes: Shapes) -> dict[str, Any]:
    """Settings of the released VAE with as many latent channels."""
    latent = shapes.get("post_quant_conv.weight") or shapes.get("conv2.weight")
    if latent is None:
        raise CheckpointError(
            f"{path} has neither post_quant_conv.weight nor conv2.weight; name the file of a Wan VAE"
        )
    return wan_settings(path, latent[0])


def _widths(path: Path, shapes: Shapes) -> dict[str, Any]:
    """Channels of the finest level: in both VAEs the base width, seen in the first and last convolution."""
    first, last = shapes.get("encoder.conv_in.weight", ()), shapes.get("decoder.conv_out.weight", ())
    if len(first) != 5 or len(last) != 5:
        raise CheckpointError(
            f"{path}: encoder.conv_in.weight is {first} and decoder.conv_out.weight {last}, of a Wan VAE "
            "both have five dimensions; name the file of a Wan VAE"
        )
    return {"base_dim": first[0], "decoder_base_dim": last[1]}


def wan_settings(path: Path, channels: int) -> dict[str, Any]:
    """All settings of Wan's VAE with so many latent channels.

    Raises:
        CheckpointError: there is none.
    """
    for settings in (wan21.VAE, longlive2.VAE):
        with empty_weights():
            known = dict(AutoencoderKLWan(**settings).config)
        if known["z_dim"] == channels:
            return {name: value for name, value in known.items() if not name.startswith("_")}
    raise CheckpointError(
        f"{path} is of {channels} latent channels; the VAEs of Wan 2.1 and 2.2 have 16 and 48: name a file "
        "made for one of these"
    )


def _require_safetensors(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no .safetensors file; turn it into one with: vidkv convert {path}")


def load_tiny_decoder(path: Path, denormalised: bool | None = None) -> TinyVideoDecoder:
    """A published file, or one of the same layout; its size is read off its shapes.

    Args:
        path: .safetensors, as TAEHV publishes it. The file's encoder is left unread.
        denormalised: whether the network takes denormalised latents; by default, whether the file is
            named as LightX2V names those that do.

    Returns:
        The network in evaluation mode at the file's precision, on the CPU.

    Raises:
        CheckpointError: no safetensors file, or not of this kind of network.
    """
    _require_safetensors(path)
    shapes = {name: shape for name, shape in file_shapes(path).items() if not name.startswith("encoder.")}
    config = _tiny_config(path, shapes)
    if denormalised is None:
        denormalised = DENORMALISED in path.name.lower()
    if denormalised:
        known = wan_settings(path, config["latent_channels"])
        config |= {name: known[name] for name in ("latents_mean", "latents_std")}
    with empty_weights():
        model = TinyVideoDecoder(**config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    splits = {f"decoder.{i}.conv.weight" for i, m in enumerate(model.decoder) if isinstance(m, SplitTime)}
    for name in sorted(set(shapes) | set(wanted)):
        found = shapes.get(name)
        # where a file can split a frame in two and the network does not, the later half is the frame
        longer = (
            name in splits and found is not None and found[1:] == wanted[name][1:] and found > wanted[name]
        )
        if found != wanted.get(name) and not longer:
            raise CheckpointError(
                f"{path}: {name} is {found}, a tiny decoder of its size has {wanted.get(name)}; name a TAEHV "
                "file of Wan 2.1 or 2.2"
            )
    tensors = load_file(path)
    weights = {name: tensors[name][-shape[0] :] for name, shape in wanted.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _tiny_config(path: Path, shapes: Shapes) -> dict[str, Any]:
    """Sizes from shapes; both kinds end in their last convolution at index 22."""
    large = len(shapes.get("decoder.0.weight", ())) == 4
    first, last = (
        shapes.get("decoder.0.weight" if large else "decoder.1.weight"),
        shapes.get("decoder.22.weight"),
    )
    if first is None or last is None or len(first) != 4 or len(last) != 4:
        raise CheckpointError(
            f"{path} lacks the first and last convolution of a tiny decoder (decoder.1 and decoder.22); name "
            "a TAEHV file of Wan 2.1 or 2.2"
        )
    levels = ("0.weight", "4.weight", "11.weight", "18.weight") if large else (
        "1.weight", "8.weight", "14.weight", "20.weight"
    )  # fmt: skip
    outputs = [shapes.get(f"decoder.{name}", (0,))[0] for name in levels]
    channels = [outputs[0], *(n // 4 if large else n for n in outputs[1:])]
    patch_size = {3 * n * n: n for n in (1, 2, 4)}.get(last[0])
    if patch_size is None or not all(channels):
        raise CheckpointError(
            f"{path}: decoder.22.weight yields {last[0]} channels on levels of {channels}, no video's; "
            "name a TAEHV file of Wan 2.1 or 2.2"
        )
    return {"latent_channels": first[1], "patch_size": patch_size, "large": large, "channels": channels}
