"""Which read path a rollout takes: measured once per shape and machine, then remembered.

On a CPU there is nothing to choose, and without triton nothing to measure with. On a GPU every candidate
reads one layer of a full window of random pages, and the fastest is taken; what was measured is kept in
`~/.cache/vidkv/read_paths.json`, so that the next start measures nothing.

`VIDKV_ATTENTION=reference|two-pass|fused` forces a path, and `VIDKV_AUTOTUNE=1` measures every tile of the
fused read instead of the known good ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidkv.attention import CachedAttention
from vidkv.cache import CacheGeometry, CacheSpec, KVCache
from vidkv.cache.offload import planned_places
from vidkv.cache.tiers import planned_pools
from vidkv.errors import InputError, StateError
from vidkv.kernels import jit
from vidkv.kernels.attention import sdpa_backends
from vidkv.kernels.paged_attention import HEAD_DIMS
from vidkv.kernels.tiles import good_tiles, tile_space
from vidkv.read_path import NAMES, REFERENCE, ReadPath

FORCE, TUNE = "VIDKV_ATTENTION", "VIDKV_AUTOTUNE"
KERNELS = 1
"""Raised when a kernel's speed changes, so that old measurements no longer count."""

Measure = Callable[[ReadPath], float]


def choose(
    spec: CacheSpec, geometry: CacheGeometry, heads: int, device: torch.device, dtype: torch.dtype
) -> ReadPath:
    """The fastest read path for these pages.

    Args:
        heads: query heads.
        dtype: compute dtype.

    Raises:
        InputError: `VIDKV_ATTENTION` asks for what there is not, or what cannot be had here.
    """
    forced = os.environ.get(FORCE, "")
    if forced and forced not in NAMES:
        raise InputError(f"{FORCE}={forced!r:.60} is no read path; say {', '.join(NAMES)}, or leave it unset")
    if forced == "reference":
        return REFERENCE
    obstacle = fused_obstacle(spec, geometry, device, dtype)
    if forced == "fused" and obstacle:
        raise InputError(f"{FORCE}=fused: {obstacle}; leave {FORCE} unset")
    paths = [path for path in candidates(spec, geometry, device, dtype) if forced in ("", path.name)]
    if device.type != "cuda" and not forced:
        paths = [path for path in paths if path.name == "two-pass"]
    if len(paths) == 1 or device.type != "cuda" or not jit.triton:
        return paths[0]
    key = _key(spec, geometry, heads, device, dtype, paths)
    return _remembered(key, paths, lambda path: measure(path, spec, geometry, heads, device, dtype))


def candidates(
    spec: CacheSpec, geometry: CacheGeometry, device: torch.device, dtype: torch.dtype
) -> list[ReadPath]:
    """What could be taken, the likely fastest of each kind first; `reference` is not among them."""
    backends = sdpa_backends(device, dtype, geometry.head_dim)
    paths = [ReadPath("two-pass", backend=backend) for backend in backends]
    if fused_obstacle(spec, geometry, device, dtype) is None:
        queries = geometry.chunk_frames * geometry.tokens
        list_tiles = tile_space if os.environ.get(TUNE) == "1" else good_tiles
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        tiles = list_tiles(capability, geometry.head_dim, queries, geometry.tokens, dtype)
        if hopper_obstacle(spec, geometry, device, dtype) is None:
            tiles = [*(replace(tiles[0], hopper_splits=splits) for splits in (1, 2)), *tiles]
        paths += [ReadPath("fused", tile=tile) for tile in tiles]
    return paths


def check(
    path: ReadPath, spec: CacheSpec, geometry: CacheGeometry, device: torch.device, dtype: torch.dtype
) -> None:
    """A saved rollout's path can be taken here.

    Raises:
        StateError: it cannot, and with another the rollout would go on with other bits.
    """
    obstacle = None
    if path.name == "fused":
        obstacle = fused_obstacle(spec, geometry, device, dtype)
        if path.tile is not None and path.tile.hopper_splits:
            obstacle = obstacle or hopper_obstacle(spec, geometry, device, dtype)
    elif path.name == "two-pass" and path.backend not in (
        "auto",
        *sdpa_backends(device, dtype, geometry.head_dim),
    ):
        obstacle = f"torch's {path.backend} attention does not run on this {device.type} at {dtype}"
    if obstacle:
        raise StateError(f"it was made with the read path {path}: {obstacle}")


def fused_obstacle(
    spec: CacheSpec, geometry: CacheGeometry, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why the fused read cannot be taken, or None."""
    if not jit.triton:
        return "the fused read needs triton, which is not installed"
    if device.type != "cuda" and not jit.interpreted():
        return "the fused read needs an NVIDIA GPU, or TRITON_INTERPRET=1 for a slow trial without one"
    if geometry.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"the fused read takes heads of {sizes} channels, not {geometry.head_dim}"
    if dtype == torch.float64:
        return "the fused read computes in at most 32 bits, not float64"
    formats = [format for format, _ in planned_pools(spec, geometry, dtype).values()]
    refused = next(filter(None, (format.fused_obstacle() for format in formats)), None)
    if refused:
        return refused
    if any(format.tokens != geometry.tokens for format in formats):
        return "the fused read takes pages with all their tokens"
    places = planned_places(spec, geometry, dtype)
    if places is not None and places.staged:
        return f"the fused read takes pages on the device; device_gb={spec.device_gb:g} is less than it reads"
    if len({(format.uses_key_mean, format.narrow) for format in formats}) < len(formats):
        return f"the fused read takes pages of one coded format and one plain one, not those of {spec}"
    return None


def hopper_obstacle(
    spec: CacheSpec, geometry: CacheGeometry, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why the fused read's kernel for Hopper cannot be taken where the portable one can, or None."""
    formats = [format for format, _ in planned_pools(spec, geometry, dtype).values()]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "Hopper's kernel needs a GPU of compute capability 9.0"
    if dtype not in (torch.float16, torch.bfloat16) or geometry.head_dim != 128 or geometry.tokens % 8:
        return "Hopper's kernel takes 16-bit heads of 128 channels and tokens per frame in multiples of 8"
    if not all(format.uses_key_mean for format in formats) or spec.value_scale != "token":
        return "Hopper's kernel takes coded pages with a scale per token and no others beside them"
    if not find_spec("triton.experimental.gluon"):
        return "Hopper's kernel needs triton with the Gluon dialect, 3.6 or newer"
    return None


def measure(
    path: ReadPath, spec: CacheSpec, geometry: CacheGeometry, heads: int, device: torch.device,
    dtype: torch.dtype,
) -> float:  # fmt: skip
    """Median milliseconds of one layer's read of a full window of random pages, its own keys included."""
    from triton.testing import do_bench

    with torch.no_grad():
        cache, (q, k, v) = full_window(spec, geometry, heads, device, dtype)
        read = CachedAttention(cache, path).layer(0)
        return float(do_bench(lambda: read(q, k, v), warmup=10, rep=40, return_mode="median"))


def full_window(
    spec: CacheSpec, geometry: CacheGeometry, heads: int, device: torch.device, dtype: torch.dtype
) -> tuple[KVCache, tuple[Tensor, Tensor, Tensor]]:
    """One layer's cache filled with random pages, with an open chunk, and that chunk's q, k and v."""
    g = replace(geometry, layers=1)
    cache = KVCache(spec, g, device, dtype)
    generator = torch.Generator(device).manual_seed(0)

    def random(n: int) -> Tensor:
        shape = (g.batch, g.chunk_frames, g.tokens, n, g.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    pages = spec.capacity(g.chunk_frames)
    for _ in range(-(-pages // g.chunk_frames)):
        cache.begin(g.chunk_frames)
        with cache.committing():
            k, v = (random(g.kv_heads).permute(0, 3, 1, 2, 4) for _ in range(2))
            cache.write(0, k, v)
    cache.begin(g.chunk_frames)
    return cache, (random(heads), random(g.kv_heads), random(g.kv_heads))


def _key(
    spec: CacheSpec, geometry: CacheGeometry, heads: int, device: torch.device, dtype: torch.dtype,
    paths: list[ReadPath],
) -> str:  # fmt: skip
    """Everything that a measurement depends on, as text."""
    parts = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": jit.triton.__version__ if jit.triton else None,
        "kernels": KERNELS,
        "cache": str(spec),
        "geometry": asdict(replace(geometry, layers=1)),
        "heads": heads,
        "dtype": str(dtype),
        "paths": [str(path) for path in paths],
    }
    return json.dumps(parts, sort_keys=True)


def _remembered(key: str, paths: list[ReadPath], measure: Measure) -> ReadPath:
    """The fastest path, from the file of measurements or measured now."""
    file = cache_file()
    known = _load(file)
    if (found := known.get(key)) and all(str(path) in found for path in paths):
        times = found
    else:
        times = {str(path): _time(measure, path) for path in paths}
        _store(file, {**_load(file), key: times})
    best = min(paths, key=lambda path: times[str(path)])
    if times[str(best)] == float("inf"):
        raise InputError(f"none of the read paths {', '.join(times)} runs on this machine; run vidkv doctor")
    return best


def _time(measure: Measure, path: ReadPath) -> float:
    """A path that this GPU or this torch cannot run is infinitely slow."""
    try:
        return measure(path)
    except jit.CANNOT_RUN:
        return float("inf")


def cache_file() -> Path:
    """Where measurements are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vidkv" / "read_paths.json"


def _load(file: Path) -> dict[str, dict[str, float]]:
    """What was measured; nothing where the file is missing or damaged."""
    try:
        known: Any = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(known, dict) and all(
        isinstance(times, Mapping) and all(isinstance(t, float) and t >= 0 for t in times.values())
        for times in known.values()
    )
    return known if whole else {}


def _store(file: Path, known: dict[str, dict[str, float]]) -> None:
    """Keep measurements; where that is not possible they are made again next time."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(file)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
