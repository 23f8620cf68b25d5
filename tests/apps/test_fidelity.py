"""Metrics between two videos against brute force, closed forms and videos that are broken on purpose."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vidkv.apps import fidelity
from vidkv.apps.fidelity import (
    DIVERGED_DB,
    WORLD_METRICS,
    Fidelity,
    Frames,
    WorldFidelity,
    psnr,
    squared_error,
    ssim,
    world_of,
)
from vidkv.errors import InputError, PromptError
from vidkv.models.bounce.metrics import (
    RolloutMetrics,
    brightness_creep,
    chunk_slices,
    frozen,
    measure,
    repeated_chunk,
)
from vidkv.models.bounce.parser import parse_frames
from vidkv.models.bounce.prompts import WORLDS, ScenePrompt
from vidkv.models.bounce.world import Scenes, render, sample_scenes, simulate

CHUNKS = 6
FRAMES = 9 + 12 * (CHUNKS - 1)
SLICES = chunk_slices(FRAMES)


def noise(seed: int, *shape: int) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def world(seed: int = 5) -> tuple[Frames, ScenePrompt]:
    """A true video and its prompt."""
    scenes: Scenes = sample_scenes(1, torch.Generator().manual_seed(seed), "bounce", None, WORLDS["narrow"])
    frames = (render(scenes, simulate(scenes, FRAMES))[0] * 255).round().byte().numpy()
    return frames, scenes.prompts()[0]


def compared(a: Frames, b: Frames) -> Fidelity:
    found = Fidelity()
    for chunk in SLICES:
        found.add(a[chunk], b[chunk])
    return found


def seen(a: Frames, b: Frames, *texts: str) -> WorldFidelity:
    found = WorldFidelity(WORLDS["narrow"])
    for chunk in SLICES:
        found.add(a[chunk], b[chunk])
    found.update([list(itertools.islice(itertools.cycle([text]), CHUNKS)) for text in texts], last=True)
    return found


class TestPsnr:
    @pytest.mark.parametrize("step", [1, 2, 17, 255])
    def test_a_constant_difference_has_a_closed_form(self, step: int) -> None:
        a = np.zeros((2, 6, 4, 3), np.uint8)
        assert psnr(squared_error(a, a + np.uint8(step))) == pytest.approx(20 * math.log10(255 / step))

    def test_equal_pictures_have_no_finite_one(self) -> None:
        a = noise(1, 2, 16, 16, 3)
        assert squared_error(a, a.copy()) == 0 and psnr(0) == math.inf

    def test_bytes_do_not_wrap(self) -> None:
        black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
        assert squared_error(black, white) == squared_error(white, black) == 255**2

    def test_one_pixel_counts_by_its_share(self) -> None:
        a = noise(2, 3, 8, 10, 3)
        b = a.copy()
        b[1, 2, 3, 0] ^= 0x10
        assert squared_error(a, b) == pytest.approx(16**2 / a.size)


def brute_ssim(a: Frames, b: Frames, side: int) -> float:
    """One window after the other, by the definition of means and (co)variances."""
    at = np.arange(side) - (side - 1) / 2
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for first, second in zip(a, b, strict=True):
        x, y = (0.299 * p[..., 0] + 0.587 * p[..., 1] + 0.114 * p[..., 2] for p in (first, second))
        for row in range(x.shape[0] - side + 1):
            for column in range(x.shape[1] - side + 1):
                u, v = (p[row : row + side, column : column + side] for p in (x, y))
                mu, mv = (window * u).sum(), (window * v).sum()
                vu, vv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                cov = (window * (u - mu) * (v - mv)).sum()
                likeness = (2 * mu * mv + c1) * (2 * cov + c2)
                values.append(likeness / ((mu**2 + mv**2 + c1) * (vu + vv + c2)))
    return float(np.mean(values))


class TestSsim:
    @pytest.mark.parametrize(
        ("height", "width", "side"), [(13, 17, 11), (11, 11, 11), (16, 12, 11), (8, 14, 7), (2, 20, 1)]
    )
    def test_it_is_what_brute_force_finds(self, height: int, width: int, side: int) -> None:
        a = noise(5, 2, height, width, 3)
        b = (a + np.random.default_rng(6).normal(0, 25, a.shape)).clip(0, 255).astype(np.uint8)
        assert ssim(a, b) == pytest.approx(brute_ssim(a, b, side), abs=1e-9)

    def test_it_is_one_for_equal_pictures_and_symmetric(self) -> None:
        a, b = noise(7, 2, 20, 14, 3), noise(8, 2, 20, 14, 3)
        assert ssim(a, a.copy()) == pytest.approx(1, abs=1e-12)
        assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
        assert ssim(a, b) < 0.2

    @pytest.mark.parametrize(("x", "y"), [(0, 255), (100, 110), (255, 254)])
    def test_flat_pictures_have_a_closed_form(self, x: int, y: int) -> None:
        a, b = (np.full((1, 16, 16, 3), value, np.uint8) for value in (x, y))
        c1 = 2.55**2
        assert ssim(a, b) == pytest.approx((2 * x * y + c1) / (x * x + y * y + c1), abs=1e-9)

    def test_more_noise_is_less_alike(self) -> None:
        a, _ = world()
        a = a[:3]
        errors = np.random.default_rng(9).normal(0, 1, a.shape)
        values = [ssim(a, (a + size * errors).clip(0, 255).astype(np.uint8)) for size in (2, 6, 18, 54)]
        assert values == sorted(values, reverse=True) and values[0] > 0.9 > values[-1]


class TestFidelity:
    def test_a_video_is_itself(self) -> None:
        a, _ = world()
        found = compared(a, a.copy())
        assert found.identical and found.psnr == math.inf and found.ssim == 1 and found.diverged_at is None
        assert all(chunk.max_difference == 0 and chunk.ssim == 1 for chunk in found.chunks)

    def test_nothing_yet(self) -> None:
        found = Fidelity()
        assert math.isnan(found.psnr) and math.isnan(found.ssim) and found.diverged_at is None

    def test_brightness_that_creeps_moves_luminance_and_the_psnr_it_must(self) -> None:
        a = np.full((FRAMES, 64, 64, 3), 100, np.uint8)
        found = compared(a, brightness_creep(a))
        for number, chunk in enumerate(found.chunks):
            assert chunk.luma == (0, pytest.approx(100 * number / 255, abs=0.006))
            # grey has no colour to lose
            assert chunk.saturation == (0, 0) and chunk.max_difference == number
            assert chunk.psnr == (pytest.approx(20 * math.log10(255 / number)) if number else math.inf)

    def test_fading_colours_move_saturation_alone(self) -> None:
        a = np.zeros((FRAMES, 16, 16, 3), np.uint8)
        a[..., 0], a[..., 1], a[..., 2] = 200, 100, 60
        b = a.astype(float)
        luma = b @ [0.299, 0.587, 0.114]
        for number, chunk in enumerate(SLICES):
            b[chunk] = luma[chunk, ..., None] + (b[chunk] - luma[chunk, ..., None]) * (1 - number / 10)
        found = compared(a, b.round().astype(np.uint8))
        last = found.chunks[-1]
        assert last.saturation == (0, pytest.approx(-100 * 140 * 0.5 / 255, abs=0.3))
        assert last.luma == (0, pytest.approx(0, abs=0.2))

    def test_a_repeated_chunk_is_found_where_it_is(self) -> None:
        a, _ = world()
        found = compared(a, repeated_chunk(a, 3))
        assert [chunk.error > 0 for chunk in found.chunks] == [False, False, False, True, False, False]
        assert found.diverged_at == 3 and found.chunks[3].psnr < DIVERGED_DB

    def test_shuffled_frames_are_found_though_every_frame_is_there(self) -> None:
        a, _ = world()
        b = a.copy()
        b[SLICES[2]] = b[SLICES[2]][::-1]
        found = compared(a, b)
        assert found.diverged_at == 2 and found.chunks[2].ssim < 0.95 and found.chunks[3].ssim == 1

    def test_the_whole_is_weighted_by_frames(self) -> None:
        a = np.full((FRAMES, 16, 16, 3), 50, np.uint8)
        b = a.copy()
        b[:9] += 4
        found = compared(a, b)
        assert found.psnr == pytest.approx(psnr(squared_error(a, b)))
        assert found.ssim == pytest.approx(ssim(a, b), abs=1e-9)

    def test_the_first_chunk_below_the_threshold_counts(self) -> None:
        a = np.full((FRAMES, 16, 16, 3), 50, np.uint8)
        b = a.copy()
        # 8 levels are 30.07 dB and 9 are 29.05
        b[SLICES[1]] += 8
        b[SLICES[3]] += 9
        assert compared(a, b).diverged_at == 3

    @pytest.mark.parametrize("shape", [(12, 64, 64, 3), (9, 32, 64, 3), (0, 64, 64, 3)])
    def test_chunks_of_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="cannot be compared"):
            Fidelity().add(np.zeros((9, 64, 64, 3), np.uint8), np.zeros(shape, np.uint8))


class TestWorld:
    def test_it_is_what_the_evaluation_measures(self) -> None:
        a, prompt = world()
        b = brightness_creep(a, 3)
        found = seen(a, b, prompt.text(), prompt.text())
        for side, frames in zip(found.sides, (a, b), strict=True):
            whole: RolloutMetrics = measure(parse_frames(frames), prompt, SLICES)
            for name in WORLD_METRICS:
                # pixels are summed in other batches
                assert np.allclose(side.curves[name], getattr(whole, name), atol=1e-4, equal_nan=True), name

    def test_a_true_video_is_right_and_a_broken_one_is_not(self) -> None:
        a, prompt = world()
        true, creeping = seen(a, brightness_creep(a, 3), prompt.text(), prompt.text()).sides
        assert np.nanmin(true.curves["identity"]) == 1
        assert np.abs(true.curves["luminance_drift"]).max() < 0.002
        assert creeping.curves["luminance_drift"][-1] == pytest.approx(5 * 3 / 255, abs=0.002)
        still = seen(a, frozen(a, SLICES[2].start), prompt.text(), prompt.text()).sides[1]
        assert np.nanmax(still.curves["speed_error"][2:]) == pytest.approx(1, abs=0.05)
        assert np.nanmax(true.curves["speed_error"]) < 0.2
        doubled = seen(a, repeated_chunk(a, 3), prompt.text(), prompt.text()).sides[1]
        assert doubled.curves["trajectory_rmse"][3] > 5 > np.nanmax(true.curves["trajectory_rmse"])
        assert doubled.curves["teleports"][3] > 0 == np.nanmax(true.curves["teleports"])

    def test_another_prompt_is_not_what_is_shown(self) -> None:
        a, prompt = world()
        swap = {"red": "green", "green": "blue", "blue": "yellow", "yellow": "red"}
        other = ScenePrompt(tuple((swap[colour], shape) for colour, shape in prompt.objects), prompt.family)
        right, wrong = seen(a, a, prompt.text(), other.text()).sides
        assert np.nanmean(right.curves["identity"]) > 0.99 > 0.6 > np.nanmean(wrong.curves["identity"])

    def test_parted_is_the_first_chunk_with_an_object_elsewhere(self) -> None:
        a, prompt = world()
        assert seen(a, a.copy(), prompt.text(), prompt.text()).diverged_at is None
        b = a.copy()
        b[SLICES[4].start :] = np.roll(b[SLICES[4].start :], 3, 2)
        assert seen(a, b, prompt.text(), prompt.text()).diverged_at == 4

    def test_an_event_is_judged_from_the_chunk_that_brought_it(self) -> None:
        plain = "a red circle bouncing"
        told = "a red circle bouncing, the red circle turns blue"
        y, x = np.mgrid[:64, :64]
        frames = np.full((FRAMES, 64, 64, 3), 40, np.uint8)
        for number, frame in enumerate(frames):
            frame[np.hypot(x - 14 - 0.5 * number, y - 30) < 9] = (230, 30, 35)
        found = WorldFidelity(WORLDS["narrow"])
        for chunk in SLICES:
            found.add(frames[chunk], frames[chunk])
        found.update([[plain] * 3 + [told] * 3, [plain] * CHUNKS], last=True)
        # it never turns: right until then, excused while it may be turning, and wrong after that
        assert found.sides[0].curves["identity"].tolist() == [1, 1, 1, 1, 0, 0]
        assert found.sides[1].curves["identity"].tolist() == [1] * CHUNKS

    def test_another_scene_is_judged_by_itself(self) -> None:
        a, prompt = world(3)
        b, other = world(4)
        cut = SLICES[3].start
        frames = np.concatenate([a[:cut], b[: FRAMES - cut]])
        found = WorldFidelity(WORLDS["narrow"])
        for chunk in SLICES:
            found.add(frames[chunk], frames[chunk])
        texts = [prompt.text()] * 3 + [other.text()] * 3
        found.update([texts, texts], last=True)
        identity = found.sides[0].curves["identity"]
        assert len(identity) == CHUNKS and np.nanmin(identity) == 1

    def test_a_prompt_of_no_such_world_is_refused(self) -> None:
        a, _ = world()
        with pytest.raises(PromptError):
            seen(a, a, "a cat on the grass", "a cat on the grass")

    def test_it_is_measured_anew_only_once_there_is_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        a, prompt = world()
        monkeypatch.setattr(fidelity, "WORLD_CHUNKS", 4)
        found, covered = WorldFidelity(WORLDS["narrow"]), []
        for number, chunk in enumerate(SLICES):
            found.add(a[chunk], a[chunk])
            found.update([[prompt.text()] * CHUNKS] * 2, last=number == CHUNKS - 1)
            covered.append(found.chunks)
        assert covered == [1, 2, 3, 4, 4, 4] and found.added == 4

    def test_grammars_name_worlds(self) -> None:
        assert world_of("bounce:narrow") is WORLDS["narrow"]
        assert world_of(None) is None and world_of("bounce:nowhere") is None and world_of("narrow") is None
