"""Comparisons over HTTP: of videos whose pixels the test has painted, and of two that were really made."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.apps.test_api import JSON, QUICK, Api, fault, opened, png
from tests.apps.test_fidelity import brute_ssim
from tests.faults.requests import Answer, form
from vidkv.apps import compare
from vidkv.apps.compare import Side, explain
from vidkv.apps.fidelity import Frames
from vidkv.jobs.run import Progress
from vidkv.jobs.store import Job, JobStore
from vidkv.jobs.worker import Orders, Worker
from vidkv.request import VideoRequest
from vidkv.segments import SegmentWriter, partial_video, write_video

PROMPT = "a red circle bouncing"
FPS = 16
SIZES = (9, 12, 12, 8)
"""Frames by chunk of 2.5625 seconds, the last chunk cut."""
SECONDS = sum(SIZES) / FPS
Paint = Callable[[int, int], Frames]
PAIR = {"prompt": PROMPT, "seconds": 1, "a": "fp32", "b": "int8,window=9,sink=3"}


def painted(chunk: int, frames: int, side: int = 64) -> Frames:
    """A ramp that moves and a red square."""
    at = np.arange(side)
    ramp = (2 * at[None, :, None] + at[None, None] + 7 * np.arange(frames)[:, None, None] + 31 * chunk) % 200
    out = np.repeat(ramp[..., None], 3, -1).astype(np.uint8)
    out[:, 8:24, 10 + 2 * chunk : 26 + 2 * chunk] = (220, 40, 30)
    return out


def brighter(chunk: int, frames: int) -> Frames:
    return painted(chunk, frames) + np.uint8(4 * chunk)


class Film:
    """A job whose chunks the test paints, as far as it wants; they go through the codec like any other."""

    def __init__(self, api: Api, id: str, paint: Paint = painted, side: int = 64, **fields: Any) -> None:
        self.api, self.id, self.paint = api, id, paint
        wanted = {"prompt": PROMPT, "seconds": SECONDS, "width": side, "height": side, "id": id} | fields
        assert api.store.submit(VideoRequest.of(wanted), api.service.settings).chunks == len(SIZES)
        self.claim = api.run(id)
        self.folder = api.store.folder(self.job)
        self.writer = SegmentWriter(self.folder.segments, FPS, side, side, fence=self.claim.fence)

    @property
    def job(self) -> Job:
        return self.api.store.get(self.id)

    def make(self, chunks: int) -> Film:
        """So many more chunks."""
        for _ in range(chunks):
            index = len(self.writer.paths())
            self.writer.write(index, self.paint(index, SIZES[index]))
            progress = Progress(
                chunk=index + 1, chunks=len(SIZES), frames=self.writer.frames, fps=8.0 + len(self.id),
                eta_s=1.0, kv_bytes=1000 * len(self.id), held_bytes=1, rss_bytes=1, drift={}, blank=False,
            )  # fmt: skip
            self.api.store.report(self.id, progress)
        return self

    def end(self, state: str = "done") -> Film:
        out = self.api.store.file(self.job)
        write_video(
            self.writer.paths(), out if state == "done" else partial_video(out), FPS, {"job": self.job.key}
        )
        counts = {"frames": self.writer.frames, "chunks": len(self.writer.paths())}
        self.api.store.finish(self.job, {"state": state, "error": None, **counts})
        self.claim.release()
        return self


def films(api: Api, paint: Paint = painted, other: Paint = brighter) -> None:
    """`one` and `three`, finished."""
    Film(api, "one", paint).make(4).end()
    Film(api, "three", other, cache={"format": "int8"}).make(4).end()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with opened(tmp_path / "renders") as api:
        yield api


def post(api: Api, expect: int = 200, **fields: Any) -> Any:
    answer = api.ask("POST", "/v1/compare", body=json.dumps(fields).encode(), headers=JSON)
    assert answer.status == expect, answer.body
    return answer.json()


def look(api: Api, a: str = "one", b: str = "three", query: str = "") -> Any:
    answer = api.ask("GET", f"/v1/compare/{a}/{b}{query}")
    assert answer.status == 200, answer.body
    return answer.json()


def decoded(api: Api, id: str) -> Frames:
    """What a player shows."""
    content = api.ask("GET", f"/v1/videos/{id}/content")
    with av.open(io.BytesIO(content.body)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


class TestQueue:
    def test_two_jobs_that_differ_in_the_cache_alone(self, api: Api) -> None:
        made = post(api, **PAIR, seed=9, id="mine")
        assert made["id"] == "mine" and [made[side]["id"] for side in "ab"] == ["mine-a", "mine-b"]
        assert made["a"] == api.ask("GET", "/v1/videos/mine-a").json()
        a, b = (dict(api.store.get(f"mine-{side}").request) for side in "ab")
        assert (a.pop("id"), b.pop("id")) == ("mine-a", "mine-b")
        assert a.pop("cache") == {"format": "fp32"}
        assert b.pop("cache") == {"format": "int8", "window": 9, "sink": 3}
        assert a == b and a["seed"] == 9
        assert made["a"]["keep"] and made["b"]["keep"]
        assert api.store.get("mine-a").number < api.store.get("mine-b").number

    def test_the_same_again_is_the_same_pair(self, api: Api) -> None:
        first, again, other = post(api, **PAIR), post(api, **PAIR), post(api, **PAIR, seed=1)
        assert first == again and first["id"] != other["id"]
        assert len(api.store.jobs()) == 4

    def test_both_start_from_the_one_picture(self, api: Api) -> None:
        body, headers = form([(k, str(v)) for k, v in PAIR.items()], [("input_reference", "x.png", png())])
        answer = api.ask("POST", "/v1/compare", body=body, headers=headers)
        assert answer.status == 200, answer.body
        jobs = api.store.jobs()
        assert len(jobs) == 2 and jobs[0].request["image"] == jobs[1].request["image"]
        assert len(api.uploads()) == 1
        for job in jobs:
            assert api.ask("DELETE", f"/v1/videos/{job.id}").status == 200
        assert api.uploads() == []

    @pytest.mark.parametrize(
        ("changes", "param", "said"),
        [
            ({"b": None}, "b", "same cache"),
            ({"b": "fp32,window=21,sink=3"}, "b", "same cache"),
            ({"a": "int9"}, "a", "a: cache='int9'"),
            ({"b": "int8,window=3,sink=3"}, "b", "does not fit into window=3"),
            ({"b": {"format": "int8", "sede": 1}}, "b", "sede"),
            ({"cache": "int8"}, "cache", "give a and b instead"),
            ({"until_stopped": True}, "until_stopped", "a comparison has an end"),
            ({"seconds": -1}, "seconds", "seconds=-1"),
            ({"prompt": "a dog"}, None, "embedded world"),
            ({"id": ""}, "id", "letters"),
            ({"id": "a/b"}, "id", "letters"),
            ({"id": "x" * 79}, "id", "78"),
            ({"id": 5}, "id", "id=5"),
            ({"model": "nope"}, "model", "use bounce"),
            ({"image": "/etc/passwd"}, "image", "input_reference"),
            ({"surprise": 1}, "surprise", "not known"),
        ],
    )
    def test_what_cannot_be_used_is_named_and_nothing_is_queued(
        self, api: Api, changes: dict[str, Any], param: str | None, said: str
    ) -> None:
        body = json.dumps(PAIR | changes).encode()
        answer = api.ask("POST", "/v1/compare", body=body, headers=JSON)
        assert answer.status == 422
        assert fault(answer)["param"] == param and said in fault(answer)["message"]
        assert api.store.jobs() == []

    @pytest.mark.parametrize("missing", ["a", "b"])
    def test_both_caches_are_required(self, api: Api, missing: str) -> None:
        answer = post(api, 422, **{name: value for name, value in PAIR.items() if name != missing})
        assert answer["error"]["param"] == missing and "is missing" in answer["error"]["message"]

    @pytest.mark.parametrize(("body", "status"), [(b"[]", 422), (b"{", 400), (b'"x"', 422)])
    def test_other_bodies_are_refused(self, api: Api, body: bytes, status: int) -> None:
        assert api.ask("POST", "/v1/compare", body=body, headers=JSON).status == status

    def test_a_queue_with_room_for_one_takes_neither(self, tmp_path: Path) -> None:
        with opened(tmp_path / "renders", replace(QUICK, queue=3)) as api:
            api.post(prompt=PROMPT, seconds=1, id="first")
            pair = post(api, **PAIR, id="p")
            # the queue is full: what is in it already is no news
            assert post(api, **PAIR, id="p") == pair
            answer = api.ask(
                "POST", "/v1/compare", body=json.dumps(PAIR | {"seed": 5}).encode(), headers=JSON
            )
            assert answer.status == 429 and fault(answer)["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) > 0
            api.ask("DELETE", "/v1/videos/first")
            assert post(api, 429, **PAIR, seed=5)["error"]["code"] == "queue_full"
            assert [job.id for job in api.store.jobs()] == ["p-a", "p-b"]

    def test_the_first_is_taken_back_when_the_second_cannot_be_queued(self, api: Api) -> None:
        api.post(prompt=PROMPT, seconds=3, id="x-b")
        answer = post(api, 422, **PAIR, id="x")
        assert "x-b" in answer["error"]["message"]
        assert [job.id for job in api.store.jobs()] == ["x-b"]
        assert not [path for path in (api.root / ".vidkv" / "jobs").iterdir() if path.name.startswith("x-a")]

    def test_a_first_one_that_was_there_before_stays(self, api: Api) -> None:
        api.post(prompt=PROMPT, seconds=3, id="x-b")
        api.post(**{k: v for k, v in PAIR.items() if k not in "ab"}, cache=PAIR["a"], id="x-a", keep=True)
        post(api, 422, **PAIR, id="x")
        assert [job.id for job in api.store.jobs()] == ["x-b", "x-a"]

    def test_nothing_is_queued_while_nobody_works(self, api: Api) -> None:
        api.service.ailing = lambda: "the workers are gone"
        assert post(api, 503, **PAIR)["error"]["code"] == "no_workers"


class TestMeasure:
    def test_equal_videos_have_no_psnr_and_say_so(self, api: Api) -> None:
        films(api, painted, painted)
        told = look(api)
        assert told["complete"] and told["measured"] == told["available"] == told["next"] == 4
        close = told["fidelity"]
        assert close["identical"] and close["psnr"] is None and close["diverged_at"] is None
        assert close["ssim"] == close["ssim_lowest"] == 1 and close["max_difference"] == 0
        assert [chunk["psnr"] for chunk in told["chunks"]] == [None] * 4
        assert [(chunk["first_frame"], chunk["frames"]) for chunk in told["chunks"]] == [
            (0, 9), (9, 12), (21, 12), (33, 8),
        ]  # fmt: skip

    def test_numbers_are_those_of_brute_force_over_what_players_show(self, api: Api) -> None:
        films(api)
        told = look(api)
        a, b = decoded(api, "one"), decoded(api, "three")
        assert len(a) == len(b) == sum(SIZES)
        for chunk in told["chunks"]:
            part = slice(chunk["first_frame"], chunk["first_frame"] + chunk["frames"])
            x, y = a[part].astype(float), b[part].astype(float)
            error = ((x - y) ** 2).mean()
            if chunk["psnr"] is None:
                assert error == 0
            else:
                assert chunk["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
            assert chunk["max_difference"] == np.abs(x - y).max()
            for side, frames in enumerate((a, b)):
                lumas = [frames[p].astype(float) @ [0.299, 0.587, 0.114] / 2.55 for p in (slice(0, 9), part)]
                assert chunk["luma"][side] == pytest.approx(lumas[1].mean() - lumas[0].mean(), abs=0.02)
        assert told["chunks"][1]["ssim"] == pytest.approx(brute_ssim(a[9:21], b[9:21], 11), abs=1e-4)
        error = ((a.astype(float) - b) ** 2).mean()
        assert told["fidelity"]["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)

    def test_brightness_that_creeps_moves_the_drift_of_that_side(self, api: Api) -> None:
        films(api)
        moved = [chunk["luma"][1] - chunk["luma"][0] for chunk in look(api)["chunks"]]
        # what the square moves both sides have in common
        assert moved == pytest.approx([0, 4 / 2.55, 8 / 2.55, 12 / 2.55], abs=0.25)

    def test_a_repeated_chunk_is_where_they_part(self, api: Api) -> None:
        films(api, painted, lambda chunk, frames: painted(chunk - (chunk == 2), frames))
        told = look(api)
        assert told["fidelity"]["diverged_at"] == 2 and told["chunks"][2]["psnr"] < 20
        assert [chunk["psnr"] for i, chunk in enumerate(told["chunks"]) if i != 2] == [None] * 3

    def test_shuffled_frames_part_where_they_are_shuffled(self, api: Api) -> None:
        films(api, painted, lambda chunk, frames: painted(chunk, frames)[:: -1 if chunk == 3 else 1].copy())
        told = look(api)
        assert told["fidelity"]["diverged_at"] == 3 and told["chunks"][3]["ssim"] < 0.9

    def test_segments_and_the_file_say_the_same(self, api: Api) -> None:
        one, three = Film(api, "one").make(4), Film(api, "three", brighter).make(4)
        before = look(api)
        assert not before["complete"] and before["measured"] == 4
        one.end()
        three.end()
        assert not list(one.folder.segments.glob("*.ts"))
        # in the other order it is another comparison
        after = look(api, "three", "one")
        assert after["complete"]
        for x, y in zip(before["chunks"], after["chunks"], strict=True):
            assert x["luma"] == y["luma"][::-1] and x["saturation"] == y["saturation"][::-1]
            assert (x["psnr"], x["max_difference"]) == (y["psnr"], y["max_difference"])
            assert x["ssim"] == pytest.approx(y["ssim"], abs=2e-5)

    def test_of_running_jobs_what_both_have_is_compared(self, api: Api) -> None:
        one = Film(api, "one").make(3)
        assert look(api, "one", "one")["measured"] == 3
        three = Film(api, "three", brighter)
        told = look(api)
        assert (told["available"], told["measured"], told["chunks"]) == (0, 0, [])
        assert "nothing is compared yet" in told["up_to"] and told["fidelity"]["psnr"] is None
        three.make(1)
        assert look(api)["measured"] == 1
        three.make(1)
        told = look(api, query="?after=1")
        assert [chunk["chunk"] for chunk in told["chunks"]] == [1] and told["next"] == 2
        assert "up to chunk 1 (2 of 4, 1.31 s); the rest is being made" in told["up_to"]
        three.make(2).end()
        one.make(1).end()
        told = look(api, query="?after=2")
        assert [chunk["chunk"] for chunk in told["chunks"]] == [2, 3] and told["complete"]

    def test_it_goes_on_in_the_file_in_the_middle_of_a_video(self, api: Api) -> None:
        """Seeking in an mp4 whose key frames are wherever the encoder saw a cut."""
        one, three = Film(api, "one").make(3), Film(api, "three", brighter).make(3)
        look(api)
        one.make(1).end()
        three.make(1).end()
        whole = look(api, "three", "one")["chunks"]
        assert [chunk["psnr"] for chunk in look(api)["chunks"]] == [chunk["psnr"] for chunk in whole]

    def test_one_question_measures_for_a_moment_only(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compare, "WORK_S", 0.0)
        films(api)
        measured = [look(api) for _ in range(5)]
        assert [told["measured"] for told in measured] == [1, 2, 3, 4, 4]
        assert [told["complete"] for told in measured] == [False, False, False, True, True]
        assert "2 more are finished and are being compared" in measured[1]["up_to"]

    def test_what_is_measured_is_not_measured_again(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        films(api)
        told = look(api)
        monkeypatch.setattr(compare, "_decoded", lambda *_: pytest.fail("decoded again"))
        assert look(api) == told

    def test_few_comparisons_are_remembered(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compare, "KEPT", 1)
        films(api)
        told = look(api)
        look(api, "three", "one")
        assert look(api) == told

    def test_a_video_made_anew_under_its_id_is_measured_anew(self, api: Api) -> None:
        films(api)
        assert look(api)["fidelity"]["diverged_at"] is not None
        assert api.ask("DELETE", "/v1/videos/three").status == 200
        Film(api, "three", painted, cache={"format": "int8"}).make(4).end()
        assert look(api)["fidelity"]["identical"]

    def test_pages_of_many_chunks(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compare, "PAGE", 3)
        films(api)
        first, second = look(api), look(api, query="?after=3")
        assert (first["next"], second["next"]) == (3, 4) and first["measured"] == 4
        assert [chunk["chunk"] for chunk in first["chunks"] + second["chunks"]] == [0, 1, 2, 3]
        assert look(api, query="?after=99")["chunks"] == []

    def test_stopped_videos_are_compared_as_far_as_they_go(self, api: Api) -> None:
        Film(api, "one").make(4).end()
        three = Film(api, "three", brighter).make(2).end("cancelled")
        told = look(api)
        assert told["complete"] and told["measured"] == 2
        for path in three.folder.segments.glob("*.ts"):
            path.unlink()
        # from its partial file
        assert look(api, "three", "one")["chunks"][1]["psnr"] == told["chunks"][1]["psnr"]


class TestSides:
    def test_what_either_cache_takes(self, api: Api) -> None:
        films(api)
        told = look(api)
        # keys and values of 64 tokens, 4 heads of 64 numbers and 6 layers, in 4 bytes
        page = 2 * 6 * 16 * 4 * 64 * 4
        assert told["a"]["bytes_per_frame"] == page
        assert told["ratio"]["bytes_per_frame"] == told["b"]["bytes_per_frame"] / page < 0.27
        assert (told["a"]["cache"], told["b"]["cache"]) == ("fp32,window=21,sink=3", "int8,window=21,sink=3")
        # as their jobs say
        assert told["a"]["kv_bytes"] == 3000 and told["ratio"]["kv_bytes"] == pytest.approx(5 / 3)
        assert told["a"]["fps"] == 11 and told["ratio"]["fps"] == pytest.approx(13 / 11)
        assert told["a"]["video"] == api.ask("GET", "/v1/videos/one").json()

    def test_of_queued_jobs_the_plan(self, api: Api) -> None:
        made = post(api, **PAIR)
        told = look(api, made["a"]["id"], made["b"]["id"])
        assert told["a"]["kv_bytes"] == 18 * told["a"]["bytes_per_frame"]
        assert told["b"]["fps"] is None and told["ratio"]["fps"] is None

    def test_world_metrics_of_both_sides(self, api: Api) -> None:
        def circle(chunk: int, frames: int, colour: tuple[int, int, int] = (230, 30, 35)) -> Frames:
            y, x = np.mgrid[:64, :64]
            out = np.full((frames, 64, 64, 3), 40, np.uint8)
            for frame in range(frames):
                out[frame, np.hypot(x - 16 - 0.7 * (sum(SIZES[:chunk]) + frame), y - 30) < 9] = colour
            return out

        films(api, circle, lambda chunk, frames: circle(chunk, frames, (35, 80, 250)))
        told = look(api)
        world = told["world"]
        assert world["chunks"] == 4 and world["diverged_at"] == 0
        assert world["a"]["means"]["identity"] == 1 and world["b"]["means"]["identity"] == 0
        assert len(world["a"]["curves"]["identity"]) == 4
        assert look(api, query="?world=4")["world"]["a"]["curves"] is None

    def test_videos_of_other_sizes_have_no_world(self, api: Api) -> None:
        for id in ("one", "three"):
            Film(api, id, lambda chunk, frames: painted(chunk, frames, 32), side=32).make(4).end()
        told = look(api)
        assert (
            told["world"] is None and told["width"] == told["height"] == 32 and told["fidelity"]["identical"]
        )

    def test_caches_alone(self, api: Api) -> None:
        films(api)
        told = look(api)
        assert told["caches_alone"] and len(told["notes"]) == 1 and "chaotic" in told["notes"][0]

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"seed": 4}, "also differ in seed"),
            ({"prompt": "a blue square bouncing"}, "also differ in prompt"),
            ({"schedule": [(1, "a blue square bouncing")]}, "also differ in prompt"),
            ({"steps": 3, "guidance": 1.5}, "also differ in steps, guidance"),
        ],
    )
    def test_what_else_differs_is_said(self, api: Api, fields: dict[str, Any], said: str) -> None:
        Film(api, "one").make(1)
        Film(api, "three", **fields).make(1)
        told = look(api)
        assert not told["caches_alone"] and said in told["notes"][0]
        assert any("chaotic" in note for note in told["notes"]) == ("seed" not in fields)

    def test_another_spelling_is_the_same_prompt(self, api: Api) -> None:
        Film(api, "one").make(1)
        Film(api, "three", prompt="A red BALL moving", cache={"format": "int8"}).make(1)
        assert look(api)["caches_alone"]

    def test_the_same_cache_twice_is_said(self, api: Api) -> None:
        Film(api, "one").make(1)
        Film(api, "three").make(1)
        assert "the same cache (fp32,window=21,sink=3)" in look(api)["notes"][0]
        assert "one video, compared with itself" in look(api, "one", "one")["notes"][0]

    def test_a_model_in_free_words_is_compared_by_its_words(self, api: Api) -> None:
        Film(api, "one").make(1)
        side = replace(Side.of(api.service, api.store.get("one")), grammar=None)
        differing, _ = explain(side, replace(side, timeline=((0.0, "another"),)))
        assert differing == ["prompt"]


class TestRefused:
    @pytest.mark.parametrize("target", ["nope/one", "one/nope", "one/..%2f..", "%00/one"])
    @pytest.mark.parametrize("rest", ["", "/report"])
    def test_ids_that_are_none(self, api: Api, target: str, rest: str) -> None:
        Film(api, "one").make(1)
        answer = api.ask("GET", f"/v1/compare/{target}{rest}")
        assert answer.status == 404 and fault(answer)["code"] == "not_found"

    def test_other_sizes(self, api: Api) -> None:
        Film(api, "one").make(1)
        Film(api, "three", lambda chunk, frames: painted(chunk, frames, 32), side=32).make(1)
        answer = api.ask("GET", "/v1/compare/one/three")
        assert answer.status == 422 and fault(answer)["code"] == "not_comparable"
        assert "size (64x64 and 32x32)" in fault(answer)["message"]

    def test_other_chunks(self, api: Api) -> None:
        Film(api, "one").make(1)
        video = api.upload(png(), id="picture")
        assert video.status == 200
        answer = api.ask("GET", "/v1/compare/one/picture")
        assert answer.status == 422 and "length of chunks" in fault(answer)["message"]

    @pytest.mark.parametrize("query", ["after=-1", "after=x", "world=1e9"])
    def test_other_places(self, api: Api, query: str) -> None:
        Film(api, "one").make(1)
        assert api.ask("GET", f"/v1/compare/one/one?{query}").status == 422

    def test_a_damaged_file_is_said_without_its_place(self, api: Api) -> None:
        films(api)
        path = api.store.file(api.store.get("three"))
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        answer = api.ask("GET", "/v1/compare/one/three")
        assert answer.status == 422 and "delete it and make it again" in fault(answer)["message"]
        assert str(api.root) not in answer.body.decode()

    def test_a_file_that_is_gone(self, api: Api) -> None:
        films(api)
        api.store.file(api.store.get("three")).unlink()
        answer = api.ask("GET", "/v1/compare/one/three")
        assert answer.status == 404 and fault(answer)["code"] == "no_file"


class TestReport:
    def report(self, api: Api, a: str = "one", b: str = "three") -> Answer:
        return api.ask("GET", f"/v1/compare/{a}/{b}/report")

    def test_it_is_a_file_to_keep(self, api: Api) -> None:
        films(api)
        answer = self.report(api)
        assert answer.status == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-disposition"] == 'attachment; filename="compare-one-three.html"'
        assert b"PSNR by chunk" in answer.body and answer.body.count(b"data:image/jpeg") == 12

    def test_of_videos_that_have_not_begun(self, api: Api) -> None:
        made = post(api, **PAIR)
        answer = self.report(api, made["a"]["id"], made["b"]["id"])
        assert answer.status == 200 and b"Nothing is compared yet" in answer.body


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """With a worker beside it, in a thread."""
    root = tmp_path_factory.mktemp("working")
    over = threading.Event()
    with opened(root) as api, JobStore(root) as store:
        worker = Worker(store, Orders(root, store.name, "thread", idle=True), over.is_set)
        thread = threading.Thread(target=worker.work)
        thread.start()
        yield api
        over.set()
        thread.join()


@pytest.mark.usefixtures("short_first_chunk")
class TestEndToEnd:
    def test_two_caches_one_seed(self, working: Api) -> None:
        made = post(working, **PAIR | {"seconds": 3}, seed=7)
        ids = [made[side]["id"] for side in "ab"]
        for id in ids:
            working.ask("GET", f"/v1/videos/{id}/events")
        # each call compares as many chunks as its time allows
        while not (told := look(working, *ids))["complete"]:
            pass
        assert told["measured"] == 5 and told["caches_alone"]
        first, *later = told["chunks"]
        # the first chunk has no history that could be kept in another way
        assert first["psnr"] is None and all(chunk["psnr"] is not None for chunk in later)
        assert told["world"]["a"]["means"]["identity"] is not None
        assert told["b"]["bytes_per_frame"] < 0.3 * told["a"]["bytes_per_frame"]
        assert working.ask("GET", f"/v1/compare/{ids[0]}/{ids[1]}/report").status == 200
