"""`vidkv convert`: published layouts in, folders that the pipeline loads out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.apps.commandline import run
from tests.models.checkpoints.stock_files import (
    ENTRY,
    TEXT,
    VAE,
    text_encoder,
    transformer,
    vae,
    wan_state,
    write_base,
)
from tests.tiny import noise
from vidkv.apps import convert as converting
from vidkv.apps.convert import Request, convert
from vidkv.errors import CheckpointError, InputError, OutputError, ResourceError
from vidkv.models import registry
from vidkv.models.checkpoints import hub
from vidkv.models.checkpoints.folders import models_home
from vidkv.pipeline import CausalVideoPipeline

OTHER = replace(ENTRY, name="tiny-wider", transformer=dict(ENTRY.transformer) | {"ffn_dim": 96})


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(registry.MODELS, ENTRY.name, ENTRY)
    monkeypatch.setitem(registry.MODELS, OTHER.name, OTHER)
    monkeypatch.setenv("VIDKV_HOME", str(tmp_path / "home"))
    # an empty cache of the hub, whatever this machine has
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repository, name: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other parts as Wan-AI publishes them."""
    return write_base(tmp_path_factory.mktemp("base") / "Wan2.1")


@pytest.fixture(scope="module")
def ready(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder, whose parts later conversions link."""
    folder = tmp_path_factory.mktemp("ready")
    save_file(wan_state(), folder / "x.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS, ENTRY.name, ENTRY)
        convert(Request((folder / "x.safetensors",), ENTRY.name, base, out=folder / "model", dtype="fp32"))
    return folder / "model"


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[k].float(), wanted[k].float()) for k in wanted
    )


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        found |= load_file(path)
    return found


def request(files: Path | tuple[Path, ...], base: Path | None, **changes: Any) -> Request:
    given = files if isinstance(files, tuple) else (files,)
    return Request(given, ENTRY.name, base, **({"dtype": "fp32"} | changes))


class TestWhole:
    def test_a_pickle_and_an_original_base_become_a_pipeline(self, base: Path, tmp_path: Path) -> None:
        state = wan_state(1)
        path = tmp_path / "model.pt"
        torch.save({"generator": wan_state(0), "generator_ema": state, "critic": wan_state(2)}, path)
        result = convert(request(path, base))
        assert result["taken"] == "generator_ema.model" and result["left_aside"] == ["critic", "generator"]
        assert result["out"] == str(models_home() / ENTRY.name)
        pipe = CausalVideoPipeline.from_pretrained(result["out"], text="resident")
        assert same(pipe.transformer.state_dict(), transformer(1).state_dict())
        assert same(pipe.vae.state_dict(), vae().state_dict())
        wanted = {name: tensor.bfloat16() for name, tensor in text_encoder().state_dict().items()}
        assert same(pipe.text_encoder.state_dict(), wanted)
        assert pipe.entry is ENTRY and pipe.schedule.steps == ENTRY.schedule["steps"]
        assert pipe.vae.config.latents_std == VAE["latents_std"]
        assert pipe.text_encoder.config.d_ff == TEXT["d_ff"]
        assert pipe.tokenizer.model_max_length == ENTRY.text_tokens
        pipe.set_progress_bar_config(disable=True)
        frames = pipe(prompt="a red circle", num_frames=9, num_inference_steps=1).frames
        assert frames.shape == (1, 9, 32, 48, 3) and frames.std() > 0

    def test_the_original_encoder_keeps_its_dtype(self, ready: Path) -> None:
        stored = load_file(ready / "text_encoder" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert "encoder.embed_tokens.weight" not in stored
        stored = load_file(ready / "vae" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}

    def test_the_tokenizer_pads_to_the_models_length(self, base: Path, ready: Path) -> None:
        old = PreTrainedTokenizerFast.from_pretrained(base / "google" / "umt5-xxl")
        new = PreTrainedTokenizerFast.from_pretrained(ready / "tokenizer")
        assert new.model_max_length == 24 != old.model_max_length
        assert new("a red circle")["input_ids"] == old("a red circle")["input_ids"]


class TestFiles:
    @pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "generator.model.module."])
    def test_prefixes(self, ready: Path, tmp_path: Path, prefix: str) -> None:
        state = {prefix + name.removeprefix("model."): tensor for name, tensor in wan_state(3).items()}
        save_file(state, tmp_path / "x.safetensors")
        convert(request(tmp_path / "x.safetensors", ready, out=tmp_path / "out"))
        assert same(weights(tmp_path / "out"), transformer(3).state_dict())

    def test_not_the_averaged_weights_on_request(self, ready: Path, tmp_path: Path) -> None:
        torch.save({"generator": wan_state(1), "generator_ema": wan_state(2)}, tmp_path / "x.pt")
        result = convert(request(tmp_path / "x.pt", ready, ema=False, out=tmp_path / "out"))
        assert result["taken"] == "generator.model" and result["left_aside"] == ["generator_ema"]
        assert same(weights(tmp_path / "out"), transformer(1).state_dict())

    @pytest.mark.parametrize("ema", [None, True])
    def test_the_authors_choice_unless_told(
        self, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: bool | None
    ) -> None:
        assert ENTRY.source is not None
        entry = replace(ENTRY, source=replace(ENTRY.source, ema=False))
        monkeypatch.setitem(registry.MODELS, ENTRY.name, entry)
        both = {f"generator_ema.{name}": tensor for name, tensor in wan_state(2).items()}
        both |= {f"generator.{name}": tensor for name, tensor in wan_state(1).items()}
        save_file(both, tmp_path / "x.safetensors")
        convert(request(tmp_path / "x.safetensors", ready, ema=ema, out=tmp_path / "out"))
        assert same(weights(tmp_path / "out"), transformer(2 if ema else 1).state_dict())

    def test_one_kind_of_weights_alone_is_taken(self, ready: Path, tmp_path: Path) -> None:
        only = {f"generator_ema.{name}": tensor for name, tensor in wan_state(2).items()}
        save_file(only, tmp_path / "x.safetensors")
        result = convert(request(tmp_path / "x.safetensors", ready, ema=False, out=tmp_path / "out"))
        assert result["taken"] == "generator_ema.model"

    @pytest.mark.parametrize("name", ["folder", "index", "shard"])
    def test_shards_in_diffusers_names(self, ready: Path, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "given" / "transformer"
        transformer(4).save_pretrained(folder, max_shard_size="60KB")
        given = {
            "folder": folder.parent,
            "index": folder / "diffusion_pytorch_model.safetensors.index.json",
            "shard": sorted(folder.glob("*-of-*"))[1],
        }[name]
        result = convert(request(given, ready, out=tmp_path / "out"))
        assert result["found_layout"] == "diffusers"
        assert same(weights(tmp_path / "out"), transformer(4).state_dict())

    def test_a_missing_shard_is_named(self, ready: Path, tmp_path: Path) -> None:
        transformer(4).save_pretrained(tmp_path / "given", max_shard_size="60KB")
        gone, *_, left = sorted((tmp_path / "given").glob("*-of-*"))
        gone.unlink()
        with pytest.raises(CheckpointError, match=gone.name):
            convert(request(left, ready, out=tmp_path / "out"))

    def test_a_pipeline_folder_brings_its_own_parts(self, ready: Path, tmp_path: Path) -> None:
        convert(request(ready, None, out=tmp_path / "out"))
        assert same(weights(tmp_path / "out"), transformer(0).state_dict())
        CausalVideoPipeline.from_pretrained(tmp_path / "out")

    def test_parts_are_linked_not_copied(self, ready: Path, tmp_path: Path, monkeypatch: Any) -> None:
        convert(request(ready, None, out=ready.parent / "linked"))
        part = Path("vae") / "diffusion_pytorch_model.safetensors"
        assert os.path.samefile(ready / part, ready.parent / "linked" / part)

        def refuse(*arguments: object) -> None:
            raise OSError("another file system")

        monkeypatch.setattr(os, "link", refuse)
        convert(request(ready, None, out=tmp_path / "copied"))
        assert not os.path.samefile(ready / part, tmp_path / "copied" / part)
        assert (ready / part).read_bytes() == (tmp_path / "copied" / part).read_bytes()

    def test_dtype_and_what_stays_in_float32(self, ready: Path, tmp_path: Path) -> None:
        save_file(wan_state(5), tmp_path / "x.safetensors")
        convert(request(tmp_path / "x.safetensors", ready, dtype="bf16", out=tmp_path / "out"))
        found = weights(tmp_path / "out")
        for name, tensor in transformer(5).state_dict().items():
            kept = any(
                part in name for part in ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
            )
            wanted = tensor if kept else tensor.bfloat16()
            assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name

    def test_eight_bit_floats_without_scales_are_cast(self, ready: Path, tmp_path: Path) -> None:
        state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in wan_state().items()}
        save_file(state, tmp_path / "x.safetensors")
        convert(request(tmp_path / "x.safetensors", ready, out=tmp_path / "out"))
        wanted = {k: v.to(torch.float8_e4m3fn).float() for k, v in transformer().state_dict().items()}
        assert same(weights(tmp_path / "out"), wanted)

    def test_wans_own_layout(self, tmp_path: Path) -> None:
        transformer(6).save_pretrained(tmp_path / "given", max_shard_size="60KB")
        result = convert(request(tmp_path / "given", None, layout="wan", out=tmp_path / "out"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{ENTRY.name}.safetensors"]
        wanted = {name.removeprefix("model."): tensor for name, tensor in wan_state(6).items()}
        assert same(load_file(tmp_path / "out" / f"{ENTRY.name}.safetensors"), wanted)
        assert result["layout"] == "wan" and result["bytes"] > 0

    def test_output_in_shards_loads(
        self, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(converting, "SHARD_BYTES", 60_000)
        save_file(wan_state(7), tmp_path / "x.safetensors")
        convert(request(tmp_path / "x.safetensors", ready, out=tmp_path / "out"))
        files = list((tmp_path / "out" / "transformer").glob("*-of-*.safetensors"))
        assert len(files) > 3 and all(path.stat().st_size < 80_000 for path in files)
        pipe = CausalVideoPipeline.from_pretrained(tmp_path / "out")
        assert same(pipe.transformer.state_dict(), transformer(7).state_dict())


class TestRefusals:
    def refused(
        self, state: Mapping[str, Tensor], base: Path, tmp_path: Path, model: str = ENTRY.name
    ) -> str:
        save_file(dict(state), tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError) as caught:
            convert(Request((tmp_path / "x.safetensors",), model, base, out=tmp_path / "out"))
        message = str(caught.value)
        assert "x.safetensors" in message and "\n" not in message
        # nothing is left of it, and nothing of the folder it was to be
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]
        return message

    def test_a_missing_tensor(self, ready: Path, tmp_path: Path) -> None:
        state = wan_state()
        del state["model.blocks.1.ffn.2.bias"]
        message = self.refused(state, ready, tmp_path)
        assert "blocks.1.ffn.net.2.bias (48,) is missing" in message

    def test_a_tensor_without_a_place(self, ready: Path, tmp_path: Path) -> None:
        message = self.refused(wan_state() | {"model.img_emb.proj.0.bias": noise(3)}, ready, tmp_path)
        assert "img_emb.proj.0.bias (3,) has no place in it (1 such tensors)" in message

    def test_another_models_shapes_name_that_model(self, ready: Path, tmp_path: Path) -> None:
        message = self.refused(wan_state(), ready, tmp_path, OTHER.name)
        assert "blocks.0.ffn.0.weight is (64, 48), the model has (96, 48)" in message
        assert f"it fits {ENTRY.name}" in message

    def test_shapes_that_fit_none(self, ready: Path, tmp_path: Path) -> None:
        state = wan_state() | {"model.head.head.bias": noise(5)}
        message = self.refused(state, ready, tmp_path, OTHER.name)
        assert "is (64, 48)" in message or "is (5,)" in message

    def test_two_layouts_at_once(self, ready: Path, tmp_path: Path) -> None:
        state = wan_state() | {"model.proj_out.bias": noise(16)}
        assert "one tensor in two layouts" in self.refused(state, ready, tmp_path)

    def test_quantized_weights(self, ready: Path, tmp_path: Path) -> None:
        scaled = wan_state() | {"model.blocks.0.ffn.0.scale_weight": torch.ones(1)}
        assert "quantized" in self.refused(scaled, ready, tmp_path)
        integer = {name: tensor.to(torch.int8) for name, tensor in wan_state().items()}
        assert "I8" in self.refused(integer, ready, tmp_path)

    def test_foreign_weights(self, ready: Path, tmp_path: Path) -> None:
        assert "no weights of a Wan transformer" in self.refused({"encoder.x": noise(2)}, ready, tmp_path)

    def test_lora_factors_alone(self, ready: Path, tmp_path: Path) -> None:
        path = tmp_path / "lora.pt"
        torch.save({"generator_lora": {"blocks.0.self_attn.q.lora_A.weight": noise(2, 2)}}, path)
        with pytest.raises(CheckpointError, match=r"--lora lora\.pt"):
            convert(request(path, ready, out=tmp_path / "out"))

    def test_a_base_of_another_model(self, ready: Path, tmp_path: Path, base: Path) -> None:
        entry = replace(ENTRY, name="tiny-text", text=dict(ENTRY.text) | {"d_ff": 80})
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(registry.MODELS, entry.name, entry)
            for given in (base, ready):
                with pytest.raises(CheckpointError, match=r"\(96, 64\), the model has \(80, 64\)"):
                    convert(Request((ready,), entry.name, given, out=tmp_path / "out"))

    def test_a_base_without_its_files(self, ready: Path, base: Path, tmp_path: Path) -> None:
        shutil.copytree(base, tmp_path / "base")
        (tmp_path / "base" / "Wan2.1_VAE.pth").unlink()
        with pytest.raises(CheckpointError, match=r"Wan2\.\*_VAE\.pth"):
            convert(request(ready, tmp_path / "base", out=tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_is_there(self, ready: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        with pytest.raises(OutputError, match="--force"):
            convert(request(ready, None, out=tmp_path / "out"))
        assert (tmp_path / "out" / "precious").exists()
        convert(request(ready, None, out=tmp_path / "out", force=True))
        assert not (tmp_path / "out" / "precious").exists()
        CausalVideoPipeline.from_pretrained(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_interruption_leaves_the_old_folder_and_no_other(
        self, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        convert(request(ready, None, out=tmp_path / "out"))
        stamp = (tmp_path / "out").stat().st_ino

        def stop(*arguments: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(converting, "_write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(request(ready, None, out=tmp_path / "out", force=True))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out").stat().st_ino == stamp

    def test_a_small_disk(self, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
        with pytest.raises(ResourceError, match=r"0\.0 GB free"):
            convert(request(ready, None, out=tmp_path / "out"))


class TestLora:
    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_a_published_lora_is_merged(self, ready: Path, tmp_path: Path, suffix: str) -> None:
        up, down = noise(48, 3, seed=1), noise(3, 48, seed=2)
        factors = {
            "base_model.model.blocks.1.self_attn.k.lora_A.weight": down,
            "base_model.model.blocks.1.self_attn.k.lora_B.weight": up,
        }
        path = tmp_path / f"lora.{suffix}"
        if suffix == "pt":
            torch.save({"generator_lora": factors, "critic_lora": factors}, path)
        else:
            save_file(factors, path)
        result = convert(request(ready, None, lora=path, out=tmp_path / "out"))
        assert result["lora_tensors"] == 1
        wanted = transformer().state_dict()
        name = "blocks.1.attn1.to_k.weight"
        found = weights(tmp_path / "out")
        assert torch.allclose(found[name], wanted[name] + up @ down, atol=1e-6)
        assert not torch.allclose(found.pop(name), wanted.pop(name))
        assert same(found, wanted)


class TestHub:
    def test_commands_where_the_cache_is_empty(self, ready: Path) -> None:
        with pytest.raises(
            InputError, match=r"hf download someone/tiny tiny\.pt && hf download someone/base"
        ):
            convert(Request((), ENTRY.name, ready))
        with pytest.raises(
            InputError, match=r"--base, or get them: hf download someone/base Wan2\.1_VAE\.pth"
        ):
            convert(Request((ready / "transformer",), ENTRY.name))

    def test_files_in_the_cache_are_found(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.save({"generator_ema": wan_state(8)}, tmp_path / "tiny.pt")
        folders = {"someone/tiny": tmp_path, "someone/base": base}

        def cached(repository: str, name: str) -> str | None:
            path = folders[repository] / name
            return str(path) if path.exists() else None

        monkeypatch.setattr(hub, "try_to_load_from_cache", cached)
        result = convert(Request((), ENTRY.name, dtype="fp32"))
        assert same(weights(Path(result["out"])), transformer(8).state_dict())


class TestCommand:
    def test_one_object_on_stdout(
        self, ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        arguments = ["convert", str(ready), "--model", ENTRY.name, "--out", str(out), "--dtype", "fp16"]
        code, text, _ = run(capsys, *arguments, "--json")
        assert code == 0
        result = json.loads(text)
        assert result["model"] == ENTRY.name and result["dtype"] == "fp16" and result["out"] == str(out)
        assert weights(out)["proj_out.weight"].dtype == torch.float16
        code, text, errors = run(capsys, *arguments)
        assert code == 2 and text == "" and errors.startswith(f"vidkv: {out} exists")
        code, text, _ = run(capsys, *arguments, "--force")
        assert code == 0 and text.startswith(f"{out}: {ENTRY.name}")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("x.txt", "--model", ENTRY.name, "--layout", "wan"), "x.txt is no weights file"),
            (("x.pt", "--model", ENTRY.name, "--layout", "wan"), "x.pt is missing"),
            (("x.pt", "--model", "nobody"), "unknown model 'nobody'"),
            (
                ("x.pt", "--model", ENTRY.name, "--dtype", "int3"),
                "'int3' is unknown; choose bf16, fp16, fp32",
            ),
            (("x.pt", "--model", ENTRY.name, "--layout", "x"), "'x' is unknown; choose diffusers or wan"),
            (("x.pt", "--model", ENTRY.name, "--base", "none"), "--base none is no folder"),
            (("--model", "bounce"), "no published weights"),
        ],
    )
    def test_what_cannot_be_used_is_named(
        self, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
    ) -> None:
        code, text, errors = run(capsys, "convert", *arguments)
        assert code == 2 and text == "" and message in errors and errors.count("\n") == 1
