"""LongLive (arXiv 2509.22622): Wan 2.1 1.3B with a short window, sinks and a LoRA on every linear layer."""

from __future__ import annotations

from vidkv.models.families.base import FEW_STEPS, Source
from vidkv.models.families.wan21 import BASE, TRANSFORMER_1_3B, wan21

MODELS = (
    wan21(
        "longlive-1.3b",
        TRANSFORMER_1_3B,
        window=12,
        sink=3,
        prompt_switch="recache",
        recache_at_once=True,
        schedule=FEW_STEPS,
        source=Source(
            "Efficient-Large-Model/LongLive-1.3B",
            files=("models/longlive_base.pt",),
            lora="models/lora.pt",
            base=BASE,
            licence="unstated",
            code_licence="Apache-2.0",
            ema=False,
        ),
    ),
)
