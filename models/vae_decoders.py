"""The streaming decoder of a network, and what it keeps between calls."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from vidkv.errors import InputError
from vidkv.models.tiny_vae import StreamingTinyDecoder, TinyVideoDecoder, memory_shapes
from vidkv.models.vae import StreamingDecoder, feature_shapes
from vidkv.models.vae_tiles import TiledDecoder, Tiling

WHOLE = Tiling()


def streaming_decoder(
    vae: nn.Module, tiling: Tiling = WHOLE
) -> StreamingDecoder | StreamingTinyDecoder | TiledDecoder:
    """The decoder for a network: latents in, frames out, as `rollout.Decoder` asks.

    Args:
        vae: `AutoencoderKLWan` of either kind and any width, or `TinyVideoDecoder`.
        tiling: how to cut the picture; by default not at all.

    Raises:
        InputError: another network.
    """
    if tiling == WHOLE:
        return _whole(vae)
    _whole(vae)
    return TiledDecoder(lambda: _whole(vae), tiling)


def feature_bytes(
    vae: nn.Module,
    rows: int,
    columns: int,
    batch: int = 1,
    tiling: Tiling = WHOLE,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes that the caches of a stream under way take on the device, exactly; with `offload` at most.

    Args:
        rows, columns: of a latent frame.
        dtype: the network's precision; by default what it has.

    Raises:
        InputError: a network without a streaming decoder.
    """
    elements = [_elements(vae, *tile.grid) for tile in tiling.cut((batch, rows, columns))]
    itemsize = (dtype or next(vae.parameters()).dtype).itemsize
    return itemsize * (max(elements) if tiling.offload else sum(elements))


def _whole(vae: nn.Module) -> StreamingDecoder | StreamingTinyDecoder:
    if isinstance(vae, AutoencoderKLWan):
        return StreamingDecoder(vae)
    if isinstance(vae, TinyVideoDecoder):
        return StreamingTinyDecoder(vae)
    raise _unknown(vae)


def _elements(vae: nn.Module, batch: int, rows: int, columns: int) -> int:
    if isinstance(vae, AutoencoderKLWan):
        kept = (2 * c * int(rows * scale) * int(columns * scale) for c, scale, _ in feature_shapes(vae))
        return batch * sum(kept)
    if isinstance(vae, TinyVideoDecoder):
        return batch * sum(c * rows * columns * scale**2 for c, scale in memory_shapes(vae))
    raise _unknown(vae)


def _unknown(vae: nn.Module) -> InputError:
    return InputError(
        f"{type(vae).__name__} has no streaming decoder; use AutoencoderKLWan or TinyVideoDecoder"
    )
