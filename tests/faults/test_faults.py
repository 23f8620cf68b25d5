"""Every campaign of faults at the size that a change must pass: `make faults`.

Counts are written to `build/faults.json`; `python -m tests.faults.soak --table --file build/faults.json`
shows them.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.campaigns import CAMPAIGNS
from tests.faults.oracle import Counts, prepare
from tests.faults.soak import ROOT, machine, merge, read, table
from vidkv.files import write_json

RECORD = ROOT / "build" / "faults.json"
SEED = 1

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes of this run, with what campaigns compare with."""
    # before any worker is started: they share cores with one another
    os.environ["OMP_NUM_THREADS"] = "1"
    base = tmp_path_factory.getbasetemp()
    common = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults"
    common.mkdir(exist_ok=True)
    with locked(common / "lock"):
        prepare(common)
    return common


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def note(name: str, counts: Counts) -> None:
    """Put a campaign's counts in place of those of the run before."""
    with locked(RECORD.with_suffix(".lock")):
        record = read(RECORD)
        record["machines"] = [machine()]
        record["campaigns"].pop(name, None)
        merge(record, name, dataclasses.asdict(counts))
        write_json(RECORD, record)


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_campaign(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = CAMPAIGNS[name]
    counts = campaign.run(campaign.check, SEED, folder)
    note(name, counts)
    with capsys.disabled():
        for figure, values in counts.figures.items():
            if figure.endswith("_s"):
                found = f"median {statistics.median(values):.3f} s, at most {max(values):.3f} s"
                print(f"\n{name}: {figure.removesuffix('_s')} {found} of {len(values)}")
    assert counts.clean, counts
    assert counts.injections >= campaign.check


class TestOracle:
    """What the campaigns rely on can tell right from wrong."""

    def test_a_repeated_a_missing_and_another_frame_are_seen(self, tmp_path: Path) -> None:
        import numpy as np

        from tests.faults.oracle import Reference, check_video, pictures
        from vidkv.segments import encode_segment, write_video

        frames = np.zeros((6, 32, 32, 3), np.uint8)
        for number, frame in enumerate(frames):
            frame[number * 4 : number * 4 + 4] = 255
        files = {}
        for name, order in {
            "whole": [0, 1, 2, 3, 4, 5],
            "repeated": [0, 1, 1, 2, 3, 4, 5],
            "missing": [0, 1, 2, 4, 5],
            "swapped": [0, 2, 1, 3, 4, 5],
        }.items():
            # lossless enough that equal pictures are equal bytes: every frame is a segment of its own
            parts = []
            for at, number in enumerate(order):
                part = tmp_path / f"{name}{at}.ts"
                part.write_bytes(encode_segment(frames[number : number + 1], 16, first_frame=at))
                parts.append(part)
            files[name] = tmp_path / f"{name}.mp4"
            write_video(parts, files[name], 16, {})
        reference = Reference("", tuple(pictures(files["whole"])))
        found = {}
        for name, path in files.items():
            counts = Counts()
            check_video(path, reference, counts)
            found[name] = (counts.duplicated, counts.differing)
        assert found == {"whole": (0, 0), "repeated": (1, 0), "missing": (0, 1), "swapped": (0, 1)}
        cut, counts = tmp_path / "cut.mp4", Counts()
        cut.write_bytes(files["whole"].read_bytes()[:-200])
        check_video(cut, reference, counts)
        assert not counts.clean

    def test_a_table_adds_up(self) -> None:
        record = {"campaigns": {}, "machines": []}
        for lost in (0, 2):
            counts = Counts(injections=5, lost=lost, failures=["gone"] * lost)
            merge(record, "cancel", dataclasses.asdict(counts))
        assert "| cancel | 10 | 2 | 0 | 0 | 0 | 2 |" in table(record)
