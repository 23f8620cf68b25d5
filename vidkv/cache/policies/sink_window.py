"""Keep the first frames for good, and the newest of the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from vidkv.cache.policies.base import Policy


class SinkWindow(Policy):
    """Attention sinks plus a sliding window (StreamingLLM, arXiv 2309.17453; LongLive, 2509.22622)."""

    def evict(
        self,
        frames: Sequence[int],
        capacity: int,
        held: Collection[int],
        scores: Mapping[int, float] | None = None,
    ) -> set[int]:
        leaving = max(0, len(frames) - capacity)
        return set([frame for frame in frames if frame not in held][:leaving])
