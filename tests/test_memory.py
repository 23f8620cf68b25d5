"""What is estimated is what is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny import build_pipeline, noise
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.errors import CacheSpecError, InputError
from vidkv.memory import latent_size, parameter_counts, plan_memory, read_bytes
from vidkv.models.registry import MODELS
from vidkv.models.vae import StreamingDecoder
from vidkv.models.wan import CausalWanTransformer3DModel

BOUNCE, WAN = MODELS["bounce"], MODELS["wan2.1-1.3b"]


class TestFigures:
    def test_of_the_issue(self) -> None:
        plan = plan_memory(WAN, CacheSpec.parse("bf16,window=45,sink=0"), 480, 832)
        assert plan.kv_bytes == 12_076_646_400
        int8 = plan_memory(WAN, CacheSpec.parse("int8,window=45,sink=0"), 480, 832)
        assert int8.kv_bytes <= 0.53 * plan.kv_bytes

    @pytest.mark.parametrize(("name", "billions"), [("wan2.1-1.3b", 1.42), ("wan2.1-14b", 14.29)])
    def test_sizes_that_the_names_promise(self, name: str, billions: float) -> None:
        transformer, vae, text = parameter_counts(name)
        assert transformer / 1e9 == pytest.approx(billions, abs=0.005)
        assert vae / 1e6 == pytest.approx(126.9, abs=0.1)
        assert text / 1e9 == pytest.approx(5.68, abs=0.01)

    @pytest.mark.parametrize("name", MODELS)
    def test_every_model_has_a_plan(self, name: str) -> None:
        entry = MODELS[name]
        spec = CacheSpec(format="int8", window=entry.window, sink=entry.sink)
        plan = plan_memory(entry, spec, entry.height, entry.width)
        assert all(value > 0 for value in plan.as_dict().values())
        parts = plan.kv_bytes + plan.weights_bytes + plan.vae_bytes + plan.activation_bytes
        assert plan.peak_bytes == max(parts, plan.text_bytes)
        twice = plan_memory(entry, spec, entry.height, entry.width, batch=2)
        assert twice.kv_bytes == 2 * plan.kv_bytes
        assert twice.weights_bytes == plan.weights_bytes


class TestAgainstTheRealThing:
    def test_weights(self) -> None:
        plan = plan_memory(BOUNCE, CacheSpec(), 64, 64, dtype=torch.float32)
        transformer = CausalWanTransformer3DModel(**BOUNCE.transformer)
        text = UMT5EncoderModel(UMT5Config(**BOUNCE.text))
        assert plan.weights_bytes == sum(p.nbytes for p in transformer.parameters())
        assert plan.text_bytes == sum(p.nbytes for p in text.parameters())

    def test_weights_at_bfloat16(self, tmp_path: Path) -> None:
        """The plan does not know of the few that stay in float32."""
        CausalWanTransformer3DModel(**BOUNCE.transformer).save_pretrained(tmp_path)
        loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        plan = plan_memory(BOUNCE, CacheSpec(), 64, 64, dtype=torch.bfloat16)
        assert 1 <= sum(p.nbytes for p in loaded.parameters()) / plan.weights_bytes < 1.03

    @pytest.mark.parametrize("size", [(64, 64), (32, 96)], ids=str)
    def test_decoder(self, size: tuple[int, int]) -> None:
        """Weights and the caches of a stream under way, to the byte."""
        height, width = size
        vae = AutoencoderKLWan(**BOUNCE.vae).requires_grad_(False)
        decoder = StreamingDecoder(vae)
        decoder.feed(noise(1, 3, 16, height // 8, width // 8))
        caches = sum(t.nbytes for t in decoder.state().values() if t.is_floating_point())
        weights = sum(p.nbytes for p in vae.parameters())
        plan = plan_memory(BOUNCE, CacheSpec(), height, width, dtype=torch.float32)
        assert plan.vae_bytes == weights + caches

    @pytest.mark.parametrize("cache", ["fp32,window=9,sink=2", "int8,window=12,sink=3,keep_newest", None])
    @pytest.mark.parametrize("size", [(64, 64), (32, 96)], ids=str)
    def test_a_pipeline(self, cache: str | None, size: tuple[int, int]) -> None:
        """Its own networks, which are not the registry's: what a rollout under way holds."""
        pipe = build_pipeline()
        plan = pipe.estimate_memory(*size, cache=cache, batch=2)
        rollout = pipe.rollout(*size, cache=cache, batch=2)
        rollout.set_text(pipe.encode_prompt(["a red circle bouncing", "a blue square resting"]))
        stats = rollout.step_chunk().stats
        assert plan.kv_bytes == stats.kv_bytes
        transformer, vae, text = (
            sum(p.nbytes for p in module.parameters())
            for module in (pipe.transformer, pipe.vae, pipe.text_encoder)
        )
        assert (plan.weights_bytes, plan.text_bytes) == (transformer, text)
        assert rollout.decoder is not None
        caches = sum(t.nbytes for t in rollout.decoder.state().values() if t.is_floating_point())
        assert plan.vae_bytes == vae + caches
        entry = plan_memory(BOUNCE, pipe._spec(cache), *size, batch=2, dtype=torch.float32)
        assert plan.activation_bytes < entry.activation_bytes

    def test_a_pipeline_at_two_precisions(self) -> None:
        pipe = build_pipeline()
        exact = pipe.estimate_memory()
        pipe.transformer.bfloat16()
        half = pipe.estimate_memory()
        assert 2 * half.weights_bytes == exact.weights_bytes and 2 * half.kv_bytes == exact.kv_bytes
        assert half.vae_bytes == exact.vae_bytes


class TestReading:
    @pytest.mark.parametrize("window", [12, 21, 84])
    def test_pages_and_scratch_of_int8_are_below_those_of_bf16(self, window: int) -> None:
        """Though queries coded for every page are scratch that 16-bit pages need not."""
        entry = MODELS["wan2.1-1.3b"]
        plans = [
            plan_memory(entry, CacheSpec(format=name, window=window, sink=0), 480, 832)
            for name in ("int8", "bf16")
        ]
        small, large = (plan.kv_bytes + plan.activation_bytes for plan in plans)
        assert small < 0.75 * large

    def test_a_fused_read_counts(self) -> None:
        """At long windows the coded queries are the largest scratch, and the plan grows with them."""
        geometry = CacheGeometry(30, 12, 128, 30, 52)
        short, long = (
            read_bytes(12, CacheSpec(format="int8", window=window, sink=0), geometry, torch.bfloat16)
            for window in (84, 85)
        )
        assert long - short == 4680 * 12 * (128 + 4)


class TestInputs:
    @pytest.mark.parametrize(
        ("height", "width", "words"),
        [
            (0, 64, "height=0 is no positive multiple of 16; the nearest is 16"),
            (64, -16, "width=-16"),
            (63, 64, "height=63 .* the nearest is 64"),
            (64, 72, "width=72 "),
        ],
    )
    def test_sizes(self, height: int, width: int, words: str) -> None:
        with pytest.raises(InputError, match=words):
            latent_size(BOUNCE, height, width)
        with pytest.raises(InputError, match=words):
            plan_memory(BOUNCE, CacheSpec(), height, width)

    def test_latents(self) -> None:
        assert latent_size(BOUNCE, 64, 96) == (8, 12)
        assert latent_size(WAN, 480, 832) == (60, 104)

    def test_window(self) -> None:
        with pytest.raises(CacheSpecError, match="at least 6"):
            plan_memory(BOUNCE, CacheSpec(window=5, sink=3), 64, 64)
