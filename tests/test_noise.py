"""Noise depends on where it is used, and on nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vidkv.noise import chunk_noise

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


PINNED = [-0.6322232484817505, 0.562378466129303, -0.6278021931648254, 0.4126895070075989]
