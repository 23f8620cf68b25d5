"""Which prompt holds when."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from vidkv.errors import PromptError

if TYPE_CHECKING:
    from vidkv.models.wan import CausalWanTransformer3DModel, TextContext

Switch = Literal["keep", "recache", "flush", "lerp"]
"""What becomes of the history when the prompt changes, see `Rollout.switch`."""

TimedPrompt = tuple[float, str] | tuple[float, str, Switch | None]
PromptLike = str | Sequence[TimedPrompt]


@dataclass(frozen=True)
class PromptSchedule:
    """Prompts over time.

    A switch takes effect with the first chunk that begins at or after its second.

    Attributes:
        entries: (second, prompt), ascending, the first at 0.
        switches: for each of them what becomes of the history, None for the video's own way; empty where
            none has one of its own.
    """

    entries: tuple[tuple[float, str], ...]
    switches: tuple[Switch | None, ...] = ()

    @classmethod
    def of(cls, prompt: PromptLike, canonical: Callable[[str], str] = str) -> PromptSchedule:
        """Read a prompt or a list of (second, prompt) or (second, prompt, switch).

        Args:
            canonical: checks and respells one prompt.

        Raises:
            PromptError: no prompt, a bad second, an unknown switch, or what `canonical` raises.
        """
        try:
            given = [(0.0, prompt)] if isinstance(prompt, str) else [tuple(entry) for entry in prompt]
            padded = [(*entry, None) if len(entry) == 2 else entry for entry in given]
            readable = all(
                isinstance(second, Real) and isinstance(text, str) for second, text, _ in cast(Any, padded)
            )
        except (TypeError, ValueError):
            readable = False
        if not readable:
            raise PromptError(f"prompt {prompt!r:.80}: give a text or a list of (second, text)")
        timed = cast(list[tuple[float, str, Switch | None]], padded)
        if not timed:
            raise PromptError("the prompt schedule is empty; give at least one prompt")
        for second, _, switch in timed:
            if not math.isfinite(second) or second < 0:
                raise PromptError(f"prompt at second {second}: seconds must be finite and not negative")
            if switch is not None and switch not in get_args(Switch):
                known = ", ".join(get_args(Switch))
                raise PromptError(f"prompt at second {second}: switch={switch!r:.60}; choose {known}")
        timed.sort(key=lambda entry: entry[0])
        repeated = next((a[0] for a, b in pairwise(timed) if a[0] == b[0]), None)
        if repeated is not None:
            raise PromptError(f"two prompts at second {repeated:g}; give each a second of its own")
        if timed[0][0] > 0:
            raise PromptError(f"the first prompt starts at second {timed[0][0]:g}; one must start at 0")
        switches = tuple(switch for _, _, switch in timed)
        return cls(
            tuple((float(second), canonical(text)) for second, text, _ in timed),
            switches if any(switches) else (),
        )

    @property
    def timed(self) -> list[TimedPrompt]:
        """What `of` takes: entries with their switches."""
        if not self.switches:
            return list(self.entries)
        return [(*entry, switch) for entry, switch in zip(self.entries, self.switches, strict=True)]

    def at(self, second: float) -> str:
        """The prompt of a chunk that begins at `second`."""
        return self.entries[self._index(second)][1]

    def switch_at(self, second: float) -> Switch | None:
        """How the prompt of that chunk took over, if it says so."""
        return self.switches[self._index(second)] if self.switches else None

    def steered(
        self, second: float, prompt: str, switch: Switch | None = None, canonical: Callable[[str], str] = str
    ) -> PromptSchedule:
        """With another prompt from a second on, until the next one that is later; one at that second goes.

        Raises:
            PromptError: what `of` raises.
        """
        others = [entry for entry in self.timed if entry[0] != second]
        return PromptSchedule.of([*others, (second, canonical(prompt), switch)])

    def _index(self, second: float) -> int:
        return sum(start <= second + 1e-9 for start, _ in self.entries) - 1


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
