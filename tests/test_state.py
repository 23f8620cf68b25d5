"""Saved rollouts: another process goes on bit for bit; a bad file is refused and changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tests.tiny import build_rollout, build_text, build_transformer, build_vae
from vidkv import state
from vidkv.errors import OutputError, StateError
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule
from vidkv.state import load_rollout, save_rollout

ROOT = Path(__file__).resolve().parents[1]
SPEC = "int8,window=9,sink=2"
JOBS = {
    "fp32": ("fp32,window=9,sink=2", "float32"),
    "bf16 pages": ("bf16,window=9,sink=2,positions=absolute", "float32"),
    "bf16 model": ("bf16,window=9,sink=2", "bfloat16"),
    "int8": (SPEC, "float32"),
    "int8 kept": ("int8,window=10,sink=2,keep_newest,keep_sinks,segment=3", "float32"),
    "int8 bf16": ("int8,window=9,sink=2,value_scale=channel,keep_newest", "bfloat16"),
    "selected": (
        "int4,hadamard=false,keyframe,window=14,sink=2,select=9,policy=h2o,newer=int8:3,segment=2",
        "float32",
    ),
    "pruned": ("int8,window=14,sink=2,policy=snapkv,keep_tokens=0.5,keep_newest", "bfloat16"),
}


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return build_transformer()


def rollout_of(job: str, **kwargs: Any) -> Rollout:
    spec, dtype = JOBS[job]
    model = build_transformer().to(getattr(torch, dtype))
    return build_rollout(spec, transformer=model, vae=build_vae(), **kwargs)


def saved(tmp_path: Path, model: CausalWanTransformer3DModel, chunks: int = 3) -> Path:
    rollout = build_rollout(SPEC, transformer=model)
    for _ in range(chunks):
        rollout.step_chunk()
    path = tmp_path / "rollout.safetensors"
    save_rollout(rollout, path, {"prompt": "rain"})
    return path


def test_a_state_from_before_there_were_scores(model: CausalWanTransformer3DModel) -> None:
    rollout = build_rollout(SPEC, transformer=model)
    for _ in range(4):
        rollout.step_chunk()
    tensors, header = rollout.state()
    del header["cache"]["scores"]
    for name in (
        "newer",
        "select",
        "keep_tokens",
        "keep_by",
        "local_heads",
        "hadamard",
        "fit",
        "group",
        "keyframe",
        "jensen",
        "key_scale",
    ):
        del header["cache"]["spec"][name]
    other = build_rollout(SPEC, transformer=model)
    other.restore(tensors, header)
    assert torch.equal(other.step_chunk().latents, rollout.step_chunk().latents)


class TestAnotherProcess:
    def test_goes_on_bit_for_bit(self, tmp_path: Path) -> None:
        """Save here, build everything anew there, generate two chunks in both, compare all bits."""
        wanted: dict[str, torch.Tensor] = {}
        for job in JOBS:
            rollout = rollout_of(job, seeds=[11])
            for _ in range(4):
                rollout.step_chunk()
            save_rollout(rollout, tmp_path / f"{job}.safetensors", {"job": job})
            for i in range(2):
                chunk = rollout.step_chunk()
                assert chunk.frames is not None
                wanted |= {f"{job}.latents.{i}": chunk.latents, f"{job}.frames.{i}": chunk.frames}
        script = f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})
            import torch
            torch.set_num_threads({torch.get_num_threads()})
            from pathlib import Path
            from safetensors.torch import save_file
            from tests.test_state import JOBS, rollout_of
            from vidkv.state import load_rollout

            folder, found = Path(sys.argv[1]), {{}}
            for job in JOBS:
                rollout = rollout_of(job, seeds=[99])
                assert load_rollout(rollout, folder / f"{{job}}.safetensors") == {{"job": job}}
                for i in range(2):
                    chunk = rollout.step_chunk()
                    found[f"{{job}}.latents.{{i}}"] = chunk.latents
                    found[f"{{job}}.frames.{{i}}"] = chunk.frames.contiguous()
            save_file(found, folder / "found.safetensors")
        """
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True, cwd=tmp_path
        )
        found = load_file(tmp_path / "found.safetensors")
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name


class TestFile:
    def test_schedule_and_seeds_come_from_the_file(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        """What follows is the saved video, whatever the rollout was made with."""
        schedule = FlowSchedule((900, 300, 100), 3.0, False, (1000, 500), "euler")
        rollout = build_rollout(SPEC, transformer=model, schedule=schedule, seeds=[2**64 - 1])
        rollout.step_chunk()
        save_rollout(rollout, tmp_path / "a")
        other = build_rollout(SPEC, transformer=model)
        load_rollout(other, tmp_path / "a")
        assert other.schedule == schedule and other.seeds == (2**64 - 1,)
        assert torch.equal(other.step_chunk().latents, rollout.step_chunk().latents)

    def test_extra_comes_back(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        path = saved(tmp_path, model)
        rollout = build_rollout(SPEC, transformer=model)
        assert load_rollout(rollout, path) == {"prompt": "rain"}
        assert (rollout.chunk, rollout.next_frame) == (3, 9)

    def test_paths_may_be_strings(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(SPEC, transformer=model)
        rollout.step_chunk()
        save_rollout(rollout, f"{tmp_path}/a.safetensors")
        assert load_rollout(rollout, f"{tmp_path}/a.safetensors") == {}

    def test_is_versioned_safetensors_with_json(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        with safe_open(saved(tmp_path, model), framework="pt") as file:
            header = json.loads(file.metadata()["vidkv"])
            names = set(file.keys())
        assert header["schema"] == state.SCHEMA == 4
        assert header["torch"] == torch.__version__
        assert header["rollout"]["chunk"] == 3 and header["rollout"]["noise"]["seeds"] == [7]
        assert {"window_latents", "cache.pages.k", "cache.pages.k_scale", "cache.key_mean"} <= names

    def test_before_the_first_chunk(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        path = saved(tmp_path, model, chunks=0)
        rollout = build_rollout(SPEC, transformer=model)
        rollout.step_chunk()
        load_rollout(rollout, path)
        fresh = build_rollout(SPEC, transformer=model)
        assert torch.equal(rollout.step_chunk().latents, fresh.step_chunk().latents)

    def test_overwriting_replaces_whole_files(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        path = saved(tmp_path, model, chunks=1)
        saved(tmp_path, model, chunks=3)
        rollout = build_rollout(SPEC, transformer=model)
        load_rollout(rollout, path)
        assert rollout.chunk == 3
        assert os.listdir(tmp_path) == ["rollout.safetensors"]

    def test_a_reader_never_sees_half_a_file(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        """Whoever has the old file open goes on reading the old file."""
        path = saved(tmp_path, model, chunks=1)
        before = path.read_bytes()
        with path.open("rb") as reader:
            saved(tmp_path, model, chunks=3)
            assert reader.read() == before
        assert path.read_bytes() != before

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("disk full")])
    def test_a_failed_write_leaves_the_old_file(
        self,
        tmp_path: Path,
        model: CausalWanTransformer3DModel,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
    ) -> None:
        path = saved(tmp_path, model)
        before = path.read_bytes()

        def half(tensors: dict[str, torch.Tensor], target: Path, metadata: dict[str, str]) -> None:
            target.write_bytes(before[: len(before) // 2])
            raise error

        monkeypatch.setattr(state, "save_file", half)
        with pytest.raises(OutputError, match=r"cannot write .*rollout\.safetensors"):
            saved(tmp_path, model)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["rollout.safetensors"]

    def test_a_folder_that_does_not_exist(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        with pytest.raises(OutputError, match="nowhere"):
            save_rollout(build_rollout(SPEC, transformer=model), tmp_path / "nowhere" / "a.safetensors")

    def test_extra_must_be_json(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        with pytest.raises(TypeError):
            save_rollout(build_rollout(SPEC, transformer=model), tmp_path / "a", {"prompt": object()})
        assert not os.listdir(tmp_path)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    """Change header or tensors of a saved file."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vidkv"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, {"vidkv": json.dumps(header)})


class TestRefused:
    """Every refusal is a StateError that names the file, and leaves the rollout as it was."""

    def refused(self, path: Path, rollout: Rollout) -> str:
        before = build_rollout(rollout.cache.spec, transformer=rollout.transformer, text=rollout.text)
        wanted = [before.step_chunk().latents for _ in range(3)]
        found = [rollout.step_chunk().latents]
        with pytest.raises(StateError) as caught:
            load_rollout(rollout, path)
        rollout.cache.check_integrity()
        found += [rollout.step_chunk().latents for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999], ids=str)
    def test_truncated(self, tmp_path: Path, model: CausalWanTransformer3DModel, keep: float) -> None:
        path = saved(tmp_path, model)
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        assert str(path) in self.refused(path, build_rollout(SPEC, transformer=model))

    @pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\xff" * 64, b"{}"], ids=len)
    def test_garbage(self, tmp_path: Path, model: CausalWanTransformer3DModel, content: bytes) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        assert "a.safetensors" in self.refused(path, build_rollout(SPEC, transformer=model))

    def test_missing(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        message = self.refused(tmp_path / "none", build_rollout(SPEC, transformer=model))
        assert message.startswith("there is no saved rollout")

    def test_a_folder(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        assert str(tmp_path) in self.refused(tmp_path, build_rollout(SPEC, transformer=model))

    def test_weights_of_a_model(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        """Safetensors, but no rollout."""
        path = tmp_path / "a.safetensors"
        save_file({"x": torch.zeros(2)}, path)
        assert "no saved rollout" in self.refused(path, build_rollout(SPEC, transformer=model))

    @pytest.mark.parametrize("header", ["[]", "null", "3", "{", '{"schema": 1}', "[[1, 2, 3]]"])
    def test_damaged_headers(self, tmp_path: Path, model: CausalWanTransformer3DModel, header: str) -> None:
        path = saved(tmp_path, model)
        save_file(load_file(path), path, {"vidkv": header})
        assert str(path) in self.refused(path, build_rollout(SPEC, transformer=model))

    @pytest.mark.parametrize("schema", [0, 1, None, "1"])
    def test_another_version(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, schema: object
    ) -> None:
        path = saved(tmp_path, model)
        rewritten(path, lambda header, _: header.update(schema=schema))
        message = self.refused(path, build_rollout(SPEC, transformer=model))
        assert f"version {schema}" in message and "version 4" in message

    @pytest.mark.parametrize("name", ["cache.pages.k", "cache.key_mean", "window_latents"])
    def test_a_missing_tensor(self, tmp_path: Path, model: CausalWanTransformer3DModel, name: str) -> None:
        path = saved(tmp_path, model)
        rewritten(path, lambda _, tensors: tensors.pop(name))
        self.refused(path, build_rollout(SPEC, transformer=model))

    @pytest.mark.parametrize("name", ["cache", "chunk", "prefix", "noise", "schedule", "window_latents"])
    def test_a_missing_entry(self, tmp_path: Path, model: CausalWanTransformer3DModel, name: str) -> None:
        path = saved(tmp_path, model)
        rewritten(path, lambda header, _: header["rollout"].pop(name))
        self.refused(path, build_rollout(SPEC, transformer=model))

    def test_another_cache(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        path = saved(tmp_path, model)
        message = self.refused(path, build_rollout("fp32,window=9,sink=2", transformer=model))
        assert SPEC in message and "fp32,window=9,sink=2" in message

    @pytest.mark.parametrize(
        "config", [{"num_layers": 3}, {"num_key_value_heads": 1}, {"attention_head_dim": 26}], ids=str
    )
    def test_another_architecture(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, config: dict[str, int]
    ) -> None:
        path = saved(tmp_path, model)
        self.refused(path, build_rollout(SPEC, transformer=build_transformer(**config)))

    def test_other_weights(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        """The shapes agree, the video would not."""
        path = saved(tmp_path, model)
        other = build_rollout(SPEC, transformer=build_transformer(seed=1))
        assert "other weights" in self.refused(path, other)

    def test_another_size_or_batch(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        path = saved(tmp_path, model)
        for rollout in (
            build_rollout(SPEC, transformer=model, latent_size=(4, 4, 8)),
            build_rollout(SPEC, transformer=model, seeds=[1, 2]),
        ):
            rollout.step_chunk()
            with pytest.raises(StateError, match="model and size"):
                load_rollout(rollout, path)
            rollout.step_chunk()

    def test_another_precision(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        path = saved(tmp_path, model)
        half = build_transformer().bfloat16()
        message = self.refused(path, build_rollout(SPEC, transformer=half, text=build_text(half)))
        assert "float32" in message and "bfloat16" in message
