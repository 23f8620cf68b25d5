"""Make one video with two caches from the same noise and see how soon, and how far, they part.

python apps/examples/compare_cache.py --seconds 12 --a fp32 --b int8,window=9 --out caches.png

Rows of the picture: A, B, and their difference four times amplified, at the end of every chunk. That two
rollouts part does not say which is better, because the smallest difference grows; `vidkv eval world` judges
each by itself, over many seeds.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

from vidkv import CausalVideoPipeline
from vidkv.apps.fidelity import DIVERGED_DB, Fidelity

PROMPT = "a red circle and a blue square bouncing"
GAIN = 4


def main(out: Path, seconds: float, seed: int, a: str, b: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained("bounce")
    pipe.set_progress_bar_config(disable=True)
    frames = round(seconds * pipe.fps)
    streams = [pipe.stream(PROMPT, num_frames=frames, seed=seed, cache=cache) for cache in (a, b)]
    fidelity, columns = Fidelity(), []
    for chunk_a, chunk_b in zip(*streams, strict=True):
        assert chunk_a.frames is not None and chunk_b.frames is not None
        pair = [chunk_a.frames[0].numpy(), chunk_b.frames[0].numpy()]
        now = fidelity.add(*pair)
        value = "equal" if math.isinf(now.psnr) else f"{now.psnr:.1f} dB"
        print(f"chunk {chunk_a.index}: PSNR {value}, SSIM {now.ssim:.3f}")
        last_a, last_b = (clip[-1] for clip in pair)
        difference = GAIN * np.abs(last_a.astype(int) - last_b)
        columns.append(np.concatenate([last_a, last_b, difference.clip(0, 255).astype(np.uint8)]))
    for name, cache, chunk in (("A", a, chunk_a), ("B", b, chunk_b)):
        stats = chunk.stats
        print(f"{name} ({cache}): {stats.bytes_per_frame:,} bytes a latent frame, {stats.kv_bytes:,} in all")
    parted = fidelity.diverged_at
    print("they have not parted" if parted is None else f"below {DIVERGED_DB:g} dB from chunk {parted} on")
    sheet = np.concatenate(columns, 1)
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(
        out
    )
    print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One video with two caches.")
    parser.add_argument("--out", type=Path, default=Path("caches.png"))
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--a", default="fp32,window=21,sink=3")
    parser.add_argument("--b", default="int8,window=9,sink=3")
    main(**vars(parser.parse_args()))
