"""Every kernel compiled ahead of time for GPUs that need not be here: `vidkv bench kernels`.

Triton's compiler and NVIDIA's assembler come with triton's wheel and need no GPU. What can be known without
one is held here: that codes meet on the integer matrix units, that nothing spills out of registers, and that
a block's shared memory fits. Speed and results need the GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vidkv.errors import InputError
from vidkv.kernels import attention, jit, packed, paged_attention, paged_attention_packed, pages, rotary
from vidkv.kernels.paged_attention import Tile
from vidkv.kernels.tiles import good_tiles

if TYPE_CHECKING:
    from rich.table import Table

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Shared memory that one block may take, by architecture."""
MOST_REGISTERS = 255
WARP_GROUP_ROWS = 64
"""Rows that sm_90's own matrix instruction takes; smaller tiles use the older one."""
INT8_UNITS = {"sm_80": ("mma",), "sm_89": ("mma",), "sm_90": ("wgmma",), "sm_100": ("tcgen05", "mma")}
"""Matrix instructions that should take codes; triton 3.7 knows no newer one than `mma` on sm_100."""
Tell = Callable[[int, int, str], None]

_BF16 = "bf16"
_MATRIX = re.compile(r"\b(wgmma|mma|tcgen05)\.(?:mma_async|sync|mma)\S*")
_INT8 = re.compile(r"\.s8\.s8|kind::i8")
_ATTEND = {
    **dict.fromkeys(("ck_ptr", "cv_ptr", "codes_ptr"), "i8"),
    **dict.fromkeys(("ck_scale_ptr", "cv_scale_ptr"), "fp16"),
    **dict.fromkeys(("cslots_ptr", "pslots_ptr"), "i64"),
    **dict.fromkeys(("q_scale_ptr", "offsets_ptr", "lse_ptr", "per_page_ptr", "scale"), "fp32"),
}
_TURN = {
    **dict.fromkeys(("coded_turns_ptr", "plain_turns_ptr", "mean_ptr"), "fp32"),
    **dict.fromkeys(("q_scale_ptr", "offsets_ptr", "scale"), "fp32"),
    "codes_ptr": "i8",
}
_TURN_PACKED = {
    **dict.fromkeys(("turns_ptr", "mean_ptr", "q_scale_ptr", "offsets_ptr", "scale", "root"), "fp32"),
    "matrix_ptr": "fp16",
    "codes_ptr": "i8",
}
_UNPACK = {
    **dict.fromkeys(("k_ptr", "v_ptr"), "u8"),
    **dict.fromkeys(("k_out_ptr", "v_out_ptr"), "i8"),
    **dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "k_scale_out_ptr", "v_scale_out_ptr"), "fp16"),
    "slots_ptr": "i64",
}
_CODED_PAGES = {
    **dict.fromkeys(("kp_ptr", "vp_ptr"), "i8"),
    **dict.fromkeys(("ks_ptr", "vs_ptr"), "fp16"),
    "mean_ptr": "fp32",
}
_ALL_PAGES = {"turns_ptr": "fp32", "slots_ptr": "i64"}


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched.

    Attributes:
        kernel: for people: fused, turn, unpack, commit, encode, decode, rotate, merge.
        name: what sets it apart from the kernel's others.
        function: the kernel.
        types: what pointers point to and the types of scalars, by argument; of those that are not named,
            pointers lead to `pointee` and scalars are i32.
        constants: of every constexpr argument.
        pointee: the compute dtype.
        warps, stages: as in triton.
        int8: integer matrix instructions of which it must contain one; empty where there are no codes.
        may_spill: whether registers may spill.
        gluon: written in triton's Gluon dialect.
    """

    kernel: str
    name: str
    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    pointee: str = _BF16
    warps: int = 4
    stages: int = 3
    int8: tuple[str, ...] = ()
    may_spill: bool = False
    gluon: bool = False


@dataclass(frozen=True)
class Compiled:
    """What a variant takes on an architecture.

    Attributes:
        kernel, variant, arch: which.
        registers: of a thread.
        spill_bytes: stored to and loaded from local memory because registers ran out, as the assembler
            counts them: in the code, not in its execution.
        shared_bytes: of a block.
        int8_mma, mma: matrix instructions in the PTX, on INT8 operands and all.
        int8_unit: the instruction that takes the INT8 operands.
        ok: whether everything holds; `why` says what does not.
    """

    kernel: str
    variant: str
    arch: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    int8_mma: int = 0
    mma: int = 0
    int8_unit: str = ""
    ok: bool = False
    why: str = ""


def kernels_report(archs: Sequence[str], tell: Tell) -> dict[str, Any]:
    """`compile_all` as plain data; all architectures where none is named."""
    rows = compile_all(archs or list(SHARED_BYTES), tell)
    return {
        "triton": jit.triton.__version__,
        "ok": all(row.ok for row in rows),
        "kernels": [asdict(row) for row in rows],
    }


def compile_all(archs: Sequence[str], tell: Tell = lambda done, total, what: None) -> list[Compiled]:
    """Every variant of every kernel for these architectures.

    Args:
        archs: keys of `SHARED_BYTES`.
        tell: called after each variant.

    Raises:
        InputError: an unknown architecture; no triton; kernels are the interpreter's.
    """
    check_compiler()
    for arch in archs:
        if arch not in SHARED_BYTES:
            raise InputError(f"unknown architecture {arch!r:.60}; known are {', '.join(SHARED_BYTES)}")
    wanted = [(variant, arch) for arch in dict.fromkeys(archs) for variant in variants(arch)]
    rows = []
    for variant, arch in wanted:
        rows.append(compile_variant(variant, arch))
        tell(len(rows), len(wanted), f"{arch} {variant.kernel}")
    return rows


def check_compiler() -> None:
    """Kernels can be compiled in this process.

    Raises:
        InputError: they cannot.
    """
    if not jit.triton:
        raise InputError("compiling kernels needs triton, which is not installed")
    # the interpreter takes a kernel's place where the variable was set when its module was imported
    if jit.interpreted() or not isinstance(paged_attention._attend_kernel, jit.triton.JITFunction):
        raise InputError("TRITON_INTERPRET=1 leaves no kernels to compile; unset it")


def variants(arch: str) -> list[Variant]:
    """What is launched on an architecture: the fused read with every tile to start with, and the rest."""
    capability = divmod(_number(arch), 10)
    found = []
    for d, queries, tokens in ((128, 3 * 1560, 1560), (64, 3 * 880, 880), (64, 48, 16)):
        tiles = good_tiles(capability, d, queries, tokens, torch.bfloat16)
        found += [fused(arch, tile, d, tokens) for tile in tiles]
        if tokens == 880:
            found.append(fused(arch, tiles[0], d, tokens, V_PER_CHANNEL=True))
            found.append(fused(arch, tiles[0], d, tokens, PAGE_LSE=True))
    small = good_tiles(capability, 64, 48, 16, torch.float32)[0]
    if arch == "sm_90":
        found += [hopper(splits) for splits in (1, 2)]
    return [*found, fused(arch, small, 64, 16, "fp32"), *_others()]


def fused(arch: str, tile: Tile, d: int, tokens: int, dtype: str = _BF16, **changes: bool) -> Variant:
    """The fused read of coded and plain pages.

    Args:
        d: channels of a head.
        tokens: per page.
        dtype: of queries and plain pages.
        changes: further constants.
    """
    constants = {
        "TOKENS": tokens, "D": d, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys,
        "TAIL": paged_attention.tail(tokens, tile.keys), "CODED": True, "V_PER_CHANNEL": False,
        "PAGE_LSE": False, "INTERPRETED": False, **changes,
    }  # fmt: skip
    name = f"{dtype} d{d} t{tokens} {tile.queries}x{tile.keys}x{tile.warps}x{tile.stages}"
    return Variant(
        "fused",
        " ".join((name, *(change.lower() for change in changes))),
        paged_attention._attend_kernel,
        _ATTEND,
        constants,
        dtype,
        tile.warps,
        tile.stages,
        int8=INT8_UNITS[arch] if tile.queries >= WARP_GROUP_ROWS else ("mma",),
        # without matrix units a thread holds whole rows of both operands
        may_spill=dtype == "fp32",
    )


def hopper(splits: int) -> Variant:
    """The fused read's own kernel for Hopper."""
    from vidkv.kernels import paged_attention_hopper as kernel

    half, keys, d = kernel.QUERIES // 2, kernel.KEYS, kernel.HEAD_DIM
    blocks = {
        "q_desc": ("i8", [1, half, d], 128, 8),
        "k_desc": ("i8", [1, keys, d], 128, 8),
        "ks_desc": ("fp16", [1, keys], 0, 16),
        **dict.fromkeys(("q16_desc",), (_BF16, [1, half, d], 128, 16)),
        **dict.fromkeys(("ok_desc", "ov_desc"), (_BF16, [1, keys, d], 128, 16)),
    }
    types = {
        name: f"tensordesc<{kind}{block},{kernel.block_layout(block, swizzle, bits)!r}>"
        for name, (kind, block, swizzle, bits) in blocks.items()
    }
    types |= {"v_ptr": "i8", "vs_ptr": "fp16", "slots_ptr": "i64", "scale": "fp32"}
    types |= dict.fromkeys(("q_scale_ptr", "q_offset_ptr", "lse_ptr"), "fp32")
    constants = kernel.constants(splits)
    name = f"bf16 d128 hopper, {splits} splits"
    return Variant("fused", name, kernel._attend, types, constants, int8=("wgmma",), gluon=True)


def _others() -> list[Variant]:
    """The small kernels; none depends on the architecture."""
    found = []
    for d, time in ((128, 22), (64, 12)):
        size = {"D": d, "BLOCK": pages.TOKENS_PER_PROGRAM}
        coded, space = f"bf16 d{d} coded", d // 2 - time
        turn = {"D": d, "PAIRS": time, "CODED": True, "BLOCK": 32}
        rotate = {"D": d, "TIME": time, "BLOCK": rotary.TOKENS_PER_PROGRAM}
        phases = dict.fromkeys(("time_ptr", "space_ptr"), "fp32")
        commit = {**size, "PAIRS": space, "CODED": True}
        decode = {**size, "PAIRS": time, "CODED": True, "PER_CHANNEL": False}
        types = _ALL_PAGES | _CODED_PAGES
        found += [
            Variant("turn", coded, paged_attention._turn_kernel, _TURN, turn),
            Variant("commit", coded, pages._commit_kernel, types, commit),
            Variant("decode", coded, pages._decode_kernel, types, decode),
            Variant("rotate", f"bf16 d{d}", rotary._kernel, phases, rotate),
        ]
    size = {"D": 128, "BLOCK": pages.TOKENS_PER_PROGRAM}
    commit = {**size, "PAIRS": 42, "CODED": False}
    decode = {**size, "PAIRS": 22, "CODED": False, "PER_CHANNEL": False}
    channels = decode | {"CODED": True, "PER_CHANNEL": True}
    types = _ALL_PAGES | _CODED_PAGES
    return [
        *found,
        *_packed(),
        Variant("commit", "bf16 d128 plain", pages._commit_kernel, _ALL_PAGES, commit),
        Variant("decode", "bf16 d128 plain", pages._decode_kernel, _ALL_PAGES, decode),
        Variant("decode", "bf16 d128 v_per_channel", pages._decode_kernel, types, channels),
        Variant("merge", "fp32 d128", attention._merge_kernel, {}, {"D": 128, "BLOCK": 16}, "fp32"),
    ]


def _packed() -> list[Variant]:
    """Encoding and decoding of pages below eight bits."""
    found = []
    types = {"packed_ptr": "u8", "scale_ptr": "fp16", "slots_ptr": "i64", "root": "fp32"}
    types |= dict.fromkeys(("mean_ptr", "matrix_ptr", "turns_ptr"), "fp32")
    for bits, d in ((2, 128), (4, 64), (8, 128)):
        size = {"D": d, "PARTS": 8 // bits, "BITS": bits, "BLOCK": packed.TOKENS_PER_PROGRAM, "MEAN": True}
        name = f"bf16 d{d} {bits} bits"
        write = {**size, "TURNED": True, "TRY": packed.TRIED, "STEP": packed.TRIED_STEP}
        read: dict[str, Any] = {**size, "TURNED": True, "PAIRS": 22 if d == 128 else 12, "PRECISION": "tf32"}
        read |= {"GROUP": d, "ONE_SCALE": True}
        exact = types | {"matrix_ptr": "fp16"}
        found += [
            Variant("encode", name, packed._encode_kernel, types, write),
            Variant("decode", name, packed._decode_kernel, exact, read),
        ]
    found += [variant for d in (128, 64) for variant in _fused_packed(d)]
    grouped = {**read, "D": 128, "PARTS": 2, "BITS": 4, "GROUP": 32, "ONE_SCALE": False}
    found.append(Variant("decode", "bf16 d128 4 bits grouped", packed._decode_kernel, types, grouped))
    return found


def _fused_packed(d: int) -> list[Variant]:
    """What the fused read does to packed pages around its main launch."""
    name, size = f"bf16 d{d} packed", {"D": d, "BLOCK": paged_attention_packed.ROWS_PER_PROGRAM[d]}
    time = {"PAIRS": 22 if d == 128 else 12, "TURNED": True}
    turn = {"D": d, **time, "BLOCK": paged_attention_packed.QUERIES_PER_PROGRAM[d], "INTERPRETED": False}
    matrices = {"turns_ptr": "fp32", "out_ptr": "fp16"}
    pages = {"SIZE": d // 2, "V_PER_CHANNEL": False, "BLOCK": paged_attention_packed.TOKENS_PER_PROGRAM}
    merged = dict.fromkeys(("lse_ptr", "more_lse_ptr", "total_ptr", "root"), "fp32")
    return [
        Variant("turn", name, paged_attention_packed._turn_kernel, _TURN_PACKED, turn),
        Variant(
            "turn",
            f"{name} matrices",
            paged_attention_packed._matrix_kernel,
            matrices,
            {"SIZE": d // 2, **time},
        ),
        Variant("unpack", name, paged_attention_packed._unpack_kernel, _UNPACK, pages),
        Variant("merge", name, paged_attention_packed._merge_kernel, merged, {**size, "PRECISION": "tf32"}),
    ]


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """Compile one variant, by way of triton's cache, and hold it against the architecture's limits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError
    from triton.experimental.gluon._runtime import GluonASTSource

    row = Compiled(variant.kernel, variant.name, arch)
    target = GPUTarget("cuda", _number(arch), 32)
    options = {"num_warps": variant.warps} | ({} if variant.gluon else {"num_stages": variant.stages})
    make = GluonASTSource if variant.gluon else ASTSource
    try:
        # where the assembler fails, triton prints all of the PTX
        with redirect_stdout(sys.stderr):
            kernel = jit.triton.compile(_source(variant, make), target=target, options=options)
        ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
        registers, spilled = _assemble(ptx, arch)
    except (RuntimeError, TritonError) as error:
        return replace(row, why=f"does not compile: {' '.join(str(error).split()):.200}")
    matrix = [(found[1], _INT8.search(found[0])) for found in _MATRIX.finditer(ptx)]
    integer = [unit for unit, is_int8 in matrix if is_int8]
    row = replace(
        row,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        int8_mma=len(integer),
        mma=len(matrix),
        int8_unit=" ".join(sorted(set(integer))),
    )
    faults = list(_faults(variant, row))
    return replace(row, ok=not faults, why="; ".join(faults))


def _source(variant: Variant, make: Callable[..., Any]) -> Any:
    """A kernel with its arguments' types, as a launch on tensors of whole 16-byte units has them."""
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(variant.function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", variant.constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + variant.types.get(name, variant.pointee)
            attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = variant.types.get(name, "i32")
    if variant.gluon:
        places = {(list(signature).index(name),): value for name, value in constants.items()}
        return make(variant.function, signature, places, attributes)
    return make(fn=variant.function, signature=signature, constexprs=constants, attrs=attributes)


def _assemble(ptx: str, arch: str) -> tuple[int, int]:
    """Registers and spilled bytes, from the assembler's own account: triton's cache does not keep it."""
    number = _number(arch)
    tools = Path(jit.triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory(prefix="vidkv-") as folder:
        source, out = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        # triton's own options
        command: list[str | Path] = [
            tools / ("ptxas-blackwell" if number >= 100 else "ptxas"),
            "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={arch}{'a' if number >= 90 else ''}",
            source, "-o", out,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    used = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    if done.returncode or not used or not spills:
        raise RuntimeError(f"ptxas: {done.stderr.strip() or done.returncode}")
    return int(used[1]), sum(map(int, spills))


def _faults(variant: Variant, row: Compiled) -> Iterator[str]:
    """What does not hold."""
    if row.spill_bytes and not variant.may_spill:
        yield f"{row.spill_bytes} bytes spilled"
    if row.registers > MOST_REGISTERS:
        yield f"{row.registers} registers of {MOST_REGISTERS}"
    if row.shared_bytes > SHARED_BYTES[row.arch]:
        yield f"{row.shared_bytes} bytes of shared memory of {SHARED_BYTES[row.arch]}"
    if variant.int8 and not set(variant.int8) & set(row.int8_unit.split()):
        yield f"codes meet on {row.int8_unit or 'no matrix unit'}, not {' or '.join(variant.int8)}"


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def render(report: Mapping[str, Any]) -> Table:
    """The report as a table for people."""
    from rich.table import Table
    from rich.text import Text

    numbers = ("registers", "spill_bytes", "shared_bytes", "int8_mma", "mma")
    table = Table(title=f"triton {report['triton']}")
    for name in ("arch", "kernel", "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("regs", "spill", "shared", "int8", "mma"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in report["kernels"]:
        verdict = Text("ok", "green") if row["ok"] else Text(row["why"], "red")
        counts = [str(row[name]) for name in numbers]
        table.add_row(row["arch"], row["kernel"], row["variant"], *counts, verdict)
    return table
