"""Self-Forcing (arXiv 2506.08009): Wan 2.1 1.3B, distilled to four steps on its own rollouts."""

from __future__ import annotations

from vidkv.models.families.base import FEW_STEPS, ModelEntry, Source
from vidkv.models.families.wan21 import BASE, TRANSFORMER_1_3B, wan21


def _entry(name: str, file: str) -> ModelEntry:
    source = Source(
        "gdhe17/Self-Forcing",
        files=(f"checkpoints/{file}",),
        base=BASE,
        licence="Apache-2.0",
        code_licence="Apache-2.0",
    )
    return wan21(name, TRANSFORMER_1_3B, schedule=FEW_STEPS, source=source)


MODELS = (
    _entry("self-forcing-1.3b", "self_forcing_dmd.pt"),
    _entry("self-forcing-1.3b-sid", "self_forcing_sid.pt"),
)
