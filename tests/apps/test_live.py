"""Pictures, fragments and playlists of videos that are being made, have been made, or have lost files."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.apps.test_api import QUICK, TOKEN, Api, fault, opened
from tests.faults.requests import Answer
from vidkv.apps.live import Held, Listings, Timeline
from vidkv.jobs.run import Progress
from vidkv.jobs.store import Job
from vidkv.request import VideoRequest
from vidkv.segments import SegmentWriter, partial_video, segment_paths, write_video

FPS, SIDE = 16, 64
CHUNKS = (9, 12, 12, 12, 5)
STARTS = (0, 9, 21, 33, 45, 50)
Paint = Callable[[int, int], np.ndarray]


def moving(first: int, count: int) -> np.ndarray:
    """Waves that wander: after its first frame a chunk has no key frame."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    waves = [
        np.stack([(x + 3 * i) / 9, (y - 2 * i) / 7, (x + y + i) / 11], axis=-1)
        for i in range(first, first + count)
    ]
    return np.round(128 + 90 * np.sin(waves)).astype(np.uint8)


def cuts(first: int, count: int) -> np.ndarray:
    """Nothing but cuts: every frame is a key frame."""
    levels = np.random.default_rng(7).integers(30, 220, (100, 1, 1, 3))[first : first + count]
    return np.broadcast_to(levels, (count, SIDE, SIDE, 3)).astype(np.uint8)


class Film:
    """A job that is run by hand.

    Args:
        chunks: frames of each.
    """

    def __init__(
        self, api: Api, id: str = "fox", chunks: tuple[int, ...] = CHUNKS, paint: Paint = moving,
        out: str | None = None,
    ) -> None:  # fmt: skip
        self.api, self.id, self.sizes, self.paint = api, id, chunks, paint
        asked = {
            "prompt": "a red circle bouncing",
            "seconds": sum(chunks) / FPS,
            "id": id,
            "seed": len(id),
            "out": out,
        }
        request = VideoRequest.model_validate(asked)
        assert api.store.submit(request).chunks == len(chunks)
        self.claim = api.run(id)
        self.folder = api.store.folder(self.job)
        self.writer = SegmentWriter(self.folder.segments, FPS, SIDE, SIDE)

    @property
    def job(self) -> Job:
        return self.api.store.get(self.id)

    @property
    def file(self) -> Path:
        return self.api.store.file(self.job)

    def write(self, count: int = 1) -> Film:
        """Segments that nobody has been told of yet."""
        for _ in range(count):
            index = len(self.writer.paths())
            self.writer.write(index, self.paint(self.writer.frames, self.sizes[index]))
        return self

    def report(self) -> Film:
        progress = Progress(
            chunk=len(self.writer.paths()), chunks=len(self.sizes), frames=self.writer.frames, fps=8.0,
            eta_s=1.0, kv_bytes=1, held_bytes=1, rss_bytes=1, drift={}, blank=False,
        )  # fmt: skip
        self.api.store.report(self.id, progress)
        return self

    def make(self, count: int = len(CHUNKS)) -> Film:
        return self.write(count).report()

    def join(self, out: Path | None = None) -> Film:
        write_video(self.writer.paths(), out or self.file, FPS, {"job": self.job.key})
        return self

    def end(self, state: str = "done") -> Film:
        counts = {"frames": self.writer.frames, "chunks": len(self.writer.paths())} if state == "done" else {}
        self.api.store.finish(self.job, {"state": state, "error": "it was to end", **counts})
        self.claim.release()
        return self

    def ask(self, rest: str) -> Answer:
        return self.api.ask("GET", f"/v1/videos/{self.id}/{rest}")

    def get(self, rest: str) -> Answer:
        answer = self.ask(rest)
        assert answer.status == 200, answer.body
        assert answer.headers["cache-control"] == "no-store"
        return answer

    def parts(self) -> list[bytes]:
        """The beginning and every fragment."""
        names = ["init.mp4", *(f"{chunk}.m4s" for chunk in range(self.job.done))]
        return [self.get(f"live/{name}").body for name in names]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with opened(tmp_path / "renders") as api:
        yield api


def decoded(source: Path | bytes) -> list[tuple[Fraction, bytes]]:
    """Times and pictures of a video, as its own coding holds them."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        base = container.streams.video[0].time_base
        assert base is not None
        frames = [(frame.pts * base, frame.to_ndarray().tobytes()) for frame in container.decode(video=0)]
    assert len({picture for _, picture in frames}) > 1 or len(frames) == 1
    return frames


def boxes(data: bytes) -> list[tuple[str, bytes]]:
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8].decode(), data[at : at + length]))
        at += length
    return found


def pixels(answer: Answer) -> np.ndarray:
    assert answer.headers["content-type"] == "image/jpeg"
    return np.asarray(Image.open(io.BytesIO(answer.body))).astype(float)


def whole(film: Film, out: Path) -> list[np.ndarray]:
    """Frames of the video in RGB."""
    film.join(out)
    with av.open(str(out)) as container:
        return [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]


class TestFragments:
    @pytest.mark.parametrize("paint", [moving, cuts])
    @pytest.mark.parametrize("chunks", [CHUNKS, (9, 12), (9, 3), (9,), (5,)], ids=str)
    def test_together_they_are_the_finished_video(
        self, api: Api, tmp_path: Path, chunks: tuple[int, ...], paint: Paint
    ) -> None:
        film = Film(api, chunks=chunks, paint=paint).make(len(chunks))
        wanted = decoded(film.join(tmp_path / "whole.mp4") and tmp_path / "whole.mp4")
        assert len(wanted) == sum(chunks)
        assert decoded(b"".join(film.parts())) == wanted

    @pytest.mark.parametrize("paint", [moving, cuts])
    def test_those_of_the_mp4_are_the_same_bytes(self, api: Api, paint: Paint) -> None:
        film = Film(api, paint=paint).make()
        before = film.parts()
        film.join().end()
        assert not film.folder.segments.exists()
        assert film.parts() == before

    def test_each_stands_at_its_time_and_plays_without_those_before(self, api: Api, tmp_path: Path) -> None:
        film = Film(api).make()
        beginning, *fragments = film.parts()
        wanted = decoded(film.join(tmp_path / "whole.mp4") and tmp_path / "whole.mp4")
        for number, (fragment, begin, end) in enumerate(zip(fragments, STARTS, STARTS[1:], strict=False)):
            assert [kind for kind, _ in boxes(fragment)] == ["moof", "mdat"]
            at = fragment.index(b"tfdt") + 4
            assert (fragment[at], int.from_bytes(fragment[at + 4 : at + 12], "big")) == (1, begin * 1000)
            at = fragment.index(b"mfhd") + 8
            assert int.from_bytes(fragment[at : at + 4], "big") == number + 1
            assert decoded(beginning + fragment) == wanted[begin:end]

    def test_they_can_be_played_while_more_are_made(self, api: Api) -> None:
        film, parts = Film(api), []
        for chunk in range(len(CHUNKS)):
            film.make(1)
            parts = parts or [film.get("live/init.mp4").body]
            parts.append(film.get(f"live/{chunk}.m4s").body)
            assert len(decoded(b"".join(parts))) == STARTS[chunk + 1]
        assert parts == film.parts()

    def test_the_beginning_names_the_codec(self, api: Api) -> None:
        answer = Film(api).make(1).get("live/init.mp4")
        assert [kind for kind, _ in boxes(answer.body)] == ["ftyp", "moov"]
        with av.open(io.BytesIO(answer.body)) as container:
            record = container.streams.video[0].codec_context.extradata
        assert record is not None
        assert answer.headers["content-type"] == f'video/mp4; codecs="avc1.{record[1:4].hex()}"'

    def test_players_are_told_which_frames_are_in_which_chunk(self, api: Api) -> None:
        film = Film(api)
        told = []
        for chunk in range(len(CHUNKS)):
            told.append(film.make(1).get(f"live/{chunk}.m4s").headers["x-timeline"])
        film.join().end()
        told.append(film.get("live/init.mp4").headers["x-timeline"])
        assert told == [
            "first=9, later=9, frames=9, fps=16",
            *(f"first=9, later=12, frames={frames}, fps=16" for frames in (21, 33, 45, 50, 50)),
        ]

    def test_nothing_is_decoded(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        film = Film(api).make()
        monkeypatch.setattr("vidkv.apps.live._picture", lambda *_: pytest.fail("decoded"))
        packets = []
        with av.open(io.BytesIO(b"".join(film.parts()))) as container:
            packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
        film.join()
        with av.open(str(film.file)) as container:
            assert packets == [bytes(packet) for packet in container.demux(video=0) if packet.size]


class TestPictures:
    @pytest.mark.parametrize("paint", [moving, cuts])
    def test_the_newest_by_default(self, api: Api, tmp_path: Path, paint: Paint) -> None:
        film, found = Film(api, paint=paint), []
        for chunk in range(len(CHUNKS)):
            found.append(film.make(1).get("frame"))
            assert found[-1].headers["x-chunk"] == str(chunk)
        frames = whole(film, tmp_path / "whole.mp4")
        for answer, end in zip(found, STARTS[1:], strict=True):
            errors = [np.abs(pixels(answer) - frame).mean() for frame in frames]
            assert int(np.argmin(errors)) == end - 1 and errors[end - 1] < 5, errors

    def test_of_any_chunk_from_segments_and_mp4_alike(self, api: Api) -> None:
        film = Film(api).make()
        before = [film.get(f"frame?chunk={chunk}") for chunk in range(len(CHUNKS))]
        newest = film.get("frame")
        film.join().end()
        after = [film.get(f"frame?chunk={chunk}") for chunk in range(len(CHUNKS))]
        assert [answer.body for answer in after] == [answer.body for answer in before]
        assert [answer.headers["x-chunk"] for answer in after] == ["0", "1", "2", "3", "4"]
        assert film.get("frame").body == newest.body == before[-1].body
        assert len({answer.body for answer in before}) == len(CHUNKS)


class TestPlaylist:
    def test_it_grows_and_ends(self, api: Api) -> None:
        film = Film(api)
        lists = [film.make(1).get("live.m3u8") for _ in CHUNKS]
        assert {answer.headers["content-type"] for answer in lists} == {"application/vnd.apple.mpegurl"}
        texts = [answer.body.decode() for answer in lists]
        for before, after in itertools.pairwise(texts):
            assert after.startswith(before) and "ENDLIST" not in after
        film.join().end()
        assert film.get("live.m3u8").body.decode() == texts[-1] + "#EXT-X-ENDLIST\n"
        lines = texts[-1].splitlines()
        times = [float(line[8:-1]) for line in lines if line.startswith("#EXTINF:")]
        assert times == [frames / FPS for frames in CHUNKS]
        assert [line for line in lines if line[0] != "#"] == [f"live/{chunk}.m4s" for chunk in range(5)]
        assert {"#EXT-X-PLAYLIST-TYPE:EVENT", '#EXT-X-MAP:URI="live/init.mp4"'} <= set(lines)
        assert "#EXT-X-TARGETDURATION:1" in lines and max(times) <= 1

    def test_a_player_that_follows_it_sees_the_video(self, api: Api, tmp_path: Path) -> None:
        film = Film(api).make().join().end()
        for name in ["live.m3u8", "live/init.mp4", *(f"live/{chunk}.m4s" for chunk in range(5))]:
            path = tmp_path / "copy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(film.get(name).body)
        options = {"allowed_extensions": "ALL", "allowed_segment_extensions": "ALL"}
        with av.open(str(tmp_path / "copy" / "live.m3u8"), format="hls", options=options) as container:
            found = [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]
        assert found == [picture for _, picture in decoded(film.file)]


class TestWhatIsNotThere:
    NAMES = ("frame", "live.m3u8", "live/init.mp4", "live/0.m4s")

    @pytest.mark.parametrize("name", NAMES)
    def test_before_the_first_chunk(self, api: Api, name: str) -> None:
        film = Film(api)
        answer = film.ask(name)
        assert answer.status == 404 and fault(answer)["code"] == "no_frames"
        assert "wait for its first chunk" in fault(answer)["message"]
        # a segment is there before the chunk is done
        film.write()
        assert film.ask(name).status == 404
        film.report()
        assert film.ask(name).status == 200

    def test_chunks_that_are_not_reported_are_not_shown(self, api: Api) -> None:
        film = Film(api).make(2).write()
        assert film.get("frame").headers["x-chunk"] == "1"
        assert film.get("live.m3u8").body.count(b"#EXTINF") == 2
        for rest in ("live/2.m4s", "frame?chunk=2"):
            answer = film.ask(rest)
            assert answer.status == 404 and fault(answer)["code"] == "no_chunk"
            assert "it has 2 (0 to 1)" in fault(answer)["message"]

    @pytest.mark.parametrize("id", ["nope", "..", "a%2Fb", "%00", "a" * 300, "%ff", "fox.mp4"])
    def test_unknown_videos(self, api: Api, id: str) -> None:
        Film(api).make(1)
        for name in self.NAMES:
            assert api.ask("GET", f"/v1/videos/{id}/{name}").status == 404

    @pytest.mark.parametrize("chunk", ["-1", "x", "1e9", "9" * 30, "%00", "1.5", ""])
    def test_numbers_that_are_none(self, api: Api, chunk: str) -> None:
        film = Film(api).make(1)
        answers = [film.ask(f"frame?chunk={chunk}"), film.ask(f"live/{chunk}.m4s")]
        assert all(answer.status in (404, 422) for answer in answers)
        assert fault(answers[0])["param"] == "chunk"

    @pytest.mark.parametrize(
        "name", ["live/../../fox.mp4", "live/%2e%2e/job.json", "live/init.m4s", "live/0.ts", "live/"]
    )
    def test_names_that_are_none(self, api: Api, name: str) -> None:
        assert Film(api).make(1).ask(name).status in (404, 422)

    def test_a_segment_that_has_gone(self, api: Api) -> None:
        film = Film(api).make(3)
        film.writer.paths()[2].unlink()
        # what is before it can be shown, and what was behind is being made anew
        assert film.get("frame").headers["x-chunk"] == "1"
        answer = film.ask("live/2.m4s")
        assert answer.status == 404 and fault(answer)["code"] == "no_chunk"

    def test_a_segment_that_goes_while_it_is_asked_for(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        film = Film(api).make(3)
        gone = film.writer.paths()
        gone[1].unlink()
        monkeypatch.setattr(Listings, "paths", lambda *_: gone)
        for rest in ("frame?chunk=1", "live/1.m4s", "live.m3u8"):
            answer = film.ask(rest)
            assert answer.status == 404 and fault(answer)["code"] == "no_file"
            assert str(api.root) not in fault(answer)["message"]

    @pytest.mark.parametrize("content", [b"", b"no video", b"G" * 5000])
    def test_a_segment_that_is_damaged(
        self, api: Api, content: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        film = Film(api).make(4)
        film.writer.paths()[2].write_bytes(content)
        for rest in ("frame?chunk=2", "live/2.m4s"):
            answer = film.ask(rest)
            assert answer.status == 409 and fault(answer)["code"] == "unreadable", answer.body
            assert str(api.root) not in fault(answer)["message"]
        assert film.get("frame").headers["x-chunk"] == "3"
        assert not caplog.records

    def test_a_segment_of_which_the_end_is_missing(self, api: Api) -> None:
        film = Film(api).make(4)
        data = film.writer.paths()[2].read_bytes()
        film.writer.paths()[2].write_bytes(data[: len(data) // 2 // 188 * 188])
        assert film.ask("live/2.m4s").status == 409

    def test_links_are_not_followed(self, api: Api, tmp_path: Path) -> None:
        film = Film(api).make(3)
        path = film.writer.paths()[1]
        os.replace(path, tmp_path / "elsewhere.ts")
        path.symlink_to(tmp_path / "elsewhere.ts")
        assert film.ask("live/1.m4s").status == 404
        film.join(tmp_path / "elsewhere.mp4")
        film.file.symlink_to(tmp_path / "elsewhere.mp4")
        shutil.rmtree(film.folder.segments)
        assert film.ask("frame").status == 404

    def test_a_folder_that_leads_out_of_the_output_folder_is_not_entered(
        self, api: Api, tmp_path: Path
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        (api.root / "a").symlink_to(tmp_path / "elsewhere")
        film = Film(api, out="a/fox.mp4").make().join().end()
        assert film.file.is_file() and film.ask("frame").status == 404
        (api.root / "a").unlink()
        shutil.move(tmp_path / "elsewhere", api.root / "a")
        assert film.ask("frame").status == 200

    def test_a_file_of_another_video_is_not_shown(self, api: Api) -> None:
        film = Film(api).make().join().end()
        other = Film(api, "badger").make().join().end()
        shutil.copyfile(other.file, film.file)
        assert film.ask("frame").status == 404 and other.ask("frame").status == 200

    def test_an_mp4_that_was_coded_anew_is_refused(self, api: Api) -> None:
        film = Film(api).make().join().end()
        comment = av.open(str(film.file)).metadata["comment"]
        with av.open(str(film.file), "w", format="mp4") as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("mpeg4", rate=FPS)
            stream.width = stream.height = SIDE
            for pixels in moving(0, 20):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        answer = film.ask("frame")
        assert answer.status == 409 and fault(answer)["code"] == "unreadable"

    def test_with_a_token_nothing_is_shown_without(self, tmp_path: Path) -> None:
        with opened(tmp_path, QUICK, TOKEN) as api:
            film = Film(api).make(1)
            assert [film.ask(name).status for name in self.NAMES] == [401] * 4


class TestWhenFilesMove:
    def test_a_job_whose_folder_has_just_been_emptied(self, api: Api) -> None:
        film = Film(api).make()
        before = film.parts()
        film.join()
        shutil.rmtree(film.folder.segments)
        assert not film.job.ended
        assert film.parts() == before and b"ENDLIST" not in film.get("live.m3u8").body

    def test_a_cancelled_one_without_its_folder(self, api: Api) -> None:
        film = Film(api).make(3)
        before = film.parts()
        film.join(partial_video(film.file)).end("cancelled")
        assert film.folder.segments.exists() and film.parts() == before
        shutil.rmtree(film.folder.path)
        assert film.parts() == before
        assert film.get("live.m3u8").body.endswith(b"live/2.m4s\n#EXT-X-ENDLIST\n")

    def test_one_that_has_lost_everything(self, api: Api) -> None:
        film = Film(api).make().join().end()
        film.file.unlink()
        answer = film.ask("frame")
        assert answer.status == 404 and "POST the same request" in fault(answer)["message"]

    def test_a_chunk_that_is_made_anew_by_another_worker(self, api: Api, tmp_path: Path) -> None:
        film = Film(api).make(3)
        before = film.get("live/2.m4s").body
        segments = film.folder.segments
        other = SegmentWriter(tmp_path / "other", FPS, SIDE, SIDE, fence=4)
        for chunk in range(3):
            other.write(chunk, cuts(other.frames, CHUNKS[chunk]))
        shutil.copyfile(other.paths()[2], segments / other.paths()[2].name)
        assert segment_paths(segments)[2].name == "seg_00002-4.ts"
        assert film.get("live/2.m4s").body != before

    def test_reading_while_chunks_are_written(self, api: Api) -> None:
        sizes = (9, *[12] * 11)
        film = Film(api, chunks=sizes)
        answers: list[Answer] = []
        done = threading.Event()

        def write() -> None:
            try:
                for _ in sizes:
                    film.make(1)
            finally:
                done.set()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            while not done.is_set():
                answers += [film.ask("frame"), film.ask("live.m3u8")]
        finally:
            thread.join()
        assert film.get("frame").headers["x-chunk"] == "11"
        assert {answer.status for answer in answers} <= {200, 404}
        shown = [int(answer.headers["x-chunk"]) for answer in answers if "x-chunk" in answer.headers]
        assert shown == sorted(shown) and len(set(shown)) > 1


class TestHeld:
    def test_it_stays_small(self) -> None:
        held = Held(most_bytes=100)
        for number in range(50):
            held.get(number % 7, lambda: bytes(30))
            assert held.bytes <= 100
        assert held.get(49 % 7, lambda: pytest.fail("made again")) == bytes(30)

    def test_what_is_too_large_is_made_every_time(self) -> None:
        held, made = Held(most_bytes=10), []

        def make() -> bytes:
            made.append(1)
            return bytes(20)

        assert [held.get("a", make), held.get("a", make)] == [bytes(20)] * 2
        assert len(made) == 2 and held.bytes == 0

    def test_a_failure_is_not_held(self) -> None:
        held = Held()
        with pytest.raises(ValueError, match="no"):
            held.get("a", lambda: exec("raise ValueError('no')"))
        assert held.get("a", lambda: b"x") == b"x"

    def test_listings_are_those_of_the_folder(self, api: Api) -> None:
        film, listings = Film(api), Listings()
        for _ in range(3):
            assert listings.paths(film.folder.segments) == segment_paths(film.folder.segments)
            film.write()
        film.writer.paths()[1].unlink()
        assert listings.paths(film.folder.segments) == film.writer.paths()[:1]
        shutil.rmtree(film.folder.segments)
        assert listings.paths(film.folder.segments) == []

    def test_the_second_to_ask_costs_nothing(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        film = Film(api).make(2)
        first: list[Any] = [film.get(rest).body for rest in ("frame", "live/1.m4s", "live/init.mp4")]
        monkeypatch.setattr("vidkv.apps.live._picture", lambda *_: pytest.fail("decoded again"))
        monkeypatch.setattr("vidkv.apps.live._mp4", lambda *_: pytest.fail("copied again"))
        assert [film.get(rest).body for rest in ("frame", "live/1.m4s", "live/init.mp4")] == first


@pytest.mark.parametrize(
    ("first", "later", "frames"), [(9, 12, 50), (9, 12, 9), (5, 5, 5), (9, 12, 10), (1, 12, 961), (9, 12, 45)]
)
def test_a_timeline_has_every_frame_once(first: int, later: int, frames: int) -> None:
    timeline = Timeline(first, later, frames, FPS)
    spans = [timeline.span(chunk) for chunk in range(timeline.chunks)]
    assert [frame for begin, end in spans for frame in range(begin, end)] == list(range(frames))
    assert all(begin < end for begin, end in spans)
