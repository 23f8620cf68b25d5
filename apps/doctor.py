"""Checks of the machine that vidkv is to run on, each with what to do about it.

Only facts are gathered here: `run_checks` never raises, prints nothing and changes nothing but
short-lived probe files. Showing the result is up to the caller, `render` makes a table of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "warn", "fail"]

OLDEST_TORCH = (2, 11)
WEIGHTS_PACKAGE = "vidkv.models.bounce.weights"
LITTLE_SPACE_BYTES = 2 * 2**30
NO_SPACE_BYTES = 64 * 2**20

_COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `warn` (works with less) or `fail` (something will not work).

    Attributes:
        name: what was looked at.
        status: the verdict.
        detail: what was found.
        remedy: what to do about it; empty when nothing needs doing.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def run_checks() -> list[Check]:
    """All findings, in the order in which they matter. A check that breaks becomes a `fail`."""
    probes: dict[str, Callable[[], Iterable[Check]]] = {
        "torch": _torch,
        "triton": _triton,
        "gpu": _gpu,
        "pyav": _pyav,
        "disk": _disk,
        "folders": _folders,
        "weights": _weights,
        "read paths": read_paths_self_test,
        "read paths on the GPU": _read_paths_on_gpu,
    }
    return [check for name, probe in probes.items() for check in _guarded(name, probe)]


def healthy(checks: Iterable[Check]) -> bool:
    """True when nothing failed; warnings do not count."""
    return all(check.status != "fail" for check in checks)


def render(checks: Iterable[Check]) -> Table:
    """The findings as a table for people; the remedy stands below the detail it belongs to."""
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "detail")
    for check in checks:
        detail = Text(check.detail)
        if check.remedy:
            detail.append(f"\n→ {check.remedy}", style="bold")
        table.add_row(check.name, Text(check.status, style=_COLOURS[check.status]), detail)
    return table


def read_paths_self_test() -> list[Check]:
    """Run every attention read path on a small case on the CPU and hold its error against its bound."""
    from vidkv.attention import self_test

    return _held(self_test(), "")


def _read_paths_on_gpu() -> list[Check]:
    """The same where there is a GPU; a probe of its own, so that its crash hides nothing."""
    from vidkv.attention import self_test

    return _held(self_test("cuda"), " on the GPU") if _gpu_usable() else []


def _held(errors: Iterable[tuple[str, float, float]], where: str) -> list[Check]:
    return [
        Check(f"read path {name}{where}", "ok", f"relative L2 error {error:.1e}, bound {bound:.0e}")
        if error <= bound
        else Check(
            f"read path {name}{where}",
            "fail",
            f"relative L2 error {error:.1e} exceeds its bound {bound:.0e}",
            "do not use this read path; report the versions of torch and triton above",
        )
        for name, error, bound in errors
    ]


def _guarded(name: str, probe: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(probe())
    except ImportError as error:
        return [Check(name, "fail", f"cannot be imported: {error}", "reinstall vidkv")]
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return [Check(name, "fail", detail, "reinstall vidkv; if it stays, report this line")]


def _torch() -> Iterator[Check]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{torch.__version__}, {torch.get_num_threads()} CPU threads, {capability}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Check("torch", "warn", detail, f"vidkv is tested from torch {oldest}; upgrade it")
    else:
        yield Check("torch", "ok", detail)
    yield _bf16()


def _bf16() -> Check:
    import torch

    half = torch.linspace(-1, 1, 64 * 64).reshape(64, 64).bfloat16()
    exact = half.float() @ half.float()
    error = float(((half @ half).float() - exact).norm() / exact.norm())
    detail = f"CPU matrix product in bf16, relative L2 error {error:.1e}"
    if error <= 1e-2:
        return Check("bf16", "ok", detail)
    return Check("bf16", "warn", detail, "use the fp32 cache format on this CPU")


def _triton() -> Iterator[Check]:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        remedy = "Linux on x86-64 only: pip install triton; elsewhere the torch read paths are used"
        yield Check("triton", "warn", f"not available: {error}", remedy)
        return
    yield Check("triton", "ok", str(triton.__version__))
    yield _compiler()
    yield _headers()


def _compiler() -> Check:
    """Look for the compiler the way triton does: CC, then gcc, then clang, and never plain cc."""
    named = os.environ.get("CC")
    if named is not None:
        if shutil.which(named):
            return Check("C compiler", "ok", f"{named} (from CC)")
        remedy = "unset CC or let it name a compiler"
        return Check("C compiler", "warn", f"CC={named} is not a program", remedy)
    found = shutil.which("gcc") or shutil.which("clang")
    if found:
        return Check("C compiler", "ok", found)
    if plain := shutil.which("cc"):
        return Check("C compiler", "warn", f"only {plain}, which triton ignores", "export CC=cc")
    remedy = "needed by triton kernels on a GPU: install gcc (Debian, Ubuntu: apt-get install gcc)"
    return Check("C compiler", "warn", "none of gcc, clang, cc found", remedy)


def _headers() -> Check:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        return Check("Python headers", "ok", str(header))
    remedy = "needed by triton kernels on a GPU: install them (Debian, Ubuntu: python3-dev)"
    return Check("Python headers", "warn", f"{header} is missing", remedy)


def _gpu() -> Iterator[Check]:
    import torch

    if not _gpu_usable():
        yield _no_gpu(torch.version.cuda)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Check(
            f"gpu {index}",
            "ok",
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        )


def _gpu_usable() -> bool:
    import torch

    with warnings.catch_warnings():
        # an old driver is announced by a warning; the finding about the GPU says the same
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _no_gpu(cuda_version: str | None) -> Check:
    if not Path("/dev/nvidiactl").exists():
        return Check("gpu", "warn", "no GPU: the CPU path is used")
    if cuda_version is None:
        detail = "a GPU is present, but this torch is built for the CPU: the CPU path is used"
        return Check("gpu", "warn", detail, "install a CUDA build of torch")
    detail = f"a GPU is present, but torch (CUDA {cuda_version}) cannot use it"
    return Check("gpu", "warn", detail, "check the driver with nvidia-smi")


def _pyav() -> Iterator[Check]:
    try:
        import av
    except ImportError as error:
        yield Check("pyav", "fail", f"not available: {error}", "pip install 'av>=18'")
        return
    try:
        decoded = _video_round_trip()
    except (av.error.FFmpegError, ValueError) as error:
        remedy = "install the wheel of PyAV, which brings libx264: pip install 'av>=18'"
        yield Check("pyav", "fail", f"{av.__version__} cannot write H.264: {error}", remedy)
        return
    status: Status = "ok" if decoded == 3 else "fail"
    remedy = "" if decoded == 3 else "pip install --force-reinstall 'av>=18'"
    yield Check("pyav", status, f"{av.__version__}, H.264: {decoded} of 3 frames decoded", remedy)


def _video_round_trip() -> int:
    import av
    import numpy as np

    from vidkv.segments import encode_segment

    frames = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    with av.open(io.BytesIO(encode_segment(frames, fps=16)), "r", format="mpegts") as container:
        return sum(1 for _ in container.decode(video=0))


def _disk() -> Iterator[Check]:
    for name, folder in (("disk here", Path.cwd()), ("disk temp", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        detail = f"{free / 2**30:.1f} GiB free in {folder}"
        if free < NO_SPACE_BYTES:
            yield Check(name, "fail", detail, "make room: not even a short video fits")
        elif free < LITTLE_SPACE_BYTES:
            yield Check(name, "warn", detail, "make room before generating long videos")
        else:
            yield Check(name, "ok", detail)


def _folders() -> Iterator[Check]:
    yield _writable("write here", Path.cwd(), "fail", "change to a folder that you may write to")
    temporary = "set TMPDIR to a folder that you may write to"
    yield _writable("write temp", Path(tempfile.gettempdir()), "fail", temporary)
    triton = "set TRITON_CACHE_DIR to a folder that you may write to"
    yield _writable("write triton cache", _triton_cache(), "warn", triton)
    vidkv = "set XDG_CACHE_HOME to a folder that you may write to"
    yield _writable("write vidkv cache", _vidkv_cache(), "warn", vidkv)


def _writable(name: str, folder: Path, otherwise: Status, remedy: str) -> Check:
    """Try it: permission bits tell nothing to root, nor on a read-only mount."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".vidkv-"):
            return Check(name, "ok", str(folder))
    except OSError as error:
        return Check(name, otherwise, f"{folder}: {error.strerror or error}", remedy)


def _triton_cache() -> Path:
    if named := os.environ.get("TRITON_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


def _vidkv_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidkv"


def _weights() -> Iterator[Check]:
    remedy = "reinstall vidkv; in a checkout, restore models/bounce/weights"
    folder = _package_folder(WEIGHTS_PACKAGE)
    if folder is None:
        yield Check("weights", "fail", f"{WEIGHTS_PACKAGE} is not installed", remedy)
        return
    files = list(folder.rglob("*.safetensors"))
    size_bytes = sum(file.stat().st_size for file in files)
    if size_bytes and (folder / "model_index.json").is_file():
        detail = f"{len(files)} files, {size_bytes / 2**20:.1f} MiB in {folder}"
        yield Check("weights", "ok", detail)
    else:
        yield Check("weights", "fail", f"no complete model in {folder}", remedy)


def _package_folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
