"""What the bytes of a manifest say: mappings with the lines they stand on, from JSONL, JSON, CSV and YAML."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from vidkv.request import STRICT_JSON, VideoRequest, json_fault, nearest_field, printable, read_json, shown

# JSON and YAML stand in memory as a whole, at many times their size
MAX_BYTES = {"jsonl": 64 * 2**20, "csv": 64 * 2**20, "json": 16 * 2**20, "yaml": 8 * 2**20}
MAX_LINE_BYTES = 2**20
_YAML_DEPTH = 16
TOO_DEEP = "lists or mappings are nested too deeply"


@dataclass(frozen=True)
class Item:
    """What a file says about one video, as yet unchecked.

    Attributes:
        values: a mapping of fields, if the user wrote one.
        lines: where fields stand that are not on `line`.
        fault: why it cannot be read, or None.
    """

    line: int
    values: Any = None
    lines: Mapping[str, int] = field(default_factory=dict)
    fault: str | None = None


class Unreadable(Exception):
    """The rest of a file cannot be read: line (None: no particular one), reason."""


def read_items(data: bytes, kind: str) -> Iterator[Item]:
    """The items of a file of kind `jsonl`, `json`, `csv` or `yaml`, in order.

    Raises:
        Unreadable: what follows makes no sense.
    """
    if len(data) > MAX_BYTES[kind]:
        raise Unreadable(None, f"it is larger than {MAX_BYTES[kind] >> 20} MiB; split it, or write JSONL")
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise Unreadable(_line(data, data.index(b"\0")), "there is a NUL byte; save the file as UTF-8 text")
    if kind == "jsonl":
        return _jsonl(data)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(_line(data, error.start), _not_utf8(error)) from None
    return {"json": _json, "csv": _csv, "yaml": _yaml}[kind](text)


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8 text"


def _jsonl(data: bytes) -> Iterator[Item]:
    for number, line in enumerate(io.BytesIO(data), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith(b"#"):
            continue
        if len(line) > MAX_LINE_BYTES:
            size = f"{MAX_LINE_BYTES >> 20} MiB"
            yield Item(number, fault=f"the line is longer than {size}; write one JSON object per line")
            continue
        try:
            yield Item(number, read_json(stripped.decode()))
        except UnicodeDecodeError as error:
            yield Item(number, fault=_not_utf8(error))
        except ValueError as error:
            yield Item(number, fault=f"{error}; write one JSON object per line")


def _json(text: str) -> Iterator[Item]:
    """One list of objects, one object, or JSONL."""
    start = text.lstrip()[:1]
    try:
        value = STRICT_JSON.decode(text) if start in ("[", "{") else None
    except (ValueError, RecursionError) as error:
        if start == "[":
            reason = f"{json_fault(error)}; mend the list, or write one object per line"
            raise Unreadable(getattr(error, "lineno", 1), reason) from None
        value = None
    if isinstance(value, list):
        return _located(text, value)
    return (
        _jsonl(text.encode())
        if value is None
        else iter([Item(1 + text[: text.index("{")].count("\n"), value)])
    )


def _located(text: str, values: list[Any]) -> Iterator[Item]:
    """The items of a JSON list with their lines."""
    between = re.compile(r"[ \t\r\n,]*")
    line, at, counted = 1, text.index("[") + 1, 0
    for value in values:
        gap = between.match(text, at)
        assert gap is not None
        line, counted = line + text.count("\n", counted, gap.end()), gap.end()
        yield Item(line, value)
        try:
            at = STRICT_JSON.raw_decode(text, counted)[1]
        except RecursionError as error:
            raise Unreadable(line, json_fault(error)) from None


def _csv(text: str) -> Iterator[Item]:
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    while True:
        line = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise Unreadable(
                line, f"{error}; put cells that hold quotes in quotes, and double those"
            ) from None
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            _check_header(header, line)
        elif len(cells) == len(header):
            pairs = zip(header, cells, strict=True)
            yield Item(line, {name: cell for name, cell in pairs if cell.strip()})
        else:
            counts = f"{len(cells)} cells, and the header has {len(header)}"
            yield Item(line, fault=f"{counts}; put cells that hold {delimiter!r} in quotes")


def _check_header(header: list[str], line: int) -> None:
    for column, name in enumerate(header, 1):
        if name not in VideoRequest.model_fields:
            remedy = nearest_field(name, VideoRequest)
            raise Unreadable(line, f"column {column}: {shown(name)} is not known; {remedy}")
        if name in header[: column - 1]:
            raise Unreadable(line, f"column {column}: {name} is given twice; keep one column")
    if "prompt" not in header:
        raise Unreadable(line, "prompt is missing; the first row must name the fields")


@dataclass(slots=True)
class _Node:
    """A YAML value; in lists and mappings stand nodes again."""

    line: int
    value: Any = None

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {name: node.plain() for name, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


def _yaml(text: str) -> Iterator[Item]:
    """A list of mappings, one mapping, or {defaults: mapping, jobs: list of mappings}."""
    try:
        root = _yaml_root(text)
    except yaml.reader.ReaderError as error:
        line = _line(text.encode(), error.position)
        raise Unreadable(line, f"character {error.character:#x}: {error.reason}; leave it out") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if "nesting depth" in str(error.problem):
            # newer parsers have a limit of their own
            raise Unreadable(mark.line + 1 if mark else None, TOO_DEEP) from None
        reason = (
            f"{error.problem or error.context}; indent with spaces, put texts with ': ' or ' #' in quotes"
        )
        raise Unreadable(mark.line + 1 if mark else None, reason) from None
    jobs, defaults = root, _Node(root.line, {})
    if isinstance(root.value, dict):
        jobs = root.value.get("jobs", _Node(root.line, [root]))
        if "jobs" in root.value:
            defaults = root.value.get("defaults", defaults)
            for name, node in root.value.items():
                if name not in ("jobs", "defaults"):
                    raise Unreadable(node.line, f"{shown(name)} stands beside jobs; only defaults may")
    shared = defaults.value or {}
    if not isinstance(shared, dict) or not isinstance(jobs.value, list | None):
        raise Unreadable(
            root.line, "give a list of mappings, or defaults: a mapping and jobs: a list of mappings"
        )
    for job in jobs.value or ():
        nodes = shared | job.value if isinstance(job.value, dict) else {}
        lines = {name: node.line for name, node in nodes.items()}
        yield Item(job.line, {name: node.plain() for name, node in nodes.items()} or job.plain(), lines)


def _yaml_root(text: str) -> _Node:
    # events, not nodes: composing those is recursive in C, and deep nesting would end the process
    events: Iterator[Any] = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    next(events)
    if isinstance(next(events), yaml.StreamEndEvent):
        return _Node(1)
    root = _yaml_node(events, next(events), 0)
    next(events)
    after = next(events)
    if not isinstance(after, yaml.StreamEndEvent):
        raise Unreadable(after.start_mark.line + 1, "a second document begins; put all videos into one list")
    return root


def _yaml_node(events: Iterator[Any], event: Any, depth: int) -> _Node:
    node = _Node(_yaml_line(event))
    if depth > _YAML_DEPTH:
        raise Unreadable(node.line, TOO_DEEP)
    if isinstance(event, yaml.ScalarEvent):
        node.value = _yaml_scalar(event.value) if event.implicit[0] else event.value
    elif isinstance(event, yaml.SequenceStartEvent):
        node.value = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            node.value.append(_yaml_node(events, event, depth + 1))
    else:
        node.value = {}
        while not isinstance(name := next(events), yaml.MappingEndEvent):
            line = _yaml_line(name)
            if not isinstance(name, yaml.ScalarEvent):
                raise Unreadable(line, "only a text can name a field; put it in quotes")
            if name.value in node.value:
                raise Unreadable(line, f"{printable(name.value, 40)} is given twice; keep one")
            node.value[name.value] = _yaml_node(events, next(events), depth + 1)
            node.value[name.value].line = line
    return node


def _yaml_line(event: Any) -> int:
    """The line of a node without anchor or tag: aliases can grow a file a billionfold, tags run code."""
    line: int = event.start_mark.line + 1
    if event.anchor is not None:
        raise Unreadable(line, f"{shown(event.anchor)}: anchors and aliases are not read; write it out")
    if event.tag is not None:
        raise Unreadable(line, f"{shown(event.tag)}: tags are not read; leave it out")
    return line


_YAML_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_YAML_NUMBER = re.compile(r"[-+]?(\d{1,400}(\.\d{0,400})?|\.\d{1,400})([eE][-+]?\d{1,4})?")


def _yaml_scalar(text: str) -> Any:
    """A plain scalar by the rules of YAML 1.2: `no`, `12:30` and `2024-01-01` are texts."""
    if text.lower() in _YAML_WORDS:
        return _YAML_WORDS[text.lower()]
    if not text.isascii() or not _YAML_NUMBER.fullmatch(text):
        return text
    return int(text) if text.lstrip("+-").isdigit() else float(text)
