"""What an eviction policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence


class Policy(ABC):
    """Chooses which latent frames leave the cache when a chunk is committed."""

    @abstractmethod
    def evict(self, frames: Sequence[int], capacity: int, sinks: Collection[int]) -> set[int]:
        """Frames that leave.

        Args:
            frames: resident frames and those about to be committed, ascending.
            capacity: how many may stay.
            sinks: those of them that are kept for good.

        Returns:
            Exactly max(0, len(frames) - capacity) of `frames`; empty when all fit.
        """
