"""What `vidkv.intake` starts to decode a picture or a video that a user handed in.

A script of its own that imports the standard library, numpy, PIL and av alone: it starts in a fraction of a
second, and what a crafted file may do to a decoder happens here, behind limits. The file is standard input,
already open. The answer on standard output is one line of JSON, `{"frames": n}` and then n frames of
(height, width, 3) uint8, or `{"why": ..., "remedy": ...}`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL import Image

    Pixels = npt.NDArray[np.uint8]

PICTURES = ("PNG", "JPEG", "WEBP")
PICTURE_REMEDY = "give a PNG, JPEG or WebP"
VIDEO_REMEDY = "give an mp4; `ffmpeg -i FILE -an out.mp4` makes one of most others"
SHORTEN = "cut its last seconds into a file of their own: `ffmpeg -sseof -20 -i FILE -an out.mp4`"

HEAD_BYTES = 400
"""Bytes from which the container format can be told: three packets of an MPEG transport stream."""

CODECS = "h264,hevc,libdav1d,av1,vp8,libvpx,vp9,libvpx-vp9,mpeg4,mpeg2video,mjpeg,prores,ffv1".split(",")
"""FFmpeg's decoders that are let near a file; it has some five hundred."""

LATE = 32
"""Packets by which a frame may come out late, by reordering and by threads, and more than an open group of
pictures takes to be whole after its keyframe."""

THREADS = min(4, os.cpu_count() or 1)
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


@dataclass(frozen=True)
class Task:
    """What to do within which limits.

    Attributes:
        kind: `image` or `video`.
        frames: of a video's end, at most.
        height, width: pixels of the answer.
        max_pixels, max_seconds: of the file, by its own header.
        cpu_s, memory_bytes, answer_bytes: of this process.
        parent: the process that wants the answer; without it this one ends.
    """

    kind: str
    frames: int
    height: int
    width: int
    max_pixels: int
    max_seconds: float
    cpu_s: int
    memory_bytes: int
    answer_bytes: int
    parent: int


class Refused(Exception):
    """The file cannot be used.

    Attributes:
        why, remedy: what is wrong with it, and what to do about that.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.why, self.remedy = why, remedy


def kind_of_head(head: bytes) -> str | None:
    """`image` or `video`, told by a file's first bytes; None for anything that is not taken."""
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or head[:4] + head[8:12] == b"RIFFWEBP":
        return "image"
    return "video" if container_format(head) else None


def container_format(head: bytes) -> str | None:
    """FFmpeg's name of the container, or None.

    FFmpeg itself is never asked: it would take a playlist, or a list of files to join, for a video, whatever
    the file is called, and open what it names.
    """
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        still = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"heic", b"heix", b"mif1")
        return None if still else "mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    # a packet of a transport stream begins with 0x47; on discs a time of four bytes stands before it
    for first, size in ((0, 188), (4, 192)):
        if len(head) > first + size and head[first] == head[first + size] == 0x47:
            return "mpegts"
    return None


def die_with(parent: int) -> None:
    """End when the process that wants the answer ends, however that happens."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def confine(task: Task) -> None:
    """Limits for the rest of this process's life."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, task.cpu_s)
    _limit(resource.RLIMIT_AS, task.memory_bytes)
    _limit(resource.RLIMIT_FSIZE, task.answer_bytes)
    # FFmpeg's formats and protocols open files and sockets by themselves: with the three standard streams the
    # table is full. PIL does not, but imports parts of itself late
    _limit(resource.RLIMIT_NOFILE, 3 if task.kind == "video" else 16)


def _prctl(option: int, value: int) -> None:
    """Linux has it; elsewhere the limits have to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _limit(what: int, value: int) -> None:
    _, most = resource.getrlimit(what)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(what, (value, value))


def read_picture(source: BinaryIO, task: Task) -> list[Pixels]:
    """An image file's first frame, upright, fitted."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    # the size is checked below, before anything is decoded, by the caller's limit and not by PIL's
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(source, formats=PICTURES) as picture:
            _check_size(*picture.size, task)
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        raise Refused("it is none of PNG, JPEG, WebP, or damaged", PICTURE_REMEDY) from None
    return [_fit(upright, task)]


def read_video_end(source: BinaryIO, task: Task) -> list[Pixels]:
    """The last frames of a video file, fitted, in memory that does not grow with the file.

    The packets are counted first, undecoded; then decoding begins at the last keyframe that leaves enough of
    them. Packets can yield fewer frames than there are packets (fields, hidden frames): then more are taken.
    """
    source.seek(0)
    container = container_format(source.read(HEAD_BYTES))
    if container is None:
        raise Refused("it is none of MP4, MOV, MKV, WebM, MPEG-TS", VIDEO_REMEDY)
    wanted = task.frames + LATE
    while True:
        with _opened(source, container, task) as opened:
            start, total = _start(_packets(opened, _stream(opened, task)), wanted)
        with _opened(source, container, task) as opened:
            kept = _decode_end(opened, start, total - wanted, task)
        if len(kept) == task.frames or wanted >= total:
            break
        wanted *= 2
    if not kept:
        raise Refused("it has no frames", "give another video")
    return list(kept)


def _opened(source: BinaryIO, container: str, task: Task) -> InputContainer:
    import av

    source.seek(0)
    # later versions replace what is no UTF-8 without being asked
    lenient: dict[str, Any] = {"metadata_errors": "replace"} if av.__version__.startswith("18.") else {}
    return av.open(
        source,
        "r",
        format=container,
        options={"max_pixels": str(task.max_pixels)},
        container_options={"protocol_whitelist": "none", "codec_whitelist": ",".join(CODECS)},
        buffer_size=2**20,
        io_open=_open_nothing,
        **lenient,
    )


def _open_nothing(url: str, flags: int, options: Mapping[str, str]) -> NoReturn:
    raise PermissionError("it refers to another file")


def _stream(container: InputContainer, task: Task) -> VideoStream:
    """The first stream of moving pictures, ready to be decoded."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise Refused("it has no video stream", "give a file with pictures")
    stream = streams[0]
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        name = "unknown" if context is None else context.name
        raise Refused(f"its codec {name} is not taken", VIDEO_REMEDY)
    _check_size(context.width, context.height, task)
    lengths = [container.duration / 1e6] if container.duration else []
    lengths += [float(stream.duration * stream.time_base)] if stream.duration and stream.time_base else []
    if max(lengths, default=0) > task.max_seconds:
        most = f"at most {task.max_seconds:g} s are taken"
        raise Refused(f"it lasts {max(lengths):.0f} s by its header, {most}", SHORTEN)
    context.options = {"max_pixels": str(task.max_pixels)}
    context.thread_type = "AUTO"
    context.thread_count = THREADS
    return stream


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """Those that hold something, the same ones each time."""
    return (packet for packet in container.demux(stream) if packet.size)


def _start(packets: Iterator[Packet[VideoStream]], wanted: int) -> tuple[int, int]:
    """Which packet to begin with, so that at least so many are decoded, and how many there are."""
    keys: deque[int] = deque()
    total = 0
    for packet in packets:
        if packet.is_keyframe:
            keys.append(total)
        total += 1
        while len(keys) > 1 and total - keys[1] >= wanted:
            keys.popleft()
    return (keys[0] if keys else 0), total


def _decode_end(container: InputContainer, start: int, unused: int, task: Task) -> deque[Pixels]:
    """The last frames of what the packets from `start` yield; the first `unused` packets' are not fitted."""
    stream = _stream(container, task)
    context = stream.codec_context
    kept: deque[Pixels] = deque(maxlen=task.frames)
    for index, packet in enumerate(_packets(container, stream)):
        if index >= start:
            frames = context.decode(packet)
            kept.extend(_fit_frame(frame, task) for frame in frames if index >= unused)
    kept.extend(_fit_frame(frame, task) for frame in context.decode(None))
    return kept


def _fit_frame(frame: VideoFrame, task: Task) -> Pixels:
    import numpy as np
    from PIL import Image

    _check_size(frame.width, frame.height, task)
    pixels = frame.to_ndarray(format="rgb24")
    # how the camera was held: degrees counter-clockwise
    return _fit(Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))), task)


def _fit(picture: Image.Image, task: Task) -> Pixels:
    """Scaled and cropped around the middle, as `vidkv.conditioning.as_pixels` does."""
    import numpy as np
    from PIL import ImageOps

    return np.asarray(ImageOps.fit(picture, (task.width, task.height)))


def _check_size(width: int, height: int, task: Task) -> None:
    if width * height > task.max_pixels:
        most = f"at most {task.max_pixels:,} are taken"
        raise Refused(f"it has {width}x{height} pixels, {most}", "scale it down")


def _read(task: Task) -> list[Pixels]:
    """The frames; whatever a decoder makes of a damaged file becomes a refusal.

    Raises:
        Refused: always that.
    """
    read: Callable[[BinaryIO, Task], list[Pixels]]
    read, remedy = (read_picture, PICTURE_REMEDY) if task.kind == "image" else (read_video_end, VIDEO_REMEDY)
    try:
        with open(0, "rb", closefd=False) as source:
            return read(source, task)
    except Refused:
        raise
    except MemoryError:
        most = f"{task.memory_bytes / 2**30:.3g} GiB"
        raise Refused(f"it needs more than {most} of memory", "scale it down") from None
    except Exception as error:
        # decoders raise whatever a header leads them to: struct.error, IndexError, SyntaxError…
        text = str(getattr(error, "strerror", None) or error or type(error).__name__)
        raise Refused(text, remedy) from None


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    die_with(task.parent)
    _import(task.kind)
    confine(task)
    answer: dict[str, Any]
    frames: list[Pixels] = []
    try:
        frames = _read(task)
        answer = {"frames": len(frames)}
    except Refused as refused:
        answer = {"why": refused.why, "remedy": refused.remedy}
    with open(1, "wb", closefd=False) as out:
        out.write(json.dumps(answer).encode() + b"\n")
        for frame in frames:
            out.write(frame.tobytes())


def _import(kind: str) -> None:
    """Load everything that decoding will use, before no file can be opened any more."""
    import numpy  # noqa: F401
    from PIL import ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

    if kind == "video":
        import av

        av.logging.set_level(None)
        # PyAV imports parts of itself late; its __main__ is a command
        for module in pkgutil.walk_packages(av.__path__, "av."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


if __name__ == "__main__":
    main()
