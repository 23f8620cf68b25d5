"""`vidkv eval heads`: shares against a dense softmax, what they cost, and the control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.apps.commandline import run
from tests.cache.test_evidence import chunk
from tests.cache.test_evidence import run as commit
from tests.tiny import build_geometry, build_pipeline, build_rollout, build_transformer, noise
from vidkv.apps import head_shares
from vidkv.apps.head_shares import (
    MostReadingHeads,
    Options,
    _Shares,
    evaluate_pipeline,
    history_shares,
    table,
)
from vidkv.attention import CachedAttention
from vidkv.cache import CacheSpec, KVCache
from vidkv.errors import InputError
from vidkv.kernels.rotary import rotate_chunk


def silent(*_: object) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    pipe = build_pipeline(prompt_grammar=None, first_chunk_steps=(1000, 500))
    found = evaluate_pipeline(pipe, Options(seeds=3, chunks=4, batch=2), silent)
    assert pipe.transformer.history_share == found["history_share"]
    return found


def test_shares_are_those_of_one_softmax() -> None:
    geometry = build_geometry(layers=1, kv_heads=2, head_dim=12, height=2, width=3, chunk_frames=2, batch=2)
    cache = KVCache(CacheSpec.parse("fp32,window=14,sink=2,segment=3"), geometry)
    commit(cache, [chunk(i, geometry) for i in range(4)])
    cache.begin(2)
    reader = CachedAttention(cache)
    shares = _Shares(reader)
    q, k, v = chunk(9, geometry)
    out = shares.layer(0)(q, k, v)
    assert torch.equal(out, CachedAttention(cache).layer(0)(q, k, v))
    keys = torch.cat([cache.read(0, segment, turn)[0] for segment, turn in reader.segments], 2)
    history = keys.shape[2]
    q, k = (rotate_chunk(x, reader.own, reader.spatial).double() for x in (q, k))
    keys = torch.cat([keys.double(), k], 2).repeat_interleave(2, 1)
    weights = (q @ keys.transpose(-1, -2) / 12**0.5).softmax(-1)[..., :history].sum(-1)
    torch.testing.assert_close(
        shares.sums[0], weights.unflatten(1, (2, 2)).mean((0, 2, 3)), rtol=1e-5, atol=0
    )
    assert 0.5 < float(shares.sums.mean()) < 1


def test_all_noise_levels_count_and_nothing_is_left_behind() -> None:
    rollout = build_rollout("fp32,window=9,sink=2", transformer=build_transformer())
    for seed in range(2):
        rollout.append(noise(1, 3, 4, 4, 6, seed=seed))
    clean = noise(1, 3, 4, 4, 6, seed=7)
    found = history_shares(rollout, clean)
    assert found.shape == (2, 2) and ((found > 0) & (found < 1)).all()
    assert torch.equal(history_shares(rollout, clean), found)
    rollout.append(clean)
    assert rollout.next_frame == 9


def test_the_control_takes_the_others() -> None:
    geometry = build_geometry(kv_heads=3, head_order=((2, 0, 1), (1, 2, 0)))
    spec = CacheSpec(local_heads=1)
    for kind, local in ((KVCache, [[2], [1]]), (MostReadingHeads, [[1], [0]])):
        cache = kind(spec, geometry)
        assert cache.heads is not None and [other.tolist() for _, other in cache.heads] == local


def test_what_is_reported(report: dict[str, Any]) -> None:
    shares = torch.tensor(report["history_share"])
    assert shares.shape == (2, 2) and ((shares > 0) & (shares < 1)).all()
    (cost,) = report["costs"]
    assert cost["local_heads"] == 1 and cost["fewer"] == 2
    assert cost["attention_error"] > 0 and cost["control"]["attention_error"] > 0
    assert report["control_passes"] == cost["control"]["moved"]
    said = table(report)
    assert f"{report['history_share'][1][0]:.3f}" in said and "local_heads=1: 2.00x fewer bytes" in said
    json.dumps(report, allow_nan=False)


def test_one_head_for_all_leaves_nothing_to_try() -> None:
    pipe = build_pipeline(prompt_grammar=None)
    pipe.register_modules(transformer=build_transformer(num_key_value_heads=1))
    found = evaluate_pipeline(pipe, Options(seeds=2, chunks=2), silent)
    assert found["costs"] == [] and [len(layer) for layer in found["history_share"]] == [1, 1]


def test_too_short() -> None:
    with pytest.raises(InputError, match="chunks=1"):
        evaluate_pipeline(build_pipeline(), Options(chunks=1), silent)


def test_it_is_written_where_the_control_passes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    report: dict[str, Any],
) -> None:
    build_pipeline().save_pretrained(tmp_path)
    for passes, code in ((False, 1), (True, 0)):
        given = report | {"control_passes": passes}
        monkeypatch.setattr(head_shares, "evaluate_pipeline", lambda *_, given=given: dict(given))
        found, out, err = run(capsys, "eval", "heads", "--model", str(tmp_path), "--device", "cpu", "--write")
        assert found == code and (tmp_path / "heads.json").exists() == passes
        assert ("no ranking" in err) != passes and ("written to" in out) == passes
    kept = json.loads((tmp_path / "heads.json").read_text())
    assert kept["cache"] == report["cache"] and len(kept["history_share"]) == 2
