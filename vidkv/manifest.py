"""Manifests: the videos of a batch, one `VideoRequest` each, from a JSONL, JSON, CSV or YAML file."""

from __future__ import annotations

import os
import stat
import sys
import unicodedata
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from vidkv.cache.formats import FORMATS
from vidkv.cache.policies import POLICIES
from vidkv.errors import InputError
from vidkv.manifest_files import MAX_BYTES, Item, Unreadable, read_items
from vidkv.request import VideoRequest, faults, printable, shown

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".yaml": "yaml",
    ".yml": "yaml",
}
MAX_VIDEOS = 100_000
_SHOWN_FAULTS = 20
_SHOWN_CHARACTERS = 3_000
# a file of another kind altogether is faulty on every line
_MOST_FAULTS = 1_000


@dataclass(frozen=True)
class Entry:
    """One video of a manifest, and the line on which it begins."""

    request: VideoRequest
    line: int


def read_manifest(path: Path) -> list[Entry]:
    """Read and check a manifest; `-` is JSONL on standard input.

    Relative `image` and `video` paths start from the manifest's folder and are absolute in the result.

    Raises:
        InputError: everything wrong, a line each, with file, line, field, value and remedy.
    """
    if str(path) == "-":
        data = sys.stdin.buffer.read(MAX_BYTES["jsonl"] + 1)
        return parse_manifest(data, "jsonl", "standard input", Path.cwd())
    name = printable(str(path), 200)
    if reason := _unreadable(path):
        raise InputError(f"{name}: {reason}; give the path of a manifest, or - for standard input")
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{name}: suffix {shown(path.suffix)} is not known; use {', '.join(KINDS)}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES[kind] + 1)
    except OSError as error:
        raise InputError(f"{name}: {_reason(error)}; give the path of a manifest") from None
    return parse_manifest(data, kind, name, path.absolute().parent)


def parse_manifest(data: bytes, kind: str, name: str, folder: Path) -> list[Entry]:
    """Check the bytes of a manifest.

    Args:
        kind: a value of `KINDS`.
        name: of the file, for messages.
        folder: where relative `image` and `video` paths start.

    Raises:
        InputError: as `read_manifest`.
    """
    checks = _Checks(name, folder)
    entries: list[Entry] = []
    try:
        for item in read_items(data, kind):
            if len(entries) == MAX_VIDEOS:
                raise Unreadable(item.line, f"it holds more than {MAX_VIDEOS:,} videos; split it")
            if entry := checks.entry(item):
                entries.append(entry)
    except Unreadable as fault:
        checks.add(*fault.args)
    if not entries and not checks.faults:
        checks.add(None, "it holds no videos; write one mapping of fields for each")
    if checks.faults:
        raise checks.error()
    return entries


def manifest_schema() -> dict[str, Any]:
    """JSON Schema of one line of a JSONL manifest."""
    schema = VideoRequest.model_json_schema()
    settings = schema["$defs"]["CacheSpec"]["properties"]
    for setting in settings.values():
        # what is not named stays the model's default, not the class's
        setting.pop("default", None)
    settings["format"]["enum"], settings["policy"]["enum"] = list(FORMATS), list(POLICIES)
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            schema["properties"][name] = _nullable(field)
    about = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One line of a vidkv manifest",
        "description": "One video. null is the same as leaving a field out.",
    }
    return about | {key: value for key, value in schema.items() if key not in about}


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    about = {key: value for key, value in field.items() if key in ("title", "description", "default")}
    kinds = field.get("anyOf") or [{key: value for key, value in field.items() if key not in about}]
    null = {"type": "null"}
    return about | {"anyOf": kinds if null in kinds else [*kinds, null]}


class _Checks:
    """Turns items into entries, and collects what is wrong with them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.faults: dict[tuple[int | None, str], None] = {}
        self._added = 0
        self._taken: dict[tuple[str, str], int] = {}

    def add(self, line: int | None, text: str) -> None:
        """Note a fault; the same one (of a YAML default) only once."""
        self.faults[line, printable(text, 400)] = None
        self._added += 1
        if self._added > _MOST_FAULTS:
            raise self.error()

    def error(self) -> InputError:
        """One line per fault, as many as are read at a sitting."""
        lines: list[str] = []
        for line, text in sorted(self.faults, key=lambda fault: fault[0] or 0):
            lines.append(f"{self.name}:{line}: {text}" if line else f"{self.name}: {text}")
            if len(lines) == _SHOWN_FAULTS or sum(map(len, lines)) > _SHOWN_CHARACTERS:
                break
        more = len(self.faults) - len(lines)
        if more:
            lines.append(f"and {'at least ' * (self._added > _MOST_FAULTS)}{more} more")
        return InputError("\n".join(lines))

    def entry(self, item: Item) -> Entry | None:
        """The checked item, or None where something is wrong with it."""
        values = item.values
        if item.fault is not None or not isinstance(values, dict):
            self.add(
                item.line, item.fault or f'{shown(values)}: give a mapping such as {{"prompt": "a circle"}}'
            )
            return None
        known = VideoRequest.model_fields
        values = {name: value for name, value in values.items() if value is not None or name not in known}
        found = [*self._duplicates(item, values)]
        try:
            request = VideoRequest.model_validate(values)
        except ValidationError as error:
            found += islice(faults(error, VideoRequest), _MOST_FAULTS + 1)
        else:
            paths = {
                name: path for name in ("image", "video") if (path := getattr(request, name)) is not None
            }
            files = {name: self.folder / path for name, path in paths.items()}
            for name, file in files.items():
                if reason := _unreadable(file):
                    remedy = "paths are relative to the manifest's folder"
                    found.append((name, f"{name}={shown(str(paths[name]))}: {reason}; {remedy}"))
            request = request.model_copy(update=files) if files else request
        for name, text in found:
            self.add(item.lines.get(name, item.line), text)
        return None if found else Entry(request, item.line)

    def _duplicates(self, item: Item, values: dict[str, Any]) -> list[tuple[str, str]]:
        """(field, fault) where a video further up has the id or the file, be it faulty or not."""
        own, out = values.get("id"), values.get("out")
        if out is None and isinstance(own, str):
            out = f"{own}.mp4"
        for field, name in (("id", own), ("out", out)):
            if isinstance(name, str):
                # file systems differ in which names are the same
                key = field, unicodedata.normalize("NFC", PurePosixPath(name).as_posix()).casefold()
                if key in self._taken:
                    line = self._taken[key]
                    return [
                        (
                            field,
                            f"{field}={shown(name)}: line {line} has it (case does not count); give another",
                        )
                    ]
                self._taken[key] = item.line
        return []


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be read, or None."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "it is not a regular file"
    except (OSError, ValueError) as error:
        return _reason(error)
    return None if os.access(path, os.R_OK) else "it may not be read"


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return f"{text[:1].lower()}{text[1:]}"
