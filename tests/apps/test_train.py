"""The training stages at the smallest size: they run, learn from the right frames, resume and assemble."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from vidkv.apps.train import bounce, dit, latents
from vidkv.apps.train.common import Progress, learning_rate
from vidkv.models.bounce.prompts import VOCABULARY, WORLDS
from vidkv.models.registry import BOUNCE
from vidkv.pipeline import CausalVideoPipeline


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dit.Trainer:
    monkeypatch.setattr(dit, "FRAMES", 9)
    vae = CausalVideoPipeline.from_pretrained("bounce").vae
    return dit.Trainer(tmp_path, Accelerator(cpu=True), vae, WORLDS["narrow"], 4, 8, batch=2, refresh=0)


def test_the_registry_describes_what_is_trained() -> None:
    assert BOUNCE.text["vocab_size"] == len(VOCABULARY)


def test_stages_run_resume_and_make_a_pipeline(trainer: dit.Trainer, tmp_path: Path) -> None:
    cycle = dit.lessons(9, 2, history=True)
    before = trainer.student.transformer.proj_out.weight.clone()
    trainer.run("teacher_forcing", cycle, 6, None, 1e-3)
    trainer.run_self_rollout(2, None, 1e-3, frames=9, reuse=2)
    assert not torch.equal(trainer.student.transformer.proj_out.weight, before)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"teacher_forcing", "self_rollout"}
    trained = trainer.student.transformer.proj_out.weight.clone()
    trainer.run("teacher_forcing", cycle, 6, None, 1e-3)
    assert json.loads((tmp_path / "teacher_forcing" / "progress.json").read_text())["step"] == 6
    assert not torch.equal(trainer.student.transformer.proj_out.weight, trained)
    folder = bounce.assemble(tmp_path, trainer, trainer.vae, "narrow")
    pipe = CausalVideoPipeline.from_pretrained(folder)
    assert pipe("a red circle bouncing", num_frames=9, output_type="pt").frames.shape == (1, 9, 64, 64, 3)


def test_events_begin_with_a_chunk(trainer: dit.Trainer) -> None:
    clips = latents.draw_clips(trainer.vae, 24, 15, trainer.generator, WORLDS["narrow"])
    happens = clips.event_frame < 15
    assert bool(happens.any())
    assert bool((clips.event_frame[happens] % latents.CHUNK == 0).all())
    differ = (clips.ids[:, 0] != clips.ids[:, 1]).any(1)
    assert torch.equal(differ, happens)


def test_self_rollout_keeps_the_true_prefix_and_distrusts_what_strayed(trainer: dit.Trainer) -> None:
    inputs = trainer.clips.pick(torch.arange(4))
    history, weight, drift = trainer.roll_out(trainer.student, *inputs[:4], prefix=1)
    assert torch.equal(history[:, :3], inputs[0][:, :3])
    assert bool((weight[:, :6] == 1).all())
    assert bool((weight[:, 6:] < 1).any())
    assert float(drift) > 0


def test_first_chunks_have_lessons_of_their_own() -> None:
    cycle = dit.lessons(42, 8, history=True)
    assert [lesson.chunks for lesson in cycle if lesson.openings] == [(3,)] * 2
    assert any(lesson.chunks == (1, *[3] * 13, 2) for lesson in cycle)


def test_progress_ends_by_steps_or_by_the_clock() -> None:
    assert list(Progress(steps=3)) == [0, 1, 2]
    assert list(Progress(steps=3, step=2)) == [2]
    assert list(Progress(steps=10**9, minutes=1.0, minutes_before=1.0)) == []
    assert learning_rate(1.0, 10**6, 0.0) == pytest.approx(1.0)
    assert learning_rate(1.0, 10**6, 1.0) == pytest.approx(0.05)
    assert learning_rate(1.0, 0, 0.0) == pytest.approx(0.01)
