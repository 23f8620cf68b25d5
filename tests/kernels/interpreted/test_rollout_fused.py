"""Rollouts on the fused read: the same video as by a two-pass read, and the same path after a restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import LATENT_SIZE, build_rollout, build_transformer, noise, relative_l2
from vidkv import dispatch
from vidkv.attention import CachedAttention
from vidkv.cache import KVCache
from vidkv.errors import InputError, StateError
from vidkv.kernels import paged_attention
from vidkv.kernels.jit import interpreted
from vidkv.kernels.paged_attention import PageRun
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.rollout import Rollout
from vidkv.state import load_rollout, save_rollout

Mistake = Callable[[PageRun], PageRun]
WINDOW = "window=9,sink=2"
FORMATS = {
    "fp32": 1e-5,
    "bf16": 1e-5,
    "int8": 1e-3,
    "int8,value_scale=channel": 1e-3,
    "int8,keep_newest": 1e-3,
    "int8,keep_newest,keep_sinks": 1e-3,
    "int8,positions=absolute": 1e-3,
    "fp32,local_heads=1": 1e-5,
    "int8,keep_newest,local_heads=1": 1e-3,
}
"""rel-L2 between the two read paths: sums in another order, and for codes those of the queries."""


def model_of(**config: int) -> CausalWanTransformer3DModel:
    """Heads of 32 channels, the fewest that the kernel takes, and for the sake of time one layer."""
    model = build_transformer(**({"attention_head_dim": 32, "num_layers": 1} | config))
    model.history_share = [[0.5, 0.25]] * model.config.num_layers
    return model


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return model_of()


@pytest.fixture(scope="module")
def narrow() -> CausalWanTransformer3DModel:
    """One head: half the time, where how heads are told apart is not the question."""
    return model_of(num_attention_heads=1)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.FORCE, "fused")


def rollout_on(
    path: str,
    patch: pytest.MonkeyPatch,
    format: str,
    model: CausalWanTransformer3DModel,
    seeds: tuple[int, ...] = (7,),
) -> Rollout:
    patch.setenv(dispatch.FORCE, path)
    rollout = build_rollout(f"{format},{WINDOW}", transformer=model, seeds=seeds)
    assert rollout.path.name == path
    return rollout


def clip(chunks: int, batch: int = 1) -> list[Tensor]:
    return [noise(batch, 3, *LATENT_SIZE, seed=40 + i) for i in range(chunks)]


def advance(rollout: Rollout, chunks: int) -> list[Tensor]:
    return [rollout.step_chunk().latents for _ in range(chunks)]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def no_mean(run: PageRun) -> PageRun:
    return replace(run, mean=None if run.mean is None else torch.zeros_like(run.mean))


def wrong_distance(run: PageRun) -> PageRun:
    """As if the pages stood after the chunk."""
    return replace(run, temporal=run.temporal.conj().resolve_conj())


def wrong_pages(run: PageRun) -> PageRun:
    return replace(run, slots=run.slots.flip(0))


def test_these_tests_are_interpreted() -> None:
    assert interpreted()


class TestBesideTwoPass:
    """Teacher-forced: both are given the same clean latents, so that differences do not add up."""

    def agree(
        self,
        patch: pytest.MonkeyPatch,
        format: str,
        model: CausalWanTransformer3DModel,
        bound: float,
        seeds: tuple[int, ...] = (7,),
    ) -> tuple[Rollout, Rollout]:
        fused, plain = (rollout_on(path, patch, format, model, seeds) for path in ("fused", "two-pass"))
        for given in clip(4, len(seeds)):
            for rollout in (fused, plain):
                rollout.append(given)
        found, wanted = fused.denoise(), plain.denoise()
        assert relative_l2(found, wanted) <= bound
        assert 0 < relative_l2(found, wanted), "another order of sums leaves its mark: both paths ran"
        for name in ("pages_read", "lossy_pages_read"):
            assert getattr(fused.cache, name) == getattr(plain.cache, name)
        assert fused.cache.pages_read > 0
        assert (fused.cache.lossy_pages_read > 0) is format.startswith("int")
        fused.cache.check_integrity()
        return fused, plain

    @pytest.mark.parametrize("format", FORMATS)
    def test_formats(
        self, format: str, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.agree(monkeypatch, format, model, FORMATS[format])

    def test_three_kinds_of_pages(
        self, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And what each frame gets of the attention, by which frames leave."""
        format = "int4,newer=int8:1,keep_newest,keep_sinks=false,policy=h2o,fit=largest"
        fused, plain = self.agree(monkeypatch, format, model, FORMATS["int8"])
        frames = fused.cache.layout.resident
        assert len({fused.cache.format_of(frame) for frame in frames}) == 3
        scores = plain.cache.layout.scores
        assert fused.cache.layout.scores == pytest.approx(scores, rel=1e-3)
        assert len({round(score, 2) for score in scores.values()}) == len(scores) > 2

    @pytest.mark.parametrize("format", ["fp32", "int8,keep_newest"])
    def test_grouped_heads(self, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of(num_attention_heads=4, num_key_value_heads=1)
        self.agree(monkeypatch, format, model, FORMATS[format])

    def test_two_layers_and_a_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the first layer reads goes into the pages of the second."""
        format = "int8,keep_newest,keep_sinks"
        self.agree(monkeypatch, format, model_of(num_layers=2), FORMATS[format], seeds=(7, 8))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of().to(dtype)
        bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        self.agree(monkeypatch, "int8", model, bound)

    def test_codes_of_keys_are_the_same(
        self, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first layer's pages depend on the given latents alone, not on how pages are read."""
        stored = []
        for path in ("fused", "two-pass"):
            rollout = rollout_on(path, monkeypatch, "int8", model)
            for given in clip(3):
                rollout.append(given)
            stored.append({name: x[0] for name, x in rollout.cache.pools["pages"].storage.items()})
        for name, x in stored[0].items():
            assert torch.equal(x, stored[1][name]), name

    @pytest.mark.parametrize("mistake", [no_mean, wrong_distance, wrong_pages])
    def test_would_notice(
        self, mistake: Mistake, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A control: history is a small part of what these models put out, and the bounds must see it."""
        rollout = rollout_on("fused", monkeypatch, "int8,keep_newest", model)
        for given in clip(4):
            rollout.append(given)
        wanted, pages = rollout.denoise(), KVCache.pages
        monkeypatch.setattr(KVCache, "pages", lambda *arguments: mistake(pages(*arguments)))
        assert relative_l2(rollout.denoise(), wanted) > 5 * FORMATS["int8"]

    def test_one_launch_per_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A read of pages, kept pages and the chunk's own keys is one call of the kernel."""
        calls, attend = [], paged_attention._attend

        def counted(*args: object) -> object:
            calls.append(args)
            return attend(*args)

        monkeypatch.setattr(paged_attention, "_attend", counted)
        monkeypatch.setattr(CachedAttention, "_read_segments", None)
        rollout = rollout_on("fused", monkeypatch, "int8,keep_newest,keep_sinks", model_of(num_layers=2))
        for given in clip(2):
            rollout.append(given)
        calls.clear()
        rollout.append(clip(1)[0])
        assert len(calls) == 2


@pytest.mark.usefixtures("fused")
class TestGoingOn:
    """Bit for bit, by the path that the rollout began with."""

    @pytest.mark.parametrize("format", ["fp32", "int8", "int8,keep_newest,keep_sinks"])
    def test_saved_and_loaded(self, format: str, narrow: CausalWanTransformer3DModel, tmp_path: Path) -> None:
        rollout = build_rollout(f"{format},{WINDOW}", transformer=narrow)
        advance(rollout, 2)
        save_rollout(rollout, tmp_path / "a")
        other = build_rollout(f"{format},{WINDOW}", transformer=narrow, seeds=(99,))
        load_rollout(other, tmp_path / "a")
        assert other.path == rollout.path and other.path.name == "fused"
        assert equal(advance(other, 2), advance(rollout, 2))

    @pytest.mark.parametrize("format", ["fp32", "int8,keep_newest"])
    def test_forked(self, format: str, narrow: CausalWanTransformer3DModel) -> None:
        def fresh() -> Rollout:
            return build_rollout(f"{format},{WINDOW}", transformer=narrow)

        wanted = advance(fresh(), 4)
        trunk = fresh()
        advance(trunk, 2)
        branch = trunk.fork()
        assert branch.path == trunk.path
        assert equal(advance(branch, 2), wanted[2:])
        assert equal(advance(trunk, 2), wanted[2:])

    def test_twice_is_the_same(self, narrow: CausalWanTransformer3DModel) -> None:
        first, second = (build_rollout(f"int8,{WINDOW}", transformer=narrow) for _ in range(2))
        assert equal(advance(first, 4), advance(second, 4))

    def test_the_saved_path_wins(
        self, narrow: CausalWanTransformer3DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What this machine would choose for a new rollout does not matter to an old one."""
        rollout = build_rollout(f"int8,{WINDOW}", transformer=narrow)
        advance(rollout, 2)
        save_rollout(rollout, tmp_path / "a")
        monkeypatch.delenv(dispatch.FORCE)
        other = build_rollout(f"int8,{WINDOW}", transformer=narrow)
        assert other.path.name == "two-pass"
        load_rollout(other, tmp_path / "a")
        assert other.path == rollout.path and other.path.name == "fused"
        assert equal(advance(other, 2), advance(rollout, 2))

    def test_refused_where_it_cannot_run(
        self, narrow: CausalWanTransformer3DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Going on by another path would be another video; nothing has changed after the refusal."""
        rollout = build_rollout(f"int8,{WINDOW}", transformer=narrow)
        advance(rollout, 1)
        save_rollout(rollout, tmp_path / "a")
        monkeypatch.delenv(dispatch.FORCE)
        monkeypatch.setattr("vidkv.dispatch.jit.interpreted", lambda: False)
        other = build_rollout(f"int8,{WINDOW}", transformer=narrow)
        before = other.path
        with pytest.raises(StateError, match=r"the read path fused 32x32, 4 warps.*needs an NVIDIA GPU"):
            load_rollout(other, tmp_path / "a")
        assert (other.path, other.chunk, other.next_frame) == (before, 0, 0)


class TestChoice:
    def test_not_without_being_asked(
        self, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Interpretation is for trials; it is not fast."""
        monkeypatch.delenv(dispatch.FORCE, raising=False)
        assert build_rollout(f"int8,{WINDOW}", transformer=model).path.name == "two-pass"

    @pytest.mark.usefixtures("fused")
    def test_heads_that_it_does_not_take(self) -> None:
        with pytest.raises(InputError, match="heads of 32, 64, 128, 256 channels, not 24"):
            build_rollout(f"int8,{WINDOW}", transformer=build_transformer())
