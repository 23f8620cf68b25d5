"""Options that several commands share, and how they speak."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vidkv.errors import InputError, PromptError

OK, FAILED, UNUSABLE, SIGNALLED = 0, 1, 2, 128

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Model = Annotated[str, typer.Option(help="A shipped model's name, or a folder.")]
Window = Annotated[int | None, typer.Option(help="Latent frames attended, sinks and current chunk included.")]
Sink = Annotated[int | None, typer.Option(help="First latent frames, kept for good.")]
KvFormat = Annotated[str | None, typer.Option(help="Page format: fp32, bf16 or int8.")]
Cache = Annotated[str | None, typer.Option(help="Further cache settings, e.g. 'int8,keep_newest,segment=3'.")]
Height = Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Weights = Annotated[str, typer.Option(help="Storage of the networks' linear layers: full, fp8 or int8.")]
TextWeights = Annotated[
    str | None, typer.Option(help="The same for the text encoder, by default as --weights.")
]
Offload = Annotated[
    str, typer.Option(help="What leaves the GPU when it is not needed: none, text, model or group.")
]
Lora = Annotated[list[str] | None, typer.Option(help="FILE or FILE:SCALE, safetensors; repeatable.")]
Vae = Annotated[Path | None, typer.Option(help="Another decoder, such as TAEHV or LightVAE: safetensors.")]
Tile = Annotated[str | None, typer.Option(help="ROWSxCOLUMNS of latents decoded at a time, for small cards.")]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Fuse what stands around attention; seconds at the start.")
]


def timed_prompt(text: str) -> tuple[float, str]:
    """SECOND:TEXT."""
    second, colon, prompt = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(second), prompt.strip()
    except ValueError:
        raise PromptError(
            f"--prompt-at {text[:60]!r} is not SECOND:TEXT, such as '12.5:a blue circle bouncing'"
        ) from None


def scaled(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE."""
    file, colon, scale = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon:
            return Path(file), float(scale)
    return Path(text), 1.0


def tile_size(text: str | None) -> tuple[int, int] | None:
    """ROWSxCOLUMNS."""
    if text is None:
        return None
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise InputError(f"--tile {text[:60]!r} is not ROWSxCOLUMNS, such as 32x32")
    return int(rows), int(columns)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """The result of a command, on stdout."""
    print(json.dumps(result, allow_nan=True) if as_json else text)


def say(message: str) -> None:
    """A message, on stderr."""
    print(f"vidkv: {message}", file=sys.stderr)
