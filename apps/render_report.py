"""What `vidkv render` will make and what it made: the dry-run table, `report.json` and the contact sheet."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import heapq
import io
import math
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import vidkv
from vidkv.apps.render_progress import clock_time
from vidkv.errors import InputError, OutputError, VidkvError
from vidkv.files import reason, write_durably, write_json
from vidkv.jobs.records import Records
from vidkv.jobs.store import Job, JobStore, State
from vidkv.loading import find_model, model_entry
from vidkv.memory import gigabytes, pixel_size
from vidkv.planning import Plan
from vidkv.request import printable
from vidkv.segments import partial_video, segment_paths

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from rich.console import Group

SCHEMA = 1
"""Of `report.json`; raised when a field changes its meaning or goes away."""
REPORT, SHEET = "report.json", "index.html"
PICTURES = 6
"""Of one video on the contact sheet."""
PICTURE_SIDE, POSTER_SIDE = 200, 400
MAX_CARDS = 500
"""Jobs with pictures and settings; those after them are lines with a link."""
MAX_PICTURE_BYTES = 32 * 2**20
PICTURES_S, STOPPED_PICTURES_S = 30.0, 1.0
"""Time for pictures. A run that was stopped has to be over within ten seconds."""
MAX_PIXELS = 64_000_000
MAX_LISTED = 200
"""Rows of the dry-run table."""
_FAR_FRAMES = 24
"""Pictures that lie further apart than this are taken from key frames, which are a chunk apart."""
_MAX_DECODED = 64


# ---------------------------------------------------------------------- before


def dry_run_table(
    plans: Sequence[Plan], store: JobStore, devices: Sequence[str], *, again: bool = False
) -> tuple[Group, list[dict[str, Any]]]:
    """What would be made, as a table for people and as one dict for every plan.

    Times and file sizes are those of earlier jobs of this store with the same model, size, steps and
    guidance; where there are none they are None.

    Args:
        devices: one worker each.
        again: jobs that failed or were cancelled are taken up again.

    Returns:
        The table, and by plan: `id key state resumes_at to_make error prompt seed model frames seconds chunks
        width height cache need_bytes kv_bytes out estimate_s estimate_from output_bytes`. `state` is one of
        new, resumes, running, done, failed, cancelled and refused; `estimate_from` counts the jobs measured.
    """
    from rich.console import Group
    from rich.text import Text

    jobs = store.jobs()
    known, earlier = {job.id: job for job in jobs}, _Earlier(jobs)
    rows = [_planned(plan, known.get(plan.id), store, earlier, again) for plan in plans]
    parts: list[Any] = [_plan_table(rows[:MAX_LISTED])]
    if len(rows) > MAX_LISTED:
        parts.append(Text(f"and {len(rows) - MAX_LISTED:,} more, see --json"))
    lines = _plan_lines(plan_total(rows, store, devices))
    return Group(*parts, *(Text(line) for line in lines)), rows


def plan_total(rows: Sequence[Mapping[str, Any]], store: JobStore, devices: Sequence[str]) -> dict[str, Any]:
    """Sum up the rows of `dry_run_table`.

    Returns:
        Counts by state, `to_make`, `frames` to make, `estimate_s` for all devices at once (of the jobs whose
        time is known), `unknown` (jobs whose time is not), `output_bytes` likewise with `unknown_output`,
        `need_bytes` of the largest job, `free_bytes` of the disk, and `devices`.
    """
    todo = [row for row in rows if row["to_make"]]
    workers = [0.0] * max(1, len(devices))
    for row in todo:
        # jobs are pulled in order by whoever is free
        heapq.heapreplace(workers, workers[0] + (row["estimate_s"] or 0.0))
    states = {state: sum(row["state"] == state for row in rows) for state in _PLAN_STATES}
    return {
        "jobs": len(rows),
        "states": {state: count for state, count in states.items() if count},
        "to_make": len(todo),
        "frames": sum(row["frames"] for row in todo),
        "estimate_s": round(max(workers), 1),
        "unknown": sum(row["estimate_s"] is None for row in todo),
        "output_bytes": sum(row["output_bytes"] or 0 for row in todo),
        "unknown_output": sum(row["output_bytes"] is None for row in todo),
        "need_bytes": max((row["need_bytes"] for row in todo), default=0),
        "free_bytes": shutil.disk_usage(store.root).free,
        "devices": list(devices),
    }


_PLAN_STATES = {
    "new": "new",
    "resumes": "resumes at chunk {resumes_at}",
    "running": "running now",
    "done": "done already",
    "failed": "failed before: {error}",
    "cancelled": "cancelled before",
    "refused": "refused: the id was rendered with other settings",
}


class _Earlier:
    """What jobs of the same kind took."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.by_model: dict[str, list[Job]] = {}
        for job in jobs:
            self.by_model.setdefault(str(job.request.get("model", "bounce")), []).append(job)
        self._seen: dict[tuple[Any, ...], tuple[list[float], list[float]]] = {}

    def of(self, plan: Plan) -> tuple[list[float], list[float]]:
        """(seconds per chunk, bytes per frame) of the jobs like this one that tell."""
        request = plan.request
        kind = (request.model, plan.size, request.steps, request.guidance)
        if kind not in self._seen:
            alike = [job for job in self.by_model.get(request.model, []) if _kind(job, plan) == kind]
            self._seen[kind] = (
                [speed for job in alike if (speed := _chunk_s(job, plan)) is not None],
                [size for job in alike if (size := _frame_bytes(job)) is not None],
            )
        return self._seen[kind]


def _kind(job: Job, plan: Plan) -> tuple[Any, ...] | None:
    request = job.request
    with contextlib.suppress(VidkvError, TypeError, ValueError):
        size = pixel_size(plan.entry, request.get("height"), request.get("width"))
        return plan.request.model, size, request.get("steps"), request.get("guidance")
    return None


def _chunk_s(job: Job, plan: Plan) -> float | None:
    """Seconds that a chunk took: of the whole job, or of the last attempt at an unfinished one."""
    if job.state is State.DONE:
        made = job.chunks - int(_number(job.result, "resumed_at"))
        wall = _number(job.result, "wall_s")
        return wall / made if made > 0 and wall > 0 else None
    fps = _number(job.progress, "fps")
    return 4 * plan.entry.chunk_frames / fps if fps > 0 else None


def _frame_bytes(job: Job) -> float | None:
    size = _number(job.result, "size_bytes")
    return size / job.frames if job.state is State.DONE and size > 0 and job.frames else None


def _planned(plan: Plan, job: Job | None, store: JobStore, earlier: _Earlier, again: bool) -> dict[str, Any]:
    state, done = _standing(plan, job, store)
    to_make = state in ("new", "resumes") or (again and state in ("failed", "cancelled"))
    speeds, sizes = earlier.of(plan)
    estimate = statistics.median(speeds) * (plan.chunks - done) if speeds else None
    height, width = plan.size
    return {
        "id": plan.id,
        "key": plan.key,
        "state": state,
        "resumes_at": done or None,
        "to_make": to_make,
        "error": job.error if job and state == "failed" else None,
        "prompt": plan.request.prompt,
        "seed": plan.request.seed,
        "model": plan.request.model,
        "frames": plan.frames,
        "seconds": round(plan.frames / plan.entry.fps, 3),
        "chunks": plan.chunks,
        "width": width,
        "height": height,
        "cache": str(plan.spec),
        "need_bytes": plan.need_bytes,
        "kv_bytes": plan.memory.kv_bytes + plan.memory.negative_kv_bytes,
        "out": job.out if job and state != "refused" else plan.request.out or f"{plan.id}.mp4",
        "estimate_s": round(estimate, 2) if to_make and estimate is not None else None,
        "estimate_from": len(speeds),
        "output_bytes": round(statistics.median(sizes) * plan.frames) if to_make and sizes else None,
    }


def _standing(plan: Plan, job: Job | None, store: JobStore) -> tuple[str, int]:
    """(state, finished chunks that are kept)."""
    if job is None:
        return "new", 0
    if job.key != plan.key:
        return "refused", 0
    if job.state is State.DONE:
        # its owner may have deleted the file
        return ("done", 0) if store.file(job).is_file() else ("new", 0)
    folder = store.folder(job)
    if job.state is State.RUNNING and store.claims.held(folder.path):
        return "running", 0
    # the index is a view that may have been rebuilt
    done = min(len(segment_paths(folder.segments)), Records(folder.records).chunks)
    if job.state in (State.FAILED, State.CANCELLED):
        return job.state.value, done
    return ("resumes", done) if done else ("new", 0)


def _plan_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("id", overflow="ellipsis", no_wrap=True, max_width=24)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, ratio=1, min_width=12)
    for name in ("video", "size", "memory", "KV cache"):
        table.add_column(name, justify="right")
    for name in ("cache", "file", "state"):
        table.add_column(name, overflow="fold")
    table.add_column("time", justify="right")
    for row in rows:
        state = _PLAN_STATES[row["state"]].format(**{**row, "error": _line(row["error"] or "", 80)})
        time_left = "" if not row["to_make"] else _about(row["estimate_s"])
        cells = (
            row["id"], _line(row["prompt"], 120), f"{row['seconds']:g} s, {row['frames']:,} frames",
            f"{row['width']}x{row['height']}", gigabytes(row["need_bytes"]), gigabytes(row["kv_bytes"]),
            row["cache"], _line(row["out"], 240), state, time_left,
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _plan_lines(total: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{count:,} {state}" for state, count in total["states"].items())
    lines = [f"{_videos(total['jobs'])}: {counts or 'none'}"]
    if not total["to_make"]:
        return [*lines, "nothing is left to make"]
    known, unknown = total["to_make"] - total["unknown"], total["unknown"]
    if not known:
        lines.append("time: unknown until the first chunk; no job like these has been rendered here")
    else:
        rest = f", and {_videos(unknown)} unknown until the first chunk" if unknown else ""
        lines.append(
            f"time: {_about(total['estimate_s'])} on {', '.join(total['devices'])}, by earlier jobs{rest}"
        )
    room = f"{gigabytes(total['free_bytes'])} free"
    if total["unknown_output"] == total["to_make"]:
        lines.append(f"disk: unknown, {room}")
    else:
        least = "at least " if total["unknown_output"] else "about "
        short = "; MAKE ROOM FIRST" if total["output_bytes"] > total["free_bytes"] else ""
        lines.append(f"disk: {least}{_size(total['output_bytes'])} of videos, {room}{short}")
    lines.append(f"memory: {gigabytes(total['need_bytes'])} on each device for the largest video")
    return lines


def _videos(count: int) -> str:
    return f"{count:,} video{'' if count == 1 else 's'}"


def _about(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"about {clock_time(math.ceil(seconds))}"


# ---------------------------------------------------------------------- after


def write_report(
    store: JobStore, jobs: Sequence[Job], out: Path, started: float, ended: float,
    stopped_by: str | None = None, before: Sequence[Job] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write `report.json` and the contact sheet `index.html`; files of those names by others are left alone.

    Args:
        jobs: rows of the store as they are now.
        out: the folder to write to.
        started, ended: seconds since 1970.
        stopped_by: what ended the run early, such as `SIGTERM`.
        before: rows as they were when the run began; what was done then was not rendered by it.

    Returns:
        What `report.json` holds.

    Raises:
        OutputError: they cannot be written.
    """
    earlier, rates = {job.id: job for job in before}, _FrameRates()
    wall = max(0.0, ended - started)
    entries = [_job_entry(store, job, earlier.get(job.id), rates, out) for job in jobs]
    frames = sum(entry["frames_of_this_run"] for entry in entries)
    report, sheet = _free_name(out, REPORT), _free_name(out, SHEET)
    value = {
        "schema": SCHEMA,
        "vidkv": vidkv.__version__,
        "started": _iso(started),
        "ended": _iso(ended),
        "stopped_by": stopped_by,
        "wall_s": round(wall, 3),
        "counts": {state.value: sum(job.state is state for job in jobs) for state in State},
        "rendered": sum(
            job.state is State.DONE and not e["already_done"] for job, e in _pairs(jobs, entries)
        ),
        "already_done": sum(entry["already_done"] for entry in entries),
        "frames": frames,
        "fps": round(frames / wall, 3) if wall else 0.0,
        "contact_sheet": sheet.name,
        "jobs": entries,
    }
    try:
        write_json(report, value)
        page = contact_sheet(store, jobs, value, out, STOPPED_PICTURES_S if stopped_by else PICTURES_S)
        write_durably(sheet, page.encode())
    except OSError as error:
        raise OutputError(f"cannot write the report to {out}: {reason(error)}; make room") from error
    return value


def _pairs(jobs: Sequence[Job], entries: Sequence[dict[str, Any]]) -> Iterable[tuple[Job, dict[str, Any]]]:
    return zip(jobs, entries, strict=True)


class _FrameRates:
    """Frames per second of models by name, 0 where it cannot be found out."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, model: str) -> int:
        if model not in self._known:
            self._known[model] = 0
            with contextlib.suppress(VidkvError, OSError, ValueError):
                self._known[model] = model_entry(find_model(model)).fps
        return self._known[model]


def _job_entry(
    store: JobStore, job: Job, before: Job | None, rates: _FrameRates, out: Path
) -> dict[str, Any]:
    request, result = job.request, job.result
    model = str(request.get("model", "bounce"))
    fps = rates.of(model)
    seconds = round(job.frames / fps, 3) if fps else None
    already = job.state is State.DONE and before is not None and before.state is State.DONE
    partial = partial_video(store.file(job))
    return {
        "id": job.id,
        "key": job.key,
        "state": job.state.value,
        "already_done": already,
        "out": _beside(out, store.file(job)),
        "partial": None if job.state is State.DONE or not partial.is_file() else _beside(out, partial),
        "frames": job.frames,
        "frames_of_this_run": 0 if already else _frames_since(job, before),
        "seconds": seconds,
        "chunks": job.chunks,
        "chunks_done": job.chunks if job.state is State.DONE else job.done,
        "wall_s": result.get("wall_s"),
        "latents_sha256": result.get("latents_sha256"),
        "attempts": job.attempts,
        "crashes": job.crashes,
        "error": job.error,
        "resumed_at": result.get("resumed_at"),
        "note": result.get("note"),
        "size_bytes": result.get("size_bytes"),
        "model": model,
        "seed": request.get("seed", 0),
        "cache": request.get("cache", {}),
        "prompt": request.get("prompt", ""),
        "request": request,
        "settings": job.settings,
    }


def _frames_since(job: Job, before: Job | None) -> int:
    """Frames made since; the last attempt made all of them where it did not resume."""
    if before is None or (job.state is State.DONE and job.result.get("resumed_at") is None):
        return job.frames
    return max(0, job.frames - before.frames)


def _free_name(out: Path, name: str) -> Path:
    """Where this file goes; beside one of that name that is somebody else's."""
    path = out / name
    with contextlib.suppress(OSError):
        with path.open("rb") as file:
            head = file.read(2_000)
        if head and b'"vidkv"' not in head:
            return out / f"vidkv-{name}"
    return path


def _beside(out: Path, file: Path) -> str:
    """A path relative to the report, with forward slashes."""
    return Path(os.path.relpath(file, out)).as_posix()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Picture:
    """One frame of a video.

    Attributes:
        frame: its number, from 0.
        second: when it is shown.
        data: a WebP file.
    """

    frame: int
    second: float
    data: bytes


@dataclass(frozen=True)
class Look:
    """A video at a glance.

    Attributes:
        width, height: pixels.
        poster: the first of the pictures, larger.
        damaged: some of it could not be decoded.
    """

    width: int
    height: int
    poster: Picture | None
    pictures: list[Picture]
    damaged: bool


def look_at(path: Path, count: int = PICTURES) -> Look:
    """Pictures spread over a video, without decoding what lies between them.

    Where they lie chunks apart they are the key frames before; else the very frames.

    Raises:
        InputError: missing, or not a video.
    """
    import av

    try:
        # a relative path with a colon would be read as a protocol
        with av.open(str(path.absolute())) as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError("its pictures are of an unknown kind")
            if not 0 < stream.width * stream.height <= MAX_PIXELS:
                raise InputError(f"{path.name} claims {stream.width}x{stream.height} pixels")
            # a frame or two of each place: starting threads costs more
            stream.codec_context.thread_count = 1
            return _look(container, stream, count)
    except FileNotFoundError:
        raise InputError("the file is missing") from None
    except (OSError, IndexError, ValueError, MemoryError, av.error.FFmpegError) as error:
        raise InputError(f"the file cannot be read: {_line(reason(error), 200)}") from None


def _look(container: InputContainer, stream: VideoStream, count: int) -> Look:
    import av

    rate, base, frames = float(stream.average_rate or 0), stream.time_base, stream.frames
    if not rate or not base or not frames:
        raise InputError("it says neither how long it is nor how fast")
    places = sorted({(2 * i + 1) * frames // (2 * count) for i in range(count)})
    far = frames >= count * _FAR_FRAMES
    pictures: dict[int, Picture] = {}
    poster: Picture | None = None
    damaged = False
    for place in places:
        try:
            container.seek(round(place / rate / base), stream=stream)
            frame = _frame_at(container, stream, place, rate, far)
        except (OSError, ValueError, av.error.FFmpegError):
            frame = None
        if frame is None or frame.time is None or frame.is_corrupt:
            damaged = True
            continue
        number = round(frame.time * rate)
        if number not in pictures:
            pictures[number] = Picture(number, frame.time, _webp(frame, PICTURE_SIDE))
            poster = poster or Picture(number, frame.time, _webp(frame, POSTER_SIDE))
    ordered = [pictures[number] for number in sorted(pictures)]
    return Look(stream.width, stream.height, poster, ordered, damaged)


def _frame_at(
    container: InputContainer, stream: VideoStream, place: int, rate: float, far: bool
) -> VideoFrame | None:
    """The first frame decoded, or where that is to be had cheaply the one of this number."""
    last = None
    for decoded, frame in enumerate(container.decode(stream)):
        last = frame
        number = place if frame.time is None else round(frame.time * rate)
        if far or number >= place or decoded >= _MAX_DECODED:
            break
    return last


def _webp(frame: VideoFrame, side: int) -> bytes:
    from PIL import Image

    scale = min(1.0, side / max(frame.width, frame.height))
    width, height = (max(1, round(length * scale)) for length in (frame.width, frame.height))
    buffer = io.BytesIO()
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
    Image.fromarray(pixels).save(buffer, "WEBP", quality=72, method=2)
    return buffer.getvalue()


class _Album:
    """Looks at videos while there is room on the page, and time."""

    def __init__(self, most_bytes: int, seconds: float) -> None:
        self.bytes_left, self.deadline = most_bytes, time.monotonic() + seconds

    def look(self, path: Path) -> Look | None:
        """None where the page has enough.

        Raises:
            InputError: see `look_at`.
        """
        if self.bytes_left <= 0 or time.monotonic() > self.deadline:
            return None
        look = look_at(path)
        shown = [*look.pictures, *([look.poster] if look.poster else [])]
        self.bytes_left -= sum(4 * len(picture.data) // 3 for picture in shown)
        return look


# ---------------------------------------------------------------------- the page


class Html(str):
    """Text that is HTML already."""


_VOID = ("img", "meta", "link", "input", "br")
# C0 and C1 but for tab and newline, delete, and halves of characters: none has a form in HTML
_UNWRITABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def tag(name: str, /, *children: str, **attributes: str | int | bool | None) -> Html:
    """An element. Children that are not `Html`, and all attributes, are escaped.

    Args:
        attributes: `class_` is class and `aria_label` aria-label; None and False are left out.
    """
    written = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written += f" {key}"
        elif value is not None and value is not False:
            written += f' {key}="{_text(str(value))}"'
    inner = "".join(child if isinstance(child, Html) else _text(child) for child in children)
    return Html(f"<{name}{written}>" + ("" if name in _VOID else f"{inner}</{name}>"))


def _text(text: str) -> str:
    return escape(_UNWRITABLE.sub("\ufffd", text.replace("\r\n", "\n")), quote=True)


def contact_sheet(
    store: JobStore, jobs: Sequence[Job], report: Mapping[str, Any], out: Path, pictures_s: float = PICTURES_S
) -> str:
    """One page without scripts, with pictures of all videos and links to them.

    Args:
        jobs, report: see `write_report`.
        out: where the page will lie; links are relative to it.
        pictures_s: seconds after which videos are no longer looked into.
    """
    album = _Album(MAX_PICTURE_BYTES, pictures_s)
    pairs = list(zip(jobs, report["jobs"], strict=True))
    cards = [_card(store, job, entry, album) for job, entry in pairs[:MAX_CARDS]]
    later = [_item(job, entry) for job, entry in pairs[MAX_CARDS:]]
    title = f"{out.absolute().name or 'renders'}: {_videos(len(jobs))}"
    body = [
        _header(title, report),
        _filters(report["counts"]),
        tag("main", *([tag("div", *cards, class_="sheet")] if cards else [_nothing()]), *_later(later)),
        tag("footer", f"vidkv {report['vidkv']}. The figures are in ", tag("a", REPORT, href=REPORT), "."),
    ]
    style = Html(_STYLE)
    policy = (
        f"default-src 'none'; style-src 'sha256-{_sha256(style)}'; img-src data:; media-src 'self' file:; "
        "base-uri 'none'; form-action 'none'"
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
    return f"<!doctype html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _header(title: str, report: Mapping[str, Any]) -> Html:
    counts = report["counts"]
    left = counts["queued"] + counts["running"]
    figures = [
        ("done", f"{counts['done']:,}", True),
        ("of them before", f"{report['already_done']:,}", bool(report["already_done"])),
        ("failed", f"{counts['failed']:,}", bool(counts["failed"])),
        ("cancelled", f"{counts['cancelled']:,}", bool(counts["cancelled"])),
        ("unfinished", f"{left:,}", bool(left)),
        ("frames rendered", f"{report['frames']:,}", True),
        ("frames per second", f"{report['fps']:,.1f}", True),
        ("time", clock_time(report["wall_s"]), True),
    ]
    shown = [tag("div", tag("dt", name), tag("dd", value)) for name, value, wanted in figures if wanted]
    parts = [
        tag("h1", title),
        tag("p", f"Rendered {_when(report['started'])} to {_when(report['ended'])} UTC", class_="quiet"),
        tag("dl", *shown, class_="figures"),
    ]
    if report["stopped_by"]:
        again = "Run the same command again: it goes on inside the video where it stopped."
        parts.append(tag("p", f"Stopped by {report['stopped_by']}. {again}", class_="notice"))
    return tag("header", *parts)


def _when(iso: str) -> str:
    return iso[:16].replace("T", " ")


_NAMES = {"queued": "unfinished"}


def _filters(counts: Mapping[str, int]) -> Html:
    """Show one state alone, by style sheet."""
    there = [state for state, count in counts.items() if count]
    if len(there) < 2:
        return Html("")
    options = [
        ("all", f"all {sum(counts.values()):,}"),
        *((s, f"{_NAMES.get(s, s)} {counts[s]:,}") for s in there),
    ]
    choices = [
        tag(
            "label",
            tag("input", type="radio", name="show", id=f"show-{name}", checked=name == "all"),
            tag("span", text),
        )
        for name, text in options
    ]
    return tag("fieldset", tag("legend", "Show"), *choices, class_="filters")


def _nothing() -> Html:
    return tag("p", "There are no videos in this run.", class_="quiet")


_ANEW = "delete it and run again to make it anew"


def _card(store: JobStore, job: Job, entry: Mapping[str, Any], album: _Album) -> Html:
    """A video with its pictures, or what became of it."""
    partial = entry["partial"]
    link = entry["out"] if job.state is State.DONE else partial
    path = store.file(job) if job.state is State.DONE else partial_video(store.file(job))
    look, trouble = None, None
    there = link is not None and path.is_file()
    if there:
        try:
            look, trouble = album.look(path), _changed(path, entry)
            if look and look.damaged:
                trouble = f"parts of the file cannot be decoded; {_ANEW}"
        except InputError as error:
            trouble = f"{error}; {_ANEW}"
    elif link is not None:
        trouble = "the file is missing; run again to make it anew"
    shown = look.pictures if look else not trouble
    parts = [_player(link, look, job)] if link is not None and there and shown else []
    parts += [_strip(look)] if look and look.pictures else []
    words = [
        tag("div", _heading(link if there else None, job), _badge(job, entry, trouble), class_="head"),
        tag("p", str(entry["prompt"]), class_="prompt", dir="auto", tabindex=_scrolls(str(entry["prompt"]))),
    ]
    if trouble:
        words.append(tag("p", trouble, class_="error"))
    if job.error and job.state is not State.DONE:
        words.append(tag("p", job.error, class_="error", dir="auto"))
    if partial:
        words.append(
            tag("p", tag("a", "What is finished", href=_url(partial)), " can be played", class_="quiet")
        )
    words += [_prompts(entry["request"]), _settings(job, entry, look)]
    return tag(
        "article",
        *parts,
        tag("div", *words, class_="words"),
        class_=f"card is-{job.state.value}",
        id=f"job-{job.id}",
    )


def _changed(path: Path, entry: Mapping[str, Any]) -> str | None:
    with contextlib.suppress(OSError):
        size, written = path.stat().st_size, entry["size_bytes"]
        if written is not None and size != written:
            return f"the file has {size:,} bytes and was written with {written:,}: somebody changed it"
    return None


def _scrolls(prompt: str) -> int | None:
    """A long text scrolls, and the keyboard must reach what scrolls."""
    return 0 if len(prompt) > 250 or prompt.count("\n") > 5 else None


def _heading(link: str | None, job: Job) -> Html:
    if link is None:
        return tag("h2", job.id)
    return tag("h2", tag("a", job.id, href=_url(link)))


def _badge(job: Job, entry: Mapping[str, Any], trouble: str | None = None) -> Html:
    if trouble and job.state is State.DONE:
        return tag("span", "damaged", class_="badge bad")
    texts = {
        State.QUEUED: f"unfinished, {entry['chunks_done']} of {job.chunks}" if job.done else "not begun",
        State.RUNNING: f"unfinished, {entry['chunks_done']} of {job.chunks}",
        State.DONE: "done before" if entry["already_done"] else "done",
    }
    return tag("span", texts.get(job.state, job.state.value), class_="badge")


def _player(link: str, look: Look | None, job: Job) -> Html:
    small = look is not None and max(look.width, look.height) <= PICTURE_SIDE
    return tag(
        "video", tag("a", "Open the video", href=_url(link)), controls=True, preload="none", playsinline=True,
        src=_url(link), poster=_data(look.poster) if look and look.poster else None,
        width=look.width if look else None, height=look.height if look else None,
        class_="small" if small else None, aria_label=f"Video {job.id}",
    )  # fmt: skip


def _strip(look: Look) -> Html:
    small = max(look.width, look.height) <= PICTURE_SIDE
    wide = look.width > 1.2 * look.height
    pictures = [
        tag("img", src=_data(picture), alt=f"Frame {picture.frame} at {_moment(picture.second)}",
            title=_moment(picture.second), width=look.width, height=look.height, loading="lazy")
        for picture in look.pictures
    ]  # fmt: skip
    return tag("div", *pictures, class_=f"strip{' wide' if wide else ''}{' small' if small else ''}")


def _moment(second: float) -> str:
    return f"{second:.1f} s" if second < 60 else clock_time(second)


def _data(picture: Picture) -> str:
    return f"data:image/webp;base64,{base64.b64encode(picture.data).decode()}"


def _prompts(request: Mapping[str, Any]) -> Html:
    """Prompts that take over later."""
    schedule = request.get("schedule") or []
    if not isinstance(schedule, list):
        return Html("")
    items, room = [], 20_000
    for change in schedule:
        with contextlib.suppress(TypeError, ValueError):
            second, prompt = change
            room -= len(str(prompt))
            if room < 0:
                items.append(tag("li", f"and more, see {REPORT}"))
                break
            items.append(tag("li", tag("b", f"{float(second):g} s"), " ", tag("bdi", str(prompt))))
    if not items:
        return Html("")
    number = f"{len(schedule):,} later prompt{'s' if len(schedule) > 1 else ''}"
    return tag("details", tag("summary", number), tag("ol", *items))


def _settings(job: Job, entry: Mapping[str, Any], look: Look | None) -> Html:
    request = entry["request"]
    width, height = (look.width, look.height) if look else (request.get("width"), request.get("height"))
    cache = entry["cache"]
    wall, size = _number(entry, "wall_s"), _number(entry, "size_bytes")
    sha = entry["latents_sha256"]
    shown = {
        "length": _length(job.frames, entry["seconds"]),
        "size": f"{width}x{height}" if width and height else None,
        "seed": str(entry["seed"]),
        "model": entry["model"],
        "cache": ", ".join(f"{k}={v}" for k, v in cache.items())
        if isinstance(cache, dict) and cache
        else None,
        **{name: _said(request.get(name)) for name in _FURTHER},
        "took": clock_time(math.ceil(wall)) if wall else None,
        "file": _size(int(size)) if size else None,
        "attempts": str(job.attempts) if job.attempts else None,
        "resumed": f"at chunk {entry['resumed_at']}" if entry["resumed_at"] else None,
        "note": _said(entry["note"]),
        "latents, sha256": sha[:12] if isinstance(sha, str) else None,
    }
    pairs = [
        tag("div", tag("dt", name), tag("dd", tag("bdi", str(value))))
        for name, value in shown.items()
        if value is not None
    ]
    return tag("dl", *pairs, class_="settings")


def _length(frames: int, seconds: float | None) -> str | None:
    if not frames:
        return None
    return f"{frames:,} frames" if seconds is None else f"{seconds:g} s, {frames:,} frames"


_FURTHER = ("steps", "guidance", "negative", "switch", "image", "video")


def _said(value: object) -> str | None:
    return None if value is None else _line(str(value), 200)


def _later(items: Sequence[Html]) -> list[Html]:
    if not items:
        return []
    return [tag("h2", f"{len(items):,} more", class_="more"), tag("ul", *items, class_="list")]


def _item(job: Job, entry: Mapping[str, Any]) -> Html:
    link = entry["out"] if job.state is State.DONE else entry["partial"]
    name = tag("a", job.id, href=_url(link)) if link else tag("b", job.id)
    words = _line(str(entry["prompt"]), 160) if job.state is not State.FAILED else _line(job.error or "", 160)
    return tag("li", name, _badge(job, entry), tag("bdi", words), class_=f"card is-{job.state.value}")


def _url(path: str) -> str:
    """A relative link; `./` keeps a name with a colon from being read as a protocol."""
    return f"./{quote(path.encode(errors='surrogateescape'))}"


def _size(count: int) -> str:
    return gigabytes(count) if count >= 10**7 else f"{count / 1e3:,.0f} kB"


def _line(text: str, limit: int) -> str:
    return printable(" ".join(text[: 4 * limit].split()), limit)


def _number(values: Mapping[str, Any], name: str) -> float:
    """A finite number out of what was read from a file, 0 where there is none."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


_STYLE = """
:root {
  --paper: #f4f2ee; --card: #fffefb; --ink: #1d1b18; --quiet: #625d55; --line: #ddd8cf;
  --accent: #1f5fbf; --good: #1d6b3c; --good-back: #dff1e4; --bad: #a3211c; --bad-back: #fbe4e1;
  --wait: #77500a; --wait-back: #f8ebcd; --stage: #17181b;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121316; --card: #1c1e22; --ink: #ebe8e2; --quiet: #a5a199; --line: #33363c;
    --accent: #8db8ff; --good: #8fdba8; --good-back: #173524; --bad: #ffa79f; --bad-back: #431d1b;
    --wait: #f0cb7d; --wait-back: #3b2f14; --stage: #08090a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: clamp(1rem, 3vw, 2.5rem); max-width: 110rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
a { color: var(--accent); text-underline-offset: .15em; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
h1 { margin: 0; font-size: clamp(1.5rem, 1rem + 2vw, 2.25rem); line-height: 1.15; letter-spacing: -.02em;
  font-weight: 650; overflow-wrap: anywhere; }
.quiet, footer { color: var(--quiet); font-size: .875rem; margin: .35rem 0 0; }
.figures { display: flex; flex-wrap: wrap; gap: .75rem 2.25rem; margin: 1.5rem 0; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dt { color: var(--quiet); font-size: .8125rem; }
.figures dd { margin: 0; font-size: 1.625rem; line-height: 1.2; font-weight: 600;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.notice { margin: 0 0 1.5rem; padding: .75rem 1rem; border-radius: 10px;
  background: var(--wait-back); color: var(--wait); }
.filters { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0 0 1.5rem; padding: 0; border: 0; }
.filters legend { float: left; padding: .3rem .5rem .3rem 0; color: var(--quiet); font-size: .875rem; }
.filters input { position: absolute; opacity: 0; }
.filters span { display: block; padding: .3rem .9rem; border: 1px solid var(--line); border-radius: 99px;
  background: var(--card); font-size: .875rem; cursor: pointer; }
.filters :checked + span { background: var(--ink); border-color: var(--ink); color: var(--paper); }
.filters :focus-visible + span { outline: 3px solid var(--accent); outline-offset: 2px; }
.sheet { display: grid; gap: 1.25rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.sheet .card { overflow: hidden; border: 1px solid var(--line); border-radius: 14px; background: var(--card);
  box-shadow: 0 1px 2px rgb(0 0 0 / 6%), 0 6px 18px rgb(0 0 0 / 4%); }
video { display: block; width: 100%; height: auto; max-height: 20rem; background: var(--stage);
  object-fit: contain; }
.small, .small img { image-rendering: pixelated; }
.strip { display: grid; grid-template-columns: repeat(6, 1fr); gap: 2px; padding: 2px 0;
  background: var(--stage); }
.strip.wide { grid-template-columns: repeat(3, 1fr); }
.strip img { display: block; width: 100%; height: auto; }
.words { display: grid; gap: .75rem; padding: 1rem 1.125rem 1.125rem; }
.head { display: flex; align-items: baseline; justify-content: space-between; gap: .75rem; }
h2 { margin: 0; font-size: .9375rem; font-weight: 600; overflow-wrap: anywhere; }
h2.more { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
.badge { flex: none; padding: .1rem .6rem; border-radius: 99px; font-size: .75rem; font-weight: 600;
  background: var(--wait-back); color: var(--wait); }
.is-done .badge { background: var(--good-back); color: var(--good); }
.is-failed .badge, .badge.bad { background: var(--bad-back); color: var(--bad); }
.prompt { margin: 0; max-height: 9.5em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.error { margin: 0; padding: .6rem .75rem; border-radius: 8px; background: var(--bad-back); color: var(--bad);
  font-size: .875rem; max-height: 12em; overflow: auto; overflow-wrap: anywhere; }
.words .quiet { margin: 0; }
details { font-size: .875rem; }
summary { cursor: pointer; color: var(--accent); }
ol { margin: .5rem 0 0; padding-left: 1.25rem; max-height: 16em; overflow: auto; overflow-wrap: anywhere; }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.25rem, 1fr)); gap: .5rem 1rem;
  margin: 0; padding-top: .75rem; border-top: 1px solid var(--line); font-size: .8125rem; }
.settings dt { color: var(--quiet); }
.settings dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.list { margin: 0; padding: 0; list-style: none; border-top: 1px solid var(--line); font-size: .875rem; }
.list li { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem; padding: .5rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; }
body:has(#show-done:checked) .card:not(.is-done),
body:has(#show-failed:checked) .card:not(.is-failed),
body:has(#show-cancelled:checked) .card:not(.is-cancelled),
body:has(#show-queued:checked) .card:not(.is-queued),
body:has(#show-running:checked) .card:not(.is-running) { display: none; }
"""
