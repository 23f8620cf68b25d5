"""Segments on disk: frame exact, durable, and the only source of the finished video."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vidkv import files, segments
from vidkv.errors import InputError, OutputError
from vidkv.segments import (
    SegmentWriter,
    check_output,
    claim_folder,
    probe,
    read_metadata,
    rescue_segments,
    segment_paths,
    write_video,
)

ROOT = Path(__file__).resolve().parents[1]
FPS, HEIGHT, WIDTH = 16, 32, 48
CHUNKS = (9, 12, 12, 12, 12, 5)


def coloured(first: int, count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames whose red and green levels together spell their index, far above coding noise."""
    index = np.arange(first, first + count)
    colour = np.stack([40 + 20 * (index % 9), 40 + 20 * (index // 9 % 9), 0 * index + 90], axis=-1)
    return np.broadcast_to(colour[:, None, None, :], (count, height, width, 3)).astype(np.uint8)


def indices(path: Path) -> list[int]:
    """Decode a file and read the index of every frame back from its mean colour."""
    with av.open(str(path)) as container:
        means = [f.to_ndarray(format="rgb24").mean(axis=(0, 1)) for f in container.decode(video=0)]
    return [round((red - 40) / 20) + 9 * round((green - 40) / 20) for red, green, _ in means]


def written(folder: Path, chunks: tuple[int, ...] = CHUNKS, fps: int = FPS) -> SegmentWriter:
    writer = SegmentWriter(folder, fps, HEIGHT, WIDTH)
    for index, count in enumerate(chunks):
        writer.write(index, coloured(writer.frames, count))
    return writer


def boxes(path: Path) -> list[bytes]:
    data, position, kinds = path.read_bytes(), 0, []
    while position < len(data):
        kinds.append(data[position + 4 : position + 8])
        position += int.from_bytes(data[position : position + 4], "big")
    assert position == len(data)
    return kinds


class TestFrameExactness:
    @pytest.mark.parametrize("chunks", [CHUNKS, (1,), (1, 1, 1), (9,), (81,)], ids=str)
    @pytest.mark.parametrize("fps", [1, 16, 24, 30])
    def test_video_holds_every_frame_once_in_order(
        self, tmp_path: Path, chunks: tuple[int, ...], fps: int
    ) -> None:
        writer = written(tmp_path / "s", chunks, fps)
        out, total = tmp_path / "o.mp4", sum(chunks)
        info = write_video(writer.paths(), out, fps, {})
        assert indices(out) == list(range(total))
        assert (info.frames, info.width, info.height) == (total, WIDTH, HEIGHT)
        assert info.fps == fps
        assert info.seconds == pytest.approx(total / fps, abs=1e-9)
        assert info.size_bytes == out.stat().st_size
        assert probe(out) == info

    def test_players_are_told_a_constant_rate_from_zero(self, tmp_path: Path) -> None:
        out = tmp_path / "o.mp4"
        write_video(written(tmp_path / "s").paths(), out, FPS, {})
        with av.open(str(out)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert stream.average_rate == stream.base_rate == FPS
            assert stream.frames == len(frames) == sum(CHUNKS)
            assert stream.duration * stream.time_base == pytest.approx(sum(CHUNKS) / FPS)
            assert container.duration == pytest.approx(sum(CHUNKS) / FPS * av.time_base, abs=1)
            assert [f.pts * stream.time_base * FPS for f in frames] == list(range(sum(CHUNKS)))
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert stream.codec_context.name == "h264"

    def test_segments_are_closed_and_have_no_reordered_frames(self, tmp_path: Path) -> None:
        for path, count in zip(written(tmp_path).paths(), CHUNKS, strict=True):
            with av.open(str(path)) as container:
                packets = [p for p in container.demux(video=0) if p.size]
            assert len(packets) == count
            assert packets[0].is_keyframe
            assert all(p.pts == p.dts for p in packets)

    def test_scene_cuts_inside_a_segment_cost_no_frame(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (40, HEIGHT, WIDTH, 3), dtype=np.uint8)
        noise[::5] = 0
        writer = SegmentWriter(tmp_path / "s", FPS, HEIGHT, WIDTH)
        writer.write(0, noise)
        info = write_video(writer.paths(), tmp_path / "o.mp4", FPS, {})
        assert info.frames == probe(tmp_path / "o.mp4").frames == 40

    def test_concatenated_bytes_play_on_one_time_line(self, tmp_path: Path) -> None:
        joined = tmp_path / "joined.ts"
        joined.write_bytes(b"".join(p.read_bytes() for p in written(tmp_path / "s").paths()))
        with av.open(str(joined)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
            assert not any(p.is_corrupt for p in packets)
            times = [p.pts * p.time_base * FPS for p in packets]
        assert times == list(range(sum(CHUNKS)))
        assert indices(joined) == list(range(sum(CHUNKS)))

    def test_colours_survive(self, tmp_path: Path) -> None:
        writer = SegmentWriter(tmp_path, FPS, HEIGHT, WIDTH)
        colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]])
        frames = np.broadcast_to(colours[:, None, None], (5, HEIGHT, WIDTH, 3)).astype(np.uint8)
        path = writer.write(0, frames)
        with av.open(str(path)) as container:
            decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        assert np.abs(decoded.astype(int) - frames).max() <= 4

    def test_same_frames_give_same_bytes(self, tmp_path: Path) -> None:
        first, second = written(tmp_path / "a"), written(tmp_path / "b")
        for one, other in zip(first.paths(), second.paths(), strict=True):
            assert one.read_bytes() == other.read_bytes()

    def test_max_frames_trims_the_last_chunk(self, tmp_path: Path) -> None:
        paths, out = written(tmp_path / "s").paths(), tmp_path / "o.mp4"
        assert write_video(paths, out, FPS, {}, max_frames=40).frames == 40
        assert indices(out) == list(range(40))

    def test_tensors_and_strided_arrays_are_taken(self, tmp_path: Path) -> None:
        writer = SegmentWriter(tmp_path, FPS, HEIGHT, WIDTH)
        planar = torch.from_numpy(coloured(0, 4).transpose(0, 3, 1, 2).copy())
        writer.write(0, planar.permute(0, 2, 3, 1))
        writer.write(1, coloured(4, 8)[::2])
        assert [indices(p) for p in writer.paths()] == [[0, 1, 2, 3], [4, 6, 8, 10]]


class TestFile:
    def test_index_stands_before_the_pictures(self, tmp_path: Path) -> None:
        out = tmp_path / "o.mp4"
        write_video(written(tmp_path / "s").paths(), out, FPS, {})
        kinds = boxes(out)
        assert kinds.index(b"moov") < kinds.index(b"mdat")

    @pytest.mark.parametrize(
        "metadata",
        [
            {},
            {"prompt": "ein Würfel, 红色的圆, 🎈", "kv_format": "int8"},
            {"quotes": "\"'\\", "lines": "a\nb\x00c", "nested": {"window_frames": 21}},
            {"long": "é" * 50_000},
        ],
        ids=["empty", "scripts", "escapes", "long"],
    )
    def test_metadata_round_trip(self, tmp_path: Path, metadata: dict[str, object]) -> None:
        out = tmp_path / "o.mp4"
        write_video(written(tmp_path / "s", (9,)).paths(), out, FPS, metadata)
        assert read_metadata(out) == metadata
        with av.open(str(out)) as container:
            assert json.loads(container.metadata["comment"]) == metadata

    def test_half_a_surrogate_pair_does_not_lose_the_video(self, tmp_path: Path) -> None:
        out = tmp_path / "o.mp4"
        write_video(written(tmp_path / "s", (9,)).paths(), out, FPS, {"prompt": "a\udce9b"})
        assert read_metadata(out) == {"prompt": "a?b"}

    def test_metadata_of_a_foreign_file_is_empty(self, tmp_path: Path) -> None:
        assert read_metadata(written(tmp_path, (9,)).paths()[0]) == {}

    @pytest.mark.parametrize("read", [probe, read_metadata])
    def test_reading_what_is_no_video(self, tmp_path: Path, read: Callable[[Path], object]) -> None:
        text = tmp_path / "text.mp4"
        text.write_text("no video")
        for path in (text, tmp_path / "absent.mp4", tmp_path):
            with pytest.raises(InputError, match=str(path)):
                read(path)

    def test_probe_counts_what_decodes(self, tmp_path: Path) -> None:
        path = written(tmp_path, (12,)).paths()[0]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert 0 < probe(path).frames < 12

    def test_names_with_a_colon_and_percent_are_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        writer = written(Path("take:1 %03d"), (9,))
        write_video(writer.paths(), Path("http:é%d.mp4"), FPS, {})
        assert probe(Path("http:é%d.mp4")).frames == 9

    def test_existing_file_is_replaced_and_mode_follows_umask(self, tmp_path: Path) -> None:
        out = tmp_path / "o.mp4"
        out.write_text("old")
        write_video(written(tmp_path / "s", (9,)).paths(), out, FPS, {})
        fresh = tmp_path / "fresh"
        fresh.touch()
        assert probe(out).frames == 9
        assert out.stat().st_mode == fresh.stat().st_mode


class TestFolder:
    def test_a_new_writer_continues(self, tmp_path: Path) -> None:
        written(tmp_path, (9, 12))
        writer = SegmentWriter(tmp_path, FPS, HEIGHT, WIDTH)
        assert (len(writer.paths()), writer.frames) == (2, 21)
        writer.write(2, coloured(21, 12))
        out = tmp_path / "o.mp4"
        write_video(writer.paths(), out, FPS, {})
        assert indices(out) == list(range(33))

    @pytest.mark.parametrize("fps", [1, 16, 24, 30])
    def test_tiny_black_segments_are_recognised_again(self, tmp_path: Path, fps: int) -> None:
        """FFmpeg overlooks a file of eight packets, and doubles the rate of a single frame."""
        writer = SegmentWriter(tmp_path / "s", fps, HEIGHT, WIDTH)
        for index, count in enumerate((1, 2, 3)):
            writer.write(index, np.zeros((count, HEIGHT, WIDTH, 3), dtype=np.uint8))
        assert SegmentWriter(tmp_path / "s", fps, HEIGHT, WIDTH).frames == 6
        assert [(probe(p).frames, probe(p).fps) for p in writer.paths()] == [
            (1, fps),
            (2, fps),
            (3, fps),
        ]
        assert write_video(writer.paths(), tmp_path / "o.mp4", fps, {}).frames == 6
        assert probe(tmp_path / "o.mp4").fps == fps

    def test_dropping_rewinds(self, tmp_path: Path) -> None:
        writer = written(tmp_path)
        writer.drop_from(2)
        assert [p.name for p in segment_paths(tmp_path)] == ["seg_00000.ts", "seg_00001.ts"]
        assert writer.frames == 21
        writer.write(2, coloured(21, 4))
        assert [i for p in writer.paths() for i in indices(p)] == list(range(25))
        writer.drop_from(0)
        assert writer.paths() == list(tmp_path.iterdir()) == []

    def test_dropping_behind_the_end_removes_only_leftovers(self, tmp_path: Path) -> None:
        writer = written(tmp_path, (9, 12))
        (tmp_path / ".seg_00002.ts.tmp").write_bytes(b"half")
        (tmp_path / "state.json").write_text("{}")
        writer.drop_from(2)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "seg_00000.ts",
            "seg_00001.ts",
            "state.json",
        ]
        with pytest.raises(InputError, match="-1"):
            writer.drop_from(-1)

    def test_what_stands_behind_a_gap_never_comes_back(self, tmp_path: Path) -> None:
        written(tmp_path)
        (tmp_path / "seg_00002.ts").unlink()
        writer = SegmentWriter(tmp_path, FPS, HEIGHT, WIDTH)
        assert writer.paths() == segment_paths(tmp_path)
        assert writer.frames == 21
        writer.write(2, coloured(60, 12))
        assert writer.paths() == segment_paths(tmp_path)
        assert [i for p in writer.paths() for i in indices(p)] == [*range(21), *range(60, 72)]

    def test_an_unreadable_segment_is_a_gap(self, tmp_path: Path) -> None:
        written(tmp_path, (9, 12, 12))
        (tmp_path / "seg_00001.ts").write_bytes(b"\0" * 1000)
        writer = SegmentWriter(tmp_path, FPS, HEIGHT, WIDTH)
        assert [p.name for p in writer.paths()] == ["seg_00000.ts"]
        with pytest.raises(OutputError, match=r"seg_00001\.ts"):
            write_video(segment_paths(tmp_path), tmp_path / "o.mp4", FPS, {})
        assert not list(tmp_path.glob("*o.mp4*")) and not list(tmp_path.glob(".vidkv*"))

    @pytest.mark.parametrize("index", [-1, 1, 7])
    def test_chunks_come_in_order(self, tmp_path: Path, index: int) -> None:
        with pytest.raises(InputError, match=f"segment {index} is out of order"):
            SegmentWriter(tmp_path, FPS, HEIGHT, WIDTH).write(index, coloured(0, 9))

    def test_a_folder_of_another_size_or_rate_is_refused(self, tmp_path: Path) -> None:
        written(tmp_path, (9,))
        with pytest.raises(InputError, match="48x32 at 16 fps"):
            SegmentWriter(tmp_path, FPS, HEIGHT * 2, WIDTH)
        with pytest.raises(InputError, match="48x32 at 16 fps"):
            SegmentWriter(tmp_path, FPS + 1, HEIGHT, WIDTH)

    def test_segments_of_two_sizes_are_not_joined(self, tmp_path: Path) -> None:
        other = SegmentWriter(tmp_path / "other", FPS, HEIGHT * 2, WIDTH)
        other.write(0, coloured(0, 9, HEIGHT * 2))
        with pytest.raises(OutputError, match="48x64"):
            write_video(
                [*written(tmp_path / "s", (9,)).paths(), *other.paths()],
                tmp_path / "o.mp4",
                FPS,
                {},
            )


class TestClaim:
    def test_made_and_removed_with_its_leftovers_kept(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        with claim_folder(folder):
            writer = written(folder, (9,))
        assert list(folder.iterdir()) == writer.paths()
        with claim_folder(folder):
            writer.drop_from(0)
        assert list(tmp_path.iterdir()) == []

    def test_one_at_a_time(self, tmp_path: Path) -> None:
        with claim_folder(tmp_path / "s"):
            with pytest.raises(OutputError, match=r"another run is writing its segments to .*/s;"):
                claim_folder(tmp_path / "s").__enter__()
            with claim_folder(tmp_path / "t"):
                pass
        with claim_folder(tmp_path / "s"):
            pass

    def test_a_lock_file_deleted_by_the_run_before_is_no_lock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def late(descriptor: int, operation: int) -> None:
            (tmp_path / segments._LOCK_NAME).unlink()

        monkeypatch.setattr(segments.fcntl, "flock", late)
        with pytest.raises(OutputError, match="another run"):
            claim_folder(tmp_path).__enter__()

    def test_a_killed_run_holds_nothing(self, tmp_path: Path) -> None:
        with _python(
            """
            import sys, time
            from pathlib import Path
            from vidkv.segments import claim_folder
            with claim_folder(Path(sys.argv[1]) / "s"):
                print("held", flush=True)
                time.sleep(30)
            """,
            tmp_path,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with pytest.raises(OutputError, match="another run"):
                claim_folder(tmp_path / "s").__enter__()
            process.kill()
        with claim_folder(tmp_path / "s"):
            pass
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "name", ["notes.txt", "seg_1.ts", "seg_00000.ts.bak", ".hidden", "seg_00000.ts/x"]
    )
    def test_what_is_not_a_segment_is_refused_and_stays(self, tmp_path: Path, name: str) -> None:
        foreign = tmp_path / "s" / name
        foreign.parent.mkdir(parents=True)
        foreign.write_text("mine")
        with pytest.raises(OutputError, match="which vidkv did not write; move it away"):
            claim_folder(tmp_path / "s").__enter__()
        assert foreign.read_text() == "mine"
        assert not (tmp_path / "s" / segments._LOCK_NAME).exists()

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "s"):
            with pytest.raises(OutputError, match="cannot create or use the segment folder"):
                claim_folder(folder).__enter__()


class TestRescue:
    def test_nothing_to_rescue(self, tmp_path: Path) -> None:
        (tmp_path / ".seg_00000.ts.tmp").touch()
        assert rescue_segments(tmp_path, tmp_path / "o.mp4") is None
        assert list(tmp_path.iterdir()) == []

    def test_earlier_rescues_stay(self, tmp_path: Path) -> None:
        names = []
        for _ in range(3):
            written(tmp_path / "s", (9, 12))
            names.append(rescue_segments(tmp_path / "s", tmp_path / "o.mp4"))
        assert names == [tmp_path / f"o.recovered{number}.mp4" for number in ("", 1, 2)]
        assert [probe(path).frames for path in names if path] == [21] * 3

    @pytest.mark.parametrize("bad", [0, 1])
    @pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"G" * 188 * 4], ids=["empty", "zeros", "syncs"])
    def test_what_stands_before_an_unreadable_one(self, tmp_path: Path, bad: int, content: bytes) -> None:
        written(tmp_path / "s", (9, 12, 12)).paths()[bad].write_bytes(content)
        made = rescue_segments(tmp_path / "s", tmp_path / "o.mp4")
        assert (indices(made) if made else []) == list(range(9 * bad))
        assert list((tmp_path / "s").iterdir()) == []

    def test_another_size_ends_it(self, tmp_path: Path) -> None:
        large = SegmentWriter(tmp_path / "large", FPS, HEIGHT * 2, WIDTH)
        writer = written(tmp_path / "s", (9, 12))
        writer.paths()[1].write_bytes(large.write(0, coloured(0, 9, HEIGHT * 2)).read_bytes())
        made = rescue_segments(tmp_path / "s", tmp_path / "o.mp4")
        assert made and probe(made).frames == 9

    def test_segments_stay_where_the_video_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = written(tmp_path / "s", (9, 12)).paths()
        monkeypatch.setattr(segments.os, "replace", _raise(errno.ENOSPC))
        with pytest.raises(OutputError, match="are kept"):
            rescue_segments(tmp_path / "s", tmp_path / "o.mp4")
        assert sorted((tmp_path / "s").iterdir()) == paths


class TestArguments:
    @pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47), (0, 48), (32, -2)])
    def test_odd_and_empty_sizes(self, tmp_path: Path, height: int, width: int) -> None:
        with pytest.raises(InputError, match="must be even and positive"):
            SegmentWriter(tmp_path, FPS, height, width)

    def test_rate(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="fps=0"):
            SegmentWriter(tmp_path, 0, HEIGHT, WIDTH)

    @pytest.mark.parametrize(
        "frames",
        [
            coloured(0, 2).astype(np.float32),
            coloured(0, 2, HEIGHT * 2),
            coloured(0, 2)[0],
            coloured(0, 2)[..., :2],
            coloured(0, 2)[:0],
            torch.zeros(2, 3, HEIGHT, WIDTH, dtype=torch.uint8),
        ],
        ids=["dtype", "size", "rank", "channels", "empty", "planar"],
    )
    def test_frames(self, tmp_path: Path, frames: segments.Frames) -> None:
        with pytest.raises(InputError, match="frames must"):
            SegmentWriter(tmp_path, FPS, HEIGHT, WIDTH).write(0, frames)
        assert not list(tmp_path.iterdir())

    def test_nothing_to_join(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no segments"):
            write_video([], tmp_path / "o.mp4", FPS, {})
        with pytest.raises(InputError, match="max_frames=0"):
            write_video([tmp_path / "seg_00000.ts"], tmp_path / "o.mp4", FPS, {}, max_frames=0)


def _raise(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


class TestFailures:
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
    def test_failed_segment_leaves_the_earlier_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
    ) -> None:
        writer = written(tmp_path, (9, 12))
        with monkeypatch.context() as patch:
            patch.setattr(segments.os, call, _raise(code))
            with pytest.raises(OutputError, match=r"seg_00002\.ts.*2 segments before it are kept"):
                writer.write(2, coloured(21, 12))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["seg_00000.ts", "seg_00001.ts"]
        writer.write(2, coloured(21, 12))
        assert [i for p in writer.paths() for i in indices(p)] == list(range(33))

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_failed_video_leaves_the_old_one_and_the_segments(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        writer, out = written(tmp_path / "s"), tmp_path / "o.mp4"
        out.write_text("old")
        with monkeypatch.context() as patch:
            patch.setattr(segments.os, call, _raise(errno.ENOSPC))
            with pytest.raises(OutputError, match=r"No space left.*segments in .*/s are kept"):
                write_video(writer.paths(), out, FPS, {})
        assert out.read_text() == "old"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["o.mp4", "s"]
        assert write_video(writer.paths(), out, FPS, {}).frames == sum(CHUNKS)

    def test_interrupt_while_joining_leaves_nothing_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        paths = written(tmp_path / "s").paths()
        monkeypatch.setattr(segments.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_video(paths, tmp_path / "o.mp4", FPS, {})
        assert [p.name for p in tmp_path.iterdir()] == ["s"]

    def test_a_file_cut_short_by_the_last_flush_is_noticed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remux = segments._remux

        def cut(paths: list[Path], out: Path, *rest: object) -> int:
            frames = remux(paths, out, *rest)  # type: ignore[arg-type]
            os.truncate(out, out.stat().st_size - 10)
            return frames

        monkeypatch.setattr(segments, "_remux", cut)
        with pytest.raises(OutputError, match="cut short"):
            write_video(written(tmp_path / "s").paths(), tmp_path / "o.mp4", FPS, {})
        assert not (tmp_path / "o.mp4").exists()

    def test_folder_sync_unsupported_by_the_file_system(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sync = files._fsync

        def no_folders(path: Path, flags: int) -> None:
            if path.is_dir():
                raise OSError(errno.EINVAL, "Invalid argument")
            sync(path, flags)

        monkeypatch.setattr(files, "_fsync", no_folders)
        assert probe(written(tmp_path, (9,)).paths()[0]).frames == 9

    def test_killed_writer_leaves_whole_segments(self, tmp_path: Path) -> None:
        with _python(
            """
            import itertools, sys
            from pathlib import Path
            import numpy as np
            from vidkv.segments import SegmentWriter
            writer = SegmentWriter(Path(sys.argv[1]), 16, 256, 256)
            noise = np.random.default_rng(0).integers(0, 255, (12, 256, 256, 3), dtype=np.uint8)
            for index in itertools.count():
                print(writer.write(index, noise), flush=True)
            """,
            tmp_path,
        ) as process:
            assert process.stdout is not None
            for _ in range(3):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        paths = segment_paths(tmp_path)
        assert len(paths) >= 3
        assert [probe(p).frames for p in paths] == [12] * len(paths)
        SegmentWriter(tmp_path, FPS, 256, 256).drop_from(len(paths))
        assert sorted(tmp_path.iterdir()) == paths

    def test_full_disk(self, tmp_path: Path) -> None:
        """A limit on file size makes the kernel refuse writes, in Python's and FFmpeg's code."""
        with _python(
            """
            import resource, sys
            from pathlib import Path
            import numpy as np
            from vidkv.errors import OutputError
            from vidkv.segments import SegmentWriter, write_video
            folder, out = Path(sys.argv[1]) / "s", Path(sys.argv[1]) / "o.mp4"
            noise = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
            writer = SegmentWriter(folder, 16, 64, 64)
            sizes = [writer.write(i, noise).stat().st_size for i in range(3)]
            size = write_video(writer.paths(), out, 16, {}).size_bytes
            out.unlink()
            cuts = [size - 1, size - 1000, size // 2, 1000, 1]
            for limit in (*cuts, sizes[0] - 1):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    if limit in cuts:
                        write_video(writer.paths(), out, 16, {})
                    else:
                        writer.write(3, noise)
                except OutputError as error:
                    print(error)
            """,
            tmp_path,
        ) as process:
            output, _ = process.communicate(timeout=60)
        lines = output.splitlines()
        assert len(lines) == 6, output
        assert all("are kept" in line and "File too large" in line for line in lines), output
        assert [p.name for p in tmp_path.iterdir()] == ["s"]
        assert [probe(p).frames for p in segment_paths(tmp_path / "s")] == [12] * 3
        assert len(list((tmp_path / "s").iterdir())) == 3


class TestOutputCheck:
    def test_accepts_what_will_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for out in (tmp_path / "new.mp4", Path("bare.mp4"), tmp_path / "UPPER.MP4"):
            check_output(out)
        (tmp_path / "old.mp4").write_text("old")
        check_output(tmp_path / "old.mp4")
        assert [p.name for p in tmp_path.iterdir()] == ["old.mp4"]

    @pytest.mark.parametrize("name", ["o", "o.avi", "o.mp4.txt", ".mp4"])
    def test_suffix(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match=r"must end in \.mp4"):
            check_output(tmp_path / name)

    def test_folders(self, tmp_path: Path) -> None:
        (tmp_path / "folder.mp4").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="is a folder"):
            check_output(tmp_path / "folder.mp4")
        with pytest.raises(OutputError, match="does not exist"):
            check_output(tmp_path / "absent" / "o.mp4")
        with pytest.raises(OutputError, match="is not a folder"):
            check_output(tmp_path / "file" / "o.mp4")

    @pytest.mark.parametrize(
        "name", ["n" * 300 + ".mp4", "n" * 242 + ".mp4", "a\0b.mp4"], ids=["long", "long beside", "nul"]
    )
    def test_impossible_names(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(OutputError, match="choose another"):
            check_output(tmp_path / name)

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
    def test_unwritable_folder(self) -> None:
        with pytest.raises(OutputError, match=r"cannot write '/proc/o\.mp4'"):
            check_output(Path("/proc/o.mp4"))

    def test_little_space(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match=r"\d+ MiB free, \d+ MiB are needed"):
            check_output(tmp_path / "o.mp4", need_bytes=2**80)

    def test_segment_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "s"):
            with pytest.raises(OutputError, match="cannot create the segment folder"):
                SegmentWriter(folder, FPS, HEIGHT, WIDTH)


def test_importing_segments_does_not_load_av() -> None:
    code = "import sys, vidkv.segments; sys.exit('av' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def _python(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
