"""Is a long rollout's cost flat? `vidkv bench rollout`."""

from __future__ import annotations

import multiprocessing
import platform
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidkv.cache import CacheSpec
from vidkv.errors import VidkvError
from vidkv.rollout import ChunkStats, Rollout

WARM_UP_CHUNKS = 20
PROMPT = "a red circle and a blue square bouncing"
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sample:
    """One chunk of one format: its statistics, its seconds, and the process's resident bytes after it."""

    stats: ChunkStats
    seconds: float
    resident: int
    resident_peak: int


def rollout_report(
    model: str, formats: Sequence[str], chunks: int, device: str, tell: Tell
) -> dict[str, Any]:
    """Roll every format out in a process of its own, a chunk of each in turn, so that noise hits all alike.

    A chunk's time includes decoding. On the CPU it is CPU time of the process, all threads together, so
    that other work on the machine does not count; on a GPU wall time, synchronised.

    Returns:
        Per format: pages read and tracked bytes per chunk (first, last, whether constant after the
        warm-up), the ratio of the last to the first quarter's median time (at most 100 chunks each) with a
        95 % bootstrap interval, the slope of its process's resident memory after the warm-up, and that
        memory's peak; and the largest slope and peak of all.

    Raises:
        InputError: an unknown model or format.
        VidkvError: a process has ended before its time.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in formats}
    with _processes(model, list(samples), device) as ends:
        for index in range(chunks):
            for name, end in ends.items():
                end.send("chunk")
                samples[name].append(_answer(name, end))
            tell(index + 1, chunks, "chunks")
    per_format = {name: _summary(rows) for name, rows in samples.items()}
    return {
        "hardware": hardware(device),
        "chunks": chunks,
        "time": "process CPU seconds" if device == "cpu" else "wall seconds",
        "formats": per_format,
        **{
            key: max(row[key] for row in per_format.values())
            for key in ("rss_slope_bytes_per_1000_chunks", "rss_peak_bytes")
        },
    }


@contextmanager
def _processes(model: str, formats: Sequence[str], device: str) -> Iterator[dict[str, Connection[Any, Any]]]:
    """One process per format, ready to roll out; what is left of them ends with the block."""
    # forked, they would share pages with this process, and CUDA could not be used
    context = multiprocessing.get_context("spawn")
    ends, running = {}, []
    try:
        for name in formats:
            ends[name], theirs = context.Pipe()
            arguments = (theirs, model, name, device, torch.get_num_threads())
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            running.append(process)
        for name, end in ends.items():
            _answer(name, end)
        yield ends
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def _answer(name: str, end: Connection[Any, Any]) -> Any:
    try:
        answer = end.recv()
    except EOFError:
        raise VidkvError(f"the process that rolled out {name} has ended; what it said stands above") from None
    if isinstance(answer, VidkvError):
        raise answer
    return answer


def _serve(end: Connection[Any, Any], model: str, format: str, device: str, threads: int) -> None:
    """A format's process: says that it is ready, then answers every message with a `Sample`."""
    # Ctrl-C reaches all processes of a terminal; the first one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        rollout = _start(model, format, device)
        end.send("ready")
        while True:
            end.recv()
            end.send(_sample(rollout, device))
    except VidkvError as error:
        end.send(error)
    except EOFError:
        return


def _start(model: str, format: str, device: str) -> Rollout:
    from vidkv.pipeline import CausalVideoPipeline

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = CausalVideoPipeline.from_pretrained(model, dtype=dtype).to(device)
    spec = CacheSpec.of(pipe.default_cache().model_dump(exclude_unset=True) | {"format": format})
    rollout = pipe.rollout(cache=spec)
    pipe.set_prompt(rollout, [PROMPT])
    return rollout


def _sample(rollout: Rollout, device: str) -> Sample:
    started = _clock(device)
    stats = rollout.step_chunk().stats
    seconds = _clock(device) - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Sample(stats, seconds, resident_bytes(), peak)


def _clock(device: str) -> float:
    return time.process_time() if device == "cpu" else seconds(torch.device(device))


def _summary(samples: list[Sample]) -> dict[str, Any]:
    rows = [sample.stats for sample in samples]
    after = rows[WARM_UP_CHUNKS:]
    seconds = np.array([sample.seconds for sample in samples[WARM_UP_CHUNKS:]])
    resident = np.array([sample.resident for sample in samples[WARM_UP_CHUNKS:]])
    slope = np.polyfit(np.arange(len(resident)), resident, 1)[0]
    quarter = max(20, min(100, len(after) // 4))
    ratio, low, high = median_ratio(seconds[-quarter:], seconds[:quarter])
    return {
        "kv_bytes": rows[-1].kv_bytes,
        "kv_bytes_constant": len({row.kv_bytes for row in rows}) == 1,
        "pages_read_per_chunk": after[-1].pages_read,
        "pages_read_constant": len({row.pages_read for row in after}) == 1,
        "lossy_pages_read_per_chunk": after[-1].lossy_pages_read,
        "chunk_s_median": round(float(np.median(seconds)), 5),
        "last_to_first_ratio": round(ratio, 4),
        "last_to_first_ci95": [round(low, 4), round(high, 4)],
        "rss_slope_bytes_per_1000_chunks": round(float(slope) * 1000),
        "rss_peak_bytes": samples[-1].resident_peak,
    }


def seconds(device: torch.device) -> float:
    """The time once the device has done all it was given."""
    synchronize(device)
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(call: Callable[[], Any], device: torch.device, calls: int = 5) -> float:
    """Of a call that has been made twice before."""
    call(), call()
    times = []
    for _ in range(calls):
        started = seconds(device)
        call()
        times.append(seconds(device) - started)
    return statistics.median(times)


def rounded(value: float) -> float:
    """To five digits."""
    return float(f"{value:.5g}")


def median_ratio(a: np.ndarray, b: np.ndarray, samples: int = 2000) -> tuple[float, float, float]:
    """Ratio of medians a / b with a 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    draws = [
        np.median(generator.choice(a, len(a))) / np.median(generator.choice(b, len(b)))
        for _ in range(samples)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def resident_bytes() -> int:
    """Resident set size of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def hardware(device: str) -> str:
    """What the numbers were taken on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{report['chunks']} chunks on {report['hardware']}, times in {report['time']}"]
    for name, row in report["formats"].items():
        low, high = row["last_to_first_ci95"]
        lines.append(
            f"{name:5} KV {row['kv_bytes'] / 1e6:8.3f} MB constant={row['kv_bytes_constant']}  "
            f"pages/chunk {row['pages_read_per_chunk']} constant={row['pages_read_constant']}  "
            f"{row['chunk_s_median'] * 1e3:.1f} ms/chunk  "
            f"last/first {row['last_to_first_ratio']:.3f} [{low:.3f}, {high:.3f}]  "
            f"RSS {row['rss_slope_bytes_per_1000_chunks'] / 2**20:+.2f} MiB per 1,000 chunks"
        )
    return "\n".join(lines)
