"""Keep the newest frames."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vidkv.cache.policies.base import Policy


class SlidingWindow(Policy):
    """Drops the oldest frames (Self-Forcing's rolling cache)."""

    def evict(self, frames: Sequence[int], capacity: int, sinks: Collection[int]) -> set[int]:
        return set(frames[: max(0, len(frames) - capacity)])
