"""Segments on disk are the truth; a finished video is a view of them.

Every decoded chunk becomes one file `seg_00012.ts` that appears under its name only when it is
complete and on stable storage. Preview, stop-and-keep, resume and the final mp4 all read that
folder. A segment is a closed group of pictures without B-frames, so one packet is one frame and
joining segments by stream copy is exact to the frame.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from vidkv.errors import InputError, OutputError
from vidkv.files import publish, reason, write_durably

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

Frames = npt.NDArray[np.uint8] | torch.Tensor

DEFAULT_CRF = 17
FREE_MARGIN_BYTES = 64 * 2**20

# untagged small video is shown as BT.601 limited range; saying so explicitly makes players that
# read the tags agree with those that do not
_BT601 = 6
_LIMITED_RANGE = 1

_SEGMENT_FILE = re.compile(r"(\.)?seg_([0-9]{5,})(?:-([0-9]+))?\.ts(?(1)(?:\.[0-9]+)?\.tmp)")
_LOCK_NAME = ".vidkv-lock"


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: counted frames, and the rate and length that players are told."""

    frames: int
    seconds: float
    fps: float
    width: int
    height: int
    size_bytes: int


class SegmentWriter:
    """Writes decoded chunks, in order, as segments of one folder.

        writer = SegmentWriter(Path("first.segments"), fps=16, height=64, width=64)
        for index, frames in enumerate(chunks):
            writer.write(index, frames)
        write_video(writer.paths(), Path("first.mp4"), fps=16, metadata={"prompt": prompt})

    Opening a folder that already holds segments continues after the last one that is readable and
    has no gap before it. A folder has one writer at a time; `claim_folder` keeps other processes out.
    """

    def __init__(
        self, folder: Path, fps: int, height: int, width: int, crf: int = DEFAULT_CRF, *, fence: int = 0
    ) -> None:
        """Create the folder where needed and count the frames already in it.

        Args:
            fence: number of this writer among those that had the folder before. It is part of the names, and
                the highest counts, so that one that does not know it has been replaced harms nothing.

        Raises:
            InputError: a side is odd or not positive, fps is not positive, or the folder holds
                segments of another size or rate.
            OutputError: the folder cannot be created.
        """
        _check_geometry(fps, height, width)
        self.folder, self.fps, self.height, self.width, self.crf = folder, fps, height, width, crf
        self.fence = fence
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot create the segment folder {folder}: {reason(error)}; choose another output folder"
            ) from error
        # first frame of every finished segment, then that of the next one
        self._starts, self._paths = [0], list[Path]()
        for path, frames in self._on_disk():
            self._starts.append(self.frames + frames)
            self._paths.append(path)

    @property
    def frames(self) -> int:
        """Frames in the finished segments."""
        return self._starts[-1]

    @property
    def starts(self) -> list[int]:
        """First frame of every finished segment, then that of the next one."""
        return list(self._starts)

    def write(self, index: int, frames: Frames) -> Path:
        """Encode one chunk and put it under its final name, durably.

        Args:
            index: number of the chunk; must be the next one, `len(self.paths())`.
            frames: RGB, uint8, (frames, height, width, 3), on any device.

        Raises:
            InputError: wrong index, shape or dtype.
            OutputError: the segment cannot be written; the segments before it stay as they are.
        """
        following = len(self._paths)
        if index != following:
            raise InputError(
                f"segment {index} is out of order: {self.folder} continues with segment "
                f"{following}; to start again earlier, call drop_from(index) first"
            )
        array = _as_rgb(frames, self.height, self.width)
        data = encode_segment(array, self.fps, first_frame=self.frames, crf=self.crf)
        path = self.folder / _segment_name(index, self.fence)
        try:
            # whatever stands behind a gap belongs to another history and must not reappear
            if (self.folder / _segment_name(index + 1, self.fence)).exists():
                _remove_segments(self.folder, index + 1)
            write_durably(path, data)
        except OSError as error:
            raise OutputError(
                f"cannot write segment {path}: {reason(error)}; the {index} segments before it "
                "are kept: make room or choose another folder, then resume"
            ) from error
        self._starts.append(self.frames + len(array))
        self._paths.append(path)
        return path

    def paths(self) -> list[Path]:
        """The finished segments in order, from 0 without gaps."""
        return list(self._paths)

    def drop_from(self, index: int) -> None:
        """Delete segment `index`, all later ones, and what an interrupted write left behind.

        Raises:
            InputError: the index is negative.
            OutputError: a file cannot be deleted.
        """
        if index < 0:
            raise InputError(f"segment index {index} must not be negative")
        _delete_segments(self.folder, index)
        del self._starts[index + 1 :]
        del self._paths[index:]

    def _on_disk(self) -> Iterator[tuple[Path, int]]:
        for path in segment_paths(self.folder):
            info = _scan(path)
            if info is None:
                return
            expected = (self.width, self.height, self.fps)
            if (info.width, info.height, info.fps) != expected:
                raise InputError(
                    f"{path} is {info.width}x{info.height} at {info.fps:g} fps, but the new "
                    f"segments are {self.width}x{self.height} at {self.fps} fps; choose another "
                    "folder or delete its segments"
                )
            yield path, info.frames


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Hold a segment folder for one run: it is created where needed, and removed if it is left empty.

    Raises:
        OutputError: the folder cannot be made or read, holds something else than segments, or another
            run holds it.
    """
    try:
        folder.mkdir(exist_ok=True)
        with os.scandir(folder) as entries:
            foreign = sorted(entry.name for entry in entries if not _is_ours(entry))
        if foreign:
            raise OutputError(
                f"the segment folder {folder} holds {foreign[0]!r}, which vidkv did not write; "
                "move it away or choose another output"
            )
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(
            f"cannot create or use the segment folder {folder}: {reason(error)}; choose another output"
        ) from error
    try:
        _lock(lock, folder)
        try:
            yield
        finally:
            # before the lock is let go, so that it is never another run's file that is deleted
            with contextlib.suppress(OSError):
                (folder / _LOCK_NAME).unlink()
                folder.rmdir()
    finally:
        os.close(lock)


def rescue_segments(folder: Path, out: Path) -> Path | None:
    """Make what a killed run left in a folder `NAME.recovered.mp4` beside `out`, and delete it there.

    Joined is what stands before the first segment that cannot be read or is of another size or rate.

    Returns:
        The new file, named `NAME.recovered1.mp4` and so on where there is one; None without a readable
        segment.

    Raises:
        OutputError: the video cannot be written, and the segments are kept; or they cannot be deleted.
    """
    whole: list[Path] = []
    kind: tuple[int, int, float] | None = None
    for path in segment_paths(folder):
        info = _scan(path)
        if info is None or not (info.frames and info.width and info.fps):
            break
        kind = kind or (info.width, info.height, info.fps)
        if (info.width, info.height, info.fps) != kind:
            break
        whole.append(path)
    target = None
    if kind:
        names = (recovered_video(out, number) for number in itertools.count())
        target = next(path for path in names if not path.exists())
        write_video(whole, target, round(kind[2]), {"recovered": "true"})
    _delete_segments(folder, 0)
    return target


def segments_folder(out: Path) -> Path:
    """Where the segments of a video lie while it is made."""
    return out.with_name(f"{out.name}.segments")


def partial_video(out: Path) -> Path:
    """What a run that was stopped leaves instead of `out`."""
    return out.with_name(f"{out.stem}.partial.mp4")


def recovered_video(out: Path, number: int = 0) -> Path:
    """What is made of the segments of a run that was killed; numbered where several were."""
    return out.with_name(f"{out.stem}.recovered{number or ''}.mp4")


def segment_paths(folder: Path) -> list[Path]:
    """Segments found in a folder, in order from 0; what stands behind a gap is ignored."""
    found: dict[int, tuple[int, Path]] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            name = _SEGMENT_FILE.fullmatch(entry.name)
            if name and not name[1]:
                index, fence = int(name[2]), int(name[3] or 0)
                found[index] = max(found.get(index, (-1, folder)), (fence, folder / entry.name))
    return [found[index][1] for index in itertools.takewhile(found.__contains__, itertools.count())]


def encode_segment(
    frames: npt.NDArray[np.uint8], fps: int, *, first_frame: int = 0, crf: int = DEFAULT_CRF
) -> bytes:
    """Encode RGB frames (frames, height, width, 3) as one closed-GOP MPEG-TS segment.

    `first_frame` places the segment on the time line, so that segments also play when their bytes
    are simply concatenated or served as a playlist.
    """
    import av

    buffer = io.BytesIO()
    # each segment restarts the packet counters; the flag tells demuxers that nothing was lost
    options = {"mpegts_flags": "initial_discontinuity"}
    with av.open(buffer, "w", format="mpegts", options=options) as container:
        stream = _add_h264(container, fps, frames.shape[1], frames.shape[2], crf)
        for offset, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = first_frame + offset, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_video(
    segments: Sequence[Path],
    out: Path,
    fps: int,
    metadata: Mapping[str, Any],
    *,
    max_frames: int | None = None,
) -> VideoInfo:
    """Join segments by stream copy into one mp4 that appears under its name when complete.

    The file has a constant frame rate, its index before the pictures, and `metadata` as JSON in
    the `comment` tag.

    Args:
        segments: paths in playing order.
        out: the mp4; a file of that name is replaced.
        fps: frames per second.
        metadata: anything that JSON can hold.
        max_frames: leave out what comes after this many frames.

    Raises:
        InputError: no segments, or `max_frames` below 1.
        OutputError: a segment is damaged or of another size, or the file cannot be written; in
            both cases nothing stands under the final name that was not there before.
    """
    import av

    if not segments:
        raise InputError("there are no segments to join: nothing was generated")
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames={max_frames} must be at least 1")
    # same folder, so that the rename cannot cross file systems; unique, so that two writers of
    # neighbouring files never meet
    temporary = out.with_name(f".vidkv-{uuid.uuid4().hex}.tmp")
    # half a surrogate pair can arrive from a shell and has no UTF-8 form
    comment = json.dumps(metadata, ensure_ascii=False).encode(errors="replace").decode()
    try:
        frames = _remux(segments, temporary, fps, comment, max_frames)
        info = _require_whole(temporary, frames)
        publish(temporary, out)
    except (OSError, av.error.FFmpegError) as error:
        raise OutputError(
            f"cannot write {out}: {reason(error)}; the segments in {segments[0].parent} are kept: "
            "make room or choose another folder, then join them again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return info


def read_metadata(path: Path) -> dict[str, Any]:
    """The settings that `write_video` stored; empty when the file carries none.

    Raises:
        InputError: the file is missing or is not a video.
    """
    with _open_input(path) as container:
        comment = container.metadata.get("comment", "")
    try:
        settings = json.loads(comment)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def probe(path: Path) -> VideoInfo:
    """Decode a whole video and report what is in it; damaged frames are not counted.

    Raises:
        InputError: the file is missing or is not a video.
    """
    import av

    frames = 0
    with _open_input(path) as container:
        stream = container.streams.video[0]
        # a truncated file ends in an error; what was decoded before it still counts
        with contextlib.suppress(av.error.FFmpegError):
            for _ in container.decode(stream):
                frames += 1
        return _info(path, stream, frames)


def check_output(out: Path, *, need_bytes: int = FREE_MARGIN_BYTES) -> None:
    """Refuse an output path that cannot work, before any work is done.

    Raises:
        InputError: the name does not end in `.mp4`.
        OutputError: the folder is missing, not writable or full, the path is a folder, or a name that
            may be needed beside it is too long.
    """
    if out.suffix.lower() != ".mp4":
        raise InputError(f"output {str(out)!r} must end in .mp4")
    folder = out.parent
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise OutputError(f"output folder {str(folder)!r} {problem}; create it or choose another")
    try:
        if _is_folder(out):
            raise OutputError(f"output {str(out)!r} is a folder; name a file in it")
        for beside in (segments_folder(out), partial_video(out), recovered_video(out)):
            _is_folder(beside)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".vidkv-"):
            pass
        free_bytes = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {str(out)!r}: {reason(error)}; choose another output") from error
    if free_bytes < need_bytes:
        raise OutputError(
            f"output folder {str(folder)!r} has {free_bytes / 2**20:.0f} MiB free, "
            f"{need_bytes / 2**20:.0f} MiB are needed; make room or choose another"
        )


def _segment_name(index: int, fence: int) -> str:
    return f"seg_{index:05d}-{fence}.ts" if fence else f"seg_{index:05d}.ts"


def _check_geometry(fps: int, height: int, width: int) -> None:
    if fps < 1:
        raise InputError(f"fps={fps} must be at least 1")
    for name, side in (("height", height), ("width", width)):
        if side < 2 or side % 2:
            raise InputError(f"{name}={side} must be even and positive: H.264 stores 2x2 blocks")


def _as_rgb(frames: Frames, height: int, width: int) -> npt.NDArray[np.uint8]:
    array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (height, width, 3):
        raise InputError(
            f"frames must be uint8 of shape (frames, {height}, {width}, 3); "
            f"got {array.dtype} of shape {tuple(array.shape)}"
        )
    if not len(array):
        raise InputError("frames must hold at least one frame; got none")
    return array


def _add_h264(container: OutputContainer, fps: int, height: int, width: int, crf: int) -> VideoStream:
    options = {
        "preset": "veryfast",
        "crf": str(crf),
        "bf": "0",
        # no look-ahead: a dozen frames gain little from it, and with x264's macroblock tree about
        # one encode in a hundred gave other bytes for the same frames
        "tune": "zerolatency",
        # longer than any chunk: the first frame is the key frame, later ones only at scene cuts
        "g": "100000",
    }
    stream = container.add_stream("libx264", rate=fps, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.time_base = Fraction(1, fps)
    # a chunk is too short to pay for starting more, and the model needs the other cores
    context.thread_count = 1
    context.color_range = _LIMITED_RANGE
    context.colorspace = context.color_primaries = context.color_trc = _BT601
    return stream


def _remux(segments: Sequence[Path], out: Path, fps: int, comment: str, max_frames: int | None) -> int:
    """Copy the packets of all segments into one mp4 and return how many frames it holds."""
    import av

    # a time scale that fps divides: every frame time and the total length are exact
    scale = fps * 1000
    options = {
        "movflags": "+faststart",
        "video_track_timescale": str(scale),
        "movie_timescale": str(scale),
    }
    frames = 0
    with av.open(_url(out), "w", format="mp4", options=options) as container:
        container.metadata["comment"] = comment
        target: VideoStream | None = None
        for packet in itertools.islice(_packets(segments), max_frames):
            if target is None:
                target = container.add_stream_from_template(packet.stream)
                target.time_base = Fraction(1, scale)
            packet.stream, packet.time_base = target, Fraction(1, fps)
            packet.pts = packet.dts = frames
            packet.duration = 1
            container.mux(packet)
            frames += 1
    return frames


def _packets(segments: Sequence[Path]) -> Iterator[Packet[VideoStream]]:
    """Packets of all segments in order; one packet is one frame."""
    import av

    size: tuple[int, int] | None = None
    for path in segments:
        try:
            with av.open(_url(path), "r", format=_format(path)) as container:
                stream = container.streams.video[0]
                size = size or (stream.width, stream.height)
                if (stream.width, stream.height) != size:
                    raise OutputError(
                        f"segment {path} is {stream.width}x{stream.height}, but the first one is "
                        f"{size[0]}x{size[1]}; they cannot be joined"
                    )
                yield from (packet for packet in container.demux(stream) if packet.size)
        except (av.error.FFmpegError, IndexError) as error:
            raise OutputError(
                f"segment {path} cannot be read: {reason(error)}; delete it and resume"
            ) from error


def _scan(path: Path) -> VideoInfo | None:
    """Count the packets of a segment without decoding; None when it cannot be read."""
    import av

    try:
        with av.open(_url(path), "r", format=_format(path)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for packet in container.demux(stream) if packet.size)
            return _info(path, stream, frames)
    # of damaged files streams may lack what whole ones have
    except (av.error.FFmpegError, IndexError, AttributeError, ValueError):
        return None


def _info(path: Path, stream: VideoStream, frames: int) -> VideoInfo:
    # the spacing of one or two frames of a segment tells no rate; what the encoder stored does
    rate = stream.codec_context.framerate if path.suffix == ".ts" else stream.average_rate
    fps = float(rate or 0)
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = frames / fps if fps else 0.0
    return VideoInfo(frames, seconds, fps, stream.width, stream.height, path.stat().st_size)


@contextlib.contextmanager
def _open_input(path: Path) -> Iterator[InputContainer]:
    import av

    try:
        container = av.open(_url(path), "r", format=_format(path))
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise InputError(f"cannot read video {path}: {reason(error)}") from error
    with container:
        if not container.streams.video or container.streams.video[0].codec_context is None:
            raise InputError(f"cannot read video {path}: it has no pictures")
        yield container


def _require_whole(path: Path, frames: int) -> VideoInfo:
    """Reopen a written mp4: the muxer does not report an error of its very last flush."""
    import av

    size_bytes = path.stat().st_size
    if sum(length for _, length in _boxes(path)) != size_bytes:
        raise OSError(errno.ENOSPC, "the file was cut short")
    with av.open(_url(path)) as container:
        stream = container.streams.video[0]
        if stream.frames != frames:
            raise OSError(errno.EIO, f"{stream.frames} of {frames} frames were stored")
        return _info(path, stream, frames)


def _boxes(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level boxes of an mp4 as (type, length in bytes), as their headers claim."""
    with path.open("rb") as file:
        while len(header := file.read(8)) == 8:
            length, kind = int.from_bytes(header[:4], "big"), header[4:].decode("latin-1")
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
                yield kind, length
                file.seek(length - 16, os.SEEK_CUR)
            elif length < 8:
                return
            else:
                yield kind, length
                file.seek(length - 8, os.SEEK_CUR)


def _lock(descriptor: int, folder: Path) -> None:
    """Take the lock of a segment folder; the kernel lets it go however the process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the run before may have deleted the file between its being opened and locked here
        mine = os.path.samestat(os.fstat(descriptor), os.stat(folder / _LOCK_NAME))
    except (BlockingIOError, FileNotFoundError):
        mine = False
    except OSError as error:
        # some network file systems have no locks; a video is worth more than the guard
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise OutputError(
                f"cannot lock the segment folder {folder}: {reason(error)}; choose another output"
            ) from error
        mine = True
    if not mine:
        raise OutputError(
            f"another run is writing its segments to {folder}; wait for its end or choose another output"
        )


def _is_ours(entry: os.DirEntry[str]) -> bool:
    written = entry.name == _LOCK_NAME or _SEGMENT_FILE.fullmatch(entry.name) is not None
    return written and entry.is_file(follow_symlinks=False)


def _delete_segments(folder: Path, first: int) -> None:
    try:
        _remove_segments(folder, first)
    except OSError as error:
        raise OutputError(
            f"cannot delete segments of {folder}: {reason(error)}; delete them by hand"
        ) from error


def _remove_segments(folder: Path, first: int) -> None:
    # lowest first: one deletion makes a gap, and what is behind a gap does not count
    for name in sorted(os.listdir(folder)):
        kind = _SEGMENT_FILE.fullmatch(name)
        if kind and (kind[1] or int(kind[2]) >= first):
            (folder / name).unlink(missing_ok=True)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _url(path: Path) -> str:
    """An absolute path: a relative one with a colon would be read as a protocol."""
    return str(path.absolute())


def _format(path: Path) -> str | None:
    """Named for segments: a few frames of flat colour are too short to be recognised."""
    return "mpegts" if path.suffix == ".ts" else None
