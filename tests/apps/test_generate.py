"""`vidkv generate` on the shipped model, as a person would run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from tests.apps.commandline import run
from vidkv.pipeline import find_model
from vidkv.segments import SegmentWriter, probe, read_metadata

PROMPT = "a red circle and a blue square bouncing"
KEYS = set(
    """out seconds frames fps chunks seed model kv_format window_frames sink_frames kv_bytes_per_frame
    kv_bytes_peak peak_rss_bytes first_frame_s denoise_fps decode_fps end_to_end_fps latents_sha256""".split()
)


def generate(capsys: pytest.CaptureFixture[str], out: Path, *more: str) -> dict[str, object]:
    code, stdout, stderr = run(capsys, "generate", PROMPT, "--out", str(out), "--json", *more)
    assert code == 0, stderr
    result: dict[str, object] = json.loads(stdout)
    return result


def test_a_video_is_made_as_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    result = generate(capsys, out, "--seconds", "1.5", "--seed", "3")
    assert set(result) == KEYS
    video = probe(out)
    assert (video.frames, video.fps, video.width, video.height) == (24, 16, 64, 64)
    assert (result["frames"], result["seconds"], result["chunks"], result["seed"]) == (24, 1.5, 3, 3)
    metadata = read_metadata(out)
    assert PROMPT in metadata["prompts"]
    assert metadata["seed"] == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


def test_the_seed_decides_and_the_format_shows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = generate(capsys, tmp_path / "a.mp4", "--seconds", "2.5")
    again = generate(capsys, tmp_path / "b.mp4", "--seconds", "2.5")
    other = generate(capsys, tmp_path / "c.mp4", "--seconds", "2.5", "--seed", "1")
    small = generate(capsys, tmp_path / "d.mp4", "--seconds", "2.5", "--kv-format", "int8")
    assert first["latents_sha256"] == again["latents_sha256"]
    assert len({row["latents_sha256"] for row in (first, other, small)}) == 3
    assert int(str(small["kv_bytes_per_frame"])) <= 0.53 * int(str(first["kv_bytes_per_frame"])) / 2
    assert (small["kv_format"], small["window_frames"], small["sink_frames"]) == ("int8", 21, 3)


def test_a_prompt_switch_changes_only_what_follows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "a.mp4"
    generate(capsys, out, "--seconds", "2", "--prompt-at", "1:a green circle and a blue square bouncing")
    assert "1: a green circle" in read_metadata(out)["prompts"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the prompt is empty"),
        (("a" * 2**20,), "1,048,576 characters"),
        (("a red dragon bouncing",), "unknown word 'dragon'"),
        ((PROMPT, "--seconds", "-1"), "seconds=-1.0"),
        ((PROMPT, "--seconds", "0"), "seconds=0.0"),
        ((PROMPT, "--seconds", "nan"), "seconds=nan"),
        ((PROMPT, "--seconds", "inf"), "seconds=inf"),
        ((PROMPT, "--seconds", "0.001"), "less than one frame"),
        ((PROMPT, "--height", "63"), "height=63 is no positive multiple of 16; the nearest is 64"),
        ((PROMPT, "--width", "0"), "width=0"),
        ((PROMPT, "--seed", "-1"), "seed=-1"),
        ((PROMPT, "--model", "no-such-model"), "unknown model 'no-such-model'"),
        ((PROMPT, "--model", "wan2.1-1.3b"), "do not ship with vidkv"),
        ((PROMPT, "--window", "5", "--sink", "3"), "does not fit into window=5"),
        ((PROMPT, "--kv-format", "int3"), "cache format 'int3' is unknown"),
        ((PROMPT, "--cache", "int8,colour=red"), "colour"),
        ((PROMPT, "--prompt-at", "soon"), "is not SECOND:TEXT"),
        ((PROMPT, "--prompt-at", "1:a red dragon bouncing"), "unknown word 'dragon'"),
        ((PROMPT, "--device", "tpu"), "device='tpu'"),
        ((PROMPT, "--steps", "0"), "num_inference_steps=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "a.mp4"
    code, stdout, stderr = run(capsys, "generate", *arguments, "--out", str(out))
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert len(stderr) < 700
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "a.mp4", tmp_path / "none" / "a.mp4", tmp_path / "a.avi", tmp_path):
        code, _, stderr = run(capsys, "generate", PROMPT, "--out", str(out))
        assert code == 2
        assert stderr.startswith("vidkv: ")


def test_damaged_weights_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    copytree(find_model("bounce"), model)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damage in (whole[: len(whole) // 2], b"not weights", b""):
        weights.write_bytes(damage)
        code, _, stderr = run(
            capsys, "generate", PROMPT, "--out", str(tmp_path / "a.mp4"), "--model", str(model)
        )
        assert code == 2
        assert str(weights) in stderr
    weights.unlink()
    code, _, stderr = run(capsys, "generate", PROMPT, "--out", str(tmp_path / "a.mp4"), "--model", str(model))
    assert code == 2
    assert "is missing" in stderr
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_keeps_a_playable_part(tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "a.mp4"
    command = [sys.executable, "-P", "-m", "vidkv.apps.cli", "generate", PROMPT]
    command += ["--seconds", "600", "--out", str(out)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    segments = tmp_path / "a.mp4.segments"
    deadline = time.monotonic() + 120
    while not list(segments.glob("seg_00002*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "a.partial.mp4" in stderr
    assert probe(tmp_path / "a.partial.mp4").frames >= 33
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.partial.mp4"]


def test_segments_of_a_killed_run_are_rescued(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path / "a.mp4.segments", 16, 64, 64)
    writer.write(0, np.zeros((9, 64, 64, 3), np.uint8))
    generate(capsys, tmp_path / "a.mp4", "--seconds", "0.5")
    assert probe(tmp_path / "a.recovered.mp4").frames == 9
    assert probe(tmp_path / "a.mp4").frames == 8
