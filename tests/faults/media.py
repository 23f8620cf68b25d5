"""Damaged and malicious pictures and videos, the same ones for the same seed."""

from __future__ import annotations

import functools
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vidkv.errors import InputError
from vidkv.intake import kind_of, picture, video_end

SIDE, FRAMES = 64, 12
PICTURES = (".png", ".jpg", ".webp")
VIDEOS = (".mp4", ".ts", ".mkv")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Maker = Callable[[random.Random, Path, str], tuple[str, bytes]]
"""(random numbers, folder, host:port of a listener) to (suffix, content)."""


def try_media(path: Path) -> str:
    """`ok` or `refused`: what becomes of a file whose suffix says how it is meant.

    Raises:
        AssertionError: a refusal is longer than a line, or what was decoded has the wrong shape.
    """
    try:
        if path.suffix in PICTURES:
            assert picture(path, 32, 48).shape == (1, 32, 48, 3)
        else:
            frames, *shape = video_end(path, 5, 32, 48).shape
            assert 1 <= frames <= 5 and shape == [32, 48, 3]
        assert kind_of(path) == ("image" if path.suffix in PICTURES else "video")
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and path.name in str(error), str(error)
        return "refused"
    return "ok"


def corrupt_media(folder: Path, count: int, seed: int, listener: str = "127.0.0.1:9") -> Iterator[Path]:
    """Files in a folder, one after the other; each is named after what is wrong with it.

    The kinds take turns, so that every run of `len(MAKERS)` files has them all. Those of `REFUSED` must be
    refused; others may be usable. Playlists point at a video `canary.ts` in the folder, and at the listener.
    """
    (folder / "canary.ts").write_bytes(valid(".ts"))
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        maker = MAKERS[number % len(MAKERS)]
        suffix, content = maker(chance, folder, listener)
        path = folder / f"{number:04d}-{maker.__name__}{suffix}"
        path.write_bytes(content)
        yield path


@functools.cache
def valid(suffix: str) -> bytes:
    """A small picture or video, whole."""
    if suffix in PICTURES:
        buffer = io.BytesIO()
        kind = {".png": "png", ".jpg": "jpeg", ".webp": "webp"}[suffix]
        Image.fromarray(_frame(3)).save(buffer, kind)
        return buffer.getvalue()
    buffer = io.BytesIO()
    container = {".mp4": "mp4", ".ts": "mpegts", ".mkv": "matroska"}[suffix]
    with av.open(buffer, "w", format=container) as opened:
        stream = opened.add_stream("libx264", rate=16, options={"threads": "1", "g": "4"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for i in range(FRAMES):
            opened.mux(stream.encode(av.VideoFrame.from_ndarray(_frame(i), format="rgb24")))
        opened.mux(stream.encode(None))
    return buffer.getvalue()


def _frame(i: int) -> np.ndarray:
    """Colours that change over the picture and from frame to frame: (SIDE, SIDE, 3) uint8."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([3 * x + 5 * i, 2 * y + 40, x + y + 9 * i], -1).astype(np.uint8)


def png(width: int, height: int, rows: bytes, depth: int = 8, extra: bytes = b"") -> bytes:
    """A grey PNG of any claimed size around compressed rows."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    return PNG_SIGNATURE + chunks


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@functools.cache
def _zeros(count: int) -> bytes:
    """So many zero bytes, compressed."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(bytes(2**20)) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count & 0xFFFFF)), packer.flush()])


def flipped_bits(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    suffix = chance.choice(PICTURES + VIDEOS)
    content = bytearray(valid(suffix))
    for _ in range(chance.choice((1, 4, 16, 64))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return suffix, bytes(content)


def flipped_header(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """Where sizes and counts stand: in front, and at the end of an mp4."""
    suffix = chance.choice(PICTURES + VIDEOS)
    content = bytearray(valid(suffix))
    start = content.index(b"moov") if suffix == ".mp4" else 8
    for _ in range(4):
        content[start + chance.randrange(min(200, len(content) - start))] = chance.choice(
            (0, 1, 127, 128, 255)
        )
    return suffix, bytes(content)


def truncated_picture(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    suffix = chance.choice(PICTURES)
    content = valid(suffix)
    return suffix, content[: chance.randrange(1, len(content) * 9 // 10)]


def truncated_mp4(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """Its index stands at the end."""
    content = valid(".mp4")
    return ".mp4", content[: chance.randrange(1, content.index(b"moov"))]


def truncated_stream(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    suffix = chance.choice((".ts", ".mkv"))
    content = valid(suffix)
    return suffix, content[: chance.randrange(1, len(content))]


def swapped_header(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """One format's beginning before another one's rest."""
    first, second = chance.sample(PICTURES + VIDEOS, 2)
    count = chance.choice((12, 40, 200))
    return first, valid(first)[:count] + valid(second)[count:]


def repeated_middle(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    suffix = chance.choice(PICTURES + VIDEOS)
    content = valid(suffix)
    start, end = sorted(chance.randrange(len(content)) for _ in range(2))
    return suffix, content[:end] + content[start:]


def one_pixel(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """A picture, if a small one."""
    return ".png", png(1, 1, zlib.compress(bytes((0, chance.randrange(256)))))


def huge_claim(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    side = chance.choice((30_000, 2**31 - 1))
    return ".png", png(side, side, zlib.compress(bytes(100)))


def huge_jpeg(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    content = bytearray(valid(".jpg"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 65_500, 65_500)
    return ".jpg", bytes(content)


def decompression_bomb(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """Half a megabyte of file for 2.7 GB of pixels, nothing wrong with any of it."""
    return ".png", png(30_000, 30_000, _zeros(30_000 * (1 + 30_000 // 8)), depth=1)


def text_bomb(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    note = _chunk(b"zTXt", b"Comment\0\0" + _zeros(2**28))
    return ".png", png(1, 1, zlib.compress(bytes(2)), extra=note)


def zip_bomb(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**22))
    return chance.choice((".png", ".mp4")), buffer.getvalue()


def _patched(box: bytes, offset: int, new: bytes, whole: bytes = b"") -> bytes:
    """An mp4, by default the small one, with other bytes in a box, counted from behind the box's name."""
    content = bytearray(whole or valid(".mp4"))
    start = content.index(box) + 4 + offset
    content[start : start + len(new)] = new
    return bytes(content)


def ten_hours(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """By the track's length, its table of times and what is to be shown: twelve frames of fifty minutes."""
    content = valid(".mp4")
    ticks = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    content = _patched(b"mdhd", 16, struct.pack(">I", FRAMES * 3000 * ticks))
    content = _patched(b"elst", 8, struct.pack(">I", 36_000_000), content)
    return ".mp4", _patched(b"stts", 12, struct.pack(">I", 3000 * ticks), content)


def false_length(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """Of the movie or of its track, which the table of times contradicts."""
    ticks, length = chance.choice(((1000, 36_000_000), (1, 2**32 - 1), (2**32 - 1, 1)))
    return ".mp4", _patched(chance.choice((b"mvhd", b"mdhd")), 12, struct.pack(">II", ticks, length))


def no_time_scale(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    return ".mp4", _patched(chance.choice((b"mvhd", b"mdhd")), 12, bytes(4))


def no_frame_rate(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """All frames at the same time, or each an age after the other."""
    return ".mp4", _patched(b"stts", 12, struct.pack(">I", chance.choice((0, 2**31 - 1, 2**32 - 1))))


def many_samples(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """Four thousand million frames of one byte each, by the table of sizes."""
    return ".mp4", _patched(b"stsz", 4, struct.pack(">II", 1, 2**32 - 1))


def elsewhere(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """The pictures are said to be in another file."""
    return ".mp4", _patched(b"url ", 0, bytes(4))


def _playlist(address: str) -> bytes:
    lines = (
        "#EXTM3U",
        "#EXT-X-VERSION:3",
        "#EXT-X-TARGETDURATION:10",
        "#EXTINF:10,",
        address,
        "#EXT-X-ENDLIST",
    )
    return "\n".join((*lines, "")).encode()


def playlist_of_files(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    address = chance.choice((f"file://{folder}/canary.ts", "canary.ts", f"{folder}/canary.ts"))
    return chance.choice((".mp4", ".ts", ".m3u8", ".png")), _playlist(address)


def playlist_of_secrets(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    address = chance.choice(("file:///etc/passwd", f"concat:/etc/passwd|{folder}/canary.ts", "/etc/passwd"))
    return ".mp4", _playlist(address)


def playlist_of_addresses(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    hosts = (f"http://{listener}/a.ts", f"tcp://{listener}", "http://169.254.169.254/latest/meta-data/")
    return chance.choice((".mp4", ".ts", ".mkv")), _playlist(chance.choice(hosts))


def playlist_in_a_box(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """Behind the beginning of an mp4."""
    return ".mp4", valid(".mp4")[:32] + _playlist(f"http://{listener}/a.ts")


def joined_list(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    name = chance.choice(("canary.ts", f"file:{folder}/canary.ts", f"http://{listener}/a.ts"))
    return chance.choice((".mp4", ".ffconcat")), f"ffconcat version 1.0\nfile '{name}'\n".encode()


def dash_manifest(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    base = chance.choice((f"http://{listener}/", f"file://{folder}/canary.ts"))
    text = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT9S"><Period><AdaptationSet contentType="video"><Representation id="0" '
        f'bandwidth="9"><BaseURL>{base}</BaseURL></Representation></AdaptationSet></Period></MPD>'
    )
    return ".mp4", text.encode()


def session_description(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    text = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    return ".mp4", f"{text}a=rtpmap:96 H264/90000\n".encode()


def drawing(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    text = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://{listener}/a.png"/></svg>'
    return chance.choice((".png", ".mp4")), text.encode()


def postscript(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) (r) file\n"
    return ".png", text.encode()


def empty(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    return chance.choice(PICTURES + VIDEOS), b""


def text(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    return chance.choice(PICTURES + VIDEOS), chance.choice((b"hello\n", b"\n" * 5000, "ö😀".encode() * 99))


def noise(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    return chance.choice(PICTURES + VIDEOS), chance.randbytes(chance.choice((1, 7, 4096)))


def signature_alone(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    suffix = chance.choice((".png", ".jpg", ".webp", ".mp4", ".mkv"))
    return suffix, valid(suffix)[:16] + chance.randbytes(3000)


def other_picture(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    """Whole, in a format that is not taken."""
    buffer = io.BytesIO()
    Image.fromarray(_frame(1)).save(buffer, chance.choice(("tiff", "bmp", "gif", "ppm", "jpeg2000")))
    return ".png", buffer.getvalue()


def picture_as_video(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    return chance.choice(VIDEOS), valid(chance.choice(PICTURES))


def video_as_picture(chance: random.Random, folder: Path, listener: str) -> tuple[str, bytes]:
    return chance.choice(PICTURES), valid(chance.choice(VIDEOS))


REFUSED: tuple[Maker, ...] = (
    truncated_picture, truncated_mp4, huge_claim, huge_jpeg, decompression_bomb, text_bomb, zip_bomb,
    ten_hours, playlist_of_files, playlist_of_secrets, playlist_of_addresses, playlist_in_a_box,
    joined_list, dash_manifest, session_description, drawing, postscript, empty, text, noise,
    signature_alone, other_picture, picture_as_video, video_as_picture,
)  # fmt: skip
MAYBE: tuple[Maker, ...] = (
    flipped_bits, flipped_header, truncated_stream, swapped_header, repeated_middle, one_pixel,
    false_length, no_time_scale, no_frame_rate, many_samples, elsewhere,
)  # fmt: skip
MAKERS = REFUSED + MAYBE
