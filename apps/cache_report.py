"""The report of `vidkv eval cache`: text, Markdown, JSON, and bytes against error as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vidkv.apps.cache_trials import PICTURE
from vidkv.apps.evaluate import MOVED_Z, worked
from vidkv.errors import InputError, OutputError

FACTORS = (3.5, 6.0)
"""A best cache is named at so many times fewer bytes than bf16."""
MEASURES = {"fewer_per_frame": "a frame", "fewer": "in all"}
Entry = Mapping[str, Any]

COLUMNS = (
    ("cache", "-"),
    ("bytes a frame (× fewer)", "predicted = resident, of a latent frame of one video over all layers"),
    ("bytes in all (× fewer)", "of one video, beside bf16 with the model's own window"),
    ("attention error", "relative L2, mean over layers"),
    ("worst layer", "the same of the layer with the largest"),
    ("one chunk, dB", "PSNR of one chunk's latents from the reference's history"),
    ("diverged", "median chunk of free runs; videos that never did"),
    ("identity Δ", "difference to the reference, mean over chunks [95 %]"),
    ("colour ΔE Δ", "likewise"),
    ("trajectory Δ, px", "likewise"),
    (
        "recalled",
        "objects that are right when they come back into view, with the true video as history; and "
        "the shortest absence in frames from which on that is surely less than the reference's",
    ),
    ("ms a chunk (ratio)", "denoising and clean pass of a batch; ratio to the reference's chunk"),
)
WORLD_COLUMNS = ("identity Δ", "colour ΔE Δ", "trajectory Δ, px", "recalled")
PICTURE_COLUMNS = ("luma Δ", "saturation Δ", "flicker Δ")


# --- what follows from the numbers ---


def conclusions(caches: Sequence[Entry]) -> dict[str, Any]:
    """What the entries of `evaluate_cache`, the reference first, say together.

    Returns:
        best: by least factor and measure of MEASURES (`3.5 fewer`), the cache with the smallest attention
            error among those with so many times fewer bytes whose identity is not worse than the
            reference's (the paired interval reaches 0); if all are worse, the one that loses least; None
            if no cache is as small.
        no_help: caches that another one beats in total bytes or attention error and equals or beats in the
            other, with that one.
        breaks: the first chunk at which identity is worse, by cache, where there is one.
        peaks_not_below_bf16: quantized caches with which a chunk takes as many bytes at its peak as with the
            reference's window in bf16, or more; None if that was not tried.
    """
    tried = caches[1:]
    plain = [c for c in caches if c["settings"] == caches[0]["settings"] | {"format": "bf16"}]
    quantized = [c for c in tried if c["lossy_pages_read"]]
    return {
        "best": {
            f"{factor:g} {measure}": _best([c for c in tried if c["bytes"][measure] >= factor])
            for factor in FACTORS
            for measure in MEASURES
        },
        "no_help": {c["spec"]: by for c in tried if (by := _beaten_by(c, tried))},
        "breaks": {c["spec"]: c["breaks_at_chunk"] for c in tried if c.get("breaks_at_chunk") is not None},
        "peaks_not_below_bf16": [c["spec"] for c in quantized if _peak(c) >= _peak(plain[0])]
        if plain
        else None,
    }


def _peak(cache: Entry) -> float:
    """Bytes of one video in a chunk at the most: allocated on a GPU, elsewhere alive."""
    return float(cache["bytes"]["allocated"] or cache["bytes"]["live"])


def _best(caches: Sequence[Entry]) -> dict[str, Any] | None:
    if not caches:
        return None
    kept = [cache for cache in caches if not _loses_identity(cache)]
    if kept:
        best = min(kept, key=_error)
        return {"spec": best["spec"], "keeps_identity": True if "difference" in best else None}
    return {"spec": max(caches, key=_identity)["spec"], "keeps_identity": False}


def _loses_identity(cache: Entry) -> bool:
    high = cache["difference"]["identity"]["ci95"][1] if "difference" in cache else None
    return high is not None and high < 0


def _identity(cache: Entry) -> float:
    return float(cache["difference"]["identity"]["value"])


def _error(cache: Entry) -> float:
    return float(cache["attention_error"]["value"])


def _beaten_by(cache: Entry, others: Sequence[Entry]) -> str | None:
    """The most exact cache that is no larger and no less exact, and either smaller or more exact."""
    own = cache["bytes"]["resident"], _error(cache)
    better = [c for c in others if _dominates((c["bytes"]["resident"], _error(c)), own)]
    return str(min(better, key=_error)["spec"]) if better else None


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


# --- words ---


def table(report: Mapping[str, Any]) -> str:
    """The leaderboard and the verdicts as text for a terminal."""
    rows = _rows(report)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_headline(report)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), *_verdicts(report), *_control_lines(report)])


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report; the picture is taken to lie beside it."""
    head, *rows = _rows(report)
    explained = dict(COLUMNS)
    world = any("difference" in cache for cache in report["caches"])
    parts = [
        "# Caches compared",
        _headline(report),
        _markdown_table(head, rows),
        "\n".join(f"- *{name}*: {explained[name]}." for name in head if explained.get(name, "-") != "-"),
        "![Bytes against attention error](pareto.png)",
        "## What follows",
        "\n".join(f"- {line}" for line in _verdicts(report)),
    ]
    if world:
        parts += ["## Where each policy breaks", _policies(report)]
    parts += ["## Latents and pictures", _pictures(report)]
    if "controls" in report:
        parts += ["## Negative controls", "\n".join(f"- {line}" for line in _control_lines(report))]
    parts += ["## How it was measured", _method(report)]
    return "\n\n".join(parts) + "\n"


def _headline(report: Mapping[str, Any]) -> str:
    return (
        f"{report['seeds']} paired seeds of {report['chunks']} chunks with the model {report['model']}, "
        f"{report['batch']} videos at a time, on {report['hardware']}; "
        f"the reference is {report['reference']}."
    )


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The leaderboard, largest cache first, under its header."""
    caches = sorted(report["caches"], key=lambda cache: -cache["bytes"]["resident"])
    world = any("difference" in cache for cache in caches)
    head = [name for name, _ in COLUMNS if world or name not in WORLD_COLUMNS]
    if not world:
        head[7:7] = PICTURE_COLUMNS
    return [head, *(_row(cache, report, head) for cache in caches)]


def _row(cache: Entry, report: Mapping[str, Any], head: Sequence[str]) -> list[str]:
    sizes, never = cache["bytes"], cache["divergence"]["never"]
    median = cache["divergence"]["median_chunk"]
    reference = cache["spec"] == report["reference"]
    cells = {
        "cache": cache["spec"] + (" (reference)" if reference else ""),
        "bytes a frame (× fewer)": f"{sizes['per_frame']:,.0f} ({sizes['fewer_per_frame']:.2f})",
        "bytes in all (× fewer)": f"{sizes['resident']:,.0f} ({sizes['fewer']:.2f})",
        "attention error": f"{cache['attention_error']['value']:.2e}",
        "worst layer": f"{cache['attention_error']['worst']:.2e} ({cache['attention_error']['worst_layer']})",
        "one chunk, dB": _decibel(cache["latent_psnr_db"]["value"], cache["identical"]),
        "diverged": f"{_number(median, 'g')}; {never:.0%} never",
        "ms a chunk (ratio)": f"{cache['time']['chunk_ms']:.0f} ({cache['time']['ratio']:.2f})",
    }
    if "difference" in cache:
        recalled, breaks = cache["recall"], cache["recall"]["breaks_after_frames"]
        cells |= {
            "identity Δ": _interval(cache["difference"]["identity"], 3),
            "colour ΔE Δ": _interval(cache["difference"]["colour_delta_e"], 2),
            "trajectory Δ, px": _interval(cache["difference"]["trajectory_rmse"], 2),
            "recalled": _share(recalled) + (f" breaks after {breaks}" if breaks else ""),
        }
    for column, name in zip(PICTURE_COLUMNS, PICTURE, strict=True):
        cells[column] = _interval(cache["picture"][name]["difference"], 2)
    return [cells[name] for name in head]


def _verdicts(report: Mapping[str, Any]) -> list[str]:
    found = report["conclusions"]
    lines = []
    for key, best in found["best"].items():
        factor, _, measure = key.partition(" ")
        what = f"Best at {factor}× fewer bytes or more {MEASURES[measure]}"
        if best is None:
            lines.append(f"{what}: no cache is as small.")
        else:
            loss = {True: "identity as the reference's", False: "identity is lost, by all; least here"}
            why = loss.get(best["keeps_identity"], "smallest attention error")
            lines.append(f"{what}: `{best['spec']}` ({why}).")
    for spec, by in found["no_help"].items():
        lines.append(f"Did not help: `{spec}`; `{by}` takes no more bytes and reads no less exactly.")
    lines += [f"`{spec}` breaks at chunk {chunk}." for spec, chunk in found["breaks"].items()]
    lines += [
        f"`{cache['spec']}` chooses tokens by {cache['sampled_scores']:,.0f} products of a query and a key, "
        "which a chunk computes beside its attention."
        for cache in report["caches"]
        if cache["sampled_scores"]
    ]
    above = found["peaks_not_below_bf16"]
    if above is not None:
        which = f"but {', '.join(f'`{spec}`' for spec in above)}" if above else "without exception"
        lines.append(f"At its peak a chunk takes fewer bytes with a quantized cache than with bf16, {which}.")
    if report["never_full"]:
        names = ", ".join(f"`{spec}`" for spec in report["never_full"])
        lines.append(f"In {report['chunks']} chunks no frame had to leave {names}; take more with --chunks.")
    return lines


def _policies(report: Mapping[str, Any]) -> str:
    """What comes back by gap and the chunk at which identity breaks, of every cache, policies together."""
    caches = sorted(report["caches"], key=lambda c: (c["settings"]["policy"], -c["settings"]["window"]))
    recalled = [
        [
            cache["spec"],
            _number(cache["breaks_at_chunk"], "d", "never"),
            _number(cache["recall"]["breaks_after_frames"], "d", "never"),
            *(_share(share) for share in cache["recall"]["by_gap"].values()),
        ]
        for cache in caches
    ]
    gaps = caches[0]["recall"]["by_gap"]
    head = [
        "cache",
        "identity breaks at chunk",
        "recall breaks after, frames",
        *(f"away {gap}" for gap in gaps),
    ]
    free = [[c["spec"], *(_share(share) for share in c["metrics"]["reappearance"].values())] for c in caches]
    bins = caches[0]["metrics"]["reappearance"]
    notes = (
        "Identity breaks at the first of two chunks running in which its paired 95 % interval against the "
        "reference lies below 0. Recall is the share of objects that the camera finds again where they are, "
        "by how many frames they were away, with the true video as history (in brackets of how many); it "
        "breaks at the first gaps where the paired interval lies below 0.",
        "The same of free runs: hidden or out of view for so many frames, back in time, at the place, with "
        "the colour and shape they had. The model itself loses most of them: this tells caches apart poorly.",
    )
    return "\n\n".join([
        _markdown_table(head, recalled), notes[0],
        _markdown_table(["cache", *(f"away {gap}" for gap in bins)], free), notes[1],
    ])  # fmt: skip


def _pictures(report: Mapping[str, Any]) -> str:
    chunks = report["probed_chunks"]
    head = ["cache", "peak bytes of a chunk", *(f"dB at chunk {chunk}" for chunk in chunks), *PICTURE_COLUMNS]
    rows = [
        [
            cache["spec"],
            f"{_peak(cache):,.0f}",
            *(_decibel(cache["latent_psnr_db"]["by_chunk"][str(c)], cache["identical"]) for c in chunks),
            *(
                _interval(cache["picture"][name]["difference"], 2)
                for name in ("luma", "saturation", "flicker")
            ),
        ]
        for cache in report["caches"]
    ]
    note = (
        "Peak bytes are of one video: its cache and all tensors alive in a chunk at once. Luma and "
        "saturation are the last chunk's against the first, flicker is the mean change of a frame's "
        "brightness, all in percent of full scale and as differences to the reference [95 %]."
    )
    return f"{_markdown_table(head, rows)}\n\n{note}"


def _method(report: Mapping[str, Any]) -> str:
    lines = [
        "Every cache rolls out the same seeds with the same noise and prompts, a chunk of each in turn; the "
        "first chunk has no history and is common to all.",
        "Attention error and latents are measured with the reference's clean latents as history, at chunks "
        f"{', '.join(map(str, report['probed_chunks']))}: in one pass per noise level all caches answer the "
        "same queries, keys and values, and the pass goes on with the reference's answer. ‖answer − "
        "reference's‖ / ‖reference's‖ per layer and video.",
        "The PSNR of latents is 10 log10(range² / mean squared error), the range that of the reference's "
        "latents of that video and chunk.",
        "A video has diverged with the first chunk in which an object is more than a pixel from its like in "
        "the reference's video, or of another shape or missing; without a known world, with the first chunk "
        "below 30 dB. From the same noise two good videos part as well: horizons say how soon, not how well.",
        "Intervals are 95 % percentile bootstraps over seeds, of differences between rollouts of one seed.",
        "Bytes are counted twice, from settings and from the storages that the cache holds; had they "
        "differed for any cache there would be no report. × fewer is against bf16: for as many frames, and "
        "in all against the model's own window.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _control_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for name, control in report.get("controls", {}).items():
        verdict = "ok  " if worked(control) else "FAIL"
        error = f"attention error {control['attention_error']:.2e}"
        if "still" in control:
            yield f"{verdict} {name}: {error}, must stay under {control['limit']:g}{_largest(control)}"
            continue
        z = "∞" if control["attention_z"] is None else f"{control['attention_z']:.1f}"
        line = f"{verdict} {name}: {error}, z={z}, must reach {MOVED_Z:g}"
        if "metric" in control:
            line += (
                f"; {control['metric']} moved by {control['difference']}, |z|={_absolute(control['z'])} too"
            )
        yield line
    if "controls_pass" in report:
        yield f"controls: {'pass' if report['controls_pass'] else 'FAIL'}"


def _largest(control: Mapping[str, Any]) -> str:
    if "metrics" not in control:
        return ""
    known = [abs(shift["z"]) for shift in control["metrics"].values() if shift["z"] is not None]
    return f"; largest |z|={max(known, default=None)} of any metric, must stay under {MOVED_Z:g}"


def _absolute(z: float | None) -> str:
    return "∞" if z is None else f"{abs(z):g}"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(value: Mapping[str, Any], digits: int) -> str:
    if value["value"] is None:
        return "–"
    low, high = value["ci95"]
    return f"{value['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _share(value: Mapping[str, Any]) -> str:
    return f"{value['value']:.0%} ({value['returns']})" if value["value"] is not None else "– (0)"


def _decibel(value: float | None, identical: bool) -> str:
    return f"{value:.1f}" if value is not None else "equal" if identical else "–"


def _number(value: float | None, spec: str, missing: str = "–") -> str:
    return missing if value is None else format(value, spec)


# --- files ---


def require_plotting(out: Path) -> None:
    """`write_report` will be able to do its work.

    Raises:
        InputError: matplotlib is missing.
        OutputError: the folder cannot be made.
    """
    if not find_spec("matplotlib"):
        raise InputError(
            f"--out {out} draws with matplotlib, which is not installed: pip install 'vidkv[plot]', or leave "
            "--out away"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made into a folder ({error.strerror})") from None


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """report.json, report.md and pareto.png, in place of older ones.

    Raises:
        OutputError: one cannot be written.
    """
    try:
        (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        (out / "report.md").write_text(markdown(report), encoding="utf-8")
        draw_pareto(report, out / "pareto.png")
    except OSError as error:
        raise OutputError(f"{error.filename or out} cannot be written ({error.strerror})") from None


def draw_pareto(report: Mapping[str, Any], path: Path) -> None:
    """Bytes against attention error, both on logarithmic axes; caches without error have no place there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    beaten = report["conclusions"]["no_help"]
    shown = [cache for cache in report["caches"] if _error(cache) > 0]
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_xlabel("resident bytes of one video's cache")
    axes.set_ylabel("attention error, relative L2, mean over layers")
    axes.grid(True, which="both", color="#dddddd", linewidth=0.6)
    for best in (True, False):
        points = [c for c in shown if (c["spec"] not in beaten) == best]
        axes.scatter(
            [c["bytes"]["resident"] for c in points],
            [_error(c) for c in points],
            color="#1f5fbf" if best else "#b3540a",
            marker="o" if best else "x",
            label="no other is smaller and as exact" if best else "another is no larger and as exact",
        )
    front = sorted((c["bytes"]["resident"], _error(c)) for c in shown if c["spec"] not in beaten)
    axes.plot([x for x, _ in front], [y for _, y in front], color="#1f5fbf", linewidth=0.8)
    # beside the axes, by error: caches that lie close together keep their names apart
    for rank, cache in enumerate(sorted(shown, key=_error)):
        axes.annotate(
            cache["spec"],
            (cache["bytes"]["resident"], _error(cache)),
            xytext=(1.03, (rank + 0.5) / len(shown)),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "relpos": (0, 0.5)},
            verticalalignment="center",
            fontsize=8,
        )
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})
