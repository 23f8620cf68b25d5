"""One pickled checkpoint in, safetensors out: a program of its own, started by `pickles.py`.

It imports nothing of vidkv, so that it runs with `python -I` from any folder. torch's restricted unpickler
reads the file, under limits on memory, time and output. Run as

    python -I unpickle.py FILE FOLDER PARTS SHARD_BYTES SECONDS

it prints one JSON object: what it took, what it left aside and the files written, or why it stopped.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADROOM_BYTES = 1 << 30
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the headers of safetensors files."""
SETTINGS = ("omegaconf.", "numpy.", "pathlib.")
SETTINGS_EXACT = {
    *("typing.Any", "argparse.Namespace", "collections.defaultdict"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "set")),
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("int", "float", "str", "bool")
    ),
}
"""What training code leaves beside weights. Stand-ins without any code take the place of these."""


class Refused(Exception):
    """Why the file is not read; `kind` tells the caller which remedy to name."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind, self.what = kind, what


class StandIn:
    """Takes any arguments and any state and keeps nothing."""

    def __new__(cls, *arguments: object) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


Spec = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


def spec_bytes(spec: Spec) -> int:
    """Bytes of a tensor's data."""
    items = 1
    for size in spec[2]:
        items *= size
    return items * spec[1].itemsize


def write_file(path: Path, specs: Iterable[Spec], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file one tensor at a time.

    Args:
        read: gives a tensor by name, with the dtype and shape announced; it is dropped once written.
    """
    # wide items first: every tensor then starts at a multiple of its item size
    ordered = sorted(specs, key=lambda spec: (-spec[1].itemsize, spec[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        start, end = end, end + spec_bytes(spec)
        header[spec[0]] = {"dtype": DTYPES[spec[1]], "shape": list(spec[2]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, dtype, shape in ordered:
            tensor = read(name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
            flat = tensor.detach().contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)


def shards(specs: Iterable[Spec], limit_bytes: int) -> list[list[Spec]]:
    """Tensors in their order, cut into files of at most `limit_bytes` (a larger tensor gets its own)."""
    files: list[list[Spec]] = []
    filled = 0
    for spec in specs:
        size = spec_bytes(spec)
        if not files or filled + size > limit_bytes:
            files.append([])
            filled = 0
        files[-1].append(spec)
        filled += size
    return files


def shard_names(stem: str, count: int) -> list[str]:
    """File names as diffusers and transformers give them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def limit(path: Path, seconds: int) -> None:
    """Bound this process: address space to twice the file beyond what torch has mapped, time, output."""
    size = path.stat().st_size
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, bound in (
        (resource.RLIMIT_AS, mapped + 2 * size + HEADROOM_BYTES),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 2 * size + HEADROOM_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (bound, bound))


def load(path: Path) -> Any:
    """The file's content, with tensors mapped from disk where its format allows."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        plain = [name for name in unsafe if name.startswith(SETTINGS) or name in SETTINGS_EXACT]
        torch.serialization.add_safe_globals([(StandIn, name) for name in plain])
        foreign = sorted(set(unsafe) - set(plain))
        if foreign:
            raise Refused("global", foreign[0])
    return torch.load(path, weights_only=True, mmap=zipped or None, map_location="cpu")


def has_tensors(value: object) -> bool:
    """Whether a dictionary holds tensors at any depth."""
    return isinstance(value, Mapping) and next(iter(tensors(value)), None) is not None


def tensors(value: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries, under their keys joined by dots."""
    pending: list[tuple[str, Any]] = [(str(key), item) for key, item in value.items()]
    while pending:
        name, item = pending.pop()
        if isinstance(item, Tensor):
            yield name, item
        elif isinstance(item, Mapping):
            pending += [(f"{name}.{key}", inner) for key, inner in item.items()]


def choose(value: object, parts: list[str]) -> tuple[Mapping[Any, Any], list[str], list[str]]:
    """Unwrap dictionaries by the first part they have.

    Returns:
        the innermost dictionary, the parts taken from outside inwards, and the keys left aside.
    """
    taken: list[str] = []
    beside: list[str] = []
    while isinstance(value, Mapping):
        part = next((part for part in parts if has_tensors(value.get(part))), None)
        if part is None:
            break
        taken.append(part)
        beside += [str(key)[:40] for key in value if key != part]
        value = value[part]
    if not isinstance(value, Mapping):
        raise Refused("empty", type(value).__name__)
    beside += [str(key)[:40] for key, item in value.items() if not isinstance(item, Tensor | Mapping)]
    return value, taken, beside


def convert(path: Path, folder: Path, parts: list[str], shard_bytes: int) -> dict[str, object]:
    """Read, choose and write."""
    value, taken, beside = choose(load(path), parts)
    found = dict(sorted(tensors(value)))
    if not found:
        raise Refused("empty", "a dictionary without tensors")
    for name, tensor in found.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPES
        if not plain or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise Refused("tensor", f"{name} ({type(tensor).__name__}, {tensor.dtype}, {tensor.device.type})")
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]
    claimed, held = sum(map(spec_bytes, specs)), path.stat().st_size
    # tied weights may count twice
    if claimed > 2 * held:
        raise Refused("claim", f"{claimed:,} bytes of tensors in a file of {held:,}")
    files = shards(specs, shard_bytes)
    names = shard_names("tensors", len(files))
    for name, held_specs in zip(names, files, strict=True):
        write_file(folder / name, held_specs, found.__getitem__)
    return {"files": names, "taken": taken, "beside": beside}


def main(arguments: list[str]) -> dict[str, object]:
    """Run the program; every failure becomes a result."""
    path, folder, parts, shard_bytes, seconds = arguments
    warnings.simplefilter("ignore")
    limit(Path(path), int(seconds))
    try:
        return convert(Path(path), Path(folder), parts.split(","), int(shard_bytes))
    except Refused as error:
        return {"refused": error.kind, "what": error.what}
    except MemoryError:
        return {"refused": "memory", "what": "it needs more memory than its size accounts for"}
    # whatever a file that is not what it seems makes torch or zipfile raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {"refused": "damaged", "what": text[:200]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
