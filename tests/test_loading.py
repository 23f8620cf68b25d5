"""From a name or a folder to networks: what is loaded, what waits for a prompt, and what is refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import nn

from tests.models.checkpoints.stock_files import ENTRY
from tests.tiny import CHANNELS, build_pipeline, randomise
from vidkv import loading
from vidkv.errors import CheckpointError, InputError
from vidkv.loading import LoadOptions, find_model, keeps_text, load_parts, model_entry, prompts_on_demand
from vidkv.models import registry
from vidkv.models.checkpoints.folders import verify
from vidkv.models.text import encode_prompts
from vidkv.models.tiny_vae import TinyVideoDecoder
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.models.weights import precision_of
from vidkv.pipeline import CausalVideoPipeline

PROMPTS = ["a red circle bouncing", "a blue square resting"]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("VIDKV_HOME", str(home))
    monkeypatch.setitem(registry.MODELS, ENTRY.name, ENTRY)
    return home


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def bounce(saved: Path, tmp_path: Path) -> Path:
    """A model of the kind whose text encoder stays."""
    return Path(shutil.copytree(saved, tmp_path / "bounce-like"))


@pytest.fixture
def stock(saved: Path, tmp_path: Path) -> Path:
    """The same networks under the name of a model that the user brings."""
    return renamed(Path(shutil.copytree(saved, tmp_path / "stock-like")), ENTRY.name)


def renamed(folder: Path, name: str) -> Path:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"model": name, "prompt_grammar": None}))
    return folder


def tiny_decoder(**settings: Any) -> TinyVideoDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyVideoDecoder(latent_channels=CHANNELS, channels=(8, 6, 4, 4), **settings)
    randomise(model, spread=0.1)
    return model.eval().requires_grad_(False)


class TestOptions:
    def test_defaults_are_accepted(self) -> None:
        assert (LoadOptions().weights, LoadOptions().text) == ("full", "auto")

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"weights": "int3"}, r"weights='int3'; choose full, fp8, int8"),
            ({"text_weights": "half"}, r"weights='half'; choose full, fp8, int8"),
            ({"text": "sometimes"}, r"text='sometimes'; choose auto, resident or on_demand"),
        ],
    )
    def test_unknown_choices(self, settings: dict[str, str], words: str) -> None:
        with pytest.raises(InputError, match=words):
            LoadOptions(**settings)  # type: ignore[arg-type]


class TestFinding:
    def test_a_folder(self, bounce: Path) -> None:
        assert find_model(bounce) == find_model(str(bounce)) == bounce

    def test_the_shipped_model(self) -> None:
        folder = find_model("bounce")
        assert folder == registry.weights_folder(registry.MODELS["bounce"])
        assert model_entry(folder).name == "bounce"

    def test_a_converted_model_by_its_name(self, stock: Path, own_home: Path) -> None:
        with pytest.raises(InputError, match="someone/tiny") as caught:
            find_model(ENTRY.name)
        place = own_home / "models" / ENTRY.name
        assert f"vidkv convert --model {ENTRY.name}" in str(caught.value) and str(place) in str(caught.value)
        shutil.copytree(stock, place)
        assert find_model(ENTRY.name) == place

    def test_what_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="unknown model 'nowhere': neither a folder nor one of bounce"):
            find_model("nowhere")
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
            find_model(empty)
        weights = tmp_path / "weights.pt"
        weights.touch()
        with pytest.raises(CheckpointError, match=rf"vidkv convert {weights} --model NAME"):
            find_model(weights)

    def test_a_folder_of_an_unknown_kind(self, bounce: Path) -> None:
        assert model_entry(bounce).name == "bounce"
        with pytest.raises(CheckpointError, match="names the model 'wan9'; known are bounce"):
            model_entry(renamed(bounce, "wan9"))


class TestParts:
    def test_are_those_that_were_saved(self, bounce: Path) -> None:
        parts, wanted = load_parts(bounce, LoadOptions(), set()), build_pipeline()
        assert set(parts) == {"transformer", "vae", "text_encoder", "tokenizer"}
        for name in ("transformer", "vae", "text_encoder"):
            found = parts[name].state_dict()
            assert found.keys() == getattr(wanted, name).state_dict().keys()
            for key, tensor in getattr(wanted, name).state_dict().items():
                assert torch.equal(found[key], tensor), f"{name}: {key}"
            assert not parts[name].training
            assert not any(p.requires_grad for p in parts[name].parameters())

    @pytest.mark.parametrize(
        ("text", "stays"),
        [("auto", (True, False)), ("resident", (True, True)), ("on_demand", (False, False))],
    )
    def test_who_keeps_the_text_encoder(
        self, bounce: Path, stock: Path, text: str, stays: tuple[bool, bool]
    ) -> None:
        for folder, wanted in zip((bounce, stock), stays, strict=True):
            options = LoadOptions(text=text)
            assert keeps_text(folder, options) == wanted
            parts = load_parts(folder, options, {"vae", "transformer"})
            assert set(parts) == {"text_encoder", "tokenizer"}
            assert (parts["text_encoder"] is not None, parts["tokenizer"] is not None) == (wanted, wanted)

    def test_those_that_the_caller_has(self, stock: Path) -> None:
        """A given text encoder needs its tokenizer; broken files of skipped parts are of no concern."""
        shutil.rmtree(stock / "transformer")
        shutil.rmtree(stock / "text_encoder")
        parts = load_parts(stock, LoadOptions(), {"transformer", "text_encoder"})
        assert set(parts) == {"vae", "tokenizer"} and parts["tokenizer"] is not None

    @pytest.mark.parametrize("name", ["transformer", "text_encoder"])
    def test_missing_weights_are_found_before_anything_is_loaded(
        self, stock: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also those that would be read on demand only."""
        monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("something was loaded"))
        for file in (stock / name).glob("*.safetensors"):
            file.unlink()
        with pytest.raises(CheckpointError, match=name):
            load_parts(stock, LoadOptions(), set())

    def test_a_missing_tokenizer(self, stock: Path) -> None:
        (stock / "tokenizer" / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
            load_parts(stock, LoadOptions(), set())

    def test_dtype(self, bounce: Path) -> None:
        parts = load_parts(bounce, LoadOptions(torch.bfloat16), set())
        assert {parts[name].dtype for name in ("transformer", "vae", "text_encoder")} == {torch.bfloat16}

    @pytest.mark.parametrize(("weights", "text"), [("fp8", "full"), ("full", "fp8"), ("int8", "fp8")])
    def test_precisions_are_each_network_s_own(self, bounce: Path, weights: str, text: str) -> None:
        if weights == "int8":
            pytest.importorskip("torchao")
        parts = load_parts(bounce, LoadOptions(weights=weights, text_weights=text), {"vae"})
        assert precision_of(parts["transformer"]) == weights
        assert precision_of(parts["text_encoder"]) == text


class TestVae:
    def load(self, folder: Path, vae: Path | None = None) -> Any:
        options = LoadOptions(torch.bfloat16, vae=vae)
        return load_parts(folder, options, {"transformer", "text_encoder", "tokenizer"})["vae"]

    def test_a_tiny_decoder_s_file(self, bounce: Path, tmp_path: Path) -> None:
        decoder = tiny_decoder()
        save_file(decoder.state_dict(), tmp_path / "TAEW2_1.safetensors")
        vae = self.load(bounce, tmp_path / "TAEW2_1.safetensors")
        assert isinstance(vae, TinyVideoDecoder) and vae.dtype == torch.bfloat16
        for name, tensor in decoder.state_dict().items():
            assert torch.equal(vae.state_dict()[name], tensor.bfloat16()), name

    def test_folders_of_either_class(self, bounce: Path, tmp_path: Path) -> None:
        assert isinstance(self.load(bounce), AutoencoderKLWan)
        tiny_decoder().save_pretrained(tmp_path / "tiny")
        assert isinstance(self.load(bounce, tmp_path / "tiny"), TinyVideoDecoder)

    def test_of_another_class(self, bounce: Path) -> None:
        config = bounce / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderKL"}))
        with pytest.raises(CheckpointError, match="'AutoencoderKL'; known are AutoencoderKLWan"):
            self.load(bounce)

    def test_a_file_that_is_none(self, bounce: Path, tmp_path: Path) -> None:
        for name in ("taew2_1.pth", "taew2_1.safetensors", "other.safetensors"):
            (tmp_path / name).write_bytes(b"nothing")
            with pytest.raises(CheckpointError, match=name):
                self.load(bounce, tmp_path / name)


class TestTextOnDemand:
    @pytest.fixture
    def loads(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Folders whose text encoder was loaded, in order."""
        found: list[Path] = []
        load = loading.load_text_encoder
        monkeypatch.setattr(
            loading,
            "load_text_encoder",
            lambda folder, options: (found.append(folder), load(folder, options))[1],
        )
        return found

    def test_the_same_embeddings_loaded_once(self, stock: Path, own_home: Path, loads: list[Path]) -> None:
        device = torch.device("cpu")
        encoder = prompts_on_demand(stock, LoadOptions(), device)
        assert not encoder.loaded and loads == []
        found = encoder.encode(PROMPTS)
        assert loads == [stock] and not encoder.loaded
        parts = load_parts(stock, LoadOptions(text="resident"), {"vae", "transformer"})
        loads.clear()
        for i, prompt in enumerate(PROMPTS):
            wanted = encode_prompts(parts["tokenizer"], parts["text_encoder"], [prompt], ENTRY.text_tokens)
            assert torch.equal(found[i : i + 1], wanted)
        assert len(list((own_home / "embeddings").iterdir())) == 2
        again = prompts_on_demand(stock, LoadOptions(), device).encode(PROMPTS)
        assert torch.equal(again, found) and loads == []

    def test_other_weights_are_other_embeddings(self, stock: Path, loads: list[Path]) -> None:
        device = torch.device("cpu")
        full = prompts_on_demand(stock, LoadOptions(), device).encode(PROMPTS)
        narrow = prompts_on_demand(stock, LoadOptions(text_weights="fp8"), device).encode(PROMPTS)
        assert len(loads) == 2
        assert not torch.equal(full, narrow)
        half = prompts_on_demand(stock, LoadOptions(torch.bfloat16), device).encode(PROMPTS)
        assert len(loads) == 3 and half.dtype == torch.bfloat16


def test_plans_and_loads_of_several_threads_do_not_meet(saved: Path) -> None:
    """Networks without memory are built by a context that changes torch's modules for all threads."""
    loaded: list[CausalVideoPipeline] = []

    def plan_shapes() -> None:
        verify(saved / "transformer", CausalWanTransformer3DModel)

    def load() -> None:
        loaded.append(CausalVideoPipeline.from_pretrained(saved))

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(verify, saved / "transformer", CausalWanTransformer3DModel) for _ in range(30)]
        waiting += [pool.submit(load) for _ in range(4)]
        waiting += [
            pool.submit(verify, saved / "transformer", CausalWanTransformer3DModel) for _ in range(30)
        ]
        for future in waiting:
            future.result()
    assert len(loaded) == 4
    assert not any(parameter.is_meta for pipe in loaded for parameter in pipe.transformer.parameters())
    assert not nn.Linear(2, 2).weight.is_meta
