"""What is predicted is what is stored, and what is stored is close to what was loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny import build_text, build_transformer, noise, relative_l2
from vidkv.attention import FullAttention
from vidkv.errors import CheckpointError, InputError
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.models.weights import (
    FP8,
    Precision,
    cast_bytes,
    check_precision,
    planned_weight_bytes,
    precision_of,
    set_precision,
    weight_bytes,
)

DIT: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 48,
    "freq_dim": 32,
    "ffn_dim": 200,
    "num_layers": 3,
}
TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 72,
    "num_layers": 2,
    "num_heads": 3,
    "dropout_rate": 0.0,
}
BOUNDS = {"fp8": 0.06, "int8": 0.015}
"""Relative L2 error of outputs against full precision.

Rounding alone puts 2^-4/sqrt(6) = 2.6 % on a weight in three bits of mantissa, and 3/127/sqrt(12) = 0.7 % on
one of 256 levels over three deviations; about twice that is what several layers after each other make of it.
Found: fp8 0.040 to 0.048, int8 0.0075 to 0.0108.
"""
LOW: list[Precision] = ["fp8", "int8"]


def build_dit(dtype: torch.dtype = torch.float32) -> CausalWanTransformer3DModel:
    return build_transformer(in_channels=4, out_channels=4, **DIT).to(dtype)


def build_encoder(feed_forward: str = "gated-gelu", dtype: torch.dtype = torch.float32) -> UMT5EncoderModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = UMT5EncoderModel(UMT5Config(**TEXT, feed_forward_proj=feed_forward))
    return encoder.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def flow(model: CausalWanTransformer3DModel) -> Tensor:
    text = build_text(model, tokens=7)
    latents, time = noise(1, 3, 4, 4, 6).to(model.dtype), torch.full((1, 3), 500.0)
    return model(latents, time, text, FullAttention(2, 3))


@torch.no_grad()
def states(encoder: UMT5EncoderModel) -> Tensor:
    ids = torch.arange(1, 19).view(2, 9)
    return encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


class TestError:
    """Small networks of random weights; trained ones have outliers that are not seen here."""

    @pytest.mark.parametrize("precision", LOW)
    def test_of_the_transformer(self, precision: Precision) -> None:
        exact, model = build_dit(), build_dit()
        set_precision(model, precision, torch.float32)
        assert 0 < relative_l2(flow(model), flow(exact)) < BOUNDS[precision]
        assert precision_of(model) == precision and precision_of(exact) == "full"

    @pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
    @pytest.mark.parametrize("precision", LOW)
    def test_of_the_text_encoder(self, precision: Precision, feed_forward: str) -> None:
        """Its feed-forward network casts its input to the dtype in which its last layer is stored."""
        exact, encoder = build_encoder(feed_forward), build_encoder(feed_forward)
        set_precision(encoder, precision, torch.float32)
        assert 0 < relative_l2(states(encoder), states(exact)) < BOUNDS[precision]

    @pytest.mark.parametrize("precision", LOW)
    def test_computes_in_bfloat16(self, precision: Precision) -> None:
        exact, model = build_dit(), build_dit(torch.bfloat16)
        set_precision(model, precision, torch.bfloat16)
        assert model.dtype == torch.bfloat16
        found = flow(model)
        assert found.dtype == torch.bfloat16
        assert relative_l2(found.float(), flow(exact)) < BOUNDS[precision] + 0.01

    @pytest.mark.parametrize("precision", LOW)
    def test_runs_twice_alike(self, precision: Precision) -> None:
        """Casting for a pass and back loses nothing."""
        model = build_dit()
        set_precision(model, precision, torch.float32)
        assert torch.equal(flow(model), flow(model))

    def test_int8_is_a_scale_per_output_channel(self) -> None:
        """Channels of very different size do not share one: each is as exact as the others."""
        model = build_dit()
        layer = model.blocks[1].attn1.to_q
        spread = torch.logspace(-3, 1, layer.out_features)
        layer.weight.data *= spread[:, None]
        exact = layer.weight.detach().clone()
        set_precision(model, "int8", torch.float32)
        stored = layer.weight.dequantize()
        step = exact.abs().amax(1) / 127
        assert ((stored - exact).abs().amax(1) <= 0.51 * step).all()

    def test_sensitive_modules_keep_their_precision(self) -> None:
        for precision in LOW:
            model = build_dit()
            set_precision(model, precision, torch.float32)
            changed = {
                name
                for name, p in model.named_parameters()
                if p.dtype == FP8 or hasattr(p, "__tensor_flatten__")
            }
            assert changed and all(name.startswith("blocks.") for name in changed)
            assert not any("norm" in name or "scale_shift" in name for name in changed)
            per_block = {name.split(".", 2)[2] for name in changed if name.endswith("weight")}
            assert len(per_block) == 10, "eight projections and two layers of the feed-forward network"


class TestBytes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("precision", ["full", *LOW])
    def test_of_the_transformer(self, precision: Precision, dtype: torch.dtype, tmp_path: Path) -> None:
        """Loaded as users load it, with what stays in float32."""
        build_dit().save_pretrained(tmp_path)
        loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path, dtype=dtype)
        set_precision(loaded, precision, dtype)
        with init_empty_weights():
            empty = CausalWanTransformer3DModel.from_config(loaded.config)
        assert planned_weight_bytes(empty, precision, dtype) == weight_bytes(loaded)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("precision", ["full", *LOW])
    def test_of_the_text_encoder(self, precision: Precision, dtype: torch.dtype, tmp_path: Path) -> None:
        build_encoder().save_pretrained(tmp_path)
        loaded = UMT5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
        set_precision(loaded, precision, dtype)
        with init_empty_weights():
            empty = UMT5EncoderModel(UMT5Config(**TEXT, feed_forward_proj="gated-gelu"))
        assert planned_weight_bytes(empty, precision, dtype) == weight_bytes(loaded)

    @pytest.mark.parametrize("precision", LOW)
    def test_stay_after_a_pass(self, precision: Precision) -> None:
        for build, run in ((build_dit, flow), (build_encoder, states)):
            model: Any = build()
            set_precision(model, precision, torch.float32)
            before = weight_bytes(model)
            run(model)
            assert weight_bytes(model) == before

    def test_count_a_shared_storage_once(self) -> None:
        one = nn.Linear(8, 8, bias=False)
        two = nn.Sequential(one, nn.Linear(8, 8, bias=False))
        two[1].weight = one.weight
        assert weight_bytes(two) == 8 * 8 * 4

    def test_of_one_block(self) -> None:
        model = build_dit(torch.bfloat16)
        sizes = [planned_weight_bytes(model, "full", torch.bfloat16, within=f"blocks.{i}.") for i in range(3)]
        rest = planned_weight_bytes(model, "full", torch.bfloat16) - sum(sizes)
        assert len(set(sizes)) == 1 and 0 < rest < sizes[0] * 2

    def test_of_the_layer_that_is_cast(self) -> None:
        """umT5's feed-forward networks are cast whole."""
        encoder, model = build_encoder(), build_dit()
        ffn = 200 * 128 + 200
        assert cast_bytes(model, "fp8", torch.bfloat16) == 2 * ffn
        assert cast_bytes(encoder, "fp8", torch.float32) == 4 * 3 * 48 * 72
        assert cast_bytes(encoder, "int8", torch.float32) == 4 * 48 * 72
        assert cast_bytes(encoder, "full", torch.float32) == 0


class TestRefusals:
    def test_unknown(self) -> None:
        with pytest.raises(InputError, match="weights='int3'; choose full, fp8, int8"):
            check_precision("int3")

    def test_without_torchao(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vidkv.models.weights.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"torchao, which is not installed: pip install 'vidkv\[int8\]'"):
            set_precision(build_dit(), "int8", torch.float32)
        set_precision(build_dit(), "fp8", torch.float32)

    def test_a_torchao_that_does_not_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(name: str) -> None:
            raise ImportError("no such symbol")

        monkeypatch.setattr("vidkv.models.weights.import_module", fail)
        with pytest.raises(InputError, match=r"no such symbol.*pip install 'vidkv\[int8\]'"):
            set_precision(build_dit(), "int8", torch.float32)

    @pytest.mark.parametrize("first", LOW)
    @pytest.mark.parametrize("second", LOW)
    def test_twice(self, first: Precision, second: Precision) -> None:
        model = build_encoder()
        set_precision(model, first, torch.float32)
        with pytest.raises(InputError, match=f"are {first} already; load the model anew"):
            set_precision(model, second, torch.float32)

    @pytest.mark.parametrize("value", [449.0, -1e4, float("nan")])
    def test_weights_beyond_float8(self, value: float) -> None:
        model = build_dit()
        model.blocks[2].ffn.net[2].weight.data[3, 5] = value
        with pytest.raises(CheckpointError, match=r"blocks\.2\.ffn\.net\.2 has a weight of .* at most 448"):
            set_precision(model, "fp8", torch.float32)
        assert precision_of(model) == "full"

    def test_the_largest_float8(self) -> None:
        model = build_dit()
        model.blocks[2].ffn.net[2].weight.data[3, 5] = 448
        set_precision(model, "fp8", torch.float32)
        assert float(model.blocks[2].ffn.net[2].weight.float().max()) == 448


@pytest.mark.slow
def test_torchao_says_nothing(tmp_path: Path) -> None:
    """It is loaded at the first use, and complains of kernels that it was not built for."""
    code = (
        "import torch; from torch import nn; from vidkv.models.weights import *;"
        "m = nn.Sequential(nn.Linear(64, 64)); set_precision(m, 'int8', torch.float32);"
        "assert precision_of(m) == 'int8'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
