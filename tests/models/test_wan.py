"""The causal transformer is Wan: same parameters, same numbers as diffusers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from einops import rearrange
from torch import Tensor

from tests.tiny import build_text, build_transformer, noise, randomise, relative_l2
from vidkv.attention import FullAttention
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext

SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # config, (batch, frames, height, width)
    "head_dim 24": ({}, (2, 3, 4, 6)),
    "head_dim 64": ({"attention_head_dim": 64, "num_layers": 3}, (1, 4, 6, 2)),
    "head_dim 128, one head": ({"attention_head_dim": 128, "num_attention_heads": 1}, (3, 2, 4, 4)),
    "odd grid": ({}, (2, 5, 6, 10)),
    "one token": ({}, (1, 1, 2, 2)),
    "no norm before the text": ({"cross_attn_norm": False}, (1, 2, 4, 4)),
    "more channels out": ({"out_channels": 7}, (1, 2, 4, 4)),
    "larger patches": ({"patch_size": (1, 3, 1)}, (1, 2, 6, 3)),
}


def diffusers_twin(model: CausalWanTransformer3DModel) -> WanTransformer3DModel:
    """diffusers' model with every parameter of ours."""
    config = {k: v for k, v in model.config.items() if not k.startswith("_") and k != "num_key_value_heads"}
    twin = WanTransformer3DModel(**config)
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.eval().requires_grad_(False)


def stock_forward(twin: WanTransformer3DModel, x: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
    """x (b, f, c, h, w); timestep (b, f), one per frame, given to every token as Wan 2.2 does."""
    _, ph, pw = twin.config.patch_size
    tokens = x.shape[-2] // ph * (x.shape[-1] // pw)
    out = twin(
        rearrange(x, "b f c h w -> b c f h w"),
        timestep.repeat_interleave(tokens, 1),
        embeds,
        return_dict=False,
    )[0]
    return rearrange(out, "b c f h w -> b f c h w")


def ours(model: CausalWanTransformer3DModel, x: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
    _, ph, pw = model.config.patch_size
    attention = FullAttention(x.shape[-2] // ph, x.shape[-1] // pw)
    with torch.no_grad():
        return model(x, timestep, model.encode_text(embeds), attention)


class TestParity:
    @pytest.mark.parametrize("size", SIZES)
    def test_equals_diffusers(self, size: str) -> None:
        config, (b, f, h, w) = SIZES[size]
        model = build_transformer(seed=3, **config)
        x, embeds = noise(b, f, model.config.in_channels, h, w), noise(b, 7, model.config.text_dim, seed=1)
        # every frame at its own noise level, every batch element too
        timestep = torch.linspace(1000, 0, b * f).view(b, f).contiguous()
        wanted = stock_forward(diffusers_twin(model), x, timestep, embeds)
        assert relative_l2(ours(model, x, timestep, embeds), wanted) <= 1e-5

    def test_one_timestep_for_the_whole_clip(self) -> None:
        model = build_transformer()
        x, embeds = noise(2, 3, 4, 4, 6), noise(2, 7, 64, seed=1)
        level = torch.tensor([937.5, 12.25])
        twin = diffusers_twin(model)
        wanted = twin(rearrange(x, "b f c h w -> b c f h w"), level, embeds, return_dict=False)[0]
        found = ours(model, x, level[:, None].expand(2, 3).contiguous(), embeds)
        assert relative_l2(found, rearrange(wanted, "b c f h w -> b f c h w")) <= 1e-5

    def test_bfloat16_follows_diffusers(self) -> None:
        """The same modules run in float32, so the rounding is of the same size."""
        model = build_transformer().bfloat16()
        x, embeds = noise(1, 3, 4, 4, 6).bfloat16(), noise(1, 7, 64, seed=1).bfloat16()
        timestep = torch.tensor([[700.0, 300.0, 0.0]])
        wanted = stock_forward(diffusers_twin(model.float()), x.float(), timestep, embeds.float())
        stock = stock_forward(diffusers_twin(model.bfloat16()).bfloat16(), x, timestep, embeds)
        found = ours(model.bfloat16(), x, timestep, embeds)
        assert found.dtype == torch.bfloat16
        assert relative_l2(found, wanted) <= 1.5 * relative_l2(stock, wanted) < 0.05

    def test_every_parameter_counts(self) -> None:
        """No parameter is carried along unused, so equality above speaks for all of them."""
        model = build_transformer()
        x, embeds, timestep = noise(1, 2, 4, 4, 4), noise(1, 5, 64), torch.tensor([[500.0, 100.0]])
        before = ours(model, x, timestep, embeds)
        for name, parameter in model.named_parameters():
            saved = parameter.clone()
            parameter.mul_(1.3).add_(0.2)
            assert relative_l2(ours(model, x, timestep, embeds), before) > 1e-6, name
            parameter.copy_(saved)


class TestGroupedHeads:
    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_equals_a_model_with_repeated_heads(self, kv_heads: int) -> None:
        few = build_transformer(num_attention_heads=4, num_key_value_heads=kv_heads)
        many = build_transformer(num_attention_heads=4)
        state = few.state_dict()
        for name, tensor in state.items():
            if ".attn1." in name and any(part in name for part in ("to_k.", "to_v.", "norm_k.")):
                heads = tensor.unflatten(0, (kv_heads, -1))
                state[name] = heads.repeat_interleave(4 // kv_heads, 0).flatten(0, 1)
        many.load_state_dict(state)
        x, embeds, timestep = noise(2, 3, 4, 4, 6), noise(2, 5, 64), torch.tensor([[500.0, 20.0, 0.0]] * 2)
        assert relative_l2(ours(few, x, timestep, embeds), ours(many, x, timestep, embeds)) <= 1e-6
        assert (
            relative_l2(
                ours(few, x, timestep, embeds), stock_forward(diffusers_twin(many), x, timestep, embeds)
            )
            <= 1e-5
        )
        assert few.blocks[0].attn1.to_k.out_features == 24 * kv_heads


class TestText:
    def test_keys_and_values_are_computed_once_per_prompt(self) -> None:
        model = build_transformer()
        calls: list[str] = []
        for name, module in model.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v", "condition_embedder.text_embedder")):
                module.register_forward_hook(lambda *_, name=name: calls.append(name))
        text = build_text(model)
        assert len(calls) == len(set(calls)) == 1 + 2 * model.config.num_layers
        for _ in range(3):
            model(noise(1, 2, 4, 4, 4), torch.zeros(1, 2), text, FullAttention(2, 2))
        assert len(calls) == 1 + 2 * model.config.num_layers

    def test_bytes(self) -> None:
        model = build_transformer()
        text = build_text(model, batch=2, tokens=5)
        assert text.nbytes == 2 * 2 * 2 * 5 * 48 * 4

    def test_a_mask_hides_tokens(self) -> None:
        model = build_transformer()
        embeds, x, timestep = noise(1, 6, 64), noise(1, 2, 4, 4, 4), torch.zeros(1, 2)
        full = model.encode_text(embeds)
        attention = FullAttention(2, 2)
        nothing_hidden = TextContext(full.keys, full.values, torch.ones(1, 2, 6, dtype=torch.bool))
        assert (
            relative_l2(model(x, timestep, nothing_hidden, attention), model(x, timestep, full, attention))
            < 1e-6
        )
        hidden = torch.ones(1, 2, 6, dtype=torch.bool)
        hidden[..., 4:] = False
        masked = model(x, timestep, TextContext(full.keys, full.values, hidden), attention)
        short = model(x, timestep, model.encode_text(embeds[:, :4]), attention)
        assert relative_l2(masked, short) < 1e-6

    def test_a_mask_may_differ_from_frame_to_frame(self) -> None:
        """With one token each, every frame gets what it would get if that token were the whole text."""
        model = build_transformer(num_layers=1)
        embeds, x, timestep = noise(1, 2, 64), noise(1, 2, 4, 4, 4), torch.zeros(1, 2)
        both = model.encode_text(embeds)
        mask = torch.tensor([[[True, False], [False, True]]])
        found = model(x, timestep, TextContext(both.keys, both.values, mask), FullAttention(2, 2))
        for i in range(2):
            alone = model(x, timestep, model.encode_text(embeds[:, i : i + 1]), FullAttention(2, 2))
            torch.testing.assert_close(found[:, i], alone[:, i])


class TestContract:
    def test_attention_gets_unrotated_heads_of_its_layer(self) -> None:
        """Queries, keys and values in frames and tokens; whatever comes back is added."""
        model = build_transformer(num_key_value_heads=1)
        seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

        class Spy:
            def layer(self, index: int) -> Any:
                return lambda q, k, v: (seen.append((index, q, k, v)), torch.zeros_like(q))[1]

        x = noise(2, 3, 4, 4, 6)
        x[:, 1] = x[:, 0]
        model(x, torch.zeros(2, 3), build_text(model, 2), Spy())
        assert [index for index, *_ in seen] == [0, 1]
        for _, q, k, v in seen:
            assert q.shape == (2, 3, 6, 2, 24)
            assert k.shape == v.shape == (2, 3, 6, 1, 24)
            # equal frames at equal noise levels are equal before rotation
            torch.testing.assert_close(q[:, 0], q[:, 1])
            torch.testing.assert_close(k[:, 0], k[:, 1])

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"patch_size": (2, 2, 2)}, r"patch_size=\(2, 2, 2\)"),
            ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ],
        ids=str,
    )
    def test_impossible_configurations(self, config: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_transformer(**config)

    def test_latents_that_do_not_divide(self) -> None:
        model = build_transformer()
        with pytest.raises(ValueError, match="5x4"):
            model(noise(1, 1, 4, 5, 4), torch.zeros(1, 1), build_text(model), FullAttention(2, 2))


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        model = build_transformer(num_key_value_heads=1)
        model.save_pretrained(tmp_path)
        loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path)
        assert loaded.config.num_key_value_heads == 1
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])

    def test_bfloat16_keeps_the_clock_in_float32(self, tmp_path: Path) -> None:
        """As stock Wan does: timesteps rounded to bfloat16 are off by up to two."""
        model = build_transformer()
        randomise(model, 5)
        model.save_pretrained(tmp_path)
        stock = WanTransformer3DModel.from_pretrained(
            _as_stock(model, tmp_path / "stock"), dtype=torch.bfloat16
        )
        loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        kept = {name for name, tensor in loaded.named_parameters() if tensor.dtype == torch.float32}
        assert kept == {name for name, tensor in stock.named_parameters() if tensor.dtype == torch.float32}
        assert "condition_embedder.time_embedder.linear_1.weight" in kept
        x, embeds = noise(1, 2, 4, 4, 4).bfloat16(), noise(1, 5, 64).bfloat16()
        timestep = torch.tensor([[937.5, 0.0]])
        exact = ours(model, x.float(), timestep, embeds.float())
        assert relative_l2(ours(loaded, x, timestep, embeds), exact) < 0.05


def _as_stock(model: CausalWanTransformer3DModel, folder: Path) -> Path:
    diffusers_twin(model).save_pretrained(folder)
    return folder
