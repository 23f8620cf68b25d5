"""Reward Forcing: Wan 2.1 1.3B, distilled with a reward, for a window of nine frames with three sinks.

The authors' code also moves its sinks by an exponential mean of the frames that leave (EMA-sink); here they
stay.
"""

from __future__ import annotations

from vidkv.models.families.base import FEW_STEPS, Source
from vidkv.models.families.wan21 import BASE, TRANSFORMER_1_3B, wan21

MODELS = (
    wan21(
        "reward-forcing-1.3b",
        TRANSFORMER_1_3B,
        window=9,
        sink=3,
        schedule=FEW_STEPS,
        source=Source(
            "JaydenLu666/Reward-Forcing-T2V-1.3B",
            files=("rewardforcing.pt",),
            base=BASE,
            licence="unstated",
            code_licence="Apache-2.0",
        ),
    ),
)
