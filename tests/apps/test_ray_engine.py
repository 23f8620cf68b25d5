"""Jobs on a Ray cluster: the queue's promises without Ray, then a cluster of two nodes on this host."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from vidkv.apps import ray_engine
from vidkv.apps.ray_engine import Queue, RayEngine, RemoteStore
from vidkv.errors import InputError, ResourceError
from vidkv.jobs.claims import Claims
from vidkv.jobs.store import JobStore, State
from vidkv.jobs.supervisor import sole_supervisor, work_off
from vidkv.jobs.worker import Orders, Worker
from vidkv.request import EngineSettings, VideoRequest

ROOT = Path(__file__).resolve().parents[2]
CPU = EngineSettings(device="cpu")
SHORT, LONG = 1.0, 6.0
"""Seconds of video: 2 chunks, and 9."""

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'vidkv[ray]'"
)


def submit(store: JobStore, *videos: tuple[int, float]) -> list[str]:
    """Jobs of these seeds and lengths; returns their ids."""
    requests = [
        VideoRequest(id=f"v{seed}-{seconds:g}", prompt="a red circle bouncing", seed=seed, seconds=seconds)
        for seed, seconds in videos
    ]
    return [store.submit(request, CPU).id for request in requests]


def digests(store: JobStore) -> dict[str, str]:
    return {job.id: job.result["latents_sha256"] for job in store.jobs([State.DONE])}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path / "renders") as opened:
        yield opened


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the same videos, made without Ray and without a stop."""
    with JobStore(tmp_path_factory.mktemp("reference")) as store:
        submit(store, *((seed, SHORT) for seed in range(4)), (0, LONG), (1, LONG))
        work_off(store)
        return digests(store)


# ---------------------------------------------------------------------- without Ray


class Direct:
    """An actor's handle that calls it at once."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.actor, name))


class TaskError(Exception):
    pass


RAY = SimpleNamespace(
    get=lambda value: value,
    kill=lambda actor: None,
    exceptions=SimpleNamespace(RayError=TaskError, RayTaskError=TaskError),
)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of actors are calls of objects."""
    monkeypatch.setattr(ray_engine, "_import_ray", lambda: RAY)


@pytest.fixture
def queue(store: JobStore) -> Iterator[Queue]:
    opened = Queue(str(store.root), store.name)
    yield opened
    opened.store.close()


def claim_elsewhere(queue: Queue, worker: str, told: bool = True) -> Path:
    """A worker on another host takes the next job, and its claim; returns the folder."""
    offered = queue.next(worker, None)
    assert offered is not None
    job, path = offered
    claim = Claims().take(path)
    assert claim is not None
    (claim.path / "owner.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    if told:
        assert queue.holds(worker, job.id, claim.fence)
    return path


class TestQueue:
    def test_every_job_is_handed_out_once(self, store: JobStore, queue: Queue) -> None:
        ids = submit(store, (0, SHORT), (1, SHORT))
        taken = [queue.next(worker, None) for worker in ("a", "b", "c")]
        assert [offered and offered[0].id for offered in taken] == [*ids, None]
        assert [job.worker for job in store.jobs([State.RUNNING])] == ["a", "b"]
        assert queue.look_after() == {"a", "b"}

    def test_what_is_loaded_comes_first(self, store: JobStore, queue: Queue) -> None:
        submit(store, (0, SHORT))
        other = EngineSettings(device="cpu", text_weights="full")
        store.submit(VideoRequest(id="like", prompt="a red circle bouncing"), other)
        offered = queue.next("a", ray_engine.like(store.get("like")))
        assert offered is not None and offered[0].id == "like"

    def test_a_job_on_its_way_to_a_worker_stays_its_own(self, store: JobStore, queue: Queue) -> None:
        """There is no claim yet, which alone would look as if the worker had died."""
        submit(store, (0, SHORT))
        queue.next("a", None)
        queue.look_after()
        assert store.counts()[State.RUNNING] == 1

    def test_a_dead_workers_claim_is_free_at_once(self, store: JobStore, queue: Queue) -> None:
        submit(store, (0, SHORT))
        path = claim_elsewhere(queue, "a")
        assert Claims().take(path) is None
        queue.bury("a")
        assert store.counts()[State.QUEUED] == 1
        assert Claims().take(path) is not None

    def test_an_unknown_claim_waits_for_its_lease(self, store: JobStore, queue: Queue) -> None:
        """The worker died between taking it and saying so; it may as well be somebody else's."""
        submit(store, (0, SHORT))
        path = claim_elsewhere(queue, "a", told=False)
        queue.bury("a")
        queue.look_after()
        assert store.counts()[State.RUNNING] == 1
        assert Claims().take(path) is None
        queue.bookings.lease_s = 0.0
        queue.look_after()
        assert store.counts()[State.QUEUED] == 1

    def test_a_worker_that_was_taken_for_dead_is_not_heard(self, store: JobStore, queue: Queue) -> None:
        (id,) = submit(store, (0, SHORT))
        claim_elsewhere(queue, "a")
        queue.bury("a")
        assert queue.next("b", None) is not None
        version = store.get(id).version
        assert not queue.holds("a", id, 1)
        queue.report("a", id, None)  # type: ignore[arg-type]
        queue.finish("a", id, {"state": "failed", "error": "from the grave"})
        queue.put_back("a", id, "likewise", 0)
        queue.recover("a")
        job = store.get(id)
        assert (job.state, job.worker, job.version) == (State.RUNNING, "b", version)

    def test_a_job_that_was_lost_without_a_word_is_found(self, store: JobStore, queue: Queue) -> None:
        """Another host took it over and ended it; the worker asks for the next one."""
        (id,) = submit(store, (0, SHORT))
        path = claim_elsewhere(queue, "a")
        (path / "claims" / "000002").mkdir()
        queue.look_after()
        queue.recover("a")
        assert store.get(id).state is State.RUNNING
        result = {"state": "failed", "error": "elsewhere"}
        (path / "result.json").write_text(json.dumps(result))
        (path / "claims" / "000002" / "released").touch()
        queue.look_after()
        assert (store.get(id).state, store.get(id).error) == (State.FAILED, "elsewhere")

    def test_one_that_kills_its_workers_is_set_aside(self, store: JobStore, queue: Queue) -> None:
        (id,) = submit(store, (0, SHORT))
        for number in range(5):
            claim_elsewhere(queue, f"w{number}")
            queue.bury(f"w{number}")
        assert store.get(id).state is State.FAILED
        assert queue.next("again", None) is None

    def test_a_queue_that_starts_anew_knows_who_works(self, store: JobStore, queue: Queue) -> None:
        submit(store, (0, SHORT), (1, SHORT))
        offered = queue.next("a", None)
        assert offered is not None
        claim = Claims().take(offered[1])
        assert claim is not None
        with JobStore(store.root) as _:
            again = Queue(str(store.root), store.name)
            again.look_after()
            assert [job.worker for job in store.jobs([State.RUNNING])] == ["a"]
            following = again.next("b", None)
            assert following is not None and following[0].id != offered[0].id
            again.store.close()


@pytest.mark.usefixtures("no_ray")
class TestWorkerOverQueue:
    def worker(self, store: JobStore, queue: Queue, retries: int = 2) -> Worker:
        orders = Orders(store.root, store.name, "here", retries=retries)
        with sole_supervisor(store):
            remote: Any = RemoteStore(Direct(queue), orders)
        return Worker(remote, orders)

    def test_does_all_jobs(self, store: JobStore, queue: Queue, wanted: dict[str, str]) -> None:
        ids = submit(store, (0, SHORT), (1, SHORT))
        self.worker(store, queue).work()
        assert digests(store) == {id: wanted[id] for id in ids}
        assert not queue.bookings.fences
        assert all(job.done == job.chunks and job.progress for job in store.jobs())

    def test_leaves_what_somebody_else_has(self, store: JobStore, queue: Queue) -> None:
        """Taken between the queue's look and the worker's claim."""
        (id,) = submit(store, (0, SHORT))
        worker = self.worker(store, queue)
        taken: list[Any] = []
        original = queue.next

        def late(*arguments: Any) -> Any:
            offered = original(*arguments)
            taken.append(Claims().take(store.folder(store.get(id)).path))
            return offered

        queue.next = late  # type: ignore[method-assign]
        assert worker.store.claim_next("here", lambda job: False) is None
        assert taken[0] is not None
        assert store.get(id).state is State.QUEUED
        taken[0].release()
        queue.next = original  # type: ignore[method-assign]
        assert worker.store.claim_next("here", lambda job: False) is not None

    def test_does_not_repeat_what_has_ended_meanwhile(self, store: JobStore, queue: Queue) -> None:
        (id,) = submit(store, (0, SHORT))
        worker = self.worker(store, queue)
        original = queue.next

        def late(*arguments: Any) -> Any:
            offered = original(*arguments)
            if offered:
                store.folder(store.get(id)).end({"state": "failed", "error": "elsewhere"})
            return offered

        queue.next = late  # type: ignore[method-assign]
        worker.work()
        assert store.get(id).error == "elsewhere"
        assert store.get(id).progress == {}

    def test_a_folder_that_cannot_be_claimed_counts_as_an_attempt(
        self, store: JobStore, queue: Queue
    ) -> None:
        (id,) = submit(store, (0, SHORT))
        worker = self.worker(store, queue, retries=0)
        claims = store.folder(store.get(id)).path / "claims"
        original = queue.next

        def late(*arguments: Any) -> Any:
            offered = original(*arguments)
            if offered:
                claims.write_text("no folder")
            return offered

        queue.next = late  # type: ignore[method-assign]
        worker.store.claim_next("here", lambda job: False)
        assert store.get(id).state is State.FAILED
        assert "claim" in str(store.get(id).error)

    def test_a_host_without_the_storage_says_so(self, tmp_path: Path, queue: Queue) -> None:
        with pytest.raises(InputError, match=r"does not see .*elsewhere.*share"):
            RemoteStore(Direct(queue), Orders(tmp_path / "elsewhere", "jobs", "here"))


class TestArguments:
    def test_without_ray(self, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(InputError, match=r"pip install 'vidkv\[ray\]'"):
            RayEngine(store)

    def test_a_client_address(self, store: JobStore) -> None:
        with pytest.raises(InputError, match=r"ray://head:10001.*ray job submit"):
            RayEngine(store, address="ray://head:10001")

    def test_no_actors(self, store: JobStore) -> None:
        with pytest.raises(InputError, match="actors=0"):
            RayEngine(store, actors=0)


@pytest.mark.usefixtures("no_ray")
class TestDecisions:
    def test_jobs_planned_without_a_gpu_do_not_go_to_gpus(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        submit(store, (0, SHORT))
        engine = RayEngine(store)
        assert engine._on_gpus({"GPU": 2.0}) is False
        store.submit(VideoRequest(id="auto", prompt="a red circle bouncing"))
        assert engine._on_gpus({"CPU": 2.0}) is False
        with pytest.raises(InputError, match=r"none.*--device cpu"):
            engine._on_gpus({"GPU": 2.0})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert engine._on_gpus({"GPU": 2.0}) is True

    def test_gives_up_when_no_actor_gets_to_work(
        self, store: JobStore, queue: Queue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = RayEngine(store, actors=2)
        engine.queue, engine._gpus = Direct(queue), False
        monkeypatch.setattr(RAY, "cluster_resources", lambda: {"CPU": 2.0}, raising=False)
        for number in range(2):
            engine.actors[f"a{number}"] = None, None
            engine._bury(f"a{number}", InputError("does not see it"))
        assert engine._wait_until > time.monotonic()
        engine.actors = {"a2": (None, None), "busy": (None, None)}
        engine._took = {"busy"}
        engine._bury("a2", InputError("does not see it"))
        engine.actors = {"a3": (None, None)}
        with pytest.raises(ResourceError, match=r"4 Ray actors.*does not see it"):
            engine._bury("a3", InputError("does not see it"))


# ---------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each on this host, of which the second may be removed."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
        made = Cluster(initialize_head=True, head_node_args=node | {"_system_config": quick})
        try:
            made.second = made.add_node(**node)
            ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            made.wait_for_nodes()
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def render(store: JobStore, between: Callable[[], None] = lambda: None) -> tuple[set[str], int]:
    """All jobs on the cluster; returns the workers that had one, and how many were started."""
    workers = set()
    deadline = time.monotonic() + 120
    with RayEngine(store) as engine:
        while engine.step():
            assert time.monotonic() < deadline, [(j.id, j.state, j.done, j.error) for j in store.jobs()]
            workers |= {job.worker for job in store.jobs([State.RUNNING]) if job.worker}
            between()
        return workers, engine.started


def owner(store: JobStore, id: str) -> psutil.Process | None:
    """The process that holds a job's claim."""
    for path in store.folder(store.get(id)).path.glob("claims/*/owner.json"):
        return psutil.Process(json.loads(path.read_text())["pid"])
    return None


def under_way(store: JobStore, chunks: int) -> bool:
    """All jobs run and have so many chunks."""
    return all(job.state is State.RUNNING and job.done >= chunks for job in store.jobs())


def require_resumed(store: JobStore, wanted: dict[str, str], ids: list[str], resumed: list[str]) -> None:
    """All are done and equal to what an uninterrupted run makes, and these did not begin anew."""
    assert digests(store) == {id: wanted[id] for id in ids}
    for id in ids:
        job = store.get(id)
        assert bool(job.result["resumed_at"]) is (id in resumed), job
        assert (store.root / job.out).is_file()
    assert not list(store.root.glob("*.partial.mp4"))


@needs_ray
@pytest.mark.slow
class TestCluster:
    def test_jobs_over_two_actors(self, cluster: Any, store: JobStore, wanted: dict[str, str]) -> None:
        ids = submit(store, *((seed, SHORT) for seed in range(4)))
        workers, started = render(store)
        assert digests(store) == {id: wanted[id] for id in ids}
        assert len(workers) == started == 2
        assert store.counts()[State.DONE] == 4

    def test_a_killed_actors_job_goes_on_elsewhere(
        self, cluster: Any, store: JobStore, wanted: dict[str, str]
    ) -> None:
        ids = submit(store, (0, LONG), (1, LONG))
        killed = list[psutil.Process]()

        def kill_one() -> None:
            if not killed and under_way(store, 2) and (process := owner(store, ids[0])):
                process.kill()
                killed.append(process)

        _, started = render(store, kill_one)
        assert killed
        assert started == 3
        require_resumed(store, wanted, ids, ids[:1])

    def test_a_stopped_driver_gives_its_jobs_back(
        self, cluster: Any, store: JobStore, wanted: dict[str, str]
    ) -> None:
        ids = submit(store, (0, LONG), (1, LONG))
        script = (
            "import signal, sys\n"
            "from vidkv.apps.ray_engine import RayEngine\n"
            "from vidkv.jobs.store import JobStore\n"
            "caught = []\n"
            "signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))\n"
            "with JobStore(sys.argv[1]) as store, RayEngine(store, address=sys.argv[2]) as engine:\n"
            "    while not caught and engine.step():\n"
            "        pass\n"
            "sys.exit(128 + caught[0] if caught else 0)\n"
        )
        command = [sys.executable, "-c", script, str(store.root), cluster.address]
        driver = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
        try:
            deadline = time.monotonic() + 120
            while not under_way(store, 2):
                assert time.monotonic() < deadline and driver.poll() is None
                time.sleep(0.05)
            holders = [owner(store, id) for id in ids]
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(10) == 128 + signal.SIGTERM
        finally:
            driver.kill()
            driver.wait()
        assert [job.state for job in store.jobs()] == [State.QUEUED] * 2
        # they stopped by themselves: a killed one leaves no playable part
        assert all((store.root / f"{id}.partial.mp4").is_file() for id in ids)
        psutil.wait_procs([process for process in holders if process], timeout=10)
        assert not any(process and process.is_running() for process in holders)
        work_off(store)
        require_resumed(store, wanted, ids, ids)

    def test_a_lost_nodes_job_goes_on_elsewhere(
        self, cluster: Any, store: JobStore, wanted: dict[str, str]
    ) -> None:
        """The last one: what is left has one CPU."""
        ids = submit(store, (0, LONG), (1, LONG))
        raylet = cluster.second.all_processes["raylet"][0].process.pid
        lost = list[str]()

        def remove_node() -> None:
            if not lost and under_way(store, 2):
                holders = {id: owner(store, id) for id in ids}
                lost.extend(id for id, process in holders.items() if process and process.ppid() == raylet)
                cluster.remove_node(cluster.second, allow_graceful=False)

        render(store, remove_node)
        assert len(lost) == 1
        require_resumed(store, wanted, ids, lost)
