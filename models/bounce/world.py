"""The embedded world: coloured shapes with exact motion, simulated and drawn in batches on any device.

Units: positions and radii in pixels of a 64x64 view (x right, y down), speeds in pixels per frame,
16 frames per second. Everything is a tensor with a leading batch axis, so that a GPU can draw the
training set while it trains.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vidkv.models.bounce.prompts import (
    COLOURS,
    FAMILIES,
    MAX_OBJECTS,
    SHAPES,
    WORLDS,
    Family,
    ScenePrompt,
    World,
)

SIZE = 64
FPS = 16
WORLD_WIDTH = 2 * SIZE
WALL = 3.0

PALETTE = torch.tensor(
    [
        [0.90, 0.12, 0.14],
        [0.10, 0.72, 0.22],
        [0.14, 0.30, 0.95],
        [0.97, 0.88, 0.12],
        [0.62, 0.16, 0.82],
        [0.98, 0.50, 0.05],
        [0.10, 0.85, 0.90],
        [0.97, 0.97, 0.97],
    ]
)
BAR_GREY = 0.46
BAR_EDGE_GREY = 0.36
WALL_GREY = 0.58
BACKGROUNDS = ("flat", "vertical", "horizontal", "diagonal", "checker", "stripes")


@dataclass
class Scenes:
    """A batch of b scenes at frame 0; every field is a tensor whose first axis is b.

    Attributes:
        family: (b,) index into FAMILIES.
        count: (b,) objects that exist; the rest of the MAX_OBJECTS places are empty.
        named: (b,) how many of them, from the first, the prompt names.
        colour, shape: (b, 4) indices into COLOURS and SHAPES.
        radius: (b, 4) pixels.
        position, velocity: (b, 4, 2) pixels and pixels per frame, world coordinates.
        bar: (b, 2) left and right edge of the occluder; equal where there is none.
        pan_speed: (b,) camera pixels per frame; 0 where the camera rests.
        background: (b,) index into BACKGROUNDS.
        tint: (b, 2, 3) the two background colours.
        event_frame: (b,) first frame with the new colour; -1 where nothing happens.
        event_colour: (b,) the new colour of object 0.
    """

    family: Tensor
    count: Tensor
    named: Tensor
    colour: Tensor
    shape: Tensor
    radius: Tensor
    position: Tensor
    velocity: Tensor
    bar: Tensor
    pan_speed: Tensor
    background: Tensor
    tint: Tensor
    event_frame: Tensor
    event_colour: Tensor

    def __len__(self) -> int:
        return self.family.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def exists(self) -> Tensor:
        """(b, 4) bool."""
        return torch.arange(MAX_OBJECTS, device=self.count.device) < self.count[:, None]

    def prompts(self) -> list[ScenePrompt]:
        """The prompt of every scene; scenes with an event carry the event clause."""
        rows = zip(
            self.family.tolist(), self.named.tolist(), self.colour.tolist(), self.shape.tolist(),
            self.event_frame.tolist(), self.event_colour.tolist(), strict=True,
        )  # fmt: skip
        return [_describe(*row) for row in rows]


def _describe(
    family: int, named: int, colour: list[int], shape: list[int], event_frame: int, event_colour: int
) -> ScenePrompt:
    objects = tuple((COLOURS[colour[i]], SHAPES[shape[i]]) for i in range(named))
    event = (*objects[0], COLOURS[event_colour]) if event_frame >= 0 else None
    return ScenePrompt(objects, FAMILIES[family], event)


@dataclass
class Trajectory:
    """Exact state over time.

    Attributes:
        position: (b, frames, 4, 2) world coordinates.
        camera: (b, frames) x of the view's left edge.
    """

    position: Tensor
    camera: Tensor

    @property
    def in_view(self) -> Tensor:
        """(b, frames, 4, 2) positions in view coordinates."""
        shift = torch.stack([self.camera, torch.zeros_like(self.camera)], -1)
        return self.position - shift[:, :, None]


def sample_scenes(
    number: int,
    generator: torch.Generator,
    family: Family | None = None,
    event_frames: Tensor | None = None,
    world: World = WORLDS["wide"],
) -> Scenes:
    """Draw scenes from the training distribution.

    Args:
        number: how many.
        generator: source of randomness; its device is the device of the result.
        family: all of one family, or None for the training mixture.
        event_frames: candidate frames for a colour change; None for scenes without events.
        world: how much variety.
    """
    device = generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(number, *shape, generator=generator, device=device)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (number,), generator=generator, device=device)

    if family is None:
        weights = torch.tensor(world.families, device=device)
        kind = torch.multinomial(weights, number, replacement=True, generator=generator)
    else:
        kind = torch.full((number,), FAMILIES.index(family), device=device)
    bouncing, occluded, still, panned = (kind == i for i in range(len(FAMILIES)))
    camera_named, extra = integers(1, 3), integers(1, 3) * int(world.unnamed)
    free = integers(1, world.max_objects + 1)
    count = torch.where(panned, camera_named + extra, torch.where(occluded, integers(1, 3), free))
    named = torch.where(panned, camera_named, count)

    small = (count >= 3)[:, None]
    radius = torch.where(small, uniform(6.2, 7.6, MAX_OBJECTS), uniform(7.0, 9.0, MAX_OBJECTS))
    radius = torch.where(occluded[:, None], uniform(6.2, 7.6, MAX_OBJECTS), radius)
    order = torch.rand(number, len(world.colours), generator=generator, device=device).argsort(1)
    spare = min(MAX_OBJECTS, len(world.colours) - 1)
    angle, speed = uniform(0, 2 * torch.pi, MAX_OBJECTS), uniform(0.5, 1.4, MAX_OBJECTS)
    moves = (bouncing | occluded)[:, None]
    velocity = torch.stack([angle.cos(), angle.sin()], -1) * (speed * moves)[..., None]

    centre, width = uniform(24, 40), uniform(17, 26)
    bar = torch.stack([centre - width / 2, centre + width / 2], -1) * occluded[:, None]
    dark, light = uniform(0.06, 0.20, 1, 1), uniform(0.10, 0.30, 1, 1)
    tint = torch.cat([dark, light], 1) * (1 + uniform(-0.18, 0.18, 2, 3))
    scenes = Scenes(
        family=kind,
        count=count,
        named=named,
        colour=order[:, :MAX_OBJECTS].contiguous(),
        shape=torch.randint(len(SHAPES), (number, MAX_OBJECTS), generator=generator, device=device),
        radius=radius,
        position=torch.zeros(number, MAX_OBJECTS, 2, device=device),
        velocity=velocity,
        bar=bar,
        pan_speed=uniform(1.0, 2.4) * panned,
        background=integers(0, world.backgrounds),
        tint=tint,
        event_frame=torch.full((number,), -1, device=device),
        event_colour=order[:, spare].contiguous(),
    )
    _place(scenes, generator)
    if event_frames is not None:
        picked = torch.randint(len(event_frames), (number,), generator=generator, device=device)
        can = bouncing | still
        scenes.event_frame = torch.where(can, event_frames.to(device)[picked], scenes.event_frame)
    return scenes


def _place(scenes: Scenes, generator: torch.Generator, tries: int = 96) -> None:
    """Put the objects where they do not touch; of `tries` draws the first free one is taken."""
    number, device = len(scenes), scenes.position.device
    unnamed = torch.arange(MAX_OBJECTS, device=device) >= scenes.named[:, None]
    offset = torch.where((scenes.pan_speed > 0)[:, None] & unnamed, float(SIZE), 0.0)
    left = torch.where((scenes.pan_speed > 0) & (scenes.named > 0), WALL, 0.0)
    for i in range(MAX_OBJECTS):
        r = scenes.radius[:, i, None, None]
        low = r + left[:, None, None]
        draw = torch.rand(number, tries, 2, generator=generator, device=device)
        spots = low + draw * (SIZE - r - low)
        spots[..., 0] += offset[:, i, None] - left[:, None] * (offset[:, i, None] > 0)
        free = torch.ones(number, tries, dtype=torch.bool, device=device)
        for j in range(i):
            gap = (spots - scenes.position[:, None, j]).norm(dim=-1)
            free &= gap > (scenes.radius[:, i] + scenes.radius[:, j] + 2)[:, None]
        first = free.float().argmax(1)
        scenes.position[:, i] = spots[torch.arange(number, device=device), first]


def simulate(scenes: Scenes, frames: int) -> Trajectory:
    """Exact motion: straight lines, mirror reflection at the walls, elastic equal-mass collisions."""
    position, velocity = scenes.position.clone(), scenes.velocity.clone()
    exists, radius = scenes.exists, scenes.radius
    moves = (scenes.family[:, None] == FAMILIES.index("bounce")) | (
        scenes.family[:, None] == FAMILIES.index("occluder")
    )
    path = [position.clone()]
    for _ in range(frames - 1):
        advance(position, velocity, radius, exists & moves)
        path.append(position.clone())
    time = torch.arange(frames, device=position.device)
    phase = (scenes.pan_speed[:, None] * time) % (2 * SIZE)
    camera = torch.where(phase < SIZE, phase, 2 * SIZE - phase)
    return Trajectory(torch.stack(path, 1), camera)


def advance(position: Tensor, velocity: Tensor, radius: Tensor, active: Tensor) -> None:
    """Move one frame on, in place.

    Args:
        position, velocity: (b, n, 2).
        radius: (b, n).
        active: (b, n) bool; the others neither move nor collide.
    """
    position += velocity * active[..., None]
    low, high = radius[..., None], SIZE - radius[..., None]
    under, over = position < low, position > high
    hit = (under | over) & active[..., None]
    mirrored = torch.where(under, 2 * low - position, 2 * high - position)
    position.copy_(torch.where(hit, mirrored, position))
    velocity.copy_(torch.where(hit, -velocity, velocity))
    n = position.shape[1]
    for i in range(n):
        for j in range(i + 1, n):
            _collide(position, velocity, radius, active, i, j)


def _collide(position: Tensor, velocity: Tensor, radius: Tensor, active: Tensor, i: int, j: int) -> None:
    away = position[:, j] - position[:, i]
    distance = away.norm(dim=-1).clamp_min(1e-6)
    normal = away / distance[:, None]
    closing = ((velocity[:, i] - velocity[:, j]) * normal).sum(-1)
    touch = (distance < radius[:, i] + radius[:, j]) & (closing > 0) & active[:, i] & active[:, j]
    exchange = normal * (closing * touch)[:, None]
    velocity[:, i] -= exchange
    velocity[:, j] += exchange


def render(scenes: Scenes, path: Trajectory, start: int = 0, stop: int | None = None) -> Tensor:
    """Draw frames start..stop.

    Returns:
        (b, frames, 64, 64, 3) float in [0, 1].
    """
    stop = path.camera.shape[1] if stop is None else stop
    camera, centres = path.camera[:, start:stop], path.in_view[:, start:stop]
    time = torch.arange(start, stop, device=camera.device)
    axis = torch.arange(SIZE, device=camera.device) + 0.5
    x, y = axis.expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)
    frames = _background(scenes, camera, x, y)
    exists = scenes.exists
    for i in range(int(scenes.count.max())):
        after = (scenes.event_frame[:, None] >= 0) & (time >= scenes.event_frame[:, None])
        colour = scenes.colour[:, i, None].expand(-1, len(time))
        if i == 0:
            colour = torch.where(after, scenes.event_colour[:, None], colour)
        ink = PALETTE.to(camera.device)[colour]
        dx = x - centres[:, :, i, 0, None, None]
        dy = y - centres[:, :, i, 1, None, None]
        distance = _distance(dx, dy, scenes.radius[:, i, None, None, None], scenes.shape[:, i])
        alpha = (0.5 - distance).clamp(0, 1) * exists[:, i, None, None, None]
        frames.lerp_(ink[:, :, None, None], alpha[..., None])
    _bar(scenes, frames, x)
    _walls(scenes, frames, camera, x)
    return frames


def _distance(dx: Tensor, dy: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside; areas are 3.14 r², 2.96 r² and 2.00 r²."""
    circle = (dx.square() + dy.square()).sqrt() - radius
    square = torch.maximum(dx.abs(), dy.abs()) - 0.86 * radius
    side = 0.866 * dx.abs() - 0.5 * dy
    triangle = torch.maximum(side, dy) - 0.62 * radius
    kind = shape[:, None, None, None]
    return torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))


def _background(scenes: Scenes, camera: Tensor, x: Tensor, y: Tensor) -> Tensor:
    wide = torch.where(scenes.pan_speed > 0, float(WORLD_WIDTH), float(SIZE))[:, None, None, None]
    x = x + camera[:, :, None, None]
    kind = scenes.background[:, None, None, None]
    across, down = x / wide, (y / SIZE).expand_as(x)
    checker = ((x // 16).floor() + (y // 16).floor()) % 2 * 0.6
    stripes = (x // 8).floor() % 2 * 0.6
    options = [torch.zeros_like(x), down, across, (across + down) / 2, checker, stripes]
    mix = torch.zeros_like(x)
    for index, option in enumerate(options):
        mix = torch.where(kind == index, option, mix)
    return torch.lerp(
        scenes.tint[:, None, None, None, 0], scenes.tint[:, None, None, None, 1], mix[..., None]
    )


def _bar(scenes: Scenes, frames: Tensor, x: Tensor) -> None:
    left, right = (scenes.bar[:, side, None, None, None] for side in (0, 1))
    inside = torch.minimum(x - left, right - x)
    cover = (inside + 0.5).clamp(0, 1) * (right > left)
    grey = torch.where(inside < 2, BAR_EDGE_GREY, BAR_GREY)
    frames.lerp_(grey[..., None].expand_as(frames[:, :1]), cover[..., None])


def _walls(scenes: Scenes, frames: Tensor, camera: Tensor, x: Tensor) -> None:
    world = x + camera[:, :, None, None]
    inside = torch.minimum(world - WALL, WORLD_WIDTH - WALL - world)
    cover = (0.5 - inside).clamp(0, 1) * (scenes.pan_speed > 0)[:, None, None, None]
    frames.lerp_(torch.full_like(frames[:1, :1], WALL_GREY), cover[..., None])
