"""Pickled checkpoints (`.pt`, `.pth`, `.bin`, `.ckpt`), read in a process apart and only as tensors.

A pickle is a program. torch's restricted unpickler refuses everything but tensors and plain containers; that
it runs in a process of its own, with bounded memory, time and output, is for the case that it errs. This
process never opens the file: it reads the safetensors that come back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vidkv.errors import CheckpointError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
PARTS = ("generator_ema", "generator", "model", "state_dict")
"""Where checkpoints of causal Wan models keep their weights; the averaged ones come first."""
LORA_PARTS = ("generator_lora", "state_dict")
"""Where LoRA checkpoints keep their factors."""
SHARD_BYTES = 2_000_000_000
PROGRAM = Path(__file__).with_name("unpickle.py")
REMEDY = (
    "get the weights as .safetensors, or save the tensors alone where you trust the file: "
    "torch.save({'generator': ...}, file)"
)
REASONS = {
    "global": "it asks for WHAT when it is opened, and vidkv reads tensors only; " + REMEDY,
    "tensor": "its tensor WHAT is of a kind that weights are not; " + REMEDY,
    "empty": "it holds WHAT, not a dictionary of weights; check that this is the right file",
    "claim": "it claims WHAT; it is damaged or made to mislead: download it again",
    "memory": "WHAT; it is damaged or made to mislead: download it again",
    "damaged": "it is no checkpoint of tensors alone, or damaged (WHAT); download it again, or " + REMEDY,
}


@dataclass(frozen=True)
class Unpickled:
    """What a pickled checkpoint held.

    Attributes:
        files: safetensors files with the tensors taken, in order.
        taken: the parts unwrapped, from outside inwards; empty: the file was a plain state dict.
        beside: keys left aside, such as the other weights, an optimizer or settings.
    """

    files: tuple[Path, ...]
    taken: tuple[str, ...]
    beside: tuple[str, ...]


def unpickle(
    path: Path,
    folder: Path,
    parts: Sequence[str] = PARTS,
    limit_s: int | None = None,
    shard_bytes: int | None = None,
) -> Unpickled:
    """Write the tensors of a pickled checkpoint as safetensors into an existing, empty folder.

    Args:
        parts: keys to unwrap, preferred ones first.
        limit_s: seconds it may take; by default a minute and what 20 MB/s need.
        shard_bytes: of one safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged or asks for anything but tensors.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); name a checkpoint file") from None
    limit_s = limit_s or 60 + size // 20_000_000
    # what could change how torch or Python load a file stays behind
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH", "PYTHON"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [path.resolve(), folder.resolve(), ",".join(parts), shard_bytes or SHARD_BYTES, limit_s]
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(PROGRAM), *map(str, arguments)],
            capture_output=True, text=True, errors="replace", timeout=limit_s, cwd=folder, env=environment,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{path} was not read within {limit_s} s; it is damaged or made to mislead: download it again"
        ) from None
    result = _result(done, path)
    if "refused" in result:
        what = " ".join(str(result["what"]).split())
        reason = REASONS[str(result["refused"])].replace("WHAT", what)
        raise CheckpointError(f"{path} is not read: {reason}")
    files, taken, beside = (tuple(map(str, result[key])) for key in ("files", "taken", "beside"))  # type: ignore[call-overload]
    return Unpickled(tuple(folder / name for name in files), taken, beside)


def _result(done: subprocess.CompletedProcess[str], path: Path) -> dict[str, object]:
    """What the program printed; a CheckpointError where it died before."""
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
        if isinstance(result, dict) and done.returncode == 0:
            return result
    except (ValueError, IndexError):
        pass
    if done.returncode < 0:
        cause = f"ended by {signal.Signals(-done.returncode).name}"
    else:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    raise CheckpointError(
        f"{path} could not be read in a process of its own ({cause}); download it again, or {REMEDY}"
    )
