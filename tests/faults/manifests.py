"""Random manifests, most of them damaged: what the suite tries a few of and a soak many."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidkv.errors import InputError
from vidkv.manifest import Entry, parse_manifest
from vidkv.request import VideoRequest

MAX_MESSAGE = 4_000
KINDS = ("jsonl", "json", "csv", "yaml")
_PICTURE = "start.png"
_FIELDS = list(VideoRequest.model_fields)
_TEXTS = [
    "", " ", "a", "-", "#", "null", "true", "nan", "-inf", "1e999", "0x10", "1_0", "12:30", "9" * 30, "..",
    "../a.mp4", "/etc/passwd", "a\0b", "a\nb", "\r", "\x1b[2J", "\u202eabc", "\u05e9\u05dc", "\U0001f98a",
    "\ud800", "e\u0301", "{}", "[]", '[[1, "a"]]', "[" * 99, "5: a; 10: b", "5 a", ";;;", "int8,window=21",
    "int9", "window=", '{"window": 1, "window": 2}', "http://a/b.png", "file:///etc/passwd", "CON.mp4",
    "a.mp4", "A.MP4", "a/b.mp4", "&a", "*a", "!!python/object:os.system x", "'", '"', ",", "a,b", "\ufeff",
    "\x85", "keep", "stock", _PICTURE,
]  # fmt: skip
_NUMBERS = [
    0,
    1,
    -1,
    3,
    2.5,
    1e300,
    -0.0,
    2**63,
    2**64,
    10**400,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
]


def fuzz_manifests(count: int, seed: int, folder: Path) -> int:
    """Parse random manifests; anything but entries or a readable `InputError` is raised.

    Args:
        folder: where a picture lies that the manifests may name; it is made if need be.

    Returns:
        how many were refused.
    """
    draw = random.Random(seed)
    (folder / _PICTURE).write_bytes(b"picture")
    refused = 0
    for _ in range(count):
        kind = draw.choice(KINDS)
        data = _manifest(draw, kind)
        try:
            check_accepted(parse_manifest(data, kind, f"jobs.{kind}", folder))
        except InputError as error:
            check_refusal(error, f"jobs.{kind}")
            refused += 1
        except Exception as error:
            error.add_note(f"manifest of kind {kind}: {data[:2_000]!r}")
            raise
    return refused


def check_accepted(entries: list[Entry]) -> None:
    """What came through is usable: at least one video, in order, with names of their own."""
    assert entries
    lines = [entry.line for entry in entries]
    assert lines == sorted(lines) and lines[0] >= 1
    files = [entry.request.out or f"{entry.request.id}.mp4" for entry in entries if entry.request.id]
    assert len(set(map(str.casefold, files))) == len(files)
    for entry in entries:
        json.dumps(entry.request.model_dump(mode="json"), allow_nan=False).encode()
        assert all(path is None or path.is_file() for path in (entry.request.image, entry.request.video))


def check_refusal(error: InputError, name: str) -> None:
    """A message that a terminal can show: short, printable, every line with its file."""
    message = str(error)
    assert 0 < len(message) < MAX_MESSAGE
    lines = message.split("\n")
    assert len(lines) <= 21
    for number, line in enumerate(lines, 1):
        assert line.isprintable()
        last = number == len(lines) > 1 and line.startswith("and ") and line.endswith(" more")
        assert last or line.startswith((f"{name}:", f"{name}: ")), line
    message.encode()


def _manifest(draw: random.Random, kind: str) -> bytes:
    rows = [_row(draw, number) for number in range(draw.choice((1, 1, 2, 3)))]
    text = _WRITERS[kind](rows, draw)
    data = text.encode("utf-8", "surrogatepass")
    for _ in range(draw.choice((0, 0, 0, 0, 1, 3))):
        data = _damaged(data, draw)
    return data


def _row(draw: random.Random, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"v{number}", "prompt": "a red circle bouncing", "seconds": 4, "seed": 7}
    for name, value in (
        ("schedule", [[2, "a blue square"]]), ("cache", "int8,window=21"), ("out", f"a/{number}.mp4"),
        ("image", _PICTURE), ("cache", {"window": 21, "sink": 3}), ("schedule", "2: a blue square"),
    ):  # fmt: skip
        if draw.random() < 0.2:
            row[name] = value
    for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
        name = draw.choice(_FIELDS) if draw.random() < 0.9 else draw.choice(_TEXTS)
        action = draw.random()
        if action < 0.1:
            row.pop(name, None)
        elif action < 0.2:
            row[name.upper()] = row.pop(name, 1)
        else:
            row[name] = _value(draw, 0)
    return row


def _value(draw: random.Random, depth: int) -> Any:
    kind = draw.random()
    if kind < 0.5 or depth > 3:
        text = draw.choice(_TEXTS)
        return text * draw.choice((1, 1, 1, 2, 300)) if draw.random() < 0.999 else "x" * 2**20
    if kind < 0.8:
        return draw.choice(_NUMBERS)
    if kind < 0.9:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    names = ["second", "prompt", "format", "window", "sink", "policy", "keep_sinks", *_TEXTS[:12]]
    return {draw.choice(names): _value(draw, depth + 1) for _ in range(draw.randrange(4))}


def _jsonl(rows: list[dict[str, Any]], draw: random.Random) -> str:
    ascii_only = draw.random() < 0.5
    return draw.choice(("\n", "\r\n", "\n\n# x\n")).join(
        json.dumps(row, ensure_ascii=ascii_only) for row in rows
    )


def _json(rows: list[dict[str, Any]], draw: random.Random) -> str:
    if draw.random() < 0.2:
        return _jsonl(rows, draw)
    return json.dumps(rows if draw.random() < 0.8 else rows[0], indent=draw.choice((None, 1)))


def _csv(rows: list[dict[str, Any]], draw: random.Random) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(
        file, delimiter=draw.choice(",,;\t"), escapechar="\\", lineterminator=draw.choice(("\n", "\r\n"))
    )
    writer.writerow(header)
    for row in rows:
        cells = [row.get(name) for name in header]
        writer.writerow(json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in cells)
    return file.getvalue()


def _yaml(rows: list[dict[str, Any]], draw: random.Random) -> str:
    def value(item: Any) -> str:
        text = json.dumps(item)
        return text[1:-1] if isinstance(item, str) and draw.random() < 0.3 else text

    jobs = ["- " + "\n  ".join(f"{name}: {value(row[name])}" for name in row) for row in rows]
    if draw.random() < 0.3:
        return "defaults: {seed: 3, seconds: 2}\njobs:\n" + "\n".join(jobs)
    return "\n".join(jobs)


_WRITERS: dict[str, Callable[[list[dict[str, Any]], random.Random], str]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "yaml": _yaml,
}
_SPLICES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b'"', b"'", b"{", b"}", b"[", b"]",
    b",", b":", b"#", b"&a ", b"*a", b"!!set ", b"---\n", b"? ", b"- ", b"|\n", b"%YAML 9.9\n", b"\t",
    b"NaN", b"-Infinity", b"9" * 500, b"[" * 2_000, b'{"a":' * 1_500, b"- " * 500, b"\\u0000", b"\\ud800",
    b"<<: {}\n",
]  # fmt: skip


def _damaged(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    action = draw.randrange(6)
    if action == 0:
        return data[:at]
    if action == 1:
        return data[:at] + data[at + draw.randrange(1, 9) :]
    if action == 2:
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    if action == 3:
        return data[:at] + data[draw.randrange(at + 1) : at] + data[at:]
    return data[:at] + draw.choice(_SPLICES) + data[at:]
