"""One object names every cache setting; its one-line form and its messages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import tests.tiny
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.cache.formats import FORMATS
from vidkv.cache.policies import POLICIES
from vidkv.errors import CacheSpecError, InputError, VidkvError


@st.composite
def specs(draw: st.DrawFn) -> CacheSpec:
    policy = draw(st.sampled_from(list(POLICIES)))
    return CacheSpec(
        format=draw(st.sampled_from(list(FORMATS))),
        window=draw(st.integers(1, 1000)),
        sink=0 if policy == "sliding_window" else draw(st.integers(0, 50)),
        policy=policy,
        positions=draw(st.sampled_from(["relative", "absolute"])),
        keep_newest=draw(st.booleans()),
        keep_sinks=draw(st.booleans()),
        value_scale=draw(st.sampled_from(["token", "channel"])),
        segment=draw(st.integers(1, 99)),
    )


class TestOneLine:
    @given(specs())
    def test_round_trip(self, spec: CacheSpec) -> None:
        assert CacheSpec.parse(str(spec)) == spec
        assert CacheSpec.of(spec.model_dump()) == spec
        assert "\n" not in str(spec)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", {}),
            ("int8", {"format": "int8"}),
            ("int8,window=30,sink=0", {"format": "int8", "window": 30, "sink": 0}),
            ("window=30, sink = 4 ,bf16", {"format": "bf16", "window": 30, "sink": 4}),
            ("format=bf16,positions=absolute", {"format": "bf16", "positions": "absolute"}),
            ("int8,keep_newest,keep_sinks=false", {"format": "int8", "keep_newest": True}),
            ("policy=sliding_window,sink=0", {"policy": "sliding_window", "sink": 0}),
            (",,segment=2,", {"segment": 2}),
        ],
    )
    def test_reading(self, text: str, expected: dict[str, Any]) -> None:
        assert CacheSpec.parse(text) == CacheSpec(**expected)

    def test_writing_names_what_matters(self) -> None:
        assert str(CacheSpec()) == "fp32,window=21,sink=3"
        assert str(CacheSpec(format="int8", keep_newest=True, segment=4)) == (
            "int8,window=21,sink=3,keep_newest,segment=4"
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("int9", ["cache format 'int9' is unknown", "fp32, bf16, int8"]),
            ("window", ["cache format 'window' is unknown"]),
            ("policy=lru", ["cache policy 'lru' is unknown", "sliding_window, sink_window"]),
            ("policy=sliding_window", ["sink=3", "sliding_window keeps no sinks", "sink=0"]),
            ("window=0", ["window='0'", "greater than or equal to 1"]),
            ("window=-3", ["window='-3'"]),
            ("window=nan", ["window='nan'", "valid integer"]),
            ("window=7.5", ["window='7.5'", "valid integer"]),
            ("window=", ["window=''"]),
            ("sink=-1", ["sink='-1'", "greater than or equal to 0"]),
            ("segment=0", ["segment='0'"]),
            ("positions=both", ["positions='both'", "'relative' or 'absolute'"]),
            ("value_scale=page", ["value_scale='page'", "'token' or 'channel'"]),
            ("keep_newest=maybe", ["keep_newest='maybe'"]),
            ("windows=7", ["windows='7'", "settings are format, window, sink"]),
            ("=7", ["cache setting ='7'"]),
            ("window=7,window=9", ["'window' is given twice"]),
            ("int8,bf16", ["'format' is given twice"]),
        ],
    )
    def test_one_line_that_names_the_setting(self, text: str, words: list[str]) -> None:
        with pytest.raises(CacheSpecError) as caught:
            CacheSpec.parse(text)
        for word in words:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, InputError) and isinstance(caught.value, VidkvError)

    def test_long_input_does_not_flood_the_message(self) -> None:
        with pytest.raises(CacheSpecError) as caught:
            CacheSpec.parse("window=" + "x" * 100_000)
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize(
        "values",
        [{"format": "int9"}, {"policy": "lru"}, {"policy": "sliding_window"}, {"window": 0}],
        ids=str,
    )
    def test_the_constructor_checks_too(self, values: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            CacheSpec(**values)

    def test_frozen(self) -> None:
        with pytest.raises(ValidationError):
            CacheSpec().window = 5  # type: ignore[misc]


class TestCapacity:
    @given(st.integers(1, 60), st.integers(0, 30), st.integers(1, 9))
    def test_window_counts_sinks_and_the_current_chunk(self, window: int, sink: int, chunk: int) -> None:
        spec = CacheSpec(window=window, sink=sink)
        if sink + chunk <= window:
            assert spec.capacity(chunk) == window - chunk >= sink
            return
        with pytest.raises(CacheSpecError) as caught:
            spec.capacity(chunk)
        for value in (f"sink={sink}", f"window={window}", f"chunk of {chunk}", f"at least {sink + chunk}"):
            assert value in str(caught.value)


class TestGeometry:
    def test_of_a_model(self) -> None:
        model = tests.tiny.build_transformer(
            num_attention_heads=4, num_key_value_heads=2, num_layers=3, patch_size=(1, 2, 1)
        )
        found = CacheGeometry.of_model(model.config, 8, 6, chunk_frames=2, batch=5)
        assert found == CacheGeometry(3, 2, 24, height=4, width=6, chunk_frames=2, batch=5)
        assert found.tokens == 24

    def test_without_grouped_heads(self) -> None:
        assert CacheGeometry.of_model(tests.tiny.build_transformer().config, 4, 4, 3).kv_heads == 2
