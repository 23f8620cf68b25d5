"""`vidkv bench render`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.apps.commandline import run
from tests.tiny import HEIGHT, WIDTH, build_pipeline
from vidkv.apps import bench_render
from vidkv.planning import plan
from vidkv.request import EngineSettings, VideoRequest
from vidkv.segments import SegmentWriter, write_video


@pytest.mark.usefixtures("short_first_chunk")
def test_both_sides_make_the_same_videos(capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = run(
        capsys, "bench", "render", "--videos", "2", "--seconds", "1", "--device", "cpu", "--json"
    )
    report = json.loads(stdout)
    assert code == 0 and report["frames"] == 16 and report["videos"] == 2
    low, high = report["ratio_ci95"]
    assert 0 < low <= report["ratio"] <= high and report["job_fps"] > 0 and report["silent_ratio"] > 0
    # within the window nothing has left, so a light resume is exact
    assert report["light"]["psnr_db"][1] > 90


def test_difference_in_decibels(tmp_path: Path) -> None:
    import numpy as np

    build_pipeline().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    request = VideoRequest(
        prompt="a red circle bouncing", model=model, seconds=1.3, height=HEIGHT, width=WIDTH
    )
    planned = plan(request, EngineSettings(device="cpu"))
    files = []
    for name, level in (("whole", 100), ("resumed", 110)):
        frames = np.full((21, 64, 64, 3), 100, np.uint8)
        frames[9:] = level
        writer = SegmentWriter(tmp_path / name, 16, 64, 64)
        writer.write(0, frames[:9]), writer.write(1, frames[9:])
        write_video(writer.paths(), tmp_path / f"{name}.mp4", 16, {})
        files.append(tmp_path / f"{name}.mp4")
    wanted = 10 * np.log10(255**2 / 100)
    assert bench_render._psnr(*files, planned, 1) == pytest.approx((wanted, wanted), abs=1.5)
    with pytest.raises(AssertionError, match="before the stop differ"):
        bench_render._psnr(*files, planned, 2)
