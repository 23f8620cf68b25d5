"""Every example is run as its docstring says, for a few seconds of video, and what it leaves is looked at."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidkv.jobs.store import JobStore, State
from vidkv.segments import probe, read_metadata

EXAMPLES = Path(__file__).resolve().parents[2] / "apps" / "examples"
DEADLINE_S = 300


Run = Callable[..., str]

# of the shipped model as it is: `test_a_stream_is_saved_and_its_prompt_has_changed`
pytestmark = pytest.mark.usefixtures("short_first_chunk")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What an example prints that is run elsewhere, in this process: another one takes long to begin."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_a_stream_is_saved_and_its_prompt_has_changed(tmp_path: Path) -> None:
    """In a process of its own, as people run it."""
    command = [sys.executable, str(EXAMPLES / "stream.py"), "--seconds", "4", "--out", "a.mp4"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout
    lines = said.splitlines()
    # 9 frames, then 12 each, of 64
    assert len(lines) == 7 and all(line.startswith(f"chunk {i}: ") for i, line in enumerate(lines[:-1]))
    resident = [int(found[1]) for found in re.finditer(r"(\d+) latent frames", said)]
    assert resident == [3, 6, 9, 12, 15, 18] and said.count("a cache of 0.92 MB") == 6
    video = probe(tmp_path / "a.mp4")
    assert (video.frames, video.fps, video.width) == (64, 16, 64) and "64 frames, 4 s" in lines[-1]
    assert "turns yellow" in read_metadata(tmp_path / "a.mp4")["prompts"]
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.slow
def test_a_batch_is_made_and_not_made_again(tmp_path: Path, run: Run) -> None:
    arguments = ("--seconds", "1", "--seeds", "4", "5", "--out", "renders")
    said = run("batch.py", *arguments)
    for seed in (4, 5):
        assert f"seed-{seed}: done, 2 of 2 chunks" in said
        assert probe(tmp_path / "renders" / f"seed-{seed}.mp4").frames == 16
    with JobStore(tmp_path / "renders") as store:
        jobs = store.jobs()
        assert [job.state for job in jobs] == [State.DONE] * 2
        assert jobs[0].result["latents_sha256"] != jobs[1].result["latents_sha256"]
        made = [store.file(job).stat().st_mtime_ns for job in jobs]
        again = run("batch.py", *arguments)
        assert [store.file(job).stat().st_mtime_ns for job in store.jobs()] == made
    assert "running" not in again


@pytest.mark.slow
def test_two_caches_are_compared(tmp_path: Path, run: Run) -> None:
    arguments = ("--seconds", "3", "--a", "fp32", "--b", "int8,window=6,sink=3", "--out", "c.png")
    lines = run("compare_cache.py", *arguments).splitlines()
    # the first chunk has no history that could be kept in another way
    assert lines[0] == "chunk 0: PSNR equal, SSIM 1.000"
    values = [float(line.split()[3]) for line in lines[1:5]]
    assert all(10 < value < 70 for value in values) and values[0] == max(values)
    sizes = [int(found[1].replace(",", "")) for found in re.finditer(r"([\d,]+) bytes", "\n".join(lines))]
    assert sizes[0] == 196_608 and sizes[1] < 0.3 * sizes[0]
    picture = np.asarray(Image.open(tmp_path / "c.png")).astype(int)
    assert picture.shape == (3 * 128, 5 * 128, 3)
    rows = [picture[128 * i : 128 * (i + 1)] for i in range(3)]
    assert np.array_equal(rows[2], (4 * np.abs(rows[0] - rows[1])).clip(0, 255))
    # equal at first, and something to see later
    assert rows[2][:, :128].max() == 0 < rows[2][:, 128:].max()


@pytest.mark.slow
def test_the_same_cache_twice_gives_the_same_video(run: Run) -> None:
    said = run("compare_cache.py", "--seconds", "1", "--a", "int8", "--b", "int8", "--out", "c.png")
    assert said.count("PSNR equal, SSIM 1.000") == 2 and "they have not parted" in said


@pytest.mark.parametrize("name", ["stream.py", "batch.py", "compare_cache.py"])
def test_an_example_says_how_to_run_it(name: str) -> None:
    source = (EXAMPLES / name).read_text()
    text = ast.get_docstring(ast.parse(source)) or ""
    command = next(line for line in text.splitlines() if line.startswith("python apps/examples/"))
    options = set(re.findall(r"--[a-z]+", command))
    assert options and f"apps/examples/{name}" in command
    assert options <= set(re.findall(r'add_argument\("(--[a-z]+)"', source))


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # nothing is shown that was not run here
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    (tmp_path / "cells.py").write_text("\n".join([*cells, "print(sheet.size, fidelity.diverged_at)"]))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("cells.py", run_name="__main__")
    assert re.search(r"^\(\d+, 64\) (None|\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert probe(tmp_path / "steered.mp4").frames == 96
