"""Known models by name: their architecture, how they are rolled out, and where their weights lie."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vidkv.errors import InputError, PromptError
from vidkv.models.families import (
    bounce,
    causal_forcing,
    krea,
    longlive,
    longlive2,
    magi,
    reward_forcing,
    self_forcing,
    wan21,
)
from vidkv.models.families.base import ModelEntry

if TYPE_CHECKING:
    from vidkv.models.bounce.prompts import World


FAMILIES = (
    bounce,
    wan21,
    self_forcing,
    longlive,
    causal_forcing,
    krea,
    longlive2,
    reward_forcing,
    magi,
)
MODELS: dict[str, ModelEntry] = {entry.name: entry for family in FAMILIES for entry in family.MODELS}


def known_model(name: str) -> ModelEntry:
    """The entry of a name.

    Raises:
        InputError: there is none.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r:.80}; known are {', '.join(MODELS)}")
    return MODELS[name]


def weights_folder(entry: ModelEntry) -> Path | None:
    """The folder of a model whose weights ship with the package; None for the others."""
    if entry.weights is None:
        return None
    return Path(next(iter(import_module(entry.weights).__path__))) / "weights"


def canonical_prompt(grammar: str | None) -> Callable[[str], str]:
    """How a model wants its prompts spelled; checks them on the way.

    Args:
        grammar: `bounce:WORLD` with a name of `bounce.prompts.WORLDS`, or None for free text.
    """
    if grammar is None:
        return _free_text
    from vidkv.models.bounce.prompts import parse

    world = _world(grammar)
    return lambda text: parse(text, world).text()


def contrast_prompt(grammar: str | None) -> Callable[[str], str]:
    """What guidance leads away from when the user names nothing: the empty prompt for free text."""
    if grammar is None:
        return lambda text: ""
    from vidkv.models.bounce.prompts import contrast, parse

    world = _world(grammar)
    return lambda text: contrast(parse(text, world), world).text()


def _world(grammar: str) -> World:
    from vidkv.models.bounce.prompts import WORLDS

    world = WORLDS.get(grammar.removeprefix("bounce:"))
    if world is None:
        known = ", ".join(f"bounce:{name}" for name in WORLDS)
        raise InputError(f"prompt_grammar={grammar!r} is unknown; there are {known}")
    return world


def _free_text(text: str) -> str:
    if not text.strip():
        raise PromptError("the prompt is empty; describe the video in a sentence")
    if len(text) > 10_000:
        raise PromptError(f"the prompt has {len(text):,} characters; use at most 10,000")
    return text
