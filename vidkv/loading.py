"""From a name or a folder to networks on a device."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from vidkv.embeddings import EmbeddingCache, PromptEncoder, folder_fingerprint
from vidkv.errors import CheckpointError, InputError
from vidkv.heads import FILE, checked, read_shares
from vidkv.models.checkpoints.empty import BUILDING
from vidkv.models.checkpoints.folders import models_home, read_json, require_tokenizer, verify
from vidkv.models.checkpoints.load import load_model
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import MODELS, known_model, weights_folder
from vidkv.models.tiny_vae import TinyVideoDecoder
from vidkv.models.vae_files import load_tiny_decoder, load_wan_vae
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.models.weights import check_library, check_precision, set_precision

VAES: dict[str, type[nn.Module]] = {
    "AutoencoderKLWan": AutoencoderKLWan,
    "TinyVideoDecoder": TinyVideoDecoder,
}


@dataclass(frozen=True)
class LoadOptions:
    """How a model's networks are loaded.

    Attributes:
        dtype: what they compute in.
        device: where they are loaded to.
        weights, text_weights: `full`, `fp8` or `int8` storage of the transformer's and text encoder's linear
            layers.
        text: `resident` keeps the text encoder beside the transformer; `on_demand` loads it for new prompts
            alone and keeps embeddings on disk; `auto` is resident for the embedded model only.
        vae: a safetensors file or folder with another decoder, such as TAEHV or LightVAE.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    weights: str = "full"
    text_weights: str = "full"
    text: str = "auto"
    vae: Path | None = None

    def __post_init__(self) -> None:
        for precision in (self.weights, self.text_weights):
            check_library(check_precision(precision))
        if self.text not in ("auto", "resident", "on_demand"):
            raise InputError(f"text={self.text!r}; choose auto, resident or on_demand")


def find_model(model: str | Path) -> Path:
    """The folder of a model by registry name or path.

    Raises:
        InputError: neither, with what there is, or a known model whose weights are not here.
        CheckpointError: a folder without `model_index.json`, or a file that is to be converted first.
    """
    entry = MODELS.get(str(model))
    folder = Path(model)
    if entry is not None:
        folder = weights_folder(entry) or models_home() / entry.name
        if not folder.is_dir():
            source = entry.source
            where = f" (its weights are in {source.repository})" if source else ""
            raise InputError(
                f"the weights of {model} are not here{where}; run `vidkv convert --model {model}`, which "
                f"says what to download and writes {folder}, or give the folder that holds them"
            )
    elif folder.is_file():
        raise CheckpointError(
            f"{folder} is a file; turn it into a folder first: vidkv convert {folder} --model NAME "
            "--out FOLDER"
        )
    elif not folder.is_dir():
        raise InputError(
            f"unknown model {str(model)!r}: neither a folder nor one of {', '.join(MODELS)}; `vidkv models` "
            "says which are here"
        )
    read_json(folder / "model_index.json")
    return folder


def model_entry(folder: Path) -> ModelEntry:
    """What kind of model a folder holds, by its `model_index.json`.

    Raises:
        CheckpointError: it names no known one.
    """
    name = str(read_json(folder / "model_index.json").get("model", "bounce"))
    if name not in MODELS:
        raise CheckpointError(
            f"{folder / 'model_index.json'} names the model {name!r:.60}; known are {', '.join(MODELS)}"
        )
    return known_model(name)


def load_parts(folder: Path, options: LoadOptions, skip: set[str]) -> dict[str, Any]:
    """The networks of a pipeline folder by their names; those loaded on demand are None.

    Args:
        skip: parts that the caller has.

    Raises:
        CheckpointError: files missing, damaged or of the wrong shape.
    """
    resident = keeps_text(folder, options)
    # the modules of a network refer to each other: one that was let go stays until it is looked for
    gc.collect()
    for name, build in (("transformer", CausalWanTransformer3DModel), ("text_encoder", UMT5EncoderModel)):
        if name not in skip:
            verify(folder / name, build)
    parts: dict[str, Any] = {}
    if "vae" not in skip:
        parts["vae"] = _vae(folder / "vae", options)
    if "transformer" not in skip:
        parts["transformer"] = _network(
            CausalWanTransformer3DModel, folder / "transformer", options, options.weights
        )
        config = parts["transformer"].config
        parts["transformer"].history_share = checked(read_shares(folder), config, folder / FILE)
    if {"text_encoder", "tokenizer"} & skip:
        resident = True
    if "tokenizer" not in skip:
        require_tokenizer(folder / "tokenizer")
        parts["tokenizer"] = load_tokenizer(folder) if resident else None
    if "text_encoder" not in skip:
        parts["text_encoder"] = load_text_encoder(folder, options) if resident else None
    return parts


def keeps_text(folder: Path, options: LoadOptions) -> bool:
    """Whether the text encoder stays beside the transformer."""
    if options.text == "auto":
        return model_entry(folder).weights is not None
    return options.text == "resident"


def prompts_on_demand(folder: Path, options: LoadOptions, device: torch.device) -> PromptEncoder:
    """A prompt encoder that loads the text encoder for new prompts alone and keeps embeddings on disk."""
    fingerprint = folder_fingerprint(folder / "text_encoder", folder / "tokenizer") + options.text_weights

    def load() -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
        return load_tokenizer(folder), load_text_encoder(folder, options)

    return PromptEncoder(
        load,
        model_entry(folder).text_tokens,
        EmbeddingCache(models_home().parent / "embeddings"),
        fingerprint,
        device,
        options.dtype,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder / "tokenizer", local_files_only=True
    )
    return tokenizer


def load_text_encoder(folder: Path, options: LoadOptions) -> UMT5EncoderModel:
    return _network(UMT5EncoderModel, folder / "text_encoder", options, options.text_weights)


def _network(build: type[nn.Module], folder: Path, options: LoadOptions, precision: str) -> Any:
    # a narrower copy is made beside the full one: that may not fit where it is to stay
    device = options.device if precision == "full" else "cpu"
    with BUILDING:
        model = load_model(build, folder, device, options.dtype)
        set_precision(model, check_precision(precision), options.dtype)
        return model.to(options.device)


def _vae(folder: Path, options: LoadOptions) -> nn.Module:
    path = options.vae or folder
    if path.is_file():
        tiny = "tae" in path.name.lower()
        vae = load_tiny_decoder(path) if tiny else load_wan_vae(path)
        return vae.to(options.device, options.dtype).eval().requires_grad_(False)
    name = str(read_json(path / "config.json").get("_class_name", "AutoencoderKLWan"))
    if name not in VAES:
        raise CheckpointError(
            f"{path / 'config.json'} names the class {name!r:.60}; known are {', '.join(VAES)}"
        )
    return load_model(VAES[name], path, options.device, options.dtype)
