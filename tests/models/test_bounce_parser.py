"""The parser finds exact state again, also in pixels that a VAE or a codec has been through."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidkv.models.bounce.parser import (
    GRID,
    Parsed,
    bar_extent,
    components,
    coverage,
    luminance,
    nearest_paint,
    noise_floor,
    parse_frames,
)
from vidkv.models.bounce.prompts import COLOURS, FAMILIES, SHAPES, Family
from vidkv.models.bounce.world import PALETTE, SIZE, Scenes, render, sample_scenes, simulate

Frames = npt.NDArray[np.uint8]
Placed = tuple[str, str, float, float]


def blurred(clips: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (b, f, h, w, 3)."""
    taps = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    planes = clips.movedim(-1, 2).reshape(-1, 1, SIZE, SIZE)
    planes = F.pad(planes, (4, 4, 4, 4), mode="replicate")
    planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    return planes.reshape(*clips.shape[:2], 3, SIZE, SIZE).movedim(2, -1)


def soft_and_noisy(clips: Tensor) -> Tensor:
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))
    return blurred(clips, 0.8) + 0.03 * noise


def tinted(clips: Tensor) -> Tensor:
    """Every clip with its own error of brightness and hue."""
    generator = torch.Generator().manual_seed(2)
    gain = 1 + 0.12 * (2 * torch.rand(len(clips), 1, 1, 1, 1, generator=generator) - 1)
    cast = 0.1 * (2 * torch.rand(len(clips), 1, 1, 1, 3, generator=generator) - 1)
    return soft_and_noisy(clips) * gain + cast


def coarse_chroma(clips: Tensor) -> Tensor:
    """Colour at half the resolution of luminance, as in 4:2:0 video."""
    luma = (clips @ torch.tensor([0.2126, 0.7152, 0.0722]))[..., None]
    chroma = (clips - luma).movedim(-1, 2).reshape(-1, 3, SIZE, SIZE)
    chroma = F.interpolate(F.avg_pool2d(chroma, 2), scale_factor=2, mode="bilinear")
    return luma + chroma.reshape(*clips.shape[:2], 3, SIZE, SIZE).movedim(2, -1)


def scene(*objects: Placed, family: Family = "still", background: int = 0, radius: float = 7.0) -> Scenes:
    """One scene of given colours, shapes and centres; of the background 0.15 grey."""
    scenes = sample_scenes(1, torch.Generator().manual_seed(0), family)
    scenes.count.fill_(len(objects))
    scenes.background.fill_(background)
    scenes.tint.copy_(torch.tensor([[0.1] * 3, [0.2] * 3]))
    scenes.radius.fill_(radius)
    for i, (colour, shape, x, y) in enumerate(objects):
        scenes.colour[0, i] = COLOURS.index(colour)
        scenes.shape[0, i] = SHAPES.index(shape)
        scenes.position[0, i] = torch.tensor([x, y])
    return scenes


def drawn(scenes: Scenes, frames: int = 1) -> Frames:
    clip = render(scenes, simulate(scenes, frames))[0]
    return (clip * 255).round().to(torch.uint8).numpy()


def seen(*objects: Placed, radius: float = 7.0) -> Parsed:
    return parse_frames(drawn(scene(*objects, radius=radius)))


class TestNoiseFloor:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_drawn_frames_are_read_exactly(self, family: Family) -> None:
        floor = noise_floor(family, scenes=32, frames=2)
        assert floor.objects > 15
        assert floor.identity == floor.colour == floor.shape == 1
        assert floor.count_error == floor.false_whole == floor.bar_missed == 0
        assert floor.centre_p50 < 0.03 and floor.centre_p99 < 0.12

    @pytest.mark.parametrize("family", FAMILIES)
    def test_blur_and_noise_change_no_identity(self, family: Family) -> None:
        floor = noise_floor(family, soft_and_noisy, scenes=32, frames=2)
        assert floor.identity == 1
        assert floor.count_error == floor.false_whole == floor.bar_missed == 0
        assert floor.centre_p99 < 0.2

    @pytest.mark.parametrize("degrade", [tinted, coarse_chroma])
    @pytest.mark.parametrize("family", ["bounce", "occluder"])
    def test_nor_do_a_cast_and_coarse_chroma(self, family: Family, degrade: Any) -> None:
        floor = noise_floor(family, degrade, scenes=32, frames=2)
        assert floor.identity == 1 and floor.false_whole == 0
        assert floor.count_error < 0.02 and floor.bar_missed == 0

    def test_the_floor_sees_a_parser_that_fails(self) -> None:
        """With red and blue exchanged, colours are wrong where they differ and shapes are not."""
        floor = noise_floor("still", lambda clips: clips.flip(-1), scenes=16, frames=1)
        assert floor.colour < 0.6 and floor.identity <= floor.colour and floor.shape == 1

    def test_the_floor_sees_missing_objects(self) -> None:
        floor = noise_floor("bounce", torch.zeros_like, scenes=8, frames=2)
        assert floor.identity == 0 and floor.count_error >= 1


class TestIdentity:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("radius", [6.2, 9.0])
    def test_every_paint_and_shape(self, shape: str, radius: float) -> None:
        for colour in COLOURS:
            (one,) = seen((colour, shape, 30.4, 25.7), radius=radius).objects[0]
            assert (one.colour, one.shape, one.whole) == (colour, shape, True)
            assert (one.x, one.y) == (pytest.approx(30.4, abs=0.1), pytest.approx(25.7, abs=0.1))
            assert one.radius == pytest.approx(radius, abs=0.15)
            paint = PALETTE[COLOURS.index(colour)].tolist()
            assert one.rgb == pytest.approx(paint, abs=0.004)
            assert one.ground == pytest.approx([0.1] * 3, abs=0.01)
            assert one.confidence > 0.9

    def test_paints_keep_their_name_within_a_tenth(self) -> None:
        generator = np.random.default_rng(0)
        for _ in range(50):
            error = generator.uniform(-0.1, 0.1, (8, 3))
            gain = generator.uniform(0.88, 1.12, (8, 1))
            assert nearest_paint((PALETTE.numpy() * gain + error).clip(0, 1)).tolist() == list(range(8))

    def test_confidence_falls_between_two_shapes(self) -> None:
        square = drawn(scene(("green", "square", 30, 30), radius=8)).astype(float)
        circle = drawn(scene(("green", "circle", 30, 30), radius=7.6)).astype(float)
        between = ((square + circle) / 2).astype(np.uint8)
        assert parse_frames(between).objects[0][0].confidence < 0.6

    def test_a_shape_in_two_tints_is_one_object(self) -> None:
        """A VAE may paint a part of an object in the neighbouring colour."""
        frame = drawn(scene(("cyan", "circle", 30, 30), radius=8))
        part = frame[:, :, :30]
        blue = (PALETTE[COLOURS.index("blue")] * 255).byte().numpy()
        part[(part[..., 2] > 200)] = blue
        (one,) = parse_frames(frame).objects[0]
        assert one.shape == "circle" and one.whole
        assert one.x == pytest.approx(30, abs=0.7)

    def test_two_objects_of_one_colour_are_two(self) -> None:
        found = seen(("red", "circle", 15, 15), ("red", "square", 45, 45)).objects[0]
        assert [one.colour for one in found] == ["red", "red"]


class TestFlags:
    def test_only_what_is_cut_is_flagged_at_the_border(self) -> None:
        whole, cut = seen(("red", "circle", 30, 30), ("blue", "circle", 60, 30)).objects[0]
        assert (whole.colour, whole.at_border) == ("red", False)
        assert (cut.colour, cut.at_border, cut.whole) == ("blue", True, False)

    def test_touching_objects_are_two_and_flagged(self) -> None:
        found = seen(
            ("red", "circle", 20, 30), ("yellow", "circle", 33.5, 30), ("green", "square", 50, 50)
        ).objects[0]
        flags = {one.colour: one.touching for one in found}
        assert flags == {"red": True, "yellow": True, "green": False}

    @pytest.mark.parametrize("x", [20.0, 23.0])
    def test_what_the_bar_cuts_is_flagged(self, x: float) -> None:
        scenes = scene(("white", "square", x, 30), family="occluder")
        scenes.velocity.zero_()
        scenes.bar.copy_(torch.tensor([[25.0, 45.0]]))
        (one,) = parse_frames(drawn(scenes)).objects[0]
        assert one.at_bar and not one.whole and not one.at_border

    def test_a_sliver_at_the_border_is_not_an_object(self) -> None:
        assert not seen(("orange", "square", -5.4, 30)).objects[0]

    @pytest.mark.parametrize("colour", ["white", "red"])
    def test_a_wall_beside_an_object_is_neither_object_nor_part_of_it(self, colour: str) -> None:
        scenes = scene((colour, "square", 10.1, 30), family="camera")
        (one,) = parse_frames(drawn(scenes)).objects[0]
        assert (one.colour, one.shape) == (colour, "square")
        assert one.x == pytest.approx(10.1, abs=0.15)


class TestBar:
    @pytest.mark.parametrize("background", range(6))
    def test_its_edges_are_found_before_any_background(self, background: int) -> None:
        placed = ("white", "square", 55.0, 20.0), ("yellow", "circle", 10.0, 30.0)
        scenes = scene(*placed, family="occluder", background=background)
        scenes.tint.copy_(torch.tensor([[0.08, 0.07, 0.06], [0.33, 0.3, 0.27]]))
        extent = bar_extent(drawn(scenes)[0])
        assert extent == pytest.approx(scenes.bar[0].tolist(), abs=0.75)

    @pytest.mark.parametrize("family", ["bounce", "still", "camera"])
    def test_there_is_none_elsewhere(self, family: Family) -> None:
        scenes = sample_scenes(40, torch.Generator().manual_seed(4), family)
        frames = (render(scenes, simulate(scenes, 1))[:, 0] * 255).round().byte()
        assert all(bar_extent(frame) is None for frame in frames)

    def test_a_frame_that_hides_it_has_the_bar_of_its_clip(self) -> None:
        frames = drawn(scene(("red", "circle", 55, 20), family="occluder"), 5)
        frames[2, ::2] = 255 - frames[2, ::2]
        parsed = parse_frames(frames)
        assert np.array_equal(parsed.bar, np.repeat(parsed.bar[:1], 5, 0))


class TestWholeFrames:
    def test_the_ground_is_that_of_the_scene_where_nothing_hides_it(self) -> None:
        scenes = scene(("red", "circle", 20, 20), background=5)
        ground = parse_frames(drawn(scenes)).ground[0]
        stripes = np.where(np.arange(GRID) % 2, 0.16, 0.1)
        hidden = np.isnan(ground)
        assert hidden[2, 2] and not hidden[4:].any()
        expected = np.broadcast_to(stripes, (GRID, GRID))
        np.testing.assert_allclose(ground[~hidden], expected[~hidden], atol=0.003)

    def test_luminance_is_the_mean_of_the_frame(self) -> None:
        frames = np.zeros((2, SIZE, SIZE, 3), np.uint8)
        frames[1, :, : SIZE // 2] = (0, 255, 0)
        assert parse_frames(frames).luminance.tolist() == pytest.approx([0, 0.7152 / 2], abs=1e-5)
        assert luminance(np.ones((1, 3), np.float32)).item() == pytest.approx(1)

    def test_coverage_is_the_renderers_alpha(self) -> None:
        scenes = scene(("green", "triangle", 30.3, 33.3), ("red", "circle", 50, 20))
        frame = render(scenes, simulate(scenes, 1))[0, 0]
        paint = PALETTE[COLOURS.index("green")]
        alpha = ((frame - 0.1) @ (paint - 0.1) / (paint - 0.1).square().sum())[24:44, 20:41]
        cover = coverage(drawn(scenes), "green")[0]
        np.testing.assert_allclose(cover[24:44, 20:41], alpha.numpy(), atol=0.02)
        assert cover[10:20, 45:55].max() == 0

    def test_a_clip_longer_than_a_batch_is_read_frame_by_frame(self) -> None:
        scenes = sample_scenes(1, torch.Generator().manual_seed(5), "bounce")
        frames = torch.from_numpy(drawn(scenes, 131))
        whole = parse_frames(frames)
        assert len(whole) == 131
        for i in (0, 63, 64, 130):
            alone = parse_frames(frames[i : i + 1].numpy())
            assert alone.objects[0] == whole.objects[i]
            assert alone.luminance[0] == whole.luminance[i]

    def test_a_part_of_the_state_is_the_state_of_the_part(self) -> None:
        frames = drawn(sample_scenes(1, torch.Generator().manual_seed(6), "bounce"), 9)
        part, again = parse_frames(frames)[3:7], parse_frames(frames[3:7])
        assert part.objects == again.objects
        assert np.array_equal(part.ground, again.ground, equal_nan=True)

    def test_no_frames_and_empty_frames(self) -> None:
        assert len(parse_frames(np.zeros((0, SIZE, SIZE, 3), np.uint8))) == 0
        generator = np.random.default_rng(0)
        noise = generator.integers(20, 90, (3, SIZE, SIZE, 1), np.uint8).repeat(3, -1)
        assert parse_frames(noise).objects == [[], [], []]

    def test_other_arrays_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"float32 \(2, 64, 64, 3\), not uint8"):
            parse_frames(torch.zeros(2, SIZE, SIZE, 3))
        with pytest.raises(ValueError, match="not uint8"):
            parse_frames(np.zeros((2, 32, 32, 3), np.uint8))


class TestComponents:
    @pytest.mark.parametrize("kinds", [1, 3])
    @pytest.mark.parametrize("density", [0.45, 0.7])
    def test_they_equal_a_flood_fill(self, kinds: int, density: float) -> None:
        generator = np.random.default_rng(kinds)
        kind = generator.integers(0, kinds, (3, 23, 31)).astype(np.int8)
        kind[generator.random(kind.shape) > density] = -1
        label, number = components(kind)
        expected = flood_fill(kind)
        assert number == expected.max() + 1
        assert np.array_equal(label < 0, expected < 0)
        pairs = set(zip(label[label >= 0].tolist(), expected[label >= 0].tolist(), strict=True))
        assert len(pairs) == number

    def test_a_spiral_is_one_region(self) -> None:
        kind = np.full((1, 9, 9), -1, np.int8)
        rows = "111111111 000000001 111111101 100000101 101110101 101000101 101111101 100000001"
        for row, columns in enumerate([*rows.split(), "111111111"]):
            kind[0, row] = [int(c) - 1 for c in columns]
        assert components(kind)[1] == 1


def flood_fill(kind: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    label = np.full(kind.shape, -1, np.int64)
    number = 0
    for start in zip(*np.nonzero(kind >= 0), strict=True):
        if label[start] >= 0:
            continue
        queue = deque([start])
        label[start] = number
        while queue:
            f, r, c = queue.popleft()
            for place in ((f, r - 1, c), (f, r + 1, c), (f, r, c - 1), (f, r, c + 1)):
                inside = 0 <= place[1] < kind.shape[1] and 0 <= place[2] < kind.shape[2]
                if inside and label[place] < 0 and kind[place] == kind[start]:
                    label[place] = number
                    queue.append(place)
        number += 1
    return label
