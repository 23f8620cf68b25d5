"""What a request accepts, and one clear line for what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vidkv.cache.formats import FORMATS
from vidkv.errors import InputError
from vidkv.request import (
    STRICT_JSON,
    EngineSettings,
    VideoRequest,
    below,
    faults,
    first_fault,
    json_fault,
    nearest_field,
    printable,
    read_json,
    shown,
)


def refusal(**values: Any) -> str:
    with pytest.raises(InputError) as caught:
        VideoRequest.of({"prompt": "a red circle"} | values)
    return str(caught.value)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


class TestSchedule:
    @pytest.mark.parametrize(
        "schedule",
        [
            "5: a blue square; 12.5: night",
            " 5 : a blue square ;12.5:night; ",
            '[[5, "a blue square"], [12.5, "night"]]',
            '[{"second": 5, "prompt": "a blue square"}, [12.5, "night"]]',
            [[5, "a blue square"], ["12.5", "night"]],
            [{"prompt": "a blue square", "second": 5}, (12.5, "night")],
        ],
        ids=str,
    )
    def test_all_forms_are_one(self, schedule: Any) -> None:
        request = VideoRequest.of({"prompt": "dawn", "schedule": schedule})
        assert request.schedule == ((5.0, "a blue square"), (12.5, "night"))
        assert request.prompts == ((0.0, "dawn"), (5.0, "a blue square"), (12.5, "night"))

    def test_a_prompt_may_hold_a_colon(self) -> None:
        assert VideoRequest.of({"prompt": "a", "schedule": "5: fox: night"}).schedule == (
            (5.0, "fox: night"),
        )

    def test_an_entry_may_say_what_becomes_of_the_history(self) -> None:
        named = {"second": 2, "prompt": "b", "switch": "keep"}
        entries = [[1, "a", "flush"], named, [3, "c", None], [4, "d"]]
        assert VideoRequest.of({"prompt": "x", "schedule": entries}).schedule == (
            (1.0, "a", "flush"), (2.0, "b", "keep"), (3.0, "c", None), (4.0, "d"),
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("schedule", "message"),
        [
            ("5", "schedule='5': '5' is not SECOND: PROMPT, such as '12.5: a blue circle'"),
            ("x: a", "schedule.0.0='x': input should be a valid number, unable to parse string as a number"),
            ("nan: a", "schedule.0.0='nan': input should be a finite number"),
            ("-1: a", "schedule.0.0='-1': input should be greater than or equal to 0"),
            ([[True, "a"]], "schedule.0.0=True: give a number"),
            ([[1, ""]], "schedule.0.1='': the prompt is empty; describe the video in a sentence"),
            ([[1, "a\0"]], r"schedule.0.1='a\x00': it holds a NUL character; leave it out"),
            ([[1, "a"], [2]], "schedule.1.1=[2]: give [second, prompt], such as [5, 'a blue circle']"),
            ([[1, "a", 3]], "schedule.0.2=3: input should be 'keep', 'recache', 'flush' or 'lerp'"),
            (
                [[1, "a", "keep", 4]],
                "schedule.0=[1, 'a', 'keep', 4]: give [second, prompt], such as [5, 'a blue circle']",
            ),
            (7, "schedule=7: give a list of [second, prompt], such as [5, 'a blue circle']"),
            ("[1,", "schedule='[1,': expecting value at column 4, near the end"),
            ('[[NaN, "a"]]', "schedule='[[NaN, \"a\"]]': NaN is not JSON; give a finite number"),
        ],
        ids=str,
    )
    def test_mistakes(self, schedule: Any, message: str) -> None:
        assert refusal(schedule=schedule) == message

    def test_has_an_end(self) -> None:
        assert len(VideoRequest.of({"prompt": "a", "schedule": "1: b;" * 1_000}).schedule) == 1_000
        assert "at most 1000 items" in refusal(schedule="1: b;" * 1_001)
        assert "at most 1000 items" in refusal(schedule=[[1, "b"]] * 100_000)


class TestCache:
    @pytest.mark.parametrize(
        "cache",
        [
            "int8,window=15",
            '{"format": "int8", "window": 15}',
            {"format": "int8", "window": 15},
            {"window": "15", "format": "int8"},
        ],
        ids=str,
    )
    def test_all_forms_are_one_and_name_only_what_was_given(self, cache: Any) -> None:
        assert VideoRequest.of({"prompt": "a", "cache": cache}).cache == {"format": "int8", "window": 15}

    @pytest.mark.parametrize("cache", [None, {}, "", "{}"], ids=str)
    def test_nothing_changes_nothing(self, cache: Any) -> None:
        assert VideoRequest.of({"prompt": "a", "cache": cache}).cache == {}

    @pytest.mark.parametrize(
        ("cache", "message"),
        [
            ("int9", "cache='int9': cache format 'int9' is unknown; formats are " + ", ".join(FORMATS)),
            (
                {"format": ["int8"]},
                "cache={'format': ['int8']}: setting 'format'=['int8']: give a text or a number",
            ),
            ({1: 2}, "cache={1: 2}: setting 1=2: give a text or a number"),
            (
                {"window": 2**63},
                f"cache={{'window': {2**63}}}: setting 'window'={2**63}: give a text or a number",
            ),
            (
                ["int8"],
                "cache=['int8']: give a text such as 'int8,window=21,sink=3', or a mapping of settings",
            ),
            (
                '{"window": 1, "window": 2}',
                'cache=\'{"window": 1, "window": 2}\': window is given twice; keep one',
            ),
            ("{1", "cache='{1': expecting property name enclosed in double quotes at column 2, near '1'"),
        ],
        ids=str,
    )
    def test_mistakes(self, cache: Any, message: str) -> None:
        assert refusal(cache=cache) == message


class TestFields:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("prompt", "", "prompt='': the prompt is empty; describe the video in a sentence"),
            ("prompt", " \n", "prompt=' \\n': the prompt is empty; describe the video in a sentence"),
            ("prompt", 5, "prompt=5: input should be a valid string; write it in quotes"),
            (
                "prompt",
                "x" * 10_001,
                f"prompt='{'x' * 27}...{'x' * 28}': string should have at most 10000 characters",
            ),
            (
                "prompt",
                "a\ud800",
                r"prompt='a\ud800': it holds half of a character (a lone surrogate); write the whole one",
            ),
            ("negative", "a\0", r"negative='a\x00': it holds a NUL character; leave it out"),
            ("model", "a\0", r"model='a\x00': it holds a NUL character; leave it out"),
            ("model", "", "model='': string should have at least 1 character"),
            ("id", "a/b", "id='a/b': use 1 to 80 letters, digits, '.', '_' and '-'"),
            ("id", "a\n", "id='a\\n': use 1 to 80 letters, digits, '.', '_' and '-'"),
            ("id", "x" * 81, f"id='{'x' * 27}...{'x' * 28}': use 1 to 80 letters, digits, '.', '_' and '-'"),
            ("id", "..", "id='..': an id of dots alone names a folder, not a video"),
            ("seed", -1, "seed=-1: input should be greater than or equal to 0"),
            ("seed", 2**64, "seed=18446744073709551616: input should be less than 18446744073709551616"),
            ("seed", True, "seed=True: give a number"),
            ("seed", "x", "seed='x': input should be a valid integer, unable to parse string as an integer"),
            ("seed", 1e300, "seed=1e+300: the number is too large"),
            ("seconds", 0, "seconds=0: input should be greater than 0"),
            ("seconds", float("nan"), "seconds=nan: input should be a finite number"),
            ("seconds", float("inf"), "seconds=inf: input should be a finite number"),
            ("width", 0, "width=0: input should be greater than or equal to 1"),
            ("height", 65_537, "height=65537: input should be less than or equal to 65536"),
            ("steps", 1.5, "steps=1.5: input should be a valid integer, got a number with a fractional part"),
            ("guidance", float("-inf"), "guidance=-inf: input should be a finite number"),
            ("image", "", "image='': give the path of a file, of at most 4096 bytes"),
            ("image", 5, "image=5: give the path of a file"),
            (
                "image",
                "http://a/b.png",
                "image='http://a/b.png': give the path of a local file; addresses are not fetched",
            ),
            (
                "video",
                "file:///etc/passwd",
                "video='file:///etc/passwd': give the path of a local file; addresses are not fetched",
            ),
            ("video", "a\0", r"video='a\x00': give the path of a local file; addresses are not fetched"),
            ("image", "a\ud800", r"image='a\ud800': its name is not valid UTF-8; rename the file"),
            ("switch", "Keep", "switch='Keep': input should be 'keep', 'recache', 'flush' or 'lerp'"),
            ("noise", "white", "noise='white': input should be 'counter' or 'stock'"),
            ("promt", "a", "promt='a' is not known; did you mean prompt?"),
            ("Seed", 1, "Seed=1 is not known; did you mean seed?"),
            ("\x1b[2J", 1, r"'\x1b[2J'=1 is not known; fields are " + ", ".join(VideoRequest.model_fields)),
        ],
        ids=str,
    )
    def test_mistakes(self, field: str, value: Any, message: str) -> None:
        assert refusal(**{field: value}) == message

    def test_prompt_alone_is_required(self) -> None:
        with pytest.raises(InputError, match=r"^prompt is missing; it is required$"):
            VideoRequest.of({})
        assert VideoRequest.of({"prompt": "a"}).seconds == 10

    def test_huge_numbers_have_no_digits_to_show(self) -> None:
        assert refusal(seed=10**5_000).startswith(
            "seed=a number of thousands of digits: input should be less than"
        )
        assert "thousands of digits" in refusal(cache={"window": 10**5_000})

    def test_deep_and_long_values_are_cut(self) -> None:
        for value in (nested(900), {"format": nested(900)}, ["x" * 2**20] * 9, {"y" * 2**20: 1}):
            for field in ("prompt", "cache", "schedule", "other"):
                message = refusal(**{field: value})
                assert len(message) < 500 and message.isprintable()

    def test_everything_wrong_is_found(self) -> None:
        with pytest.raises(ValidationError) as caught:
            VideoRequest.model_validate({"seed": -1, "foo": 2})
        found = list(faults(caught.value, VideoRequest))
        assert [field for field, _ in found] == ["prompt", "seed", "foo"]
        assert first_fault(caught.value, VideoRequest) == found[0][1] == "prompt is missing; it is required"

    def test_faults_of_other_models(self) -> None:
        with pytest.raises(ValidationError) as caught:
            EngineSettings.model_validate({"tile": [1, "x"]})
        reason = "input should be a valid integer, unable to parse string as an integer"
        assert first_fault(caught.value, EngineSettings) == f"tile.1='x': {reason}"
        assert nearest_field("wieghts", EngineSettings) == "did you mean weights?"


class TestOutputPath:
    @pytest.mark.parametrize(
        ("given_", "path"),
        [
            ("a.mp4", "a.mp4"),
            ("a/b c.MP4", "a/b c.MP4"),
            ("./a//b.mp4", "a/b.mp4"),
            ("é🦊.mp4", "é🦊.mp4"),
            ("a.mp4/", "a.mp4"),
        ],
    )
    def test_stays_below(self, given_: str, path: str) -> None:
        assert VideoRequest.of({"prompt": "a", "out": given_}).out == path

    @pytest.mark.parametrize(
        "path",
        [
            "", ".", "..", "/a.mp4", "//a.mp4", "../a.mp4", "a/../b.mp4", "a/../../b.mp4", ".a.mp4",
            "a/.b/c.mp4", "~/.ssh/a.mp4", "a\\b.mp4", "..\\a.mp4", "C:a.mp4", "\\\\host\\a.mp4",
            "http://a/b.mp4", "a\0.mp4", "a\n.mp4", "a\u202e.mp4", "a\x7f.mp4", "\ud800.mp4", "a",
            "a.mp4.png", ".mp4", "a/.mp4", "a.mp4/b.mp4", "a.MP4/b/c.mp4", "x" * 201 + ".mp4",
            "é" * 101 + ".mp4",
            "/".join("x" * 100 for _ in range(3)) + ".mp4",
        ],
        ids=ascii,
    )  # fmt: skip
    def test_never_leaves(self, path: str) -> None:
        assert refusal(out=path).startswith("out=")

    @settings(max_examples=300)
    @given(st.text(alphabet=st.sampled_from("a./\\~:\0\n é%2e"), max_size=12))
    def test_whatever_is_accepted_resolves_below(self, text: str) -> None:
        try:
            path = below(f"{text}.mp4")
        except ValueError:
            return
        root = Path("/renders")
        assert (root / path).resolve().is_relative_to(root) and (root / path).resolve() != root
        assert below(path) == path


class TestText:
    @settings(max_examples=200)
    @given(st.text(), st.integers(4, 60))
    def test_printable_is_short_and_harmless(self, text: str, limit: int) -> None:
        line = printable(text, limit)
        assert line.isprintable() and len(line) <= limit
        assert line == text or not text.isprintable() or len(text) > limit

    @settings(max_examples=200)
    @given(
        st.recursive(
            st.none() | st.binary() | st.text() | st.integers() | st.floats(),
            lambda v: st.lists(v) | st.dictionaries(st.text(), v),
        )
    )
    def test_any_value_can_be_shown(self, value: Any) -> None:
        assert shown(value).isprintable() and len(shown(value)) <= 80

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"a": 1, "b": 2, "a": 3}', "a is given twice; keep one"),
            ('[{"\\u001b": 1, "\\u001b": 2}]', r"\x1b is given twice; keep one"),
            ("[NaN]", "NaN is not JSON; give a finite number"),
            ("-Infinity", "-Infinity is not JSON; give a finite number"),
            ("9" * 401, "a number of 401 digits is too large"),
            ("[" * 100_000, "lists or mappings are nested too deeply"),
            ('{"a": 1', "expecting ',' delimiter at column 8, near the end"),
            ('"a\tb"', "invalid control character at column 3, near '\\tb\"'"),
            ("{'a': 1}", "expecting property name enclosed in double quotes at column 2, near \"'a': 1}\""),
        ],
        ids=lambda text: text[:30],
    )
    def test_json_mistakes(self, text: str, message: str) -> None:
        with pytest.raises(ValueError) as caught:
            read_json(text)
        assert str(caught.value) == message

    def test_json_fault_of_the_decoder(self) -> None:
        with pytest.raises(json.JSONDecodeError) as caught:
            STRICT_JSON.decode("[1 2]")
        assert json_fault(caught.value) == "expecting ',' delimiter at column 4, near '2]'"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**60, 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["", "x" * 2**20, "\0", "\u202eabc", "🦊", "\ud800", "5: a", "int8", "a.mp4", "../a.mp4", "[[1]]"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=500)
@given(
    st.dictionaries(
        st.sampled_from(list(VideoRequest.model_fields)) | st.text(max_size=6), JSON_VALUES, max_size=4
    )
)
def test_any_mapping_is_a_request_or_one_printable_line(values: dict[str, Any]) -> None:
    for mapping in (values, {"prompt": "a red circle"} | values):
        try:
            request = VideoRequest.of(mapping)
        except InputError as error:
            assert 0 < len(str(error)) < 700
            assert str(error).isprintable()
        else:
            saved = json.dumps(request.model_dump(mode="json", exclude_defaults=True), allow_nan=False)
            assert VideoRequest.of(json.loads(saved.encode())) == request
