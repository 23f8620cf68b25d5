"""What is finished of a video, for those who watch it being made: pictures, and HLS in fragmented mp4.

Everything is read from the segments in the job's folder or, once they are gone, from its mp4; both hold the
same packets, which are copied and never encoded anew. So fragments cost about a millisecond, and a player
that was given the first ones from segments goes on with those from the mp4.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

import fastapi
from fastapi import FastAPI, Query, Response
from PIL import Image

from vidkv.apps.api import Refused, Service, faulty
from vidkv.errors import VidkvError
from vidkv.files import reason
from vidkv.jobs.store import Job
from vidkv.segments import partial_video, read_metadata, segment_paths

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

HELD_BYTES = 32 * 2**20
"""Of pictures and fragments that several tabs are likely to ask for."""
HELD_FOLDERS = 8
JPEG_QUALITY = 90
TICKS = 1000
"""Of a frame, as in the finished mp4: at any frame rate all times are whole numbers."""
_ENCODER_BEGINS = bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef")
"""x264 puts this before the first picture that it encodes, and every chunk was encoded by itself. Key frames
alone would not tell where chunks begin: there are others at cuts."""
_BEFORE_PICTURE_BYTES = 4096
Stamp = tuple[str, int, int, int]


@dataclass(frozen=True)
class Timeline:
    """Which frames are in which chunk.

    Attributes:
        first, later: frames of the first chunk, and of every one after it; the last may have fewer.
        frames: in all.
    """

    first: int
    later: int
    frames: int
    fps: int

    @property
    def chunks(self) -> int:
        return 1 + max(0, -(-(self.frames - self.first) // self.later))

    def span(self, chunk: int) -> tuple[int, int]:
        """The first frame of a chunk, and that of the next one."""
        begin = self.first + (chunk - 1) * self.later if chunk else 0
        return begin, min(self.frames, self.first + chunk * self.later)

    def header(self) -> dict[str, str]:
        """For players, that seek by time and ask by chunk."""
        text = f"first={self.first}, later={self.later}, frames={self.frames}, fps={self.fps}"
        return {"X-Timeline": text}


class Source(Protocol):
    """Where the packets of finished chunks are."""

    @property
    def timeline(self) -> Timeline: ...

    def stamp(self, chunk: int) -> Stamp:
        """Names what a chunk is read from; changes when that does."""

    def packets(self, chunk: int) -> contextlib.AbstractContextManager[_Packets]:
        """A chunk's packets, one a frame, and the stream that they come from."""


_Packets = tuple["VideoStream", "Iterator[Packet[VideoStream]]"]


class Segments:
    """One file a chunk.

    Args:
        paths: of all finished chunks.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        first, fps = _count(_stamp(paths[0]))
        later = _count(_stamp(paths[1]))[0] if len(paths) > 1 else first
        last = _count(_stamp(paths[-1]))[0]
        frames = first + (len(paths) - 2) * later + last if len(paths) > 1 else first
        self.timeline = Timeline(first, later, frames, fps)

    def stamp(self, chunk: int) -> Stamp:
        return _stamp(self.paths[chunk])

    @contextlib.contextmanager
    def packets(self, chunk: int) -> Iterator[_Packets]:
        import av

        with av.open(str(self.paths[chunk]), format="mpegts") as container:
            stream = container.streams.video[0]
            yield stream, (packet for packet in container.demux(stream) if packet.size)


class Joined:
    """All chunks in one mp4.

    Args:
        path: of a file that `write_video` made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.timeline = _joined_timeline(_stamp(path))

    def stamp(self, chunk: int) -> Stamp:
        return _stamp(self.path)

    @contextlib.contextmanager
    def packets(self, chunk: int) -> Iterator[_Packets]:
        import av

        begin, end = self.timeline.span(chunk)
        with av.open(str(self.path.absolute()), format="mp4") as container:
            stream = container.streams.video[0]
            # a chunk begins with a key frame, so this is where the next packet comes from
            container.seek(begin * TICKS, stream=stream)
            found = (packet for packet in container.demux(stream) if packet.size)
            yield stream, itertools.islice(found, end - begin)


class Held:
    """The last things that were made, up to so many bytes in all."""

    def __init__(self, most_bytes: int = HELD_BYTES) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._things: OrderedDict[Any, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], bytes]) -> bytes:
        """What was made under this key, or is made now."""
        with self._lock:
            if key in self._things:
                self._things.move_to_end(key)
                return self._things[key]
        thing = make()
        with self._lock:
            # another thread may have made it meanwhile
            self.bytes += len(thing) - len(self._things.pop(key, b""))
            self._things[key] = thing
            while self.bytes > self.most_bytes:
                self.bytes -= len(self._things.popitem(last=False)[1])
        return thing


class Listings:
    """Segments of the folders that were asked for last: an hour of video has thousands, mostly the same."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[list[str], list[Path]]] = OrderedDict()
        self._lock = threading.Lock()

    def paths(self, folder: Path) -> list[Path]:
        """As `segment_paths` finds them."""
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
        with self._lock:
            before, paths = self._known.get(folder, ([], []))
        if names != before:
            paths = segment_paths(folder)
        with self._lock:
            self._known[folder] = names, paths
            self._known.move_to_end(folder)
            while len(self._known) > HELD_FOLDERS:
                self._known.popitem(last=False)
        return paths


class Live:
    """What the routes do, apart from HTTP."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.held, self.listings = Held(), Listings()

    def source(self, job: Job) -> Source:
        """Where the finished chunks of a job are now.

        Raises:
            Refused: nothing is finished, or nothing is left.
        """
        with _reading(job):
            # a segment behind the last chunk that was reported may yet be made anew
            paths = self.listings.paths(self.service.store.folder(job).segments)[: job.done]
            if job.done and len(paths) == job.done:
                return Segments(paths)
            # of a job that has just ended the folder is emptied before the row says so
            out = self.service.store.file(job)
            for path in (out, partial_video(out)):
                if job.done and self._made_by(path, job):
                    return Joined(path)
            # segments that were found damaged are being made anew
            if paths:
                return Segments(paths)
        status = self.service.show(job).status
        remedy = "POST the same request to make it again" if job.ended else "wait for its first chunk"
        raise Refused(404, "no_frames", f"video {job.id} is {status} and has no frames; {remedy}", "id")

    def picture(self, id: str, chunk: int | None) -> tuple[bytes, int]:
        """The last frame of a chunk as a JPEG, and the chunk's number.

        Args:
            chunk: by default the newest.
        """
        job, source, chunk = self._chunk(id, chunk)
        with _reading(job, chunk):
            key = ("picture", source.stamp(chunk), chunk)
            return self.held.get(key, lambda: _picture(source, chunk)), chunk

    def beginning(self, id: str) -> tuple[bytes, Timeline]:
        """What every fragment needs before it, and which frames there are."""
        job, source, _ = self._chunk(id, 0)
        with _reading(job, 0):
            key = ("beginning", source.stamp(0))
            return self.held.get(key, lambda: _mp4(source, None)[0]), source.timeline

    def fragment(self, id: str, chunk: int) -> tuple[bytes, Timeline]:
        """A chunk as a fragment that stands at its time, and which frames there are."""
        job, source, chunk = self._chunk(id, chunk)
        with _reading(job, chunk):
            key = ("fragment", source.stamp(chunk), chunk)
            return self.held.get(key, lambda: _mp4(source, chunk)[1]), source.timeline

    def playlist(self, id: str) -> str:
        """All finished chunks, and whether there will be more."""
        job = self.service.find(id)
        timeline = self.source(job).timeline
        longest = max(timeline.first, timeline.later)
        lines = [
            "#EXTM3U", "#EXT-X-VERSION:7", f"#EXT-X-TARGETDURATION:{-(-longest // timeline.fps)}",
            "#EXT-X-MEDIA-SEQUENCE:0", "#EXT-X-PLAYLIST-TYPE:EVENT",
            "#EXT-X-INDEPENDENT-SEGMENTS", '#EXT-X-MAP:URI="live/init.mp4"',
        ]  # fmt: skip
        for chunk in range(timeline.chunks):
            begin, end = timeline.span(chunk)
            lines += [f"#EXTINF:{(end - begin) / timeline.fps:.6f},", f"live/{chunk}.m4s"]
        return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if job.ended else []), ""])

    def _chunk(self, id: str, chunk: int | None) -> tuple[Job, Source, int]:
        """A job, where its chunks are, and the number of one of them.

        Raises:
            Refused: it is not finished.
        """
        job = self.service.find(id)
        source = self.source(job)
        chunks = source.timeline.chunks
        if chunk is None:
            chunk = chunks - 1
        if chunk >= chunks:
            left = "it has ended" if job.ended else f"wait for GET /v1/videos/{id}/events"
            said = f"chunk {chunk} of video {id} is not finished; it has {chunks} (0 to {chunks - 1}): {left}"
            raise Refused(404, "no_chunk", said, "chunk")
        return job, source, chunk

    def _made_by(self, path: Path, job: Job) -> bool:
        """Whether a file in the output folder is the video of a job, and not one that its user put there."""
        with contextlib.suppress(VidkvError):
            inside = self.service.store.root.resolve() in path.resolve().parents
            return inside and path.is_file() and _key(_stamp(path)) == job.key
        return False


def add_live_routes(app: FastAPI, service: Service) -> None:
    """Routes that read finished chunks. Plain functions run in threads: they wait for files."""
    live = Live(service)
    # an id that was deleted can be given to another video
    fresh = {"Cache-Control": "no-store"}

    def sent(kind: str, what: str) -> dict[int | str, dict[str, Any]]:
        content = {kind: {"schema": {"type": "string", "format": "binary"}}}
        return {200: {"content": content, "description": what}, **faulty(404, 409)}

    @app.get("/v1/videos/{id}/frame", response_class=Response, responses=sent("image/jpeg", "The picture"))
    def get_frame(
        id: str,
        chunk: Annotated[int | None, Query(ge=0, le=10**9, description="By default the newest.")] = None,
    ) -> Response:
        """The last frame of a finished chunk; the header X-Chunk says of which."""
        picture, found = live.picture(id, chunk)
        return Response(picture, media_type="image/jpeg", headers=fresh | {"X-Chunk": str(found)})

    @app.get(
        "/v1/videos/{id}/live.m3u8", response_class=Response,
        responses=sent("application/vnd.apple.mpegurl", "The playlist"),
    )  # fmt: skip
    def get_playlist(id: str) -> Response:
        """HLS: what is finished so far, as it grows."""
        return Response(live.playlist(id), media_type="application/vnd.apple.mpegurl", headers=fresh)

    @app.get(
        "/v1/videos/{id}/live/init.mp4", response_class=Response, responses=sent("video/mp4", "The beginning")
    )
    def get_beginning(id: str) -> Response:
        """What players need before any fragment; its Content-Type names the codec."""
        data, timeline = live.beginning(id)
        kind = f'video/mp4; codecs="{codec(data)}"'
        return Response(data, media_type=kind, headers=fresh | timeline.header())

    @app.get(
        "/v1/videos/{id}/live/{chunk}.m4s",
        response_class=Response,
        responses=sent("video/mp4", "The fragment"),
    )
    def get_fragment(
        id: str, chunk: Annotated[int, fastapi.Path(ge=0, le=10**9, description="Counted from 0.")]
    ) -> Response:
        """A finished chunk; the header X-Timeline says which frames are in which."""
        data, timeline = live.fragment(id, chunk)
        return Response(data, media_type="video/mp4", headers=fresh | timeline.header())


def codec(beginning: bytes) -> str:
    """What players call the coding of a video: profile, constraints and level, from its `avcC` box."""
    at = beginning.index(b"avcC") + 5
    return f"avc1.{beginning[at : at + 3].hex()}"


def _picture(source: Source, chunk: int) -> bytes:
    with source.packets(chunk) as (stream, packets):
        # a chunk is decoded in milliseconds; threads of its own would take longer to start
        stream.codec_context.thread_count = 1
        frame = None
        for packet in itertools.chain(packets, [None]):
            for decoded in stream.codec_context.decode(packet):
                frame = decoded
        if frame is None:
            raise ValueError("no frame in it can be decoded")
        buffer = io.BytesIO()
        pixels = frame.to_ndarray(format="rgb24")
        Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()


def _mp4(source: Source, chunk: int | None) -> tuple[bytes, bytes]:
    """The beginning of a fragmented mp4, and a chunk's fragment if one is named."""
    import av

    timeline = source.timeline
    begin, end = timeline.span(chunk or 0)
    options = {
        "movflags": "+empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer",
        "video_track_timescale": str(timeline.fps * TICKS),
        "movie_timescale": str(timeline.fps * TICKS),
        # the fragment's times are to be those of its packets
        "avoid_negative_ts": "disabled",
        "use_editlist": "0",
        # known of an mp4 and not of a segment
        "write_btrt": "0",
        "fragment_index": str((chunk or 0) + 1),
    }
    buffer = io.BytesIO()
    with source.packets(chunk or 0) as (stream, packets):
        with av.open(buffer, "w", format="mp4", options=options) as container:
            target = container.add_stream_from_template(stream)
            target.time_base = Fraction(1, timeline.fps * TICKS)
            container.start_encoding()
            frame = begin
            for packet in packets if chunk is not None else ():
                packet.stream, packet.time_base = target, Fraction(1, timeline.fps)
                packet.pts = packet.dts = frame
                packet.duration = 1
                container.mux(packet)
                frame += 1
    if chunk is not None and frame != end:
        raise ValueError(f"{frame - begin} of {end - begin} frames are in it")
    data = buffer.getvalue()
    parts = {True: bytearray(), False: bytearray()}
    for kind, box in _boxes(data):
        parts[kind in (b"ftyp", b"moov")] += box
    return bytes(parts[True]), bytes(parts[False])


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at : at + length]
        at += length


def _stamp(path: Path) -> Stamp:
    """A file's name, and what changes when it is replaced.

    Raises:
        OSError: there is no such file.
    """
    state = path.stat(follow_symlinks=False)
    # whoever may write to the folder could have put a link there
    if not stat.S_ISREG(state.st_mode):
        raise FileNotFoundError(path)
    return str(path.absolute()), state.st_ino, state.st_mtime_ns, state.st_size


@lru_cache(1024)
def _count(segment: Stamp) -> tuple[int, int]:
    """Frames of a segment, and frames per second."""
    import av

    with av.open(segment[0], format="mpegts") as container:
        stream = container.streams.video[0]
        frames = sum(1 for packet in container.demux(stream) if packet.size)
        return frames, round(stream.codec_context.framerate)


@lru_cache(1024)
def _key(video: Stamp) -> str | None:
    """Of the job that made a video."""
    return cast("str | None", read_metadata(Path(video[0])).get("job"))


@lru_cache(1024)
def _joined_timeline(video: Stamp) -> Timeline:
    import av

    with av.open(video[0], format="mp4") as container, open(video[0], "rb") as file:
        stream = container.streams.video[0]
        frames, fps = stream.frames, round(cast(Fraction, stream.average_rate))

        def begins(entry: Any) -> bool:
            head = os.pread(file.fileno(), min(entry.size, _BEFORE_PICTURE_BYTES), entry.pos)
            return bool(entry.is_keyframe) and _ENCODER_BEGINS in head

        entries = enumerate(stream.index_entries)
        chunks = [frame for frame, entry in itertools.islice((e for e in entries if begins(e[1])), 3)]
    if not chunks or chunks[0]:
        raise ValueError("it is no video of this program")
    first, second = [*chunks, frames, frames][1:3]
    return Timeline(first, second - first or first, frames, fps)


@contextlib.contextmanager
def _reading(job: Job, chunk: int | None = None) -> Iterator[None]:
    """Files that a worker may be writing, replacing or deleting."""
    import av

    what = f"chunk {chunk} of video {job.id}" if chunk is not None else f"video {job.id}"
    try:
        yield
    except FileNotFoundError:
        raise Refused(404, "no_file", f"the file of {what} has just gone; ask again", "id") from None
    except (av.error.FFmpegError, OSError, VidkvError, ValueError, IndexError, AttributeError) as error:
        raise Refused(409, "unreadable", f"{what} cannot be read: {reason(error)}; ask again", "id") from None
