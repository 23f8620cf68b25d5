"""`vidkv convert`: checkpoints as their authors publish them become folders that the pipeline loads."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidkv.errors import CheckpointError, InputError, OutputError, ResourceError
from vidkv.models.checkpoints import layouts
from vidkv.models.checkpoints.folders import (
    model_shapes,
    models_home,
    require_tokenizer,
    stored_files,
    stored_shapes,
    verify,
)
from vidkv.models.checkpoints.hub import TOKENIZER, base_files, cached, cached_weights, download_commands
from vidkv.models.checkpoints.load import empty_model, kept_in_fp32, tied_parameters
from vidkv.models.checkpoints.pickles import LORA_PARTS, PARTS, SUFFIXES, unpickle
from vidkv.models.checkpoints.sources import Merged, Weights, open_weights, save_weights, weight_files
from vidkv.models.checkpoints.stock import part_file, part_weights, transformer_weights
from vidkv.models.checkpoints.unpickle import DTYPES
from vidkv.models.families.base import ModelEntry
from vidkv.models.lora import merge_lora
from vidkv.models.registry import known_model
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.pipeline import CausalVideoPipeline

SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to convert.

    Attributes:
        files: the transformer's weights; empty: looked up in the local Hugging Face cache.
        model: registry name.
        base: where text encoder, tokenizer and VAE come from; None: the first of `files` if it is a folder
            that has them, else the local Hugging Face cache.
        lora: merged into the weights.
        out: folder to write; None: the model's in `models_home()`.
        dtype: of the transformer (`bf16`, `fp16`, `fp32`); the other parts keep their own.
        ema: prefer averaged weights where a file has both; None: as the model's authors do.
        layout: `diffusers` for vidkv, `wan` for one file with the names of Wan's own code.
        force: replace `out`.
    """

    files: tuple[Path, ...]
    model: str
    base: Path | None = None
    lora: Path | None = None
    out: Path | None = None
    dtype: str = "bf16"
    ema: bool | None = None
    layout: str = "diffusers"
    force: bool = False


def convert(request: Request, say: Say = lambda text: None) -> dict[str, Any]:
    """Write the folder; it appears whole or not at all.

    Raises:
        CheckpointError, InputError, OutputError, ResourceError: with the file, what is wrong and what to do.
    """
    entry = known_model(request.model)
    if request.dtype not in DTYPE_NAMES:
        raise InputError(f"--dtype {request.dtype!r:.40} is unknown; choose {', '.join(DTYPE_NAMES)}")
    if request.layout not in ("diffusers", "wan"):
        raise InputError(f"--layout {request.layout!r:.40} is unknown; choose diffusers or wan")
    given = request.files or cached_weights(entry)
    base = _base(request, entry) if request.layout == "diffusers" else None
    files = [file for path in given for file in weight_files(path)]
    files = list(dict.fromkeys(files))
    out = (request.out or models_home() / entry.name).absolute()
    if out.exists() and not request.force:
        raise OutputError(f"{out} exists; name another folder with --out, or replace it with --force")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _require_space(out.parent, files)
        with _terminable(), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            staged, scratch = Path(temporary, "model"), Path(temporary, "scratch")
            staged.mkdir()
            scratch.mkdir()
            result = _transformer(request, entry, files, staged, scratch, say)
            if base is not None:
                _parts(base, entry, staged, scratch, say)
                _write_index(entry, staged)
            if out.exists():
                out.rename(Path(temporary, "replaced"))
            staged.rename(out)
    except OSError as error:
        raise OutputError(f"{error.filename or out} cannot be written ({error.strerror})") from None
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"model": entry.name, "out": str(out), "layout": request.layout, **result, "bytes": size}


def summary(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    aside = f", left aside {', '.join(result['left_aside'])}" if result["left_aside"] else ""
    lora = f", LoRA merged into {result['lora_tensors']}" if result["lora_tensors"] else ""
    return (
        f"{result['out']}: {result['model']}, {result['tensors']} tensors of {result['taken']}{aside}{lora}, "
        f"{result['bytes'] / 1e9:.2f} GB"
    )


def _transformer(
    request: Request, entry: ModelEntry, files: list[Path], staged: Path, scratch: Path, say: Say
) -> dict[str, Any]:
    say(f"reading {', '.join(file.name for file in files[:3])}{' …' if len(files) > 3 else ''}")
    ema = request.ema
    if ema is None:
        ema = entry.source is None or entry.source.ema
    # the others stay as a last resort: a file may have one kind alone
    parts = PARTS if ema else tuple(sorted(PARTS, key=lambda part: part == "generator_ema"))
    held = open_weights(files, scratch, parts)
    found = layouts.unwrap(held.tensors, parts)
    if layouts.lora_only(held.tensors):
        raise CheckpointError(
            f"{files[0]} holds LoRA factors and no whole weights; give the base checkpoint as FILE and this "
            f"one as --lora {files[0].name}"
        )
    bare = held.renamed({raw: name for name, raw in found.names.items()})
    weights, raw, layout = transformer_weights(bare, entry, files[0])
    merged = 0
    if request.lora is not None:
        weights, merged = _merge(weights, request.lora, scratch)
    build, dtype = CausalWanTransformer3DModel, DTYPE_NAMES[request.dtype]
    if request.layout == "wan":
        pairs = layouts.inverted(layouts.transformer_pairs(layouts.layers(weights.tensors, "blocks.")))
        weights = weights.renamed({name: layouts.rename(name, pairs) or name for name in weights.tensors})
        save_weights(weights, staged, entry.name, dict.fromkeys(weights.tensors, dtype), 1 << 62)
    else:
        folder = staged / "transformer"
        empty_model(build, dict(entry.transformer)).save_config(folder)
        dtypes = {
            name: torch.float32 if kept_in_fp32(build, name, dtype) else dtype for name in weights.tensors
        }
        save_weights(weights, folder, "diffusion_pytorch_model", dtypes, SHARD_BYTES)
        verify(folder, build)
    taken = (*held.taken, *found.taken)
    return {
        "taken": ".".join(taken) or "plain state dict",
        "left_aside": sorted({*held.beside, *found.beside}),
        "found_layout": layout,
        "tensors": len(raw),
        "lora_tensors": merged,
        "dtype": request.dtype,
    }


def _merge(weights: Weights, lora: Path, scratch: Path) -> tuple[Weights, int]:
    if lora.suffix in SUFFIXES:
        folder = scratch / "lora"
        folder.mkdir()
        lora = unpickle(lora, folder, LORA_PARTS, shard_bytes=1 << 62).files[0]
    merged = Merged(weights, scratch)
    count = merge_lora(merged, lora)
    return merged.weights, count


def _parts(base: Path, entry: ModelEntry, staged: Path, scratch: Path, say: Say) -> None:
    """Text encoder, VAE and tokenizer, linked or converted."""
    text_config = UMT5Config(**entry.text).to_dict() | {"architectures": ["UMT5EncoderModel"]}
    vae = empty_model(AutoencoderKLWan, dict(entry.vae))
    whole = _is_pipeline(base)
    for name, build, config in (
        ("text_encoder", UMT5EncoderModel, text_config),
        ("vae", AutoencoderKLWan, dict(vae.config)),
    ):
        say(f"{'linking' if whole else 'converting'} {name}")
        folder = staged / name
        folder.mkdir()
        if whole:
            _link_part(base / name, folder, build, config)
            continue
        source = part_file(base, name)
        weights = part_weights(open_weights(weight_files(source), scratch), name, dict(vae.config))
        _compare(weights.shapes, build, config, str(source))
        if name == "vae":
            vae.save_config(folder)
        else:
            UMT5Config(**text_config).save_pretrained(folder)
        own = {spelled: dtype for dtype, spelled in DTYPES.items()}
        dtypes = {tensor: own[held.dtype] for tensor, held in weights.tensors.items()}
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_weights(weights, folder, stem, dtypes, SHARD_BYTES)
        verify(folder, build)
    source = base / "tokenizer" if whole else base / TOKENIZER
    require_tokenizer(source)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    tokenizer.model_max_length = entry.text_tokens
    tokenizer.save_pretrained(staged / "tokenizer")


def _link_part(source: Path, folder: Path, build: type[nn.Module], config: Mapping[str, object]) -> None:
    """The files of a `save_pretrained` folder, hard-linked where the file system allows."""
    verify(source, build)
    files = stored_files(source, build)
    _compare(stored_shapes(files), build, config, str(source))
    index = sorted(source.glob("*.safetensors.index.json")) if len(files) > 1 else []
    for path in (source / "config.json", *index, *files):
        # a hub cache holds links to the files
        real = path.resolve()
        try:
            os.link(real, folder / path.name)
        except OSError:
            shutil.copyfile(real, folder / path.name)


def _compare(
    found: Mapping[str, tuple[int, ...]], build: type[nn.Module], config: Mapping[str, object], where: str
) -> None:
    tied = tied_parameters(build)
    wanted = {k: shape for k, shape in model_shapes(build, config).items() if k in found or k not in tied}
    layouts.compare(dict(found), wanted, where, {}, "give the base that the model was made for")


def _write_index(entry: ModelEntry, staged: Path) -> None:
    """`model_index.json`, with the registry's schedule where the pipeline takes it."""
    tokenizer = json.loads((staged / "tokenizer" / "tokenizer_config.json").read_text())
    known = inspect.signature(CausalVideoPipeline.__init__).parameters
    settings = {name: value for name, value in entry.schedule.items() if name in known}
    index = {
        "_class_name": "CausalVideoPipeline",
        "_diffusers_version": diffusers.__version__,
        "model": entry.name,
        "transformer": ["vidkv.models.wan", "CausalWanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer["tokenizer_class"]],
        **settings,
    }
    (staged / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _is_pipeline(folder: Path) -> bool:
    return all((folder / name / "config.json").is_file() for name in ("text_encoder", "vae"))


def _base(request: Request, entry: ModelEntry) -> Path:
    """The folder of the other parts, known to have them by name.

    Raises:
        InputError: there is none, with the commands that get one.
    """
    first = request.files[0] if request.files else None
    base = request.base
    if base is None and first is not None and first.is_dir() and _has_parts(first):
        base = first
    if base is None and entry.source is not None:
        found = [cached(entry.source.base, name) for name in base_files(entry)]
        if all(found) and found[0] is not None:
            # the VAE's file lies at the top of the repository
            base = found[0].parent
    if base is None:
        raise InputError(
            f"{entry.name} needs a text encoder, a tokenizer and a VAE; name their folder with --base"
            + "".join(f", or get them: {line}" for line in download_commands(entry)[-1:])
        )
    if not base.is_dir():
        raise InputError(f"--base {base} is no folder; name one with text encoder, tokenizer and VAE")
    return base


def _has_parts(folder: Path) -> bool:
    return _is_pipeline(folder) or any(folder.glob("models_t5_*"))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that gigabytes of temporary files go."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_space(folder: Path, files: list[Path]) -> None:
    """Refuse before the work where the disk is too small: pickles are written twice."""
    needed = sum(2 * file.stat().st_size for file in files)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder} has {free / 1e9:.1f} GB free, converting needs about {needed / 1e9:.1f} GB; "
            "name another disk with --out"
        )
