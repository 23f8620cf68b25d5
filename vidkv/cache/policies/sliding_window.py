"""Keep the newest frames."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from vidkv.cache.policies.base import Policy


class SlidingWindow(Policy):
    """Drops the oldest frames (Self-Forcing's rolling cache)."""

    def evict(
        self,
        frames: Sequence[int],
        capacity: int,
        held: Collection[int],
        scores: Mapping[int, float] | None = None,
    ) -> set[int]:
        return set(frames[: max(0, len(frames) - capacity)])
