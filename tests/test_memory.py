"""What is estimated is what is allocated."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny import build_pipeline, noise
from vidkv.activations import LiveBytes
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.errors import CacheSpecError, InputError, ResourceError
from vidkv.memory import (
    OFFLOADS,
    PLACEMENTS,
    MemorySettings,
    card_bytes,
    check_fits,
    gigabytes,
    largest_window,
    latent_size,
    own_guidance,
    parameter_counts,
    plan_loaded,
    plan_memory,
    read_bytes,
    remedies,
)
from vidkv.models.registry import MODELS
from vidkv.models.vae import StreamingDecoder
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.models.weights import set_precision, weight_bytes
from vidkv.room import _group_room, available_bytes, usable_bytes

BOUNCE, WAN, FORCING = MODELS["bounce"], MODELS["wan2.1-1.3b"], MODELS["self-forcing-1.3b"]
GB = 10**9


def settings_of(name: str, format: str = "bf16", **changes: Any) -> MemorySettings:
    entry = MODELS[name]
    spec = CacheSpec(format=format, window=changes.pop("window", entry.window), sink=entry.sink)
    size = entry.height, entry.width
    return replace(MemorySettings(entry, spec, *size, guidance=own_guidance(entry)), **changes)


class TestFigures:
    def test_of_the_issue(self) -> None:
        plan = plan_memory(WAN, CacheSpec.parse("bf16,window=45,sink=0"), 480, 832)
        assert plan.kv_bytes == 12_076_646_400
        int8 = plan_memory(WAN, CacheSpec.parse("int8,window=45,sink=0"), 480, 832)
        assert int8.kv_bytes <= 0.53 * plan.kv_bytes

    @pytest.mark.parametrize(("name", "megabytes"), [("wan2.1-1.3b", 287.5), ("wan2.1-14b", 1278)])
    def test_a_latent_frame(self, name: str, megabytes: float) -> None:
        """By hand: layers x 2 x tokens x width x 2 bytes."""
        longer, shorter = (settings_of(name, window=window).plan() for window in (22, 21))
        assert (longer.kv_bytes - shorter.kv_bytes) / 1e6 == pytest.approx(megabytes, abs=0.5)

    @pytest.mark.parametrize(("name", "billions"), [("wan2.1-1.3b", 1.42), ("wan2.1-14b", 14.29)])
    def test_sizes_that_the_names_promise(self, name: str, billions: float) -> None:
        transformer, vae, text = parameter_counts(name)
        assert transformer / 1e9 == pytest.approx(billions, abs=0.005)
        assert vae / 1e6 == pytest.approx(126.9, abs=0.1)
        assert text / 1e9 == pytest.approx(5.68, abs=0.01)

    def test_streaming_features(self) -> None:
        """As measured of stock decoders at 480x832: 1.9 GB a stream."""
        assert settings_of("wan2.1-1.3b").plan().feature_bytes / 1e9 == pytest.approx(1.9, abs=0.05)

    @pytest.mark.parametrize("name", MODELS)
    def test_every_model_has_a_plan(self, name: str) -> None:
        entry = MODELS[name]
        spec = CacheSpec(format="int8", window=entry.window, sink=entry.sink)
        plan = plan_memory(entry, spec, entry.height, entry.width)
        sizes = plan.as_dict()
        guided = own_guidance(entry) != 1
        none_here = ("negative_kv_bytes", "host_bytes", "kv_host_bytes", "kv_disk_bytes")
        assert all(value > 0 for key, value in sizes.items() if key not in none_here)
        assert plan.negative_kv_bytes == (plan.kv_bytes if guided else 0)
        lasting = plan.kv_bytes + plan.negative_kv_bytes + plan.context_bytes + plan.vae_bytes
        assert plan.rollout_bytes == lasting + plan.weights_bytes + plan.activation_bytes
        assert plan.decode_bytes == lasting + plan.weights_bytes + plan.decode_activation_bytes
        assert plan.encode_bytes == plan.text_bytes + plan.text_activation_bytes
        assert plan.peak_bytes == max(plan.phases.values())

    @pytest.mark.parametrize("name", ["bounce", "self-forcing-1.3b"])
    def test_two_videos_at_once(self, name: str) -> None:
        plan, twice = (settings_of(name, batch=batch).plan() for batch in (1, 2))
        assert twice.kv_bytes == 2 * plan.kv_bytes
        assert twice.feature_bytes == 2 * plan.feature_bytes
        assert twice.weights_bytes == plan.weights_bytes
        assert 1.9 < twice.activation_bytes / plan.activation_bytes <= 2


class TestAgainstTheRealThing:
    def test_weights(self) -> None:
        plan = plan_memory(BOUNCE, CacheSpec(), 64, 64, dtype=torch.float32)
        transformer = CausalWanTransformer3DModel(**BOUNCE.transformer)
        text = UMT5EncoderModel(UMT5Config(**BOUNCE.text))
        assert plan.weights_bytes == sum(p.nbytes for p in transformer.parameters())
        assert plan.text_bytes == sum(p.nbytes for p in text.parameters())

    @pytest.mark.parametrize("precision", ["full", "fp8", "int8"])
    def test_weights_at_bfloat16(self, tmp_path: Path, precision: Any) -> None:
        """With the few that stay in float32."""
        CausalWanTransformer3DModel(**BOUNCE.transformer).save_pretrained(tmp_path)
        loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        text = UMT5EncoderModel(UMT5Config(**BOUNCE.text)).bfloat16()
        for model in (loaded, text):
            set_precision(model, precision, torch.bfloat16)
        plan = plan_memory(BOUNCE, CacheSpec(), 64, 64, dtype=torch.bfloat16, weights=precision)
        assert plan.weights_bytes == weight_bytes(loaded)
        assert plan.text_bytes == weight_bytes(text)

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
        assert plan.feature_bytes == caches

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

    def test_loaded_networks_are_planned_as_the_registry_plans_them(self) -> None:
        transformer = CausalWanTransformer3DModel(**BOUNCE.transformer)
        vae = AutoencoderKLWan(**BOUNCE.vae)
        text = UMT5EncoderModel(UMT5Config(**BOUNCE.text))
        for placement in PLACEMENTS:
            settings = settings_of("bounce", "fp32", dtype=torch.float32, placement=placement, guidance=3.0)
            loaded = plan_loaded(
                transformer, vae, text, settings.spec, (8, 8), 3,
                text_tokens=BOUNCE.text_tokens, placement=placement, guidance=3.0,
            )  # fmt: skip
            assert loaded.as_dict() == settings.plan().as_dict()
        released = plan_loaded(transformer, vae, None, settings.spec, (8, 8), 3)
        assert released.text_bytes == released.text_activation_bytes == released.encode_bytes == 0

    def test_context(self) -> None:
        pipe = build_pipeline()
        text = pipe.encode_prompt(["a red circle bouncing"])
        plan = plan_loaded(
            pipe.transformer, pipe.vae, None, CacheSpec(), (4, 6), 3, text_tokens=text.keys[0].shape[2]
        )
        assert plan.context_bytes == text.nbytes


class TestIntermediates:
    def test_what_is_alive_at_once(self) -> None:
        with LiveBytes() as live:
            a = torch.empty(100, device="meta")
            b = a + 1
            view = b[:10]
            del a
            assert live.bytes == 400, "a view is no memory of its own, and keeps what it looks at"
            del b
            assert live.bytes == 400
            c = view * 2
            del view
            assert live.bytes == 40 and live.peak == 800
            c.add_(1)
        assert live.bytes == 40 and live.peak == 800

    def test_what_was_there_before_does_not_count(self) -> None:
        weight = torch.empty(50, 50, device="meta")
        with LiveBytes() as live:
            result = nn.functional.linear(torch.empty(2, 50, device="meta"), weight.view(50, 50))
        assert live.peak == 2 * (2 * 50 * 4) and result.shape == (2, 50)

    def test_of_the_decoder_against_the_allocator(self) -> None:
        """What torch's allocator for the CPU hands out and takes back over a later chunk.

        Convolutions are left out: on a CPU they unfold their input, which GPUs do not.
        """

        class NoConvolution(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func not in (nn.functional.conv2d, nn.functional.conv3d, torch.conv2d, torch.conv3d):
                    return func(*args, **(kwargs or {}))
                empty = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
                return torch.zeros(func(*empty, **(kwargs or {})).shape)

        decoder = StreamingDecoder(AutoencoderKLWan(**BOUNCE.vae).requires_grad_(False))
        mark = 7_777_777
        with NoConvolution(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            decoder.feed(noise(1, 3, 16, 8, 8))
            between = torch.empty(mark, dtype=torch.uint8)
            decoder.feed(noise(1, 3, 16, 8, 8, seed=1))
        sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert sizes.count(mark) == 1 and len(between) == mark
        alive = list(accumulate(sizes))
        start = sizes.index(mark)
        peak = max(alive[start:]) - alive[start]
        plan = plan_memory(BOUNCE, CacheSpec(), 64, 64, dtype=torch.float32)
        assert plan.decode_activation_bytes == pytest.approx(peak, rel=0.1)

    def test_grow_with_the_picture(self) -> None:
        small = settings_of("self-forcing-1.3b").plan()
        large = settings_of("self-forcing-1.3b", height=960).plan()
        for name in ("activation_bytes", "decode_activation_bytes", "feature_bytes", "kv_bytes"):
            assert getattr(large, name) / getattr(small, name) == pytest.approx(2, rel=0.02)
        assert large.text_activation_bytes == small.text_activation_bytes

    def test_a_layer_that_is_cast_counts(self) -> None:
        full, low = (settings_of("wan2.1-14b", weights=w, text_weights=w).plan() for w in ("full", "fp8"))
        feed_forward = 3 * 4096 * 10_240 * 2
        assert low.text_activation_bytes - full.text_activation_bytes == feed_forward


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
        plans = [settings_of("self-forcing-1.3b", "int8", window=window).plan() for window in (84, 85)]
        assert plans[1].activation_bytes - plans[0].activation_bytes == long - short

    def test_unpacked_pages_count(self) -> None:
        """Half of what as many 16-bit pages take, and a scale for each token of each head."""
        geometry = CacheGeometry(30, 12, 128, 30, 52)
        short, long = (
            read_bytes(12, CacheSpec(format="int4", window=window, sink=0), geometry, torch.bfloat16)
            for window in (84, 85)
        )
        assert long - short == 4680 * 12 * (128 + 4) + 2 * 1560 * 12 * (128 + 2)


class TestPlacement:
    def plans(self, **changes: Any) -> dict[str, Any]:
        base = settings_of("self-forcing-1.3b", **changes)
        return {name: replace(base, placement=place).plan() for name, place in OFFLOADS.items()}

    def test_what_is_on_the_device(self) -> None:
        plans = self.plans()
        plan = plans["none"]
        vae = plan.vae_bytes - plan.feature_bytes
        weights, text = plan.weights_bytes, plan.text_bytes
        assert plan.encode_bytes == text + weights + vae + plan.text_activation_bytes
        assert plan.rollout_bytes == plans["text"].rollout_bytes + text
        assert plan.decode_bytes == plans["text"].decode_bytes + text
        assert plans["text"].encode_bytes == text + plan.text_activation_bytes
        assert plans["model"].rollout_bytes == plans["text"].rollout_bytes - vae
        assert plans["model"].decode_bytes == plans["text"].decode_bytes - weights
        saved = plans["text"].rollout_bytes - plans["group"].rollout_bytes
        assert 0.9 * weights < saved < weights, "28 of 30 blocks wait on the host"
        assert plans["text"].decode_bytes - plans["group"].decode_bytes == saved
        assert [plans[name].host_bytes for name in OFFLOADS] == [0, 0, weights + text + vae, weights]

    def test_each_takes_less_than_the_one_before(self) -> None:
        for name in ("self-forcing-1.3b", "krea-realtime-14b", "longlive2-5b"):
            base = settings_of(name)
            sizes = [max(replace(base, placement=p).plan().phases.values()) for p in PLACEMENTS]
            assert sizes[0] > sizes[1] >= sizes[2], sizes

    def test_streaming_a_model_of_one_block_saves_nothing(self) -> None:
        pipe = build_pipeline()
        plans = [
            plan_loaded(pipe.transformer, pipe.vae, None, CacheSpec(), (4, 6), 3, placement=place)
            for place in ("offload_text", "group_offload")
        ]
        assert plans[0].rollout_bytes == plans[1].rollout_bytes, "it has two blocks"

    def test_decoding_beside_the_next_chunk(self) -> None:
        apart, together = (settings_of("self-forcing-1.3b", overlap=o).plan() for o in (False, True))
        assert together.rollout_bytes - apart.rollout_bytes == apart.decode_activation_bytes

    def test_guidance_takes_a_second_cache(self) -> None:
        spec = CacheSpec(format="bf16", window=21, sink=0)
        guided, free = (plan_memory(WAN, spec, 480, 832, guidance=scale) for scale in (None, 1.0))
        assert own_guidance(WAN) == 5 and guided.negative_kv_bytes == guided.kv_bytes == free.kv_bytes
        assert free.negative_kv_bytes == 0
        more = guided.kv_bytes + free.context_bytes
        assert guided.rollout_bytes - free.rollout_bytes == more

    def test_unknown(self) -> None:
        with pytest.raises(InputError, match="placement='attic'; choose resident"):
            settings_of("bounce", placement="attic").plan()


class TestLargestWindow:
    @pytest.mark.parametrize("format", ["bf16", "int8"])
    @pytest.mark.parametrize("name", ["self-forcing-1.3b", "wan2.1-14b", "longlive2-5b"])
    def test_is_the_last_that_fits(self, name: str, format: str) -> None:
        entry = MODELS[name]
        for card in (24, 80, 141):
            found = largest_window(entry, card_bytes(card), format)
            windows = (entry.sink + entry.chunk_frames, None) if found is None else (found + 1, found)
            for window, fits in zip(windows, (False, True), strict=True):
                if window is not None:
                    peak = settings_of(name, format, window=window).plan().peak_bytes
                    assert (peak <= card_bytes(card)) == fits

    def test_against_figures_by_hand(self) -> None:
        """The notes say 57 frames of bf16 for 1.3B on 24 GB and 470 on an H200, with rougher reserves."""
        assert largest_window(FORCING, card_bytes(24), "bf16") == pytest.approx(57, abs=4)
        assert largest_window(FORCING, card_bytes(141), "bf16") == pytest.approx(470, rel=0.08)

    def test_settings_count(self) -> None:
        entry, card = MODELS["krea-realtime-14b"], card_bytes(24)
        assert largest_window(entry, card, "int8") is None
        low, streamed = (
            largest_window(entry, card, "int8", weights="fp8"),
            largest_window(entry, card, "int8", weights="fp8", placement="group_offload"),
        )
        assert low is not None and streamed is not None and low < streamed

    def test_a_card_is_not_used_whole(self) -> None:
        assert card_bytes(24) == 22_800_000_000
        for wrong in (0, -1, float("nan"), float("inf")):
            with pytest.raises(InputError, match="give a card's memory in GB"):
                card_bytes(wrong)


class TestRefusal:
    def test_what_fits_is_not_refused(self) -> None:
        plan = settings_of("self-forcing-1.3b").plan()
        check_fits(plan, plan.peak_bytes)
        check_fits(plan, None)
        with pytest.raises(ResourceError):
            check_fits(plan, plan.peak_bytes - 1)

    def test_names_numbers_and_three_remedies(self) -> None:
        plan = settings_of("self-forcing-1.3b", window=84).plan()
        with pytest.raises(ResourceError) as raised:
            check_fits(plan, card_bytes(24))
        message = str(raised.value)
        assert message.startswith(f"the video needs {gigabytes(plan.peak_bytes)} of memory on cuda (decode: ")
        assert "22.8 GB can be used; use --kv-format int8 (needs 19." in message
        assert message.count("(needs ") == 3 and "nothing else" not in message

    @pytest.mark.parametrize("gb", [3, 8, 12, 24])
    @pytest.mark.parametrize("name", ["longlive-1.3b", "wan2.1-14b"])
    def test_remedies_do_fit(self, name: str, gb: int) -> None:
        """The texts are read back as options and planned again."""
        settings = settings_of(name, window=60, placement="resident")
        found = remedies(settings, gb * GB, "cuda", ("kv-format", "offload", "weights", "window", "size"))
        assert len(found) <= 3
        for text, need in found:
            assert follow(settings, text).plan().peak_bytes == need <= gb * GB
            options = text.split(" --")
            for left_out in range(len(options)):
                if len(options) > 1 and not {"window", "height", "width"} & set(re.findall(r"[a-z]+", text)):
                    fewer = " --".join(options[:left_out] + options[left_out + 1 :])
                    assert follow(settings, fewer).plan().peak_bytes > gb * GB, "no option is idle"

    def test_least_intrusive_first(self) -> None:
        settings = settings_of("self-forcing-1.3b", window=60, placement="resident")
        found = remedies(settings, 28 * GB, "cuda", ("kv-format", "offload", "weights", "window", "size"))
        assert [text.split()[0] for text, _ in found] == ["--offload", "--kv-format", "--offload"]

    def test_nothing_is_added_to_what_is_enough(self) -> None:
        settings = settings_of("self-forcing-1.3b", window=84)
        found = remedies(settings, card_bytes(24), "cuda", ("kv-format", "weights"))
        assert [text for text, _ in found] == ["--kv-format int8"]

    def test_no_window_without_a_past(self) -> None:
        """With `--weights fp8` a window of one chunk would fit."""
        settings = settings_of("wan2.1-14b", weights="fp8", text_weights="fp8")
        assert settings.with_window(3).plan().peak_bytes < card_bytes(24)
        assert remedies(settings, card_bytes(24), "cuda", ("window",)) == []

    def test_only_what_is_allowed(self) -> None:
        settings = settings_of("self-forcing-1.3b", window=120)
        found = remedies(settings, 20 * GB, "cuda", ("window",))
        assert [text.split()[0] for text, _ in found] == ["--window"]
        with pytest.raises(ResourceError, match="nothing else of window makes it fit"):
            check_fits(settings.plan(), 20 * GB, "cuda", ("window",))

    def test_nothing_is_offloaded_from_a_cpu(self) -> None:
        settings = settings_of("self-forcing-1.3b", "fp32", window=60, dtype=torch.float32)
        found = remedies(settings, 30 * GB, "cpu", ("kv-format", "offload", "weights", "window", "size"))
        assert found and not any("--offload" in text for text, _ in found)

    def test_when_nothing_helps(self) -> None:
        with pytest.raises(ResourceError, match="no setting makes it fit here, use a smaller model"):
            check_fits(settings_of("wan2.1-14b").plan(), 10**8)

    def test_a_text_encoder_that_is_too_large(self) -> None:
        plan = settings_of("self-forcing-1.3b", "int8", window=9).plan()
        with pytest.raises(ResourceError, match=r"\(encode: text encoder 11\.4 GB\).*use --text-weights fp8"):
            check_fits(plan, 11 * GB)

    def test_a_plan_of_loaded_networks(self) -> None:
        with pytest.raises(ResourceError, match="choose a smaller window"):
            check_fits(build_pipeline().estimate_memory(), 1000, "cpu")


def follow(settings: MemorySettings, text: str) -> MemorySettings:
    """Settings with the options of a remedy."""
    words = text.removeprefix("--").split()
    given = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    for name, value in given.items():
        if name == "offload":
            settings = replace(settings, placement=OFFLOADS[value])
        elif name == "kv-format":
            settings = replace(settings, spec=settings.spec.model_copy(update={"format": value}))
        elif name == "window":
            settings = settings.with_window(int(value))
        elif name == "weights":
            settings = replace(settings, weights=value, text_weights=value)  # type: ignore[arg-type]
        elif name == "text-weights":
            settings = replace(settings, text_weights=value)  # type: ignore[arg-type]
        else:
            assert name in ("height", "width")
            settings = replace(settings, **{name: int(value)})
    return settings


class TestAvailable:
    def test_a_gpu_is_not_filled_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vidkv.room.available_bytes", lambda device: 1000)
        assert usable_bytes("cuda:1") == 950 and usable_bytes("cpu") == 1000

    def test_what_torch_holds_idle_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (
            ("mem_get_info", (500, 900)),
            ("memory_reserved", 300),
            ("memory_allocated", 100),
        ):
            monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
        assert available_bytes("cuda") == 700

    def test_on_this_machine(self) -> None:
        free = available_bytes("cpu")
        assert free is None or 10**8 < free < 10**14

    def write(self, root: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def room(self, root: Path, membership: str) -> list[int]:
        (root / "cgroup").write_text(membership)
        return sorted(_group_room(root / "cgroup", root / "fs"))

    def test_version_2_with_the_group_above(self, tmp_path: Path) -> None:
        self.write(
            tmp_path,
            {
                "fs/memory.max": "max\n",
                "fs/memory.current": "1\n",
                "fs/memory.stat": "inactive_file 0\n",
                "fs/a/memory.max": "5000\n",
                "fs/a/memory.current": "3000\n",
                "fs/a/memory.stat": "anon 7\ninactive_file 400\n",
                "fs/a/b/memory.max": "9000\n",
                "fs/a/b/memory.current": "1000\n",
                "fs/a/b/memory.stat": "inactive_file 0\n",
            },
        )
        assert self.room(tmp_path, "0::/a/b\n") == [2400, 8000]
        assert self.room(tmp_path, "0::/\n") == [], "no limit"

    def test_version_1(self, tmp_path: Path) -> None:
        self.write(
            tmp_path,
            {
                "fs/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "fs/memory/memory.usage_in_bytes": "0\n",
                "fs/memory/memory.stat": "total_inactive_file 0\n",
                "fs/memory/job/memory.limit_in_bytes": "7000\n",
                "fs/memory/job/memory.usage_in_bytes": "6500\n",
                "fs/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
        )
        found = self.room(tmp_path, "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n")
        assert found == [600, 9223372036854771712]

    def test_a_path_of_the_host_that_is_not_to_be_seen(self, tmp_path: Path) -> None:
        """As in a container: the group's own files lie at the top."""
        files = {"memory.max": "5000\n", "memory.current": "1000\n", "memory.stat": "inactive_file 0\n"}
        self.write(tmp_path, {f"fs/{name}": text for name, text in files.items()})
        for path in ("/docker/0123", "/../../x"):
            assert self.room(tmp_path, f"0::{path}\n") == [4000]

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert list(_group_room(tmp_path / "none", tmp_path)) == []
        assert self.room(tmp_path, "garbage\n0::/\n") == []


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
