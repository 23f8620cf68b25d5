"""Every metric stays still on ground truth and moves when what it measures is broken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vidkv.models.bounce import metrics
from vidkv.models.bounce.metrics import (
    Return,
    RolloutMetrics,
    bootstrap_ci,
    brightness_creep,
    chunk_slices,
    delta_e_2000,
    fastest_speed,
    frozen,
    measure,
    paired_bootstrap,
    recoloured,
    repeated_chunk,
    reshaped,
    returns_by_gap,
    rgb_to_lab,
    vanished,
)
from vidkv.models.bounce.parser import Parsed, parse_frames
from vidkv.models.bounce.prompts import COLOURS, FAMILIES, SHAPES, Family, ScenePrompt
from vidkv.models.bounce.world import SIZE, Scenes, render, sample_scenes, simulate

Frames = npt.NDArray[np.uint8]
CHUNKS = 8
LENGTH = 9 + 12 * (CHUNKS - 1)
PER_CHUNK = (
    "identity", "colour", "shape", "colour_delta_e", "count_error", "luminance_drift",
    "trajectory_rmse", "speed_error", "teleports",
)  # fmt: skip


@dataclass
class Truth:
    """A ground-truth rollout with its parsed state and its metrics."""

    prompt: ScenePrompt
    frames: Frames
    parsed: Parsed
    metrics: RolloutMetrics

    def altered(self, frames: Frames) -> RolloutMetrics:
        return measure(parse_frames(frames), self.prompt)


def clip(scenes: Scenes, frames: int = LENGTH) -> Frames:
    return (render(scenes, simulate(scenes, frames))[0] * 255).round().byte().numpy()


@cache
def truths(family: Family, number: int = 4) -> list[Truth]:
    scenes = sample_scenes(number, torch.Generator().manual_seed(31), family)
    made = []
    for i, prompt in enumerate(scenes.prompts()):
        frames = clip(scenes[i : i + 1])
        parsed = parse_frames(frames)
        made.append(Truth(prompt, frames, parsed, measure(parsed, prompt)))
    return made


def one_scene(
    *objects: tuple[str, str, float, float, float, float],
    family: Family = "bounce",
    frames: int = LENGTH,
    bar: tuple[float, float] = (0, 0),
    pan: float = 0,
    named: int | None = None,
) -> Truth:
    """Ground truth of objects (colour, shape, x, y, vx, vy) of radius 7."""
    scenes = sample_scenes(1, torch.Generator().manual_seed(0), family)
    scenes.count.fill_(len(objects))
    scenes.named.fill_(len(objects) if named is None else named)
    scenes.background.fill_(0)
    scenes.radius.fill_(7.0)
    scenes.pan_speed.fill_(pan)
    scenes.bar.copy_(torch.tensor([bar]))
    for i, (colour, shape, x, y, vx, vy) in enumerate(objects):
        scenes.colour[0, i] = COLOURS.index(colour)
        scenes.shape[0, i] = SHAPES.index(shape)
        scenes.position[0, i] = torch.tensor([x, y])
        scenes.velocity[0, i] = torch.tensor([vx, vy])
    drawn = clip(scenes, frames)
    parsed = parse_frames(drawn)
    prompt = scenes.prompts()[0]
    return Truth(prompt, drawn, parsed, measure(parsed, prompt))


@cache
def lone() -> Truth:
    """One red circle that bounces."""
    return one_scene(("red", "circle", 20, 30, 1.0, 0.45))


@cache
def hiding() -> Truth:
    """One green square that passes behind the bar, to and fro."""
    return one_scene(("green", "square", 12, 30, 1.2, 0.3), family="occluder", frames=153, bar=(24, 44))


@cache
def panned() -> Truth:
    """A named landmark and a second one at the other end of the world."""
    return one_scene(
        ("yellow", "triangle", 25, 30, 0, 0),
        ("blue", "circle", 100, 40, 0, 0),
        family="camera",
        frames=153,
        pan=2.0,
        named=1,
    )


def largest(values: npt.NDArray[np.float64]) -> float:
    return float(np.nanmax(np.abs(values)))


class TestGroundTruth:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_moves_no_metric(self, family: Family) -> None:
        for truth in truths(family):
            m = truth.metrics
            for share in (m.identity, m.colour, m.shape):
                assert np.all(np.isnan(share) | (share == 1))
            assert largest(m.count_error) == 0
            assert np.all(np.isnan(m.teleports) | (m.teleports == 0))
            assert np.all(np.isnan(m.colour_delta_e) | (m.colour_delta_e < 0.5))
            assert largest(m.luminance_drift) < 0.002
            assert np.all(np.isnan(m.trajectory_rmse) | (m.trajectory_rmse < 1))
            assert np.all(np.isnan(m.speed_error) | (m.speed_error < 0.1))
            assert all(item.right for item in m.returns)
            assert math.isnan(m.event_latency)

    def test_every_metric_has_evidence_where_it_should(self) -> None:
        lacking = {
            "bounce": set(),
            "still": {"speed_error"},
            "camera": {"trajectory_rmse"},
            "occluder": set(),
        }
        for family in FAMILIES:
            for name in PER_CHUNK:
                curves = [getattr(truth.metrics, name) for truth in truths(family)]
                seen = not np.isnan(curves).all()
                assert seen == (name not in lacking[family]), (family, name)

    def test_measuring_twice_is_measuring_once(self) -> None:
        truth = truths("bounce")[0]
        again = truth.altered(truth.frames)
        for name in PER_CHUNK:
            first, second = getattr(truth.metrics, name), getattr(again, name)
            assert np.array_equal(first, second, equal_nan=True)
            difference, low, high = paired_bootstrap(first, second, samples=100)
            assert difference == low == high == 0 or math.isnan(difference)

    def test_objects_return_from_behind_the_bar(self) -> None:
        assert [item.right for item in hiding().metrics.returns] == [True] * 3
        # the square is 12 wide and the bar 20: out of sight for 8 pixels at 1.2 a frame
        assert all(4 <= item.gap <= 12 for item in hiding().metrics.returns)

    def test_landmarks_return_with_the_camera(self) -> None:
        returns = panned().metrics.returns
        assert all(item.right for item in returns) and len(returns) == 4
        # the camera turns 64 further: the named landmark is out from 25 to 64 and back, 2 a frame
        assert max(item.gap for item in returns) == pytest.approx((64 - 25 - 7) * 2 / 2, abs=4)

    def test_no_object_is_faster_than_the_bound(self) -> None:
        for family in FAMILIES:
            scenes = sample_scenes(64, torch.Generator().manual_seed(3), family)
            way = simulate(scenes, 100).in_view.diff(dim=1).norm(dim=-1).amax(1)
            for prompt, speeds, there in zip(scenes.prompts(), way, scenes.exists, strict=True):
                assert speeds[there].max() <= fastest_speed(prompt) + 1e-4


class TestNegativeControls:
    def test_frozen_frames_fail_motion(self) -> None:
        broken = lone().altered(frozen(lone().frames, 45))
        assert largest(lone().metrics.trajectory_rmse) < 0.2
        assert broken.trajectory_rmse[4] > 4
        assert largest(lone().metrics.speed_error) < 0.02
        assert broken.speed_error[4] == pytest.approx(1, abs=0.01)
        assert np.nanmin(broken.identity) == 1

    def test_frozen_frames_fail_the_pan(self) -> None:
        broken = panned().altered(frozen(panned().frames, 33))
        assert largest(panned().metrics.speed_error) < 0.02
        assert np.nanmax(broken.speed_error) == pytest.approx(1, abs=0.01)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_brightness_creep_is_measured_to_half_a_level(self, family: Family) -> None:
        for truth in truths(family):
            broken = truth.altered(brightness_creep(truth.frames))
            drift = broken.luminance_drift
            # under a pan, a landmark counts from the chunk that first shows it
            expected = np.arange(CHUNKS) / 255
            known = ~np.isnan(drift)
            if family != "camera":
                assert np.abs(drift - expected)[known].max() < 0.5 / 255
            assert drift[known].max() > 4 / 255
            assert largest(truth.metrics.luminance_drift) < 0.5 / 255

    def test_a_repeated_chunk_is_a_jump_back(self) -> None:
        broken = lone().altered(repeated_chunk(lone().frames, 4))
        assert largest(lone().metrics.teleports) == 0
        assert broken.teleports[4] == pytest.approx(1 / 12, abs=0.01)
        assert broken.trajectory_rmse[4] > 4
        assert broken.teleports[3] == 0 and broken.trajectory_rmse[3] < 0.2

    @pytest.mark.parametrize("family", ["bounce", "still"])
    def test_a_recoloured_object_loses_its_colour_only(self, family: Family) -> None:
        truth = truths(family)[0]
        old, new = truth.prompt.objects[0][0], _spare(truth)
        broken = truth.altered(recoloured(truth.frames, old, new, 45))
        number = len(truth.prompt.objects)
        assert broken.identity[:4].tolist() == truth.metrics.identity[:4].tolist()
        assert np.nanmax(broken.colour[4:]) < 1 and np.nanmin(broken.colour[4:]) >= 0
        assert np.nanmean(broken.colour[4:]) == pytest.approx(1 - 1 / number, abs=0.15)
        assert np.nanmin(broken.shape) == 1
        assert largest(broken.count_error) == 0
        assert np.nanmean(broken.colour_delta_e[4:]) > 5

    def test_a_vanished_object_is_missed(self) -> None:
        truth = truths("bounce")[0]
        broken = truth.altered(vanished(truth.frames, truth.prompt.objects[0][0], 45))
        number = len(truth.prompt.objects)
        assert broken.count_error.tolist() == [0] * 4 + [1] * 4
        assert np.nanmax(broken.identity[4:]) < 1
        assert np.nanmean(broken.identity[4:]) == pytest.approx(1 - 1 / number, abs=0.15)

    def test_an_extra_object_is_counted(self) -> None:
        frames = lone().frames.copy()
        square = one_scene(("blue", "square", 32, 10, 0, 0), family="still", frames=1).frames[0]
        frames[45:, 3:17, 25:39] = np.maximum(frames[45:, 3:17, 25:39], square[3:17, 25:39])
        broken = lone().altered(frames)
        assert broken.count_error[:4].max() == 0 and broken.count_error[5:].min() > 0.5

    @pytest.mark.parametrize("shape", ["square", "triangle"])
    def test_a_swapped_shape_loses_its_shape_only(self, shape: str) -> None:
        broken = lone().altered(reshaped(lone().frames, "red", shape, 45))
        assert np.nanmin(broken.colour) == 1
        assert np.nanmin(broken.shape[:4]) == 1 and np.nanmax(broken.shape[4:]) == 0
        assert np.nanmax(broken.identity[4:]) == 0
        assert largest(broken.count_error) == 0 and np.nanmax(broken.colour_delta_e) < 1

    def test_a_fading_colour_raises_the_colour_error(self) -> None:
        faded = lone().frames.copy()
        faded[45:] = (0.8 * faded[45:]).astype(np.uint8)
        broken = lone().altered(faded)
        assert np.nanmax(broken.colour_delta_e[:4]) < 0.5
        assert np.nanmin(broken.colour_delta_e[4:]) > 3
        assert np.nanmin(broken.identity) == 1


class TestReturns:
    def first_gap(self, truth: Truth) -> tuple[int, int]:
        """First frame without the object, and the first that shows it again."""
        there = np.array([bool(objects) for objects in truth.parsed.objects])
        gone = int((~there).argmax())
        return gone, gone + int(there[gone:].argmax())

    def test_an_object_that_stays_behind_the_bar_is_lost(self) -> None:
        gone, _ = self.first_gap(hiding())
        broken = hiding().altered(vanished(hiding().frames, "green", gone))
        assert [item.right for item in broken.returns] == [False]
        assert broken.identity[-1] == 0 and broken.count_error[-1] == 1
        assert np.isnan(broken.identity[2])

    @pytest.mark.parametrize("change", ["colour", "shape", "place"])
    def test_an_object_that_comes_back_as_another_is_wrong(self, change: str) -> None:
        frames = hiding().frames
        _, back = self.first_gap(hiding())
        altered = {
            "colour": lambda: recoloured(frames, "green", "purple", back),
            "shape": lambda: reshaped(frames, "green", "circle", back),
            "place": lambda: np.concatenate([frames[:back], np.roll(frames[back:], 14, axis=1)]),
        }[change]()
        broken = hiding().altered(altered)
        assert broken.returns and not broken.returns[0].right
        assert hiding().metrics.returns[0].right

    def test_a_landmark_that_does_not_come_back_is_missed(self) -> None:
        broken = panned().altered(vanished(panned().frames, "yellow", 30))
        wrong = [item for item in broken.returns if not item.right]
        assert len(wrong) == 2 and broken.count_error.max() > 0
        assert np.nanmin(broken.identity) == 0

    @pytest.mark.parametrize("shift", [-6, 6])
    def test_a_landmark_that_comes_back_elsewhere_is_wrong(self, shift: int) -> None:
        frames = panned().frames.copy()
        frames[40:] = np.roll(frames[40:], shift, axis=1)
        assert not all(item.right for item in panned().altered(frames).returns)

    def test_a_landmark_of_another_shape_is_wrong(self) -> None:
        broken = panned().altered(reshaped(panned().frames, "yellow", "square", 30))
        assert not broken.returns[0].right

    def test_a_new_landmark_in_a_known_world_is_one_too_many(self) -> None:
        frames = panned().frames
        broken = panned().altered(recoloured(frames, "blue", "red", 90))
        assert panned().metrics.count_error.max() == 0
        assert broken.count_error[8:].max() > 0

    def test_bins_hold_the_gaps_from_low_to_below_high(self) -> None:
        returns = [Return(gap, 0, gap > 12) for gap in (1, 12, 13, 24, 500)]
        assert returns_by_gap(returns, (1, 13, 25)) == {
            (1, 13): [False, False],
            (13, 25): [True, True],
        }


class TestEvents:
    def make(self, event_frame: int) -> tuple[Frames, ScenePrompt]:
        scenes = sample_scenes(1, torch.Generator().manual_seed(2), "still")
        scenes.event_frame.fill_(event_frame)
        return clip(scenes), scenes.prompts()[0]

    @pytest.mark.parametrize(("happens", "latency"), [(33, 0), (44, 0), (50, 1), (60, 2)])
    def test_latency_counts_chunks(self, happens: int, latency: int) -> None:
        frames, prompt = self.make(happens)
        parsed = parse_frames(frames)
        result = measure(parsed, prompt, event_chunk=3)
        assert result.event_latency == latency
        assert np.nanmin(result.identity[:3]) == 1
        assert (result.identity[4] == 1) == (latency == 0)
        assert np.nanmin(result.identity[4 + latency :]) == 1

    def test_an_event_that_never_happens_is_infinite_and_wrong(self) -> None:
        frames, prompt = self.make(10_000)
        result = measure(parse_frames(frames), prompt, event_chunk=3)
        assert result.event_latency == math.inf
        assert np.nanmax(result.colour[4:]) < 1
        # the chunk in which the prompt changes may show either colour
        assert np.nanmin(result.colour[:4]) == 1

    def test_an_event_after_the_end_is_no_evidence(self) -> None:
        frames, prompt = self.make(10_000)
        result = measure(parse_frames(frames), prompt, event_chunk=CHUNKS)
        assert math.isnan(result.event_latency) and np.nanmin(result.identity) == 1

    def test_the_object_keeps_its_track_through_the_change(self) -> None:
        scenes = sample_scenes(1, torch.Generator().manual_seed(4), "bounce")
        scenes.event_frame.fill_(45)
        result = measure(parse_frames(clip(scenes)), scenes.prompts()[0], event_chunk=4)
        assert largest(result.teleports) == 0 and largest(result.trajectory_rmse) < 1
        assert np.nanmin(result.identity) == 1


class TestNoEvidence:
    def test_empty_frames_of_free_objects_are_absent_objects(self) -> None:
        black = np.full((21, SIZE, SIZE, 3), 30, np.uint8)
        result = measure(parse_frames(black), lone().prompt)
        assert result.identity.tolist() == [0, 0] and result.count_error.tolist() == [1, 1]
        for name in ("colour_delta_e", "trajectory_rmse", "speed_error", "teleports"):
            assert np.isnan(getattr(result, name)).all()
        assert result.luminance_drift.tolist() == [0, 0]

    def test_what_may_be_hidden_is_not_judged(self) -> None:
        scenes = one_scene(("green", "square", 34, 30, 0, 0.4), family="occluder", frames=33, bar=(24, 44))
        result = scenes.metrics
        for name in ("identity", "colour", "shape", "trajectory_rmse", "teleports"):
            assert np.isnan(getattr(result, name)).all()
        assert result.returns == [] and largest(result.count_error) == 0

    def test_what_is_cut_is_not_judged(self) -> None:
        truth = one_scene(("red", "square", 60, 30, 0, 0), family="still", frames=21)
        assert np.isnan(truth.metrics.identity).all() and not truth.metrics.judged.any()
        assert lone().metrics.judged.mean() > 0.9
        assert largest(truth.metrics.count_error) == 0

    def test_one_frame_is_enough_for_identity_only(self) -> None:
        result = measure(lone().parsed[:1], lone().prompt)
        assert result.identity.tolist() == [1]
        assert np.isnan(result.trajectory_rmse).all() and np.isnan(result.teleports).all()


class TestChunks:
    def test_the_first_is_shorter(self) -> None:
        assert chunk_slices(33) == [slice(0, 9), slice(9, 21), slice(21, 33)]

    def test_the_last_may_be_cut(self) -> None:
        assert chunk_slices(10) == [slice(0, 9), slice(9, 10)]
        assert chunk_slices(5) == [slice(0, 5)]
        assert chunk_slices(0) == []


# Sharma, Wu and Dalal (2005), table 1: L, a, b of two colours, and their difference
SHARMA = """
50.0000   2.6772 -79.7751  50.0000   0.0000 -82.7485   2.0425
50.0000   3.1571 -77.2803  50.0000   0.0000 -82.7485   2.8615
50.0000   2.8361 -74.0200  50.0000   0.0000 -82.7485   3.4412
50.0000  -1.3802 -84.2814  50.0000   0.0000 -82.7485   1.0000
50.0000  -1.1848 -84.8006  50.0000   0.0000 -82.7485   1.0000
50.0000  -0.9009 -85.5211  50.0000   0.0000 -82.7485   1.0000
50.0000   0.0000   0.0000  50.0000  -1.0000   2.0000   2.3669
50.0000  -1.0000   2.0000  50.0000   0.0000   0.0000   2.3669
50.0000   2.4900  -0.0010  50.0000  -2.4900   0.0009   7.1792
50.0000   2.4900  -0.0010  50.0000  -2.4900   0.0010   7.1792
50.0000   2.4900  -0.0010  50.0000  -2.4900   0.0011   7.2195
50.0000   2.4900  -0.0010  50.0000  -2.4900   0.0012   7.2195
50.0000  -0.0010   2.4900  50.0000   0.0009  -2.4900   4.8045
50.0000  -0.0010   2.4900  50.0000   0.0010  -2.4900   4.8045
50.0000  -0.0010   2.4900  50.0000   0.0011  -2.4900   4.7461
50.0000   2.5000   0.0000  50.0000   0.0000  -2.5000   4.3065
50.0000   2.5000   0.0000  73.0000  25.0000 -18.0000  27.1492
50.0000   2.5000   0.0000  61.0000  -5.0000  29.0000  22.8977
50.0000   2.5000   0.0000  56.0000 -27.0000  -3.0000  31.9030
50.0000   2.5000   0.0000  58.0000  24.0000  15.0000  19.4535
50.0000   2.5000   0.0000  50.0000   3.1736   0.5854   1.0000
50.0000   2.5000   0.0000  50.0000   3.2972   0.0000   1.0000
50.0000   2.5000   0.0000  50.0000   1.8634   0.5757   1.0000
50.0000   2.5000   0.0000  50.0000   3.2592   0.3350   1.0000
60.2574 -34.0099  36.2677  60.4626 -34.1751  39.4387   1.2644
63.0109 -31.0961  -5.8663  62.8187 -29.7946  -4.0864   1.2630
61.2901   3.7196  -5.3901  61.4292   2.2480  -4.9620   1.8731
35.0831 -44.1164   3.7933  35.0232 -40.0716   1.5901   1.8645
22.7233  20.0904 -46.6940  23.0331  14.9730 -42.5619   2.0373
36.4612  47.8580  18.3852  36.2715  50.5065  21.2231   1.4146
90.8027  -2.0831   1.4410  91.1528  -1.6435   0.0447   1.4441
90.9257  -0.5406  -0.9208  88.6381  -0.8985  -0.7239   1.5381
 6.7747  -0.2908  -2.4247   5.8714  -0.0985  -2.2286   0.6377
 2.0776   0.0795  -1.1350   0.9033  -0.0636  -0.5514   0.9082
"""


class TestColourDifference:
    def test_it_is_ciede2000(self) -> None:
        rows = np.array(SHARMA.split(), float).reshape(-1, 7)
        assert len(rows) == 34
        first, second, expected = rows[:, :3], rows[:, 3:6], rows[:, 6]
        np.testing.assert_allclose(delta_e_2000(first, second), expected, atol=5e-5)
        np.testing.assert_allclose(delta_e_2000(second, first), expected, atol=5e-5)
        assert not delta_e_2000(first, first).any()

    @pytest.mark.parametrize(
        ("rgb", "lab"),
        [
            ((0, 0, 0), (0, 0, 0)),
            ((1, 1, 1), (100, 0, 0)),
            ((1, 0, 0), (53.24, 80.09, 67.20)),
            ((0, 1, 0), (87.74, -86.18, 83.18)),
            ((0, 0, 1), (32.30, 79.19, -107.86)),
            ((0.5, 0.5, 0.5), (53.39, 0, 0)),
        ],
    )
    def test_srgb_has_its_published_lab(self, rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
        assert rgb_to_lab(np.array(rgb, float)).tolist() == pytest.approx(lab, abs=0.02)


class TestBootstrap:
    def test_the_interval_is_that_of_the_mean(self) -> None:
        values = np.random.default_rng(0).normal(3, 2, 400)
        mean, low, high = bootstrap_ci(values)
        error = 1.96 * values.std() / math.sqrt(400)
        assert mean == pytest.approx(values.mean())
        assert (low, high) == (pytest.approx(mean - error, abs=0.03), pytest.approx(mean + error, abs=0.03))

    def test_it_covers_the_truth_as_often_as_it_says(self) -> None:
        generator = np.random.default_rng(1)
        covered = 0
        for trial in range(200):
            _, low, high = bootstrap_ci(generator.normal(0, 1, 60), samples=300, seed=trial)
            covered += low <= 0 <= high
        assert 180 <= covered <= 199

    def test_pairs_cancel_what_they_share(self) -> None:
        generator = np.random.default_rng(2)
        shared = generator.normal(0, 10, 64)
        a, b = shared + 0.5, shared + generator.normal(0, 0.1, 64)
        difference, low, high = paired_bootstrap(a, b)
        assert low < difference < high and 0.4 < low and high < 0.6
        assert paired_bootstrap(b, a)[0] == pytest.approx(-difference)

    def test_equal_runs_do_not_differ(self) -> None:
        values = np.random.default_rng(3).random(50)
        assert paired_bootstrap(values, values) == (0, 0, 0)

    def test_gaps_are_left_out_in_pairs(self) -> None:
        nan = math.nan
        assert paired_bootstrap([1, nan, 3, 4], [0, 9, nan, 3], samples=50) == (1, 1, 1)
        assert bootstrap_ci([nan, 2, nan], samples=50) == (2, 2, 2)
        assert all(math.isnan(x) for x in (*bootstrap_ci([nan]), *paired_bootstrap([nan], [1])))

    def test_the_same_seed_gives_the_same_interval(self) -> None:
        values = np.random.default_rng(4).random(30)
        assert bootstrap_ci(values) == bootstrap_ci(values)
        assert bootstrap_ci(values) != bootstrap_ci(values, seed=1)

    def test_lists_of_other_lengths_are_no_pairs(self) -> None:
        with pytest.raises(ValueError, match=r"\(3,\) and \(2,\) values do not make pairs"):
            paired_bootstrap([1, 2, 3], [1, 2])


def _spare(truth: Truth) -> str:
    """A colour far from all others that the rollout does not show."""
    used = {seen.colour for objects in truth.parsed.objects for seen in objects}
    return next(colour for colour in ("green", "purple", "white", "blue", "red") if colour not in used)


def test_unknown_motion_is_not_invented() -> None:
    """The states that motion starts from are exact where they are given at all."""
    for truth in truths("bounce"):
        tracks = metrics.track(truth.parsed, truth.prompt)
        for frame in range(8, LENGTH, 5):
            for i in range(tracks.named):
                motion = metrics.fit_motion(tracks, i, frame)
                if motion is not None and tracks.whole[i, frame - 2 : frame + 1].all():
                    step = tracks.place[i, frame] - tracks.place[i, frame - 1]
                    assert np.abs(motion.velocity - step).max() < 0.3
