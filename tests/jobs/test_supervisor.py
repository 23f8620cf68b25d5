"""Worker processes: picked, started, killed, restarted, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.tiny import HEIGHT, WIDTH, build_pipeline
from vidkv.errors import InputError, OutputError, ResourceError
from vidkv.jobs import supervisor as supervisor_module
from vidkv.jobs.checkpoints import Interval
from vidkv.jobs.run import Options
from vidkv.jobs.store import JobStore, State
from vidkv.jobs.supervisor import MAX_FALSE_STARTS, Supervisor, pick_devices, sole_supervisor, work_off
from vidkv.jobs.worker import Orders
from vidkv.request import EngineSettings, VideoRequest
from vidkv.segments import probe

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

ROOT = Path(__file__).parents[2]
CPU = EngineSettings(device="cpu")


def die(orders: Orders) -> None:
    """A worker that cannot start."""
    os._exit(3)


def linger(orders: Orders) -> None:
    """A worker that does not listen."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (orders.root / "listening").touch()
    time.sleep(600)


def until(condition: Callable[[], Any], supervisor: Supervisor | None = None, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it took too long"
        supervisor.step() if supervisor else time.sleep(0.02)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path / "renders") as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights: a chunk takes milliseconds."""
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return str(folder)


def tiny(model: str, id: str, seconds: float = 2, seed: int = 0) -> VideoRequest:
    return VideoRequest(
        id=id,
        prompt="a red circle bouncing",
        model=model,
        seconds=seconds,
        seed=seed,
        height=HEIGHT,
        width=WIDTH,
    )


class TestDevices:
    @pytest.fixture(autouse=True)
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        def have(number: int) -> None:
            monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

        have(3)
        return have

    @pytest.mark.parametrize(
        ("wanted", "found"),
        [
            ("auto", ["cuda:0", "cuda:1", "cuda:2"]),
            ("cpu", ["cpu"]),
            ("cpu:3", ["cpu"] * 3),
            ("2", ["cuda:2"]),
            ("0,2", ["cuda:0", "cuda:2"]),
            ("cuda:1, 0", ["cuda:1", "cuda:0"]),
        ],
    )
    def test_by_name(self, wanted: str, found: list[str]) -> None:
        assert pick_devices(wanted) == found

    def test_auto_without_a_gpu_is_the_cpu(self, gpus: Callable[[int], None]) -> None:
        gpus(0)
        assert pick_devices("auto") == ["cpu"]
        with pytest.raises(InputError, match="torch sees 0 GPUs here, none numbered 0"):
            pick_devices("0")

    @pytest.mark.parametrize(
        "wanted",
        ["", "gpu", "cpu:0", "cpu:-1", "cpu:100", "cpu:", "0,0", "0,", "1.5", "cpu,0", "0;1", "x" * 900],
    )
    def test_refuses_what_it_does_not_know(self, wanted: str) -> None:
        if wanted == "cpu:":
            assert pick_devices(wanted) == ["cpu"]
            return
        with pytest.raises(InputError, match="devices=") as caught:
            pick_devices(wanted)
        assert len(str(caught.value)) < 200

    def test_names_the_gpu_that_is_not_here(self) -> None:
        with pytest.raises(InputError, match="torch sees 3 GPUs here, none numbered 7"):
            pick_devices("0,7")


class TestSole:
    def test_refuses_a_second_of_one_index(self, store: JobStore) -> None:
        with sole_supervisor(store):
            with pytest.raises(OutputError, match="another vidkv is rendering"), sole_supervisor(store):
                pass
            with pytest.raises(OutputError, match="another vidkv"):
                work_off(store)
            with pytest.raises(OutputError, match="another vidkv"), Supervisor(store):
                pass
            with JobStore(store.root, "host2") as other, sole_supervisor(other):
                pass
        with sole_supervisor(store):
            pass

    def test_dies_with_its_process(self, store: JobStore) -> None:
        child = os.fork()
        if not child:
            sole_supervisor(store).__enter__()
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        with sole_supervisor(store):
            pass


class TestWorkers:
    @pytest.mark.slow
    def test_one_that_is_killed_is_replaced_and_its_job_goes_on_to_the_same_end(
        self, store: JobStore, tmp_path: Path, quick_bounce: Path
    ) -> None:
        """The embedded networks, 32 frames, killed after the first chunk and after the second."""
        options = Options(interval=Interval(0.0, 1e12, 1e9))
        request = VideoRequest(id="a", prompt="a red circle bouncing", seconds=2, model=str(quick_bounce))
        with JobStore(tmp_path / "whole") as whole:
            whole.submit(request, CPU)
            work_off(whole, options)
            wanted = whole.get("a").result
        store.submit(request, CPU)
        with Supervisor(store, options=options) as supervisor:
            for chunk in (1, 2):
                until(lambda chunk=chunk: store.get("a").done >= chunk, supervisor)
                os.kill(supervisor.workers["worker0"].pid or 0, signal.SIGKILL)
            while supervisor.step():
                pass
        job = store.get("a")
        assert job.state is State.DONE
        assert job.result["latents_sha256"] == wanted["latents_sha256"]
        assert probe(store.file(job)).frames == wanted["frames"] == 32
        assert sorted(os.listdir(store.root)) == [".vidkv", "a.mp4"]

    def test_two_share_the_jobs_and_stop_when_told(self, store: JobStore, model: str) -> None:
        for i in range(4):
            store.submit(tiny(model, f"j{i}", seed=i), CPU)
        store.submit(tiny(model, "long", seconds=3000), CPU)
        with Supervisor(store, ["cpu", "cpu"]) as supervisor:
            assert [orders.threads for orders in supervisor.orders] == [
                max(1, (os.cpu_count() or 1) // 2)
            ] * 2
            until(lambda: store.counts()[State.DONE] == 4 and store.get("long").done > 1, supervisor)
            workers = [process.pid for process in supervisor.workers.values()]
            begun = time.monotonic()
        assert time.monotonic() - begun < 10
        assert not any(pid and psutil.pid_exists(pid) for pid in workers)
        job = store.get("long")
        assert (job.state, job.crashes, job.attempts) == (State.QUEUED, 0, 0)
        assert probe(store.root / "long.partial.mp4").frames >= 9
        store.cancel("long")

    def test_that_cannot_start_are_given_up(self, store: JobStore, model: str, monkeypatch: Any) -> None:
        monkeypatch.setattr(supervisor_module, "process_main", die)
        # the new process must find this module
        monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
        store.submit(tiny(model, "a"), CPU)
        with pytest.raises(
            ResourceError, match=rf"worker0 has died {MAX_FALSE_STARTS} times \(exit code 3\)"
        ):
            with Supervisor(store) as supervisor:
                for _ in range(200):
                    supervisor.step()
        assert store.get("a").state is State.QUEUED

    def test_false_starts_are_forgotten_once_it_has_a_job(
        self, store: JobStore, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.submit(tiny(model, "a"), CPU)
        supervisor = Supervisor(store)
        supervisor.false_starts["worker0"] = MAX_FALSE_STARTS - 1
        monkeypatch.setattr(supervisor, "_start", lambda orders: None)
        taken = store.claim_next("worker0")
        assert taken is not None and supervisor.step()
        assert supervisor.false_starts == {"worker0": 0}

    def test_that_do_not_listen_are_killed(
        self, store: JobStore, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor_module, "process_main", linger)
        # the new process must find this module
        monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
        monkeypatch.setattr(supervisor_module, "STOP_S", 0.2)
        store.submit(tiny(model, "a"), CPU)
        with Supervisor(store) as supervisor:
            until((store.root / "listening").exists, supervisor)
            pid = supervisor.workers["worker0"].pid or 0
            assert psutil.pid_exists(pid)
        assert not psutil.pid_exists(pid)

    def test_nothing_to_do_starts_nothing(self, store: JobStore) -> None:
        with Supervisor(store) as supervisor:
            assert not supervisor.step() and supervisor.workers == {}


@pytest.mark.slow
def test_workers_of_a_supervisor_that_was_killed_end_by_themselves(
    store: JobStore, model: str, tmp_path: Path
) -> None:
    """And what they had is there for the next one, whatever moment it was."""
    store.submit(tiny(model, "a", seconds=3000), CPU)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from vidkv.jobs.store import JobStore
            from vidkv.jobs.supervisor import Supervisor

            if __name__ == "__main__":
                store = JobStore({str(store.root)!r})
                with Supervisor(store) as supervisor:
                    while supervisor.step():
                        print(supervisor.workers["worker0"].pid, flush=True)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        until(lambda: store.get("a").done > 1, limit_s=200)
        process.kill()
    until(lambda: not psutil.pid_exists(pid), limit_s=20)
    with sole_supervisor(store):
        store.recover()
    job = store.get("a")
    assert job.state is State.QUEUED and job.done > 1
    taken = store.claim_next("next")
    assert taken is not None and taken[1].fence == 2
