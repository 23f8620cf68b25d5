"""Weights in files of any layout, opened as named tensors that are read when asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidkv.errors import CheckpointError
from vidkv.models.checkpoints.folders import Shapes, index_files
from vidkv.models.checkpoints.pickles import PARTS, SUFFIXES, unpickle
from vidkv.models.checkpoints.unpickle import DTYPES, shard_names, shards, spec_bytes, write_file

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class Held:
    """Where a tensor lies: its file, its name there, shape and dtype as safetensors spells it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Weights:
    """Named tensors in safetensors files; nothing is in memory until `read`.

    Attributes:
        tensors: name to where it lies.
        taken: parts of a pickled checkpoint that were unwrapped.
        beside: keys of it left aside.
    """

    tensors: dict[str, Held]
    taken: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def shapes(self) -> Shapes:
        return {name: held.shape for name, held in self.tensors.items()}

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The tensors under other names (old to new); those not named are left out."""
        return replace(self, tensors={new: self.tensors[old] for old, new in names.items()})

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype."""
        held = self.tensors[name]
        try:
            with safe_open(held.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(held.name)
                return tensor
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{held.path} is damaged ({error}); download it again") from None

    def require_floats(self) -> None:
        """Refuse quantized weights: their scales are of each tool's own kind.

        Raises:
            CheckpointError: naming the first tensor that cannot stand for itself.
        """
        for name, held in self.tensors.items():
            scale = re.search(
                r"(^|\.)(scale_weight|weight_scale\w*|scale_input|input_scale|scaled_fp8)$", name
            )
            if scale or held.dtype not in FLOATS:
                raise CheckpointError(
                    f"{held.path}: {held.name} ({held.dtype} {held.shape}) belongs to quantized weights; "
                    "take the bf16 or fp32 file of the same model, vidkv quantizes on its own"
                )


class Merged(MutableMapping[str, Tensor]):
    """Weights of which some are replaced; replacements go to disk, so that memory holds one at a time."""

    def __init__(self, weights: Weights, scratch: Path) -> None:
        self.weights, self.scratch, self.replaced = weights, scratch, 0

    def __getitem__(self, name: str) -> Tensor:
        return self.weights.read(name)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name not in self.weights.tensors:
            raise KeyError(name)
        path = self.scratch / f"merged-{self.replaced}.safetensors"
        self.replaced += 1
        shape = tuple(tensor.shape)
        write_file(path, [("tensor", tensor.dtype, shape)], lambda _: tensor)
        tensors = self.weights.tensors | {name: Held(path, "tensor", shape, DTYPES[tensor.dtype])}
        self.weights = replace(self.weights, tensors=tensors)

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.tensors)

    def __len__(self) -> int:
        return len(self.weights.tensors)


def weight_files(path: Path) -> list[Path]:
    """The files that together hold one model: of a folder, an index, one shard of several, or a single file.

    Raises:
        CheckpointError: nothing there, several candidates, or a shard missing.
    """
    if path.is_dir():
        return _folder_files(path)
    if path.name.endswith(".index.json"):
        files = index_files(path)
    elif match := SHARD.fullmatch(path.name):
        files = [path.with_name(name) for name in shard_names(match["stem"], int(match["count"]))]
    elif path.suffix in (".safetensors", *SUFFIXES):
        files = [path]
    else:
        raise CheckpointError(
            f"{path} is no weights file; vidkv reads .safetensors, {', '.join(SUFFIXES)} and their index.json"
        )
    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise CheckpointError(f"the weights file {missing} is missing; download it into the same folder")
    return files


def _folder_files(folder: Path) -> list[Path]:
    if (folder / "transformer").is_dir():
        return _folder_files(folder / "transformer")
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", *_globs()):
        found = sorted(folder.glob(pattern))
        if len(found) > 1 and not all(SHARD.fullmatch(file.name) for file in found):
            raise CheckpointError(
                f"{folder} holds {len(found)} files {pattern}, such as {found[0].name} and {found[1].name}; "
                "name the one to take"
            )
        if found:
            return weight_files(found[0])
    raise CheckpointError(f"{folder} holds no weights (.safetensors, {', '.join(SUFFIXES)})")


def _globs() -> Iterator[str]:
    return (f"*{suffix}" for suffix in SUFFIXES)


def open_weights(paths: Sequence[Path], scratch: Path, parts: Sequence[str] = PARTS) -> Weights:
    """Tensors of all files together, in their order; pickled ones go through `unpickle` into `scratch`.

    Raises:
        CheckpointError: a file is damaged, or two files hold one name.
    """
    tensors: dict[str, Held] = {}
    taken: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    for path in paths:
        files = [path]
        if path.suffix in SUFFIXES:
            folder = scratch / f"unpickled-{len(list(scratch.iterdir()))}"
            folder.mkdir()
            result = unpickle(path, folder, parts)
            files, taken, beside = list(result.files), result.taken, beside + result.beside
        for file in files:
            for name, held in _headers(file).items():
                if name in tensors:
                    raise CheckpointError(f"{name} is both in {tensors[name].path} and in {file}; keep one")
                tensors[name] = held
    return Weights(tensors, taken, beside)


def _headers(path: Path) -> dict[str, Held]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {n: Held(path, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"the weights file {path} is damaged ({error}); download it again") from None


def save_weights(
    weights: Weights, folder: Path, stem: str, dtypes: Mapping[str, torch.dtype], shard_bytes: int
) -> list[Path]:
    """Write tensors as safetensors, one in memory at a time: a single file, or shards and an index.

    Args:
        stem: `diffusion_pytorch_model` or `model`, as the model class looks for it.
        dtypes: what each tensor is cast to.
    """
    specs = [(name, dtypes[name], held.shape) for name, held in weights.tensors.items()]
    files = shards(specs, shard_bytes)
    names = shard_names(stem, len(files))
    for file_name, held in zip(names, files, strict=True):
        write_file(folder / file_name, held, lambda name: weights.read(name).to(dtypes[name]))
    if len(files) > 1:
        table = {spec[0]: file_name for file_name, held in zip(names, files, strict=True) for spec in held}
        index = {"metadata": {"total_size": sum(map(spec_bytes, specs))}, "weight_map": table}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    return [folder / name for name in names]
