"""Which latent frames are resident and where they stand in time: integers only, no tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vidkv.cache.policies import POLICIES
from vidkv.cache.spec import CacheSpec
from vidkv.cache.tiers import newest_frames
from vidkv.errors import CacheStateError


@dataclass(frozen=True)
class OpenChunk:
    """The chunk being denoised and what it reads.

    Attributes:
        start, frames: first latent frame and number of latent frames of the chunk.
        history: resident frames that it reads, in position order.
        positions: their temporal positions, ascending.
        first_position: position of the chunk's first frame; the others follow.
    """

    start: int
    frames: int
    history: tuple[int, ...]
    positions: tuple[int, ...]
    first_position: int


class Layout:
    """Resident frames of one rollout and how they change from chunk to chunk.

    `begin` opens a chunk without changing anything; `abandon` forgets it; `commit` makes its frames
    resident and lets the policy choose who leaves, so that between chunks at most
    `spec.capacity(chunk_frames)` frames are resident. The first frames committed while there are fewer than
    `spec.sink` sinks become sinks.

    Attributes:
        resident, sinks: frames, ascending.
        mass: of resident frames, their share of the last chunk's attention where the policy goes by it.
        scores: likewise, what the policy makes of the shares of all chunks.
        readable: most of them that a chunk reads.
    """

    def __init__(self, spec: CacheSpec, chunk_frames: int) -> None:
        self.spec, self.chunk_frames = spec, chunk_frames
        self.capacity = spec.capacity(chunk_frames)
        self.policy = POLICIES[spec.policy]()
        self.readable = spec.attended - chunk_frames
        self.scores: dict[int, float] = {}
        self.mass: dict[int, float] = {}
        self.resident: tuple[int, ...] = ()
        self.sinks: tuple[int, ...] = ()
        self.next_frame = 0
        self.opened: OpenChunk | None = None

    def begin(
        self, frames: int, at_once: bool = False, relevance: Mapping[int, float] | None = None
    ) -> OpenChunk:
        """Open the next chunk of `frames` latent frames.

        Args:
            at_once: more than `chunk_frames` may be given, to build the cache anew from clean latents.
            relevance: by resident frame, for a cache that reads a selection of them.
        """
        if self.opened is not None:
            raise CacheStateError(f"chunk at latent frame {self.opened.start} is still open")
        most = max(self.chunk_frames, self.spec.window) if at_once else self.chunk_frames
        if not 1 <= frames <= most:
            raise CacheStateError(f"a chunk of {frames} latent frames; this cache takes 1 to {most}")
        history = self.selected(relevance or {})
        if self.spec.positions == "relative":
            positions, first = tuple(range(len(history))), len(history)
        else:
            positions, first = history, self.next_frame
        self.opened = OpenChunk(self.next_frame, frames, history, positions, first)
        return self.opened

    def selected(self, relevance: Mapping[int, float]) -> tuple[int, ...]:
        """What the next chunk reads: sinks, the newest, and of the others the most relevant, the newer of
        equal ones."""
        if len(self.resident) <= self.readable:
            return self.resident
        others = [frame for frame in self.resident if frame not in self.sinks]
        room = self.readable - len(self.sinks)
        newest = others[len(others) - (room + 1) // 2 :]
        older = others[: len(others) - len(newest)]
        older.sort(key=lambda frame: (relevance.get(frame, 0.0), frame), reverse=True)
        return tuple(sorted({*self.sinks, *newest, *older[: room - len(newest)]}))

    def abandon(self) -> None:
        """Forget the open chunk; nothing has changed."""
        self.opened = None

    def after_commit(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Frames that will be resident once the open chunk is committed, oldest first, and the sinks."""
        if self.opened is None:
            raise CacheStateError("no chunk is open")
        new = tuple(range(self.opened.start, self.opened.start + self.opened.frames))
        candidates = self.resident + new
        sinks = self.sinks + new[: max(0, self.spec.sink - len(self.sinks))]
        newest = min(newest_frames(self.spec, self.chunk_frames), self.capacity - len(sinks))
        held = {*sinks, *candidates[len(candidates) - newest :]}
        leaving = self.policy.evict(candidates, self.capacity, held, self.scores)
        return tuple(frame for frame in candidates if frame not in leaving), sinks

    def commit(self, mass: Mapping[int, float] | None = None) -> None:
        """Make the open chunk resident.

        Args:
            mass: by frame that it read, its share of the chunk's attention; counts from the next commit on.
        """
        kept, sinks = self.after_commit()
        assert self.opened is not None
        self.next_frame = self.opened.start + self.opened.frames
        self.resident, self.sinks, self.opened = kept, sinks, None
        for frame, share in (mass or {}).items():
            self.scores[frame] = self.policy.observe(self.scores.get(frame, 0.0), share)
        self.mass = {frame: share for frame, share in (mass or {}).items() if frame in kept}
        self.scores = {frame: score for frame, score in self.scores.items() if frame in kept}

    def forget(self, frames: Collection[int]) -> None:
        """These are resident no longer, sinks among them neither."""
        self.resident = tuple(frame for frame in self.resident if frame not in frames)
        self.sinks = tuple(frame for frame in self.sinks if frame not in frames)
        self.scores = {frame: score for frame, score in self.scores.items() if frame not in frames}

    def seek(self, frame: int) -> None:
        """The next chunk begins at this latent frame, which lies behind all that are resident."""
        if self.resident and frame <= self.resident[-1]:
            raise CacheStateError(f"frame {frame} does not lie behind {self.resident}")
        self.next_frame = frame

    def copy(self) -> Layout:
        """An independent layout in the same state."""
        other = Layout(self.spec, self.chunk_frames)
        other.resident, other.sinks, other.next_frame = self.resident, self.sinks, self.next_frame
        other.scores, other.mass = dict(self.scores), dict(self.mass)
        return other
