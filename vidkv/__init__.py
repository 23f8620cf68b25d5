"""vidkv: long video from a causal video diffusion transformer, with a KV cache that stays small.

    from vidkv import CausalVideoPipeline

    pipe = CausalVideoPipeline.from_pretrained("bounce")
    for chunk in pipe.stream("a red circle and a blue square bouncing", num_frames=160, seed=7):
        print(chunk.index, chunk.frames.shape, chunk.stats.kv_bytes)

Names are loaded when first used, so that importing vidkv costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.7.0"

_HOMES = {
    "CacheSpec": "vidkv.cache",
    "CausalVideoPipeline": "vidkv.pipeline",
    "CausalWanTransformer3DModel": "vidkv.models.wan",
    "Chunk": "vidkv.rollout",
    "EngineSettings": "vidkv.request",
    "FlowSchedule": "vidkv.schedule",
    "JobStore": "vidkv.jobs.store",
    "KVCache": "vidkv.cache",
    "MemoryPlan": "vidkv.memory",
    "PromptSchedule": "vidkv.prompts",
    "Rollout": "vidkv.rollout",
    "StockNoise": "vidkv.noise",
    "StreamingDecoder": "vidkv.models.vae",
    "StreamingEncoder": "vidkv.models.vae_encode",
    "Tiling": "vidkv.models.vae_tiles",
    "VideoRequest": "vidkv.request",
    "VideoStream": "vidkv.stream",
    "VidkvError": "vidkv.errors",
    "load_rollout": "vidkv.state",
    "save_rollout": "vidkv.state",
    "work_off": "vidkv.jobs.supervisor",
}
__all__ = [
    "CacheSpec",
    "CausalVideoPipeline",
    "CausalWanTransformer3DModel",
    "Chunk",
    "EngineSettings",
    "FlowSchedule",
    "JobStore",
    "KVCache",
    "MemoryPlan",
    "PromptSchedule",
    "Rollout",
    "StockNoise",
    "StreamingDecoder",
    "StreamingEncoder",
    "Tiling",
    "VideoRequest",
    "VideoStream",
    "VidkvError",
    "__version__",
    "load_rollout",
    "save_rollout",
    "work_off",
]

if TYPE_CHECKING:
    from vidkv.cache import CacheSpec, KVCache
    from vidkv.errors import VidkvError
    from vidkv.jobs.store import JobStore
    from vidkv.jobs.supervisor import work_off
    from vidkv.memory import MemoryPlan
    from vidkv.models.vae import StreamingDecoder
    from vidkv.models.vae_encode import StreamingEncoder
    from vidkv.models.vae_tiles import Tiling
    from vidkv.models.wan import CausalWanTransformer3DModel
    from vidkv.noise import StockNoise
    from vidkv.pipeline import CausalVideoPipeline
    from vidkv.prompts import PromptSchedule
    from vidkv.request import EngineSettings, VideoRequest
    from vidkv.rollout import Chunk, Rollout
    from vidkv.schedule import FlowSchedule
    from vidkv.state import load_rollout, save_rollout
    from vidkv.stream import VideoStream


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vidkv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
