"""Finished chunks of one video as latents: the log from which it can be taken up again.

A chunk's record is written after its segment and is what commits it: what has a segment and no record is made
anew. Records are a few hundred kilobytes where the cache is gigabytes, so there is one for every chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vidkv.errors import OutputError, StateError
from vidkv.files import reason, write_durably
from vidkv.rollout import Rollout
from vidkv.stream import ChunkRecord

_FILE = re.compile(r"([0-9]{6,})-([0-9]+)\.safetensors")


@dataclass(frozen=True)
class Head:
    """What a record says beside its latents.

    Attributes:
        frames: pixel frames of the video up to and including this chunk.
        digest: SHA-256 over the latents of all chunks up to this one, each over the one before.
        segment: SHA-256 of the chunk's segment.
        first_look: what the first chunk looked like, see `drift`.
    """

    frames: int
    digest: str
    segment: str
    first_look: dict[str, float]


class Records:
    """The records of one video.

    Args:
        folder: where they lie; made by the first `add`.
        fence: of the claim under which new ones are written.
    """

    def __init__(self, folder: Path, fence: int = 0) -> None:
        self.folder, self.fence = folder, fence
        self._files: dict[int, tuple[int, Path]] = {}
        if folder.is_dir():
            for name in os.listdir(folder):
                if match := _FILE.fullmatch(name):
                    index, writer = int(match[1]), int(match[2])
                    self._files[index] = max(self._files.get(index, (-1, folder)), (writer, folder / name))

    @property
    def chunks(self) -> int:
        """One more than the last chunk that has a record."""
        return max(self._files, default=-1) + 1

    def paths(self, chunks: Iterable[int]) -> list[Path]:
        """The files of these chunks, of those that have one."""
        return [self._files[chunk][1] for chunk in chunks if chunk in self._files]

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._files

    def add(self, chunk: int, latents: Tensor, rollout: Rollout, head: Head) -> None:
        """Commit a chunk that the rollout has just finished.

        Args:
            latents: (b, f, c, h, w).

        Raises:
            OutputError: it cannot be written.
        """
        noise, source = rollout.noise.state()
        header = {
            "chunk": chunk,
            "noise": source,
            "prefix": [rollout.prefix_chunks, rollout.prefix_frames],
            "frames": head.frames,
            "digest": head.digest,
            "segment": head.segment,
            "first_look": head.first_look,
        }
        tensors = {"latents": latents.cpu().contiguous()} | {f"noise.{k}": t.cpu() for k, t in noise.items()}
        path = self.folder / f"{chunk:06d}-{self.fence}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            header["sha256"] = _checksum(header, save(tensors))
            write_durably(path, save(tensors, {"vidkv": json.dumps(header)}))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {path}: {reason(error)}; make room, then resume") from error
        self._files[chunk] = (self.fence, path)

    def read(self, chunk: int) -> ChunkRecord | None:
        """A chunk's record, or None if there is none.

        Raises:
            StateError: it is damaged.
        """
        if chunk not in self._files:
            return None
        tensors, header = self._load(chunk)
        noise = {name.removeprefix("noise."): t for name, t in tensors.items() if name.startswith("noise.")}
        return ChunkRecord(tensors["latents"], (noise, header["noise"]), tuple(header["prefix"]))

    def head(self, chunk: int) -> Head:
        """What a record says beside its latents.

        Raises:
            StateError: it is missing or damaged.
        """
        _, header = self._load(chunk)
        return Head(header["frames"], header["digest"], header["segment"], header["first_look"])

    def drop_from(self, chunk: int) -> None:
        """Delete this chunk's record and all later ones."""
        self._delete([i for i in self._files if i >= chunk])

    def keep(self, chunks: Collection[int], since: int) -> None:
        """Delete records of earlier chunks than `since`, but for these."""
        self._delete([i for i in self._files if i < since and i not in chunks])

    def _delete(self, chunks: Collection[int]) -> None:
        """Drop these chunks' records, those of lower fences too: they must not come to light again."""
        try:
            names = os.listdir(self.folder) if chunks else []
            for match in filter(None, map(_FILE.fullmatch, names)):
                newest = self._files.get(int(match[1]), (0, self.folder))[0]
                if int(match[1]) in chunks and int(match[2]) <= max(newest, self.fence):
                    (self.folder / match.string).unlink(missing_ok=True)
            for chunk in chunks:
                self._files.pop(chunk, None)
        except OSError as error:
            raise OutputError(
                f"cannot delete records of {self.folder}: {reason(error)}; check its rights"
            ) from error

    def _load(self, chunk: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if chunk not in self._files:
            raise StateError(f"{self.folder} has no record of chunk {chunk}")
        path = self._files[chunk][1]
        try:
            data = path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = dict(json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["vidkv"]))
            if header.pop("sha256") != _checksum(header, data) or header["chunk"] != chunk:
                raise ValueError("its checksum is wrong")
            return load(data), header
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"the record {path} is damaged ({error}); delete it") from None


def _checksum(header: Mapping[str, Any], data: bytes) -> str:
    """SHA-256 over a header and the tensors of a safetensors file with their names, shapes and dtypes."""
    length = int.from_bytes(data[:8], "little")
    tensors = dict(json.loads(data[8 : 8 + length]))
    tensors.pop("__metadata__", None)
    described = json.dumps([header, tensors], sort_keys=True)
    return hashlib.sha256(described.encode() + data[8 + length :]).hexdigest()


def digest(before: str, latents: Tensor) -> str:
    """SHA-256 of a chunk's latents over that of the chunks before it."""
    data = latents.float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(before.encode() + data).hexdigest()
