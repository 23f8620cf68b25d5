"""Intermediates of the networks, traced: they run without memory behind their tensors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidkv.models.checkpoints.empty import empty_weights

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin


def pass_activations(
    model: ModelMixin, latent: tuple[int, int], chunk_frames: int, batch: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes alive in a pass of one block: outside self-attention, and while it reads.

    Blocks come one after the other, so that one is as much as all of them.
    """
    from vidkv.models.wan import Attend, TextContext

    with empty_weights():
        shallow = type(model).from_config({**model.config, "num_layers": 1})
    # diffusers' own `to` warns of modules that it would load in float32
    nn.Module.to(shallow, dtype)
    config = shallow.config
    heads, width = config.num_attention_heads, config.attention_head_dim
    latents = torch.empty(batch, chunk_frames, config.in_channels, *latent, dtype=dtype, device="meta")
    # a context is counted by itself, and how long it is changes nothing beside it
    text = torch.empty(batch, heads, 1, width, dtype=dtype, device="meta")
    reading = 0

    class Attention:
        def layer(self, index: int) -> Attend:
            return self.attend

        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal reading
            out = torch.empty_like(q)
            reading = live.bytes
            return out

    with torch.no_grad(), LiveBytes() as live, _Fused():
        shallow(
            latents, torch.empty(batch, chunk_frames, device="meta"), TextContext([text], [text]), Attention()
        )
    return live.peak, reading


def text_activations(encoder: nn.Module, tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes alive while prompts pass through one layer of the text encoder."""
    config: Any = encoder.config
    with empty_weights():
        shallow = type(encoder)(type(config)(**{**config.to_dict(), "num_layers": 1})).to(dtype).eval()
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
    with torch.no_grad(), LiveBytes() as live, _Fused():
        # a mask's values would be looked at; it is small
        shallow(input_ids=ids)
    return live.peak


def decode_activations(
    vae: ModelMixin, latent: tuple[int, int], chunk_frames: int, batch: int, dtype: torch.dtype
) -> int:
    """Bytes alive while a later chunk is decoded, the features kept before it not counted."""
    from vidkv.models.vae_decoders import streaming_decoder

    with empty_weights():
        empty = type(vae).from_config(dict(vae.config))
    nn.Module.to(empty, dtype)
    decoder = streaming_decoder(empty)
    channels = getattr(empty.config, "z_dim", None) or empty.config.latent_channels
    shape = (batch, chunk_frames, channels, *latent)
    with torch.no_grad(), _Fused(), LiveBytes() as live:
        for _ in range(2):
            latents = torch.empty(shape, dtype=dtype, device="meta")
            before, live.peak = live.bytes, live.bytes
            decoder.feed(latents)
    return live.peak - before


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                # what was there before is none of ours
                if key not in self._known and key not in given:
                    self._known.add(key)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.bytes)
        return out

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class _Fused(TorchFunctionMode):
    """Gives what devices compute in one kernel as one tensor; without one, torch writes every part out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (nn.functional.scaled_dot_product_attention, nn.functional.rms_norm):
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
