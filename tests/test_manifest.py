"""A manifest is a list of requests, or one line for each of its mistakes."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.faults.manifests import KINDS, check_accepted, check_refusal, fuzz_manifests
from vidkv.errors import InputError
from vidkv.manifest import KINDS as SUFFIXES
from vidkv.manifest import Entry, manifest_schema, parse_manifest, read_manifest
from vidkv.request import VideoRequest

FOLDER = Path("/nowhere")


def parse(text: str | bytes, kind: str = "jsonl", folder: Path = FOLDER) -> list[Entry]:
    data = text.encode() if isinstance(text, str) else text
    return parse_manifest(data, kind, f"jobs.{kind}", folder)


def refusal(text: str | bytes, kind: str = "jsonl", folder: Path = FOLDER) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse(text, kind, folder)
    check_refusal(caught.value, f"jobs.{kind}")
    return str(caught.value).split("\n")


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


class TestFaults:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "a", "seconds": -3}, "seconds=-3: input should be greater than 0"),
            ({"seed": 1}, "prompt is missing; it is required"),
            ({"prompt": None}, "prompt is missing; it is required"),
            ({"prompt": "a", "sed": 1}, "sed=1 is not known; did you mean seed?"),
            ({"prompt": "a", "id": "a b"}, "id='a b': use 1 to 80 letters, digits, '.', '_' and '-'"),
            ({"prompt": "a", "out": "a.avi"}, "out='a.avi': it must end in .mp4"),
            ({"prompt": "a", "seed": True}, "seed=True: give a number"),
            ({"prompt": "a", "image": ""}, "image='': give the path of a file, of at most 4096 bytes"),
            ([], '[]: give a mapping such as {"prompt": "a circle"}'),
            ("a red circle", "'a red circle': give a mapping such as {\"prompt\": \"a circle\"}"),
            (None, 'None: give a mapping such as {"prompt": "a circle"}'),
        ],
        ids=str,
    )  # fmt: skip
    def test_name_file_line_field_value_and_remedy(self, row: Any, message: str) -> None:
        good = json.dumps({"prompt": "good"})
        assert refusal(f"{good}\n# note\n\n{json.dumps(row)}\n{good}\n") == [f"jobs.jsonl:4: {message}"]

    def test_all_are_told_at_once_in_order(self) -> None:
        text = lines({"prompt": "a", "seconds": 0}, {"prompt": "b"}, {"seed": -1, "x": 1}) + '\n{"a":\n'
        assert refusal(text) == [
            "jobs.jsonl:1: seconds=0: input should be greater than 0",
            "jobs.jsonl:3: prompt is missing; it is required",
            "jobs.jsonl:3: seed=-1: input should be greater than or equal to 0",
            f"jobs.jsonl:3: x=1 is not known; fields are {', '.join(VideoRequest.model_fields)}",
            "jobs.jsonl:4: expecting value at column 6, near the end; write one JSON object per line",
        ]

    def test_yaml_faults_stand_where_the_field_does_and_those_of_defaults_once(self) -> None:
        text = "defaults:\n  steps: 0\njobs:\n- prompt: a\n  id: x\n  seed: -1\n"
        text += "- prompt: b\n  steps: 2\n  id: X\n- prompt: c\n"
        assert refusal(text, "yaml") == [
            "jobs.yaml:2: steps=0: input should be greater than or equal to 1",
            "jobs.yaml:6: seed=-1: input should be greater than or equal to 0",
            "jobs.yaml:9: id='X': line 4 has it (case does not count); give another",
        ]

    def test_twenty_are_shown(self) -> None:
        found = refusal(lines(*({"prompt": "a", "seed": -n} for n in range(1, 401))))
        assert len(found) == 21
        assert found[19] == "jobs.jsonl:20: seed=-20: input should be greater than or equal to 0"
        assert found[20] == "and 380 more"
        assert len(refusal(lines(*({"prompt": "a", "seed": -n} for n in range(1, 21))))) == 20

    def test_fewer_where_they_are_long(self) -> None:
        found = refusal(lines(*({"prompt": "a", "\0" * 60 + str(n): "\0" * 60} for n in range(100))))
        assert 5 < len(found) < 20
        assert found[-1] == f"and {100 - (len(found) - 1)} more"

    def test_counting_ends_in_a_file_of_another_kind(self) -> None:
        assert refusal("x\n" * 100_000)[-1] == "and at least 981 more"
        assert refusal("[" + "{}," * 100_000 + "{}]", "json") == [
            "jobs.json:1: prompt is missing; it is required"
        ]
        assert refusal(json.dumps({f"x{n}": 1 for n in range(10_000)}))[-1] == "and at least 982 more"

    def test_too_many_videos(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vidkv.manifest.MAX_VIDEOS", 3)
        assert len(parse(lines(*[{"prompt": "a"}] * 3))) == 3
        assert refusal(lines(*[{"prompt": "a"}] * 4)) == [
            "jobs.jsonl:4: it holds more than 3 videos; split it"
        ]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("text", ["", "\n\n", "\ufeff", " \r\n"])
    def test_empty(self, kind: str, text: str) -> None:
        assert refusal(text, kind) == [
            f"jobs.{kind}: it holds no videos; write one mapping of fields for each"
        ]

    def test_comments_alone(self) -> None:
        assert refusal("# prompt\n")[0].startswith("jobs.jsonl: it holds no videos")
        assert refusal("[]", "json")[0].startswith("jobs.json: it holds no videos")
        assert refusal("prompt,seed\n", "csv")[0].startswith("jobs.csv: it holds no videos")
        for text in ("# a", "---", "[]", "jobs:", "jobs: []", "null"):
            assert refusal(text, "yaml")[0].startswith("jobs.yaml: it holds no videos"), text


class TestDuplicates:
    @pytest.mark.parametrize(
        ("first", "second", "names"),
        [
            ({"id": "a"}, {"id": "a"}, "id='a'"),
            ({"id": "Fox"}, {"id": "fOX"}, "id='fOX'"),
            ({"out": "b/a.mp4"}, {"out": "b//A.MP4"}, "out='b//A.MP4'"),
            ({"id": "a"}, {"out": "./A.mp4"}, "out='./A.mp4'"),
            ({"out": "a.mp4"}, {"id": "a"}, "out='a.mp4'"),
            ({"out": "\u00e9.mp4"}, {"out": "e\u0301.mp4"}, "out='e\u0301.mp4'"),
        ],
        ids=str,
    )
    def test_are_refused(self, first: dict[str, Any], second: dict[str, Any], names: str) -> None:
        text = "\n" + lines({"prompt": "a"} | first, {"prompt": "b"}, {"prompt": "c"} | second)
        message = f"{names}: line 2 has it (case does not count); give another"
        assert refusal(text) == [f"jobs.jsonl:4: {message}"]

    def test_count_on_faulty_lines_and_on_the_same_line(self) -> None:
        found = refusal(lines({"prompt": "a", "id": "x", "seed": -1}, {"prompt": "a", "id": "x"}))
        assert [line.split("=")[0] for line in found] == ["jobs.jsonl:1: seed", "jobs.jsonl:2: id"]
        assert refusal('[{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}]', "json") == [
            "jobs.json:1: id='x': line 1 has it (case does not count); give another"
        ]

    def test_what_is_not_a_duplicate(self) -> None:
        rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "id": "x", "out": "y.mp4"}]
        rows += [{"prompt": "a", "id": "y", "out": "x.mp4"}, {"prompt": "a", "out": "x/x.mp4"}]
        assert [entry.line for entry in parse(lines(*rows))] == [1, 2, 3, 4, 5]


class TestFiles:
    def test_paths_start_at_the_manifest(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "jobs").mkdir()
        (tmp_path / "jobs" / "a.png").touch()
        (tmp_path / "b.mp4").touch()
        rows = [{"prompt": "a", "image": "a.png"}, {"prompt": "a", "video": "../b.mp4"}]
        rows += [{"prompt": "a", "image": str(tmp_path / "jobs" / "a.png")}]
        (tmp_path / "jobs" / "all.jsonl").write_text(lines(*rows))
        monkeypatch.chdir(tmp_path)
        first, second, third = (entry.request for entry in read_manifest(Path("jobs/all.jsonl")))
        assert first.image == third.image == tmp_path / "jobs" / "a.png"
        assert second.video is not None and second.video.is_absolute() and second.video.samefile("b.mp4")
        assert first.model_fields_set == {"prompt", "image"}

    def test_must_be_there(self, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "dir.png").mkdir()
        os.mkfifo(tmp_path / "pipe")
        rows = [{"prompt": "a", "image": name} for name in ("none.png", "dir.png", "pipe", "x" * 300, "loop")]
        hint = "paths are relative to the manifest's folder"
        assert refusal(lines(*rows, {"prompt": "a", "video": "none"}), folder=tmp_path) == [
            f"jobs.jsonl:1: image='none.png': no such file or directory; {hint}",
            f"jobs.jsonl:2: image='dir.png': it is not a regular file; {hint}",
            f"jobs.jsonl:3: image='pipe': it is not a regular file; {hint}",
            f"jobs.jsonl:4: image='{'x' * 27}...{'x' * 28}': file name too long; {hint}",
            f"jobs.jsonl:5: image='loop': too many levels of symbolic links; {hint}",
            f"jobs.jsonl:6: video='none': no such file or directory; {hint}",
        ]

    def test_the_manifest_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "dir.jsonl").mkdir()
        (tmp_path / "jobs.txt").write_text('{"prompt": "a"}')
        (tmp_path / "jobs").write_text('{"prompt": "a"}')
        os.mkfifo(tmp_path / "pipe.jsonl")
        remedy = "give the path of a manifest, or - for standard input"
        kinds = "use .jsonl, .ndjson, .json, .csv, .yaml, .yml"
        for name, message in {
            "none.jsonl": f"none.jsonl: no such file or directory; {remedy}",
            "dir.jsonl": f"dir.jsonl: it is not a regular file; {remedy}",
            "pipe.jsonl": f"pipe.jsonl: it is not a regular file; {remedy}",
            "a\0b.jsonl": rf"a\x00b.jsonl: embedded null byte; {remedy}",
            "\x1b[2J.jsonl": rf"\x1b[2J.jsonl: no such file or directory; {remedy}",
            "jobs.txt": f"jobs.txt: suffix '.txt' is not known; {kinds}",
            "jobs": f"jobs: suffix '' is not known; {kinds}",
        }.items():
            with pytest.raises(InputError) as caught:
                read_manifest(Path(name))
            assert str(caught.value) == message

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable(self, tmp_path: Path) -> None:
        path = tmp_path / "jobs.jsonl"
        path.touch(mode=0)
        with pytest.raises(InputError, match="it may not be read"):
            read_manifest(path)

    def test_too_large(self, tmp_path: Path) -> None:
        for suffix, size in ((".jsonl", 64), (".csv", 64), (".json", 16), (".yaml", 8)):
            path = tmp_path / f"jobs{suffix}"
            with path.open("wb") as file:
                file.truncate(size * 2**20 + 1)
            with pytest.raises(InputError) as caught:
                read_manifest(path)
            assert str(caught.value) == f"{path}: it is larger than {size} MiB; split it, or write JSONL"

    def test_suffixes(self, tmp_path: Path) -> None:
        texts = {
            "jsonl": '{"prompt": "a"}',
            "json": '[{"prompt": "a"}]',
            "csv": "prompt\na",
            "yaml": "- prompt: a",
        }
        for suffix, kind in SUFFIXES.items():
            path = tmp_path / f"jobs{suffix.upper()}"
            path.write_text(texts[kind])
            assert [entry.request.prompt for entry in read_manifest(path)] == ["a"]

    def test_standard_input(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.png").touch()
        monkeypatch.chdir(tmp_path)
        data = io.BytesIO(b'{"prompt": "a", "image": "a.png"}\n')
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
        (entry,) = read_manifest(Path("-"))
        assert entry.request.image == tmp_path / "a.png"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
        with pytest.raises(InputError, match=r"^standard input:1: prompt is missing; it is required$"):
            read_manifest(Path("-"))


REQUESTS = st.builds(
    lambda **values: VideoRequest.of({name: value for name, value in values.items() if value is not None}),
    prompt=st.text(min_size=1, max_size=20).map(lambda text: f"a{text}".replace("\0", "")),
    schedule=st.lists(st.tuples(st.floats(0, 1e6), st.sampled_from(["b: c; d", '"f",\n', "🦊"])), max_size=3),
    seed=st.integers(0, 2**64 - 1) | st.none(),
    seconds=st.floats(0, 1e9, exclude_min=True) | st.none(),
    model=st.sampled_from(["bounce", "./a b", "ü"]) | st.none(),
    width=st.integers(1, 2**16) | st.none(),
    cache=st.sampled_from(["int8", "window=9,sink=2", {"keep_sinks": True, "sink": 1}]) | st.none(),
    steps=st.integers(1, 1000) | st.none(),
    guidance=st.floats(allow_nan=False, allow_infinity=False) | st.none(),
    negative=st.sampled_from(['blur, "noise"', "null"]) | st.none(),
    switch=st.sampled_from(["keep", "recache", "flush", "lerp"]) | st.none(),
    noise=st.sampled_from(["counter", "stock"]) | st.none(),
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(REQUESTS, min_size=1, max_size=4), st.booleans())
def test_what_is_written_is_read_back(requests: list[VideoRequest], plain: bool) -> None:
    rows = [request.model_dump(mode="json", exclude_defaults=True) for request in requests]
    for number, row in enumerate(rows):
        row["id"] = f"v{number}"
    texts = [json.dumps(row, ensure_ascii=plain) for row in rows]
    wanted = [request.model_copy(update={"id": f"v{number}"}) for number, request in enumerate(requests)]
    written = {
        "jsonl": "\n".join(texts),
        "json": json.dumps(rows, indent=2, ensure_ascii=plain),
        "csv": csv_of(rows),
    }
    for kind, text in written.items():
        assert [entry.request for entry in parse(text, kind)] == wanted, kind


def csv_of(rows: list[dict[str, Any]]) -> str:
    """All cells in quotes, line breaks and all."""
    header = sorted({name for row in rows for name in row})
    table = [header, *([row.get(name, "") for name in header] for row in rows)]
    texts = [[cell if isinstance(cell, str) else json.dumps(cell) for cell in row] for row in table]
    return "".join(",".join('"' + text.replace('"', '""') + '"' for text in row) + "\r\n" for row in texts)


class TestFuzzing:
    @settings(max_examples=150)
    @given(
        st.binary(max_size=80) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )
    @example(b"\xef\xbb\xbf\xff")
    @example(b"[" * 5_000)
    @example(b"{a: " * 5_000)
    @example(b"- " * 5_000)
    @example(b"? " * 5_000)
    def test_any_bytes(self, data: bytes) -> None:
        for kind in KINDS:
            try:
                check_accepted(parse(data, kind))
            except InputError as error:
                check_refusal(error, f"jobs.{kind}")

    def test_damaged_manifests(self, tmp_path: Path) -> None:
        refused = fuzz_manifests(4_000, seed=20, folder=tmp_path)
        assert 1_000 < refused < 3_500
        assert fuzz_manifests(300, seed=1, folder=tmp_path) == fuzz_manifests(300, seed=1, folder=tmp_path)

    def test_would_raise_what_is_no_input_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise KeyError("x")

        monkeypatch.setattr("vidkv.manifest.read_items", broken)
        with pytest.raises(KeyError):
            fuzz_manifests(1, seed=0, folder=tmp_path)


class TestSchema:
    def test_describes_every_field(self) -> None:
        schema = manifest_schema()
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert schema["required"] == ["prompt"] and schema["additionalProperties"] is False
        assert set(schema["properties"]) == set(VideoRequest.model_fields)
        for name, field in schema["properties"].items():
            assert field["description"] == VideoRequest.model_fields[name].description
            assert ({"type": "null"} in field.get("anyOf", ())) == (name != "prompt")
        json.dumps(schema, allow_nan=False)

    def test_knows_both_forms_of_schedule_and_cache(self) -> None:
        schema = manifest_schema()
        text, entries, _ = schema["properties"]["schedule"]["anyOf"]
        assert text == {"type": "string"} and entries["maxItems"] == 1_000
        listed, named = entries["items"]["anyOf"]
        pair, triple = listed["oneOf"]
        assert [part["type"] for part in pair["prefixItems"]] == ["number", "string"]
        assert triple["prefixItems"][:2] == pair["prefixItems"] and triple["maxItems"] == 3
        assert named == {"$ref": "#/$defs/ScheduledPrompt"}
        text, settings_, _ = schema["properties"]["cache"]["anyOf"]
        assert text == {"type": "string"} and settings_ == {"$ref": "#/$defs/CacheSpec"}
        spec = schema["$defs"]["CacheSpec"]["properties"]
        assert "int8" in spec["format"]["enum"] and "sink_window" in spec["policy"]["enum"]
        assert not any("default" in setting for setting in spec.values())

    def test_bounds(self) -> None:
        properties = manifest_schema()["properties"]
        assert properties["seed"]["anyOf"][0] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**64}
        assert properties["width"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 2**16}
        assert properties["prompt"]["maxLength"] == 10_000

    def test_agrees_with_the_reader(self) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        check = jsonschema.Draft202012Validator(manifest_schema())
        for row, good in (
            ({"prompt": "a"}, True),
            ({"prompt": "a", "seed": None, "cache": None}, True),
            ({"prompt": "a", "schedule": "5: b", "cache": "int8"}, True),
            (
                {"prompt": "a", "schedule": [[5, "b"], {"second": 6, "prompt": "c"}], "cache": {"sink": 1}},
                True,
            ),
            ({"prompt": "a", "schedule": [[5]]}, False),
            ({"prompt": "a", "schedule": [[-5, "b"]]}, False),
            ({"prompt": "a", "cache": {"format": "int9"}}, False),
            ({"prompt": "a", "cache": {"windw": 9}}, False),
            ({"prompt": "a", "seconds": 0}, False),
            ({"prompt": "a", "width": 0}, False),
            ({"prompt": "a", "seed": True}, False),
            ({"prompt": "a", "promt": "a"}, False),
            ({"seed": 1}, False),
        ):
            assert check.is_valid(row) is good, row
            if good:
                parse(json.dumps(row))
            else:
                refusal(json.dumps(row))
