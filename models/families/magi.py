"""A configuration with grouped-query attention as MAGI-1 4.5B has it (arXiv 2505.13211): eight heads of keys.

Not MAGI-1 itself, whose blocks and text encoder differ: Wan's architecture at MAGI's width, depth and
grouping, to plan and measure what grouping saves. There are no weights for it.
"""

from __future__ import annotations

from vidkv.models.families.base import FEW_STEPS
from vidkv.models.families.wan21 import wan21

MODELS = (
    wan21(
        "gqa-4.5b",
        {
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "attention_head_dim": 128,
            "ffn_dim": 12_288,
            "num_layers": 34,
        },
        chunk_frames=6,
        window=30,
        schedule=FEW_STEPS,
    ),
)
