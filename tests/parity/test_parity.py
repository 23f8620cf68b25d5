"""Our loop beside the stock loops, on small random weights: the same latents from the same noise.

`Case` describes a rollout once; `stock` makes it with the dense oracle, `ours` with `Rollout`. Each family of
cases has a control: the same comparison with one setting of ours made wrong must fail by a wide margin.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.oracle import DenseCache, KreaLoop, Recorder, StockLoop, StockTransformer, seeded
from tests.tiny import LATENT_SIZE, TEXT_DIM, build_transformer, noise, relative_l2
from vidkv.cache import CacheSpec
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.noise import StockNoise
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

BOUND, WRONG = 1e-5, 1e-3
SEED = 3


@dataclass(frozen=True)
class Case:
    """A rollout. window None: nothing leaves; switch: before which frame, and whether sinks are kept."""

    frames: int = 27
    window: int | None = None
    sink: int = 0
    marks: tuple[int, ...] = (1000, 750, 500, 250)
    first_marks: tuple[int, ...] | None = None
    shift: float = 5.0
    warp: bool = True
    chunk_frames: int = 3
    first_chunk_frames: int | None = None
    prefix: int = 0
    batch: int = 1
    unipc: bool = False
    guidance: float = 1.0
    given: int = 0
    switch: tuple[int, bool] | None = None
    strategy: str = "recache"
    recompute: bool = False
    positions: str = "absolute"
    heads: tuple[int, int] = (2, 24)

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


@cache
def network(heads: tuple[int, int]) -> CausalWanTransformer3DModel:
    """Wan's width of the timestep embedding: a narrower one forgives a rounded phase."""
    return build_transformer(num_attention_heads=heads[0], attention_head_dim=heads[1], freq_dim=256)


def words(case: Case, seed: int) -> Tensor:
    return noise(case.batch, 5, TEXT_DIM, seed=100 + seed)


def clean(case: Case, frames: int) -> Tensor:
    """Latents that a user brings."""
    return noise(case.batch, frames, *LATENT_SIZE, seed=50)


def stock(case: Case) -> tuple[Tensor, Recorder]:
    """The latents by the oracle, and what it drew."""
    loop = (KreaLoop if case.recompute else StockLoop)(
        StockTransformer(network(case.heads)),
        words(case, 0),
        case.window,
        case.sink,
        case.marks,
        case.first_marks,
        case.shift,
        case.warp,
        case.chunk_frames,
        case.first_chunk_frames,
        words(case, 1) if case.guidance != 1 else None,
        case.guidance,
        len(case.marks) if case.unipc else None,
    )
    with torch.no_grad(), seeded(SEED):
        draws = Recorder.start(case.batch, case.frames, *LATENT_SIZE)
        if case.prefix:
            loop.prefill(clean(case, case.prefix))
        done = 0
        for index, part in enumerate(draws.initial.split(loop.schedule(case.frames), 1)):
            if case.switch and done >= case.switch[0] and torch.equal(loop.text, words(case, 0)):
                loop.switch(words(case, 2), case.switch[1])
            loop.chunk(part, draws, clean(case, case.given) if case.given and not index else None)
            done += part.shape[1]
    return loop.latents, draws


def rollout(case: Case, **settings: Any) -> Rollout:
    """Ours, before its first chunk."""
    window = case.window or 40
    made = Rollout(
        network(case.heads),
        words(case, 0),
        CacheSpec.parse(f"fp32,window={window},sink={case.sink},positions={case.positions}"),
        FlowSchedule(
            steps=case.marks,
            shift=case.shift,
            warp=case.warp,
            first_chunk_steps=case.first_marks,
            sampler="unipc" if case.unipc else "renoise",
            guidance=case.guidance,
        ),
        LATENT_SIZE,
        [SEED] * case.batch,
        case.chunk_frames,
        first_chunk_frames=case.first_chunk_frames,
        recompute_context=case.recompute,
        **settings,
    )
    if case.guidance != 1:
        made.set_text(words(case, 0), words(case, 1))
    if case.prefix:
        made.prefill(clean(case, case.prefix))
    return made


def ours(case: Case, draws: Recorder | None, **settings: Any) -> Tensor:
    """The latents by `Rollout`, from the oracle's draws, or its own if None."""
    with rollout(case, **settings) as made:
        parts = [clean(case, case.prefix)] if case.prefix else []
        done, index, switched = 0, 0, False
        while done < case.frames:
            if case.switch and done >= case.switch[0] and not switched:
                text = network(case.heads).encode_text(words(case, 2))
                made.switch(text, strategy=case.strategy, keep_sinks=case.switch[1], at_once=True)
                switched = True
            options: dict[str, Any] = {}
            if draws is not None:
                number = case.first_chunk_frames if not index and not case.prefix else None
                number = number or case.chunk_frames
                options = {"noise": draws.initial[:, done : done + number], "step_noise": draws.fresh[index]}
            if case.given and not index:
                options["given"] = clean(case, case.given)
            parts.append(made.step_chunk(**options).latents)
            done += parts[-1].shape[1]
            index += 1
    return torch.cat(parts, 1)


FEW_STEPS = {
    "nothing leaves, 7 chunks": Case(21, window=21),
    "nothing leaves, 9 chunks": Case(),
    **{f"window {w}, sink {s}": Case(window=w, sink=s) for w in (6, 7, 9) for s in (0, 1, 3)},
    "head_dim 128": Case(24, window=7, sink=1, heads=(2, 128)),
    "batch of two": Case(24, window=6, sink=1, batch=2),
    "shift 8": Case(21, window=9, sink=1, shift=8.0),
    "one step": Case(24, window=9, sink=1, marks=(1000,)),
    "two steps": Case(24, window=9, sink=1, marks=(1000, 500)),
}
CHUNKS = {
    "first frame alone": Case(25, window=9, sink=1, first_chunk_frames=1),
    "first frame alone, nothing leaves": Case(25, first_chunk_frames=1),
    "frame by frame": Case(9, window=6, sink=3, chunk_frames=1),
    "frame by frame, nothing leaves": Case(9, chunk_frames=1),
    "first chunk's steps": Case(
        10, window=6, marks=(1000, 500), first_marks=FlowSchedule().steps, chunk_frames=1
    ),
    "first chunk's steps, then one": Case(24, window=7, marks=(1000,), first_marks=FlowSchedule().steps),
}
UNWARPED = {
    "marks are timesteps": Case(24, window=9, sink=1, marks=(1000, 937, 833, 625), warp=False),
    "marks between levels": Case(24, window=9, sink=1, marks=(999, 751, 333, 111), warp=False),
}
PREFIXES = {
    "image": Case(24, window=9, sink=1, first_chunk_frames=1, prefix=1),
    "image, first chunk's steps": Case(
        24, window=7, marks=(1000,), first_marks=FlowSchedule().steps, first_chunk_frames=1, prefix=1
    ),
    "image, frame by frame": Case(9, window=6, sink=1, chunk_frames=1, prefix=1),
    "video of 6 frames": Case(24, window=9, sink=1, prefix=6),
    "video of 9 frames, longer than the window": Case(21, window=6, sink=3, prefix=9),
    "video of 7 frames, the first alone": Case(21, window=9, sink=3, first_chunk_frames=1, prefix=7),
}
GUIDED = {
    "8 steps": Case(24, window=9, sink=1, marks=tuple(range(1000, 0, -125)), unipc=True, guidance=5.0),
    "4 steps, nothing leaves": Case(21, unipc=True, guidance=3.0),
    "50 steps": Case(21, window=6, sink=3, marks=tuple(range(1000, 0, -20)), unipc=True, guidance=5.0),
    "unguided": Case(24, window=9, sink=1, unipc=True),
    "guided, first frame alone": Case(22, window=6, unipc=True, guidance=3.0, first_chunk_frames=1),
    "guided, from a video": Case(21, window=7, sink=3, unipc=True, guidance=3.0, prefix=6),
    "guided with fresh noise": Case(24, window=7, sink=1, guidance=3.0),
}
CLAMPED = {
    "chunks of 4": Case(28, window=12, sink=4, chunk_frames=4, unipc=True, given=1),
    "two frames given": Case(28, window=8, sink=4, chunk_frames=4, unipc=True, given=2),
    "guided": Case(21, window=9, sink=3, unipc=True, guidance=3.0, given=1),
}
SWITCHED = {
    f"window {w}, sink {s}, before frame {at}, sinks {'kept' if kept else 'new'}": Case(
        27, window=w, sink=s, switch=(at, kept)
    )
    for w, s, at, kept in [
        (9, 3, 15, False),
        (9, 3, 15, True),
        (12, 3, 15, False),
        (12, 3, 15, True),
        (6, 3, 12, True),
        (7, 1, 12, False),
        (9, 0, 12, False),
        # the window still holds the first frame
        (12, 3, 6, False),
        (12, 3, 9, True),
    ]
}
RECOMPUTED = {
    "window 6": Case(
        24, window=6, marks=(1000, 937, 833, 625), warp=False, recompute=True, positions="relative"
    ),
    "window 6, warped": Case(27, window=6, recompute=True, positions="relative"),
}
CASES = {
    f"{family}: {name}": case
    for family, cases in {
        "few steps": FEW_STEPS,
        "chunks": CHUNKS,
        "unwarped": UNWARPED,
        "prefix": PREFIXES,
        "UniPC": GUIDED,
        "clamped": CLAMPED,
        "switched": SWITCHED,
        "recomputed": RECOMPUTED,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_latents_equal_the_stock_loops(case: Case) -> None:
    wanted, draws = stock(case)
    found = ours(case, draws)
    assert found.shape == wanted.shape
    assert relative_l2(found, wanted) <= BOUND
    # the last chunk too, which carries what went wrong before it
    assert relative_l2(found[:, -case.chunk_frames :], wanted[:, -case.chunk_frames :]) <= BOUND


BASE = Case(window=9, sink=3)
STEPS = Case(21, window=9, sink=1, marks=(1000, 937, 833, 625), warp=False)
IMAGE = PREFIXES["image"]
CFG = GUIDED["4 steps, nothing leaves"]
SWITCH = Case(27, window=9, sink=3, switch=(15, False))
CONTROLS = {
    "a sink less": (BASE, BASE.but(sink=2)),
    "a frame more": (BASE, BASE.but(window=10)),
    "a frame less": (BASE, BASE.but(window=8)),
    "distances closed": (BASE, BASE.but(positions="relative")),
    "another shift": (BASE, BASE.but(shift=5.1)),
    "not warped": (BASE, BASE.but(warp=False)),
    "warped": (STEPS, STEPS.but(warp=True)),
    "a mark off by two": (STEPS, STEPS.but(marks=(1000, 935, 833, 625))),
    "first chunk's steps left out": (
        CHUNKS["first chunk's steps"],
        CHUNKS["first chunk's steps"].but(first_marks=None),
    ),
    "prefix of other chunks": (
        PREFIXES["video of 6 frames"],
        PREFIXES["video of 6 frames"].but(chunk_frames=1),
    ),
    "another scale": (CFG, CFG.but(guidance=3.1)),
    "fresh noise for UniPC": (CFG.but(guidance=1.0), CFG.but(guidance=1.0, unipc=False)),
    "keys of the old text": (SWITCH, SWITCH.but(strategy="keep")),
    "old sinks": (SWITCH, SWITCH.but(switch=(15, True))),
    "switched a chunk late": (SWITCH, SWITCH.but(switch=(18, False))),
    "nothing given": (CLAMPED["chunks of 4"], CLAMPED["chunks of 4"].but(given=0)),
    "cache kept": (RECOMPUTED["window 6"], RECOMPUTED["window 6"].but(recompute=False)),
}


@pytest.mark.parametrize("pair", CONTROLS.values(), ids=CONTROLS)
def test_a_wrong_setting_of_ours_is_seen(pair: tuple[Case, Case]) -> None:
    right, wrong = pair
    wanted, draws = stock(right)
    taken = 0 if wrong.unipc else len(wrong.marks) - 1
    if [len(step) for step in draws.fresh] != [taken] * len(draws.fresh):
        draws = _more(draws, taken)
    if wrong.chunk_frames != right.chunk_frames:
        found = _prefix_by_frame(right, draws)
    else:
        found = ours(wrong, draws)
    assert relative_l2(found, wanted) > WRONG


def _more(draws: Recorder, number: int) -> Recorder:
    """The draws with as many fresh ones a chunk as another schedule takes."""
    fresh = []
    for index, given in enumerate(draws.fresh):
        shape = (*draws.initial.shape[:1], given[0].shape[1] if given else 3, *draws.initial.shape[2:])
        fresh.append([*given, *(noise(*shape, seed=1000 * index + i) for i in range(number))][:number])
    return Recorder(draws.initial, fresh)


def _prefix_by_frame(case: Case, draws: Recorder) -> Tensor:
    """Ours with every frame of the prefix a chunk of its own, so that none sees a later one."""
    prefix = clean(case, case.prefix)
    with rollout(case.but(prefix=0)) as made:
        for frame in prefix.split(1, 1):
            made.append(frame)
        chunks = [
            made.step_chunk(noise=part, step_noise=fresh).latents
            for part, fresh in zip(draws.initial.split(case.chunk_frames, 1), draws.fresh, strict=True)
        ]
    return torch.cat([prefix, *chunks], 1)


@pytest.mark.parametrize("swap", ["steps", "chunks"])
def test_noise_in_another_order_is_seen(swap: str) -> None:
    wanted, draws = stock(BASE)
    fresh = [step[::-1] for step in draws.fresh] if swap == "steps" else draws.fresh[::-1]
    assert relative_l2(ours(BASE, Recorder(draws.initial, fresh)), wanted) > WRONG


STOCK_DRAWS = {
    "chunks of 3": Case(12, window=6, sink=1),
    "batch of two": Case(9, batch=2),
    "first frame alone": Case(10, first_chunk_frames=1),
    "from an image": Case(9, first_chunk_frames=1, prefix=1),
    "first chunk's steps": Case(4, marks=(1000, 500), first_marks=FlowSchedule().steps, chunk_frames=1),
}


@pytest.mark.parametrize("case", STOCK_DRAWS.values(), ids=STOCK_DRAWS)
def test_stock_noise_makes_the_stock_draws(case: Case) -> None:
    _, draws = stock(case)
    source = StockNoise(SEED, case.frames, case.batch, LATENT_SIZE)
    start = 0
    for index, fresh in enumerate(draws.fresh):
        number = case.chunk_frames
        if case.first_chunk_frames and not case.prefix and not index:
            number = case.first_chunk_frames
        assert torch.equal(source.initial(index, start, number), draws.initial[:, start : start + number])
        for step, wanted in enumerate(fresh, 1):
            assert torch.equal(source.fresh(index, step, number), wanted)
        start += number
    assert start == case.frames


@pytest.mark.parametrize("case", STOCK_DRAWS.values(), ids=STOCK_DRAWS)
def test_a_rollout_takes_stock_noise_in_the_stock_order(case: Case) -> None:
    wanted, draws = stock(case)
    source = StockNoise(SEED, case.frames, case.batch, LATENT_SIZE)
    found = ours(case, None, noise=source)
    assert torch.equal(found, ours(case, draws))
    assert relative_l2(found, wanted) <= BOUND


def test_stock_noise_of_another_length_is_other_noise() -> None:
    """The initial noise of the whole video comes first, so that its length moves every later draw."""
    case = STOCK_DRAWS["chunks of 3"]
    wanted, _ = stock(case)
    longer = StockNoise(SEED, case.frames + 3, case.batch, LATENT_SIZE)
    assert relative_l2(ours(case, None, noise=longer), wanted) > WRONG


@pytest.mark.parametrize("heads", [(2, 24), (2, 128)])
def test_one_teacher_forced_chunk_in_bfloat16(heads: tuple[int, int]) -> None:
    """Given history and the same input to every step; free rollouts in bfloat16 part chaotically."""
    case = Case(3, window=9, sink=1, prefix=9, heads=heads)
    small = deepcopy(network(heads)).bfloat16()
    prefix, text = clean(case, 9).bfloat16(), words(case, 0).bfloat16()
    loop = StockLoop(StockTransformer(small, torch.bfloat16), text, case.window, case.sink)
    with torch.no_grad(), seeded(SEED):
        draws = Recorder.start(1, 3, *LATENT_SIZE, dtype=torch.bfloat16)
        loop.prefill(prefix)
        loop.chunk(draws.initial, draws)
    spec = CacheSpec.parse("bf16,window=9,sink=1,positions=absolute")
    with Rollout(small, text, spec, FlowSchedule(), LATENT_SIZE, [SEED]) as made:
        made.prefill(prefix)
        found = made.step_chunk(noise=draws.initial, step_noise=draws.fresh[0]).latents
    with Rollout(small, text, spec, FlowSchedule(), LATENT_SIZE, [SEED]) as made:
        made.prefill(prefix[:, 3:])
        other = made.step_chunk(noise=draws.initial, step_noise=draws.fresh[0]).latents
    wanted = loop.latents[:, -3:]
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert relative_l2(found, wanted) <= 1e-2 < relative_l2(other, wanted)


def test_the_oracle_reads_no_key_that_it_did_not_write() -> None:
    """Its cache starts as NaN: an index off by one anywhere shows at once."""
    cache = DenseCache(1, 1, 2, 1, 2, torch.float32)
    assert torch.isnan(cache.k[0]).all() and torch.isnan(cache.v[0]).all()
    for case in (FEW_STEPS["window 7, sink 3"], SWITCHED["window 12, sink 3, before frame 9, sinks kept"]):
        assert torch.isfinite(stock(case)[0]).all()
