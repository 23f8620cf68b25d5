"""The stock loop is worth comparing with only if it makes the same video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tiny import LATENT_SIZE, build_rollout, build_text, build_transformer, noise, relative_l2
from vidkv.apps.stock_loop import StockAttention, StockLoop, stock_phases
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.kernels.rope import spatial_phases, temporal_phases
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

CHUNKS = 6
SCHEDULE = FlowSchedule(steps=(1000, 500))


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        ("fp32,window=9,sink=0,positions=absolute", {}),
        ("fp32,window=7,sink=2,positions=absolute", {}),
        ("fp32,window=10,sink=1,positions=absolute", {"num_key_value_heads": 1}),
    ],
)
def test_latents_are_those_of_a_rollout_while_the_window_rolls(spec: str, config: dict[str, Any]) -> None:
    transformer = build_transformer(**config)
    text, cache = build_text(transformer), CacheSpec.parse(spec)
    rollout = build_rollout(cache, transformer=transformer, text=text, schedule=SCHEDULE)
    stock = StockLoop(transformer, text, cache, SCHEDULE, LATENT_SIZE, [7])
    stock.choose_backend()
    for chunk in range(CHUNKS):
        wanted, found = rollout.denoise(), stock.denoise()
        assert relative_l2(found, wanted) <= 1e-5, chunk
        rollout.append(wanted)
        stock.append(wanted)
    assert stock.attentions[0].filled == [cache.window * 6] * 2


def test_guided_latents_are_those_of_a_guided_rollout() -> None:
    transformer = build_transformer()
    text, negative = (build_text(transformer, seed=seed) for seed in (0, 1))
    schedule = replace(SCHEDULE, guidance=3.0)
    spec = CacheSpec.parse("fp32,window=7,sink=0,positions=absolute")
    rollout = build_rollout(spec, transformer=transformer, text=text, schedule=schedule)
    rollout.set_text(text, negative)
    stock = StockLoop(transformer, text, spec, schedule, LATENT_SIZE, [7], negative=negative)
    for chunk in range(4):
        wanted, found = rollout.denoise(), stock.denoise()
        assert relative_l2(found, wanted) <= 1e-5, chunk
        rollout.append(wanted)
        stock.append(wanted)
    assert stock.kv_bytes == 2 * stock.attentions[0].nbytes


def test_latents_are_those_of_a_rollout_that_recomputes_its_context() -> None:
    transformer = build_transformer()
    text, spec = build_text(transformer), CacheSpec.parse("fp32,window=6,sink=0,positions=relative")
    rollout = Rollout(transformer, text, spec, SCHEDULE, LATENT_SIZE, [7], 3, recompute_context=True)
    stock = StockLoop(transformer, text, spec, SCHEDULE, LATENT_SIZE, [7], recompute_context=True)
    for chunk in range(4):
        wanted, found = rollout.denoise(), stock.denoise()
        assert relative_l2(found, wanted) <= 1e-5, chunk
        rollout.append(wanted)
        stock.append(wanted)


def test_a_loop_that_recomputes_its_context_depends_on_nothing_older() -> None:
    """Two loops with different pasts but the same last frames go on alike."""
    transformer = build_transformer()
    text, spec = build_text(transformer), CacheSpec.parse("fp32,window=6,sink=0,positions=absolute")
    chunks = [noise(1, 3, *LATENT_SIZE, seed=seed) for seed in range(3)]
    results = []
    for past in (chunks[:2], [chunks[2], chunks[1]], [chunks[1], chunks[0]]):
        loop = StockLoop(transformer, text, spec, SCHEDULE, LATENT_SIZE, [7], recompute_context=True)
        for latents in past:
            loop.append(latents)
        results.append(loop.denoise())
    assert torch.equal(results[0], results[1])
    assert relative_l2(results[0], results[2]) > 1e-3


def test_the_window_holds_sinks_and_newest_frames_in_order() -> None:
    """Frame f of a layer has values f; noisy passes leave nothing behind."""
    geometry = CacheGeometry(layers=1, kv_heads=2, head_dim=24, height=2, width=3)
    attention = StockAttention(geometry, 8, 2, torch.device("cpu"), torch.float32)
    attend = attention.layer(0)
    for start in range(0, 15, 3):
        attention.begin(start, 3)
        frames = torch.arange(start, start + 3.0).view(1, 3, 1, 1, 1).expand(1, 3, 6, 2, 24)
        for offset in (1000, 2000, 0):
            attend(frames, frames, frames + offset)
    held = attention.values[0][0, :, 0, 0].view(8, 6)
    assert held[:, 0].tolist() == [0, 1, 9, 10, 11, 12, 13, 14]
    assert bool((held == held[:, :1]).all())


def test_phases_are_those_of_rotary_embedding() -> None:
    """Against the kernels' own, which are tested against diffusers'."""
    found = stock_phases(24, range(5, 7), 2, 3).view(2, 6, 12)
    time, space = temporal_phases(24, torch.arange(5, 7), torch.float64), spatial_phases(24, 2, 3)
    assert torch.allclose(found[..., :4], time[:, None].expand(-1, 6, -1))
    assert torch.allclose(found[..., 4:].to(torch.complex64), space.expand(2, -1, -1))
