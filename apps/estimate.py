"""What a rollout needs and what fits which card: `vidkv estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vidkv.cache import CacheSpec
from vidkv.errors import InputError, ResourceError
from vidkv.memory import (
    OFFLOADS,
    MemoryPlan,
    MemorySettings,
    card_bytes,
    check_fits,
    gigabytes,
    own_guidance,
    pixel_size,
)
from vidkv.models.families.base import ModelEntry
from vidkv.models.weights import check_precision
from vidkv.room import USABLE, usable_bytes

if TYPE_CHECKING:
    from rich.console import Group

CARDS_GB = (24.0, 80.0, 141.0)
PARTS = (
    ("transformer", "weights_bytes"),
    ("text encoder", "text_bytes"),
    ("VAE and its streaming caches", "vae_bytes"),
    ("KV cache", "kv_bytes"),
    ("KV cache of the negative prompt", "negative_kv_bytes"),
    ("cross-attention context", "context_bytes"),
    ("intermediates, encode", "text_activation_bytes"),
    ("intermediates, denoise", "activation_bytes"),
    ("intermediates, decode", "decode_activation_bytes"),
)
PHASES = {"encode": "encode the prompts", "rollout": "denoise a chunk", "decode": "decode a chunk"}


def estimate_report(
    entry: ModelEntry,
    spec: CacheSpec,
    device: str,
    dtype: torch.dtype,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    weights: str = "full",
    text_weights: str | None = None,
    offload: str = "text",
    cards: Sequence[float] = (),
) -> dict[str, Any]:
    """The JSON object of `vidkv estimate --json`.

    Args:
        device: `cpu` or `cuda`; the machine's own memory is judged if it has one.
        weights, text_weights: precisions, of the text encoder as of the transformer by default.
        offload: a name of `OFFLOADS`.
        cards: decimal GB to judge beside it.

    Returns:
        The bytes of `MemoryPlan.as_dict`, `model`, `cache`, `settings`, `verdicts` (a list of where, bytes
        there are, whether it fits, and the reason and remedies where not) and `largest_windows` (by page
        format and card, in latent frames, null where none fits).
    """
    if offload not in OFFLOADS:
        raise InputError(f"offload={offload!r:.60}; choose {', '.join(OFFLOADS)}")
    rows, columns = pixel_size(entry, height, width)
    precision, text_precision = check_precision(weights), check_precision(text_weights or weights)
    settings = MemorySettings(
        entry, spec, rows, columns, batch, dtype, precision, text_precision, OFFLOADS[offload],
        own_guidance(entry),
    )  # fmt: skip
    plan = settings.plan()
    there = {f"a card of {gb:g} GB": card_bytes(gb) for gb in cards}
    if device == "cpu" or torch.cuda.is_available():
        free = usable_bytes(device)
        if free is not None:
            there = {device: free} | there
    return plan.as_dict() | {
        "model": entry.name,
        "cache": str(spec),
        "settings": {
            "height": rows,
            "width": columns,
            "batch": batch,
            "dtype": str(dtype).removeprefix("torch."),
            "weights": settings.weights,
            "text_weights": settings.text_weights,
            "offload": offload,
            "guidance": settings.guidance,
        },
        "verdicts": [_verdict(plan, name, free) for name, free in there.items()],
        "usable_share_of_a_card": USABLE,
        "largest_windows": _largest_windows(settings, device, sorted({*CARDS_GB, *cards})),
    }


def _verdict(plan: MemoryPlan, where: str, available: int) -> dict[str, Any]:
    reason = None
    try:
        check_fits(plan, available, where)
    except ResourceError as error:
        reason = str(error)
    return {"where": where, "available_bytes": available, "fits": reason is None, "reason": reason}


def _largest_windows(
    settings: MemorySettings, device: str, cards: Sequence[float]
) -> dict[str, dict[str, int | None]]:
    formats = ("fp32", "bf16", "int8") if device == "cpu" else ("bf16", "int8")
    return {
        name: {f"{gb:g}": _in_format(settings, name).largest_window(card_bytes(gb)) for gb in cards}
        for name in formats
    }


def _in_format(settings: MemorySettings, name: str) -> MemorySettings:
    return replace(settings, spec=settings.spec.model_copy(update={"format": name}))


def render(report: dict[str, Any]) -> Group:
    """Tables for people."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    chosen = report["settings"]
    parts = Table(show_header=False)
    parts.add_column("part", min_width=32)
    parts.add_column("size", justify="right")
    for label, name in PARTS:
        if report[name]:
            parts.add_row(label, gigabytes(report[name]))
    parts.add_section()
    for phase, label in PHASES.items():
        parts.add_row(f"on the device to {label}", gigabytes(report[f"{phase}_bytes"]))
    parts.add_row("peak", gigabytes(report["peak_bytes"]), style="bold")
    if report["host_bytes"]:
        parts.add_row("waiting on the host", gigabytes(report["host_bytes"]))
    for where in ("host", "disk"):
        if report[f"kv_{where}_bytes"]:
            parts.add_row(f"pages on the {where}", gigabytes(report[f"kv_{where}_bytes"]))
    verdicts = [
        Text(f"fits on {v['where']}, where {gigabytes(v['available_bytes'])} can be used")
        if v["fits"]
        else Text(f"does not fit on {v['where']}: {v['reason']}", style="bold")
        for v in report["verdicts"]
    ]
    heading = Text(
        f"\nLargest window in latent frames with --offload {chosen['offload']} "
        f"--weights {chosen['weights']}, using {USABLE:.0%} of the card"
    )
    windows = Table()
    windows.add_column("pages")
    table = report["largest_windows"]
    for gb in next(iter(table.values())):
        windows.add_column(f"{gb} GB", justify="right")
    for name, by_card in table.items():
        cells = ("none" if value is None else f"{value:,}" for value in by_card.values())
        windows.add_row(name, *cells)
    return Group(Text(_title(report)), parts, *verdicts, heading, windows)


def _title(report: dict[str, Any]) -> str:
    chosen = report["settings"]
    videos = f", {chosen['batch']} videos at once" if chosen["batch"] > 1 else ""
    guided = ", guided" if chosen["guidance"] != 1 else ""
    return (
        f"{report['model']}, {chosen['width']}x{chosen['height']}, {chosen['dtype']}{videos}{guided}, "
        f"cache {report['cache']}"
    )
