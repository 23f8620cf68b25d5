"""The embedded model on a GPU: one read path is bit for bit itself, and two agree on the next chunk."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import relative_l2
from vidkv import CacheSpec, CausalVideoPipeline
from vidkv.rollout import Rollout

pytestmark = pytest.mark.gpu
PROMPT = "a red circle and a blue square bouncing"


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("bounce", dtype=torch.bfloat16).to("cuda")


def start(pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch, path: str) -> Rollout:
    monkeypatch.setenv("VIDKV_ATTENTION", path)
    spec = CacheSpec.of(pipe.default_cache().model_dump() | {"format": "int8"})
    rollout = pipe.rollout(cache=spec, seed=3, decode=False)
    pipe.set_prompt(rollout, [PROMPT])
    assert rollout.path.name == path
    return rollout


@pytest.mark.parametrize("path", ["two-pass", "fused"])
def test_twice_is_bit_for_bit(pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Also when the second is saved and restored on the way."""
    first, second = (start(pipe, monkeypatch, path) for _ in range(2))
    wanted = [first.step_chunk().latents for _ in range(9)]
    for _ in range(8):
        second.step_chunk()
    third = start(pipe, monkeypatch, path)
    third.restore(*second.state())
    assert torch.equal(third.step_chunk().latents, wanted[-1])
    assert third.path == first.path


def test_paths_agree_on_the_next_chunk(pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same history; free rollouts drift apart, as any two roundings make them."""
    fused, two_pass = start(pipe, monkeypatch, "fused"), start(pipe, monkeypatch, "two-pass")
    for _ in range(8):
        latents = two_pass.denoise()
        for rollout in (fused, two_pass):
            rollout.append(latents)
    assert relative_l2(fused.denoise(), two_pass.denoise()) <= 2e-2
