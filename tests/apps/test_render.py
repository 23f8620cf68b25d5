"""`vidkv render` and `vidkv jobs`: from a manifest to finished files, and what may be wrong with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.apps.commandline import run
from tests.tiny import HEIGHT, WIDTH, build_pipeline
from vidkv.jobs.store import JobStore
from vidkv.segments import probe, read_metadata

PROMPT = "a red circle bouncing"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def manifest(tmp_path: Path, model: str) -> Callable[..., Path]:
    def write(*lines: dict[str, Any], name: str = "jobs.jsonl") -> Path:
        common = {"prompt": PROMPT, "model": model, "height": HEIGHT, "width": WIDTH, "seconds": 1}
        path = tmp_path / name
        path.write_text("".join(json.dumps(common | line) + "\n" for line in lines))
        return path

    return write


class TestRender:
    def test_finished_files_and_a_report(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, manifest: Callable[..., Path]
    ) -> None:
        path = manifest({"id": "a"}, {"seed": 1}, {"id": "c", "out": "sub/c.mp4"})
        out = tmp_path / "renders"
        code, stdout, _ = run(capsys, "render", str(path), "--out", str(out), "--devices", "cpu", "--json")
        report = json.loads(stdout)
        assert code == 0 and report["counts"]["done"] == 3
        unnamed = next(job["id"] for job in report["jobs"] if job["id"] not in ("a", "c"))
        for file in (out / "a.mp4", out / f"{unnamed}.mp4", out / "sub/c.mp4"):
            assert probe(file).frames == 16
        assert (out / "index.html").read_text().startswith("<!doctype html>")
        made = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
        # again: nothing is made a second time
        code, stdout, _ = run(capsys, "render", str(path), "--out", str(out), "--devices", "cpu", "--json")
        assert code == 0 and json.loads(stdout)["counts"]["done"] == 3
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == made
        code, stdout, _ = run(capsys, "jobs", str(out), "--json")
        assert [job["state"] for job in json.loads(stdout)["jobs"]] == ["done"] * 3

    @pytest.mark.slow
    def test_by_turns_they_are_the_same_videos(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, manifest: Callable[..., Path]
    ) -> None:
        """And begin together, with beginnings in common."""
        later = {"schedule": [[1, "a blue square resting"]], "seconds": 2}
        path, found = manifest({"id": "a"}, {"id": "b", "seed": 1}, later | {"id": "c"}), []
        for turns in ((), ("--concurrent", "3", "--share", "0.1")):
            out = tmp_path / f"renders{len(turns)}"
            assert run(capsys, "render", str(path), "--out", str(out), "--devices", "cpu", *turns)[0] == 0
            with JobStore(out) as store:
                found.append([store.get(id).result["latents_sha256"] for id in "abc"])
        assert found[0] == found[1] and len(set(found[0])) == 3

    def test_another_request_under_a_known_id(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, manifest: Callable[..., Path]
    ) -> None:
        out = tmp_path / "renders"
        assert (
            run(capsys, "render", str(manifest({"id": "a"})), "--out", str(out), "--devices", "cpu")[0] == 0
        )
        code, _, stderr = run(
            capsys, "render", str(manifest({"id": "a", "seed": 5})), "--out", str(out), "--devices", "cpu"
        )
        assert code == 2 and "id 'a' was rendered or queued with other settings" in stderr
        assert read_metadata(out / "a.mp4")["seed"] == "0"

    def test_shards_share_the_work(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, manifest: Callable[..., Path]
    ) -> None:
        path, out = manifest(*({"id": f"v{seed}", "seed": seed} for seed in range(5))), tmp_path / "renders"
        shares = []
        for index in range(2):
            arguments = ("--devices", "cpu", "--shard", f"{index}/2", "--json")
            code, stdout, _ = run(capsys, "render", str(path), "--out", str(out), *arguments)
            assert code == 0
            shares.append({job["id"] for job in json.loads(stdout)["jobs"]})
        assert not shares[0] & shares[1] and shares[0] | shares[1] == {f"v{seed}" for seed in range(5)}
        assert sorted(path.name for path in out.glob("*.mp4")) == [f"v{seed}.mp4" for seed in range(5)]

    def test_a_dry_run_makes_nothing(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, manifest: Callable[..., Path]
    ) -> None:
        out = tmp_path / "renders"
        code, stdout, _ = run(
            capsys,
            "render",
            str(manifest({"id": "a"})),
            "--out",
            str(out),
            "--devices",
            "cpu",
            "--dry-run",
            "--json",
        )
        plan = json.loads(stdout)
        assert code == 0 and plan["total"]["to_make"] == 1 and plan["total"]["frames"] == 16
        assert plan["jobs"][0]["id"] == "a" and plan["jobs"][0]["need_bytes"] > 0
        assert not list(out.rglob("*.mp4"))

    def test_the_schema(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, stdout, _ = run(capsys, "render", "--schema")
        schema = json.loads(stdout)
        assert code == 0 and schema["required"] == ["prompt"]
        fields = "id prompt schedule seed seconds model width height cache image video out"
        assert set(fields.split()) <= set(schema["properties"])


class TestMistakes:
    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([{"seconds": -3}], "jobs.jsonl:1: seconds=-3: input should be greater than 0"),
            ([{}, {"id": "../x"}], "jobs.jsonl:2: id='../x': use 1 to 80"),
            ([{}, {}], "jobs.jsonl:2: id "),
            ([{"id": "a"}, {"id": "A"}], "jobs.jsonl:2: id='A'"),
            ([{"prompt": "a red elephant"}], "jobs.jsonl:1: unknown word 'elephant'"),
            ([{"cache": "int8,window=2"}], "jobs.jsonl:1: "),
            ([{"model": "no-such-model"}], "jobs.jsonl:1: unknown model 'no-such-model'"),
            ([{"schedule": [[50, PROMPT]]}], "jobs.jsonl:1: the prompt at second 50 would never be shown"),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    def test_name_file_line_field_and_value(
        self,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        manifest: Callable[..., Path],
        lines: list[dict[str, Any]],
        message: str,
    ) -> None:
        out = tmp_path / "renders"
        code, stdout, stderr = run(
            capsys, "render", str(manifest(*lines)), "--out", str(out), "--devices", "cpu"
        )
        assert (code, stdout) == (2, "") and message in stderr and "Traceback" not in stderr
        assert not out.exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "name a manifest"),
            (("nowhere.jsonl",), "nowhere.jsonl"),
            (("MANIFEST", "--resume", "exactly"), "--resume 'exactly'; choose exact or light"),
            (("MANIFEST", "--engine", "spark"), "--engine 'spark'; choose local or ray"),
            (("MANIFEST", "--devices", "7"), "devices='7': torch sees"),
            (("MANIFEST", "--devices", "tpu"), "devices='tpu'"),
            (("MANIFEST", "--shard", "3/2"), "shard=3/2"),
            (("MANIFEST", "--engine", "ray", "--devices", "cpu"), "Ray chooses them"),
            (("MANIFEST", "--engine", "ray", "--concurrent", "2"), "a Ray actor makes one video at a time"),
            (("MANIFEST", "--checkpoint-every", "0"), "--checkpoint-every 0"),
            (("MANIFEST", "--weights", "int3"), "weights='int3'"),
            (("MANIFEST", "--concurrent", "0"), "concurrent"),
            (("MANIFEST", "--share", "-1"), "--share -1.0: give gigabytes"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
    )
    def test_in_arguments(
        self,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        manifest: Callable[..., Path],
        arguments: tuple[str, ...],
        message: str,
    ) -> None:
        path = str(manifest({}))
        given = [path if argument == "MANIFEST" else argument for argument in arguments]
        code, stdout, stderr = run(capsys, "render", *given, "--out", str(tmp_path / "renders"))
        assert (code, stdout) == (2, "") and message in stderr and "Traceback" not in stderr

    def test_a_folder_without_jobs(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        code, _, stderr = run(capsys, "jobs", str(tmp_path))
        assert code == 2 and "holds no jobs" in stderr

    def test_served_by_turns(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(
            "vidkv.apps.serve.serve", lambda *args, **options: seen.append(options["options"]) or 0
        )
        arguments = ("serve", "--out", str(tmp_path), "--devices", "cpu")
        run(capsys, *arguments)
        run(capsys, *arguments, "--concurrent", "4", "--share", "0.5")
        assert [(o.concurrent, o.shared_bytes) for o in seen] == [(1, 0), (4, 500_000_000)]

    def test_serving_everybody_without_a_token(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        code, _, stderr = run(
            capsys, "serve", "--host", "0.0.0.0", "--out", str(tmp_path), "--devices", "cpu", "--port", "0"
        )
        assert code == 2 and "token" in stderr


def test_jobs_are_cancelled_retried_and_deleted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, manifest: Callable[..., Path]
) -> None:
    out = tmp_path / "renders"
    from vidkv.manifest import read_manifest

    with JobStore(out) as store:
        for entry in read_manifest(manifest({"id": "a"}, {"id": "b"})):
            store.submit(entry.request)

    def states(*arguments: str) -> dict[str, str]:
        code, stdout, _ = run(capsys, "jobs", str(out), *arguments, "--json")
        assert code == 0
        return {job["id"]: job["state"] for job in json.loads(stdout)["jobs"]}

    assert states("--cancel", "a") == {"a": "cancelled", "b": "queued"}
    assert states("--retry", "a") == {"a": "queued", "b": "queued"}
    assert states("--delete", "b") == {"a": "queued"}
    assert run(capsys, "jobs", str(out), "--cancel", "nobody")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on(
    tmp_path: Path, manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    path, out = manifest({"id": "a", "seconds": 30}, {"id": "b"}), tmp_path / "renders"
    command = [sys.executable, "-P", "-m", "vidkv.apps.cli", "render", str(path), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--devices", "cpu"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(".vidkv/jobs/a-*/records/*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "run the same command again to go on" in stderr
    assert read_metadata(out / "a.partial.mp4")["partial"] == "true"
    with JobStore(out) as store:
        done = store.get("a").done
        assert store.get("a").state == "queued" and probe(out / "a.partial.mp4").frames >= 9
    code, stdout, _ = run(capsys, "render", str(path), "--out", str(out), "--devices", "cpu", "--json")
    report = json.loads(stdout)
    assert code == 0 and report["counts"]["done"] == 2
    assert next(job["resumed_at"] for job in report["jobs"] if job["id"] == "a") >= done > 0
    assert probe(out / "a.mp4").frames == 480 and not (out / "a.partial.mp4").exists()
