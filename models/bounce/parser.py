"""State from pixels: which shapes a frame shows, where, and how sure that is.

Units follow `world`: pixels of a 64x64 view, x right, y down, colours in [0, 1]. What a VAE or a
codec does to a frame is expected here: edges may be soft, and brightness and hue may be off by 0.1.
Only `Seen.whole` objects are fit to be judged; the others are cut off by something before them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidkv.models.bounce.prompts import COLOURS, MAX_OBJECTS, SHAPES, WORLDS, Family, World
from vidkv.models.bounce.world import (
    PALETTE,
    SIZE,
    Scenes,
    Trajectory,
    render,
    sample_scenes,
    simulate,
)
from vidkv.models.bounce.world import _distance as signed_distance

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Masks = npt.NDArray[np.bool_]
Pixels = Tensor | npt.NDArray[np.uint8]

AREA_PER_SQUARED_RADIUS = {
    "circle": np.pi,
    "square": (2 * 0.86) ** 2,
    "triangle": 27**0.5 * 0.62**2,
}
REACH = {  # how far an outline goes from the centre, in radii: left and right, up, down
    "circle": (1.0, 1.0, 1.0),
    "square": (0.86, 0.86, 0.86),
    "triangle": (0.62 * 3**0.5, 1.24, 0.62),
}
GRID = 8

# the plane of hue and saturation: grey is its origin, distances there are distances in RGB
CHROMA = np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]], np.float32).T / 6**0.5
WHITE = COLOURS.index("white")
PAINTS = PALETTE.numpy()
HUES = (PAINTS @ CHROMA)[:WHITE]
HUE_DIRECTIONS = HUES / np.linalg.norm(HUES, axis=1, keepdims=True)
# just below half way from a background to the palest paint, and from a wall to white
COLOURED_FROM = 0.21
WHITE_FROM = 0.64

# pixels; the smallest shape of the world has 77
SMALLEST_OBJECT = 24
SMALLEST_CUT_OBJECT = 20
WINDOW = 28
ONE_SHAPE_CORRELATION = 0.955
BATCH = 64


@dataclass(frozen=True, slots=True)
class Seen:
    """One object in one frame.

    Attributes:
        colour, shape: names; of an object that is not `whole` the shape means nothing.
        x, y: centre of the visible part in the view, pixels.
        area: visible pixels, edges counted by their coverage.
        rgb: mean colour of the inside.
        ground: mean colour of the background around it; NaN where none is in view.
        confidence: 0 where two shapes fit equally well, 1 where one fits exactly.
        at_border, at_bar, touching: cut, or at risk of it, by the border of the view, by the
            occluder, by another object.
    """

    colour: str
    shape: str
    x: float
    y: float
    area: float
    rgb: tuple[float, float, float]
    ground: tuple[float, float, float]
    confidence: float
    at_border: bool
    at_bar: bool
    touching: bool

    @property
    def whole(self) -> bool:
        """Fully in view, so that identity, centre and area can be trusted."""
        return not (self.at_border or self.at_bar or self.touching)

    @property
    def radius(self) -> float:
        """The world's radius of a shape of this area."""
        return float((self.area / AREA_PER_SQUARED_RADIUS[self.shape]) ** 0.5)


@dataclass
class Parsed:
    """The state of a clip, frame by frame.

    Attributes:
        objects: what each frame shows, largest object first.
        bar: (frames, 2) left and right edge of the occluder; NaN where there is none.
        ground: (frames, 8, 8) luminance of the background in squares of 8x8 pixels; NaN where less
            than a quarter of the square is background.
        luminance: (frames,) mean of the whole frame.
    """

    objects: list[list[Seen]]
    bar: Floats
    ground: Floats
    luminance: Floats

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, frames: slice) -> Parsed:
        return Parsed(self.objects[frames], self.bar[frames], self.ground[frames], self.luminance[frames])


def parse_frames(frames: Pixels) -> Parsed:
    """Recover the state of every frame of one clip; takes under a millisecond a frame on one core.

    Args:
        frames: (frames, 64, 64, 3) uint8.
    """
    pixels = _as_array(frames)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"frames are {pixels.dtype} {pixels.shape}, not uint8 (frames, {SIZE}, {SIZE}, 3)")
    parts = [_parse(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
    if not parts:
        empty = np.zeros(0, np.float32)
        return Parsed([], empty.reshape(0, 2), empty.reshape(0, GRID, GRID), empty)
    return Parsed(
        [seen for part in parts for seen in part.objects],
        np.concatenate([part.bar for part in parts]),
        np.concatenate([part.ground for part in parts]),
        np.concatenate([part.luminance for part in parts]),
    )


def _as_array(frames: Pixels) -> npt.NDArray[np.uint8]:
    return frames.cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)


def bar_extent(frame: Pixels) -> tuple[float, float] | None:
    """Left and right edge of the occluder in one (64, 64, 3) uint8 frame, or None."""
    left, right = parse_frames(frame[None]).bar[0].tolist()
    return None if np.isnan(left) else (left, right)


def luminance(rgb: Floats) -> Floats:
    """Rec. 709 weights on the stored values, (…, 3) to (…)."""
    weights = np.array([0.2126, 0.7152, 0.0722], np.float32)
    return np.asarray(rgb @ weights, np.float32)


def _parse(pixels: npt.NDArray[np.uint8]) -> Parsed:
    rgb = pixels.astype(np.float32) / np.float32(255)
    light = luminance(rgb)
    paint = classify_pixels(rgb)
    bar = _bars(rgb, light)
    blobs, owner = _blobs(paint)
    return Parsed(
        _measure(rgb, blobs, owner, bar),
        bar,
        _ground(light, paint, bar),
        light.mean((1, 2)),
    )


def classify_pixels(rgb: Floats) -> npt.NDArray[np.int8]:
    """The nearest paint of every pixel: index into COLOURS, -1 for background, bar and walls."""
    chroma = rgb @ CHROMA
    # most of a frame is background: a tint of all of it, in the scene or by a codec, is taken off
    chroma -= np.median(chroma[:, ::3, ::3].reshape(len(rgb), -1, 2), 1)[:, None, None]
    paint = np.full(rgb.shape[:-1], -1, np.int8)
    paint[rgb.min(-1) > WHITE_FROM] = WHITE
    coloured = np.square(chroma).sum(-1) > COLOURED_FROM**2
    paint[coloured] = (chroma[coloured] @ HUE_DIRECTIONS.T).argmax(-1)
    return paint


def coverage(frames: Pixels, colour: str) -> Floats:
    """How much of each pixel the objects of one colour cover, (frames, 64, 64) in [0, 1]."""
    rgb = _as_array(frames).astype(np.float32) / np.float32(255)
    index = COLOURS.index(colour)
    near = _grown(classify_pixels(rgb) == index, 2)
    ink = np.repeat(PAINTS[index : index + 1], len(rgb), 0)
    ground = np.median(rgb[:, ::3, ::3].reshape(len(rgb), -1, 3), 1)
    return _coverage(rgb, ink, ground, np.full(len(rgb), index)) * near


def nearest_paint(rgb: Floats) -> Integers:
    """Index into COLOURS of (n, 3) mean colours."""
    # brightness says little: a codec or a VAE changes it more readily than hue and saturation
    difference = rgb[:, None] - PAINTS
    hue = np.square(difference @ CHROMA).sum(-1)
    grey = np.square(difference.mean(-1))
    return np.asarray((hue + 0.5 * grey).argmin(1))


def components(kind: npt.NDArray[np.int8]) -> tuple[Integers, int]:
    """Label the 4-connected regions of equal, non-negative kind in every frame.

    Args:
        kind: (frames, height, width); negative is nothing.

    Returns:
        (frames, height, width) region numbers, -1 for nothing, and how many regions there are.
    """
    some = kind >= 0
    starts = some.copy()
    starts[:, :, 1:] &= kind[:, :, 1:] != kind[:, :, :-1]
    run = starts.ravel().cumsum().reshape(kind.shape) - 1
    joined = some[:, 1:] & (kind[:, 1:] == kind[:, :-1])
    upper, lower = run[:, :-1][joined], run[:, 1:][joined]
    label = np.arange(int(starts.sum()))
    while True:
        low = np.minimum(label[upper], label[lower])
        new = label.copy()
        np.minimum.at(new, upper, low)
        np.minimum.at(new, lower, low)
        new = new[new]
        if np.array_equal(new, label):
            break
        label = new
    roots, dense = np.unique(label, return_inverse=True)
    return np.where(some, dense[run] if len(roots) else -1, -1), len(roots)


def _blobs(paint: npt.NDArray[np.int8]) -> tuple[Integers, Integers]:
    """Divide the painted pixels among objects.

    A region of several paints is one object if its outline is that of one shape (a VAE may tint a
    part of it) and several touching ones otherwise.

    Returns:
        (frames, 64, 64) object numbers, -1 for none; (objects,) their frames.
    """
    region, regions = components((paint >= 0).astype(np.int8) - 1)
    piece, pieces = components(paint)
    where = np.flatnonzero(paint.ravel() >= 0)
    of_region, of_piece = region.ravel()[where], piece.ravel()[where]
    parent = np.zeros(pieces, np.int64)
    parent[of_piece] = of_region
    large = np.bincount(of_piece, minlength=pieces) >= SMALLEST_OBJECT
    split = np.bincount(parent[large], minlength=regions) > 1
    split[split] = ~_is_one_shape(region, np.flatnonzero(split))
    name = np.where(split[of_region], np.where(large[of_piece], regions + of_piece, -1), of_region)
    blobs = np.full(paint.size, -1)
    kept, dense = np.unique(name[name >= 0], return_inverse=True)
    blobs[where[name >= 0]] = dense
    owner = np.zeros(len(kept), np.int64)
    owner[dense] = where[name >= 0] // (SIZE * SIZE)
    return blobs.reshape(paint.shape), owner


def _is_one_shape(region: Integers, chosen: Integers) -> Masks:
    """Whether the outline of each chosen region is close to that of a single shape; (chosen,)."""
    if not len(chosen):
        return np.zeros(0, np.bool_)
    place = np.full(int(region.max()) + 1, -1)
    place[chosen] = np.arange(len(chosen))
    frame, row, column = np.nonzero((region >= 0) & (place[region] >= 0))
    index = place[region[frame, row, column]]
    area, x, y = _moments(index, column, row, len(chosen))
    owner = np.zeros(len(chosen), np.int64)
    owner[index] = frame
    top, left = _corners(x, y)
    own = _crop(region, owner, top, left, -1) == chosen[:, None, None]
    fit = _correlations(own.astype(np.float32), x - left, y - top, area)
    return np.asarray(fit.max(1) > ONE_SHAPE_CORRELATION)


def _moments(index: Integers, column: Integers, row: Integers, number: int) -> tuple[Floats, Floats, Floats]:
    """Area and centre of numbered pixel sets, (number,) each."""
    area = np.bincount(index, minlength=number)
    x = np.bincount(index, column + 0.5, number) / area
    y = np.bincount(index, row + 0.5, number) / area
    return area.astype(np.float32), x.astype(np.float32), y.astype(np.float32)


def _corners(x: Floats, y: Floats) -> tuple[Integers, Integers]:
    """Top row and left column of the windows around some centres."""
    half = WINDOW / 2
    return np.rint(y - half).astype(np.int64), np.rint(x - half).astype(np.int64)


def _crop(
    field: npt.NDArray[Any], owner: Integers, top: Integers, left: Integers, outside: float
) -> npt.NDArray[Any]:
    """Windows (n, 28, 28, …) of a field (frames, 64, 64, …)."""
    rows = top[:, None, None] + np.arange(WINDOW)[:, None]
    columns = left[:, None, None] + np.arange(WINDOW)
    inside = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
    out = field[owner[:, None, None], rows.clip(0, SIZE - 1), columns.clip(0, SIZE - 1)]
    out[~inside] = outside
    return np.asarray(out)


def _measure(rgb: Floats, blobs: Integers, owner: Integers, bar: Floats) -> list[list[Seen]]:
    number = len(owner)
    found: list[list[Seen]] = [[] for _ in range(len(rgb))]
    if not number:
        return found
    frame, row, column = np.nonzero(blobs >= 0)
    index = blobs[frame, row, column]
    area, x, y = _moments(index, column, row, number)
    top, left = _corners(x, y)
    names = _crop(blobs, owner, top, left, -2)
    window = _crop(rgb, owner, top, left, 0.0)
    own = names == np.arange(number)[:, None, None]
    other = (names >= 0) & ~own
    near = _grown(own, 2)
    touching = (near & other).any((1, 2))
    at_border, at_bar, tall = _edges(index, row, column, number, bar[owner])
    ink = _mean_colour(window, _inside(own))
    ring = _grown(own, 4) & ~near & ~_grown(other, 2) & (names != -2) & ~_bar_crop(bar[owner], left)
    ground = _mean_colour(window, ring)
    paint = nearest_paint(ink)
    # white does not tell itself from a light grey wall, which may be two pixels away
    belongs = np.where((paint == WHITE)[:, None, None], _grown(own, 1), near)
    cover = _coverage(window, ink, ground, paint) * (belongs & ~other & (names != -2))
    soft = np.maximum(cover.sum((1, 2)), 1e-6)
    axis = np.arange(WINDOW, dtype=np.float32) + 0.5
    dx = (cover.sum(1) @ axis) / soft
    dy = (cover.sum(2) @ axis) / soft
    fit = _correlations(cover, dx, dy, soft)
    best = fit.argmax(1)
    second = np.sort(fit, 1)[:, -2]
    confidence = 1 - (1 - fit.max(1)) / np.maximum(1 - second, 1e-6)
    cut = at_border | at_bar
    real = (area >= np.where(cut, SMALLEST_CUT_OBJECT, SMALLEST_OBJECT)) & ~tall
    for i in np.flatnonzero(real)[np.argsort(-soft[real], kind="stable")].tolist():
        seen = Seen(
            COLOURS[paint[i]], SHAPES[best[i]], float(left[i] + dx[i]), float(top[i] + dy[i]),
            float(soft[i]), tuple(ink[i].tolist()), tuple(ground[i].tolist()), float(confidence[i]),
            bool(at_border[i]), bool(at_bar[i]), bool(touching[i]),
        )  # fmt: skip
        found[owner[i]].append(seen)
    return found


def _edges(
    index: Integers, row: Integers, column: Integers, number: int, bar: Floats
) -> tuple[Masks, Masks, Masks]:
    """Which objects lie at the border, which at the bar, and which are too tall to be objects."""
    edge = (row == 0) | (row == SIZE - 1) | (column == 0) | (column == SIZE - 1)
    at_border = np.bincount(index[edge], minlength=number) > 0
    beside = (column + 1 > bar[index, 0] - 1.5) & (column < bar[index, 1] + 1.5)
    at_bar = np.bincount(index[beside], minlength=number) > 0
    first, last = np.full(number, SIZE), np.zeros(number, np.int64)
    np.minimum.at(first, index, row)
    np.maximum.at(last, index, row)
    return at_border, at_bar, last - first > SIZE // 2


def _bar_crop(bar: Floats, left: Integers) -> Masks:
    """(n, 1, 28) columns of each window that the occluder covers."""
    column = left[:, None] + np.arange(WINDOW)
    return np.asarray((column + 1 > bar[:, :1]) & (column < bar[:, 1:]))[:, None]


def _grown(mask: Masks, steps: int) -> Masks:
    """Grow a mask by a diamond of so many pixels."""
    for _ in range(steps):
        out = mask.copy()
        out[:, 1:] |= mask[:, :-1]
        out[:, :-1] |= mask[:, 1:]
        out[:, :, 1:] |= mask[:, :, :-1]
        out[:, :, :-1] |= mask[:, :, 1:]
        mask = out
    return mask


def _inside(own: Masks) -> Masks:
    """The pixels of an object that no neighbour tints: two steps in, or fewer for thin objects."""
    one = ~_grown(~own, 1)
    two = ~_grown(~one, 1)
    pick = np.where(enough(two)[:, None, None], two, one)
    return np.where(enough(pick)[:, None, None], pick, own)


def enough(mask: Masks) -> Masks:
    return np.asarray(mask.sum((1, 2)) >= 9)


def _mean_colour(window: Floats, mask: Masks) -> Floats:
    """(n, 3) mean over the masked pixels of (n, h, w, 3); NaN for an empty mask."""
    weight = mask.reshape(len(mask), 1, -1).astype(np.float32)
    total = weight @ window.reshape(len(window), -1, 3)
    with np.errstate(invalid="ignore"):
        return np.asarray((total / weight.sum(-1, keepdims=True))[:, 0])


def _coverage(window: Floats, ink: Floats, ground: Floats, paint: Integers) -> Floats:
    """How much of each pixel the ink covers, (n, h, w) in [0, 1].

    A coloured object is told from its surroundings by hue and saturation alone, so that grey bars
    and walls beside it count as nothing; a white one by its darkest channel, which coloured ones
    lack.
    """
    ground = np.nan_to_num(ground)
    axis = (ink - ground) @ CHROMA
    axis /= np.maximum(np.square(axis).sum(-1, keepdims=True), 1e-6)
    shift = window.reshape(len(window), -1, 3) - ground[:, None]
    coloured = (shift @ CHROMA) @ axis[:, :, None]
    low = ground.min(-1, keepdims=True)
    white = (window.min(-1).reshape(len(window), -1) - low) / np.maximum(
        ink.min(-1, keepdims=True) - low, 1e-3
    )
    out = np.where((paint == WHITE)[:, None], white, coloured[..., 0])
    return np.asarray(out.clip(0, 1).reshape(window.shape[:3]), np.float32)


def templates(x: Floats, y: Floats, area: Floats) -> Floats:
    """Ideal coverage of the three shapes at given centres and areas, (n, 3, 28, 28)."""
    number = len(x)
    share = np.array([AREA_PER_SQUARED_RADIUS[shape] for shape in SHAPES], np.float32)
    radius = torch.from_numpy(np.sqrt(area[:, None] / share).astype(np.float32).reshape(-1))
    axis = torch.arange(WINDOW) + 0.5
    dx = axis - torch.from_numpy(np.repeat(x, 3))[:, None, None, None]
    dy = axis[:, None] - torch.from_numpy(np.repeat(y, 3))[:, None, None, None]
    shape = torch.arange(len(SHAPES)).repeat(number)
    distance = signed_distance(dx, dy, radius[:, None, None, None], shape)
    return (0.5 - distance).clamp(0, 1).view(number, 3, WINDOW, WINDOW).numpy()


def _correlations(cover: Floats, x: Floats, y: Floats, area: Floats) -> Floats:
    """How well each shape explains a coverage, (n, 3), 1 for equal up to a factor."""
    ideal = _smooth(templates(x, y, area)).reshape(len(cover), 3, -1)
    real = _smooth(cover[:, None]).reshape(len(cover), 1, -1)
    cross = (ideal * real).sum(-1)
    norm = np.square(ideal).sum(-1) * np.square(real).sum(-1)
    return np.asarray(cross / np.sqrt(np.maximum(norm, 1e-12)), np.float32)


def _smooth(field: Floats) -> Floats:
    """Binomial blur over the last two axes, deviation 1: soft and sharp edges become comparable."""
    for _ in range(2):
        padded = np.pad(field, [(0, 0), (0, 0), (1, 1), (1, 1)])
        padded = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
        padded = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
        field = np.asarray(padded / 16, np.float32)
    return field


def _bars(rgb: Floats, light: Floats) -> Floats:
    """Occluder edges (frames, 2): a band of columns, grey, alike in every row, lighter than beside.

    Its two outermost pixels on each side are darker and found by their width. The frames are taken
    to show one scene.
    """
    mean, spread = light.mean(1), light.std(1)
    column = rgb.mean(1)
    grey = (spread < 0.06) & (np.ptp(column, axis=-1) < 0.25)
    out = np.full((len(rgb), 2), np.nan, np.float32)
    level = np.where(grey, mean, np.float32(0))
    peak = np.sort(level, 1)[:, -10]
    body = level > (peak - 0.05)[:, None]
    for i in np.flatnonzero((peak > 0.3) & (body.sum(1) < 30)).tolist():
        # objects beside the bar lighten their columns' means, not their medians
        out[i] = _band(body[i], np.median(light[i], axis=0), float(peak[i]))
    found = ~np.isnan(out[:, 0])
    if found.mean() > 0.5:
        # it does not move: a frame that hides it behind noise still has it
        out[~found] = np.median(out[found], axis=0)
    return out


def _band(body: Masks, mean: Floats, peak: float) -> tuple[float, float]:
    nothing = (float("nan"), float("nan"))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], body.astype(np.int8), [0]])))
    starts, stops = edges[::2], edges[1::2]
    longest = int((stops - starts).argmax())
    start, stop = int(starts[longest]), int(stops[longest])
    if stop - start < 10 or start < 5 or stop > SIZE - 5:
        return nothing
    beside = max(float(mean[start - 5 : start - 3].mean()), float(mean[stop + 3 : stop + 5].mean()))
    return (start - 2.0, stop + 2.0) if peak - beside > 0.05 else nothing


def _ground(light: Floats, paint: npt.NDArray[np.int8], bar: Floats) -> Floats:
    column = np.arange(SIZE)
    covered = (column + 2 > bar[:, :1]) & (column - 1 < bar[:, 1:])
    free = ~_grown(paint >= 0, 3) & ~covered[:, None]
    weight = _squares(free.astype(np.float32))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = _squares(light * free) / weight
    return np.where(weight >= 0.25, mean, np.float32(np.nan))


def _squares(field: Floats) -> Floats:
    """(frames, 64, 64) to the means of 8x8 squares."""
    side = SIZE // GRID
    return np.asarray(field.reshape(-1, GRID, side, GRID, side).mean((2, 4)))


@dataclass(frozen=True)
class NoiseFloor:
    """How far the parser is from exact state; shares are of objects that truly are in full view.

    Attributes:
        frames, objects: how many were measured.
        identity, colour, shape: shares read rightly; an object that is not seen at all counts as
            wrong, one that is seen and flagged as cut is left out.
        flagged: share seen but flagged.
        false_whole: of the objects the parser calls whole, the share that in truth lack over 3 % of
            their area.
        count_error: mean over frames of |objects seen - objects there|; an object with less than 40
            visible pixels may be seen or not.
        centre_p50, centre_p99: error of the centre in pixels.
        bar_missed: share of frames in which an occluder is found without there being one, is not
            found, or is found more than 1.5 pixels off at an edge.
        milliseconds: per frame.
    """

    frames: int
    objects: int
    identity: float
    colour: float
    shape: float
    flagged: float
    false_whole: float
    count_error: float
    centre_p50: float
    centre_p99: float
    bar_missed: float
    milliseconds: float


def noise_floor(
    family: Family,
    degrade: Callable[[Tensor], Tensor] | None = None,
    scenes: int = 32,
    frames: int = 17,
    seed: int = 0,
    world: World = WORLDS["wide"],
) -> NoiseFloor:
    """Measure the parser on ground truth.

    Args:
        degrade: from clips (b, frames, 64, 64, 3) in [0, 1] to the like; what stands between the
            world and the parser, such as blur, noise or a VAE. None parses the frames as drawn.
        scenes, frames: how many clips of what length.
        world: how much variety the scenes have.
    """
    sampled = sample_scenes(scenes, torch.Generator().manual_seed(seed), family, world=world)
    start = 60
    path = simulate(sampled, start + frames)
    clips = render(sampled, path, start)
    path = Trajectory(path.position[:, start:], path.camera[:, start:])
    shown = clips if degrade is None else degrade(clips)
    pixels = (shown.clamp(0, 1) * 255).round().to(torch.uint8).flatten(0, 1)
    begun = time.perf_counter()
    parsed = parse_frames(pixels)
    seconds = time.perf_counter() - begun
    return _compare(sampled, path, parsed, 1e3 * seconds / len(pixels))


def _compare(scenes: Scenes, path: Trajectory, parsed: Parsed, milliseconds: float) -> NoiseFloor:
    visible, share = (x.flatten(0, 1).numpy() for x in _visible(scenes, path))
    centres = path.in_view.flatten(0, 1).numpy()
    repeats = path.camera.shape[1]
    colour = scenes.colour.repeat_interleave(repeats, 0).numpy()
    shape = scenes.shape.repeat_interleave(repeats, 0).numpy()
    right: list[tuple[bool, bool]] = []
    errors: list[float] = []
    flagged = 0
    for frame, i in np.argwhere(share > 0.9999).tolist():
        distance, seen = _nearest(parsed.objects[frame], *centres[frame, i].tolist())
        if seen is None or distance > 6:
            right.append((False, False))
        elif not seen.whole:
            flagged += 1
        else:
            names = COLOURS[colour[frame, i]], SHAPES[shape[frame, i]]
            right.append((seen.colour == names[0], seen.shape == names[1]))
            errors.append(distance)
    seen_right = np.array(right, np.bool_).reshape(-1, 2)
    return NoiseFloor(
        frames=len(parsed),
        objects=len(right),
        identity=_mean(np.asarray(seen_right.all(1))),
        colour=_mean(seen_right[:, 0]),
        shape=_mean(seen_right[:, 1]),
        flagged=flagged / max(1, flagged + len(right)),
        false_whole=_false_whole(parsed, centres, share),
        count_error=_count_error(parsed, visible),
        centre_p50=float(np.percentile(errors or [np.nan], 50)),
        centre_p99=float(np.percentile(errors or [np.nan], 99)),
        bar_missed=_bar_missed(parsed, scenes.bar.repeat_interleave(repeats, 0).numpy()),
        milliseconds=milliseconds,
    )


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _nearest(objects: list[Seen], x: float, y: float) -> tuple[float, Seen | None]:
    if not objects:
        return float("inf"), None
    gaps = [float(np.hypot(seen.x - x, seen.y - y)) for seen in objects]
    return min(gaps), objects[int(np.argmin(gaps))]


def _false_whole(parsed: Parsed, centres: Floats, share: Floats) -> float:
    cut = []
    for frame, objects in enumerate(parsed.objects):
        for seen in (seen for seen in objects if seen.whole):
            gaps = np.linalg.norm(centres[frame] - [seen.x, seen.y], axis=1)
            there = share[frame] > 0
            cut.append(share[frame, np.where(there, gaps, np.inf).argmin()] < 0.97)
    return _mean(np.array(cut))


def _count_error(parsed: Parsed, visible: Floats) -> float:
    seen = np.array([len(objects) for objects in parsed.objects])
    least, most = (visible > 40).sum(1), (visible > 0.5).sum(1)
    return _mean(np.maximum(0, np.maximum(least - seen, seen - most)))


def _bar_missed(parsed: Parsed, bar: Floats) -> float:
    real = bar[:, 1] > bar[:, 0]
    off = np.abs(parsed.bar - bar).max(1)
    return _mean(np.asarray(np.where(real, ~(off <= 1.5), ~np.isnan(off))))


def _visible(scenes: Scenes, path: Trajectory) -> tuple[Tensor, Tensor]:
    """Visible pixels of every object and their share of the whole object, (b, frames, 4) each."""
    axis = torch.arange(-12, SIZE + 12) + 0.5
    view = (axis > 0) & (axis < SIZE)
    open_ = view & ((axis < scenes.bar[:, :1]) | (axis > scenes.bar[:, 1:]))
    above = torch.zeros(1)
    areas, shares = [], []
    for i in reversed(range(MAX_OBJECTS)):
        cover = _drawn(scenes, path.in_view[:, :, i], axis, i)
        area = (cover * (1 - above) * open_[:, None, None] * view[:, None]).sum((2, 3))
        areas.append(area)
        shares.append(area / cover.sum((2, 3)).clamp_min(1e-6))
        above = torch.maximum(above, cover)
    return torch.stack(areas[::-1], -1), torch.stack(shares[::-1], -1)


def _drawn(scenes: Scenes, centre: Tensor, axis: Tensor, i: int) -> Tensor:
    """Coverage of object i on a square of pixel centres, (b, frames, n, n)."""
    dx = axis - centre[..., 0, None, None]
    dy = axis[:, None] - centre[..., 1, None, None]
    radius = scenes.radius[:, i, None, None, None]
    cover = (0.5 - signed_distance(dx, dy, radius, scenes.shape[:, i])).clamp(0, 1)
    return cover * scenes.exists[:, i, None, None, None]
