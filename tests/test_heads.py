"""Which heads read the history: what is kept of it, and whose it must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import build_pipeline, build_rollout, build_transformer
from vidkv.cache import CacheSpec
from vidkv.errors import CheckpointError, InputError, OutputError, StateError
from vidkv.heads import FILE, checked, head_order, read_shares, require_shares, write_shares
from vidkv.pipeline import CausalVideoPipeline
from vidkv.state import load_rollout, save_rollout

SHARES = [[0.25, 0.75], [0.5, 0.125]]


def test_order_is_from_the_least_on_and_stable() -> None:
    assert head_order([[0.3, 0.1, 0.3, 0.2], [0.0, 1.0, 0.5, 0.5]]) == ((1, 3, 0, 2), (0, 2, 3, 1))
    assert head_order(None) == ()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_shares(tmp_path) is None
    assert write_shares(tmp_path, [[1 / 3, 1]], {"seeds": 4}) == tmp_path / FILE
    assert read_shares(tmp_path) == [[0.33333, 1.0]]
    assert json.loads((tmp_path / FILE).read_text())["seeds"] == 4
    with pytest.raises(OutputError, match="cannot be written"):
        write_shares(tmp_path / "nowhere", SHARES, {})


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"history_share": [[]]}', '{"history_share": [[1.5]]}', '{"history_share": [[NaN]]}',
     '{"history_share": [["a"]]}', '{"history_share": 3}', "{"],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=FILE):
        read_shares(tmp_path)


def test_shares_of_another_model(tmp_path: Path) -> None:
    config = build_transformer(num_attention_heads=4, num_key_value_heads=2).config
    assert checked(SHARES, config, tmp_path) == SHARES and checked(None, config, tmp_path) is None
    for other in (SHARES[:1], [[0.1], [0.2]]):
        with pytest.raises(CheckpointError, match="measure them anew"):
            checked(other, config, tmp_path)


def test_they_are_asked_for_by_local_heads_alone(tmp_path: Path) -> None:
    assert require_shares(tmp_path, CacheSpec(), "mine") is None
    with pytest.raises(InputError, match=r"local_heads=1.*eval heads --model mine --write"):
        require_shares(tmp_path, CacheSpec(local_heads=1), "mine")
    write_shares(tmp_path, SHARES, {})
    assert require_shares(tmp_path, CacheSpec(local_heads=1), "mine") == SHARES
    assert require_shares(tmp_path, CacheSpec(), "mine") is None


def test_a_pipeline_goes_by_what_lies_in_its_folder(tmp_path: Path) -> None:
    build_pipeline().save_pretrained(tmp_path)
    assert CausalVideoPipeline.from_pretrained(tmp_path).transformer.history_share is None
    write_shares(tmp_path, SHARES, {})
    pipe = CausalVideoPipeline.from_pretrained(tmp_path)
    cache = pipe.rollout(cache="local_heads=1").cache
    assert cache.geometry.head_order == ((0, 1), (1, 0)) and cache.nbytes * 2 == pipe.rollout().cache.nbytes
    assert cache.heads is not None and [kept.tolist() for kept, _ in cache.heads] == [[1], [0]]
    write_shares(tmp_path, SHARES[:1], {})
    with pytest.raises(CheckpointError, match="measure them anew"):
        CausalVideoPipeline.from_pretrained(tmp_path)


def test_a_rollout_is_resumed_bit_for_bit_and_not_with_other_heads(tmp_path: Path) -> None:
    transformer = build_transformer()
    transformer.history_share = SHARES
    rollout = build_rollout("int8,window=9,sink=2,local_heads=1", transformer=transformer)
    for _ in range(3):
        rollout.step_chunk()
    save_rollout(rollout, tmp_path / "a")
    other = build_rollout(rollout.cache.spec, transformer=transformer, seeds=(8,))
    load_rollout(other, tmp_path / "a")
    assert torch.equal(other.step_chunk().latents, rollout.step_chunk().latents)
    transformer.history_share = SHARES[::-1]
    with pytest.raises(StateError, match="its heads were measured anew"):
        load_rollout(build_rollout(rollout.cache.spec, transformer=transformer), tmp_path / "a")
