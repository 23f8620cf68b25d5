"""What an eviction policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar


class Policy(ABC):
    """Chooses which latent frames leave the cache when a chunk is committed.

    Attributes:
        scored: it goes by attention mass, which the clean passes then measure.
    """

    scored: ClassVar[bool] = False

    @abstractmethod
    def evict(
        self,
        frames: Sequence[int],
        capacity: int,
        held: Collection[int],
        scores: Mapping[int, float] | None = None,
    ) -> set[int]:
        """Frames that leave.

        Args:
            frames: resident frames and those about to be committed, ascending.
            capacity: how many may stay.
            held: those of them that must stay: sinks, and the newest of a cache that changes their format
                with age.
            scores: what `observe` made of the clean passes so far.

        Returns:
            Exactly max(0, len(frames) - capacity) of `frames`; empty when all fit.
        """

    def observe(self, before: float, mass: float) -> float:
        """A frame's new score.

        Args:
            before: its score so far, from 0.
            mass: its share of the attention of the chunk that has just been committed, mean over layers,
                heads and queries.
        """
        return before
