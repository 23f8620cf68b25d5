"""Causal Forcing and Causal Forcing++ (arXiv 2602.02214, 2605.15141): Wan 2.1 1.3B, by chunk or by frame.

The one- and two-step models take four steps for the first chunk, which has no history to lean on.
"""

from __future__ import annotations

from typing import Any

from vidkv.models.families.base import FEW_STEPS, ModelEntry, Source
from vidkv.models.families.wan21 import BASE, TRANSFORMER_1_3B, wan21


def _entry(name: str, file: str, chunk_frames: int, ema: bool = True, **schedule: Any) -> ModelEntry:
    return wan21(
        name,
        TRANSFORMER_1_3B,
        chunk_frames=chunk_frames,
        schedule=FEW_STEPS | schedule,
        source=Source(
            "zhuhz22/Causal-Forcing",
            files=(file,),
            base=BASE,
            licence="Apache-2.0",
            code_licence="Apache-2.0",
            ema=ema,
        ),
    )


FIRST = FEW_STEPS["steps"]
MODELS = (
    _entry("causal-forcing-1.3b", "chunkwise/causal_forcing.pt", 3, ema=False),
    _entry("causal-forcing-1.3b-framewise", "framewise/causal_forcing.pt", 1),
    _entry(
        "causal-forcing-1.3b-2step",
        "causal-forcing++/framewise-2step.pt",
        1,
        steps=(1000, 500),
        first_chunk_steps=FIRST,
    ),
    _entry(
        "causal-forcing-1.3b-1step",
        "causal-forcing++/framewise-1step.pt",
        1,
        steps=(1000,),
        first_chunk_steps=FIRST,
    ),
)
