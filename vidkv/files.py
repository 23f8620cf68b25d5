"""Files that appear complete or not at all, and stay after the power fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_durably(path: Path, data: bytes) -> None:
    """Put `data` under a name; what stood there before stays until it is replaced as a whole.

    Raises:
        OSError: it cannot be written. What stood there before still does, unless only making the new name
            durable has failed.
    """
    # of its own: other threads, and processes of that number on other hosts, may write the same name
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().int}.tmp")
    try:
        temporary.write_bytes(data)
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object, likewise."""
    write_durably(path, json.dumps(value, indent=1).encode())


def publish(temporary: Path, final: Path) -> None:
    """Make a complete file appear under its name: content first, then name, both durable."""
    _fsync(temporary, os.O_RDONLY)
    os.replace(temporary, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    try:
        _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        # some network file systems cannot sync a folder; the rename itself has succeeded
        if error.errno != errno.EINVAL:
            raise


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """What went wrong, without the path that the message names already."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
