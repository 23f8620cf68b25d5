"""Draw the README's picture: frames of a few rollouts over a minute, one rollout per row.

python apps/examples/contact_sheet.py apps/assets/contact.png
"""

from __future__ import annotations

import sys

import torch
from PIL import Image

from vidkv import CausalVideoPipeline

PROMPTS = (
    "a red circle and a blue square bouncing",
    "a blue triangle bouncing",
    "a green circle and a yellow square resting",
    "a yellow square and a green circle while the camera pans",
    "a green triangle bouncing behind a bar",
)
SECONDS = (0, 1, 2, 4, 8, 15, 30, 45, 59)


def main(path: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained("bounce")
    pipe.set_progress_bar_config(disable=True)
    shown = [16 * second for second in SECONDS]
    columns: dict[int, torch.Tensor] = {}
    start = 0
    for chunk in pipe.stream(list(PROMPTS), num_frames=max(shown) + 1, seed=7):
        assert chunk.frames is not None
        stop = start + chunk.frames.shape[1]
        columns |= {frame: chunk.frames[:, frame - start] for frame in shown if start <= frame < stop}
        start = stop
    sheet = torch.cat([torch.cat([columns[f][row] for f in shown], 1) for row in range(len(PROMPTS))])
    Image.fromarray(sheet.numpy()).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), 0).save(path)


if __name__ == "__main__":
    main(sys.argv[1])
