"""A comparison as one HTML file that can be mailed: curves, pictures, tables, and how to read them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

import vidkv
from vidkv.apps.fidelity import DIVERGED_DB, DIVERGED_PX, LEVELS, Frames
from vidkv.apps.render_report import Html, tag
from vidkv.errors import VidkvError
from vidkv.segments import read_metadata

if TYPE_CHECKING:
    from vidkv.apps.compare import Compared, Comparison, Side

PICTURES = 8
PICTURE_SIDE = 192
GAIN = 4
"""Times that the difference of two pictures is amplified."""
POINTS = 600
"""Of one curve."""
PEAK_DB = 60.0
"""Where the curve shows a PSNR that is higher, or infinite."""
WIDTH, HEIGHT = 640, 200
LEFT, RIGHT, TOP, BOTTOM = 64, 10, 14, 28
Curve = Sequence[float | None]

WORLD_NAMES = {
    "identity": ("identity", "share of objects with the colour and shape of the prompt", 1.0),
    "count_error": ("objects too many or too few", "mean per frame", 0.0),
    "colour_delta_e": ("colour error", "ΔE2000 to the paint that the prompt names", 0.0),
    "trajectory_rmse": ("trajectory error", "pixels from what physics predicts a chunk ahead", 0.0),
    "speed_error": ("speed error", "relative", 0.0),
    "teleports": ("jumps", "per object and frame", 0.0),
    "luminance_drift": ("drift of the background's luminance", "share of full scale", 0.0),
}
"""World metrics: name, what it is in, and what a perfect video has."""


def comparison_report(comparison: Comparison) -> str:
    """The page.

    Raises:
        Refused, VidkvError: a video has gone or is damaged.
    """
    shown = comparison.show(0, -1)
    rows = list(shown.chunks)
    while shown.next < shown.measured and shown.chunks:
        shown = comparison.show(shown.next, -1)
        rows += shown.chunks
    shown = shown.model_copy(update={"chunks": rows})
    alike = "Two caches, one seed" if shown.caches_alone else "Two videos"
    title = f"{alike}: {shown.a.video.id} and {shown.b.video.id}"
    body = tag(
        "body",
        _header(alike, shown),
        tag("main", _verdict(shown), _strips(comparison, shown), _curves(shown), _table(shown),
            _settings(comparison), _method(shown)),
        tag("footer", f"vidkv {vidkv.__version__}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}. "
            "This file needs nothing but itself."),
    )  # fmt: skip
    style = Html(_STYLE)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="generator", content="vidkv"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(alike: str, shown: Compared) -> Html:
    sides = [
        tag("div", tag("span", name.upper(), class_=f"key {name}"), tag("b", side.cache),
            tag("span", side.video.id), class_="side")
        for name, side in (("a", shown.a), ("b", shown.b))
    ]  # fmt: skip
    prompts = [side.prompts for side in (shown.a, shown.b)]
    told = [_prompts(prompts[0])]
    if prompts[0] != prompts[1]:
        told = [_prompts(own, f"{name}: ") for name, own in zip("AB", prompts, strict=True)]
    return tag("header", tag("h1", alike), *told, tag("div", *sides, class_="sides"))


def _prompts(prompts: Sequence[tuple[float, str]], name: str = "") -> Html:
    first = tag("p", name, tag("bdi", prompts[0][1][:2_000]), class_="prompt")
    later = [tag("li", tag("b", f"{s:g} s"), " ", tag("bdi", text[:2_000])) for s, text in prompts[1:50]]
    return Html(first + tag("ol", *later)) if later else first


def _verdict(shown: Compared) -> Html:
    close, chunk_s = shown.fidelity, 0.0
    if close.diverged_at is not None:
        chunk_s = shown.chunks[close.diverged_at].first_frame / shown.frame_rate
    if not shown.measured:
        parted = "nothing yet"
    elif close.identical:
        parted = "never: every pixel is equal"
    elif close.diverged_at is None:
        parted = "not so far"
    else:
        parted = f"chunk {close.diverged_at} ({chunk_s:.3g} s)"
    figures = [
        ("B's bytes per latent frame to A's", f"{shown.ratio.bytes_per_frame:.3f}"),
        ("PSNR of all frames", _db(close.psnr, close.identical)),
        ("SSIM", "–" if close.ssim is None else f"{close.ssim:.3f}"),
        (f"parted (PSNR below {DIVERGED_DB:g} dB)", parted),
    ]
    if shown.world is not None:
        for name, side in (("A", shown.world.a), ("B", shown.world.b)):
            figures.append((f"identity of {name}", _number(side.means["identity"])))
    parts = [tag("div", tag("dt", name), tag("dd", value)) for name, value in figures]
    notes = [tag("p", note, class_="note") for note in shown.notes]
    so_far = f"{shown.up_to[:1].upper()}{shown.up_to[1:]}."
    return tag("section", tag("dl", *parts, class_="figures"), tag("p", so_far, class_="quiet"), *notes)


# --- pictures ---


def _strips(comparison: Comparison, shown: Compared) -> Html:
    """The last frames of some chunks of both, and what differs."""
    if not shown.measured:
        return Html("")
    count = min(PICTURES, shown.measured)
    chunks = sorted({round(i * (shown.measured - 1) / max(1, count - 1)) for i in range(count)})
    columns = []
    for chunk in chunks:
        pair = comparison.last_frames(chunk)
        if pair is None:
            continue
        row = shown.chunks[chunk]
        second = (row.first_frame + row.frames - 1) / shown.frame_rate
        difference = np.abs(pair[0].astype(np.int16) - pair[1]) * GAIN
        pictures = [*pair, difference.clip(0, LEVELS).astype(np.uint8)]
        names = ("A", "B", f"difference, {GAIN} times amplified")
        columns.append(
            tag(
                "div",
                *(
                    tag("img", src=jpeg(picture), alt=f"{name}, chunk {chunk}", width=shown.width,
                        height=shown.height)
                    for name, picture in zip(names, pictures, strict=True)
                ),
                tag("span", f"{second:.1f} s"),
                class_="column",
            )
        )  # fmt: skip
    small = max(shown.width, shown.height) <= PICTURE_SIDE
    return tag(
        "section",
        tag("h2", "The same moments"),
        tag("p", f"Rows: A, B, and |A − B| amplified {GAIN} times. Each is the last frame of a chunk.",
            class_="quiet"),
        tag("div", *columns, class_=f"strips{' small' if small else ''}", tabindex=0, role="group",
            aria_label="Pictures of both videos and their difference"),
    )  # fmt: skip


def jpeg(picture: Frames, side: int = PICTURE_SIDE) -> str:
    """A picture as a data URI, at most so long on a side."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    # full colour: the shapes of the embedded world are a few pixels wide
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- curves ---


def _curves(shown: Compared) -> Html:
    if shown.measured < 2:
        return Html("")
    chunks = shown.chunks
    psnr = [PEAK_DB if chunk.psnr is None else min(PEAK_DB, chunk.psnr) for chunk in chunks]
    charts = [
        chart("PSNR by chunk", "dB; equal pictures are drawn at the top", [("A against B", "d", psnr)],
              threshold=DIVERGED_DB, low=0.0, high=PEAK_DB),
        chart("SSIM by chunk", "1 where equal", [("A against B", "d", [chunk.ssim for chunk in chunks])],
              low=0.0, high=1.0),
    ]  # fmt: skip
    drifts: list[tuple[str, Callable[[int], list[float]]]] = [
        ("Luminance drift", lambda i: [chunk.luma[i] for chunk in chunks]),
        ("Saturation drift", lambda i: [chunk.saturation[i] for chunk in chunks]),
    ]
    for name, values in drifts:
        pair = [("A", "a", values(0)), ("B", "b", values(1))]
        charts.append(chart(name, "percent of full scale, against the own first chunk", pair))
    world = shown.world
    if world is not None and world.a.curves and world.b.curves:
        for name in ("identity", "count_error", "colour_delta_e", "trajectory_rmse"):
            title, unit, _ = WORLD_NAMES[name]
            pair_of: list[tuple[str, str, Curve]] = [
                ("A", "a", world.a.curves[name]), ("B", "b", world.b.curves[name])
            ]  # fmt: skip
            bounds = {"low": 0.0, "high": 1.0} if name == "identity" else {"low": 0.0}
            charts.append(chart(f"{title[:1].upper()}{title[1:]}", unit, pair_of, **bounds))
    return tag("section", tag("h2", "By chunk"), tag("div", *charts, class_="charts"))


def chart(
    title: str, unit: str, curves: Sequence[tuple[str, str, Curve]], threshold: float | None = None,
    low: float | None = None, high: float | None = None,
) -> Html:  # fmt: skip
    """Curves over chunks as SVG.

    Args:
        curves: name, class of the style sheet, and values by chunk; None leaves a gap.
        low, high: ends of the axis that are shown at least.
    """
    known = [value for _, _, values in curves for value in values if value is not None]
    bottom = min([*known, *([] if low is None else [low])], default=0.0)
    top = max([*known, *([] if high is None else [high])], default=1.0)
    if top - bottom < 1e-9:
        # a flat line: at the bottom where that is an end of the axis
        top, bottom = top + 1, bottom - (low is None)
    last = max(1, max(len(values) for _, _, values in curves) - 1)
    inner = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(chunk: float, value: float) -> tuple[float, float]:
        x = LEFT + inner[0] * chunk / last
        return round(x, 1), round(TOP + inner[1] * (top - value) / (top - bottom), 1)

    parts: list[Html] = []
    for value in (bottom, (bottom + top) / 2, top):
        y = place(0, value)[1]
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=str(y), y2=str(y), class_="grid"))
        parts.append(tag("text", f"{value:.3g}", x=LEFT - 6, y=str(y + 4), class_="end"))
    for chunk in sorted({0, last // 2, last}):
        x = place(chunk, bottom)[0]
        side = "end" if chunk == last else "start" if chunk == 0 else "middle"
        parts.append(tag("text", str(chunk), x=str(x), y=HEIGHT - 6, class_=side))
    if threshold is not None:
        y = place(0, threshold)[1]
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=str(y), y2=str(y), class_="threshold"))
    for _, kind, values in curves:
        parts += _lines(values, kind, place)
    legend = [tag("span", tag("i", class_=f"line {kind}"), name) for name, kind, _ in curves]
    drawing = tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=f"{title}: {_range(known)} over {last + 1} chunks",
    )  # fmt: skip
    caption = tag("figcaption", tag("b", title), tag("span", unit, class_="quiet"),
                  tag("span", *legend, class_="legend"))  # fmt: skip
    return tag("figure", caption, drawing)


def _range(known: Sequence[float]) -> str:
    return f"{min(known):.3g} to {max(known):.3g}" if known else "no evidence"


def _lines(values: Curve, kind: str, place: Callable[[float, float], tuple[float, float]]) -> list[Html]:
    """One line for every stretch that is known; a single point is a dot."""
    step = max(1, math.ceil(len(values) / POINTS))
    runs: list[list[tuple[float, float]]] = [[]]
    for begun in range(0, len(values), step):
        # of several chunks the lowest: a drop must not fall between two points
        some = [value for value in values[begun : begun + step] if value is not None]
        if some:
            runs[-1].append(place(begun, min(some)))
        elif runs[-1]:
            runs.append([])
    drawn = []
    for run in runs:
        if len(run) == 1:
            drawn.append(tag("circle", cx=str(run[0][0]), cy=str(run[0][1]), r="2.5", class_=f"dot {kind}"))
        elif run:
            drawn.append(tag("polyline", points=" ".join(f"{x},{y}" for x, y in run), class_=f"line {kind}"))
    return drawn


# --- tables ---


def _table(shown: Compared) -> Html:
    a, b, close, last = shown.a, shown.b, shown.fidelity, shown.chunks[-1] if shown.chunks else None
    rows: list[tuple[str, str, str, str]] = [
        ("bytes per latent frame", f"{a.bytes_per_frame:,}", f"{b.bytes_per_frame:,}",
         f"{shown.ratio.bytes_per_frame:.3f}"),
        ("bytes of the KV cache", f"{a.kv_bytes:,}", f"{b.kv_bytes:,}", f"{shown.ratio.kv_bytes:.3f}"),
        ("frames per second, end to end", _number(a.fps, 1), _number(b.fps, 1), _number(shown.ratio.fps, 2)),
    ]  # fmt: skip
    if last is not None:
        for name, pair in (("luminance", last.luma), ("saturation", last.saturation)):
            rows.append((f"drift of {name} in the last chunk, %", f"{pair[0]:+.2f}", f"{pair[1]:+.2f}", ""))
    world = shown.world
    if world is not None:
        for name, (title, unit, _) in WORLD_NAMES.items():
            one, other = world.a.means[name], world.b.means[name]
            rows.append((f"{title} ({unit})", _number(one), _number(other), ""))
        if world.a.returned or world.b.returned:
            back = [f"{side.right} of {side.returned}" for side in (world.a, world.b)]
            rows.append(("objects that came back as they were", back[0], back[1], ""))
    head = tag("tr", *(tag("th", name, scope="col") for name in ("", "A", "B", "B to A")))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    between = [
        ("PSNR of all frames, dB", _db(close.psnr, close.identical)),
        ("lowest PSNR of a chunk, dB", _db(close.psnr_lowest, close.identical)),
        ("SSIM of all frames", _number(close.ssim, 4)),
        ("lowest SSIM of a chunk", _number(close.ssim_lowest, 4)),
        ("largest difference of a pixel, of 255", str(close.max_difference)),
    ]  # fmt: skip
    if world is not None:
        parted = "none so far" if world.diverged_at is None else f"chunk {world.diverged_at}"
        between.append((f"first chunk with objects more than {DIVERGED_PX:g} pixel apart", parted))
    pairs = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in between]
    means = "Frames per second are of the run that made each video, on whatever else the machine did."
    if world is not None:
        means += f" World metrics are means over the first {world.chunks} chunks."
    return tag(
        "section", tag("h2", "In numbers"),
        tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll"),
        tag("h3", "Between the two"), tag("div", tag("table", tag("tbody", *pairs)), class_="scroll"),
        tag("p", means, class_="quiet"),
    )  # fmt: skip


def _settings(comparison: Comparison) -> Html:
    columns = [_side_settings(comparison, side) for side in (comparison.a, comparison.b)]
    names = list(dict.fromkeys([*columns[0], *columns[1]]))
    rows = [
        tag("tr", tag("th", name, scope="row"),
            *(tag("td", tag("bdi", column.get(name, "–"))) for column in columns),
            class_="differs" if columns[0].get(name) != columns[1].get(name) else None)
        for name in names
    ]  # fmt: skip
    head = tag("tr", *(tag("th", name, scope="col") for name in ("", "A", "B")))
    return tag(
        "section", tag("h2", "Settings"),
        tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_="settings"), class_="scroll"),
    )  # fmt: skip


def _side_settings(comparison: Comparison, side: Side) -> dict[str, str]:
    """What the file says that made it, or what is to make it."""
    request = side.request
    found = {
        "id": side.job.id, "model": request.model, "seed": str(request.seed), "cache": str(side.spec),
        "size": f"{side.size[1]}x{side.size[0]}", "frames per second": str(side.entry.fps),
        "chunks": f"{side.job.done} of {side.job.chunks}", "frames": str(side.job.frames),
        "state": side.job.state.value, "device": str(side.job.settings.get("device", "auto")),
    }  # fmt: skip
    with contextlib.suppress(VidkvError):
        stored = read_metadata(comparison.service.store.file(side.job))
        named = {"vidkv": "made with vidkv"}
        found |= {named.get(name, name): str(stored[name])[:300] for name in _STORED if stored.get(name)}
    for name in ("steps", "guidance", "negative", "switch", "noise"):
        value = getattr(request, name)
        if value is not None:
            found.setdefault(name, str(value)[:300])
    return found


_STORED = ("vidkv", "steps", "guidance", "negative", "switch", "noise", "weights", "loras", "vae", "resumed")


def _method(shown: Compared) -> Html:
    versions = [f"vidkv {vidkv.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "numpy", "av"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    lines = [
        "PSNR is 10 log10(255² / mean squared error) over all pixels, channels and frames of a chunk.",
        "SSIM is the mean index of Wang, Bovik, Sheikh and Simoncelli (IEEE Transactions on Image Processing "
        "13, 2004) on BT.601 luminance, with a Gaussian window of 11x11 pixels, σ = 1.5, K1 = 0.01 and "
        "K2 = 0.03.",
        f"The videos count as parted from the first chunk below {DIVERGED_DB:g} dB on. Before that the cache "
        "changes details; after it they show different motion, and pixel differences say nothing about "
        "quality. What each shows on its own, drift and the world's metrics, goes on meaning something.",
        "Both are measured as decoded from H.264, so equal latents give equal pixels, and what the codec "
        "loses is lost on both sides.",
        "One pair of videos is an anecdote: to judge a cache, compare many seeds (vidkv eval world).",
    ]
    if shown.world is not None:
        lines.append(
            "World metrics are read back from the pixels of the embedded world: who is there, in which "
            "colour and shape, and where physics puts it a chunk later."
        )
    return tag(
        "section", tag("h2", "How it was measured"), tag("ul", *(tag("li", line) for line in lines)),
        tag("p", ", ".join(versions) + f", {platform.machine()}.", class_="quiet"),
    )  # fmt: skip


def _db(value: float | None, identical: bool) -> str:
    return ("equal" if identical else "–") if value is None else f"{value:.1f} dB"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


_STYLE = """
:root {
  --paper: #f4f2ee; --card: #fffefb; --ink: #1d1b18; --quiet: #625d55; --line: #ddd8cf; --accent: #1f5fbf;
  --a: #1f5fbf; --b: #b3540a; --d: #5a4a8a; --mark: #f8ebcd; --stage: #17181b;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121316; --card: #1c1e22; --ink: #ebe8e2; --quiet: #a5a199; --line: #33363c; --accent: #8db8ff;
    --a: #8db8ff; --b: #ffb070; --d: #c3b3f5; --mark: #3b2f14; --stage: #08090a;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: clamp(1rem, 3vw, 2.5rem); max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
h1 { margin: 0 0 .5rem; font-size: clamp(1.5rem, 1rem + 2vw, 2.25rem); line-height: 1.15;
  letter-spacing: -.02em; font-weight: 650; }
h2 { margin: 0 0 .5rem; font-size: 1.125rem; font-weight: 650; }
h3 { margin: 1.25rem 0 .25rem; font-size: .9375rem; font-weight: 600; }
section { margin: 1.5rem 0; padding: 1.125rem 1.25rem; border: 1px solid var(--line); border-radius: 14px;
  background: var(--card); }
.quiet, footer { color: var(--quiet); font-size: .875rem; margin: .35rem 0 .75rem; }
.prompt { margin: 0 0 .5rem; font-size: 1.0625rem; white-space: pre-wrap; overflow-wrap: anywhere; }
ol { margin: 0 0 .5rem; padding-left: 1.25rem; overflow-wrap: anywhere; }
.sides { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin-top: .75rem; }
.side { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .6rem; overflow-wrap: anywhere; }
.side > span:last-child { color: var(--quiet); font-size: .875rem; }
.key { padding: 0 .5rem; border-radius: 6px; color: var(--card); font-weight: 700; }
.key.a { background: var(--a); }
.key.b { background: var(--b); }
.figures { display: flex; flex-wrap: wrap; gap: .75rem 2.25rem; margin: 0 0 .75rem; }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.figures dt { color: var(--quiet); font-size: .8125rem; }
.figures dd { margin: 0; font-size: 1.5rem; line-height: 1.2; font-weight: 600;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.note { margin: .5rem 0 0; padding: .6rem .8rem; border-radius: 8px; background: var(--mark); }
.strips { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(4.5rem, 1fr); gap: 3px;
  overflow-x: auto; }
.column { display: grid; gap: 3px; align-content: start; }
.column img { display: block; width: 100%; height: auto; background: var(--stage); }
.column span { color: var(--quiet); font-size: .75rem; text-align: center;
  font-variant-numeric: tabular-nums; }
.small img { image-rendering: pixelated; }
.charts { display: grid; gap: 1.25rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .6rem; font-size: .9375rem; }
figcaption .quiet { margin: 0; font-size: .8125rem; }
.legend { display: flex; gap: .8rem; margin-left: auto; font-size: .8125rem; }
.legend i { display: inline-block; width: 1.1rem; height: 0; margin-right: .3rem; vertical-align: middle;
  border-top: 3px solid; }
i.a { color: var(--a); }
i.b { color: var(--b); }
i.d { color: var(--d); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 13px; font-variant-numeric: tabular-nums; }
text.end { text-anchor: end; }
text.middle { text-anchor: middle; }
.grid { stroke: var(--line); }
.threshold { stroke: var(--quiet); stroke-dasharray: 5 4; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.a { stroke: var(--a); }
polyline.b { stroke: var(--b); stroke-dasharray: 7 3; }
polyline.d { stroke: var(--d); }
circle.a { fill: var(--a); }
circle.b { fill: var(--b); }
circle.d { fill: var(--d); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; color: var(--quiet); }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th, tbody td { text-align: right; }
thead th { font-weight: 600; color: var(--ink); }
.settings td, .settings thead th { text-align: left; overflow-wrap: anywhere; }
.differs td { background: var(--mark); }
li { margin: .3rem 0; }
td, thead th { white-space: nowrap; }
.settings td { white-space: normal; min-width: 7rem; }
@media (max-width: 40rem) {
  svg text { font-size: 21px; }
  section { padding: 1rem; }
}
@media print { section { break-inside: avoid; } }
"""
