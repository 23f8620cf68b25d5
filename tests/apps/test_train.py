"""The training stages at the smallest size: they run, learn from the right frames, resume and assemble."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from einops import rearrange

from tests.apps.commandline import run
from tests.tiny import relative_l2
from vidkv.apps.train import bounce, dit, latents, vae
from vidkv.apps.train.common import Progress, Stage, learning_rate
from vidkv.errors import InputError
from vidkv.models.bounce.prompts import VOCABULARY, WORLDS
from vidkv.models.families.bounce import BOUNCE
from vidkv.models.registry import weights_folder
from vidkv.models.vae import decode_clip, encode_clip, normalise
from vidkv.pipeline import CausalVideoPipeline


@pytest.fixture(autouse=True)
def own_accelerator_state() -> Iterator[None]:
    """Accelerators of one process share their precision; tests shall not."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Killed(Exception):
    """Stands for a process that ends without notice."""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dit.Trainer]:
    """A trainer into a folder, as a process has it that has just started."""
    monkeypatch.setattr(dit, "FRAMES", 9)
    shipped = CausalVideoPipeline.from_pretrained("bounce").vae

    def make(folder: Path) -> dit.Trainer:
        narrow = WORLDS["narrow"]
        return dit.Trainer(folder, Accelerator(cpu=True), shipped, narrow, 4, 8, batch=2, refresh=0)

    return make


@pytest.fixture
def trainer(fresh: Callable[[Path], dit.Trainer], tmp_path: Path) -> dit.Trainer:
    return fresh(tmp_path)


def test_the_registry_describes_what_is_trained() -> None:
    assert BOUNCE.text["vocab_size"] == len(VOCABULARY)


def test_stages_run_resume_and_make_a_pipeline(trainer: dit.Trainer, tmp_path: Path) -> None:
    cycle = list(dict.fromkeys(dit.lessons(9, 2, history=True)))
    assert len(cycle) == 3
    before = trainer.student.transformer.proj_out.weight.clone()
    trainer.run("teacher_forcing", cycle, 3, None, 1e-3)
    trainer.run_self_rollout(2, None, 1e-3, frames=9, reuse=2)
    assert not torch.equal(trainer.student.transformer.proj_out.weight, before)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"teacher_forcing", "self_rollout"}
    trained = trainer.student.transformer.proj_out.weight.clone()
    trainer.run("teacher_forcing", cycle, 3, None, 1e-3)
    assert json.loads((tmp_path / "teacher_forcing" / "progress.json").read_text())["step"] == 3
    assert not torch.equal(trainer.student.transformer.proj_out.weight, trained)
    folder = bounce.assemble(tmp_path, trainer, trainer.vae, "narrow")
    pipe = CausalVideoPipeline.from_pretrained(folder)
    assert pipe("a red circle bouncing", num_frames=9, output_type="pt").frames.shape == (1, 9, 64, 64, 3)


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    update = Stage.update

    def dying(self: Stage[Any], *args: Any) -> Any:
        if self.progress.step == step:
            raise Killed
        return update(self, *args)

    monkeypatch.setattr(Stage, "update", dying)


def test_a_killed_stage_goes_on_as_if_nothing_had_happened(
    fresh: Callable[[Path], dit.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, averages, optimizer, noise and the choice of clips: the end is the same bit for bit."""
    monkeypatch.setattr(dit, "SAVE_STEPS", 2)
    cycle = dit.lessons(9, 2, history=True)[:2]
    unbroken = fresh(tmp_path / "unbroken")
    unbroken.run("teacher_forcing", cycle, 4, None, 1e-2)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            fresh(tmp_path / "killed").run("teacher_forcing", cycle, 4, None, 1e-2)
    resumed, steps = fresh(tmp_path / "killed"), []
    update = Stage.update

    def watched(self: Stage[Any], *args: Any) -> Any:
        steps.append(self.progress.step)
        return update(self, *args)

    monkeypatch.setattr(Stage, "update", watched)
    resumed.run("teacher_forcing", cycle, 4, None, 1e-2)
    assert steps == [2, 3]
    for ours, theirs in zip(resumed.student.parameters(), unbroken.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(
    trainer: dit.Trainer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    stage = trainer._stage("teacher_forcing", 9, None, 1e-3)
    stage.save(1)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    rename = Path.rename
    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(stage.ema, "state_dict", die)
        else:
            patch.setattr(Path, "rename", lambda a, b: die() if a.suffix == ".partial" else rename(a, b))
        with pytest.raises(Killed):
            stage.save(2)
    assert trainer._stage("teacher_forcing", 9, None, 1e-3).progress.step == 1
    stage.save(3)
    assert trainer._stage("teacher_forcing", 9, None, 1e-3).progress.step == 3
    assert [path.name for path in trainer.folder.iterdir() if path.is_dir()] == ["teacher_forcing"]


def test_a_finished_vae_is_not_trained_or_whitened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whiten, pool = vae.whiten, vae.ClipPool
    monkeypatch.setattr(vae, "whiten", lambda model, pool: whiten(model, pool, clips=2))
    monkeypatch.setattr(vae, "reconstruction_psnr", lambda *_: 0.0)
    monkeypatch.setattr(vae, "ClipPool", lambda generator: pool(generator, size=8))
    first = vae.train(tmp_path, Accelerator(cpu=True), 1, None, batch=1, frames=5)
    again = vae.train(tmp_path, Accelerator(cpu=True), 2, None, batch=1, frames=5)
    assert again.config.latents_std == first.config.latents_std
    for ours, theirs in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_prints_one_json_object_and_logs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = bounce.Recipe(1, 2, 4, 8, 0, 1, (0.3, 0.2, 0.3, 0.2, 0.0), (1e-3,) * 5)
    monkeypatch.setitem(bounce.RECIPES, "cpu", small)
    monkeypatch.setattr(bounce, "STEPS", 1)
    monkeypatch.setattr(bounce, "FRAMES", 9)
    monkeypatch.setattr(dit, "FRAMES", 9)
    arguments = ("--out", str(tmp_path), "--recipe", "cpu", "--init", "bounce", "--json")
    for _ in range(2):
        code, stdout, stderr = run(capsys, "train", "bounce", *arguments)
        assert code == 0, stderr
        assert json.loads(stdout)["pipeline"] == str(tmp_path / "pipeline")
    assert "diffusion_forcing: going on from step 1" in stderr


def test_the_recipe_of_a_gpu_is_refused_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"recipe='gpu' needs a CUDA GPU.*use --recipe cpu"):
        bounce.train(tmp_path, "narrow", "gpu", 1.0, None)
    assert not any(tmp_path.iterdir())


def test_self_rollout_ends_a_third_of_the_way(trainer: dit.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for share in (dit.SELF_ROLLOUT_SHARE, 1.0):
        torch.manual_seed(3)
        trainer.generator.manual_seed(3)
        trainer.student = dit.load_parts(weights_folder(BOUNCE))
        monkeypatch.setattr(dit, "SELF_ROLLOUT_SHARE", share)
        trainer.run_self_rollout(1, None, 1e-2, frames=6, reuse=1)
        ends.append(trainer.student.transformer.proj_out.weight.detach().clone())
        shutil.rmtree(trainer.folder / "self_rollout")
    between, end = ends
    start = dit.load_parts(weights_folder(BOUNCE)).transformer.proj_out.weight.detach()
    assert not torch.equal(start, end)
    torch.testing.assert_close(between, torch.lerp(start, end, 0.35))


def test_an_impostor_moves_alike_and_looks_different(trainer: dit.Trainer) -> None:
    """Where nothing is drawn the two agree; where objects are they differ."""
    clips = latents.draw_clips(trainer.vae, 6, 3, trainer.generator, WORLDS["narrow"], impostors=True)
    distance = (clips.latents.float() - clips.impostor.float()).square().mean(2)
    assert clips.impostor.shape == clips.latents.shape
    per_clip = distance.flatten(1)
    assert bool((per_clip.amax(1) > 0.3).all())
    assert bool((per_clip.median(1).values < 0.05).all())


def test_history_drifts_in_half_of_the_clips_and_least_at_its_beginning() -> None:
    torch.manual_seed(0)
    share = dit._drift(4000, (1, 3, 3), torch.device("cpu"))[:, :, 0, 0, 0]
    drifting = share[:, 1] > 0
    assert 0.45 < float(drifting.float().mean()) < 0.55
    assert float(share.max()) <= dit.MOST_DRIFT
    assert float(share[drifting, 0].mean()) < 0.3 * float(share[drifting, 1].mean())
    assert torch.equal(share[:, 1], share[:, 3])


def test_whitening_changes_latents_and_nothing_that_is_seen(trainer: dit.Trainer) -> None:
    pool = vae.ClipPool(torch.Generator().manual_seed(4), size=64)
    clips = pool.clips(2, 9)
    model = copy.deepcopy(trainer.vae)
    with torch.no_grad():
        model.quant_conv.weight[:16] *= torch.linspace(0.1, 2, 16)[:, None, None, None, None]
        before = decode_clip(model, encode_clip(model, clips).mode())
        vae.whiten(model, pool, clips=8)
        latents_now = encode_clip(model, clips).mode()
        after = decode_clip(model, latents_now)
    assert relative_l2(after, before) <= 1e-4
    flat = rearrange(normalise(model, latents_now.movedim(1, 2)), "b f c h w -> c (b f h w)")
    worst = (torch.corrcoef(flat) - torch.eye(16)).abs().max()
    assert float(worst) < 0.75


def test_average_colour_is_that_of_the_cell() -> None:
    red, black = torch.tensor([1.0, -1, -1]), torch.full((3,), -1.0)
    clip = torch.empty(1, 3, 5, 16, 8)
    clip[:, :, :, :8], clip[:, :, :, 8:] = red.view(1, 3, 1, 1, 1), black.view(1, 3, 1, 1, 1)
    clip[:, :, 3:, 8:] = 1.0
    found = vae.average_colour(clip)
    assert found.shape == (1, 3, 2, 2, 1)
    torch.testing.assert_close(found[0, :, 0, 0, 0], torch.tensor([-4 / 3, 8.0, 4.0]))
    torch.testing.assert_close(found[0, :, 0, 1, 0], torch.tensor([-4.0, 0, 0]))
    torch.testing.assert_close(found[0, :, 1, 1, 0], torch.tensor([0.0, 0, 0]))


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
