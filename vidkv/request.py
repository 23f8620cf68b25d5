"""What a user can ask for: one model for the command line, manifests, Python and HTTP."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
)

from vidkv.cache import CacheSpec
from vidkv.errors import InputError
from vidkv.prompts import PromptSchedule, Switch
from vidkv.prompts import TimedPrompt as TimedPrompts

ID_PATTERN = r"[A-Za-z0-9._-]{1,80}"
MAX_PROMPT_CHARACTERS = 10_000
MAX_SCHEDULE = 1_000
MAX_PATH_BYTES = 4_096


_ENTRY = {"second", "prompt", "switch"}


def _timed_prompts(value: Any) -> Any:
    """`5: a red circle; 10: a blue one`, or the same as JSON, or a list of {second, prompt, switch}."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            return _timed_prompts(read_json(text))
        return [_timed_prompt(part) for part in text.split(";") if part.strip()]
    if isinstance(value, list | tuple):
        return [
            tuple(entry[name] for name in ("second", "prompt", "switch") if name in entry)
            if isinstance(entry, Mapping) and {"second", "prompt"} <= set(entry) <= _ENTRY
            else entry
            for entry in value[: MAX_SCHEDULE + 1]
        ]
    return value


def _timed_prompt(text: str) -> tuple[str, str]:
    second, colon, prompt = text.partition(":")
    if not colon:
        raise ValueError(f"{shown(text.strip())} is not SECOND: PROMPT, such as '12.5: a blue circle'")
    return second.strip(), prompt.strip()


def _cache_changes(value: Any) -> Any:
    """The one-line form, or a mapping of settings; what is not named stays the model's default."""
    if value is None:
        return {}
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("{"):
            return _cache_changes(read_json(text))
        spec = CacheSpec.parse(text)
        return {name: getattr(spec, name) for name in spec.model_fields_set}
    if isinstance(value, Mapping):
        for name, setting in value.items():
            known = isinstance(name, str) and isinstance(setting, str | bool | float | int)
            if not known or (isinstance(setting, int) and abs(setting) >= 2**63):
                raise ValueError(f"setting {shown(name)}={shown(setting)}: give a text or a number")
        spec = CacheSpec.of(value)
        return {name: getattr(spec, name) for name in spec.model_fields_set}
    raise ValueError("give a text such as 'int8,window=21,sink=3', or a mapping of settings")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give a number")
    return value


def _described(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL character; leave it out")
    if not text.strip():
        raise ValueError("the prompt is empty; describe the video in a sentence")
    return text


Second = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_described)]
TIMED, SWITCHED = "timed", "switched"
TimedPrompt = Annotated[
    Annotated[tuple[Second, Prompt], Tag(TIMED)]
    | Annotated[tuple[Second, Prompt, Switch | None], Tag(SWITCHED)],
    Discriminator(lambda entry: SWITCHED if isinstance(entry, list | tuple) and len(entry) > 2 else TIMED),
]


class ScheduledPrompt(BaseModel):
    """One prompt of a schedule, with names."""

    model_config = ConfigDict(extra="forbid")

    second: Second
    prompt: Prompt
    switch: Switch | None = None


Schedule = Annotated[
    tuple[TimedPrompt, ...],
    Field(max_length=MAX_SCHEDULE),
    BeforeValidator(
        _timed_prompts,
        json_schema_input_type=str
        | Annotated[list[TimedPrompt | ScheduledPrompt], Field(max_length=MAX_SCHEDULE)],
    ),
]
CacheChanges = Annotated[
    dict[str, Any], BeforeValidator(_cache_changes, json_schema_input_type=str | CacheSpec | None)
]


class VideoRequest(BaseModel):
    """One video. What each field means is in its description, which the JSON Schema carries too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None = Field(
        default=None,
        pattern=f"^{ID_PATTERN}$",
        description="Names the video; by default the beginning of the job key.",
    )
    prompt: Prompt = Field(description="What to show from the start.")
    schedule: Schedule = Field(
        default=(),
        description="Prompts that take over later, as [second, prompt] or [second, prompt, switch]; "
        "or a text: '5: a red circle; 10: a blue one'.",
    )
    seed: int = Field(default=0, ge=0, lt=2**64, description="Same seed, same video.")
    seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="Length of the video.")
    model: str = Field(
        default="bounce", min_length=1, max_length=4_096, description="A known model's name, or a folder."
    )
    width: int | None = Field(
        default=None, ge=1, le=2**16, description="Pixels; by default the model's own width."
    )
    height: int | None = Field(
        default=None, ge=1, le=2**16, description="Pixels; by default the model's own height."
    )
    cache: CacheChanges = Field(
        default_factory=dict,
        description="Cache settings that differ from the model's; or a text: 'int8,window=21,sink=3'.",
    )
    image: Path | None = Field(default=None, description="A picture to start from.")
    video: Path | None = Field(default=None, description="A video whose end to go on from.")
    out: str | None = Field(
        default=None,
        max_length=240,
        description="The file to write, below the output folder, ending in .mp4; by default ID.mp4.",
    )
    steps: int | None = Field(
        default=None, ge=1, le=1_000, description="Denoising steps instead of the model's own."
    )
    guidance: float | None = Field(
        default=None, allow_inf_nan=False, description="Scale of classifier-free guidance."
    )
    negative: str | None = Field(
        default=None, max_length=MAX_PROMPT_CHARACTERS, description="What guidance leads away from."
    )
    switch: Switch | None = Field(
        default=None, description="What becomes of the history when the prompt changes."
    )
    noise: Literal["counter", "stock"] = Field(
        default="counter", description="Where noise comes from; 'stock' repeats the stock code's draws."
    )

    @field_validator("seed", "seconds", "width", "height", "steps", "guidance", mode="before")
    @classmethod
    def _no_truth(cls, value: Any) -> Any:
        return _number(value)

    @field_validator("id")
    @classmethod
    def _no_dots_alone(cls, value: str | None) -> str | None:
        if value is not None and not value.strip("."):
            raise ValueError("an id of dots alone names a folder, not a video")
        return value

    @field_validator("out")
    @classmethod
    def _below(cls, value: str | None) -> str | None:
        return value if value is None else below(value)

    @field_validator("negative", "model")
    @classmethod
    def _no_nul(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("it holds a NUL character; leave it out")
        return value

    @field_validator("image", "video")
    @classmethod
    def _local_file(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        text = str(value)
        if "\0" in text or "://" in text or ":/" in text:
            raise ValueError("give the path of a local file; addresses are not fetched")
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            raise ValueError("its name is not valid UTF-8; rename the file") from None
        if text == "." or len(encoded) > MAX_PATH_BYTES:
            raise ValueError(f"give the path of a file, of at most {MAX_PATH_BYTES} bytes")
        return value

    @property
    def prompts(self) -> tuple[TimedPrompts, ...]:
        """(second, prompt) or (second, prompt, switch), the first at 0."""
        return ((0.0, self.prompt), *self.schedule)

    def steered(self, entries: Iterable[tuple[float, str, Switch | None]]) -> VideoRequest:
        """The request that would have given what steering has made of it, see `PromptSchedule.steered`."""
        schedule = PromptSchedule.of(self.prompts)
        for entry in entries:
            schedule = schedule.steered(*entry)
        return self.scheduled(schedule.timed)

    def scheduled(self, timed: Sequence[TimedPrompts]) -> VideoRequest:
        """With other prompts: (second, prompt) or (second, prompt, switch), the first at 0."""
        return self.model_copy(update={"prompt": timed[0][1], "schedule": tuple(timed[1:])})

    def lasting(self, seconds: float, last: float) -> VideoRequest:
        """Of another length, without prompts that would never be shown.

        Args:
            last: where its last chunk begins.
        """
        shown = [entry for entry in self.prompts if entry[0] <= last + 1e-9]
        return self.scheduled(shown).model_copy(update={"seconds": seconds})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> VideoRequest:
        """Validate a mapping.

        Raises:
            InputError: naming the first field that cannot be used, its value and what would do.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(first_fault(error, cls)) from None


class EngineSettings(BaseModel):
    """How videos are made on this machine, the same for all of a run.

    Attributes:
        device: `cpu`, `cuda`, or `auto`.
        weights, text_weights: `full`, `fp8` or `int8` storage of linear layers.
        offload: what leaves the GPU when it is not needed: none, text, model or group.
        loras: (file, scale) to load, in order.
        vae: a file with another decoder.
        tile: rows and columns of latents that are decoded at a time.
        compiled: let torch.compile fuse what stands around attention.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "auto"
    weights: str = "full"
    text_weights: str | None = None
    offload: str = "text"
    loras: tuple[tuple[Path, float], ...] = ()
    vae: Path | None = None
    tile: tuple[int, int] | None = None
    compiled: bool = False


def below(text: str) -> str:
    """A path that stays below the folder it is relative to, ending in `.mp4`.

    Raises:
        ValueError: it is absolute, climbs, is hidden, or is not a plain name.
    """
    path = PurePosixPath(text)
    plain = text.isprintable() and "\\" not in text and ":" not in text
    if not plain or path.is_absolute() or not path.parts or any(p.startswith(".") for p in path.parts):
        raise ValueError("give a path below the output folder, without '..', ':' or a leading dot")
    if path.suffix.lower() != ".mp4":
        raise ValueError("it must end in .mp4")
    if path.name.casefold().endswith(".partial.mp4"):
        raise ValueError("names ending in .partial.mp4 are kept for videos that were stopped")
    # another video's file may have that name
    if any(part.lower().endswith(".mp4") for part in path.parts[:-1]):
        raise ValueError("only the file may end in .mp4, not a folder that it is in")
    if any(len(part.encode(errors="replace")) > 200 for part in path.parts):
        raise ValueError("a part of it is longer than 200 bytes")
    return path.as_posix()


def first_fault(error: ValidationError, model: type[BaseModel]) -> str:
    """One line about the first thing wrong: field, value, remedy."""
    return next(faults(error, model))[1]


def faults(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(field, one line with field, value and remedy) of everything wrong."""
    return (_fault(dict(fault), model) for fault in error.errors(include_url=False))


_REASONS = {
    "string_pattern_mismatch": "use 1 to 80 letters, digits, '.', '_' and '-'",
    "string_unicode": "it holds half of a character (a lone surrogate); write the whole one",
    "int_parsing_size": "the number is too large",
    "path_type": "give the path of a file",
}


def _fault(fault: dict[str, Any], model: type[BaseModel]) -> tuple[str, str]:
    kind = fault["type"]
    place = [str(part) for part in fault["loc"] if part not in (TIMED, SWITCHED)] or ["request"]
    field, name, value = place[0], ".".join(map(_named, place)), shown(fault["input"])
    if kind in ("extra_forbidden", "invalid_key"):
        return field, f"{name}={value} is not known; {nearest_field(field, model)}"
    if field == "schedule" and (kind == "tuple_type" or (len(place) > 1 and kind in ("missing", "too_long"))):
        reason = f"give {'a list of ' * (len(place) == 1)}[second, prompt], such as [5, 'a blue circle']"
    elif kind == "missing":
        return field, f"{name} is missing; it is required"
    elif "error" in fault.get("ctx", {}):
        reason = str(fault["ctx"]["error"])
    else:
        reason = _REASONS.get(kind, fault["msg"])
        quotes = kind == "string_type" and isinstance(fault["input"], int | float)
        reason = f"{reason[:1].lower()}{reason[1:]}{'; write it in quotes' if quotes else ''}"
    return field, f"{name}={value}: {printable(reason, 400)}"


_JOINTS = str.maketrans("", "", "-_")


def _named(part: str) -> str:
    return part if len(part) <= 40 and part.isascii() and part.translate(_JOINTS).isalnum() else shown(part)


def nearest_field(name: str, model: type[BaseModel]) -> str:
    """What a name that is no field of the model may stand for, or which fields there are."""
    known = list(model.model_fields)
    close = difflib.get_close_matches(name[:40].lower(), known, 1)
    return f"did you mean {close[0]}?" if close else f"fields are {', '.join(known)}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel, _short.maxlist, _short.maxdict = 3, 4, 4


def shown(value: object) -> str:
    """A value as Python would write it, at most 80 characters, none of which moves a cursor."""
    try:
        return printable(_short.repr(value), 80)
    except ValueError:
        return "a number of thousands of digits"


def printable(text: str, limit: int) -> str:
    """On one line and in at most `limit` characters: control characters and the like as escapes."""
    # one more, to see that there is more
    part = text[: limit + 1]
    if not part.isprintable():
        part = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in part)
    return part if len(part) <= limit else f"{part[: limit - 3]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{printable(twice, 40)} is given twice; keep one")
    return values


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON; give a finite number")


def _short_integer(text: str) -> int:
    if len(text) > 400:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


STRICT_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_short_integer
)


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: what cannot be read, a name that is given twice, NaN; in one line.
    """
    try:
        return STRICT_JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(json_fault(error)) from None


def json_fault(error: ValueError | RecursionError) -> str:
    """One line about why `STRICT_JSON` refused a text."""
    if isinstance(error, RecursionError):
        return "lists or mappings are nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    near = shown(error.doc[error.pos : error.pos + 20]) if error.pos < len(error.doc) else "the end"
    reason = error.msg.removesuffix(" at")
    return f"{reason[:1].lower()}{reason[1:]} at column {error.colno}, near {near}"
