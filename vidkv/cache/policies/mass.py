"""Keep the frames that are attended to most."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from vidkv.cache.policies.base import Policy


class HeavyHitter(Policy):
    """Those whose attention mass, summed over all chunks so far, is largest (H2O, arXiv 2306.14048).

    A frame that no chunk has read yet stays; of equal ones the oldest leaves.
    """

    scored = True

    def evict(
        self,
        frames: Sequence[int],
        capacity: int,
        held: Collection[int],
        scores: Mapping[int, float] | None = None,
    ) -> set[int]:
        known = scores or {}
        free = [frame for frame in frames if frame not in held]
        free.sort(key=lambda frame: (known.get(frame, math.inf), frame))
        return set(free[: max(0, len(frames) - capacity)])

    def observe(self, before: float, mass: float) -> float:
        return before + mass


class RecentMass(HeavyHitter):
    """Those that the last chunk attended to most (SnapKV, arXiv 2404.14469)."""

    def observe(self, before: float, mass: float) -> float:
        return mass
