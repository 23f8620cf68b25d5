"""A damaged model folder is refused before anything is loaded, naming the file and the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UMT5EncoderModel

from tests.tiny import build_pipeline
from vidkv.errors import CheckpointError, InputError, VidkvError
from vidkv.loading import find_model
from vidkv.models.checkpoints.folders import file_shapes, model_shapes, read_json, require_tokenizer, verify
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.pipeline import CausalVideoPipeline

PARTS: dict[str, tuple[type[nn.Module], str]] = {
    "transformer": (CausalWanTransformer3DModel, "diffusion_pytorch_model.safetensors"),
    "vae": (AutoencoderKLWan, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (UMT5EncoderModel, "model.safetensors"),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage."""
    shutil.copytree(pristine, tmp_path / "model")
    yield tmp_path / "model"


Damage = Callable[[dict[str, torch.Tensor], str], object]
DAMAGES: dict[str, Damage] = {
    "missing": lambda tensors, name: tensors.pop(name),
    "shape": lambda tensors, name: tensors.update({name: tensors[name][..., :1].clone()}),
    "rank": lambda tensors, name: tensors.update({name: tensors[name].flatten()[None, None]}),
    "extra": lambda tensors, name: tensors.update({f"{name}.spare": torch.zeros(1)}),
    "renamed": lambda tensors, name: tensors.update({f"module.{name}": tensors.pop(name)}),
}


class TestWeights:
    @pytest.mark.parametrize("part", PARTS)
    def test_whole_files_pass(self, folder: Path, part: str) -> None:
        verify(folder / part, PARTS[part][0])

    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("part", PARTS)
    def test_tensors(self, folder: Path, part: str, damage: str) -> None:
        path = folder / part / PARTS[part][1]
        tensors = load_file(path)
        name = sorted(n for n, t in tensors.items() if t.shape[-1] > 1)[-1]
        DAMAGES[damage](tensors, name)
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            CausalVideoPipeline.from_pretrained(folder)
        assert str(path) in str(caught.value) and name in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("keep", [0, 4, 0.3, 0.99], ids=str)
    @pytest.mark.parametrize("part", PARTS)
    def test_truncated(self, folder: Path, part: str, keep: float) -> None:
        path = folder / part / PARTS[part][1]
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        with pytest.raises(CheckpointError, match="damaged") as caught:
            CausalVideoPipeline.from_pretrained(folder)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("part", PARTS)
    def test_gone(self, folder: Path, part: str) -> None:
        path = folder / part / PARTS[part][1]
        path.unlink()
        with pytest.raises(CheckpointError, match="is missing") as caught:
            CausalVideoPipeline.from_pretrained(folder)
        assert str(path) in str(caught.value)

    def test_of_another_configuration(self, folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 3}))
        with pytest.raises(CheckpointError, match=r"blocks\.2\."):
            CausalVideoPipeline.from_pretrained(folder)

    def test_that_describes_no_model(self, folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 5}))
        with pytest.raises(CheckpointError, match="describes no CausalWanTransformer3DModel") as caught:
            CausalVideoPipeline.from_pretrained(folder)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("heads", [0, -1, "two", None], ids=repr)
    def test_of_impossible_values(self, folder: Path, heads: object) -> None:
        """Model classes do not check their settings: they divide by zero."""
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": heads}))
        with pytest.raises(CheckpointError) as caught:
            verify(folder / "transformer", CausalWanTransformer3DModel)
        assert str(folder / "transformer") in str(caught.value) and "\n" not in str(caught.value)

    def test_shapes_cost_no_memory(self) -> None:
        """14 billion weights, none of them allocated."""
        from vidkv.models.registry import MODELS

        shapes = model_shapes(CausalWanTransformer3DModel, MODELS["wan2.1-14b"].transformer)
        assert shapes["blocks.39.attn1.to_q.weight"] == (5120, 5120)

    def test_header_alone_is_read(self, folder: Path) -> None:
        path = folder / "vae" / PARTS["vae"][1]
        assert file_shapes(path) == {name: tuple(t.shape) for name, t in load_file(path).items()}


class TestSmallFiles:
    @pytest.mark.parametrize(
        "name",
        [
            "model_index.json",
            "transformer/config.json",
            "vae/config.json",
            "text_encoder/config.json",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
        ],
    )
    @pytest.mark.parametrize("content", [None, "", '{"half":', "[1, 2]", "\x00\x01"], ids=repr)
    def test_missing_or_damaged(self, folder: Path, name: str, content: str | None) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        with pytest.raises(CheckpointError) as caught:
            CausalVideoPipeline.from_pretrained(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            ({"model": "wan9"}, "names the model 'wan9'; known are"),
            ({"steps": [250, 500]}, "denoising steps"),
            ({"shift": -1}, "shift"),
            ({"sampler": "heun"}, "'heun'"),
            ({"prompt_grammar": "bounce:huge"}, "'bounce:huge'"),
        ],
        ids=str,
    )
    def test_settings_that_cannot_be_used(self, folder: Path, setting: dict[str, object], words: str) -> None:
        """Found on loading, not in the middle of a video."""
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | setting))
        with pytest.raises(CheckpointError, match=words):
            CausalVideoPipeline.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_tokenizer_without_its_files(self, folder: Path, name: str) -> None:
        require_tokenizer(folder / "tokenizer")
        (folder / "tokenizer" / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            require_tokenizer(folder / "tokenizer")

    def test_read_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"a": 1}')
        assert read_json(tmp_path / "a.json") == {"a": 1}
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_json(tmp_path)


class TestWhichModel:
    @pytest.mark.parametrize("name", ["wan9", "", "/no/such/folder", Path("nowhere")], ids=str)
    def test_unknown(self, name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(VidkvError) as caught:
            CausalVideoPipeline.from_pretrained(name)
        assert isinstance(caught.value, InputError | CheckpointError)

    def test_names_what_there_is(self) -> None:
        with pytest.raises(InputError, match=r"unknown model 'wan9'.*bounce"):
            find_model("wan9")

    def test_known_without_weights(self) -> None:
        with pytest.raises(
            InputError, match=r"wan2\.1-1\.3b are not here.*vidkv convert --model wan2\.1-1\.3b"
        ):
            find_model("wan2.1-1.3b")

    def test_a_folder(self, pristine: Path) -> None:
        assert find_model(pristine) == find_model(str(pristine)) == pristine
