"""The embedded world: exact physics, exact pixels, and the grammar that describes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vidkv.errors import PromptError
from vidkv.models.bounce import world
from vidkv.models.bounce.prompts import (
    COLOURS,
    EXAMPLES,
    FAMILIES,
    GRAMMAR_WORDS,
    SCENES,
    SHAPES,
    SYNONYMS,
    WORLDS,
    Family,
    ScenePrompt,
    parse,
)
from vidkv.models.bounce.world import PALETTE, SIZE, Scenes, Trajectory, render, simulate


def sample(number: int, family: Family | None = None, seed: int = 0, events: bool = False) -> Scenes:
    frames = torch.arange(3, 9) if events else None
    return world.sample_scenes(number, torch.Generator().manual_seed(seed), family, frames)


def bodies(*rows: tuple[float, float, float, float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, velocity, radius and activity, batch 1, of (x, y, vx, vy, radius) in float64."""
    state = torch.tensor(rows, dtype=torch.float64)[None]
    position, velocity, radius = state[..., :2].clone(), state[..., 2:4].clone(), state[..., 4]
    return position, velocity, radius, torch.ones_like(radius, dtype=torch.bool)


def mirrored(start: float, speed: float, time: int, radius: float) -> float:
    """Closed form of a point that bounces between two walls."""
    span = SIZE - 2 * radius
    phase = (start - radius + speed * time) % (2 * span)
    return radius + (phase if phase < span else 2 * span - phase)


class TestMotion:
    def test_walls_mirror_exactly(self) -> None:
        position, velocity, radius, active = bodies((20.25, 41.5, 1.37, -0.83, 7.3))
        for time in range(1, 600):
            world.advance(position, velocity, radius, active)
            expected = [mirrored(20.25, 1.37, time, 7.3), mirrored(41.5, -0.83, time, 7.3)]
            assert position[0, 0].tolist() == pytest.approx(expected, abs=1e-9)
            assert velocity[0, 0].abs().tolist() == pytest.approx([1.37, 0.83], abs=1e-12)

    def test_a_head_on_collision_exchanges_velocities(self) -> None:
        position, velocity, radius, active = bodies((20, 30, 1.2, 0, 7), (35, 30, -0.6, 0, 7))
        for _ in range(3):
            world.advance(position, velocity, radius, active)
        assert velocity[0].tolist() == [pytest.approx([-0.6, 0]), pytest.approx([1.2, 0])]

    def test_a_glancing_collision_exchanges_only_what_is_along_the_normal(self) -> None:
        position, velocity, radius, active = bodies((25, 25, 1, 0, 7), (35, 34, 0, 0, 7))
        world.advance(position, velocity, radius, active)
        normal = torch.tensor([9.0, 9.0], dtype=torch.float64) / math.sqrt(162)
        before = torch.tensor([1.0, 0.0], dtype=torch.float64)
        passed_on = (before @ normal) * normal
        torch.testing.assert_close(velocity[0, 1], passed_on)
        torch.testing.assert_close(velocity[0, 0], before - passed_on)

    def test_a_collision_conserves_momentum(self) -> None:
        position, velocity, radius, active = bodies((25, 25, 1.1, 0.4, 7), (34, 33, -0.5, 0.2, 6.5))
        before = velocity.sum(1)
        changed = velocity.clone()
        world.advance(position, changed, radius, active)
        assert not torch.equal(changed, velocity)
        torch.testing.assert_close(changed.sum(1), before)

    def test_objects_that_part_do_not_collide_again(self) -> None:
        position, velocity, radius, active = bodies((28, 30, -0.5, 0, 7), (38, 30, 0.5, 0, 7))
        before = velocity.clone()
        world.advance(position, velocity, radius, active)
        assert torch.equal(velocity, before)

    def test_what_is_not_active_neither_moves_nor_collides(self) -> None:
        position, velocity, radius, active = bodies((20, 30, 1, 0, 7), (33, 30, 0.4, 0.4, 7))
        active[0, 1] = False
        for _ in range(9):
            world.advance(position, velocity, radius, active)
        assert position[0, 1].tolist() == [33, 30]
        assert position[0, 0].tolist() == pytest.approx([29, 30])

    def test_energy_is_conserved_through_all_collisions(self) -> None:
        scenes = sample(128, "bounce")
        position, velocity = scenes.position.double(), scenes.velocity.double()
        energy = (velocity.square().sum(-1) * scenes.exists).sum(1)
        directions = velocity.clone()
        for _ in range(300):
            world.advance(position, velocity, scenes.radius.double(), scenes.exists)
        after = (velocity.square().sum(-1) * scenes.exists).sum(1)
        torch.testing.assert_close(after, energy, rtol=1e-12, atol=0)
        assert ((velocity.abs() - directions.abs()).abs() > 0.1).any(), "nothing ever collided"

    @pytest.mark.parametrize("family", ["bounce", "occluder"])
    def test_overlap_stays_below_the_motion_of_one_frame(self, family: Family) -> None:
        scenes = sample(128, family)
        position = simulate(scenes, 300).position
        # the fastest that two of the objects can close in with the energy of all
        energy = (scenes.velocity.square().sum(-1) * scenes.exists).sum(1)
        bound = (2 * energy).sqrt()
        pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        for i, j in pairs:
            there = scenes.exists[:, i] & scenes.exists[:, j]
            gap = (position[:, :, i] - position[:, :, j]).norm(dim=-1).amin(1)
            overlap = scenes.radius[:, i] + scenes.radius[:, j] - gap
            assert (overlap[there] <= bound[there]).all()

    def test_objects_stay_inside_the_walls(self) -> None:
        scenes = sample(64, "bounce")
        position = simulate(scenes, 200).position
        radius = scenes.radius[:, None, :, None]
        inside = (position >= radius - 1e-3) & (position <= SIZE - radius + 1e-3)
        assert inside[scenes.exists[:, None, :, None].expand_as(inside)].all()

    @pytest.mark.parametrize("family", ["still", "camera"])
    def test_resting_families_rest(self, family: Family) -> None:
        scenes = sample(16, family)
        position = simulate(scenes, 40).position
        assert torch.equal(position, scenes.position[:, None].expand_as(position))


class TestCamera:
    def test_it_is_periodic_and_shows_the_same_pixels_again(self) -> None:
        scenes = sample(8, "camera")
        scenes.pan_speed.fill_(2.0)
        path = simulate(scenes, 140)
        assert torch.equal(path.camera[:, 64:], path.camera[:, :-64])
        assert torch.equal(render(scenes, path, 70, 74), render(scenes, path, 6, 10))

    def test_it_spans_the_world_at_one_speed_and_others_have_none(self) -> None:
        scenes = sample(64)
        camera = simulate(scenes, 130).camera
        panned = scenes.pan_speed > 0
        assert torch.equal(panned, scenes.family == FAMILIES.index("camera"))
        assert not camera[~panned].any()
        assert camera.amin() >= 0 and camera.amax() <= SIZE
        assert (camera[panned].amax(1) > SIZE - 1.3).all()
        step = camera[panned].diff(dim=1).abs()
        torch.testing.assert_close(step.median(1).values, scenes.pan_speed[panned], rtol=1e-4, atol=0)

    def test_a_prompt_names_what_the_first_frame_shows(self) -> None:
        scenes = sample(64, "camera")
        index = torch.arange(4).expand(64, 4)
        named, unnamed = index < scenes.named[:, None], scenes.exists & (index >= scenes.named[:, None])
        x, radius = scenes.position[..., 0], scenes.radius
        assert ((x - radius > 0) & (x + radius < SIZE))[named].all()
        assert (x - radius >= SIZE - 1e-4)[unnamed].all()
        assert unnamed.any()


class TestSampling:
    def test_scenes_start_apart_and_in_range(self) -> None:
        scenes = sample(512)
        exists, speed = scenes.exists, scenes.velocity.norm(dim=-1)
        moving = exists & (speed > 0)
        assert speed[moving].amin() >= 0.5 - 1e-6 and speed[moving].amax() <= 1.4 + 1e-6
        assert scenes.radius.amin() >= 6.2 and scenes.radius.amax() <= 9
        for i in range(4):
            for j in range(i):
                both = exists[:, i] & exists[:, j]
                gap = (scenes.position[:, i] - scenes.position[:, j]).norm(dim=-1)
                assert (gap > scenes.radius[:, i] + scenes.radius[:, j])[both].all()
                assert (scenes.colour[:, i] != scenes.colour[:, j]).all()
        assert (scenes.event_colour[:, None] != scenes.colour).all()

    def test_the_bar_hides_any_object_and_belongs_to_one_family(self) -> None:
        scenes = sample(512)
        width = scenes.bar[:, 1] - scenes.bar[:, 0]
        occluded = scenes.family == FAMILIES.index("occluder")
        # the widest shape is the triangle, 2.15 radii across
        assert (width[occluded] > 2.15 * scenes.radius[occluded].amax(1)).all()
        assert not width[~occluded].any()

    def test_a_narrow_world_is_narrow(self) -> None:
        narrow = WORLDS["narrow"]
        generator = torch.Generator().manual_seed(0)
        scenes = world.sample_scenes(256, generator, world=narrow)
        assert scenes.count.amax() <= narrow.max_objects
        assert torch.equal(scenes.count, scenes.named)
        assert scenes.background.amax() < narrow.backgrounds
        used = {COLOURS[i] for i in scenes.colour[scenes.exists].tolist()}
        assert used == set(narrow.colours)
        for prompt in scenes.prompts():
            assert parse(prompt.text(), narrow) == prompt

    def test_the_same_seed_gives_the_same_pixels(self) -> None:
        first, second = (sample(4, seed=7) for _ in range(2))
        path = simulate(first, 20)
        assert torch.equal(render(first, path), render(second, simulate(second, 20)))


def naive_pixel(scenes: Scenes, path: Trajectory, frame: int, row: int, column: int) -> list[float]:
    """One pixel of scene 0, by the definition of every shape and in plain floats."""
    x, y = column + 0.5, row + 0.5
    camera = float(path.camera[0, frame])
    colour = naive_ground(scenes, x + camera, y)
    for i in range(int(scenes.count[0])):
        cx, cy = path.position[0, frame, i].tolist()
        distance = naive_distance(
            x + camera - cx, y - cy, float(scenes.radius[0, i]), SHAPES[int(scenes.shape[0, i])]
        )
        turned = i == 0 and 0 <= int(scenes.event_frame[0]) <= frame
        ink = PALETTE[int(scenes.event_colour[0] if turned else scenes.colour[0, i])].tolist()
        colour = blend(colour, ink, 0.5 - distance)
    left, right = scenes.bar[0].tolist()
    if right > left:
        inside = min(x - left, right - x)
        colour = blend(colour, [0.36 if inside < 2 else 0.46] * 3, inside + 0.5)
    if float(scenes.pan_speed[0]) > 0:
        inside = min(x + camera - 3, 125 - x - camera)
        colour = blend(colour, [0.58] * 3, 0.5 - inside)
    return colour


def blend(below: list[float], above: list[float], cover: float) -> list[float]:
    cover = min(max(cover, 0.0), 1.0)
    return [b + (a - b) * cover for a, b in zip(above, below, strict=True)]


def naive_distance(dx: float, dy: float, radius: float, shape: str) -> float:
    if shape == "circle":
        return math.hypot(dx, dy) - radius
    if shape == "square":
        return max(abs(dx), abs(dy)) - 0.86 * radius
    return max(0.866 * abs(dx) - 0.5 * dy, dy) - 0.62 * radius


def naive_ground(scenes: Scenes, x: float, y: float) -> list[float]:
    wide = 128 if float(scenes.pan_speed[0]) > 0 else 64
    mix = {
        "flat": 0.0,
        "vertical": y / 64,
        "horizontal": x / wide,
        "diagonal": (x / wide + y / 64) / 2,
        "checker": 0.6 * ((x // 16 + y // 16) % 2),
        "stripes": 0.6 * (x // 8 % 2),
    }[world.BACKGROUNDS[int(scenes.background[0])]]
    dark, light = scenes.tint[0].tolist()
    return [d + (b - d) * mix for d, b in zip(dark, light, strict=True)]


class TestRenderer:
    @pytest.mark.parametrize("background", range(len(world.BACKGROUNDS)))
    def test_every_pixel_follows_the_definition(self, background: int) -> None:
        family = FAMILIES[background % len(FAMILIES)]
        scenes = sample(1, family, seed=20 + background, events=family in ("bounce", "still"))
        scenes.background.fill_(background)
        path = simulate(scenes, 12)
        frame = 9
        drawn = render(scenes, path, frame, frame + 1)[0, 0]
        expected = torch.tensor(
            [[naive_pixel(scenes, path, frame, r, c) for c in range(SIZE)] for r in range(1, SIZE, 2)]
        )
        torch.testing.assert_close(drawn[1::2], expected, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("shape", range(len(SHAPES)))
    def test_shapes_have_their_area_and_their_centre(self, shape: int) -> None:
        scenes = sample(1, "still", seed=3)
        scenes.count.fill_(1)
        scenes.shape.fill_(shape)
        scenes.tint.zero_()
        scenes.position[0, 0] = torch.tensor([30.3, 33.8])
        image = render(scenes, simulate(scenes, 1))[0, 0] / PALETTE[scenes.colour[0, 0]]
        cover = image[..., 0]
        radius = float(scenes.radius[0, 0])
        area = {"circle": math.pi, "square": 2.958, "triangle": 1.997}[SHAPES[shape]] * radius**2
        axis = torch.arange(SIZE) + 0.5
        assert float(cover.sum()) == pytest.approx(area, rel=0.01)
        assert float((cover.sum(0) * axis).sum() / cover.sum()) == pytest.approx(30.3, abs=0.02)
        assert float((cover.sum(1) * axis).sum() / cover.sum()) == pytest.approx(33.8, abs=0.05)

    def test_a_slice_is_that_part_of_the_whole(self) -> None:
        scenes = sample(3, events=True)
        path = simulate(scenes, 11)
        assert torch.equal(render(scenes, path, 4, 9), render(scenes, path)[:, 4:9])

    def test_a_scene_does_not_depend_on_its_batch(self) -> None:
        scenes = sample(9, events=True)
        path = simulate(scenes, 6)
        part = slice(4, 6)
        alone = render(scenes[part], Trajectory(path.position[part], path.camera[part]))
        assert torch.equal(alone, render(scenes, path)[part])

    def test_nothing_shows_through_the_bar(self) -> None:
        scenes = sample(8, "occluder")
        path = simulate(scenes, 60)
        frames = render(scenes, path)
        for b in range(8):
            left, right = (round(edge) for edge in scenes.bar[b].tolist())
            bar = frames[b, :, :, left + 1 : right - 1]
            assert torch.equal(bar, bar[:1, :1].expand_as(bar))

    def test_an_event_changes_one_colour_at_its_frame(self) -> None:
        scenes = sample(1, "still", seed=1, events=True)
        path = simulate(scenes, 12)
        frames = render(scenes, path)[0]
        event = int(scenes.event_frame[0])
        plain = sample(1, "still", seed=1)
        assert torch.equal(frames[:event], render(plain, path)[0, :event])
        x, y = (int(v) for v in path.position[0, event, 0].tolist())
        assert torch.equal(frames[event, y, x], PALETTE[scenes.event_colour[0]])
        prompt = scenes.prompts()[0]
        assert prompt.event == (*prompt.objects[0], COLOURS[int(scenes.event_colour[0])])


def message(text: str, **options: Any) -> str:
    with pytest.raises(PromptError) as error:
        parse(text, **options)
    return str(error.value)


class TestGrammar:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_sampled_prompt_reads_back(self, family: Family) -> None:
        prompts = sample(128, family, events=True).prompts()
        for prompt in prompts:
            assert parse(prompt.text()) == prompt
        assert {len(p.objects) for p in prompts} >= {1, 2}
        assert {p.family for p in prompts} == {family}
        assert any(p.event for p in prompts) == (family in ("bounce", "still"))

    @pytest.mark.parametrize("example", EXAMPLES)
    def test_examples_are_spelt_as_trained(self, example: str) -> None:
        assert parse(example).text() == example

    @pytest.mark.parametrize(
        "spelling",
        [
            "A RED Ball and a Blue box moving.",
            "a red disc, a blue square bounce",
            "a red circle , and a blue square floating",
            "an red circle and an blue square bouncing",
        ],
    )
    def test_other_spellings_mean_the_same(self, spelling: str) -> None:
        assert parse(spelling).text() == "a red circle and a blue square bouncing"

    def test_synonyms_are_of_the_vocabulary(self) -> None:
        known = {*GRAMMAR_WORDS, *COLOURS, *SHAPES}
        assert set(SYNONYMS.values()) <= known
        assert not set(SYNONYMS) & known

    def test_every_scene_is_read(self) -> None:
        for family, words in SCENES.items():
            assert parse(f"a white triangle {words}").family == family

    def test_after_the_event_the_new_colour_is_a_plain_object(self) -> None:
        prompt = parse("a red circle and a green square resting, the red circle turns blue")
        after = ScenePrompt((("blue", "circle"), ("green", "square")), "still")
        assert prompt.after_event() == after
        assert after.after_event() is after

    @pytest.mark.parametrize("text", ["", " \n\t "])
    def test_an_empty_prompt_is_answered_with_an_example(self, text: str) -> None:
        assert message(text) == f'the prompt is empty; try "{EXAMPLES[0]}"'

    def test_a_megabyte_is_refused_in_one_short_line(self) -> None:
        said = message("a red circle " * 80_000)
        assert "1,040,000 characters" in said and "at most 400" in said
        assert len(said) < 120

    def test_unknown_words_list_the_vocabulary(self) -> None:
        said = message("a red hexagon bouncing wildly")
        assert said.startswith("unknown words 'hexagon', 'wildly'")
        assert all(word in said for word in (*COLOURS, *SHAPES, *GRAMMAR_WORDS))

    def test_one_unknown_word_is_singular_and_cut(self) -> None:
        said = message(f"a red circle {'x' * 200}")
        assert said.startswith(f"unknown word '{'x' * 30}';")

    def test_at_most_five_unknown_words_are_shown(self) -> None:
        said = message("one two three four five six seven")
        assert said.split(";")[0].count("'") == 10

    @pytest.mark.parametrize(
        "text", ["a red ☃ bouncing", "a red círculo bouncing", "a red circle 7 bouncing"]
    )
    def test_signs_outside_the_language_are_unknown_words(self, text: str) -> None:
        assert message(text).startswith("unknown word")

    @pytest.mark.parametrize(
        "text",
        [
            "red circle bouncing",
            "a circle red bouncing",
            "a red circle",
            "bouncing",
            "a red circle a blue square bouncing",
            "a red circle bouncing the red turns blue",
            "a red circle bouncing behind a bar resting",
        ],
    )
    def test_known_words_in_an_unknown_order_show_the_examples(self, text: str) -> None:
        said = message(text)
        assert said.startswith(f"cannot read {text!r}")
        assert all(example in said for example in EXAMPLES)

    def test_too_many_objects_are_counted(self) -> None:
        names = ", ".join(f"a {colour} circle" for colour in COLOURS[:5])
        assert message(f"{names} bouncing").startswith("5 objects;")

    def test_a_colour_cannot_name_two_objects(self) -> None:
        assert message("a red circle and a red square bouncing").startswith("two red objects")

    def test_an_event_needs_its_object(self) -> None:
        said = message("a red circle bouncing, the red square turns blue")
        assert said == "the red square that turns blue is not among the objects of the prompt"

    def test_an_event_needs_a_free_colour(self) -> None:
        said = message("a red circle and a blue square resting, the red circle turns blue")
        assert said == "the red circle cannot turn blue: another object is blue already"

    def test_a_narrow_model_says_what_it_knows(self) -> None:
        narrow = WORLDS["narrow"]
        said = message("a purple circle bouncing", world=narrow)
        assert said.startswith("unknown word 'purple'")
        assert "red green blue yellow |" in said
        text = "a red circle, a green circle and a blue circle bouncing"
        assert message(text, world=narrow) == "3 objects; this model draws at most 2"
