"""`vidkv generate` on the shipped model, as a person would run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import av
import numpy as np
import pytest

from tests.apps.commandline import run
from vidkv import planning
from vidkv.apps import generate as generating
from vidkv.pipeline import find_model
from vidkv.segments import SegmentWriter, VideoInfo, claim_folder, probe, read_metadata

PROMPT = "a red circle and a blue square bouncing"
KEYS = set(
    """out seconds frames fps chunks seed model kv_format window_frames sink_frames kv_bytes_per_frame
    kv_bytes_peak peak_rss_bytes first_frame_s denoise_fps decode_fps end_to_end_fps latents_sha256""".split()
)

pytestmark = pytest.mark.usefixtures("short_first_chunk")


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
    """Chunks begin at frames 0, 9 and 21: second 1 falls into the middle one, and the last one changes."""
    out, plain = tmp_path / "a.mp4", tmp_path / "b.mp4"
    generate(capsys, out, "--seconds", "2", "--prompt-at", "1:a green circle and a blue square bouncing")
    generate(capsys, plain, "--seconds", "2")
    assert "1: a green circle" in read_metadata(out)["prompts"]
    switched, unswitched = pictures(out), pictures(plain)
    assert len(switched) == len(unswitched) == 32
    assert bool((switched[:21] == unswitched[:21]).all())
    assert bool((switched[21:] != unswitched[21:]).any())


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the prompt is empty"),
        (("a" * 2**20,), "at most 10000 characters"),
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
        (
            (PROMPT, "--model", "wan2.1-1.3b"),
            "are not here (its weights are in Wan-AI/",
        ),
        ((PROMPT, "--window", "5", "--sink", "3"), "does not fit into window=5"),
        ((PROMPT, "--kv-format", "int3"), "cache format 'int3' is unknown"),
        ((PROMPT, "--cache", "int8,colour=red"), "colour"),
        ((PROMPT, "--prompt-at", "soon"), "is not SECOND:TEXT"),
        ((PROMPT, "--prompt-at", "1:a red dragon bouncing"), "unknown word 'dragon'"),
        ((PROMPT, "--prompt-at", f"99:{PROMPT}"), "second 99 would never be shown"),
        (
            (PROMPT, "--seconds", "2", "--prompt-at", f"1.4:{PROMPT}"),
            "begins at second 1.3125; give an earlier",
        ),
        ((PROMPT, "--window", "2000000000"), "of memory on cpu (decode: transformer"),
        ((PROMPT, "--device", "tpu"), "device='tpu'"),
        ((PROMPT, "--steps", "0"), "steps=0: input should be greater"),
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


def test_a_name_that_leaves_no_room_for_its_companions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, stderr = run(capsys, "generate", PROMPT, "--out", str(tmp_path / ("n" * 248 + ".mp4")))
    assert code == 2
    assert stderr.count("\n") == 1 and "File name too long; choose another output" in stderr


def test_memory_that_runs_out_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not say what is free, the allocator has the last word."""
    monkeypatch.setattr(planning, "usable_bytes", lambda device: None)
    out = tmp_path / "a.mp4"
    code, stdout, stderr = run(
        capsys, "generate", PROMPT, "--out", str(out), "--window", "2000000000", "--device", "cpu"
    )
    assert (code, stdout) == (2, "")
    line = stderr.splitlines()[-1]
    assert line.startswith("vidkv: cpu has run out of memory: the video needs about 393,2")
    assert line.endswith("; no chunk was finished") and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: change(model / "model_index.json", model="wan9"), "names the model 'wan9'; known are"),
        (
            lambda model: change(model / "transformer" / "config.json", num_attention_heads=0),
            "describes no CausalWanTransformer3DModel",
        ),
        (
            lambda model: (model / "tokenizer" / "tokenizer.json").unlink(),
            "tokenizer.json is missing; name a",
        ),
    ],
    ids=["another model", "no heads", "no tokenizer"],
)
def test_a_folder_that_is_no_model_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    model = tmp_path / "model"
    copytree(find_model("bounce"), model)
    damage(model)
    code, stdout, stderr = run(
        capsys, "generate", PROMPT, "--out", str(tmp_path / "a.mp4"), "--model", str(model)
    )
    assert (code, stdout) == (2, "")
    assert message in stderr and str(model) in stderr and stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_model_folder_is_named_as_it_was_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = str(find_model("bounce"))
    result = generate(capsys, tmp_path / "a.mp4", "--seconds", "0.5", "--model", model)
    assert result["model"] == read_metadata(tmp_path / "a.mp4")["model"] == model


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
def test_a_stopped_run_keeps_a_playable_part(
    tmp_path: Path, quick_bounce: Path, number: int, code: int
) -> None:
    out = tmp_path / "a.mp4"
    command = [sys.executable, "-P", "-m", "vidkv.apps.cli", "generate", PROMPT]
    command += ["--model", str(quick_bounce), "--seconds", "600", "--out", str(out)]
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


def test_an_unreadable_segment_does_not_stand_in_the_way(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "a.mp4.segments"
    writer = SegmentWriter(folder, 16, 64, 64)
    writer.write(0, np.zeros((9, 64, 64, 3), np.uint8))
    writer.write(1, np.zeros((12, 64, 64, 3), np.uint8)).write_bytes(b"\0" * 1000)
    (folder / ".seg_00002.ts.tmp").write_bytes(b"half")
    generate(capsys, tmp_path / "a.mp4", "--seconds", "0.5")
    assert probe(tmp_path / "a.recovered.mp4").frames == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.recovered.mp4"]


def test_files_of_the_user_are_never_deleted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "a.mp4.segments"
    writer = SegmentWriter(folder, 16, 64, 64)
    writer.write(0, np.zeros((9, 64, 64, 3), np.uint8))
    (folder / "thesis.txt").write_text("years of work")
    code, stdout, stderr = run(capsys, "generate", PROMPT, "--out", str(tmp_path / "a.mp4"))
    assert (code, stdout) == (2, "")
    assert "holds 'thesis.txt', which vidkv did not write" in stderr and stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a.mp4.segments",
        "seg_00000.ts",
        "thesis.txt",
    ]


def test_a_second_run_with_the_same_output_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "a.mp4.segments"
    with claim_folder(folder):
        SegmentWriter(folder, 16, 64, 64).write(0, np.zeros((9, 64, 64, 3), np.uint8))
        code, stdout, stderr = run(capsys, "generate", PROMPT, "--out", str(tmp_path / "a.mp4"))
        assert (code, stdout) == (2, "")
        assert "another run is writing" in stderr and stderr.count("\n") == 1
        assert (folder / "seg_00000.ts").exists()
    assert [path.name for path in tmp_path.rglob("*.mp4*")] == ["a.mp4.segments"]


def test_a_signal_while_the_file_is_joined_lets_it_finish(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = generating.write_video

    def interrupted(*args: Any, **kwargs: Any) -> VideoInfo:
        signal.raise_signal(signal.SIGINT)
        return join(*args, **kwargs)

    monkeypatch.setattr(generating, "write_video", interrupted)
    generate(capsys, tmp_path / "a.mp4", "--seconds", "0.5")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert probe(tmp_path / "a.mp4").frames == 8
