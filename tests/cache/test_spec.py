"""One object names every cache setting; its one-line form and its messages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import tests.tiny
from vidkv.cache import CacheGeometry, CacheSpec, KVCache
from vidkv.cache.formats import FORMATS
from vidkv.cache.policies import POLICIES
from vidkv.errors import CacheSpecError, InputError, VidkvError


@st.composite
def specs(draw: st.DrawFn) -> CacheSpec:
    policy = draw(st.sampled_from(list(POLICIES)))
    format = draw(st.sampled_from(list(FORMATS)))
    narrow: dict[str, Any] = {}
    if FORMATS[format].narrow:
        narrow = {
            "group": draw(st.integers(0, 128)),
            "hadamard": draw(st.booleans()),
            "fit": draw(st.sampled_from(["error", "largest"])),
            "jensen": draw(st.booleans()),
            "centroids": draw(st.sampled_from([0, 2, 256])),
            "key_scale": draw(st.sampled_from(["token", "channel"])),
        }
    window, kept = draw(st.integers(1, 1000)), draw(st.sampled_from([1.0, 0.5, 0.123]))
    return CacheSpec(
        format=format,
        window=window,
        newer=draw(st.sampled_from(["", "int8:3", "bf16:1+int8:20+int4:7"])),
        keep_tokens=kept,
        keep_by="key" if kept == 1 else draw(st.sampled_from(["key", "mass"])),
        select=draw(st.integers(0, window)),
        **narrow,
        sink=0 if policy == "sliding_window" else draw(st.integers(0, 50)),
        policy=policy,
        positions=draw(st.sampled_from(["relative", "absolute"])),
        keep_newest=draw(st.booleans()),
        keep_sinks=draw(st.booleans()),
        value_scale=draw(st.sampled_from(["token", "channel"])),
        segment=draw(st.integers(1, 99)),
        local_heads=draw(st.integers(0, 5)),
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
        assert str(CacheSpec.parse("int4")) == "int4,window=21,sink=3"

    def test_below_eight_bits_sinks_and_the_newest_have_eight(self) -> None:
        spec = CacheSpec.parse("int4")
        assert spec.keep_sinks and spec.tiers == [("int8", 3)] and not spec.keep_newest
        assert CacheSpec.parse("int4,newer=int8:6+k8v4:2").tiers == [("int8", 6), ("k8v4", 2)]
        bare = CacheSpec.parse("int4,newer=,keep_sinks=false")
        assert not bare.tiers and not bare.keep_sinks and CacheSpec.parse(str(bare)) == bare
        assert not CacheSpec.parse("int8").keep_sinks


class TestAgainstThePages:
    """What only the size of a page or a chunk can tell."""

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("int4,group=5", ["group=5 does not divide a head of 12"]),
            ("int4", ["hadamard needs heads of 2, 4, 8", "not 12", "hadamard=false"]),
            ("int2,hadamard=false,newer=", []),
            ("int8,newer=int8:3", ["newer='int8:3'", "twice, or that of the oldest"]),
            ("int4,hadamard=false,newer=int8:2+int8:3", ["twice"]),
            ("int8,select=6", ["select=6: sink=3 and a chunk of 3", "at least 7"]),
            ("int8,local_heads=1", ["local_heads=1 of 1 kv heads", "say at most 0"]),
        ],
    )
    def test_one_line_that_says_what_to_do(self, text: str, words: list[str]) -> None:
        geometry = CacheGeometry(layers=1, kv_heads=1, head_dim=12, height=1, width=2)
        if not words:
            KVCache(CacheSpec.parse(text), geometry)
            return
        with pytest.raises(CacheSpecError) as caught:
            KVCache(CacheSpec.parse(text), geometry)
        for word in words:
            assert word in str(caught.value)


def test_a_new_setting_changes_no_identity() -> None:
    """Jobs are named by it: these are the settings of 0.5."""
    assert CacheSpec.parse("int8,window=9").identity == {
        "format": "int8", "window": 9, "sink": 3, "policy": "sink_window", "positions": "relative",
        "keep_newest": False, "keep_sinks": False, "value_scale": "token", "segment": 6,
    }  # fmt: skip
    assert CacheSpec.parse("int4").identity["newer"] == "int8:3"
    for other in ("int8,select=9", "int8,local_heads=1"):
        assert CacheSpec.parse(other).identity != CacheSpec.parse("int8").identity
    pruned = "int8,keep_tokens=0.5"
    assert "keep_by" not in CacheSpec.parse(pruned).identity
    assert CacheSpec.parse(f"{pruned},keep_by=mass").identity["keep_by"] == "mass"


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
            ("int4,newer=int9:3", ["newer='int9:3'", "FORMAT:FRAMES such as int8:6", "k4v2"]),
            ("int4,newer=int8", ["'int8' is no FORMAT:FRAMES"]),
            ("int4,newer=int8:0", ["'int8:0' is no FORMAT:FRAMES"]),
            ("int4,newer=int8:3+", ["'' is no FORMAT:FRAMES"]),
            ("int8,keyframe", ["keyframe says how pages below eight bits", "int8 pages are not", "int4"]),
            ("fp32,group=32", ["group says how"]),
            ("int8,centroids=4", ["centroids says how", "int8 pages are not"]),
            ("int4,centroids=4,keyframe", ["keyframe and centroids both say", "choose one"]),
            ("int4,centroids=257", ["centroids='257'", "less than or equal to 256"]),
            ("int4,keyframe,keep_tokens=0.5", ["does not go with keep_tokens"]),
            ("keep_tokens=0", ["keep_tokens='0'", "greater than 0"]),
            ("keep_tokens=nan", ["keep_tokens='nan'"]),
            ("keep_tokens=1.5", ["less than or equal to 1"]),
            ("keep_by=mass", ["keep_by=mass says which", "such as keep_tokens=0.5"]),
            ("keep_tokens=0.5,keep_by=age", ["keep_by='age'", "'key' or 'mass'"]),
            ("select=30", ["select=30 of a window of 21"]),
            ("local_heads=-1", ["local_heads='-1'", "greater than or equal to 0"]),
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
