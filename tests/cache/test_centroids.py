"""Keys coded against the nearest of a few means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cache.oracle import packed
from tests.cache.test_evidence import run
from tests.tiny import build_geometry, generator, noise, relative_l2
from vidkv.attention import CachedAttention
from vidkv.cache import CacheSpec, KVCache, planned_bytes
from vidkv.cache.centroids import centroids_of, nearest, taken_from
from vidkv.kernels.rope import rotate_first, rotate_spatial, spatial_phases, temporal_phases

GEOMETRY = build_geometry(layers=2, kv_heads=2, head_dim=32, height=3, width=3, chunk_frames=2, batch=2)
BARE = "window=12,sink=2,newer=,keep_sinks=false"


def clustered(seed: int, spread: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a chunk whose keys lie around four points of each video and head, whatever their place."""
    points = 3 * noise(2, 4, 2, 32, seed=1)
    drawn = torch.randint(4, (2, 2, 9), generator=generator(seed))
    k = points[torch.arange(2)[:, None, None], drawn] + spread * noise(2, 2, 9, 2, 32, seed=seed + 1)
    # they are coded after they have been turned by row and column
    back = rotate_spatial(k, spatial_phases(32, 3, 3).conj())
    return noise(2, 2, 9, 4, 32, seed=seed + 2), back, noise(2, 2, 9, 2, 32, seed=seed + 3)


def cache_of(settings: str, chunks: int = 5) -> KVCache:
    cache = KVCache(CacheSpec.parse(settings), GEOMETRY)
    run(cache, [clustered(10 * i) for i in range(chunks)])
    return cache


def test_points_that_lie_apart_are_found() -> None:
    points = 5 * noise(2, 3, 8, seed=4)
    drawn = torch.randint(3, (2, 50), generator=generator(1))
    keys = points[torch.arange(2)[:, None], drawn] + 0.01 * noise(2, 50, 8, seed=5)
    found = centroids_of(keys, 3)
    assert found.dtype == torch.float16 and torch.equal(found, centroids_of(keys, 3))
    for video in range(2):
        assert sorted(torch.cdist(points[video], found[video].float()).argmin(1).tolist()) == [0, 1, 2]
        assert float(torch.cdist(points[video], found[video].float()).amin(1).max()) < 0.05
    index = nearest(keys, found)
    assert torch.equal(index, torch.cdist(keys, found.float()).argmin(-1).to(torch.uint8))
    near = taken_from(found[None], index[None, :, None])[0, :, 0]
    assert float((near - keys).norm(dim=-1).max()) < 0.1


def test_more_centroids_than_keys() -> None:
    keys = noise(1, 3, 8)
    found = centroids_of(keys, 6)
    assert found.shape == (1, 6, 8) and found.isfinite().all()
    assert float(torch.cdist(keys, found.float()).amin(-1).max()) < 1e-2


def test_pages_hold_what_is_left_and_which_was_taken() -> None:
    """Against the codes of an oracle, clipping nothing and turned by no matrix."""
    cache = cache_of(f"int2,{BARE},centroids=4,hadamard=false,fit=largest", 1)
    keys = rotate_spatial(clustered(0)[1], spatial_phases(32, 3, 3)).permute(0, 3, 1, 2, 4)
    means = cache.means["centroids"][1]
    assert torch.equal(means, centroids_of(keys.flatten(2, 3), 4))
    pool = cache.pools["pages"]
    slots = torch.tensor([cache.table[frame].slot for frame in (0, 1)])
    index = pool.storage["k_nearest"][1, slots].movedim(0, 2)
    distances = (keys[..., None, :] - means.float()[:, :, None, None]).norm(dim=-1)
    assert torch.equal(index.long(), distances.argmin(-1)) and len(index.unique()) == 4
    base = taken_from(means, index)
    wanted = base + packed(keys - base, 2)
    found, _ = pool.format.read(pool.storage, 1, slots, torch.float32, None, means)
    assert relative_l2(found, wanted) < 1e-6
    phases = temporal_phases(32, torch.tensor([-2, -1]))
    turned, _ = pool.format.read(pool.storage, 1, slots, torch.float64, phases, means)
    assert relative_l2(turned, rotate_first(wanted, phases[:, None])) < 1e-6


@pytest.mark.parametrize("format", ["int2", "k4v2", "int4"])
def test_what_is_read_is_nearer_to_the_truth(format: str) -> None:
    outputs = {}
    for settings in ("fp32,window=12,sink=2", f"{format},{BARE}", f"{format},{BARE},centroids=4"):
        cache = cache_of(settings)
        cache.begin(2)
        values = [cache.read(1, segment)[0] for segment in cache.segments]
        outputs[settings] = torch.cat(values, 2)
    exact, plain, coded = outputs.values()
    assert relative_l2(coded, exact) < 0.25 * relative_l2(plain, exact)


@pytest.mark.parametrize(
    "settings",
    ["", ",newer=int8:3,keep_sinks", ",keep_tokens=0.5", ",keep_tokens=0.5,keep_by=mass", ",jensen"],
)
def test_bytes_forks_and_states(settings: str) -> None:
    given = f"int2,window=12,sink=2,newer=,keep_sinks=false,centroids=8{settings}"
    parts = dict(part.partition("=")[::2] for part in given.split(","))
    spec = ",".join(f"{name}={value}" if value or name == "newer" else name for name, value in parts.items())
    cache = cache_of(spec)
    assert cache.nbytes == planned_bytes(cache.spec, GEOMETRY, torch.float32)
    plain = planned_bytes(cache.spec.model_copy(update={"centroids": 0}), GEOMETRY, torch.float32)
    pages = cache.plan["pages"]
    # a byte a token, and centroids in 16 bits
    assert cache.nbytes - plain == 2 * 4 * (pages[1] * pages[0].tokens + 8 * 32 * 2)
    other = KVCache(cache.spec, GEOMETRY)
    other.restore(*cache.state_tensors())
    answers = []
    for one in (cache, other, cache.fork()):
        run(one, [clustered(70)])
        one.begin(2)
        answers.append(CachedAttention(one).layer(1)(*clustered(80)))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
