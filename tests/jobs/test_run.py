"""One job from wherever it stands to its end: nothing lost, nothing twice, and bit for bit the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import HEIGHT, WIDTH, build_pipeline
from vidkv.errors import Cancelled, NumericsError, OutputError, StateError
from vidkv.jobs import run
from vidkv.jobs.checkpoints import Checkpoints, Interval
from vidkv.jobs.claims import Claims, Fenced
from vidkv.jobs.folder import JobFolder
from vidkv.jobs.records import Records
from vidkv.jobs.run import Interrupted, Options, Progress, Runner
from vidkv.jobs.store import JobStore
from vidkv.pipeline import CausalVideoPipeline
from vidkv.request import EngineSettings, VideoRequest
from vidkv.rollout import Rollout
from vidkv.segments import SegmentWriter, probe, read_metadata, segment_paths

PROMPT, OTHER = "a red circle bouncing", "a blue square resting"
CHUNKS = 7
SECONDS = (12 * CHUNKS - 5) / 16
FRAMES = 12 * CHUNKS - 5
OFTEN = Options(interval=Interval(every_s=1e-9, share=1.0, bytes_per_s=1e12))
SELDOM = Options(interval=Interval(every_s=1e9))
LIGHT = Options(resume="light")


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture and a video to start from."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (21, HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise[0]).save(folder / "start.png")
    writer = SegmentWriter(folder / "segments", 16, HEIGHT, WIDTH)
    run.write_video([writer.write(0, noise)], folder / "start.mp4", 16, {})
    return folder


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"cache": "int8,window=9,sink=2,keep_newest"},
    "recache": {"schedule": [[1.3, OTHER]], "switch": "recache"},
    "lerp": {"schedule": [[1.3, OTHER]], "switch": "lerp"},
    "stock noise": {"noise": "stock"},
    "image": {"image": "start.png"},
    "video": {"video": "start.mp4"},
}


class Bench:
    """Jobs of the tiny model in a folder of their own; runners share its networks."""

    def __init__(self, root: Path, model: str, pictures: Path) -> None:
        self.root, self.model, self.pictures = root, model, pictures
        self.store = JobStore(root)
        self.pipe: tuple[Any, CausalVideoPipeline] | None = None

    def submit(self, id: str = "job", **request: Any) -> JobFolder:
        for name in {"image", "video"} & set(request):
            request[name] = self.pictures / request[name]
        values = {"cache": "fp32,window=9,sink=2", "seconds": SECONDS, "height": HEIGHT, "width": WIDTH}
        whole = VideoRequest.of(values | {"id": id, "prompt": PROMPT, "model": self.model} | request)
        return self.store.folder(self.store.submit(whole, EngineSettings(device="cpu")))

    def run(
        self,
        folder: JobFolder,
        options: Options = OFTEN,
        report: Callable[[Progress], None] = lambda progress: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        runner = Runner(options, stopping)
        runner._loaded = self.pipe
        claim = Claims().take(folder.path)
        assert claim is not None
        try:
            return runner.run(folder, claim, self.root, report)
        finally:
            self.pipe = runner._loaded
            # as if the process had died: the kernel would say so
            claim.release()

    def kill(self, folder: JobFolder, after: int, options: Options = OFTEN) -> list[int]:
        """Run until `after` chunks are done; returns the chunks that were made."""
        made: list[int] = []

        def report(progress: Progress) -> None:
            made.append(progress.chunk - 1)
            if progress.chunk == after:
                raise Killed

        with pytest.raises(Killed):
            self.run(folder, options, report)
        return made


@pytest.fixture(scope="module")
def wholes(
    model: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Results and pictures of uninterrupted runs."""
    bench = Bench(tmp_path_factory.mktemp("whole"), model, pictures)
    found = {}
    for case, request in CASES.items():
        result = bench.run(bench.submit(case.replace(" ", "-"), **request), SELDOM)
        found[case] = result, decoded(Path(result["out"]))
    return found


@pytest.fixture
def bench(tmp_path: Path, model: str, pictures: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "renders", model, pictures)
    yield bench
    bench.store.close()


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def same(result: dict[str, Any], whole: tuple[dict[str, Any], np.ndarray]) -> None:
    wanted, pixels = whole
    assert result["latents_sha256"] == wanted["latents_sha256"]
    assert result["frames"] == wanted["frames"] == FRAMES
    assert np.array_equal(decoded(Path(result["out"])), pixels)


class TestWhole:
    def test_finished_under_its_name_alone(
        self, bench: Bench, wholes: dict[str, tuple[dict[str, Any], np.ndarray]]
    ) -> None:
        folder = bench.submit()
        seen: list[bool] = []
        result = bench.run(folder, report=lambda progress: seen.append((bench.root / "job.mp4").exists()))
        assert seen == [False] * CHUNKS
        video = probe(bench.root / "job.mp4")
        assert (video.frames, video.width, video.height, video.fps) == (FRAMES, WIDTH, HEIGHT, 16)
        same(result, wholes["plain"])
        metadata = read_metadata(bench.root / "job.mp4")
        assert metadata["job"] == bench.store.get("job").key and "partial" not in metadata

    def test_progress_counts(self, bench: Bench) -> None:
        seen: list[Progress] = []
        bench.run(bench.submit(), report=seen.append)
        assert [progress.chunk for progress in seen] == [1, 2, 3, 4, 5, 6, 7]
        assert [progress.frames for progress in seen] == [9, 21, 33, 45, 57, 69, 79]
        assert {progress.chunks for progress in seen} == {CHUNKS}
        assert seen[0].drift == {"luma": 0, "saturation": 0, "contrast": 0}
        assert seen[-1].eta_s == 0 and seen[-1].fps > 0 and seen[-1].kv_bytes > 0

    def test_networks_stay_loaded(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        bench.run(bench.submit("a"))
        monkeypatch.setattr(run, "load_pipeline", None)
        bench.run(bench.submit("b", seed=1))

    def test_what_is_warm_is_not_loaded_for_the_first_job(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = bench.submit()
        request, settings = folder.request()
        runner = Runner()
        runner.warm_up(VideoRequest(prompt=PROMPT, model="/nowhere"), settings)
        assert not runner.has_loaded(bench.model, {"device": "cpu"})
        runner.warm_up(request, settings)
        assert runner.has_loaded(bench.model, {"device": "cpu"})
        bench.pipe = runner._loaded
        monkeypatch.setattr(run, "load_pipeline", None)
        assert bench.run(folder)["resumed_at"] is None

    def test_a_file_of_the_same_name_is_not_replaced(self, bench: Bench) -> None:
        folder = bench.submit()
        (bench.root / "job.mp4").write_bytes(b"somebody's")
        with pytest.raises(OutputError, match="is another video"):
            bench.run(folder)
        assert (bench.root / "job.mp4").read_bytes() == b"somebody's"
        (bench.root / "job.mp4").unlink()
        # all chunks were there, only the file was not
        assert bench.run(folder)["resumed_at"] == CHUNKS

    def test_a_file_below_the_folder(self, bench: Bench) -> None:
        result = bench.run(bench.submit(out="a/b/c.mp4"))
        assert result["out"] == str(bench.root / "a/b/c.mp4") and probe(Path(result["out"])).frames == FRAMES


class TestKilled:
    @pytest.mark.parametrize("options", [OFTEN, SELDOM], ids=["checkpoints", "records alone"])
    @pytest.mark.parametrize("case", CASES)
    def test_goes_on_bit_for_bit(
        self, bench: Bench, wholes: dict[str, tuple[dict[str, Any], np.ndarray]], case: str, options: Options
    ) -> None:
        folder = bench.submit(**CASES[case])
        made = bench.kill(folder, 2, options) + bench.kill(folder, 5, options)
        seen: list[int] = []
        result = bench.run(folder, options, lambda progress: seen.append(progress.chunk - 1))
        same(result, wholes[case])
        # no chunk was made a second time; a picture is a chunk of its own
        assert made + seen == list(range(CHUNKS + (case == "image")))
        assert result["resumed_at"] == 5 and result["note"] is None

    def test_a_checkpoint_saves_the_way_there(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = bench.submit()
        bench.kill(folder, 5)
        retraced: list[int] = []
        retrace = Rollout.retrace

        def counted(self: Rollout, latents: torch.Tensor) -> Any:
            retraced.append(self.chunk)
            return retrace(self, latents)

        monkeypatch.setattr(Rollout, "retrace", counted)
        bench.kill(folder, 6)
        # the last report came before its checkpoint
        assert retraced == [4]

    @pytest.mark.parametrize("step", ["write", "add", "publish"])
    def test_between_segment_and_record(
        self,
        bench: Bench,
        wholes: dict[str, tuple[dict[str, Any], np.ndarray]],
        monkeypatch: pytest.MonkeyPatch,
        step: str,
    ) -> None:
        """Killed just before a segment is written, before its record is, and before the file is joined."""
        folder = bench.submit()
        owner, name = {
            "write": (SegmentWriter, "write"), "add": (Records, "add"), "publish": (run, "write_video"),
        }[step]  # fmt: skip
        original, calls = getattr(owner, name), 0

        def killed(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if step == "publish" or calls == 4:
                raise Killed
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            bench.run(folder)
        assert not (bench.root / "job.mp4").exists()
        monkeypatch.setattr(owner, name, original)
        result = bench.run(folder)
        same(result, wholes["plain"])
        assert result["resumed_at"] == (CHUNKS if step == "publish" else 3)

    def test_after_the_file_was_joined(
        self,
        bench: Bench,
        wholes: dict[str, tuple[dict[str, Any], np.ndarray]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = bench.submit()
        bench.run(folder)
        # its result was not written; the segments are still there
        written = (bench.root / "job.mp4").stat().st_mtime_ns
        monkeypatch.setattr(run, "write_video", None)
        same(bench.run(folder), wholes["plain"])
        assert (bench.root / "job.mp4").stat().st_mtime_ns == written


class TestLight:
    @pytest.mark.parametrize("case", ["plain", "int8", "stock noise", "video"])
    def test_goes_on_close_to_it(
        self, bench: Bench, wholes: dict[str, tuple[dict[str, Any], np.ndarray]], case: str
    ) -> None:
        folder = bench.submit(**CASES[case])
        bench.kill(folder, 5, LIGHT)
        assert not folder.checkpoints.exists()
        result = bench.run(folder, LIGHT)
        assert result["frames"] == FRAMES and result["note"] == "light, at chunk 5"
        pixels, wanted = decoded(Path(result["out"])), wholes[case][1]
        kept = 9 + 4 * 12
        assert np.array_equal(pixels[:kept], wanted[:kept])
        error = np.abs(pixels[kept:].astype(float) - wanted[kept:]).mean()
        # random networks forget nothing: what is behind the window still shows, but less than another seed
        other = decoded(Path(bench.run(bench.submit("other", seed=9, **CASES[case]), SELDOM)["out"]))
        assert 0 < error < 0.8 * np.abs(other[kept:].astype(float) - wanted[kept:]).mean()
        assert read_metadata(Path(result["out"]))["resumed"] == "light, at chunk 5"

    def test_only_what_is_needed_is_kept(self, bench: Bench) -> None:
        folder = bench.submit()
        bench.kill(folder, 6, LIGHT)
        kept = Records(folder.records)
        assert [chunk for chunk in range(CHUNKS) if chunk in kept] == [0, 2, 3, 4, 5]
        assert len(segment_paths(folder.segments)) == 6


class TestStopped:
    def test_at_the_next_step(
        self, bench: Bench, wholes: dict[str, tuple[dict[str, Any], np.ndarray]]
    ) -> None:
        folder = bench.submit()
        done: list[int] = []
        with pytest.raises(Interrupted):
            bench.run(folder, OFTEN, lambda progress: done.append(progress.chunk), lambda: len(done) == 3)
        partial = bench.root / "job.partial.mp4"
        assert probe(partial).frames == 33 and read_metadata(partial)["partial"] == "true"
        same(bench.run(folder), wholes["plain"])
        assert not partial.exists()

    def test_by_its_cancel_file(self, bench: Bench) -> None:
        folder = bench.submit()

        def report(progress: Progress) -> None:
            if progress.chunk == 2:
                folder.mark("cancel")

        with pytest.raises(Cancelled):
            bench.run(folder, report=report)
        assert probe(bench.root / "job.partial.mp4").frames == 21
        assert not (bench.root / "job.mp4").exists()

    def test_by_another_claim(self, bench: Bench) -> None:
        folder = bench.submit()
        runner, claim = Runner(OFTEN), Claims().take(folder.path)
        assert claim is not None

        def report(progress: Progress) -> None:
            if progress.chunk == CHUNKS:
                claim.release()
                assert Claims().take(folder.path) is not None

        with pytest.raises(Fenced):
            runner.run(folder, claim, bench.root, report)
        assert not (bench.root / "job.mp4").exists()


class TestFaults:
    @pytest.mark.parametrize("options", [OFTEN, SELDOM], ids=["checkpoints", "records alone"])
    @pytest.mark.parametrize("what", ["record", "segment", "checkpoint", "both checkpoints"])
    def test_damage_is_found(
        self,
        bench: Bench,
        wholes: dict[str, tuple[dict[str, Any], np.ndarray]],
        what: str,
        options: Options,
    ) -> None:
        folder = bench.submit()
        bench.kill(folder, 6, options)
        if what == "record":
            victims = [folder.records / "000005-1.safetensors"]
        elif what == "segment":
            victims = [folder.segments / "seg_00004-1.ts"]
        else:
            victims = sorted(folder.checkpoints.glob("state-*"))[-1 if what == "checkpoint" else -2 :]
        for victim in victims:
            data = bytearray(victim.read_bytes())
            del data[len(data) // 2 :]
            victim.write_bytes(data)
        result = bench.run(folder, options)
        assert result["frames"] == FRAMES
        if result["note"] is None:
            same(result, wholes["plain"])
        else:
            # all that would lead there exactly is gone
            assert what in ("segment", "both checkpoints") and options is OFTEN
            assert probe(Path(result["out"])).frames == FRAMES

    def test_nan_is_named_and_what_was_done_is_kept(
        self,
        bench: Bench,
        wholes: dict[str, tuple[dict[str, Any], np.ndarray]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder, check = bench.submit(), Rollout._check_finite

        def poisoned(self: Rollout, x: torch.Tensor) -> None:
            check(self, x * float("nan") if self.chunk == 3 else x)

        monkeypatch.setattr(Rollout, "_check_finite", poisoned)
        with pytest.raises(NumericsError, match="NaN or Inf in chunk 3"):
            bench.run(folder)
        assert probe(bench.root / "job.partial.mp4").frames == 33
        assert "NaN" in read_metadata(bench.root / "job.partial.mp4")["stopped"]
        monkeypatch.setattr(Rollout, "_check_finite", check)
        same(bench.run(folder), wholes["plain"])

    def test_a_checkpoint_that_cannot_be_written(
        self,
        bench: Bench,
        wholes: dict[str, tuple[dict[str, Any], np.ndarray]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder, save = bench.submit(), Checkpoints.save

        def full(self: Checkpoints, rollout: Rollout) -> int:
            if rollout.chunk == 3:
                raise OutputError("No space left on device")
            return save(self, rollout)

        monkeypatch.setattr(Checkpoints, "save", full)
        with pytest.raises(OutputError, match="No space"):
            bench.run(folder)
        monkeypatch.setattr(Checkpoints, "save", save)
        result = bench.run(folder)
        assert result["resumed_at"] == 3
        same(result, wholes["plain"])

    def test_a_model_that_has_changed(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = bench.submit()
        job = json.loads((folder.path / "job.json").read_text())
        (folder.path / "job.json").write_text(json.dumps(job | {"key": "0" * 64}))
        with pytest.raises(StateError, match="has changed; submit it under another id"):
            bench.run(folder)
