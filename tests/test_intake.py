"""What users hand in is decoded by a process apart that damaged and malicious files cannot lead astray."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import select
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tests.faults.media import FRAMES, MAKERS, PICTURES, REFUSED, VIDEOS, corrupt_media, png, try_media, valid
from vidkv import intake, intake_child
from vidkv.conditioning import as_pixels
from vidkv.errors import InputError
from vidkv.intake import Limits, kind_of, picture, video_end

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def children() -> set[int]:
    """Processes that this one has started, zombies too."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # it may end while it is looked at
            with contextlib.suppress(OSError):
                parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                found |= {int(entry.name)} if int(parent) == os.getpid() else set()
    return found


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def photograph(height: int = 9, width: int = 7, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(frames: int, codec: str = "libx264", container: str = "mp4", **options: str) -> bytes:
    """Frames (32, 48) that are told apart by their noise."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as opened:
        stream = opened.add_stream(codec, rate=16, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(frames):
            small = np.asarray(photograph(4, 6, seed=i).resize((48, 32)))
            opened.mux(stream.encode(av.VideoFrame.from_ndarray(small, format="rgb24")))
        opened.mux(stream.encode(None))
    return buffer.getvalue()


def decoded_here(content: bytes) -> Tensor:
    """All frames of a video, in this process: (frames, height, width, 3) uint8."""
    with av.open(io.BytesIO(content)) as opened:
        return torch.from_numpy(np.stack([f.to_ndarray(format="rgb24") for f in opened.decode(video=0)]))


class TestPictures:
    @pytest.mark.parametrize("suffix", PICTURES)
    @pytest.mark.parametrize("size", [(64, 64), (24, 40)])
    def test_as_decoded_here(self, tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
        path = write(tmp_path, "a" + suffix, valid(suffix))
        with Image.open(path) as opened:
            assert torch.equal(picture(path, *size), as_pixels(opened, *size)[0])

    def test_turned_upright(self, tmp_path: Path) -> None:
        """Orientation 6: the camera lay on its side, what is stored is to be turned clockwise."""
        stored, about = photograph(), Image.Exif()
        about[0x0112] = 6
        for name in ("a.png", "a.jpg", "a.webp"):
            stored.save(tmp_path / name, exif=about, **({} if name == "a.jpg" else {"lossless": True}))
            with Image.open(tmp_path / name) as opened:
                wanted = torch.from_numpy(np.array(opened.convert("RGB"))).rot90(-1, (0, 1))
            assert torch.equal(picture(tmp_path / name, 7, 9)[0], wanted)

    @pytest.mark.parametrize(
        ("mode", "name"), [("RGBA", "a.png"), ("P", "a.png"), ("CMYK", "a.jpg"), ("1", "a.png")]
    )
    def test_other_colours(self, tmp_path: Path, mode: str, name: str) -> None:
        photograph().convert(mode).save(tmp_path / name)
        with Image.open(tmp_path / name) as opened:
            wanted = torch.from_numpy(np.array(opened.convert("RGB")))
        assert torch.equal(picture(tmp_path / name, 9, 7)[0], wanted)

    def test_the_first_of_several(self, tmp_path: Path) -> None:
        first, second = photograph(seed=1), photograph(seed=2)
        first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
        assert torch.equal(picture(tmp_path / "a.webp", 9, 7)[0], torch.from_numpy(np.array(first)))

    def test_one_pixel(self, tmp_path: Path) -> None:
        photograph(1, 1).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as opened:
            wanted = np.array(ImageOps.fit(opened, (16, 8)))
        assert torch.equal(picture(tmp_path / "a.png", 8, 16)[0], torch.from_numpy(wanted))

    def test_what_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no image .*missing\.png"):
            picture(tmp_path / "missing.png", 8, 8)
        for name, content in (
            ("text.png", b"hello"),
            ("empty.png", b""),
            ("cut.png", valid(".png")[: len(valid(".png")) // 2]),
            ("a.mp4", valid(".mp4")),
        ):
            path = write(tmp_path, name, content)
            with pytest.raises(InputError, match=rf"{name} cannot be read as an image \(.*\); give a PNG"):
                picture(path, 8, 8)


class TestVideos:
    @pytest.mark.parametrize("suffix", VIDEOS)
    @pytest.mark.parametrize(("asked", "size"), [(1, (64, 64)), (5, (24, 40)), (100, (64, 64))])
    def test_as_decoded_here(self, tmp_path: Path, suffix: str, asked: int, size: tuple[int, int]) -> None:
        wanted = as_pixels(decoded_here(valid(suffix)), *size)[0][-asked:]
        found = video_end(write(tmp_path, "a" + suffix, valid(suffix)), asked, *size)
        assert len(found) == min(asked, FRAMES) and torch.equal(found, wanted)

    @pytest.mark.parametrize("options", [{}, {"g": "20", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}])
    def test_the_end_of_a_longer_one(self, tmp_path: Path, options: dict[str, str]) -> None:
        """Of many groups of pictures, and of one that is as long as the video."""
        content = encoded(200, **options)
        found = video_end(write(tmp_path, "a.mp4", content), 30, 32, 48)
        assert torch.equal(found, decoded_here(content)[-30:])

    def test_sound_is_passed_over(self, tmp_path: Path) -> None:
        with av.open(str(tmp_path / "a.mp4"), "w") as opened:
            sound = opened.add_stream("aac", rate=8000, layout="mono")
            stream = opened.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate = 8000
            opened.mux(sound.encode(tone))
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 90, np.uint8), format="rgb24")
            opened.mux([*stream.encode(frame), *stream.encode(None), *sound.encode(None)])
        assert torch.equal(
            video_end(tmp_path / "a.mp4", 9, 32, 48), decoded_here((tmp_path / "a.mp4").read_bytes())
        )

    @pytest.mark.parametrize("degrees", [90, 180, 270])
    def test_turned_upright(self, tmp_path: Path, degrees: int) -> None:
        with av.open(str(tmp_path / "a.mp4"), "w") as opened:
            stream = opened.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            stream.set_display_rotation(degrees)
            corner = np.zeros((32, 48, 3), np.uint8)
            corner[:16, :16] = 255
            opened.mux(stream.encode(av.VideoFrame.from_ndarray(corner, format="rgb24")))
            opened.mux(stream.encode(None))
        wanted = decoded_here((tmp_path / "a.mp4").read_bytes())[0].rot90(degrees // 90, (0, 1))
        assert torch.equal(video_end(tmp_path / "a.mp4", 1, *wanted.shape[:2])[0], wanted)

    def test_what_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no video .*missing\.mp4"):
            video_end(tmp_path / "missing.mp4", 5, 8, 8)
        for name, content in (
            ("text.mp4", b"hello"),
            ("empty.mp4", b""),
            ("cut.mp4", valid(".mp4")[: len(valid(".mp4")) // 2]),
            ("a.png", valid(".png")),
        ):
            path = write(tmp_path, name, content)
            with pytest.raises(InputError, match=rf"{name} cannot be read as a video \(.*\); give an mp4"):
                video_end(path, 5, 8, 8)

    def test_sound_alone(self, tmp_path: Path) -> None:
        with av.open(str(tmp_path / "a.mp4"), "w") as opened:
            sound = opened.add_stream("aac", rate=8000, layout="mono")
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate = 8000
            opened.mux([*sound.encode(tone), *sound.encode(None)])
        with pytest.raises(InputError, match="has no video stream"):
            video_end(tmp_path / "a.mp4", 5, 8, 8)

    def test_a_codec_that_is_not_taken(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.mkv", encoded(2, codec="msmpeg4", container="matroska"))
        with pytest.raises(InputError, match="its codec msmpeg4 is not taken"):
            video_end(path, 5, 8, 8)


class TestWhereDecodingBegins:
    @staticmethod
    def packets(keys: set[int], count: int) -> Iterator[Any]:
        return (SimpleNamespace(is_keyframe=i in keys) for i in range(count))

    @pytest.mark.parametrize("wanted", [1, 3, 10, 19, 20, 21, 99])
    @pytest.mark.parametrize("keys", [{0}, {0, 5, 10, 15}, {3, 4, 19}, set(range(20))])
    def test_the_last_keyframe_that_leaves_enough(self, keys: set[int], wanted: int) -> None:
        start, total = intake_child._start(self.packets(keys, 20), wanted)
        assert total == 20
        assert start == max((k for k in keys if 20 - k >= wanted), default=min(keys))

    def test_without_keyframes(self) -> None:
        assert intake_child._start(self.packets(set(), 7), 3) == (0, 7)

    def test_more_is_decoded_where_packets_yield_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """VP8 keeps pictures that are never shown in packets of their own."""
        monkeypatch.setattr(intake_child, "LATE", 0)
        content = encoded(
            150, codec="libvpx", container="webm", g="25", **{"auto-alt-ref": "1", "lag-in-frames": "8"}
        )
        wanted = decoded_here(content)[-60:]
        task = intake_child.Task("video", 60, 32, 48, 10**6, 100.0, 1, 1, 1, 1)
        found = intake_child.read_video_end(io.BytesIO(content), task)
        assert torch.equal(torch.from_numpy(np.stack(found)), wanted)


class TestWhatIsNoFile:
    @pytest.mark.parametrize("read", [lambda p: picture(p, 8, 8), lambda p: video_end(p, 1, 8, 8), kind_of])
    def test_is_not_opened(self, tmp_path: Path, read: Callable[[Path], Any]) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "pipe")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            for name, words in (
                ("pipe", "it is a pipe"),
                ("link", "it is a pipe"),
                ("folder", "it is a folder"),
                ("socket", "it is a socket"),
                ("loop", "symbolic links"),
                ("x" * 300, "too long"),
                ("a\0b", "null byte"),
                ("/dev/zero", "it is a device"),
            ):
                with pytest.raises(InputError, match=f"cannot be read as .*{words}"):
                    read(tmp_path / name)

    def test_a_link_to_a_file_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "b.png").symlink_to(write(tmp_path, "a.png", valid(".png")))
        assert torch.equal(picture(tmp_path / "b.png", 64, 64), picture(tmp_path / "a.png", 64, 64))

    def test_a_name_cannot_break_the_line(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a\n\x1b[2Jb.png", b"hello")
        with pytest.raises(InputError, match=r"a\\n\\x1b\[2Jb\.png cannot"):
            picture(path, 8, 8)


class TestKinds:
    @pytest.mark.parametrize("suffix", PICTURES + VIDEOS)
    def test_told_by_content(self, tmp_path: Path, suffix: str) -> None:
        assert kind_of(write(tmp_path, "upload", valid(suffix))) == (
            "image" if suffix in PICTURES else "video"
        )

    def test_a_transport_stream_from_a_disc(self, tmp_path: Path) -> None:
        """A time of four bytes before each packet."""
        plain = valid(".ts")
        content = b"".join(bytes(4) + plain[i : i + 188] for i in range(0, len(plain), 188))
        path = write(tmp_path, "a.m2ts", content)
        assert kind_of(path) == "video"
        assert torch.equal(video_end(path, 99, 64, 64), decoded_here(plain))

    @pytest.mark.parametrize(
        "content", [b"", b"hello", b"GIF89a", b"#EXTM3U\n", b"\0\0\0\x20ftypavif", b"\x47" * 100]
    )
    def test_anything_else(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(InputError, match="upload is neither a picture nor a video; give a PNG"):
            kind_of(write(tmp_path, "upload", content))


class TestLimits:
    def test_size_of_the_file(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.png", valid(".png") + bytes(2**21))
        with pytest.raises(InputError, match="it has 2 MiB, at most 1 are taken"):
            picture(path, 8, 8, Limits(max_picture_bytes=2**20))
        path = write(tmp_path, "a.ts", valid(".ts") + bytes(2**21))
        with pytest.raises(InputError, match=r"it has 2 MiB, at most 1 are taken.*cut its last seconds"):
            video_end(path, 1, 8, 8, Limits(max_video_bytes=2**20))

    def test_pixels(self, tmp_path: Path) -> None:
        limits = Limits(max_pixels=64 * 64 - 1)
        with pytest.raises(InputError, match=r"a\.png .*it has 64x64 pixels, at most 4,095 are taken"):
            picture(write(tmp_path, "a.png", valid(".png")), 8, 8, limits)
        with pytest.raises(InputError, match=r"a\.mp4 cannot be read as a video"):
            video_end(write(tmp_path, "a.mp4", valid(".mp4")), 1, 8, 8, limits)

    def test_seconds(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.mp4", encoded(48))
        assert len(video_end(path, 1, 8, 8, Limits(max_seconds=3))) == 1
        with pytest.raises(InputError, match="it lasts 3 s by its header, at most 2 s are taken"):
            video_end(path, 1, 8, 8, Limits(max_seconds=2))

    def test_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And the process is gone, see `no_child_is_left`."""
        path = write(tmp_path, "a.png", valid(".png"))
        monkeypatch.setattr(intake, "CHILD", write(tmp_path, "child.py", b"import time\ntime.sleep(600)"))
        with pytest.raises(InputError, match=r"a\.png .*not decoded within 0.5 s"):
            picture(path, 8, 8, Limits(wall_s=0.5))

    def test_memory(self, tmp_path: Path) -> None:
        """The picture alone takes more."""
        photograph().resize((8000, 8000)).save(tmp_path / "a.jpg")
        assert picture(tmp_path / "a.jpg", 8, 8).shape == (1, 8, 8, 3)
        with pytest.raises(InputError, match=r"a\.jpg .*it needs more than 0.342 GiB of memory"):
            picture(tmp_path / "a.jpg", 8, 8, Limits(memory_bytes=350 * 2**20))


CONFINED = """
import os, resource, socket, sys
from vidkv.intake_child import Task, confine
confine(Task("video", 1, 8, 8, 1, 1.0, 9, 2**30, 4096, os.getppid()))
for attempt in (lambda: open("/etc/passwd"), socket.socket, os.pipe):
    try:
        attempt()
    except OSError as error:
        print(error.strerror)
try:
    bytearray(2**30)
except MemoryError:
    print("no memory")
print(resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_FSIZE))
"""
FOLLOWER = """
import os, sys, time
from vidkv.intake_child import die_with
die_with(int(sys.argv[1]))
print("ready", flush=True)
time.sleep(5)
print("survived", flush=True)
"""
LEADER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep(600)
"""


class TestTheChild:
    def test_can_open_nothing(self) -> None:
        printed = subprocess.check_output([sys.executable, "-c", CONFINED], cwd=ROOT, text=True)
        assert printed.splitlines() == [*["Too many open files"] * 3, "no memory", "(9, 9) (4096, 4096)"]

    def test_lists_lead_nowhere_even_if_taken(self, tmp_path: Path) -> None:
        """Should a demuxer that opens other files be let in, it is not given any."""
        canary = write(tmp_path, "canary.ts", valid(".ts"))
        lines = ("#EXTM3U", "#EXT-X-TARGETDURATION:9", "#EXTINF:9,", f"file://{canary}", "#EXT-X-ENDLIST")
        playlist = "\n".join(lines)
        task = intake_child.Task("video", 1, 8, 8, 10**6, 100.0, 1, 1, 1, 1)
        with pytest.raises(PermissionError, match="it refers to another file"):
            intake_child._opened(io.BytesIO(f"{playlist}\n".encode()), "hls", task)

    def test_ends_with_its_parent(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", LEADER, FOLLOWER], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as leader:
            assert leader.stdout and leader.stdout.readline() == "ready\n"
            leader.kill()
            # the end of the stream: whoever could write to it is gone
            assert leader.stdout.read() == ""

    def test_is_light(self) -> None:
        code = (
            "import sys, runpy; child = runpy.run_path(sys.argv[1]); child['_import']('video');"
            "print(*{name.split('.')[0] for name in sys.modules})"
        )
        printed = subprocess.check_output([sys.executable, "-P", "-c", code, str(intake.CHILD)], text=True)
        assert "av" in printed.split() and not {"torch", "diffusers", "vidkv"} & set(printed.split())

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            (
                "import os; os.kill(os.getpid(), 11)",
                "its decoder ended with SIGSEGV; the limits are 30 s and 2 GiB",
            ),
            ("import os; os.kill(os.getpid(), 9)", "its decoder ended with SIGKILL"),
            ("raise SystemExit('no libraries')", "its decoder ended with status 1, no libraries"),
            ("", "its decoder ended with status 0"),
            ("print('[')", "its decoder ended with status 0"),
            ("print('7')", "its decoder ended with status 0"),
            ("print('{\"frames\": 1}')", "its decoder ended with status 0"),
            ("print('{\"frames\": true}')", "its decoder ended with status 0"),
            ('print(\'{"frames": 2}\' + chr(10) + 384 * "x", end="")', "its decoder ended with status 0"),
            ('print(\'{"frames": 1}\' + chr(10) + 193 * "x", end="")', "its decoder ended with status 0"),
            ('print(\'{"why": "a" , "remedy": "b"}\')', r"cannot be read as an image \(a\); b"),
        ],
    )
    def test_whatever_it_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
    ) -> None:
        monkeypatch.setattr(intake, "CHILD", write(tmp_path, "child.py", code.encode()))
        with pytest.raises(InputError, match=words):
            picture(write(tmp_path, "a.png", valid(".png")), 8, 8)

    def test_a_made_up_child_can_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The refusals above are for what the answers say."""
        code = 'print(\'{"frames": 1}\' + chr(10) + 192 * "x", end="")'
        monkeypatch.setattr(intake, "CHILD", write(tmp_path, "child.py", code.encode()))
        assert (picture(write(tmp_path, "a.png", valid(".png")), 8, 8) == ord("x")).all()

    def test_knows_no_secrets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "secret")
        code = "import os, json; print(json.dumps({'why': ' '.join(os.environ), 'remedy': ''}))"
        monkeypatch.setattr(intake, "CHILD", write(tmp_path, "child.py", code.encode()))
        with pytest.raises(InputError, match="OMP_NUM_THREADS") as caught:
            picture(write(tmp_path, "a.png", valid(".png")), 8, 8)
        assert "TOKEN" not in str(caught.value)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def opened_since(watch: int) -> bool:
    """Whether an inotify descriptor has something to tell."""
    return bool(select.select([watch], [], [], 0)[0])


class TestCorruptMedia:
    COUNT = 40

    def test_refused_or_usable(self, tmp_path: Path, listener: socket.socket) -> None:
        """Nothing else, and nothing is opened or called that a file names."""
        libc = ctypes.CDLL(None)
        watch = libc.inotify_init1(os.O_NONBLOCK)
        in_open = 0x20
        try:
            files = corrupt_media(tmp_path, self.COUNT, 5, "{}:{}".format(*listener.getsockname()))
            found = {}
            for number, path in enumerate(files):
                if not number:
                    assert libc.inotify_add_watch(watch, bytes(tmp_path / "canary.ts"), in_open) > 0
                found[path.name] = try_media(path)
            assert not opened_since(watch)
            (tmp_path / "canary.ts").read_bytes()
            assert opened_since(watch)
        finally:
            os.close(watch)
        assert len(found) == self.COUNT >= len(MAKERS)
        names = tuple(f"-{maker.__name__}." for maker in REFUSED)
        assert not [name for name in found if found[name] == "ok" and any(n in name for n in names)]
        assert "ok" in found.values()
        assert not select.select([listener], [], [], 0)[0]

    def test_the_same_for_the_same_seed(self, tmp_path: Path) -> None:
        once, again, other = (
            [path.read_bytes() for path in corrupt_media(tmp_path, len(MAKERS), seed)] for seed in (1, 1, 2)
        )
        assert once == again != other

    def test_whole_files_are_usable(self, tmp_path: Path) -> None:
        for suffix in PICTURES + VIDEOS:
            assert try_media(write(tmp_path, "a" + suffix, valid(suffix))) == "ok"

    def test_the_bombs_are_whole(self, tmp_path: Path) -> None:
        """A small one of the same make is a picture; only size speaks against them."""
        path = write(tmp_path, "a.png", png(16, 24, zlib.compress(bytes(24 * (1 + 16 // 8))), depth=1))
        assert picture(path, 24, 16).sum() == 0
