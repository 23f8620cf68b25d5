"""Routes that change what becomes of a video, and those that tell what it is made of."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.apps.commandline import run
from tests.apps.test_api import JSON, ONE_SECOND, PROMPT, QUICK, Api, fault, halfway, opened, png
from tests.faults.requests import Answer
from vidkv.jobs.store import State
from vidkv.jobs.worker import Orders, Worker
from vidkv.planning import plan
from vidkv.request import EngineSettings, VideoRequest
from vidkv.segments import probe

OTHER = "a blue square bouncing"

pytestmark = pytest.mark.usefixtures("short_first_chunk")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with opened(tmp_path / "renders") as api:
        yield api


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """With a finished video that may be branched; nobody changes it."""
    with opened(tmp_path_factory.mktemp("done") / "renders") as api:
        api.post(**ONE_SECOND, id="a", keep=True)
        work(api)
        yield api


def post(api: Api, path: str, **fields: Any) -> Answer:
    return api.ask("POST", f"/v1/videos/{path}", body=json.dumps(fields).encode(), headers=JSON)


def work(api: Api) -> None:
    Worker(api.store, Orders(api.store.root, api.store.name, "w")).work()


class TestSteering:
    def test_a_prompt_is_noted_for_whoever_works_on_it(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        assert post(api, "a/prompt", prompt=OTHER, switch="recache").json()["status"] == "queued"
        [(_, prompt, switch)] = api.store.folder(api.store.get("a")).wanted_prompts()
        assert (prompt, switch) == (OTHER, "recache")

    @pytest.mark.parametrize(
        ("fields", "param", "words"),
        [
            ({}, "prompt", "prompt is missing"),
            ({"prompt": ""}, "prompt", "the prompt is empty"),
            ({"prompt": OTHER, "switch": "cut"}, "switch", "switch='cut'"),
            ({"prompt": OTHER, "at": 3}, "at", "fields are prompt, switch"),
            ({"prompt": "a purple dragon"}, None, "purple|dragon"),
        ],
    )
    def test_prompts_that_cannot_be(
        self, api: Api, fields: dict[str, Any], param: str | None, words: str
    ) -> None:
        import re

        api.post(**ONE_SECOND, id="a")
        answer = post(api, "a/prompt", **fields)
        found = fault(answer)
        assert answer.status == 422 and found["param"] == param and re.search(words, found["message"])
        assert api.store.folder(api.store.get("a")).wanted_prompts() == []

    def test_what_was_steered_in_is_shown(self, api: Api) -> None:
        from dataclasses import replace

        api.post(prompt=PROMPT, seconds=2, id="a", schedule=[[0.6, PROMPT, "flush"]])
        api.run("a")
        steered = ((0.5625, OTHER, "keep"),)
        api.store.report("a", replace(halfway(), steered=steered))
        video = api.ask("GET", "/v1/videos/a").json()
        assert video["prompt"] == PROMPT
        assert video["schedule"] == [[0.5625, OTHER, "keep"], [0.6, PROMPT, "flush"]]

    def test_pause_and_resume(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        assert post(api, "a/pause").json()["status"] == "paused"
        assert api.ask("GET", "/v1/videos/a").json()["place"] is None
        assert post(api, "a/resume").json()["status"] == "queued"
        assert api.ask("GET", "/v1/videos/a").json()["place"] == 1

    def test_places_in_the_queue(self, api: Api) -> None:
        for id in "abc":
            api.post(**ONE_SECOND, id=id)
        api.run("a")
        places = {v["id"]: v["place"] for v in api.ask("GET", "/v1/videos").json()["data"]}
        assert places == {"a": None, "b": 1, "c": 2}

    def test_finish_keeps_what_there_is(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        api.post(prompt=PROMPT, until_stopped=True, id="a", keep=True)
        assert api.ask("GET", "/v1/videos/a").json()["until_stopped"]
        report = type(api.store).report

        def reported(self: Any, id: str, progress: Any) -> None:
            report(self, id, progress)
            if progress.chunk == 2:
                assert post(api, "a/finish").json()["status"] == "in_progress"

        monkeypatch.setattr(type(api.store), "report", reported)
        work(api)
        video = api.ask("GET", "/v1/videos/a").json()
        assert (video["status"], video["frames"], video["chunks_done"]) == ("completed", 21, 2)
        assert probe(api.store.file(api.store.get("a"))).frames == 21
        found = api.ask("GET", "/v1/videos/a/settings").json()
        assert found["request"]["seconds"] == 21 / 16 and found["settings"]["seconds"] == f"{21 / 16:g}"

    def test_retry_queues_again(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        api.ask("POST", "/v1/videos/a/cancel")
        assert post(api, "a/retry").json()["status"] == "queued"

    @pytest.mark.parametrize("act", ["prompt", "pause", "resume", "finish", "retry", "branch"])
    def test_of_a_video_that_is_not_there(self, api: Api, act: str) -> None:
        for id in ("nope", "..", "%2e%2e"):
            answer = post(api, f"{id}/{act}", **({"prompt": OTHER} if act == "prompt" else {}))
            assert answer.status == 404

    def test_an_ended_one_takes_no_prompt(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        api.ask("POST", "/v1/videos/a/cancel")
        answer = post(api, "a/prompt", prompt=OTHER)
        assert answer.status == 409 and "branch" in fault(answer)["message"]

    @pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x"])
    def test_bodies_are_json(self, api: Api, kind: str) -> None:
        api.post(**ONE_SECOND, id="a")
        answer = api.ask("POST", "/v1/videos/a/prompt", body=b"{}", headers=[("content-type", kind)])
        assert answer.status == 415


class TestBranch:
    def test_extend_and_branch(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a", keep=True)
        work(api)
        longer = post(api, "a/branch", more_seconds=0.5).json()
        assert longer["id"] == "a-2" and longer["parent"] == {"id": "a", "chunk": 2}
        assert longer["seconds"] == "1.5" and longer["keep"]
        other = post(api, "a/branch", chunk=1, prompt=OTHER, id="b").json()
        assert other["schedule"] == [[9 / 16, OTHER, None]] and other["parent"]["chunk"] == 1
        work(api)
        shown = api.ask("GET", "/v1/videos").json()["data"]
        assert {v["id"]: v["frames"] for v in shown} == {"a": 16, "a-2": 24, "b": 16}

    @pytest.mark.parametrize(
        ("fields", "status", "words"),
        [
            ({}, 422, "nothing is left to make"),
            ({"chunk": 5, "prompt": OTHER}, 422, "chunk=5: 2 chunks of a are finished"),
            ({"chunk": 0}, 422, "chunk=0"),
            ({"more_seconds": 1e9}, 422, "this server makes at most"),
            ({"more_seconds": -1}, 422, "more_seconds=-1"),
            ({"id": "a", "more_seconds": 1}, 422, "other settings"),
            ({"id": "../b", "more_seconds": 1}, 422, "id='../b'"),
            ({"chunk": 1, "prompt": "a purple dragon"}, 422, "dragon|purple"),
            ({"from": "b"}, 422, "from='b' is not known"),
        ],
    )
    def test_branches_that_cannot_be(
        self, done: Api, fields: dict[str, Any], status: int, words: str
    ) -> None:
        import re

        answer = post(done, "a/branch", **fields)
        assert answer.status == status and re.search(words, fault(answer)["message"])
        assert [job.id for job in done.store.jobs()] == ["a"]

    def test_however_often_it_is_extended_it_stays_within_the_limit(self, tmp_path: Path) -> None:
        from dataclasses import replace

        with opened(tmp_path / "renders", replace(QUICK, seconds=1.5)) as api:
            api.post(**ONE_SECOND, id="a", keep=True)
            work(api)
            answer = post(api, "a/branch", more_seconds=0.6)
            assert answer.status == 422 and "seconds=1.6" in fault(answer)["message"]
            assert post(api, "a/branch", more_seconds=0.5).status == 200

    def test_what_was_not_kept(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        answer = post(api, "a/branch", more_seconds=1)
        assert answer.status == 422 and "not submitted with keep" in fault(answer)["message"]

    def test_a_full_queue(self, tmp_path: Path) -> None:
        from dataclasses import replace

        with opened(tmp_path / "renders", replace(QUICK, queue=1)) as api:
            api.post(**ONE_SECOND, id="a", keep=True)
            work(api)
            api.post(**ONE_SECOND, id="b")
            answer = post(api, "a/branch", more_seconds=1)
            assert answer.status == 429 and int(answer.headers["retry-after"]) > 0


class TestLog:
    def test_of_every_chunk_from_a_place_on(self, api: Api) -> None:
        api.post(prompt=PROMPT, seconds=2, id="a", keep=True)
        assert api.ask("GET", "/v1/videos/a/log").json() == {"entries": [], "next": 0}
        work(api)
        log = api.ask("GET", "/v1/videos/a/log").json()
        assert [entry["chunk"] for entry in log["entries"]] == [0, 1, 2]
        assert {"kv_bytes", "resident", "evicted", "drift", "fps", "prompt"} <= set(log["entries"][0])
        assert api.ask("GET", f"/v1/videos/a/log?after={log['next']}").json()["entries"] == []
        assert api.ask("GET", "/v1/videos/a/log?after=-1").status == 422


class TestSettings:
    def test_they_make_the_same_video_again(
        self,
        api: Api,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The request, the program and the command: all three are run, and give the same latents."""
        api.post(prompt=PROMPT, seconds=2, seed=3, cache="int8,window=9", schedule=[[1.3, OTHER]], id="a")
        work(api)
        whole = api.store.get("a").result["latents_sha256"]
        found = api.ask("GET", "/v1/videos/a/settings").json()
        assert found["settings"]["seed"] == "3" and "int8" in found["settings"]["cache"]
        api.post(**found["request"], id="b")
        work(api)
        assert api.store.get("b").result["latents_sha256"] == whole
        words = shlex.split(found["cli"])
        assert words[:2] == ["vidkv", "generate"]
        words[words.index("--out") + 1] = str(tmp_path / "again.mp4")
        monkeypatch.chdir(tmp_path)
        code, _, stderr = run(capsys, *words[1:], "--device", "cpu", "--json")
        assert code == 0, stderr
        made = probe(tmp_path / "again.mp4")
        assert made.frames == 32
        ours, theirs = api.store.file(api.store.get("a")), tmp_path / "again.mp4"
        assert pictures(ours) == pictures(theirs)
        program = found["python"] + "    print(chunk.frames.sum().item())\n"
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        printed = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in printed][::2] == ["0", "1", "2"]

    def test_switches_of_their_own_go_through_a_manifest(self, api: Api) -> None:
        api.post(prompt=PROMPT, seconds=2, schedule=[[1.3, OTHER, "flush"]], id="a")
        found = api.ask("GET", "/v1/videos/a/settings").json()
        words = shlex.split(found["cli"])
        assert words[0] == "echo" and words[2:5] == ["|", "vidkv", "render"]
        line = VideoRequest.of(json.loads(words[1]))
        assert plan(line, EngineSettings(device="cpu")).key == api.store.get("a").key

    def test_no_path_of_the_server(self, api: Api) -> None:
        assert api.upload(png(), id="a").status == 200
        text = api.ask("GET", "/v1/videos/a/settings").body.decode()
        assert str(api.root) not in text


class TestEstimate:
    def test_what_a_video_takes(self, api: Api) -> None:
        def ask(**fields: Any) -> Any:
            body = json.dumps({"prompt": PROMPT} | fields).encode()
            return api.ask("POST", "/v1/estimate", body=body, headers=JSON)

        full, small = (ask(cache=f"{name},window=21").json() for name in ("fp32", "int8"))
        assert full["ok"] and full["frames"] == 160 and full["chunks"] == 14
        assert 0.2 < small["kv_bytes"] / full["kv_bytes"] < 0.3
        assert small["bytes_per_frame"] == small["kv_bytes"] // 18
        assert "Fits" in full["verdict"] and full["peak_bytes"] > full["kv_bytes"]
        assert ask(seconds=-1).status == 422 and ask(cache="int3").status == 422
        assert api.store.jobs() == []


def pictures(path: Path) -> list[bytes]:
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def test_a_paused_job_keeps_its_place_in_the_queue(tmp_path: Path) -> None:
    from dataclasses import replace

    with opened(tmp_path / "renders", replace(QUICK, queue=1)) as api:
        api.post(**ONE_SECOND, id="a")
        post(api, "a/pause")
        api.post(**ONE_SECOND, id="b", expect=429)
        assert api.store.get("a").state is State.PAUSED
        post(api, "a/finish")
        api.post(**ONE_SECOND, id="b")
