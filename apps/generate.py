"""A sentence to a video file: `vidkv generate`."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from vidkv.errors import Cancelled, OutputError, VidkvError
from vidkv.planning import Plan, load_pipeline, naming_shortage, open_stream
from vidkv.segments import (
    SegmentWriter,
    check_output,
    claim_folder,
    partial_video,
    rescue_segments,
    segments_folder,
    write_video,
)

if TYPE_CHECKING:
    from vidkv.rollout import Chunk


class Reporter(Protocol):
    """Told of every finished chunk."""

    def __call__(self, chunk: Chunk, chunks: int, frames: int, elapsed_s: float) -> None: ...


def generate(plan: Plan, out: Path, report: Reporter, started: float) -> dict[str, Any]:
    """Make the video of a plan.

    Segments collect in `OUT.segments` beside the file and the finished mp4 appears under its name at
    the end. Stopped early, by Ctrl-C, SIGTERM or an error, what is there is kept as `NAME.partial.mp4`;
    stopped while the file is joined, it is finished.

    Args:
        out: the mp4.
        started: `time.perf_counter()` when the command began, for the time to the first frame.

    Returns:
        The JSON object of `vidkv generate --json`. Its `first_frame_s` counts from `started`, its
        `end_to_end_fps` from when the model has been loaded, with encoding and writing.

    Raises:
        Stopped: by a signal; carries the partial file.
        OutputError: another run writes to the same file, or it cannot be written.
        ResourceError: memory ran out.
    """
    check_output(out)
    fps = plan.entry.fps
    metadata = plan.metadata()
    folder = segments_folder(out)
    with claim_folder(folder):
        with naming_shortage(plan):
            pipe = load_pipeline(plan)
        rescue_segments(folder, out)
        writer = SegmentWriter(folder, fps, *plan.size)
        tally = _Tally(plan, started)
        with _stopping() as stopped:
            try:
                with naming_shortage(plan):
                    stream = open_stream(plan, pipe, on_step=stopped.check, overlap=True)
                    for chunk in stream:
                        assert chunk.frames is not None
                        writer.write(chunk.index, chunk.frames[0])
                        tally.add(chunk)
                        report(chunk, plan.chunks, tally.frames, tally.elapsed_s)
                        stopped.check(chunk.index, -1)
            except (VidkvError, RuntimeError) as error:
                kept = keep_partial(writer, out, fps, metadata)
                if isinstance(error, Cancelled):
                    raise Stopped(stopped.signal, kept) from None
                if isinstance(error, VidkvError):
                    raise type(error)(f"{error}{_kept_note(kept)}") from error
                error.add_note(_kept_note(kept).removeprefix("; "))
                raise
            info = write_video(writer.paths(), out, fps, metadata)
            writer.drop_from(0)
    return tally.result() | {"out": str(out), "frames": info.frames, "seconds": info.seconds}


class Stopped(Exception):
    """The user stopped a run.

    Attributes:
        signal: its number.
        kept: the partial video, or None when no chunk was finished.
    """

    def __init__(self, number: int, kept: Path | None) -> None:
        super().__init__(f"stopped{_kept_note(kept)}")
        self.signal, self.kept = number, kept


def keep_partial(writer: SegmentWriter, out: Path, fps: int, metadata: dict[str, str]) -> Path | None:
    """Join what there is to a playable `NAME.partial.mp4`; the segments stay if that fails."""
    segments = writer.paths()
    if not segments:
        return None
    partial = partial_video(out)
    try:
        write_video(segments, partial, fps, metadata | {"partial": "true"})
    except OutputError:
        return segments_folder(out)
    with contextlib.suppress(OutputError):
        writer.drop_from(0)
    return partial


def _kept_note(kept: Path | None) -> str:
    return f"; what was finished is in {kept}" if kept else "; no chunk was finished"


class _Tally:
    """Running totals of one video."""

    def __init__(self, plan: Plan, started: float) -> None:
        self.plan, self.started, self.begun = plan, started, time.perf_counter()
        self.frames = self.chunks = self.kv_bytes = 0
        self.denoise_s = self.decode_s = 0.0
        self.first_frame_s = float("nan")
        self.digest = hashlib.sha256()
        self.geometry_bytes = 0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.begun

    def add(self, chunk: Chunk) -> None:
        if not self.chunks:
            self.first_frame_s = time.perf_counter() - self.started
        assert chunk.frames is not None
        self.chunks += 1
        self.frames += chunk.frames.shape[1]
        self.denoise_s += chunk.stats.denoise_s + chunk.stats.commit_s
        self.decode_s += chunk.stats.decode_s
        self.kv_bytes = max(self.kv_bytes, chunk.stats.kv_bytes)
        self.geometry_bytes = chunk.stats.bytes_per_frame
        self.digest.update(chunk.latents.float().cpu().contiguous().numpy().tobytes())

    def result(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "fps": plan.entry.fps,
            "chunks": self.chunks,
            "seed": plan.request.seed,
            "model": plan.request.model,
            "kv_format": plan.spec.format,
            "window_frames": plan.spec.window,
            "sink_frames": plan.spec.sink,
            "kv_bytes_per_frame": self.geometry_bytes,
            "kv_bytes_peak": self.kv_bytes,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "first_frame_s": round(self.first_frame_s, 3),
            "denoise_fps": round(self.frames / self.denoise_s, 2),
            "decode_fps": round(self.frames / self.decode_s, 2),
            "end_to_end_fps": round(self.frames / self.elapsed_s, 2),
            "latents_sha256": self.digest.hexdigest(),
        }


class _Stop:
    """Set by a signal, asked between denoising steps."""

    signal: int = 0

    def check(self, chunk: int, step: int) -> None:
        if self.signal:
            raise Cancelled("stopped by a signal")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


@contextlib.contextmanager
def _stopping() -> Iterator[_Stop]:
    """Within this context Ctrl-C and SIGTERM end the run at the next step; a second one at once."""
    stop = _Stop()
    previous: dict[int, Callable[..., Any] | int | None] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            previous[number] = signal.signal(number, stop)
    try:
        yield stop
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
