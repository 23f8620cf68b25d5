"""What the form of the page means: presets in plain words, and the request that its fields stand for."""

from __future__ import annotations

import html
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from vidkv.apps.models_table import models_report
from vidkv.cache import CacheSpec
from vidkv.cache.formats import FORMATS
from vidkv.memory import gigabytes, plan_memory
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import MODELS
from vidkv.planning import cache_spec, compute_dtype

OWN_SIZE = ""
CUSTOM = "Custom"
LENGTHS: dict[str, float | None] = {
    "5 s": 5.0, "10 s": 10.0, "30 s": 30.0, "1 min": 60.0, "5 min": 300.0, "Until I stop it": None,
}  # fmt: skip
OTHER, ENDLESS = "Other", "Until I stop it"
WORDS = {
    "Balanced": "Pages in eight bits, the model's own window. A good start.",
    "Long memory": "Twice the window in eight bits: objects out of view are remembered for longer.",
    "Smallest": "Every page in four bits, the model's own window: little memory, and long queues.",
    "Exact": "No quantization: every page as the model wrote it.",
    CUSTOM: "What is set under Advanced.",
}
"""Presets, and what they are good for."""
CACHE_FIELDS = (
    "format", "window", "sink", "policy", "positions", "keep_newest", "keep_sinks", "newer", "value_scale",
)  # fmt: skip
"""Cache settings with fields of their own; `more` has the others in one line."""
FIELDS = (
    "prompt", "schedule", "model", "size", "length", "seconds", "seed", "preset", *CACHE_FIELDS, "more",
    "steps", "guidance", "negative", "switch", "noise",
)  # fmt: skip
"""Of the form, in the order in which its events hand them over."""


def presets(entry: ModelEntry, device: str) -> dict[str, CacheSpec]:
    """What the plain words stand for, with one model on one device.

    Four bits for every page keep identity and recall in the embedded world, which a shorter window loses
    (`vidkv eval cache`).
    """
    exact = cache_spec(entry, {}, device)
    bare = {"format": "int4", "keep_sinks": False, "newer": ""}
    return {
        "Balanced": exact.model_copy(update={"format": "int8"}),
        "Long memory": exact.model_copy(update={"format": "int8", "window": 2 * exact.window}),
        "Smallest": exact.model_copy(update=bare),
        "Exact": exact,
    }


def preset_of(spec: CacheSpec, entry: ModelEntry, device: str) -> str:
    """The plain words for a cache, or `CUSTOM`."""
    return next((name for name, known in presets(entry, device).items() if known == spec), CUSTOM)


def values_of(form: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The body of POST /v1/videos that a filled form stands for; what is wrong with it the service says.

    Args:
        form: values by the names in `FIELDS`.

    Raises:
        CacheSpecError: a cache setting is given twice.
    """
    values: dict[str, Any] = {"prompt": form["prompt"] or "", "model": form["model"], "keep": True}
    if form["seed"] is not None:
        values["seed"] = _whole(form["seed"])
    if form["length"] == ENDLESS:
        values["until_stopped"] = True
    else:
        values["seconds"] = form["seconds"] if form["length"] == OTHER else LENGTHS[form["length"]]
    if schedule := _entries(form["schedule"]):
        values["schedule"] = schedule
    if form["size"]:
        values["size"] = str(form["size"]).strip().lower().replace("×", "x").replace(" ", "")
    entry = MODELS.get(form["model"])
    cache = {name: _whole(form[name]) for name in CACHE_FIELDS if form[name] is not None}
    cache |= further(form["more"])
    own: dict[str, Any] = {}
    if entry:
        # what a format brings with it is not what the model has
        plain = cache_spec(entry, {}, device)
        given = {"format": cache["format"]} if cache.get("format") in FORMATS else {}
        own = cache_spec(entry, given, device).model_dump() | {"format": plain.format}
    if changed := {name: value for name, value in cache.items() if own.get(name) != value}:
        values["cache"] = changed
    given = {
        "steps": form["steps"],
        "guidance": form["guidance"],
        "negative": (form["negative"] or "").strip(),
    }
    values |= {name: _whole(value) for name, value in given.items() if value not in (None, "", 0)}
    values |= {"switch": form["switch"]} if form["switch"] else {}
    values |= {"noise": form["noise"]} if form["noise"] == "stock" else {}
    return values


def further(text: str | None) -> dict[str, Any]:
    """Cache settings of the field for those that have none of their own.

    Raises:
        CacheSpecError: one is given twice.
    """
    return {name: _read(value) for name, value in CacheSpec.settings_in(text or "").items()}


def form_of(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The fields that a request came from, as far as it says; the inverse of `values_of`."""
    model = values.get("model", "bounce")
    entry = MODELS.get(model) or MODELS["bounce"]
    changes = values.get("cache") or {}
    if isinstance(changes, str):
        parsed = CacheSpec.parse(changes)
        changes = {name: getattr(parsed, name) for name in parsed.model_fields_set}
    spec = cache_spec(entry, dict(changes), device)
    seconds = values.get("seconds")
    length = next((name for name, known in LENGTHS.items() if known == seconds and known), OTHER)
    if values.get("until_stopped"):
        length = ENDLESS
    elif seconds is None:
        seconds, length = LENGTHS["10 s"], "10 s"
    size = values.get("size") or OWN_SIZE
    if not size and values.get("width") and values.get("height"):
        size = f"{values['width']}x{values['height']}"
    schedule = [
        list(entry) if not isinstance(entry, Mapping) else _named(entry)
        for entry in values.get("schedule") or ()
    ]
    return {
        "prompt": values.get("prompt", ""),
        "schedule": json.dumps([[part for part in entry if part is not None] for entry in schedule]),
        "model": entry.name,
        "size": OWN_SIZE if size == own_size(entry) else size,
        "length": length,
        "seconds": seconds or LENGTHS["10 s"],
        "seed": values.get("seed", 0),
        "preset": preset_of(spec, entry, device),
        **{name: getattr(spec, name) for name in CACHE_FIELDS},
        "more": _others(spec),
        "steps": values.get("steps") or 0,
        "guidance": values.get("guidance") or 0,
        "negative": values.get("negative") or "",
        "switch": values.get("switch") or "",
        "noise": values.get("noise", "counter"),
    }


def new_id(prompt: str) -> str:
    """A name that says what the video shows and is nobody else's."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    short = [word for word in words if word not in ("a", "an", "the", "and", "of", "with")] or words
    slug = "-".join(short)[:40].strip("-") or "video"
    return f"{slug}-{secrets.token_hex(3)}"


def own_size(entry: ModelEntry) -> str:
    return f"{entry.width}x{entry.height}"


def sizes(entry: ModelEntry) -> list[tuple[str, str]]:
    """(text, value) of sizes to choose from; any other may be typed."""
    own = [(f"{entry.width} × {entry.height}, the model's own", OWN_SIZE)]
    if entry.width != entry.height:
        own.append((f"{entry.height} × {entry.width}, upright", f"{entry.height}x{entry.width}"))
    return own


def size_text(count: int | None) -> str:
    """Bytes for people, in three digits."""
    if count is None:
        return "–"
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"


def model_choices() -> list[tuple[str, str]]:
    """(text, value) of all models, those that are here first."""
    rows = sorted(models_report(), key=lambda row: not row["here"])
    return [(f"{row['name']} – {'ready' if row['here'] else 'needs weights'}", row["name"]) for row in rows]


def model_help(name: str, device: str) -> str:
    """HTML: what a model makes, and what it needs before it can."""
    row = next((row for row in models_report() if row["name"] == name), None)
    entry = MODELS.get(name)
    if row is None or entry is None:
        return ""
    facts = f"{entry.width} × {entry.height} at {entry.fps} frames a second"
    if row["here"]:
        own = " It knows a world of coloured shapes; try an example above." if name == "bounce" else ""
        return f'<p class="vk-small">Ready. {facts}.{own}</p>'
    height, width = entry.height, entry.width
    dtype = compute_dtype(device)
    need = plan_memory(entry, cache_spec(entry, {}, device), height, width, dtype=dtype).peak_bytes
    if row["repository"] is None:
        return f'<p class="vk-small">There are no weights of {escaped(name)}: it is there to plan with.</p>'
    files = " ".join(row["files"])
    lines = [
        f"hf download {row['repository']} {files}",
        f"vidkv convert {row['files'][0].rsplit('/', 1)[-1]} --model {name}",
    ]
    code = escaped("\n".join(lines))
    return (
        f'<div class="vk-needs"><p><b>Not on this machine yet.</b> It makes {facts} and needs about '
        f"{gigabytes(need)} while it runs; licence: {escaped(str(row['licence']))}. On the machine "
        f'of the server, with its files downloaded once:</p><pre tabindex="0">{code}</pre></div>'
    )


def escaped(text: str) -> str:
    """A text inside HTML that Gradio takes for a template: no part of it is markup, or a name to fill in."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")


def _others(spec: CacheSpec) -> str:
    """Settings without a field of their own, in one line, as far as they are not the default."""
    others = {
        name: getattr(spec, name)
        for name, field in CacheSpec.model_fields.items()
        if name not in CACHE_FIELDS and getattr(spec, name) != field.default
    }
    return ",".join(
        name if value is True else f"{name}={str(value).lower()}" for name, value in others.items()
    )


def _read(value: Any) -> Any:
    """What a setting's text says: a number, a truth or a name."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _whole(value: Any) -> Any:
    """Numbers of a form are floats; 3.0 is meant as 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _entries(text: str | None) -> list[Any]:
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def _named(entry: Mapping[str, Any]) -> Sequence[Any]:
    return [entry["second"], entry["prompt"], entry.get("switch")]
