"""A causal video diffusion transformer with the architecture of Wan 2.1.

The parameters carry the names of diffusers' `WanTransformer3DModel`, so its state dicts load unchanged.
What differs is who owns attention over time: each layer hands its queries, keys and values, before
rotary embedding, to an object with one method, and adds what it gets back. Whether that object sees the
whole clip, a block-causal part of it or a KV cache is not the model's business.

Shapes: b batch, f latent frames, c channels, s tokens per frame, n heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (b, f, s, n, d), k and v (b, f, s, kv heads, d), all before rotary embedding -> (b, f, s, n, d)."""


class Attention(Protocol):
    """Whoever answers the self-attention of all layers."""

    def layer(self, index: int) -> Attend: ...


@dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of one prompt per batch element, computed once.

    Attributes:
        keys, values: per layer (b, heads, text tokens, d).
        mask: (b, f, text tokens), True where a frame may read a text token; None: everything (stock Wan
            has no mask: padding rows are read too).
        embeds: (b, text tokens, text_dim), what they were computed from.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor | None = None
    embeds: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


class CausalWanTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Wan 2.1's transformer for latent chunks (b, f, c, h, w).

    Args:
        patch_size: frames, rows and columns per token; frames must be 1.
        num_attention_heads, num_key_value_heads: fewer of the latter make grouped-query attention.
        attention_head_dim: channels per head.
        in_channels, out_channels: latent channels.
        text_dim: width of the text encoder's output.
        freq_dim: width of the sinusoidal timestep embedding.
        ffn_dim, num_layers, eps: as in Wan.
        cross_attn_norm: an affine LayerNorm before cross-attention.

    Attributes:
        history_share: by layer and kv head, the share of its self-attention that earlier chunks get, where
            that has been measured.
    """

    history_share: list[list[float]] | None = None
    _no_split_modules = ("Block",)
    # a list: diffusers takes a tuple for one name and then keeps nothing
    _keep_in_fp32_modules: ClassVar = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        kv_heads = num_key_value_heads or num_attention_heads
        if patch_size[0] != 1:
            raise ValueError(f"patch_size={tuple(patch_size)}: a token may not span several frames")
        if num_attention_heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={num_attention_heads} is no multiple of num_key_value_heads={kv_heads}"
            )
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=dim, time_freq_dim=freq_dim, time_proj_dim=6 * dim, text_embed_dim=text_dim
        )
        self.blocks = nn.ModuleList(
            Block(dim, ffn_dim, num_attention_heads, kv_heads, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * patch_size[1] * patch_size[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def encode_text(self, embeds: Tensor, mask: Tensor | None = None) -> TextContext:
        """Project text embeddings (b, text tokens, text_dim) to every layer's keys and values."""
        text = self.condition_embedder.text_embedder(embeds.to(self.dtype))
        pairs = [block.attn2.keys_values(text) for block in self._blocks()]
        return TextContext([k for k, _ in pairs], [v for _, v in pairs], mask, embeds)

    def forward(self, latents: Tensor, timestep: Tensor, text: TextContext, attention: Attention) -> Tensor:
        """Predict the flow `noise - clean` of a chunk.

        Args:
            latents: (b, f, c, h, w) with h and w multiples of the patch size.
            timestep: (b, f) in [0, 1000], one per latent frame.
            text: from `encode_text`.
            attention: answers each layer's self-attention.

        Returns:
            (b, f, out_channels, h, w).
        """
        _, ph, pw = self.config.patch_size
        h, w = latents.shape[-2:]
        if h % ph or w % pw:
            raise ValueError(f"latents of {h}x{w} do not divide into patches of {ph}x{pw}")
        x = self.patch_embedding(rearrange(latents, "b f c h w -> b c f h w"))
        x = rearrange(x, "b c f h w -> b f (h w) c")
        temb, modulation = self._embed_time(timestep, x.dtype)
        for index, block in enumerate(self._blocks()):
            x = block(x, modulation, text.keys[index], text.values[index], text.mask, attention.layer(index))
        shift, scale = (self.scale_shift_table + temb[:, :, None]).chunk(2, dim=2)
        x = (self.norm_out(x.float()) * (1 + scale) + shift).type_as(x)
        out = self.proj_out(x)
        return rearrange(out, "b f (h w) (p q c) -> b f c (h p) (w q)", h=h // ph, w=w // pw, p=ph, q=pw)

    def compile_blocks(self, **options: Any) -> None:
        """Let `torch.compile` fuse what stands around attention; all blocks share the two compiled halves.

        The first pass of a shape takes seconds to compile; results change by rounding.

        Args:
            **options: of `torch.compile`.
        """
        before = torch.compile(Block.before, fullgraph=True, dynamic=False, **options)
        after = torch.compile(Block.after, fullgraph=True, dynamic=False, **options)
        for block in self._blocks():
            block.halves = before, after

    def _blocks(self) -> list[Block]:
        return cast(list[Block], self.blocks)

    def _embed_time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(b, f) to the embedding (b, f, dim) and the blocks' modulation (b, f, 1, 6, dim)."""
        embedder = self.condition_embedder
        half = self.config.freq_dim // 2
        # stock code computes it at float64; diffusers' embedding, at float32, is off by 1e-5 at timestep 1000
        rate = 10_000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
        angles = timestep.double()[..., None] * rate
        sinusoid = torch.cat([angles.cos(), angles.sin()], -1)
        temb = embedder.time_embedder(sinusoid.to(embedder.time_embedder.linear_1.weight.dtype)).to(dtype)
        modulation = embedder.time_proj(F.silu(temb))
        return temb, rearrange(modulation, "b f (six c) -> b f 1 six c", six=6)


class Block(nn.Module):
    """Self-attention, cross-attention to the text and a feed-forward network, modulated by time."""

    def __init__(
        self, dim: int, ffn_dim: int, heads: int, kv_heads: int, cross_attn_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Projections(dim, heads, kv_heads, eps)
        self.attn2 = CrossAttention(dim, heads, heads, eps)
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

        self.halves = Block.before, Block.after

    def forward(
        self, x: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor | None,
        attend: Attend,
    ) -> Tensor:  # fmt: skip
        before, after = self.halves
        attended = attend(*before(self, x, modulation))
        return after(self, x, attended, modulation, text_k, text_v, mask)

    def before(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What self-attention is asked: q (b, f, s, n, d), k and v (b, f, s, kv heads, d)."""
        shift, scale, *_ = (self.scale_shift_table + modulation.float()).unbind(3)
        normed = (self.norm1(x.float()) * (1 + scale) + shift).type_as(x)
        return self.attn1(normed)

    def after(
        self, x: Tensor, attended: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The rest of the block, from what self-attention answered (b, f, s, n, d)."""
        _, _, gate1, shift3, scale3, gate3 = (self.scale_shift_table + modulation.float()).unbind(3)
        x = (x.float() + self.attn1.project(attended) * gate1).type_as(x)
        x = x + self.attn2(self.norm2(x.float()).type_as(x), text_k, text_v, mask)
        normed = (self.norm3(x.float()) * (1 + scale3) + shift3).type_as(x)
        return (x.float() + self.ffn(normed).float() * gate3).type_as(x)


class Projections(nn.Module):
    """Query, key, value and output projections, with RMS norm of q and k over the full width."""

    def __init__(self, dim: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        kv_dim = dim // heads * kv_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, kv_dim)
        self.to_v = nn.Linear(dim, kv_dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(kv_dim, eps=eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, f, s, c) to q (b, f, s, n, d), k and v (b, f, s, kv heads, d)."""
        q = self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))
        k = self.norm_k(self.to_k(x)).unflatten(-1, (self.kv_heads, -1))
        v = self.to_v(x).unflatten(-1, (self.kv_heads, -1))
        return q, k, v

    def project(self, attended: Tensor) -> Tensor:
        """(b, f, s, n, d) -> (b, f, s, c)."""
        out: Tensor = self.to_out[0](attended.flatten(-2))
        return out


class CrossAttention(Projections):
    """Attention from video tokens to the text, whose keys and values do not change."""

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(b, text tokens, c) to keys and values (b, n, text tokens, d)."""
        k = self.norm_k(self.to_k(text)).unflatten(-1, (self.heads, -1))
        v = self.to_v(text).unflatten(-1, (self.heads, -1))
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """x (b, f, s, c) attends to k, v (b, n, text tokens, d); mask (b, f, text tokens)."""
        f, s = x.shape[1:3]
        q = self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))
        if mask is not None:
            mask = mask[:, None].repeat_interleave(s, 2)
        out = F.scaled_dot_product_attention(rearrange(q, "b f s n d -> b n (f s) d"), k, v, attn_mask=mask)
        projected: Tensor = self.to_out[0](rearrange(out, "b n (f s) d -> b f s (n d)", f=f))
        return projected
