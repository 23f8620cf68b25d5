"""Krea Realtime: Wan 2.1 14B, distilled by Self-Forcing.

Its loop keeps no cache over chunks: before each one it computes the keys and values of the last three clean
latent frames anew, at positions from zero. The steps are those of its configuration file; the authors'
server takes the warped ones beside them (937.5, 833.3) and one more pass at timestep 0, which is not here.
"""

from __future__ import annotations

from vidkv.models.families.base import Source
from vidkv.models.families.wan21 import BASE, TRANSFORMER_14B, wan21

MODELS = (
    wan21(
        "krea-realtime-14b",
        TRANSFORMER_14B,
        window=6,
        positions="relative",
        recompute_context=True,
        schedule={"steps": (1000, 937, 833, 625), "shift": 5.0, "warp": False, "sampler": "renoise"},
        source=Source(
            "krea/krea-realtime-video",
            files=("krea-realtime-video-14b.safetensors",),
            base=BASE,
            licence="unstated",
            code_licence="CC-BY-NC-SA-4.0",
        ),
    ),
)
