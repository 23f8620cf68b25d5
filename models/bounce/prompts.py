"""The small language of the embedded world.

prompt  := objects scene [", the" COLOUR SHAPE "turns" COLOUR]
objects := object ("," object)* ["and" object]             one to four, each colour once
object  := ("a" | "an") COLOUR SHAPE
scene   := "bouncing" | "bouncing behind a bar" | "resting" | "while the camera pans"
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from vidkv.errors import PromptError

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("circle", "square", "triangle")
Family = Literal["bounce", "occluder", "still", "camera"]
FAMILIES: tuple[Family, ...] = get_args(Family)
SCENES: dict[Family, str] = {
    "bounce": "bouncing",
    "occluder": "bouncing behind a bar",
    "still": "resting",
    "camera": "while the camera pans",
}
SYNONYMS = {
    "an": "a",
    "ball": "circle",
    "disc": "circle",
    "box": "square",
    "moving": "bouncing",
    "floating": "bouncing",
    "bounce": "bouncing",
    "still": "resting",
    "violet": "purple",
    "becomes": "turns",
    "panning": "pans",
}
MAX_OBJECTS = 4
MAX_CHARACTERS = 400


@dataclass(frozen=True)
class World:
    """How much of the world a model has been trained on.

    Attributes:
        colours: those that objects may have; all in COLOURS.
        max_objects: most objects that a prompt may name.
        backgrounds: how many of the kinds in `world.BACKGROUNDS` occur, from the first.
        families: share of each kind of scene in the training mixture, in the order of FAMILIES.
        unnamed: landmarks that the camera finds and the prompt does not name.
    """

    colours: tuple[str, ...] = COLOURS
    max_objects: int = MAX_OBJECTS
    backgrounds: int = 6
    families: tuple[float, float, float, float] = (0.45, 0.20, 0.10, 0.25)
    unnamed: bool = True


WORLDS: dict[str, World] = {
    "wide": World(),
    "narrow": World(COLOURS[:4], 2, 3, (0.6, 0.15, 0.1, 0.15), unnamed=False),
}

GRAMMAR_WORDS = (
    "a", "and", "the", "turns", "bouncing", "behind", "bar", "resting", "while", "camera", "pans"
)  # fmt: skip
VOCABULARY: tuple[str, ...] = ("<pad>", "</s>", "<unk>", ",", *GRAMMAR_WORDS, *COLOURS, *SHAPES)

_OBJECT = rf"a (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
_SCENE = "|".join(re.escape(text) for text in sorted(SCENES.values(), key=len, reverse=True))
_EVENT = rf"(?: ,)? the ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) turns ({'|'.join(COLOURS)})"
_PROMPT = re.compile(rf"^({_OBJECT}(?: , {_OBJECT})*(?:(?: ,)? and {_OBJECT})?) ({_SCENE})(?:{_EVENT})?$")


@dataclass(frozen=True)
class ScenePrompt:
    """What a prompt says.

    Attributes:
        objects: (colour, shape) names in the order in which the prompt gives them.
        family: the kind of scene.
        event: (colour, shape, new colour) of "the … turns …", or None.
    """

    objects: tuple[tuple[str, str], ...]
    family: Family
    event: tuple[str, str, str] | None = None

    def text(self) -> str:
        """The prompt in the one spelling that the model was trained on."""
        names = [f"a {colour} {shape}" for colour, shape in self.objects]
        joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        event = "" if self.event is None else ", the {} {} turns {}".format(*self.event)
        return f"{joined} {SCENES[self.family]}{event}"

    def after_event(self) -> ScenePrompt:
        """The plain description of the scene once the event has happened."""
        if self.event is None:
            return self
        colour, shape, new = self.event
        changed = tuple((new if item == (colour, shape) else item[0], item[1]) for item in self.objects)
        return ScenePrompt(changed, self.family)


def contrast(prompt: ScenePrompt, world: World) -> ScenePrompt:
    """The same kind of scene with as many objects, none of them in a colour or with a shape of its own.

    What classifier-free guidance leads away from: a model that was never trained without a prompt has no
    unconditional estimate, and against a wrong prompt of the same kind only what the right one asks for
    is left.
    """
    named = {colour for colour, _ in prompt.objects}
    free = [colour for colour in world.colours if colour not in named] or list(world.colours)
    objects = tuple(
        (free[i % len(free)], SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)])
        for i, (_, shape) in enumerate(prompt.objects)
    )
    return ScenePrompt(objects, prompt.family)


def words(text: str) -> list[str]:
    """Lower-cased words and commas of a prompt, synonyms replaced."""
    found = re.findall(r"[^\W_]+(?:[-'][^\W_]+)*|,|[^\w\s.,;!]", text.lower())
    return [SYNONYMS.get(word, word) for word in found]


def parse(text: str, world: World = WORLDS["wide"]) -> ScenePrompt:
    """Read a prompt of the embedded world.

    Args:
        world: what the model at hand knows.

    Raises:
        PromptError: empty or too long, a word outside the vocabulary (all known words are listed),
            or known words in an order the grammar does not have.
    """
    if not text.strip():
        raise PromptError(f'the prompt is empty; try "{EXAMPLES[0]}"')
    if len(text) > MAX_CHARACTERS:
        raise PromptError(
            f"the prompt has {len(text):,} characters; the embedded world reads at most {MAX_CHARACTERS}"
        )
    found = words(text)
    known = {",", *GRAMMAR_WORDS, *SHAPES, *world.colours}
    unknown = sorted({word for word in found if word not in known})
    if unknown:
        shown = ", ".join(repr(word[:30]) for word in unknown[:5])
        raise PromptError(
            f"unknown word{'s' if len(unknown) > 1 else ''} {shown}; the embedded world knows: "
            f"{' '.join(world.colours)} | {' '.join(SHAPES)} | {' '.join(GRAMMAR_WORDS)}"
        )
    match = _PROMPT.match(" ".join(found))
    if match is None:
        raise PromptError(
            f"cannot read {text.strip()!r}; say one to {world.max_objects} objects and what they do, such as "
            + ", ".join(f'"{example}"' for example in EXAMPLES)
        )
    names, scene, *event = match.groups()
    objects = tuple(
        (colour, shape) for colour, shape in re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", names)
    )
    prompt = ScenePrompt(
        objects=objects,
        family=next(family for family, words_ in SCENES.items() if words_ == scene),
        event=(event[0], event[1], event[2]) if event[0] else None,
    )
    _check(prompt, world)
    return prompt


def _check(prompt: ScenePrompt, world: World) -> None:
    colours = [colour for colour, _ in prompt.objects]
    if len(prompt.objects) > world.max_objects:
        raise PromptError(f"{len(prompt.objects)} objects; this model draws at most {world.max_objects}")
    repeated = next((colour for colour in colours if colours.count(colour) > 1), None)
    if repeated:
        raise PromptError(f"two {repeated} objects; give every object a colour of its own")
    if prompt.event is None:
        return
    colour, shape, new = prompt.event
    if (colour, shape) not in prompt.objects:
        raise PromptError(f"the {colour} {shape} that turns {new} is not among the objects of the prompt")
    if new == colour:
        raise PromptError(f"the {colour} {shape} is {new} already; name another colour")
    if new in colours:
        raise PromptError(f"the {colour} {shape} cannot turn {new}: another object is {new} already")


EXAMPLES = (
    "a red circle and a blue square bouncing",
    "a green triangle bouncing behind a bar",
    "a yellow square and a green circle while the camera pans",
    "a red circle bouncing, the red circle turns blue",
)
