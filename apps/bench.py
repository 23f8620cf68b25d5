"""Is a long rollout's cost flat? `vidkv bench rollout`."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidkv.cache import CacheSpec
from vidkv.pipeline import CausalVideoPipeline
from vidkv.rollout import ChunkStats

WARM_UP_CHUNKS = 20
PROMPT = "a red circle and a blue square bouncing"
Tell = Callable[[int, int, str], None]


def rollout_report(
    model: str, formats: Sequence[str], chunks: int, device: str, tell: Tell
) -> dict[str, Any]:
    """Roll every format out side by side, a chunk of each in turn, so that noise hits all alike.

    Returns:
        Per format: pages read and tracked bytes per chunk (first, last, whether constant after the
        warm-up), and the ratio of the last to the first hundred chunks' median time with a 95 %
        bootstrap interval; and the slope of the process's resident memory over all chunks.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = CausalVideoPipeline.from_pretrained(model, dtype=dtype).to(device)
    base = pipe.default_cache()
    specs = {name: CacheSpec.of(base.model_dump() | {"format": name}) for name in formats}
    rollouts = {name: pipe.rollout(cache=spec, decode=False) for name, spec in specs.items()}
    text = pipe.encode_prompt([PROMPT])
    for rollout in rollouts.values():
        rollout.set_text(text)
    stats: dict[str, list[ChunkStats]] = {name: [] for name in formats}
    resident = []
    for index in range(chunks):
        for name, rollout in rollouts.items():
            stats[name].append(rollout.step_chunk().stats)
        resident.append(resident_bytes())
        tell(index + 1, chunks, "chunks")
    per_format = {name: _summary(rows) for name, rows in stats.items()}
    slope = np.polyfit(np.arange(WARM_UP_CHUNKS, chunks), resident[WARM_UP_CHUNKS:], 1)[0]
    return {
        "hardware": hardware(device),
        "chunks": chunks,
        "formats": per_format,
        "rss_slope_bytes_per_1000_chunks": round(float(slope) * 1000),
        "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _summary(rows: list[ChunkStats]) -> dict[str, Any]:
    after = rows[WARM_UP_CHUNKS:]
    seconds = np.array([row.denoise_s + row.commit_s for row in after])
    tenth = max(20, min(100, len(after) // 4))
    ratio, low, high = median_ratio(seconds[-tenth:], seconds[:tenth])
    return {
        "kv_bytes": rows[-1].kv_bytes,
        "kv_bytes_constant": len({row.kv_bytes for row in rows}) == 1,
        "pages_read_per_chunk": after[-1].pages_read,
        "pages_read_constant": len({row.pages_read for row in after}) == 1,
        "lossy_pages_read_per_chunk": after[-1].lossy_pages_read,
        "chunk_s_median": round(float(np.median(seconds)), 5),
        "last_to_first_ratio": round(ratio, 4),
        "last_to_first_ci95": [round(low, 4), round(high, 4)],
    }


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
    lines = [f"{report['chunks']} chunks on {report['hardware']}"]
    for name, row in report["formats"].items():
        low, high = row["last_to_first_ci95"]
        lines.append(
            f"{name:5} KV {row['kv_bytes'] / 1e6:8.3f} MB constant={row['kv_bytes_constant']}  "
            f"pages/chunk {row['pages_read_per_chunk']} constant={row['pages_read_constant']}  "
            f"{row['chunk_s_median'] * 1e3:.1f} ms/chunk  "
            f"last/first {row['last_to_first_ratio']:.3f} [{low:.3f}, {high:.3f}]"
        )
    lines.append(f"RSS slope {report['rss_slope_bytes_per_1000_chunks'] / 2**20:.2f} MiB per 1,000 chunks")
    return "\n".join(lines)
