"""One rollout of 10,000 chunks through the job engine, and what became of it: memory, identity, speed.

    python -m tests.faults.hour            # go on with it
    python -m tests.faults.hour --judge    # read the video back, write hour.json and the picture

Its first 4,801 chunks are an hour of video (57,600 frames at 16 frames a second). The worker reports its
resident memory and all bytes that the rollout keeps with every chunk; a sample of them is kept here.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

import vidkv
from vidkv.files import write_json
from vidkv.jobs.run import Options
from vidkv.jobs.store import Job, JobStore
from vidkv.jobs.supervisor import Supervisor
from vidkv.models.bounce.metrics import measure
from vidkv.models.bounce.parser import parse_frames
from vidkv.models.bounce.prompts import WORLDS, parse
from vidkv.request import EngineSettings, VideoRequest

PROMPT = "a red circle and a blue square bouncing"
CHUNKS, HOUR_CHUNKS, FPS = 10_000, 4_801, 16
COLUMNS = (
    "chunk",
    "seconds",
    "fps",
    "rss_bytes",
    "held_bytes",
    "kv_bytes",
    "luma",
    "saturation",
    "contrast",
    "worker",
)
WARM_UP_CHUNKS = 100
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/hour"))
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cache", default="int8")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--judge", action="store_true")
    options = parser.parse_args()
    if options.judge:
        print(json.dumps(judge(options.folder), indent=1))
    else:
        roll(options.folder, options.chunks, options.seed, options.cache, options.minutes)


def roll(folder: Path, chunks: int, seed: int, cache: str, minutes: float) -> None:
    """Go on with the rollout until it is done or time is up, noting a sample about every second."""
    folder.mkdir(parents=True, exist_ok=True)
    request = VideoRequest(id="hour", prompt=PROMPT, seconds=(12 * chunks - 3) / FPS, seed=seed, cache=cache)
    with JobStore(folder) as store, (folder / "samples.csv").open("a", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            rows.writeheader()
        store.submit(request, EngineSettings(device="cpu"), again=True)
        with Supervisor(store, options=Options()) as supervisor:
            started, last = time.time(), -1
            while supervisor.step() and time.time() - started < 60 * minutes:
                job = store.get("hour")
                if job.progress and job.done != last:
                    last = job.done
                    rows.writerow(_sample(job, time.time() - started))
                    file.flush()
                time.sleep(1)
        print(store.get("hour").result or store.get("hour").error)


def _sample(job: Job, seconds: float) -> dict[str, Any]:
    seen = job.progress
    named = {name: seen[name] for name in ("fps", "rss_bytes", "held_bytes", "kv_bytes")}
    return named | seen["drift"] | {"chunk": job.done, "seconds": round(seconds, 1), "worker": job.worker}


def judge(folder: Path) -> dict[str, Any]:
    """Figures of the finished rollout; writes `hour.json` beside this file and draws the curves."""
    with JobStore(folder) as store:
        job = store.get("hour")
        path = store.file(job)
    rows = list(csv.DictReader((folder / "samples.csv").open()))
    chunk = np.array([int(row["chunk"]) for row in rows])
    rss, held = (np.array([int(row[name]) for row in rows]) for name in ("rss_bytes", "held_bytes"))
    warm = chunk > WARM_UP_CHUNKS
    slope = float(np.polyfit(chunk[warm], rss[warm], 1)[0]) * 1000
    identity, frames = _identity(path)
    hour = identity[:HOUR_CHUNKS]
    report = {
        "vidkv": vidkv.__version__,
        "prompt": PROMPT,
        "cache": job.request["cache"],
        "chunks": job.chunks,
        "frames": frames,
        "hour_frames": 9 + 12 * (HOUR_CHUNKS - 1),
        "rss_slope_mib_per_1000_chunks": round(slope / 2**20, 3),
        "rss_mib": [round(float(rss[warm].min()) / 2**20, 1), round(float(rss[warm].max()) / 2**20, 1)],
        "held_bytes": sorted({int(value) for value in held[warm]}),
        "fps_median": round(float(np.median([float(row["fps"]) for row in rows])), 1),
        "file_bytes": path.stat().st_size,
        "identity_first_100": _mean(identity[:100]),
        "identity_hour": _mean(hour),
        "identity_last_100_of_hour": _mean(hour[-100:]),
        "identity_all": _mean(identity),
        "latents_sha256": job.result["latents_sha256"],
    }
    write_json(HERE / "hour.json", report)
    _draw(chunk, rss, held, identity, HERE.parents[1] / "apps" / "assets" / "hour.png")
    return report


def _identity(path: Path, batch_chunks: int = 200) -> tuple[np.ndarray, int]:
    """Share of frames of every chunk in which objects are as the prompt says, and how many frames decode."""
    scene = parse(PROMPT, WORLDS["narrow"])
    found: list[np.ndarray] = []
    frames = 0
    for first, part in enumerate(_parts(path, batch_chunks)):
        frames += len(part)
        if first:
            # chunks of twelve frames from here on; the metrics expect a first one of nine
            part = part[3:]
        found.append(measure(parse_frames(part), scene).identity)
    return np.concatenate(found), frames


def _parts(path: Path, chunks: int) -> Iterator[np.ndarray]:
    size, held = 12 * chunks - 3, list[np.ndarray]()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            held.append(frame.to_ndarray(format="rgb24"))
            if len(held) == size:
                yield np.stack(held)
                held, size = [], 12 * chunks
    if held:
        yield np.stack(held)


def _mean(values: np.ndarray) -> float:
    return round(float(np.nanmean(values)), 4)


def _draw(chunk: np.ndarray, rss: np.ndarray, held: np.ndarray, identity: np.ndarray, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 5), layout="constrained")
    window = 50
    smooth = [np.nanmean(identity[i : i + window]) for i in range(0, len(identity), window)]
    above.plot(np.arange(len(smooth)) * window, smooth)
    above.set(ylabel=f"identity (means of {window} chunks)", ylim=(0, 1.05))
    below.plot(chunk, rss / 2**20, label="resident memory of the worker")
    below.plot(chunk, held / 2**20, label="all tensors that the rollout keeps")
    below.set(xlabel="chunk", ylabel="MiB", ylim=(0, None))
    below.legend()
    for axes in (above, below):
        axes.axvline(HOUR_CHUNKS, linestyle=":", color="grey")
        axes.grid(alpha=0.3)
    above.annotate("an hour", (HOUR_CHUNKS, 0.05), xytext=(5, 0), textcoords="offset points")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
