"""Cache and decoder of an unfinished video on disk, from which it goes on bit for bit.

Pages never change, so a checkpoint writes those that are new since the last one and names the files of the
others. Beside them it holds what does change: the decoder's memory, the window's latents, the noise source.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidkv.errors import CacheStateError, OutputError, StateError
from vidkv.files import file_sha256, reason, write_json
from vidkv.rollout import CACHES, Rollout
from vidkv.state import Tensors, check_description, describe, read_tensors, write_tensors

KEPT = 2
"""Checkpoints that are kept: if the newest turns out to be damaged, there is the one before."""

_COMMIT = re.compile(r"checkpoint-([0-9]{6,})-([0-9]+)\.json")
_OWN = re.compile(r"\.?(?:checkpoint|state|pages)-[0-9]{6,}-([0-9]+)\.(?:json|safetensors)(?:\.[0-9]+\.tmp)?")
"""Whatever lies here that a checkpoint wrote, finished or not."""


@dataclass(frozen=True)
class Interval:
    """How often to write a checkpoint.

    Attributes:
        every_s: at most so often.
        bytes_per_s: and no more than so many bytes a second on average.
        share: nor more than this share of the time.
    """

    every_s: float = 30.0
    bytes_per_s: float = 100e6
    share: float = 0.05


class Checkpoints:
    """The checkpoints of one video.

    Args:
        folder: where they lie; made by the first `save`.
        fence: of the claim under which new ones are written.
    """

    def __init__(self, folder: Path, fence: int = 0, interval: Interval | None = None) -> None:
        self.folder, self.fence, self.interval = folder, fence, interval or Interval()
        self._stored: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        # commits known to be whole, newest last, and the files that each needs
        self._whole: dict[str, set[str]] = {}
        self._last = time.monotonic()
        self._wait = self.interval.every_s

    def consider(self, rollout: Rollout) -> bool:
        """Write a checkpoint if it is time for one; returns whether it did.

        Raises:
            OutputError: it cannot be written; the ones before it stay.
        """
        if rollout.in_transition or time.monotonic() - self._last < self._wait:
            return False
        begun = time.monotonic()
        written = self.save(rollout)
        self._last = time.monotonic()
        limits = self.interval
        self._wait = max(limits.every_s, written / limits.bytes_per_s, (self._last - begun) / limits.share)
        return True

    def save(self, rollout: Rollout) -> int:
        """Write a checkpoint of a rollout between two chunks, and drop those that are no longer needed.

        Returns:
            Bytes written.

        Raises:
            OutputError: it cannot be written; the ones before it stay.
        """
        name = f"{rollout.chunk:06d}-{self.fence}"
        # the second one at the same chunk replaces that file
        self._stored = {p: file for p, file in self._stored.items() if file != f"pages-{name}.safetensors"}
        pages, fresh, tensors = self._pages(rollout)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            written = 0
            if fresh:
                written += self._write(f"pages-{name}.safetensors", tensors, {})
                self._stored |= dict.fromkeys(fresh, f"pages-{name}.safetensors")
            tensors, header = rollout.state(pages=False)
            state = f"state-{name}.safetensors"
            written += self._write(state, tensors, describe(rollout, header))
            self._stored = {page: self._stored[page] for page in pages}
            files = {state, *self._stored.values()}
            self._digests = {file: digest for file, digest in self._digests.items() if file in files}
            commit = {"state": state, "pages": self._stored, "sha256": self._digests}
            write_json(self.folder / f"checkpoint-{name}.json", commit)
            self._note(f"checkpoint-{name}.json")
            self._prune()
        except OSError as error:
            raise OutputError(
                f"cannot write a checkpoint to {self.folder}: {reason(error)}; make room, then resume"
            ) from error
        return written

    def _pages(self, rollout: Rollout) -> tuple[Collection[str], Collection[str], Tensors]:
        """Names of resident pages, of those among them that are not stored yet, and what these hold."""
        while True:
            pages = rollout.pages()
            fresh = {page: place for page, place in pages.items() if page not in self._stored}
            try:
                tensors = {
                    f"{page}.{key}": tensor
                    for page, (cache, frame) in fresh.items()
                    for key, tensor in cache.page(frame).items()
                }
            except CacheStateError:
                # a page on disk that cannot be read back is not resident any more
                if len(rollout.pages()) == len(pages):
                    raise
                continue
            return pages, fresh, tensors

    def load(self, restore: Callable[[Tensors, Mapping[str, Any]], None], rollout: Rollout, most: int) -> int:
        """Restore the newest checkpoint that is whole.

        Args:
            restore: takes tensors and header of `Rollout.state`.
            rollout: what it restores into.
            most: leave out later ones than of this chunk.

        Returns:
            The chunk that it stands before; 0 if there was none.
        """
        self._stored, self._digests, self._whole = {}, {}, {}
        for chunk, path in self._commits():
            if chunk > most:
                continue
            try:
                commit = json.loads(path.read_text())
                if not {commit["state"], *commit["pages"].values()} <= set(commit["sha256"]):
                    raise StateError(f"{path.name} is damaged")
                for file, wanted in commit["sha256"].items():
                    if file_sha256(self.folder / file) != wanted:
                        raise StateError(f"{file} is damaged")
                tensors, header = read_tensors(self.folder / commit["state"])
                state = check_description(rollout, header)
                if state["chunk"] != chunk:
                    raise StateError(f"{path.name} is damaged")
                restore(self._with_pages(tensors, state, commit["pages"]), state)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, StateError):
                continue
            self._stored, self._digests = commit["pages"], commit["sha256"]
            self._note(path.name)
            return chunk
        return 0

    def newest_files(self, most: int) -> list[Path]:
        """All files of the newest checkpoint of at most this chunk, itself last; none if there is none.

        Raises:
            FileNotFoundError: it has just been dropped.
        """
        for chunk, path in self._commits():
            if chunk <= most:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    commit = json.loads(path.read_text())
                    return [*(self.folder / name for name in commit["sha256"]), path]
        return []

    def oldest(self) -> int:
        """The chunk of the oldest checkpoint that is kept; 0 if there is none."""
        return min((chunk for chunk, _ in self._commits()), default=0)

    def _commits(self) -> list[tuple[int, Path]]:
        """(chunk, file), newest first."""
        if not self.folder.is_dir():
            return []
        found = [(m, m.string) for name in os.listdir(self.folder) if (m := _COMMIT.fullmatch(name))]
        ranked = sorted(((int(m[1]), int(m[2])), name) for m, name in found)
        return [(chunk, self.folder / name) for (chunk, _), name in reversed(ranked)]

    def _write(self, name: str, tensors: Tensors, header: dict[str, Any]) -> int:
        path = self.folder / name
        write_tensors(path, tensors, header)
        self._digests[name] = file_sha256(path)
        return path.stat().st_size

    def _with_pages(self, tensors: Tensors, state: Mapping[str, Any], files: Mapping[str, str]) -> Tensors:
        """The state's tensors with the pages of other files in their places."""
        read = {file: read_tensors(self.folder / file)[0] for file in set(files.values())}
        for name in CACHES:
            if name not in state:
                continue
            places: dict[str, list[str]] = {}
            for (_, pool), serial in zip(state[name]["resident"], state[name]["serials"], strict=True):
                places.setdefault(pool, []).append(f"{name}.{serial}")
            for pool, pages in places.items():
                for key in [k for k in tensors if k.startswith(f"{name}.{pool}.")]:
                    buffer = key.removeprefix(f"{name}.{pool}.")
                    parts = [read[files[page]][f"{page}.{buffer}"] for page in pages]
                    tensors[key] = torch.cat([tensors[key], *(_column(part) for part in parts)], 1)
        return tensors

    def _note(self, commit: str) -> None:
        """This commit, of the files of `_digests`, is the newest that is whole."""
        self._whole[commit] = {commit, *self._digests}

    def _prune(self) -> None:
        """Delete what neither of the last whole checkpoints needs, but nothing of a later holder's."""
        self._whole = dict(list(self._whole.items())[-KEPT:])
        needed = set[str]().union(*self._whole.values())
        for name in os.listdir(self.folder):
            own = _OWN.fullmatch(name)
            if own and int(own[1]) <= self.fence and name not in needed:
                (self.folder / name).unlink(missing_ok=True)


def _column(page: Tensor) -> Tensor:
    """(layers, …) as (layers, 1, …)."""
    return page.unsqueeze(1)
