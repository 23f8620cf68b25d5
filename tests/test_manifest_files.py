"""What JSONL, JSON, CSV and YAML files say, on which line, and why they cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vidkv.manifest_files import Item, Unreadable, read_items


def items(text: str | bytes, kind: str) -> list[Item]:
    return list(read_items(text.encode() if isinstance(text, str) else text, kind))


def said(text: str | bytes, kind: str) -> list[tuple[int, Any]]:
    found = items(text, kind)
    assert all(item.fault is None for item in found)
    return [(item.line, item.values) for item in found]


def unreadable(text: str | bytes, kind: str) -> tuple[int | None, str]:
    with pytest.raises(Unreadable) as caught:
        items(text, kind)
    line, reason = caught.value.args
    return line, reason


class TestAllKinds:
    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "yaml"])
    def test_nul_and_bytes_of_other_encodings(self, kind: str) -> None:
        assert unreadable(b"\n\na\0b", kind) == (3, "there is a NUL byte; save the file as UTF-8 text")
        reason = "byte 0xfc is not UTF-8; save the file as UTF-8 text"
        bad = b'\n{"prompt": "\xfc"}'
        if kind == "jsonl":
            assert items(bad + b'\n{"seed": 1}', kind) == [Item(2, fault=reason), Item(3, {"seed": 1})]
        else:
            assert unreadable(bad, kind) == (2, reason)

    def test_utf16(self) -> None:
        text = '{"prompt": "a"}'
        assert unreadable(text.encode("utf-16"), "json") == (
            1,
            "there is a NUL byte; save the file as UTF-8 text",
        )

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            ("jsonl", '{"prompt": "a"}'),
            ("json", '[{"prompt": "a"}]'),
            ("csv", "prompt\na"),
            ("yaml", "- prompt: a"),
        ],
    )
    @pytest.mark.parametrize("end", ["", "\n", "\r\n"])
    def test_byte_order_mark_and_line_ends(self, kind: str, text: str, end: str) -> None:
        ((_, values),) = said("\ufeff" + text.replace("\n", end or "\n") + end, kind)
        assert values == {"prompt": "a"}


class TestJsonLines:
    def test_comments_and_blank_lines(self) -> None:
        text = '# all\n{"a": 1}\n\n   \n  # {"a": 2}\n  {"a": "#\\u2028"}  \r\n[3]'
        assert said(text, "jsonl") == [(2, {"a": 1}), (6, {"a": "#\u2028"}), (7, [3])]

    def test_separators_inside_texts_are_not_line_ends(self) -> None:
        assert said('{"a": "\u2028\x85\u2029"}\n{"b": 1}', "jsonl") == [
            (1, {"a": "\u2028\x85\u2029"}),
            (2, {"b": 1}),
        ]

    @pytest.mark.parametrize(
        ("line", "fault"),
        [
            ("{", "expecting property name enclosed in double quotes at column 2, near the end"),
            ('{"a": 1} {"b": 2}', "extra data at column 10, near '{\"b\": 2}'"),
            ('{"a": 1,}', "expecting property name enclosed in double quotes at column 9, near '}'"),
            ('{"a": NaN}', "NaN is not JSON; give a finite number"),
            ('{"a": 1, "a": 1}', "a is given twice; keep one"),
            ('{"a": {"b": 1, "b": 1}}', "b is given twice; keep one"),
            ("[" * 5_000, "lists or mappings are nested too deeply"),
            ('{"a": ' + "9" * 5_000 + "}", "a number of 5000 digits is too large"),
            ("prompt: a", "expecting value at column 1, near 'prompt: a'"),
        ],
        ids=lambda text: text[:20],
    )
    def test_a_bad_line_does_not_hide_the_next(self, line: str, fault: str) -> None:
        wanted = [Item(1, fault=f"{fault}; write one JSON object per line"), Item(2, {"b": 2})]
        assert items(f'{line}\n{{"b": 2}}', "jsonl") == wanted

    def test_huge_lines(self) -> None:
        fault = "the line is longer than 1 MiB; write one JSON object per line"
        assert items(b'"' + b"x" * 2**20 + b'"\n{"b": 2}', "jsonl") == [
            Item(1, fault=fault),
            Item(2, {"b": 2}),
        ]
        assert said(b'"' + b"x" * (2**20 - 2) + b'"', "jsonl")[0][1] == "x" * (2**20 - 2)

    def test_many_names_are_compared_quickly(self) -> None:
        names = ",".join(f'"{n}":1' for n in range(70_000))
        (item,) = items(f'{{{names},"69999":1}}', "jsonl")
        assert item.fault == "69999 is given twice; keep one; write one JSON object per line"


class TestJson:
    def test_items_of_a_list_know_their_lines(self) -> None:
        text = '\n[\n  {"a": "x\\ny",\n   "b": [1,\n 2]},\n\n {"a": 2}, {"a": 3}\n, 4]\n'
        assert said(text, "json") == [(3, {"a": "x\ny", "b": [1, 2]}), (7, {"a": 2}), (7, {"a": 3}), (8, 4)]
        rows = [{"n": n} for n in range(50)]
        assert said(json.dumps(rows, indent=1), "json") == [(2 + 3 * n, row) for n, row in enumerate(rows)]

    def test_one_object_or_lines(self) -> None:
        assert said('\n{\n "a": 1\n}\n', "json") == [(2, {"a": 1})]
        assert said('{"a": 1}\n# no\n{"a": 2}\n', "json") == [(1, {"a": 1}), (3, {"a": 2})]

    @pytest.mark.parametrize(
        ("text", "line", "reason"),
        [
            ('[\n{"a": 1}\n{"a": 2}]', 3, "expecting ',' delimiter at column 1, near '{\"a\": 2}]'"),
            ('[\n{"a": 1},\n]', 2, "illegal trailing comma before end of array at column 9, near ',\\n]'"),
            ("[{}]\n[{}]", 2, "extra data at column 1, near '[{}]'"),
            ("[{}", 1, "expecting ',' delimiter at column 4, near the end"),
            ("[" * 5_000, 1, "lists or mappings are nested too deeply"),
            ('[\n{"a": 1, "a": 2}]', 1, "a is given twice; keep one"),
        ],
    )
    def test_mistakes(self, text: str, line: int, reason: str) -> None:
        found, words = unreadable(text, "json")
        assert words.endswith("; mend the list, or write one object per line")
        if "illegal" not in reason:  # newer Pythons name a trailing comma
            assert (found, words.split(";")[0]) == (line, reason.split(";")[0])


class TestCsv:
    def test_cells_are_fields_and_empty_ones_are_not_given(self) -> None:
        text = 'prompt, seed ,cache,schedule\n"a, b",7,"int8,window=21",5: c; 6: d\n'
        text += '\n , ,,\n"two\nlines",,,\n"x ""y"""," 3",,\n'
        assert said(text, "csv") == [
            (2, {"prompt": "a, b", "seed": "7", "cache": "int8,window=21", "schedule": "5: c; 6: d"}),
            (5, {"prompt": "two\nlines"}),
            (7, {"prompt": 'x "y"', "seed": " 3"}),
        ]

    @pytest.mark.parametrize("mark", [",", ";", "\t"])
    def test_what_spreadsheets_put_between_cells(self, mark: str) -> None:
        text = mark.join(("prompt", "seed")) + "\n" + mark.join(("a", "1"))
        assert said(text, "csv") == [(2, {"prompt": "a", "seed": "1"})]

    def test_a_space_may_stand_before_quotes(self) -> None:
        assert said('seed, prompt\n1, "a, b"\n', "csv") == [(2, {"seed": "1", "prompt": "a, b"})]

    def test_a_bad_row_does_not_hide_the_next(self) -> None:
        wanted = [
            Item(2, fault="3 cells, and the header has 2; put cells that hold ',' in quotes"),
            Item(3, fault="1 cells, and the header has 2; put cells that hold ',' in quotes"),
            Item(4, {"prompt": "c", "seed": "2"}),
        ]
        assert items("prompt,seed\na,b,1\nb\nc,2\n", "csv") == wanted

    @pytest.mark.parametrize(
        ("text", "line", "reason"),
        [
            ("promt,seed\na,1", 1, "column 1: 'promt' is not known; did you mean prompt?"),
            ("\nprompt,\na,1", 2, "column 2: '' is not known; fields are"),
            ("prompt,seed,seed\na,1,1", 1, "column 3: seed is given twice; keep one column"),
            ("seed\n1", 1, "prompt is missing; the first row must name the fields"),
            ("a red circle\na blue one", 1, "column 1: 'a red circle' is not known; fields are"),
            (
                'prompt,seed\nx,1\n"a,1\nb,2\n',
                3,
                "unexpected end of data; put cells that hold quotes in quotes",
            ),
            ('prompt,seed\n"a" b,1', 2, "',' expected after '\"'; put cells that hold quotes in quotes"),
            (f"prompt,seed\n{'x' * 131_073},1", 2, "field larger than field limit (131072); put"),
        ],
        ids=lambda text: str(text)[:30],
    )
    def test_mistakes(self, text: str, line: int, reason: str) -> None:
        found, words = unreadable(text, "csv")
        assert found == line and words.startswith(reason)


class TestYaml:
    def test_lists_of_mappings(self) -> None:
        text = "# all\n- prompt: a red circle\n  seed: 7\n\n"
        text += "- {prompt: 'b: c', schedule: [[5, d], {second: 6, prompt: e}]}\n- 5\n"
        assert said(text, "yaml") == [
            (2, {"prompt": "a red circle", "seed": 7}),
            (5, {"prompt": "b: c", "schedule": [[5, "d"], {"second": 6, "prompt": "e"}]}),
            (6, 5),
        ]

    def test_fields_know_their_lines(self) -> None:
        found = items(
            "defaults:\n  seed: 3\njobs:\n- prompt: >\n    a long\n    text\n\n  seconds: 4\n- seed:\n   5\n",
            "yaml",
        )
        assert [item.values for item in found] == [
            {"seed": 3, "prompt": "a long text\n", "seconds": 4},
            {"seed": 5},
        ]
        assert [(item.line, item.lines) for item in found] == [
            (4, {"seed": 2, "prompt": 4, "seconds": 8}),
            (9, {"seed": 9}),
        ]

    def test_defaults(self) -> None:
        assert said("jobs: [{seed: 1}, {cache: null}]\ndefaults: {cache: int8}", "yaml") == [
            (1, {"cache": "int8", "seed": 1}),
            (1, {"cache": None}),
        ]
        assert said("defaults:\njobs:\n- prompt: a", "yaml") == [(3, {"prompt": "a"})]
        assert said("prompt: a\nseed: 1\n", "yaml") == [(1, {"prompt": "a", "seed": 1})]

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("no", "no"), ("on", "on"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("0x10", "0x10"),
            ("1_000", "1_000"), (".inf", ".inf"), (".nan", ".nan"), ("=", "="), ("<<", "<<"), ("'1'", "1"),
            ('"true"', "true"), ("1e3", 1000.0), ("5", 5), ("-5", -5), ("+5", 5), ("007", 7), (".5", 0.5),
            ("5.", 5.0), ("1.5e-3", 0.0015), ("true", True), ("False", False), ("null", None), ("~", None),
            ("", None), ("٣", "٣"), ("9" * 401, "9" * 401), ("9" * 400, 10**400 - 1),
        ],
        ids=lambda value: str(value)[:20],
    )  # fmt: skip
    def test_plain_scalars(self, text: str, value: Any) -> None:
        ((_, values),) = said(f"- prompt: {text}", "yaml")
        assert values == {"prompt": value} and type(values["prompt"]) is type(value)

    @pytest.mark.parametrize(
        ("text", "line", "reason"),
        [
            ("- prompt: a\n- &x {prompt: b}\n- *x", 2, "'x': anchors and aliases are not read; write it out"),
            ("- prompt: a\n- *x", 2, "'x': anchors and aliases are not read; write it out"),
            ("- {<<: *x, prompt: b}", 1, "'x': anchors and aliases are not read; write it out"),
            ("- &x prompt: a", 1, "'x': anchors and aliases are not read; write it out"),
            ("- prompt: !!python/object/apply:os.system [ls]", 1, "'tag:yaml.org,2002:python"),
            ("- prompt: !secret a", 1, "'!secret': tags are not read; leave it out"),
            ("- ! a", 1, "'!': tags are not read; leave it out"),
            ("- prompt: a\n  seed: 1\n  prompt: b", 3, "prompt is given twice; keep one"),
            ("- prompt: a: b", 1, "mapping values are not allowed in this context; indent"),
            ("- prompt: a\n\tseed: 1", 2, "found "),
            ("- prompt: 'a", 1, "found unexpected end of stream; indent"),
            ("- prompt: a\nseed: 1", 2, "did not find expected '-' indicator; indent"),
            ("é: \n- a: \x07", 2, "character 0x7: control characters are not allowed; leave it out"),
            ('- prompt: "\\ud800"', 1, "found invalid Unicode character escape code; indent"),
            ("- prompt: a\n---\n- prompt: b", 2, "a second document begins; put all videos into one list"),
            ("a red circle", 1, "give a list of mappings, or defaults: a mapping and jobs"),
            ("jobs: 5", 1, "give a list of mappings, or defaults"),
            ("defaults: 5\njobs: []", 1, "give a list of mappings, or defaults"),
            ("jobs: []\ndefault: {}", 2, "'default' stands beside jobs; only defaults may"),
            ("- ? [a]\n  : b", 1, "only a text can name a field; put it in quotes"),
            ("[" * 100_000, 1, "lists or mappings are nested too deeply"),
            ("- " * 100_000, 1, "lists or mappings are nested too deeply"),
            ("? " * 100_000, 1, "only a text can name a field; put it in quotes"),
            ("{a: " * 100_000, 1, "lists or mappings are nested too deeply"),
        ],
        ids=lambda text: str(text)[:30],
    )  # fmt: skip
    def test_mistakes(self, text: str, line: int, reason: str) -> None:
        found, words = unreadable(text, "yaml")
        assert found == line and words.startswith(reason)

    def test_billion_laughs(self) -> None:
        text = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]\n" for n in range(1, 12))
        assert unreadable(text, "yaml") == (1, "'a0': anchors and aliases are not read; write it out")

    def test_the_slow_parser_agrees(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import yaml

        text = (
            "defaults: {seed: 3}\njobs:\n- prompt: 'a'\n  cache: {window: 9}\n- {seed: no, out: [[1, b]]}\n"
        )
        fast = items(text, "yaml")
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
        assert items(text, "yaml") == fast
        assert unreadable("[" * 5_000, "yaml") == (1, "lists or mappings are nested too deeply")
        assert unreadable("é: \n- a: \x07", "yaml")[0] == 2
