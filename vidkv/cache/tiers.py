"""Which formats a cache's pages pass through as they age, and how many slots each of them takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from vidkv.cache.formats import FORMATS
from vidkv.cache.formats.base import PageFormat
from vidkv.cache.spec import CacheGeometry, CacheSpec
from vidkv.errors import CacheSpecError


@dataclass(frozen=True)
class Tier:
    """Pages of one format.

    Attributes:
        name: of its pool: `full`, 16 bits (or fp32); a format's name; or `pages`, which hold what is older
            than all others.
        slots: pages at most.
        below: latent frames younger than this many belong here, if not into one before it.
    """

    name: str
    format: PageFormat
    slots: int
    below: float


def planned_tiers(spec: CacheSpec, geometry: CacheGeometry, dtype: torch.dtype) -> list[Tier]:
    """The tiers of a cache, those of the newest frames first.

    Each has room for its own worst case: right after the start the sinks are the newest frames.

    Args:
        dtype: compute dtype, which decides what `full` pages hold.

    Raises:
        CacheSpecError: the settings do not fit these pages.
    """
    geometry = page_geometry(spec, geometry)
    final = FORMATS[spec.format](spec, geometry, _tokens(spec, geometry))
    capacity = spec.capacity(geometry.chunk_frames)
    full = not final.lossless and (spec.keep_newest or (spec.keep_sinks and not spec.tiers))
    ages = [("full", geometry.chunk_frames if spec.keep_newest else 0)] if full else []
    ages += spec.tiers
    sinks = spec.sink if ages and spec.keep_sinks else 0
    names = [name for name, _ in ages]
    if len({*names, spec.format}) <= len(names):
        raise CacheSpecError(f"newer={spec.newer!r:.60} names a format twice, or that of the oldest pages")
    tiers: list[Tier] = []
    younger = 0
    for name, frames in ages:
        plain = "fp32" if dtype == torch.float32 else "bf16"
        format = FORMATS[plain if name == "full" else name](spec, geometry)
        # of frames that follow one another up to the newest, and of sinks on their way through
        followers = max(0, min(younger + frames, capacity - spec.sink) - younger)
        passing = max(0, min(spec.sink, younger + frames - max(younger, capacity - spec.sink)))
        slots = followers + (passing if not sinks else 0 if tiers else sinks)
        younger += frames
        tiers.append(Tier(name, format, slots, younger))
    rest = capacity - sinks - min(younger, capacity - spec.sink)
    return [*tiers, Tier("pages", final, rest, math.inf)]


def planned_pools(
    spec: CacheSpec, geometry: CacheGeometry, dtype: torch.dtype
) -> dict[str, tuple[PageFormat, int]]:
    """The pools that a cache allocates, by name: (format, slots); see `planned_tiers`."""
    tiers = planned_tiers(spec, geometry, dtype)
    return {tier.name: (tier.format, tier.slots) for tier in reversed(tiers)}


def planned_means(
    spec: CacheSpec, g: CacheGeometry, pools: Mapping[str, tuple[PageFormat, int]]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what is frozen at the first commit: mean keys, of all places and of each."""
    heads = g.layers, g.batch, page_geometry(spec, g).kv_heads
    means: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if any(format.uses_key_mean for format, _ in pools.values()):
        means["key_mean"] = (*heads, g.head_dim), torch.float32
    if has_places(spec):
        means["keyframe"] = (*heads, g.tokens, g.head_dim), torch.bfloat16
    if spec.centroids:
        means["centroids"] = (*heads, spec.centroids, g.head_dim), torch.float16
    return means


def page_geometry(spec: CacheSpec, geometry: CacheGeometry) -> CacheGeometry:
    """The geometry with the kv heads that keep pages.

    Raises:
        CacheSpecError: none would.
    """
    if spec.local_heads >= geometry.kv_heads:
        raise CacheSpecError(
            f"local_heads={spec.local_heads} of {geometry.kv_heads} kv heads: at least one must read the "
            f"history; say at most {geometry.kv_heads - 1}"
        )
    return replace(geometry, kv_heads=geometry.kv_heads - spec.local_heads)


def history_heads(spec: CacheSpec, geometry: CacheGeometry) -> list[list[int]] | None:
    """By layer, the kv heads that keep pages, ascending; None if all do.

    Raises:
        CacheSpecError: none would, or it has not been measured which heads read least of the history.
    """
    page_geometry(spec, geometry)
    if not spec.local_heads:
        return None
    if not geometry.head_order:
        raise CacheSpecError(
            f"local_heads={spec.local_heads}: it is not known which heads of this model read least of the "
            "history; run `vidkv eval heads --model MODEL --write` first, or leave local_heads out"
        )
    return [sorted(order[spec.local_heads :]) for order in geometry.head_order]


def newest_frames(spec: CacheSpec, chunk_frames: int) -> int:
    """Of the newest frames, how many change their format with age, and so must not be evicted before."""
    return (chunk_frames if spec.keep_newest else 0) + sum(frames for _, frames in spec.tiers)


def has_places(spec: CacheSpec) -> bool:
    """Whether the first chunk's mean keys are kept for every place: to code against, or to prune by."""
    return spec.keyframe or (spec.keep_tokens < 1 and spec.keep_by == "key")


def _tokens(spec: CacheSpec, geometry: CacheGeometry) -> int:
    return math.ceil(spec.keep_tokens * geometry.tokens)
