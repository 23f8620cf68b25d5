"""Noise depends on where it is used, and on nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import LATENT_SIZE, build_text, build_transformer, noise
from vidkv.cache import CacheSpec
from vidkv.errors import Cancelled, InputError, StateError
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.noise import CounterNoise, NoiseSource, StockNoise, chunk_noise
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

SHAPE = (3, 4, 8, 10)


class TestReproducible:
    def test_by_name_alone(self) -> None:
        """Neither order nor global generators matter."""
        first = chunk_noise([7], 5, 2, SHAPE)
        torch.manual_seed(123)
        np.random.seed(4)
        chunk_noise([7], 4, 1, SHAPE)
        assert torch.equal(chunk_noise([7], 5, 2, SHAPE), first)

    def test_drawing_disturbs_nobody(self) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        chunk_noise([7], 5, 2, SHAPE)
        assert torch.equal(torch.get_rng_state(), before)

    def test_values_are_pinned(self) -> None:
        """A change of the stream would change every video: saved states promise the same noise."""
        found = chunk_noise([7], 1, 2, (1, 1, 1, 4)).flatten()
        torch.testing.assert_close(found, torch.tensor(PINNED), rtol=0, atol=0)

    def test_batch_elements_are_those_drawn_alone(self) -> None:
        batch = chunk_noise([3, 1, 2], 4, 0, SHAPE)
        for i, seed in enumerate((3, 1, 2)):
            assert torch.equal(batch[i : i + 1], chunk_noise([seed], 4, 0, SHAPE))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_other_precisions_are_casts_of_float32(self, dtype: torch.dtype) -> None:
        exact = chunk_noise([7], 0, 0, SHAPE)
        assert torch.equal(chunk_noise([7], 0, 0, SHAPE, dtype=dtype), exact.to(dtype))


class TestIndependent:
    def test_every_seed_chunk_and_step_differs(self) -> None:
        streams = [
            chunk_noise([seed], chunk, step, SHAPE).flatten()
            for seed, chunk, step in itertools.product((0, 1, 2**63, 2**64 - 1), (0, 1, 2, 10_000), (0, 1, 2))
        ]
        correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
        # 960 samples a stream: one standard error is 0.032
        assert float(correlation.abs().max()) < 0.17

    def test_streams_do_not_overlap(self) -> None:
        """A value of one stream does not turn up, shifted, in its neighbours."""
        values = [
            set(chunk_noise([7], chunk, step, SHAPE).flatten().tolist())
            for chunk in (0, 1)
            for step in (0, 1)
        ]
        for a, b in itertools.combinations(values, 2):
            assert len(a & b) < 5

    def test_normal(self) -> None:
        x = chunk_noise([11], 0, 0, (10, 10, 50, 50)).double()
        assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01
        assert abs(float((x**4).mean()) - 3) < 0.06

    def test_frames_of_a_chunk_differ(self) -> None:
        x = chunk_noise([11], 0, 0, SHAPE)
        assert not torch.equal(x[:, 0], x[:, 1])


SIZE = (2, 3, 5)


def in_order(source: NoiseSource, chunk: int, steps: int = 2) -> list[Tensor]:
    """What a chunk of three frames takes, in its order."""
    return [source.initial(chunk, 3 * chunk, 3), *(source.fresh(chunk, 1 + i, 3) for i in range(steps))]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class TestCounterNoise:
    def test_is_chunk_noise(self) -> None:
        """The initial noise is step 0; frames before the chunk do not matter."""
        source = CounterNoise((7, 8), SIZE, "cpu", torch.float32)
        for start in (0, 99):
            assert torch.equal(source.initial(4, start, 2), chunk_noise([7, 8], 4, 0, (2, *SIZE)))
        assert torch.equal(source.fresh(4, 3, 2), chunk_noise([7, 8], 4, 3, (2, *SIZE)))

    def test_takes_the_saved_seeds(self) -> None:
        source, other = (CounterNoise((s,), SIZE, "cpu", torch.float32) for s in (7, 2**64 - 1))
        source.restore(*other.state())
        assert torch.equal(source.initial(1, 3, 3), other.initial(1, 3, 3))
        assert source.copy().seeds == (2**64 - 1,)

    @pytest.mark.parametrize(
        "seeds", [None, 7, [], [7], [7, 8, 9], [7, -1], [7, 2**64], [7, 8.0], [7, True], ["7", 8]], ids=str
    )
    def test_refuses_other_seeds(self, seeds: object) -> None:
        source = CounterNoise((7, 8), SIZE, "cpu", torch.float32)
        with pytest.raises(StateError, match=r"saved seeds .* needs 2"):
            source.restore({}, {"source": "counter", "seeds": seeds})
        assert source.seeds == (7, 8)

    def test_refuses_the_other_source(self) -> None:
        source = CounterNoise((7,), SIZE, "cpu", torch.float32)
        stock = StockNoise(7, 9, 1, SIZE)
        with pytest.raises(StateError, match="the saved noise is 'stock', this rollout's is 'counter'"):
            source.restore(*stock.state())
        with pytest.raises(StateError, match="the saved noise is 'counter', this rollout's is 'stock'"):
            stock.restore(*source.state())


class TestStockNoise:
    @pytest.mark.parametrize("batch", [1, 2])
    def test_draws_from_one_generator(self, batch: int) -> None:
        """All initial noise first; fresh noise with frames folded into the batch."""
        source, generator = StockNoise(3, 7, batch, SIZE), torch.Generator().manual_seed(3)
        first = torch.randn(batch, 7, *SIZE, generator=generator)
        for chunk, (start, frames) in enumerate([(0, 1), (1, 3), (4, 3)]):
            assert torch.equal(source.initial(chunk, start, frames), first[:, start : start + frames])
            for step in (1, 2, 3):
                wanted = torch.randn(batch * frames, *SIZE, generator=generator)
                assert torch.equal(source.fresh(chunk, step, frames).flatten(0, 1), wanted)

    def test_is_drawn_at_its_precision(self) -> None:
        source = StockNoise(3, 3, 1, SIZE, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(3)
        wanted = torch.randn(1, 3, *SIZE, generator=generator, dtype=torch.bfloat16)
        assert torch.equal(source.initial(0, 0, 3), wanted)

    @pytest.mark.parametrize("taken", [0, 1, 2])
    def test_a_chunk_that_was_given_up_costs_no_draws(self, taken: int) -> None:
        source, straight = StockNoise(3, 9, 1, SIZE), StockNoise(3, 9, 1, SIZE)
        assert same(in_order(source, 0), in_order(straight, 0))
        for _ in range(2):
            in_order(source, 1, taken)
        assert same(in_order(source, 1), in_order(straight, 1))
        assert same(in_order(source, 2), in_order(straight, 2))

    def test_a_chunk_with_its_own_initial_noise_may_be_given_up_too(self) -> None:
        source, straight = StockNoise(3, 9, 1, SIZE), StockNoise(3, 9, 1, SIZE)
        wanted = in_order(straight, 0)[1:]
        for _ in range(2):
            assert same([source.fresh(0, step, 3) for step in (1, 2)], wanted)
        assert same(in_order(source, 1), in_order(straight, 1))

    def test_more_frames_than_planned(self) -> None:
        source = StockNoise(3, 8, 1, SIZE)
        source.initial(1, 5, 3)
        with pytest.raises(InputError, match="drawn for 8 latent frames, and this chunk goes to 9"):
            source.initial(2, 6, 3)

    @pytest.mark.parametrize("taken", [0, 1, 2])
    def test_copies_go_on_alone(self, taken: int) -> None:
        """Also from the middle of a chunk, which either may begin anew."""
        source = StockNoise(3, 9, 1, SIZE)
        in_order(source, 0)
        in_order(source, 1, taken)
        copy, restored = source.copy(), StockNoise(3, 9, 1, SIZE)
        restored.restore(*source.state())
        wanted = [in_order(source, chunk) for chunk in (1, 2)]
        for other in (copy, restored):
            assert same(in_order(other, 1), wanted[0]) and same(in_order(other, 2), wanted[1])

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors, header: header.update(seeds=[4]),
            lambda tensors, header: header.update(seeds=[3, 3]),
            lambda tensors, header: header.update(frames=12),
            lambda tensors, header: header.pop("frames"),
            lambda tensors, header: header.update(chunk="1"),
            lambda tensors, header: header.pop("chunk"),
            lambda tensors, header: tensors.pop("generator"),
            lambda tensors, header: tensors.update(before_chunk=tensors["before_chunk"][:-1]),
            lambda tensors, header: tensors.update(generator=tensors["generator"].int()),
            lambda tensors, header: tensors.update(generator=torch.zeros_like(tensors["generator"])),
            lambda tensors, header: tensors.update(before_chunk=torch.zeros_like(tensors["generator"])),
        ],
        ids=[
            "seed", "seeds", "frames", "no frames", "chunk", "no chunk", "no generator", "short", "dtype",
            "zeros", "zeros before the chunk",
        ],
    )  # fmt: skip
    def test_refused_states_change_nothing(
        self, change: Callable[[dict[str, Tensor], dict[str, Any]], object]
    ) -> None:
        saved, source, straight = (StockNoise(3, 9, 1, SIZE) for _ in range(3))
        in_order(saved, 0)
        in_order(saved, 1)
        tensors, header = saved.state()
        change(tensors, header)
        for s in (source, straight):
            in_order(s, 0)
        with pytest.raises(StateError):
            source.restore(tensors, header)
        assert same(in_order(source, 1), in_order(straight, 1))


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return build_transformer()


class TestStockRollout:
    def build(
        self, model: CausalWanTransformer3DModel, seed: int = 7, frames: int = 15, batch: int = 1
    ) -> Rollout:
        return Rollout(
            model,
            build_text(model, batch),
            CacheSpec.parse("fp32,window=9,sink=2"),
            FlowSchedule((1000, 750, 500)),
            LATENT_SIZE,
            [7 + i for i in range(batch)],
            noise=StockNoise(seed, frames, batch, LATENT_SIZE),
        )

    def latents(self, rollout: Rollout, chunks: int) -> Tensor:
        return torch.cat([rollout.step_chunk().latents for _ in range(chunks)], 1)

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("copy", ["restore", "fork"])
    def test_goes_on_bit_for_bit(self, model: CausalWanTransformer3DModel, batch: int, copy: str) -> None:
        rollout = self.build(model, batch=batch)
        self.latents(rollout, 2)
        if copy == "fork":
            other = rollout.fork()
        else:
            other = self.build(model, batch=batch)
            self.latents(other, 1)
            other.restore(*rollout.state())
        assert other.seeds == rollout.seeds
        assert torch.equal(self.latents(other, 3), self.latents(rollout, 3))

    @pytest.mark.parametrize("step", [0, 1, 2])
    def test_a_cancelled_chunk_is_drawn_anew(self, model: CausalWanTransformer3DModel, step: int) -> None:
        rollout, straight = self.build(model), self.build(model)

        def stop(chunk: int, at: int) -> None:
            if at == step:
                raise Cancelled("enough")

        self.latents(rollout, 1)
        with pytest.raises(Cancelled):
            rollout.step_chunk(on_step=stop)
        # a state saved now knows it too
        restored = self.build(model)
        restored.restore(*rollout.state())
        wanted = self.latents(straight, 4)[:, 3:]
        assert torch.equal(self.latents(rollout, 3), wanted)
        assert torch.equal(self.latents(restored, 3), wanted)

    @pytest.mark.parametrize("own", [False, True])
    def test_denoise_again(self, model: CausalWanTransformer3DModel, own: bool) -> None:
        """Also with an initial noise of the caller's."""
        rollout = self.build(model)
        self.latents(rollout, 1)
        initial = noise(1, 3, *LATENT_SIZE) if own else None
        first = rollout.denoise(noise=initial)
        assert torch.equal(rollout.denoise(noise=initial), first)
        assert torch.equal(rollout.step_chunk(noise=initial).latents, first)

    def test_more_frames_than_planned(self, model: CausalWanTransformer3DModel) -> None:
        """The rollout stands before the chunk, and a shorter one still fits."""
        rollout = self.build(model, frames=8)
        self.latents(rollout, 2)
        with pytest.raises(InputError, match="drawn for 8 latent frames, and this chunk goes to 9"):
            rollout.step_chunk()
        assert (rollout.chunk, rollout.next_frame) == (2, 6)
        rollout.step_chunk(2)

    @pytest.mark.parametrize("settings", [{"seed": 8}, {"frames": 18}], ids=str)
    def test_another_video_s_noise_is_refused(
        self, model: CausalWanTransformer3DModel, settings: dict[str, int]
    ) -> None:
        saved, target, straight = self.build(model, **settings), self.build(model), self.build(model)
        self.latents(saved, 2)
        with pytest.raises(StateError, match="the saved noise is of seed"):
            target.restore(*saved.state())
        assert torch.equal(self.latents(target, 2), self.latents(straight, 2))


PINNED = [-0.6322232484817505, 0.562378466129303, -0.6278021931648254, 0.4126895070075989]
