"""`vidkv bench rollout`: whose time and memory it measures, and that decoding is part of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.apps.commandline import run
from tests.tiny import build_pipeline
from vidkv.apps import bench
from vidkv.errors import VidkvError
from vidkv.rollout import ChunkStats

STATS = ChunkStats(0.1, 0.1, 0.1, 1000, 10, 18, 540, 540)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights: a chunk takes milliseconds."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_pipeline().save_pretrained(folder)
    return str(folder)


def test_a_chunk_is_measured_in_cpu_time_and_with_its_decoding() -> None:
    """Sleeping takes wall time and no CPU time."""
    rollout = bench._start("bounce", "int8", "cpu")
    assert rollout.decoder is not None
    assert rollout.cache.spec.format == "int8"

    def step_chunk() -> Any:
        time.sleep(0.2)
        return SimpleNamespace(stats=STATS)

    rollout_like: Any = SimpleNamespace(step_chunk=step_chunk)
    sample = bench._sample(rollout_like, "cpu")
    assert sample.stats == STATS
    assert sample.seconds < 0.1
    assert sample.resident > 0


def test_a_slope_belongs_to_the_format_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes are stood in for: one grows by a kilobyte per chunk, the other does not."""

    class End:
        def __init__(self, growth: int) -> None:
            self.growth, self.chunk = growth, 0

        def send(self, _: str) -> None:
            self.chunk += 1

        def recv(self) -> bench.Sample:
            resident = 10**6 + self.growth * self.chunk
            return bench.Sample(replace(STATS, kv_bytes=100), 0.5, resident, resident)

    @contextmanager
    def processes(*_: Any) -> Iterator[dict[str, End]]:
        yield {"fp32": End(0), "int8": End(1024)}

    monkeypatch.setattr(bench, "_processes", processes)
    report = bench.rollout_report("bounce", ["fp32", "int8"], 60, "cpu", lambda *_: None)
    slopes = {name: row["rss_slope_bytes_per_1000_chunks"] for name, row in report["formats"].items()}
    assert slopes == {"fp32": 0, "int8": 1_024_000}
    assert report["rss_slope_bytes_per_1000_chunks"] == 1_024_000
    assert report["rss_peak_bytes"] == report["formats"]["int8"]["rss_peak_bytes"] == 10**6 + 60 * 1024
    assert "int8" in bench.table(report)


def test_every_format_has_a_process_of_its_own(model: str) -> None:
    with bench._processes(model, ["fp32", "int8"], "cpu") as ends:
        for name, lossy in (("fp32", 0), ("int8", 1)):
            for _ in range(2):
                ends[name].send("chunk")
                sample = bench._answer(name, ends[name])
            assert bool(sample.stats.lossy_pages_read) == bool(lossy)
            assert sample.seconds > 0
    with pytest.raises(VidkvError, match="the process that rolled out int8 has ended"):
        bench._answer("int8", ends["int8"])


def test_what_a_process_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--formats", "int7"), "cache format 'int7' is unknown"),
        (("--model", "nobody", "--formats", "fp32"), "unknown model 'nobody'"),
    ):
        code, stdout, stderr = run(capsys, "bench", "rollout", "--chunks", "60", *arguments, "--json")
        assert (code, stdout) == (2, "")
        assert message in stderr
        assert "Traceback" not in stderr


def test_the_report_counts_exactly(capsys: pytest.CaptureFixture[str], model: str) -> None:
    formats = ("--formats", "fp32,int8")
    code, stdout, stderr = run(
        capsys, "bench", "rollout", "--model", model, "--chunks", "60", *formats, "--device", "cpu", "--json"
    )
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["time"] == "process CPU seconds"
    for name, row in report["formats"].items():
        assert row["kv_bytes_constant"], name
        assert row["pages_read_constant"], name
        # 18 pages of 2 layers in 2 denoising steps and the clean pass
        assert row["pages_read_per_chunk"] == 18 * 2 * 3
        assert row["rss_peak_bytes"] > row["kv_bytes"]
    assert report["formats"]["fp32"]["lossy_pages_read_per_chunk"] == 0
    assert report["formats"]["int8"]["lossy_pages_read_per_chunk"] == 18 * 2 * 3
    assert report["formats"]["int8"]["kv_bytes"] < 0.3 * report["formats"]["fp32"]["kv_bytes"]
