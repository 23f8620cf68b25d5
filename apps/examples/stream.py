"""Watch a video being made, chunk by chunk, under a prompt that changes half way, and save it.

python apps/examples/stream.py --seconds 12 --out stream.mp4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vidkv import CausalVideoPipeline
from vidkv.segments import SegmentWriter, write_video

PROMPT = "a red circle and a blue square bouncing"


def main(out: Path, seconds: float, seed: int, cache: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained("bounce")
    pipe.set_progress_bar_config(disable=True)
    prompts = [(0.0, PROMPT), (seconds / 2, f"{PROMPT}, the red circle turns yellow")]
    stream = pipe.stream(prompts, num_frames=round(seconds * pipe.fps), seed=seed, cache=cache)
    with tempfile.TemporaryDirectory() as folder:
        writer = SegmentWriter(Path(folder), pipe.fps, 64, 64)
        for chunk in stream:
            assert chunk.frames is not None
            # what is written can be played at once, however long the video becomes
            writer.write(chunk.index, chunk.frames[0])
            stats = chunk.stats
            took = stats.denoise_s + stats.commit_s + stats.decode_s
            print(
                f"chunk {chunk.index}: {writer.frames / pipe.fps:.1f} s of video, "
                f"{chunk.frames.shape[1] / took:.0f} frames per second, {stats.resident_frames} latent "
                f"frames in a cache of {stats.kv_bytes / 1e6:.2f} MB"
            )
        video = write_video(writer.paths(), out, pipe.fps, {"prompts": str(prompts), "seed": str(seed)})
    print(f"{out}: {video.frames} frames, {video.seconds:g} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Watch a video being made, and save it.")
    parser.add_argument("--out", type=Path, default=Path("stream.mp4"))
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cache", default="int8,window=21,sink=3")
    main(**vars(parser.parse_args()))
