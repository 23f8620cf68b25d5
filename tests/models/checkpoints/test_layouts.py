"""Names and shapes of the published modules find their places, in both directions."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from tests.models.checkpoints.stock_files import Shapes, stock_shapes
from vidkv.errors import CheckpointError
from vidkv.models.checkpoints import layouts
from vidkv.models.checkpoints.folders import model_shapes
from vidkv.models.checkpoints.load import empty_model
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import MODELS
from vidkv.models.wan import CausalWanTransformer3DModel

TRANSFORMERS = {
    "transformer-1.3b": "self-forcing-1.3b",
    "transformer-14b": "krea-realtime-14b",
    "transformer-5b": "longlive2-5b",
}
VAES = {"vae-2.1": "wan2.1-1.3b", "vae-2.2": "longlive2-5b"}
TEXT_NAMES = {
    "token_embedding.weight": "shared.weight",
    "blocks.23.attn.q.weight": "encoder.block.23.layer.0.SelfAttention.q.weight",
    "blocks.0.attn.o.weight": "encoder.block.0.layer.0.SelfAttention.o.weight",
    "blocks.7.pos_embedding.embedding.weight": (
        "encoder.block.7.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "blocks.7.norm1.weight": "encoder.block.7.layer.0.layer_norm.weight",
    "blocks.7.norm2.weight": "encoder.block.7.layer.1.layer_norm.weight",
    "blocks.7.ffn.gate.0.weight": "encoder.block.7.layer.1.DenseReluDense.wi_0.weight",
    "blocks.7.ffn.fc1.weight": "encoder.block.7.layer.1.DenseReluDense.wi_1.weight",
    "blocks.7.ffn.fc2.weight": "encoder.block.7.layer.1.DenseReluDense.wo.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
"""Verified with the published module's outputs."""
VAE_22_NAMES = {
    "encoder.downsamples.1.downsamples.2.time_conv.bias": "encoder.down_blocks.1.downsampler.time_conv.bias",
    "encoder.downsamples.0.downsamples.2.resample.1.bias": (
        "encoder.down_blocks.0.downsampler.resample.1.bias"
    ),
    "encoder.downsamples.3.downsamples.1.residual.6.weight": "encoder.down_blocks.3.resnets.1.conv2.weight",
    "decoder.upsamples.2.upsamples.0.shortcut.weight": "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
    "decoder.upsamples.0.upsamples.3.time_conv.bias": "decoder.up_blocks.0.upsampler.time_conv.bias",
    "decoder.upsamples.3.upsamples.2.residual.3.gamma": "decoder.up_blocks.3.resnets.2.norm2.gamma",
    "decoder.middle.1.to_qkv.weight": "decoder.mid_block.attentions.0.to_qkv.weight",
    "conv2.weight": "post_quant_conv.weight",
}


def renamed(shapes: Shapes, pairs: layouts.Pairs) -> Shapes:
    return {new: shapes[old] for old, new in layouts.to_diffusers(shapes, pairs).items()}


class TestTransformer:
    @pytest.mark.parametrize("stock", TRANSFORMERS)
    def test_the_published_module_fills_ours(self, stock: str) -> None:
        entry = MODELS[TRANSFORMERS[stock]]
        shapes = stock_shapes(stock)
        pairs = layouts.transformer_pairs(entry.transformer["num_layers"])
        found = renamed(shapes, pairs)
        assert found == model_shapes(CausalWanTransformer3DModel, entry.transformer)
        assert (
            layouts.transformer_layout(shapes) == "wan" and layouts.transformer_layout(found) == "diffusers"
        )
        assert renamed(found, layouts.inverted(pairs)) == shapes

    def test_names_are_those_of_diffusers_own_converter(self) -> None:
        shapes = stock_shapes("transformer-1.3b")
        numbered = {name: torch.tensor(i) for i, name in enumerate(shapes)}
        theirs = convert_wan_transformer_to_diffusers(dict(numbered))
        ours = layouts.to_diffusers(shapes, layouts.transformer_pairs(30))
        assert {ours[name]: number for name, number in numbered.items()} == theirs

    @pytest.mark.parametrize("stock", TRANSFORMERS)
    def test_shapes_tell_which_registered_models_fit(self, stock: str) -> None:
        found = renamed(stock_shapes(stock), layouts.transformer_pairs(40))
        wanted = MODELS[TRANSFORMERS[stock]].transformer
        same = {name for name, entry in MODELS.items() if entry.transformer == wanted}
        assert set(layouts.fitting_models(found)) == same and same

    @pytest.mark.parametrize("name", MODELS)
    def test_a_configuration_is_read_off_its_own_shapes(self, name: str) -> None:
        wanted = layouts.full_config(MODELS[name].transformer)
        shapes = model_shapes(CausalWanTransformer3DModel, wanted)
        assert layouts.transformer_config(shapes, wanted["attention_head_dim"]) == wanted

    def test_what_it_cannot_be_read_off(self) -> None:
        shapes = model_shapes(CausalWanTransformer3DModel, MODELS["bounce"].transformer)
        with pytest.raises(CheckpointError, match="head_dim 100"):
            layouts.transformer_config(shapes, 100)
        with pytest.raises(CheckpointError, match=r"proj_out\.weight is missing"):
            layouts.transformer_config({k: v for k, v in shapes.items() if k != "proj_out.weight"})
        with pytest.raises(CheckpointError, match=r"patch_embedding\.weight is \(3,\)"):
            layouts.transformer_config(shapes | {"patch_embedding.weight": (3,)})
        with pytest.raises(CheckpointError, match=r"no weights of a Wan transformer: the names are a, b"):
            layouts.transformer_layout(["b", "a"])


class TestOtherParts:
    @pytest.mark.parametrize("stock", VAES)
    def test_the_published_vae_fills_diffusers(self, stock: str) -> None:
        entry: ModelEntry = MODELS[VAES[stock]]
        config = dict(empty_model(AutoencoderKLWan, dict(entry.vae)).config)
        pairs = layouts.vae_pairs(config)
        found = renamed(stock_shapes(stock), pairs)
        assert found == model_shapes(AutoencoderKLWan, config)
        assert renamed(found, layouts.inverted(pairs)) == stock_shapes(stock)
        if stock == "vae-2.2":
            ours = layouts.to_diffusers(stock_shapes(stock), pairs)
            assert VAE_22_NAMES == {name: ours[name] for name in VAE_22_NAMES}

    def test_vae_names_are_those_of_diffusers_own_converter(self) -> None:
        shapes = stock_shapes("vae-2.1")
        config = dict(empty_model(AutoencoderKLWan, {}).config)
        ours = layouts.to_diffusers(shapes, layouts.vae_pairs(config))
        theirs = convert_wan_vae_to_diffusers({name: name for name in shapes})
        assert {new: old for old, new in ours.items()} == theirs

    def test_the_published_text_encoder_fills_transformers(self) -> None:
        shapes = stock_shapes("text")
        ours = layouts.to_diffusers(shapes, layouts.text_pairs(24))
        wanted = model_shapes(UMT5EncoderModel, UMT5Config(**MODELS["wan2.1-1.3b"].text).to_dict())
        wanted.pop("encoder.embed_tokens.weight")
        assert {new: shapes[old] for old, new in ours.items()} == wanted
        assert TEXT_NAMES == {name: ours[name] for name in TEXT_NAMES}


class TestUnwrap:
    @pytest.mark.parametrize(
        "name",
        [
            "blocks.0.ffn.0.weight",
            "model.blocks.0.ffn.0.weight",
            "module.model.blocks.0.ffn.0.weight",
            "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.ffn.0.weight",
            "_orig_mod.module.blocks.0._orig_mod.ffn.0.weight",
            "model.blocks.0._checkpoint_wrapped_module.ffn.0.weight",
            "diffusion_model.blocks.0.ffn.0.weight",
            "model.diffusion_model.blocks.0.ffn.0.weight",
        ],
    )
    def test_wrappers_leave_no_trace(self, name: str) -> None:
        assert layouts.bare_name(name) == "blocks.0.ffn.0.weight"
        assert layouts.unwrap([name]).names == {"blocks.0.ffn.0.weight": name}

    def test_only_one_outer_prefix_goes(self) -> None:
        assert layouts.bare_name("model.model.x") == "model.x"
        assert layouts.bare_name("submodule.x") == "submodule.x"

    def test_parts_in_order_of_preference(self) -> None:
        names = [f"{part}.model.x" for part in ("critic", "generator", "generator_ema")]
        found = layouts.unwrap(names)
        assert found.names == {"x": "generator_ema.model.x"}
        assert found.taken == ("generator_ema", "model") and found.beside == ("critic", "generator")
        found = layouts.unwrap(names, ("generator", "model"))
        assert found.names == {"x": "generator.model.x"} and found.beside == ("critic", "generator_ema")

    def test_names_that_collapse_are_refused(self) -> None:
        with pytest.raises(CheckpointError, match=r"a\.module\.x and a\.x|a\.x and a\.module\.x"):
            layouts.unwrap(["a.x", "a.module.x"])

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["generator_lora.x.weight"], True),
            (["blocks.0.q.lora_A.weight", "blocks.0.q.lora_B.weight", "blocks.0.q.alpha"], True),
            (["diffusion_model.blocks.0.q.lora_down.weight"], True),
            (["blocks.0.q.lora_A.weight", "blocks.0.q.weight"], False),
            (["generator.x"], False),
            ([], False),
        ],
    )
    def test_lora_only(self, names: list[str], expected: bool) -> None:
        assert layouts.lora_only(names) is expected


class TestCompare:
    wanted: Shapes = {"a": (2, 3), "b": (4,)}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            ({"a": (2, 3)}, r"file: b \(4,\) is missing; advice"),
            ({"a": (3, 2), "b": (4,)}, r"file: raw\.a is \(3, 2\), the model has \(2, 3\); advice"),
            (
                {"a": (2, 3), "b": (4,), "c": (1,)},
                r"file: c \(1,\) has no place in it \(1 such tensors\); advice",
            ),
        ],
    )
    def test_the_first_difference_is_named(self, found: Shapes, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            layouts.compare(found, self.wanted, "file", {"a": "raw.a"}, "advice")

    def test_equal_shapes_pass(self) -> None:
        layouts.compare(dict(self.wanted), self.wanted, "file", {}, "advice")
