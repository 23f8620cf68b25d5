"""Which prompt holds when."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidkv.errors import PromptError

if TYPE_CHECKING:
    from vidkv.models.wan import CausalWanTransformer3DModel, TextContext

PromptLike = str | Sequence[tuple[float, str]]


@dataclass(frozen=True)
class PromptSchedule:
    """Prompts over time.

    A switch takes effect with the first chunk that begins at or after its second.

    Attributes:
        entries: (second, prompt), ascending, the first at 0.
    """

    entries: tuple[tuple[float, str], ...]

    @classmethod
    def of(cls, prompt: PromptLike, canonical: Callable[[str], str] = str) -> PromptSchedule:
        """Read a prompt or a list of (second, prompt).

        Args:
            canonical: checks and respells one prompt.

        Raises:
            PromptError: no prompt, a bad second, or what `canonical` raises.
        """
        try:
            entries = [(0.0, prompt)] if isinstance(prompt, str) else [(s, text) for s, text in prompt]
            readable = all(isinstance(s, Real) and isinstance(text, str) for s, text in entries)
        except (TypeError, ValueError):
            readable = False
        if not readable:
            raise PromptError(f"prompt {prompt!r:.80}: give a text or a list of (second, text)")
        if not entries:
            raise PromptError("the prompt schedule is empty; give at least one prompt")
        for second, _ in entries:
            if not math.isfinite(second) or second < 0:
                raise PromptError(f"prompt at second {second}: seconds must be finite and not negative")
        entries.sort(key=lambda entry: entry[0])
        repeated = next((a[0] for a, b in pairwise(entries) if a[0] == b[0]), None)
        if repeated is not None:
            raise PromptError(f"two prompts at second {repeated:g}; give each a second of its own")
        if entries[0][0] > 0:
            raise PromptError(f"the first prompt starts at second {entries[0][0]:g}; one must start at 0")
        return cls(tuple((float(second), canonical(text)) for second, text in entries))

    def at(self, second: float) -> str:
        """The prompt of a chunk that begins at `second`."""
        return [text for start, text in self.entries if start <= second + 1e-9][-1]


class PromptTransition:
    """A prompt on its way to another.

    Args:
        before: embeddings (b, text tokens, text_dim) it comes from.
        after: where it goes.
        chunks: how many chunks it takes; `done` of them lie behind.
    """

    def __init__(self, before: Tensor, after: TextContext, chunks: int, done: int) -> None:
        self.before, self.after, self.chunks, self.done = before, after, chunks, done

    def text(self, transformer: CausalWanTransformer3DModel) -> TextContext:
        """What the next chunk reads."""
        assert self.after.embeds is not None
        share = min(1.0, (self.done + 1) / self.chunks)
        embeds = torch.lerp(self.before.to(self.after.embeds), self.after.embeds, share)
        return transformer.encode_text(embeds, self.after.mask)

    def advance(self) -> bool:
        """Another chunk is done; was it the last?"""
        self.done += 1
        return self.done >= self.chunks

    def copy(self) -> PromptTransition:
        return PromptTransition(self.before, self.after, self.chunks, self.done)
