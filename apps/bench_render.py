"""What rendering jobs costs beside a bare loop, and what a light resume changes: `vidkv bench render`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vidkv.apps.bench import hardware, median_ratio
from vidkv.jobs.run import Options
from vidkv.jobs.store import JobStore
from vidkv.jobs.worker import Orders, Worker
from vidkv.pipeline import CausalVideoPipeline
from vidkv.planning import Plan, load_pipeline, open_stream, plan
from vidkv.request import EngineSettings, VideoRequest
from vidkv.segments import DEFAULT_CRF

Tell = Callable[[int, int, str], None]


def render_report(
    model: str, prompt: str, videos: int, seconds: float, device: str, tell: Tell
) -> dict[str, Any]:
    """Render videos as jobs and in a bare loop, in turn.

    The bare loop is what a user would write: chunks from `pipe.stream`, each encoded as it comes into one
    mp4 that is lost if the process dies. Both have their networks loaded.

    Returns:
        `ratio`: the loop's time over the job's, medians, and its 95 % interval; `loop_fps`, `job_fps`;
        `silent_ratio`: likewise of a loop that throws its frames away. `light`: PSNR in dB between a video
        that was stopped in the middle and taken up with `light`, and the same video uninterrupted: median
        and least over the videos, of the first chunk after that and of all.
    """
    settings = EngineSettings(device=device)
    requests = [
        VideoRequest(prompt=prompt, model=model, seconds=seconds, seed=seed) for seed in range(videos + 1)
    ]
    plans = [plan(request, settings) for request in requests]
    pipe = load_pipeline(plans[0])
    times: dict[str, list[float]] = {"silent": [], "loop": [], "job": []}
    first, rest = list[float](), list[float]()
    with tempfile.TemporaryDirectory(prefix="vidkv-bench-") as name:
        root = Path(name)
        with JobStore(root / "jobs") as jobs, JobStore(root / "light") as light:
            worker = Worker(jobs, Orders(jobs.root, jobs.name, "bench"))
            for number, planned in enumerate(plans):
                # the first one pays for what is made at first use, on either side
                silent = _timed(partial(_drain, planned, pipe))
                loop = _timed(partial(_loop, planned, pipe, root / "loop.mp4"))
                jobs.submit_plan(planned)
                job = _timed(worker.work)
                if number:
                    for kind, value in (("silent", silent), ("loop", loop), ("job", job)):
                        times[kind].append(value)
                    resumed = _resumed(light, planned)
                    made = planned.chunks // 2
                    chunk, all_of_it = _psnr(jobs.file(jobs.get(planned.id)), resumed, planned, made)
                    first.append(chunk)
                    rest.append(all_of_it)
                tell(number, videos, "videos")
    frames = plans[0].frames
    ratio, low, high = median_ratio(np.array(times["loop"]), np.array(times["job"]))
    silent_ratio, _, _ = median_ratio(np.array(times["silent"]), np.array(times["job"]))
    return {
        "hardware": hardware(plans[0].device),
        "model": model,
        "videos": videos,
        "frames": frames,
        "ratio": round(ratio, 3),
        "ratio_ci95": [round(low, 3), round(high, 3)],
        "silent_ratio": round(silent_ratio, 3),
        "loop_fps": round(frames / float(np.median(times["loop"])), 1),
        "job_fps": round(frames / float(np.median(times["job"])), 1),
        "light": {
            "at_chunk": plans[0].chunks // 2,
            "first_chunk_psnr_db": [round(float(np.median(first)), 1), round(min(first), 1)],
            "psnr_db": [round(float(np.median(rest)), 1), round(min(rest), 1)],
        },
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    low, high = report["ratio_ci95"]
    light = report["light"]
    return (
        f"{report['videos']} videos of {report['frames']} frames, {report['model']}, {report['hardware']}\n"
        f"jobs {report['job_fps']} fps, bare loop into one mp4 {report['loop_fps']} fps: "
        f"{report['ratio']} [{low}, {high}] of its throughput, {report['silent_ratio']} of a loop "
        "that keeps nothing\n"
        f"light resume at chunk {light['at_chunk']}: PSNR {light['first_chunk_psnr_db'][0]} dB in the first "
        f"chunk (least {light['first_chunk_psnr_db'][1]}), {light['psnr_db'][0]} dB over the rest "
        f"(least {light['psnr_db'][1]})"
    )


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _drain(planned: Plan, pipe: CausalVideoPipeline) -> None:
    for _ in open_stream(planned, pipe):
        pass


def _loop(planned: Plan, pipe: CausalVideoPipeline, out: Path) -> None:
    import av

    height, width = planned.size
    options = {"preset": "veryfast", "crf": str(DEFAULT_CRF), "tune": "zerolatency"}
    with av.open(str(out), "w") as container:
        stream = container.add_stream("libx264", rate=planned.entry.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, planned.entry.fps)
        stream.codec_context.thread_count = 1
        for chunk in open_stream(planned, pipe):
            assert chunk.frames is not None
            for pixels in chunk.frames[0].cpu().numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def _resumed(store: JobStore, planned: Plan) -> Path:
    """The video, stopped in the middle and taken up from latents alone."""
    job = store.submit_plan(planned)
    orders = Orders(store.root, store.name, "bench", Options(resume="light", partial=False))
    Worker(store, orders, lambda: store.get(job.id).done >= planned.chunks // 2).work()
    Worker(store, orders).work()
    return store.file(store.get(job.id))


def _psnr(whole: Path, resumed: Path, planned: Plan, made: int) -> tuple[float, float]:
    """PSNR in dB of the first chunk after `made`, and of all after them."""
    begun, ended = planned.frames_before(made), planned.frames_before(made + 1)
    errors = [
        float(np.square(a.astype(float) - b).mean())
        for a, b in zip(_frames(whole), _frames(resumed), strict=True)
    ]
    if any(errors[:begun]):
        raise AssertionError("frames from before the stop differ")
    return _decibels(errors[begun:ended]), _decibels(errors[begun:])


def _decibels(errors: list[float]) -> float:
    return float(10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-9)))


def _frames(path: Path) -> Iterator[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
