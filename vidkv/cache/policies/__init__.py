"""Eviction policies by name. A new policy is one module here and one line in `POLICIES`."""

from vidkv.cache.policies.base import Policy
from vidkv.cache.policies.mass import HeavyHitter, RecentMass
from vidkv.cache.policies.sink_window import SinkWindow
from vidkv.cache.policies.sliding_window import SlidingWindow

POLICIES: dict[str, type[Policy]] = {
    "sliding_window": SlidingWindow,
    "sink_window": SinkWindow,
    "h2o": HeavyHitter,
    "snapkv": RecentMass,
}

__all__ = ["POLICIES", "HeavyHitter", "Policy", "RecentMass", "SinkWindow", "SlidingWindow"]
