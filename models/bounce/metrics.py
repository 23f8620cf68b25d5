"""What a rollout of the embedded world does right, chunk by chunk, from its parsed pixels.

Every metric is NaN where there is no evidence: no object in full view, nothing that moves, nothing
that was hidden. Lengths are pixels of the 64x64 view, speeds pixels per frame, luminance is in
[0, 1] (one 8-bit level is 0.0039). An object is known by the colour that the prompt gives it, and is
judged only while `Seen.whole`: neither behind the bar, nor cut by the border, nor touching another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from vidkv.models.bounce.parser import (
    Parsed,
    Pixels,
    Seen,
    coverage,
    luminance,
    parse_frames,
    templates,
)
from vidkv.models.bounce.prompts import COLOURS, SHAPES, Family, ScenePrompt
from vidkv.models.bounce.world import PALETTE, SIZE, advance

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Masks = npt.NDArray[np.bool_]
Frames = npt.NDArray[np.uint8]

FIRST_CHUNK = 9
LATER_CHUNK = 12

# what the scenes are drawn with: the fastest object, the fastest pan
FASTEST_OBJECT = 1.4
FASTEST_PAN = 2.4
# sideways, behind the bar, after a collision: slower ones are rare
SLOWEST = 0.08
# several times the parser's noise on decoded video, so that only real jumps pass it
JITTER = 2.5

FIT_FRAMES = 8
FREE_BEND, CONTACT_BEND = 0.8, 0.12
CONTACT_MARGIN = 1.5
PLACE_TOLERANCE = 3.0
PATIENCE = 6
GAP_BINS = (1, 13, 25, 49, 97, 193)


def chunk_slices(frames: int, first: int = FIRST_CHUNK, later: int = LATER_CHUNK) -> list[slice]:
    """The chunks of a rollout; the last one may be cut short."""
    edges = [0, *range(first, frames, later), frames]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


@dataclass
class Tracks:
    """Objects over time; n objects, each known by its colours.

    Attributes:
        named: how many of them, from the first, the prompt names.
        colours: the colours that count as each object; two for the object of an event.
        place: (n, frames, 2) centre of whatever is seen of it, NaN where nothing is.
        whole: (n, frames) whether it is in full view.
        radius: (n, frames) the world's radius, NaN unless whole.
        shape: (n, frames) index into SHAPES, -1 unless whole.
        seen: (n, frames) the sightings themselves.
    """

    named: int
    colours: list[frozenset[str]]
    place: Floats
    whole: Masks
    radius: Floats
    shape: Integers
    seen: list[list[Seen | None]]

    @property
    def anywhere(self) -> Masks:
        """(n, frames) whether anything of it is seen."""
        return ~np.isnan(self.place[..., 0])

    @property
    def centre(self) -> Floats:
        """(n, frames, 2) centre where whole, NaN elsewhere."""
        return np.where(self.whole[..., None], self.place, np.nan)


def track(parsed: Parsed, prompt: ScenePrompt) -> Tracks:
    """Follow the objects of the prompt, first and in its order, and then every other colour."""
    named = [frozenset(_colours_of(prompt, item)) for item in prompt.objects]
    rest = [frozenset({colour}) for colour in COLOURS if not any(colour in s for s in named)]
    colours = named + rest
    seen = [_follow(parsed, names) for names in colours]
    nothing = (np.nan, np.nan)
    place = [[(s.x, s.y) if s else nothing for s in row] for row in seen]
    whole = [[s is not None and s.whole for s in row] for row in seen]
    radius = [[s.radius if s and s.whole else np.nan for s in row] for row in seen]
    shape = [[SHAPES.index(s.shape) if s and s.whole else -1 for s in row] for row in seen]
    size = (len(colours), len(parsed))
    return Tracks(
        len(named),
        colours,
        np.array(place, float).reshape(*size, 2),
        np.array(whole, bool).reshape(size),
        np.array(radius, float).reshape(size),
        np.array(shape, int).reshape(size),
        seen,
    )


def _colours_of(prompt: ScenePrompt, item: tuple[str, str]) -> set[str]:
    event = prompt.event
    return {item[0], event[2]} if event and event[:2] == item else {item[0]}


def _follow(parsed: Parsed, colours: frozenset[str]) -> list[Seen | None]:
    """One sighting per frame: of several a whole one if there is, nearest to where it was."""
    row: list[Seen | None] = []
    last: Seen | None = None
    for objects in parsed.objects:
        options = [s for s in objects if s.colour in colours]
        if options:
            best = min(options, key=lambda s: (not s.whole, _distance(s, last)))
            row.append(best)
            last = best
        else:
            row.append(None)
    return row


def _distance(a: Seen, b: Seen | None) -> float:
    return 0.0 if b is None else float(np.hypot(a.x - b.x, a.y - b.y))


# --- motion ---


@dataclass
class Motion:
    """State of one object at one frame, fitted to the frames before it."""

    position: Floats
    velocity: Floats
    radius: float


def fit_motion(tracks: Tracks, index: int, frame: int) -> Motion | None:
    """Position and velocity of an object at a frame, from up to eight whole frames that end there.

    The longest such stretch that is straight is used; None if not even three frames are. Where the
    object was close to a wall or another one, straight is taken strictly and over four frames at
    least, so that a bounce cannot hide in the fit.
    """
    clear = _clearance(tracks, index, max(0, frame - FIT_FRAMES + 1), frame + 1)
    for length in range(min(FIT_FRAMES, len(clear)), 2, -1):
        free = clear[-length:].min() > CONTACT_MARGIN
        window = slice(frame - length + 1, frame + 1)
        if not tracks.whole[index, window].all() or (length < 4 and not free):
            continue
        places = tracks.place[index, window]
        time = np.arange(1 - length, 1)
        slope, end = np.polyfit(time, places, 1)
        bend = np.abs(places - end - time[:, None] * slope).max()
        if bend < (FREE_BEND if free else CONTACT_BEND):
            return Motion(end, slope, float(np.median(tracks.radius[index, window])))
    return None


def _clearance(tracks: Tracks, index: int, start: int, stop: int) -> Floats:
    """(frames,) pixels between an object and the nearest wall or other object; NaN where unseen."""
    place, radius = tracks.place[index, start:stop], _usual_radius(tracks, index)
    clear = np.minimum(place, SIZE - place).min(1) - radius
    for j in range(len(tracks.colours)):
        if j != index and tracks.anywhere[j, start:stop].any():
            gap = np.linalg.norm(tracks.place[j, start:stop] - place, axis=1)
            clear = np.fmin(clear, gap - radius - _usual_radius(tracks, j))
    return np.asarray(clear)


def extrapolate(motions: Sequence[Motion], frames: int, moving: bool) -> tuple[Floats, Floats]:
    """The world's own physics from fitted states.

    Returns:
        Positions and velocities (n, frames, 2) in the frames after the state.
    """
    position = torch.tensor(np.stack([m.position for m in motions]))[None]
    velocity = torch.tensor(np.stack([m.velocity for m in motions]))[None]
    radius = torch.tensor([[m.radius for m in motions]], dtype=position.dtype)
    active = torch.full(radius.shape, moving)
    places, speeds = [], []
    for _ in range(frames):
        advance(position, velocity, radius, active)
        places.append(position[0].clone())
        speeds.append(velocity[0].clone())
    return torch.stack(places, 1).numpy(), torch.stack(speeds, 1).numpy()


def motion_errors(
    tracks: Tracks, prompt: ScenePrompt, bar: Floats, chunks: Sequence[slice]
) -> tuple[Floats, Floats]:
    """Trajectory and speed error per chunk, (chunks,) each; NaN for chunk 0.

    The state parsed at the end of a chunk is run through the next one by `world.advance`.
    Trajectory: root of the mean squared distance, over the whole sightings of the chunk. Speed: sum
    over objects of |speed - predicted speed| at the chunk's end by the sum of predicted speeds; of
    scenes at rest NaN. An object is left out from where it may meet one whose state is not known.
    For a panning camera see `pan_speed_error`; its trajectory error is NaN.
    """
    place, speed = (np.full(len(chunks), np.nan) for _ in range(2))
    if prompt.family == "camera":
        return place, pan_speed_error(tracks, chunks)
    for c in range(1, len(chunks)):
        place[c], speed[c] = _chunk_errors(tracks, prompt.family, bar, chunks[c])
    return place, speed


def _chunk_errors(tracks: Tracks, family: Family, bar: Floats, chunk: slice) -> tuple[float, float]:
    before = chunk.start - 1
    fitted = {i: fit_motion(tracks, i, before) for i in range(len(tracks.colours))}
    motions = {i: motion for i, motion in fitted.items() if motion is not None}
    if not motions:
        return np.nan, np.nan
    moving = family != "still"
    frames = chunk.stop - chunk.start
    places, velocities = extrapolate(list(motions.values()), frames, moving)
    squares: list[float] = []
    deviation = total = 0.0
    until = _known_until(tracks, list(motions), places, bar, chunk)
    for row, (i, known) in enumerate(zip(motions, until.tolist(), strict=True)):
        error = np.linalg.norm(tracks.centre[i, chunk] - places[row], axis=1)[:known]
        squares += np.square(error[~np.isnan(error)]).tolist()
        now = fit_motion(tracks, i, chunk.stop - 1)
        if moving and known == frames and now is not None:
            predicted = float(np.linalg.norm(velocities[row, -1]))
            deviation += abs(float(np.linalg.norm(now.velocity)) - predicted)
            total += predicted
    return (
        float(np.sqrt(np.mean(squares))) if squares else np.nan,
        deviation / total if total > 0.1 else np.nan,
    )


def _known_until(tracks: Tracks, known: list[int], places: Floats, bar: Floats, chunk: slice) -> Integers:
    """Frames of the chunk, for each predicted object, before it may have met the unpredicted.

    Others are unpredicted from the start, predicted ones from where they may have met such a one.
    """
    frames = chunk.stop - chunk.start
    time = np.arange(frames)
    until = np.full(len(tracks.colours), frames)
    until[[i not in known for i in range(len(until))]] = 0
    for _ in range(len(known)):
        for own, i in zip(places, known, strict=True):
            margin = _usual_radius(tracks, i) + CONTACT_MARGIN
            at_bar = (own[:, 0] > bar[0] - margin) & (own[:, 0] < bar[1] + margin)
            for j in range(len(until)):
                if j == i or not tracks.anywhere[j, : chunk.stop].any():
                    continue
                gap = np.linalg.norm(tracks.place[j, chunk] - own, axis=1)
                doubt = gap < margin + _usual_radius(tracks, j)
                if j < tracks.named:
                    doubt |= at_bar & ~tracks.anywhere[j, chunk]
                doubt &= time >= until[j]
                until[i] = min(until[i], int(doubt.argmax()) if doubt.any() else frames)
    return until[known]


def _usual_radius(tracks: Tracks, index: int) -> float:
    radius = tracks.radius[index][tracks.whole[index]]
    return float(np.median(radius)) if len(radius) else 9.0


def pan_speed_error(tracks: Tracks, chunks: Sequence[slice]) -> Floats:
    """|speed of the view - its speed in the first chunk| / the latter, per chunk; NaN for chunk 0.

    The speed of the view is the median over landmarks and frames of how far they move sideways.
    """
    step = np.abs(np.diff(tracks.centre[..., 0], axis=1))
    speeds = np.full(len(chunks), np.nan)
    for c, chunk in enumerate(chunks):
        moved = step[:, max(0, chunk.start - 1) : chunk.stop - 1]
        moved = moved[~np.isnan(moved)]
        if len(moved) >= 4:
            speeds[c] = np.median(moved)
    error = np.abs(speeds - speeds[0]) / speeds[0] if speeds[0] > 0.1 else speeds * np.nan
    error[0] = np.nan
    return np.asarray(error)


def teleports(tracks: Tracks, prompt: ScenePrompt, chunks: Sequence[slice]) -> Floats:
    """Jumps per object and frame, (chunks,).

    A jump is a way between two consecutive whole sightings of an object that the fastest object of
    the world could not have covered in that time (elastic collisions can hand one object the energy
    of all), plus 2.5 pixels. It counts for the chunk of the later sighting.
    """
    fastest = fastest_speed(prompt)
    jumps, frames = np.zeros(len(chunks)), np.zeros(len(chunks))
    chunk_of = np.repeat(np.arange(len(chunks)), [c.stop - c.start for c in chunks])
    for whole, place in zip(tracks.whole, tracks.place, strict=True):
        when = np.flatnonzero(whole)
        way = np.linalg.norm(np.diff(place[when], axis=0), axis=1)
        jump = way > fastest * np.diff(when) + JITTER
        np.add.at(jumps, chunk_of[when[1:]], jump)
        np.add.at(frames, chunk_of[when[1:]], 1)
    return _ratio(jumps, frames)


def fastest_speed(prompt: ScenePrompt) -> float:
    """Pixels per frame that nothing in the view of such a scene exceeds."""
    if prompt.family == "still":
        return 0.0
    if prompt.family == "camera":
        return FASTEST_PAN
    return FASTEST_OBJECT * float(np.sqrt(len(prompt.objects)))


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.where(whole > 0, part / np.maximum(whole, 1e-9), np.nan)


# --- what is out of view, and its return ---


@dataclass(frozen=True)
class Return:
    """One object that was out of view and came back, or should have.

    Attributes:
        gap: frames without a trace of it; if it never came back, until it was due.
        frame: when it was judged.
        right: it came back in time, with its colour and shape, at a possible place.
    """

    gap: int
    frame: int
    right: bool


@dataclass
class Visibility:
    """Who should be in view.

    Attributes:
        absent: (n, frames) the object should be in full view and nothing of it is seen.
        returns: see `Return`.
        settled: (n,) whether it is known to belong to the scene: named, or a landmark seen before
            any other has come back.
    """

    absent: Masks
    returns: list[Return] = field(default_factory=list)
    settled: Masks = field(default_factory=lambda: np.zeros(0, bool))


def visibility(tracks: Tracks, prompt: ScenePrompt, bar: Floats) -> Visibility:
    """Decide for every frame which objects should be seen, and judge those that come back."""
    named = np.arange(len(tracks.colours)) < tracks.named
    if prompt.family == "camera":
        return Pan(tracks, named).run()
    absent = ~tracks.anywhere & named[:, None]
    out = Visibility(absent, settled=named)
    if prompt.family == "occluder" and not np.isnan(bar).any():
        for i in range(len(prompt.objects)):
            _behind_bar(tracks, i, prompt, bar, out)
    return out


def _behind_bar(tracks: Tracks, index: int, prompt: ScenePrompt, bar: Floats, out: Visibility) -> None:
    """Excuse an object for the time it can be behind the bar, and judge its return."""
    there = tracks.anywhere[index]
    edges = np.flatnonzero(np.diff(np.concatenate([[True], there, [True]]).astype(int)))
    for gone, back in edges.reshape(-1, 2).tolist():
        if gone > 0 and not _at_bar(tracks, index, gone - 1, bar):
            continue
        hide = _hide(tracks, index, prompt, bar, gone, back)
        out.absent[index, gone : min(back, hide.overdue)] = False
        if back < len(there):
            verdict = hide.judge(tracks, index, bar, gone, back) if gone > 0 else None
            if verdict is not None:
                out.returns.append(Return(back - gone, back, verdict))
        elif hide.overdue < len(there):
            out.returns.append(Return(max(1, hide.due - gone), hide.overdue, False))


def _at_bar(tracks: Tracks, index: int, frame: int, bar: Floats) -> bool:
    sight = tracks.seen[index][frame]
    reach = _usual_radius(tracks, index) + 2 * FASTEST_OBJECT
    return sight is not None and (sight.at_bar or bool(bar[0] - reach < sight.x < bar[1] + reach))


@dataclass
class Hide:
    """What is known of an object behind the bar.

    Attributes:
        path: (frames, 2) predicted centres from `since` on; None if another object may have hit it.
        since: frame of path[0].
        due, overdue: frames by which it should be out, and from which it counts as lost.
        fastest: pixels per frame it can have behind the bar.
    """

    path: Floats | None
    since: int
    due: int
    overdue: int
    fastest: float
    entry: Floats

    def judge(self, tracks: Tracks, index: int, bar: Floats, gone: int, back: int) -> bool | None:
        """Whether the return is right; None if it is never seen whole before it hides again."""
        there = tracks.anywhere[index]
        stop = back + int((~there[back:]).argmax()) if not there[back:].all() else len(there)
        whole = back + np.flatnonzero(tracks.whole[index, back:stop])[:5]
        if not len(whole):
            return None
        first = int(whole[0])
        place = tracks.place[index, first]
        if self.path is not None:
            way = self.path[first - self.since] - place
            near = bool(np.hypot(*way) <= PLACE_TOLERANCE + 0.05 * (first - self.since))
        else:
            # the centre of what was last seen of it is up to a radius from its own
            slack = _usual_radius(tracks, index) + PLACE_TOLERANCE
            far = np.hypot(*(place - self.entry)) - self.fastest * (first - gone + 1)
            out = max(bar[0] - place[0], place[0] - bar[1]) - self.fastest * (first - back + 1)
            near = bool(max(far, out) <= slack)
        return near and back < self.overdue and _same_shape(tracks, index, gone, whole)


def _same_shape(tracks: Tracks, index: int, gone: int, whole: Integers) -> bool:
    """Whether the shape after a return is the one seen most before."""
    before = tracks.shape[index, :gone]
    before = before[before >= 0]
    if not len(before):
        return True
    return bool(_most(before) == _most(tracks.shape[index, whole]))


def _most(values: Integers) -> int:
    return int(np.bincount(values).argmax())


def _hide(tracks: Tracks, index: int, prompt: ScenePrompt, bar: Floats, gone: int, back: int) -> Hide:
    """Predict where an object that went behind the bar at frame `gone` comes out again."""
    fastest = fastest_speed(prompt)
    entry = tracks.place[index, max(0, gone - 1)]
    width = float(bar[1] - bar[0]) + 2 * _usual_radius(tracks, index)
    # another object may have slowed it down to a crawl
    late = gone + int(width / SLOWEST)
    unknown = Hide(None, gone, late, late, fastest, entry)
    motion, since = _last_motion(tracks, index, gone)
    if motion is None:
        return unknown
    horizon = tracks.whole.shape[1] + late - since
    path = extrapolate([motion], horizon, moving=True)[0][0]
    reach = 1.08 * motion.radius + 1
    outside = (path[:, 0] < bar[0] - reach) | (path[:, 0] > bar[1] + reach)
    outside[: gone - since] = False
    if not outside.any():
        return unknown
    due = since + int(outside.argmax())
    overdue = due + PATIENCE + (due - gone) // 2
    later = np.flatnonzero(tracks.whole[index, back:])
    shown = back + int(later[0]) + 1 if len(later) else overdue
    if _may_meet(tracks, index, path, since, min(shown, overdue, tracks.whole.shape[1])):
        return unknown
    return Hide(path, since, due, overdue, fastest, entry)


def _last_motion(tracks: Tracks, index: int, gone: int) -> tuple[Motion | None, int]:
    """The latest fitted motion before frame `gone`, and the frame after it."""
    for frame in reversed(np.flatnonzero(tracks.whole[index, :gone])[-FIT_FRAMES:].tolist()):
        motion = fit_motion(tracks, index, frame)
        if motion is not None:
            return motion, frame + 1
    return None, gone


def _may_meet(tracks: Tracks, index: int, path: Floats, since: int, until: int) -> bool:
    """Whether another object is out of sight meanwhile, or comes close to the predicted path."""
    for j in range(tracks.named):
        if j == index:
            continue
        if not tracks.anywhere[j, since:until].all():
            return True
        gap = np.linalg.norm(tracks.place[j, since:until] - path[: until - since], axis=1)
        radius = _usual_radius(tracks, j)
        reach = _usual_radius(tracks, index) + radius + 2 * CONTACT_MARGIN
        # the centre of a part is off by up to a radius
        if (gap < reach + radius * ~tracks.whole[j, since:until]).any():
            return True
    return False


class Pan:
    """Follows a panning camera by its landmarks, which rest in the world.

    The camera starts at 0, moves at one speed and turns where the world ends. While a landmark that
    has been in view is still there, it tells the camera's place; in between the camera is taken to
    keep its speed. A landmark is out of view once its place in the world is.
    """

    def __init__(self, tracks: Tracks, named: Masks) -> None:
        objects, frames = tracks.whole.shape
        self.tracks = tracks
        self.camera = np.zeros(frames)
        self.direction = 1.0
        self.speed = self._first_speed()
        self.home: dict[int, Floats] = {}
        self.gone: dict[int, int] = {}
        self.left: set[int] = set()
        self.missed = np.zeros(objects, int)
        self.straight: list[float] = []
        never = named & ~tracks.anywhere[:, :FIRST_CHUNK].any(1)
        first = np.where(tracks.anywhere.any(1), tracks.anywhere.argmax(1), frames)
        absent = never[:, None] & (np.arange(frames) < first[:, None])
        self.out = Visibility(absent, settled=named.copy())

    def _first_speed(self) -> float:
        """Pixels per frame, from the frames before the earliest turn."""
        sideways = self.tracks.centre[:, : int(SIZE / FASTEST_PAN) - 2, 0]
        slopes = []
        for row in sideways:
            when = np.flatnonzero(~np.isnan(row))
            if len(when) >= 4:
                slopes.append(-np.polyfit(when, row[when], 1)[0])
        return float(np.median(slopes)) if slopes else np.nan

    def run(self) -> Visibility:
        if not self.speed > 0.3:
            return self.out
        for frame in range(len(self.camera)):
            self._move(frame)
            for index in range(len(self.tracks.colours)):
                self._look(index, frame)
        first = min((item.frame for item in self.out.returns), default=len(self.camera))
        self.out.settled |= self.tracks.anywhere[:, :first].any(1)
        return self.out

    def _move(self, frame: int) -> None:
        if frame == 0:
            return
        before = float(self.camera[frame - 1])
        now, direction = self._coast(before)
        turns = direction != self.direction
        steady = [i for i in self.home if self.tracks.whole[i, frame] and i not in self.gone]
        if steady:
            offsets = [self.home[i][0] - self.tracks.place[i, frame, 0] for i in steady]
            now = float(np.median(offsets))
            step = now - before
            if not turns and abs(step) > 0.5 * self.speed:
                direction = float(np.sign(step))
        if not steady or direction != self.direction:
            self.straight = []
        else:
            self.straight.append(now)
        self.camera[frame], self.direction = now, direction
        if len(self.straight) >= 12:
            self.speed = abs(self.straight[-1] - self.straight[0]) / (len(self.straight) - 1)

    def _coast(self, before: float) -> tuple[float, float]:
        """Where the camera goes from some place at its speed, and in which direction then."""
        now = before + self.direction * self.speed
        if 0 <= now <= SIZE:
            return now, self.direction
        return (-now if now < 0 else 2 * SIZE - now), -self.direction

    def _look(self, index: int, frame: int) -> None:
        tracks = self.tracks
        if index not in self.home:
            self._register(index, frame)
        elif not tracks.anywhere[index, frame]:
            self._miss(index, frame)
        elif index in self.gone and tracks.whole[index, frame]:
            self._welcome(index, frame)

    def _register(self, index: int, frame: int) -> None:
        """Note a landmark's place once it has been whole and at rest for three frames."""
        window = slice(frame - 2, frame + 1)
        if frame < 2 or not self.tracks.whole[index, window].all():
            return
        places = self.tracks.place[index, window].copy()
        places[:, 0] += self.camera[window]
        if np.ptp(places, axis=0).max() < PLACE_TOLERANCE:
            self.home[index] = places.mean(0)

    def _miss(self, index: int, frame: int) -> None:
        self.gone.setdefault(index, frame)
        x = self.home[index][0] - self.camera[frame]
        radius = _usual_radius(self.tracks, index)
        if not -radius < x < SIZE + radius:
            self.left.add(index)
            self.missed[index] = 0
        elif radius + PATIENCE < x < SIZE - radius - PATIENCE:
            self.out.absent[index, frame] = True
            self.missed[index] += 1
            if self.missed[index] == PATIENCE and index in self.left:
                self.left.discard(index)
                self.out.returns.append(Return(frame - self.gone[index], frame, False))

    def _welcome(self, index: int, frame: int) -> None:
        gone = self.gone.pop(index)
        self.missed[index] = 0
        world = self.tracks.place[index, frame] + [self.camera[frame], 0]
        close = bool(np.abs(world - self.home[index]).max() <= PLACE_TOLERANCE)
        if not close:
            self.home[index] = world
        if index in self.left:
            self.left.discard(index)
            whole = frame + np.flatnonzero(self.tracks.whole[index, frame : frame + 5])
            right = close and _same_shape(self.tracks, index, gone, whole)
            back = gone + int(self.tracks.anywhere[index, gone:].argmax())
            self.out.returns.append(Return(back - gone, frame, right))


def returns_by_gap(
    returns: Iterable[Return], edges: Sequence[int] = GAP_BINS
) -> dict[tuple[int, int], list[bool]]:
    """Right or wrong of all returns whose gap is in [low, high) frames, for every bin."""
    bins: dict[tuple[int, int], list[bool]] = {(low, high): [] for low, high in pairwise(edges)}
    for item in returns:
        for (low, high), values in bins.items():
            if low <= item.gap < high:
                values.append(item.right)
    return bins


# --- who is there ---


@dataclass
class Counts:
    """Sums over the frames of one chunk."""

    judged: int = 0
    right: int = 0
    colour: int = 0
    shape: int = 0
    delta_e: list[float] = field(default_factory=list)

    def add(self, colour: bool, shape: bool) -> None:
        self.judged += 1
        self.colour += colour
        self.shape += shape
        self.right += colour and shape

    def share(self, number: int) -> float:
        return number / self.judged if self.judged else np.nan


def count_chunk(
    parsed: Parsed,
    prompt: ScenePrompt,
    out: Visibility,
    chunk: slice,
    event: str = "none",
) -> Counts:
    """Match the sightings of a chunk with the objects of the prompt, see `identity_metrics`.

    Args:
        event: the prompt's event is "none", still "ahead", happening "now" or in the "past".
    """
    counts = Counts()
    for frame in range(chunk.start, chunk.stop):
        _count_frame(parsed.objects[frame], prompt, out, frame, event, counts)
    return counts


def _count_frame(
    objects: list[Seen],
    prompt: ScenePrompt,
    out: Visibility,
    frame: int,
    event: str,
    counts: Counts,
) -> None:
    free = list(objects)
    unseen = []
    for i, item in enumerate(prompt.objects):
        allowed = _allowed(prompt, item, event)
        mine = [s for s in free if s.colour in allowed]
        if not mine:
            unseen.append(i)
            continue
        best = min(mine, key=lambda s: (not s.whole, s.shape != item[1]))
        free.remove(best)
        if best.whole:
            counts.add(True, best.shape == item[1])
            counts.delta_e.append(paint_error(best, allowed))
    strangers = _strangers(free, prompt, out)
    doubtful = sum(not s.whole for s in strangers)
    strangers = [s for s in strangers if s.whole]
    for i in unseen:
        item = prompt.objects[i]
        if strangers and (out.absent[i, frame] or prompt.family != "camera"):
            best = min(strangers, key=lambda s: s.shape != item[1])
            strangers.remove(best)
            counts.add(False, best.shape == item[1])
            counts.delta_e.append(paint_error(best, _allowed(prompt, item, event)))
        elif doubtful:
            doubtful -= 1
        elif out.absent[i, frame]:
            counts.add(False, False)


def _strangers(free: list[Seen], prompt: ScenePrompt, out: Visibility) -> list[Seen]:
    """Sightings that are neither named nor known landmarks, so that they may be a named object."""
    if prompt.family != "camera":
        return free
    named = {name for item in prompt.objects for name in _colours_of(prompt, item)}
    rest = [colour for colour in COLOURS if colour not in named]
    offset = len(out.settled) - len(rest)
    known = {colour for i, colour in enumerate(rest) if out.settled[offset + i]}
    return [s for s in free if s.colour not in known]


def _allowed(prompt: ScenePrompt, item: tuple[str, str], event: str) -> set[str]:
    if prompt.event is None or prompt.event[:2] != item:
        return {item[0]}
    new = prompt.event[2]
    return {"ahead": {item[0]}, "past": {new}}.get(event, {item[0], new})


def identity_metrics(
    parsed: Parsed,
    prompt: ScenePrompt,
    out: Visibility,
    chunks: Sequence[slice],
    event_chunk: int | None = None,
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Identity, its colour and shape parts, colour error, and the share judged, (chunks,) each.

    Identity: of all (object of the prompt, frame) that can be judged, the share seen with the right
    colour and shape. One cannot be judged while cut or possibly out of view. An object whose colour
    is not seen is taken for an object of a colour that does not belong there, if there is one (wrong
    colour, shape compared), and is otherwise absent (wrong in both). In the chunk in which the
    prompt's event falls due both colours are right. Colour error: mean ΔE2000 between the inside of
    those objects and the paint that the prompt names. Judged: of all (object, frame), the share that
    could be; a rollout in which objects melt together has little of it.
    """
    rows = []
    for c, chunk in enumerate(chunks):
        counts = count_chunk(parsed, prompt, out, chunk, _event_phase(c, event_chunk))
        error = float(np.mean(counts.delta_e)) if counts.delta_e else np.nan
        parts = (counts.right, counts.colour, counts.shape)
        judged = counts.judged / (len(prompt.objects) * (chunk.stop - chunk.start))
        rows.append([*(counts.share(part) for part in parts), error, judged])
    columns = np.array(rows, float).reshape(-1, 5).T
    return columns[0], columns[1], columns[2], columns[3], columns[4]


def _event_phase(chunk: int, event_chunk: int | None) -> str:
    if event_chunk is None:
        return "none"
    return "ahead" if chunk < event_chunk else "now" if chunk == event_chunk else "past"


def count_error(
    parsed: Parsed, tracks: Tracks, prompt: ScenePrompt, out: Visibility, chunks: Sequence[slice]
) -> Floats:
    """Objects too many or too few, mean over the frames of each chunk, (chunks,).

    Too few are those that should be in full view and are not seen. Too many are those beyond the
    prompt's number; of a panning view, which shows unnamed landmarks too, second objects of a colour
    and new colours once the camera has seen the whole world.
    """
    seen = np.array([len(objects) for objects in parsed.objects])
    if prompt.family == "camera":
        names = [{s.colour for s in objects} for objects in parsed.objects]
        twice = seen - np.array([len(colours) for colours in names], int)
        born = (tracks.whole & ~out.settled[:, None] & _after_settling(tracks, out)).sum(0)
        wrong = twice + born + out.absent.sum(0)
    else:
        number = len(prompt.objects)
        excused = (~tracks.anywhere & ~out.absent)[:number].sum(0)
        wrong = np.maximum(0, seen - number) + np.maximum(0, number - excused - seen)
    return np.array([wrong[chunk].mean() for chunk in chunks])


def _after_settling(tracks: Tracks, out: Visibility) -> Masks:
    """(frames,) from when on every landmark should have been seen; never if none returned."""
    frames = np.arange(tracks.whole.shape[1])
    return np.asarray(frames > min((r.frame for r in out.returns), default=len(frames)))


# --- colour and light ---


def paint_error(seen: Seen, colours: Iterable[str]) -> float:
    """ΔE2000 of an object to the nearest of the given paints."""
    lab = rgb_to_lab(np.array(seen.rgb))
    paints = PALETTE[[COLOURS.index(colour) for colour in colours]].double().numpy()
    return float(delta_e_2000(lab, rgb_to_lab(paints)).min())


def rgb_to_lab(rgb: Floats) -> Floats:
    """sRGB in [0, 1] to CIELAB under D65, (…, 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clip(0) + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e_2000(first: Floats, second: Floats) -> Floats:
    """CIEDE2000 colour difference of CIELAB values (…, 3), after Sharma, Wu and Dalal (2005)."""
    l1, a1, b1 = np.moveaxis(np.asarray(first, float), -1, 0)
    l2, a2, b2 = np.moveaxis(np.asarray(second, float), -1, 0)
    mean_c = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    g = 0.5 * (1 - np.sqrt(mean_c**7 / (mean_c**7 + 25.0**7)))
    a1, a2 = a1 * (1 + g), a2 * (1 + g)
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180
    # half a turn is +180 in the formula, which the line above folds to -180
    turn = np.where((turn == -180) & (h2 > h1), 180.0, turn) * (c1 * c2 > 0)
    light, chroma = l2 - l1, c2 - c1
    hue = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    total = h1 + h2
    far = np.abs(h1 - h2) > 180
    mean_h = np.where(far, np.where(total < 360, total + 360, total - 360), total) / 2
    mean_h = np.where(c1 * c2 > 0, mean_h, total)
    t = (
        1
        - 0.17 * np.cos(np.radians(mean_h - 30))
        + 0.24 * np.cos(np.radians(2 * mean_h))
        + 0.32 * np.cos(np.radians(3 * mean_h + 6))
        - 0.20 * np.cos(np.radians(4 * mean_h - 63))
    )
    s_l = 1 + 0.015 * (mean_l - 50) ** 2 / np.sqrt(20 + (mean_l - 50) ** 2)
    s_c, s_h = 1 + 0.045 * mean_c, 1 + 0.015 * mean_c * t
    rotation = np.radians(60 * np.exp(-(((mean_h - 275) / 25) ** 2)))
    r_t = -2 * np.sqrt(mean_c**7 / (mean_c**7 + 25.0**7)) * np.sin(rotation)
    light, chroma, hue = light / s_l, chroma / s_c, hue / s_h
    squared = light**2 + chroma**2 + hue**2 + r_t * chroma * hue
    return np.asarray(np.sqrt(np.maximum(squared, 0)))


def luminance_drift(parsed: Parsed, tracks: Tracks, family: Family, chunks: Sequence[slice]) -> Floats:
    """Luminance of the background minus that of the first chunk, (chunks,), in [-1, 1].

    Squares of 8x8 pixels are compared with themselves, so that what the objects hide does not
    matter. Under a panning camera it is the surroundings of each landmark, compared with those in
    the first chunk in which the landmark was in full view.
    """
    places = parsed.ground.reshape(len(parsed), -1)
    if family == "camera":
        places = _surroundings(tracks)
    levels = np.stack([_nan_mean(places[chunk]) for chunk in chunks])
    there = ~np.isnan(levels)
    reference = np.take_along_axis(levels, there.argmax(0)[None], 0)
    if family != "camera":
        reference = levels[:1]
    return _nan_mean((levels - reference).T)


def _surroundings(tracks: Tracks) -> npt.NDArray[np.float32]:
    """(frames, n) luminance around each whole object well inside the view; NaN elsewhere."""
    ground = np.array(
        [
            [s.ground if s and s.whole and 14 < s.x < SIZE - 14 else (np.nan,) * 3 for s in row]
            for row in tracks.seen
        ],
        np.float32,
    )
    return luminance(ground).T


def _nan_mean(values: npt.NDArray[np.floating]) -> Floats:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0).sum(0, dtype=float)
    return _ratio(total, there.sum(0).astype(float))


# --- one rollout ---


@dataclass
class RolloutMetrics:
    """One rollout; arrays are (chunks,), NaN where there is no evidence.

    Attributes:
        identity, colour, shape, colour_delta_e, judged: see `identity_metrics`.
        count_error: see `count_error`.
        luminance_drift: see `luminance_drift`.
        trajectory_rmse, speed_error: see `motion_errors`.
        teleports: see `teleports`.
        returns: objects that were hidden or out of view; see `Return`, `returns_by_gap`.
        event_latency: see `event_latency`.
    """

    identity: Floats
    colour: Floats
    shape: Floats
    colour_delta_e: Floats
    count_error: Floats
    luminance_drift: Floats
    trajectory_rmse: Floats
    speed_error: Floats
    teleports: Floats
    returns: list[Return]
    event_latency: float
    judged: Floats


def measure(
    parsed: Parsed,
    prompt: ScenePrompt,
    chunks: Sequence[slice] | None = None,
    event_chunk: int | None = None,
) -> RolloutMetrics:
    """All metrics of one rollout.

    Args:
        prompt: of the scene; its event, if any, included.
        chunks: as `chunk_slices`, which is the default.
        event_chunk: the first chunk whose prompt carried the event; without it an event may have
            happened at any time and both colours count as right.
    """
    chunks = chunk_slices(len(parsed)) if chunks is None else chunks
    tracks = track(parsed, prompt)
    bar = _steady_bar(parsed, prompt.family)
    out = visibility(tracks, prompt, bar)
    identity, colour, shape, delta_e, judged = identity_metrics(parsed, prompt, out, chunks, event_chunk)
    trajectory, speed = motion_errors(tracks, prompt, bar, chunks)
    return RolloutMetrics(
        identity=identity,
        colour=colour,
        shape=shape,
        colour_delta_e=delta_e,
        count_error=count_error(parsed, tracks, prompt, out, chunks),
        luminance_drift=luminance_drift(parsed, tracks, prompt.family, chunks),
        trajectory_rmse=trajectory,
        speed_error=speed,
        teleports=teleports(tracks, prompt, chunks),
        returns=out.returns,
        event_latency=event_latency(parsed, prompt, chunks, event_chunk),
        judged=judged,
    )


def _steady_bar(parsed: Parsed, family: Family) -> Floats:
    """(2,) edges of the occluder: the median over all frames, NaN if fewer than half show one."""
    there = ~np.isnan(parsed.bar[:, 0])
    if family != "occluder" or there.mean() < 0.5:
        return np.full(2, np.nan)
    return np.asarray(np.median(parsed.bar[there], axis=0), float)


def event_latency(
    parsed: Parsed, prompt: ScenePrompt, chunks: Sequence[slice], event_chunk: int | None
) -> float:
    """Chunks from the prompt's change until it is obeyed.

    Obeyed is the first chunk, counted from the one whose prompt carried the event (0 is at once), at
    whose last frame the new colour is seen and the old one is not. Infinite if no chunk obeys, NaN
    if the prompt has no event or the rollout ends before it.
    """
    if prompt.event is None or event_chunk is None or event_chunk >= len(chunks):
        return np.nan
    old, _, new = prompt.event
    for latency, chunk in enumerate(chunks[event_chunk:]):
        colours = {s.colour for s in parsed.objects[chunk.stop - 1]}
        if new in colours and old not in colours:
            return float(latency)
    return np.inf


# --- statistics ---


def bootstrap_ci(values: npt.ArrayLike, samples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % percentile interval; NaN values are left out.

    Returns:
        mean, low, high; all NaN without values.
    """
    known = np.asarray(values, float).ravel()
    known = known[~np.isnan(known)]
    if not len(known):
        return np.nan, np.nan, np.nan
    generator = np.random.default_rng(seed)
    # a part at a time: memory stays flat however many values there are
    per_part = max(1, 2_000_000 // len(known))
    means: list[float] = []
    while len(means) < samples:
        number = min(per_part, samples - len(means))
        picks = generator.integers(len(known), size=(number, len(known)))
        means += known[picks].mean(1).tolist()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(known.mean()), float(low), float(high)


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b over pairs and its 95 % percentile interval.

    Args:
        a, b: (n,) values of the same n rollouts under two settings; pairs with a NaN are left out.

    Returns:
        difference, low, high; all NaN without a whole pair.
    """
    first, second = np.asarray(a, float), np.asarray(b, float)
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} and {second.shape} values do not make pairs")
    return bootstrap_ci(first - second, samples, seed)


# --- negative controls ---


def frozen(frames: Pixels, start: int) -> Frames:
    """From frame `start` on the frame before it, for ever: no motion."""
    out = _own(frames)
    out[start:] = out[start - 1]
    return out


def brightness_creep(frames: Pixels, levels: int = 1) -> Frames:
    """Every chunk brighter than the last by so many of 256 levels."""
    out = _own(frames).astype(np.int64)
    for c, chunk in enumerate(chunk_slices(len(out))):
        out[chunk] += c * levels
    return out.clip(0, 255).astype(np.uint8)


def repeated_chunk(frames: Pixels, chunk: int) -> Frames:
    """One chunk (2 or later) shown as a copy of the chunk before it."""
    out = _own(frames)
    chunks = chunk_slices(len(out))
    length = chunks[chunk].stop - chunks[chunk].start
    begin = chunks[chunk - 1].start
    out[chunks[chunk]] = out[begin : begin + length].copy()
    return out


def recoloured(frames: Pixels, old: str, new: str, start: int) -> Frames:
    """Whatever has one colour has another from frame `start` on."""
    out = _own(frames)
    paints = PALETTE.numpy()
    change = paints[COLOURS.index(new)] - paints[COLOURS.index(old)]
    cover = coverage(out[start:], old)
    out[start:] = _bytes(out[start:] / 255 + cover[..., None] * change)
    return out


def vanished(frames: Pixels, colour: str, start: int) -> Frames:
    """Whatever has one colour is gone from frame `start` on, plain background in its place."""
    out = _own(frames)
    cover = coverage(out[start:], colour)
    ground = np.median(out[start:, ::3, ::3].reshape(len(cover), -1, 3), 1)[:, None, None] / 255
    paint = PALETTE[COLOURS.index(colour)].numpy()
    out[start:] = _bytes(out[start:] / 255 - cover[..., None] * (paint - ground))
    return out


def reshaped(frames: Pixels, colour: str, shape: str, start: int) -> Frames:
    """The object of one colour has another shape of the same area from frame `start` on."""
    parsed = parse_frames(frames)
    out = vanished(frames, colour, start)
    for frame in range(start, len(out)):
        for seen in (s for s in parsed.objects[frame] if s.colour == colour):
            _draw(out[frame], seen, shape)
    return out


def _draw(frame: Frames, seen: Seen, shape: str) -> None:
    """Paint an ideal shape where an object was seen, in place."""
    left, top = round(seen.x) - 14, round(seen.y) - 14
    place = [np.array([v], np.float32) for v in (seen.x - left, seen.y - top, seen.area)]
    cover = templates(*place)[0, SHAPES.index(shape)]
    rows, columns = (slice(max(0, v), min(SIZE, v + 28)) for v in (top, left))
    cover = cover[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    ink = PALETTE[COLOURS.index(seen.colour)].numpy()
    patch = frame[rows, columns] / 255
    frame[rows, columns] = _bytes(patch + cover[..., None] * (ink - patch))


def _own(frames: Pixels) -> Frames:
    pixels = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    return np.array(pixels, np.uint8)


def _bytes(values: npt.NDArray[np.floating]) -> Frames:
    return np.asarray(np.rint(values.clip(0, 1) * 255), np.uint8)
