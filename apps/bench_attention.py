"""What one layer's attention over a full window costs, path by path: `vidkv bench attention`.

Beside vidkv's own read paths stand what others do (bring every page back, then attend) and what nobody
who stores pages can have (attention over keys that lie there dense and turned already). All of it is timed
in rounds, in turn, since clocks drift; each call takes the next of several input sets, so that no cache
holds them. Errors are those of one head against float64 on the decoded pages.
"""

from __future__ import annotations

import importlib.util
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidkv.attention import CachedAttention
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.dispatch import candidates, choose, full_window, fused_obstacle
from vidkv.errors import InputError, ResourceError
from vidkv.kernels import jit, paged_attention
from vidkv.kernels.attention import attend, attend_reference, attend_with_lse, merge
from vidkv.kernels.paged_attention import PageRun
from vidkv.kernels.pages import decode_reference
from vidkv.kernels.rope import rotate_full, spatial_phases, temporal_phases
from vidkv.kernels.rotary import rotate_chunk
from vidkv.kernels.tiles import tile_space
from vidkv.models.registry import MODELS
from vidkv.read_path import REFERENCE, ReadPath

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

SETS = 3
ROUNDS = 3
CPU_S = 0.03
"""How long one row is repeated per round on a CPU, once at least."""
PATCH = 2
LARGEST_REFERENCE = 2**31
"""Bytes of scores beyond which the float64 read is left out."""
QUERIES_AT_ONCE = 1024
CODED = ("int8", "int4")
"""Formats whose pages the fused read meets with codes of queries."""
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SDPA = {
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}
LIBRARIES = ("flash_attn", "flash_attn_interface", "sageattention")

Call = Callable[[int], Any]
"""Does the work once, on the input set of that number."""
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Setting:
    """What is read: one layer of a model.

    Attributes:
        heads: query heads.
        dtype: compute dtype.
    """

    shape: str
    spec: CacheSpec
    geometry: CacheGeometry
    heads: int
    device: torch.device
    dtype: torch.dtype

    @property
    def pages(self) -> int:
        return self.spec.capacity(self.geometry.chunk_frames)

    @property
    def queries(self) -> int:
        return self.geometry.chunk_frames * self.geometry.tokens

    @property
    def keys(self) -> int:
        """Of all pages and the chunk itself."""
        return self.pages * self.geometry.tokens + self.queries

    def flops(self, keys: int) -> int:
        """Of attention to so many keys, both products."""
        return 4 * self.geometry.batch * self.heads * self.queries * keys * self.geometry.head_dim

    def with_format(self, name: str) -> Setting:
        """The same window in another format, with that format's own defaults."""
        kept = self.spec.model_dump(include={"window", "sink", "positions"})
        return replace(self, spec=CacheSpec.of(kept | {"format": name}))


def make_setting(shape: str | None, window: int | None, kv_format: str, device: str) -> Setting:
    """Look a shape up.

    Raises:
        InputError: an unknown or impossible value.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device={device!r:.60}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda, but torch sees no GPU here; use --device cpu or see `vidkv doctor`")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    name = shape or ("wan2.1-1.3b" if on_gpu else "bounce")
    if name not in MODELS:
        raise InputError(f"shape={name!r:.60} is unknown; choose {', '.join(MODELS)}")
    entry = MODELS[name]
    spec = CacheSpec.of({
        "format": kv_format,
        "window": entry.window if window is None else window,
        "sink": entry.sink,
        "positions": entry.positions,
    })  # fmt: skip
    if not spec.capacity(entry.chunk_frames):
        raise InputError(
            f"window={spec.window} holds no page beside a chunk of {entry.chunk_frames} latent frames; "
            f"say at least {spec.window + 1}"
        )
    heads = entry.transformer["num_attention_heads"]
    unit = PATCH * int(entry.vae.get("scale_factor_spatial", 8))
    geometry = CacheGeometry(
        layers=1,
        kv_heads=entry.transformer.get("num_key_value_heads") or heads,
        head_dim=entry.transformer["attention_head_dim"],
        height=entry.height // unit,
        width=entry.width // unit,
        chunk_frames=entry.chunk_frames,
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return Setting(name, spec, geometry, heads, torch.device("cuda" if on_gpu else "cpu"), dtype)


class Inputs:
    """One set of inputs: a cache with a full window and an open chunk, and that chunk's q, k and v."""

    def __init__(self, setting: Setting) -> None:
        s, g = setting, setting.geometry
        self.setting = setting
        self.cache, (self.q, self.k, self.v) = full_window(s.spec, g, s.heads, s.device, s.dtype)
        self.own = temporal_phases(g.head_dim, torch.arange(g.chunk_frames, device=s.device))
        self.spatial = spatial_phases(g.head_dim, g.height, g.width, s.device)
        self.history = [temporal_phases(g.head_dim, run.offsets) for run in self.cache.history]

    def turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk's own q, k and v as attention takes them: (b, heads, tokens, d)."""
        q, k = (rotate_chunk(x, self.own, self.spatial) for x in (self.q, self.k))
        return q, k, self.v.flatten(1, 2).transpose(1, 2)

    def bring_back(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole window dense: all pages decoded in one go, and the chunk's own behind them."""
        q, own_k, own_v = self.turned()
        k, v = self.cache.read(0, self.cache.history, self.history)
        return q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """`bring_back`, done once."""
        return self.bring_back()

    def exact(self, head: int) -> Tensor:
        """What one head should read, (queries, d) float64: q, k and v as given, pages as decoded."""
        d, device = self.setting.geometry.head_dim, self.q.device
        g = self.setting.geometry
        kv_head = head // (self.setting.heads // g.kv_heads)
        own = temporal_phases(d, torch.arange(g.chunk_frames, device=device), torch.float64)
        spatial = spatial_phases(d, g.height, g.width, device, torch.float64)
        q, own_k = (
            rotate_full(x[0:1, :, :, at : at + 1].double(), own, spatial).flatten(1, 2).transpose(1, 2)
            for x, at in ((self.q, head), (self.k, kv_head))
        )
        parts = [(own_k, self.v[0:1, :, :, kv_head : kv_head + 1].double().flatten(1, 2).transpose(1, 2))]
        for run, phases in zip(self.cache.history, self.history, strict=True):
            turns = temporal_phases(d, run.offsets, torch.float64)
            stored = self.cache.pages(0, run, phases)
            if self.cache.pools[run.pool].format.narrow:
                pool, mean = self.cache.pools[run.pool], stored.mean
                decoded = pool.format.read(pool.storage, 0, run.slots, torch.float64, turns, mean)
                k, v = (x[0:1, kv_head : kv_head + 1] for x in decoded)
            else:
                pages = {name: buffer[:, 0:1, kv_head : kv_head + 1] for name, buffer in stored.pages.items()}
                mean = None if stored.mean is None else stored.mean[0:1, kv_head : kv_head + 1]
                k, v = decode_reference(pages, run.slots, turns, mean, torch.float64)
            parts.append((k.flatten(2, 3), v.flatten(2, 3)))
        k, v = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
        blocks = q.chunk(math.ceil(q.shape[2] / QUERIES_AT_ONCE), 2)
        return torch.cat([attend_reference(block, k, v)[0] for block in blocks], 2)[0, 0]


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Rel-L2 error."""
    return float((out.double() - exact).norm() / exact.norm())


@dataclass
class Work:
    """Something that is timed round by round.

    Attributes:
        make: prepares it and gives the call.
        flops, moved: operations, and bytes that have to be moved.
        around: entered around every timing.
        failed: why it could not be done; empty if it could.
        rounds: median milliseconds of each round.
    """

    name: str
    make: Callable[[], Call]
    flops: int = 0
    moved: int = 0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    call: Call | None = None
    failed: str = ""
    rounds: list[float] = field(default_factory=list)

    def attempt(self, do: Callable[[], None]) -> None:
        """What cannot run here is a row of its own, not the end of the others."""
        try:
            with self.around():
                do()
        except Exception as error:
            self.failed, self.call = _first_line(error), None

    def prepare(self, device: torch.device) -> None:
        """One call, for compilers and lazy allocations."""
        self.attempt(lambda: self._first(self.make(), device))

    def _first(self, call: Call, device: torch.device) -> None:
        call(0)
        _synchronize(device)
        self.call = call

    def time(self, device: torch.device) -> None:
        """One more round."""
        if self.call is not None:
            call = self.call
            self.attempt(lambda: self.rounds.append(_median_ms(call, device)))

    @property
    def ms(self) -> float | None:
        return statistics.median(self.rounds) if self.rounds and not self.failed else None

    def rate(self, amount: float) -> float | None:
        """Amount per second."""
        return amount / (self.ms / 1e3) if self.ms else None

    def as_dict(self) -> dict[str, Any]:
        if self.failed:
            return {"name": self.name, "failed": self.failed}
        return {
            "name": self.name,
            "ms": _rounded(self.ms),
            "ms_min": _rounded(min(self.rounds)),
            "ms_max": _rounded(max(self.rounds)),
            "gb_per_s": _rounded(self.rate(self.moved / 1e9)),
        }


@dataclass
class Read(Work):
    """A way to do the layer's attention; its call gives (b, heads, queries, d).

    Attributes:
        kind: `fused`, `fused kernel`, `two-pass`, `dequantize`, `dense`, `dense quantized`, `reference`.
        format: of the pages.
        coded_flops: what of the operations is done on INT8 operands.
        head, exact: which head is held against what; see `Inputs.exact`.
        scratch: bytes allocated beyond what stays; None on a CPU.
        error: rel-L2.
    """

    kind: str = ""
    format: str = ""
    coded_flops: int = 0
    head: int = 0
    exact: Tensor | None = None
    scratch: int | None = None
    error: float = math.nan

    def _first(self, call: Call, device: torch.device) -> None:
        assert self.exact is not None
        self.error = relative_error(call(0)[0, self.head], self.exact)
        if device.type == "cuda":
            kept, peak = _peak_of(lambda: call(0))
            self.scratch = peak - kept
        self.call = call

    def describe(self, ceilings: dict[str, Work]) -> dict[str, Any]:
        row = {**self.as_dict(), "kind": self.kind, "format": self.format}
        if self.failed:
            return row
        reached, best = self.rate(self.flops), ceilings["matmul"].rate(ceilings["matmul"].flops)
        least = self._least_ms(ceilings)
        return row | {
            "tflops": _rounded(self.rate(self.flops / 1e12)),
            "of_matmul": _rounded(reached / best) if reached and best else None,
            "of_ceiling": _rounded(least / self.ms) if least and self.ms else None,
            "scratch_bytes": self.scratch,
            "rel_l2": _rounded(self.error),
        }

    def _least_ms(self, ceilings: dict[str, Work]) -> float | None:
        """What the matrix units and the memory would need at the rates measured, whichever is longer."""
        rates = {name: ceiling.rate(ceiling.flops or ceiling.moved) for name, ceiling in ceilings.items()}
        plain, coded, copy = rates["matmul"], rates["int8_matmul"], rates["copy"]
        if plain is None or copy is None or (self.coded_flops and coded is None):
            return None
        products = (self.flops - self.coded_flops) / plain
        if self.coded_flops and coded:
            products += self.coded_flops / coded
        return max(products, self.moved / copy) * 1e3


def attention_report(
    shape: str | None, window: int | None, kv_format: str, tune: bool, device: str, tell: Tell
) -> dict[str, Any]:
    """Time one layer's attention over a full window in every way there is here.

    Args:
        shape: a name of `MODELS`; None for the one that suits the device.
        window: latent frames; None for the model's own.
        tune: measure every tile of the fused read instead of the known good ones.

    Returns:
        hardware, torch, triton; the shape; ceilings, rows, costs, ratios; chosen, the path that a rollout
        would take; left_out and not_installed, what is missing from the rows and why; on a GPU peak, what
        the allocator held at most beyond q, k and v for the pages of one layer and one read.

    Raises:
        InputError: an unknown or impossible value.
        ResourceError: the inputs do not fit into memory.
    """
    setting = make_setting(shape, window, kv_format, device)
    with torch.no_grad():
        return _report(setting, tune, tell)


def _report(setting: Setting, tune: bool, tell: Tell) -> dict[str, Any]:
    s = setting
    chosen = choose(s.spec, s.geometry, s.heads, s.device, s.dtype)
    sets: dict[str, list[Inputs]] = {}
    try:
        for name in dict.fromkeys((s.spec.format, "int8", "bf16")):
            sets[name] = [Inputs(s.with_format(name)) for _ in range(SETS)]
        rows, left_out, missing = _rows(s, sets, tune)
        costs, ceilings = _costs(s, sets[s.spec.format]), _ceilings(s)
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"window={s.spec.window}: {SETS} sets of one layer's pages of {s.shape} do not fit into memory; "
            "choose a smaller --window or --shape"
        ) from None
    work: list[Work] = [*ceilings.values(), *rows, *costs.values()]
    total = len(work) * (ROUNDS + 1)
    for index, piece in enumerate(work):
        piece.prepare(s.device)
        tell(index + 1, total, "measurements")
    for turn in range(ROUNDS):
        for index, piece in enumerate(work):
            piece.time(s.device)
            tell((turn + 1) * len(work) + index + 1, total, "measurements")
    report = {
        "hardware": _hardware(s.device),
        "torch": torch.__version__,
        "triton": jit.triton.__version__ if jit.triton else None,
        "shape": _describe(s),
        "ceilings": {name: _describe_ceiling(ceiling) for name, ceiling in ceilings.items()},
        "rows": [row.describe(ceilings) for row in rows],
        "costs": {name: cost.as_dict() for name, cost in costs.items()},
        "ratios": _ratios(s, rows, sets),
        "chosen": str(chosen),
        "left_out": left_out,
        "not_installed": missing,
    }
    if s.device.type == "cuda":
        report["peak"] = _peaks(s)
    return report


def _rows(
    setting: Setting, sets: dict[str, list[Inputs]], tune: bool
) -> tuple[list[Read], dict[str, str], list[str]]:
    """Every way to read, what is left out and why, and which libraries are not installed."""
    s, main = setting, setting.spec.format
    rows: list[Read] = []
    left_out: dict[str, str] = {}
    for name, inputs in sets.items():
        its = s.with_format(name)
        row = _row_maker(its, inputs)
        pages = "" if name == main else f", {name} pages"
        for path in _paths(its, tune and name == main):
            # codes meet codes in the first of the two products
            coded = s.flops(s.keys - s.queries) // 2 if path.name == "fused" and name in CODED else 0
            rows.append(row(f"{path}{pages}", path.name, partial(_by_path, inputs, path), coded_flops=coded))
            if path.name == "fused" and name == main:
                make = partial(_kernel_only, inputs, path)
                rows.append(row(f"{path}, kernel only", "fused kernel", make, coded_flops=coded))
        if name == main and (obstacle := fused_obstacle(its.spec, its.geometry, its.device, its.dtype)):
            left_out["fused"] = obstacle
    inputs = sets[main]
    row = _row_maker(s, inputs)
    for name, backend in SDPA[s.device.type].items():
        around = partial(sdpa_kernel, backend)
        make = partial(_dequantize_all, inputs)
        rows.append(row(f"dequantize all, then SDPA {name}", "dequantize", make, around=around))
    dense = 2 * s.pages * s.geometry.tokens * s.geometry.kv_heads * s.geometry.head_dim * s.dtype.itemsize
    for name, backend in SDPA[s.device.type].items():
        around = partial(sdpa_kernel, backend)
        label = f"{DTYPES[s.dtype]} SDPA {name}"
        rows.append(row(label, "dense", partial(_dense, inputs), around=around, moved=dense))
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    for name in LIBRARIES:
        if name not in missing and s.device.type == "cuda":
            kind = "dense quantized" if name == "sageattention" else "dense"
            rows.append(row(name, kind, partial(_library, inputs, name), moved=dense))
    scores = 8 * s.heads * s.queries * max(s.spec.segment * s.geometry.tokens, s.queries)
    if scores <= LARGEST_REFERENCE:
        rows.append(row("reference", "reference", partial(_by_path, inputs, REFERENCE)))
    else:
        left_out["reference"] = f"its float64 scores take {scores / 1e9:.1f} GB at a time"
    return rows, left_out, missing


def _row_maker(setting: Setting, inputs: Sequence[Inputs]) -> Callable[..., Read]:
    """Rows of one page format, all held against the same truth: the last head's, which no mix-up spares."""
    s, head = setting, setting.heads - 1
    exact = inputs[0].exact(head)
    page_bytes = s.pages * inputs[0].cache.bytes_per_frame

    def row(
        name: str,
        kind: str,
        make: Callable[[], Call],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        moved: int = page_bytes,
        coded_flops: int = 0,
    ) -> Read:
        settled = (name, make, s.flops(s.keys), moved, around)
        return Read(
            *settled, kind=kind, format=s.spec.format, coded_flops=coded_flops, head=head, exact=exact
        )

    return row


def _paths(setting: Setting, tune: bool) -> list[ReadPath]:
    s, g = setting, setting.geometry
    paths = candidates(s.spec, g, s.device, s.dtype)
    if tune and fused_obstacle(s.spec, g, s.device, s.dtype) is None:
        capability = torch.cuda.get_device_capability(s.device) if s.device.type == "cuda" else (0, 0)
        tiles = tile_space(capability, g.head_dim, s.queries, g.tokens, s.dtype)
        paths += [ReadPath("fused", tile=tile) for tile in tiles]
    return list(dict.fromkeys(paths))


def _by_path(inputs: Sequence[Inputs], path: ReadPath) -> Call:
    reads = [CachedAttention(one.cache, path).layer(0) for one in inputs]

    def call(index: int) -> Tensor:
        one = inputs[index]
        return reads[index](one.q, one.k, one.v).flatten(1, 2).transpose(1, 2)

    return call


def _kernel_only(inputs: Sequence[Inputs], path: ReadPath) -> Call:
    """The launches of `attend_pages` alone, with the chunk's own queries and keys turned beforehand."""
    assert path.tile is not None
    tile = path.tile
    prepared = [(one.turned(), _runs(one)) for one in inputs]

    def call(index: int) -> Tensor:
        turned, (coded, plain, packed) = prepared[index]
        return paged_attention.attend_pages(*turned, coded, plain, tile, packed=packed)[0]

    return call


def _runs(one: Inputs) -> tuple[PageRun | None, PageRun | None, PageRun | None]:
    """Coded, plain and packed pages."""
    runs = [one.cache.pages(0, run, turns) for run, turns in zip(one.cache.history, one.history, strict=True)]
    return paged_attention.by_kind(runs)


def _query_units(q: Tensor) -> float:
    return math.log2(math.e) / math.sqrt(q.shape[-1])


def _dequantize_all(inputs: Sequence[Inputs]) -> Call:
    return lambda index: attend(*inputs[index].bring_back())


def _dense(inputs: Sequence[Inputs]) -> Call:
    windows = [one.dense for one in inputs]
    return lambda index: attend(*windows[index])


def _library(inputs: Sequence[Inputs], name: str) -> Call:
    """Attention of another package over dense windows in the layout that it likes."""
    module = import_module(name)
    if name == "sageattention":
        windows = [one.dense for one in inputs]
        return lambda index: module.sageattn(*windows[index], tensor_layout="HND")
    token_first = [tuple(x.transpose(1, 2).contiguous() for x in one.dense) for one in inputs]

    def call(index: int) -> Tensor:
        out = module.flash_attn_func(*token_first[index])
        # some versions give the log-sum-exp too
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def _costs(setting: Setting, inputs: Sequence[Inputs]) -> dict[str, Work]:
    """The parts of a rollout's read and commit, each alone."""
    s, g = setting, setting.geometry
    frame = inputs[0].cache.bytes_per_frame
    chunk = s.queries * g.kv_heads * g.head_dim * s.dtype.itemsize
    q_elements = s.queries * s.heads * g.head_dim
    segment = min(s.spec.segment, s.pages)
    lse = 3 * s.queries * s.heads * 4
    commit = _Commit(inputs)
    work = [
        Work("commit", commit.make, moved=2 * chunk + g.chunk_frames * frame, around=commit.around),
        Work("rotate_chunk", partial(_rotate, inputs), moved=2 * q_elements * s.dtype.itemsize),
        Work("merge", partial(_merge, inputs), moved=q_elements * (8 + s.dtype.itemsize) + lse),
        Work("decode", partial(_decode, inputs), moved=segment * (frame + 2 * chunk // g.chunk_frames)),
    ]
    if fused_obstacle(s.spec, g, s.device, s.dtype) is None:
        size = (1 + (1 if s.spec.format in CODED else s.dtype.itemsize) * s.pages) * q_elements
        work.append(Work("turn_queries", partial(_turn, inputs), moved=size))
    if runs := [run for run in _runs(inputs[0])[2:] if run]:
        # read once, and written at two codes for one
        size = 3 * len(runs[0].slots) * runs[0].pages["k"][0].nbytes * 2
        work.append(Work("unpack", partial(_unpack, inputs), moved=size))
    return {piece.name: piece for piece in work}


class _Commit:
    """One layer of a chunk written, again and again, into a cache of its own."""

    def __init__(self, inputs: Sequence[Inputs]) -> None:
        self.inputs = inputs
        self.target = Inputs(inputs[0].setting)

    def make(self) -> Call:
        return self._write

    def _write(self, index: int) -> None:
        cache, one = self.target.cache, self.inputs[index]
        assert cache._commit is not None
        # a cache takes every layer once per chunk
        cache._commit.written.clear()
        cache.write(0, one.k.permute(0, 3, 1, 2, 4), one.v.permute(0, 3, 1, 2, 4), one.spatial)

    @contextmanager
    def around(self) -> Iterator[None]:
        with self.target.cache.committing():
            yield
        self.target.cache.begin(self.target.setting.geometry.chunk_frames)


def _rotate(inputs: Sequence[Inputs]) -> Call:
    return lambda index: rotate_chunk(inputs[index].q, inputs[index].own, inputs[index].spatial)


def _merge(inputs: Sequence[Inputs]) -> Call:
    parts = [attend_with_lse(*one.turned()) for one in inputs]
    return lambda index: merge(parts[index][0].to(parts[index][1].dtype), parts[index][1], *parts[index])


def _decode(inputs: Sequence[Inputs]) -> Call:
    segments = [one.cache.segments[0] for one in inputs]
    d = inputs[0].setting.geometry.head_dim
    turns = [[temporal_phases(d, run.offsets) for run in segment] for segment in segments]
    return lambda index: inputs[index].cache.read(0, segments[index], turns[index])


def _turn(inputs: Sequence[Inputs]) -> Call:
    prepared = [(one.turned()[0], _runs(one)) for one in inputs]

    def call(index: int) -> None:
        q, (coded, plain, packed) = prepared[index]
        if coded or plain:
            paged_attention._turn_queries(q, *paged_attention._tables(coded, plain), _query_units(q))
        if packed:
            paged_attention.turn_packed(q, packed)

    return call


def _unpack(inputs: Sequence[Inputs]) -> Call:
    packed = [run for one in inputs for run in _runs(one)[2:] if run]
    return lambda index: paged_attention.unpacked(packed[index])


def _ceilings(setting: Setting) -> dict[str, Work]:
    """What the matrix units and the memory of this machine reach."""
    device, dtype = setting.device, setting.dtype
    n, size = (8192, 2**30) if device.type == "cuda" else (512, 2**26)

    def product() -> Call:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        return lambda _: a @ b.t()

    def integers() -> Call:
        a, b = (torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8) for _ in range(2))
        return lambda _: torch._int_mm(a, b.t())

    def copy() -> Call:
        source = torch.randint(0, 128, (size,), device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return lambda _: target.copy_(source)

    return {
        "matmul": Work(f"{DTYPES[dtype]} matmul {n}", product, flops=2 * n**3),
        "int8_matmul": Work(f"int8 matmul {n}", integers, flops=2 * n**3),
        "copy": Work(f"device copy of {size >> 20} MiB", copy, moved=2 * size),
    }


def _describe_ceiling(ceiling: Work) -> dict[str, Any]:
    row = ceiling.as_dict()
    if not ceiling.failed:
        if ceiling.flops:
            del row["gb_per_s"]
            row["tflops"] = _rounded(ceiling.rate(ceiling.flops / 1e12))
    return row


def _ratios(setting: Setting, rows: Iterable[Read], sets: dict[str, list[Inputs]]) -> dict[str, float | None]:
    """Times over times, the fastest row of each kind; None where one of the two is missing."""
    rows, main = list(rows), setting.spec.format

    def best(*kinds: str, of: str = main) -> float | None:
        times = [row.ms for row in rows if row.kind in kinds and row.format == of and row.ms]
        return min(times, default=None)

    fused, two_pass, dense = best("fused"), best("two-pass"), best("dense")
    own = _by_format(rows)
    # tuning adds tiles to one format only
    common = own.get("int8", {}).keys() & own.get("bf16", {}).keys()
    int8, bf16 = (min((own[name][path] for path in common), default=None) for name in ("int8", "bf16"))
    size = {name: inputs[0].cache.bytes_per_frame for name, inputs in sets.items()}
    return {
        "fused_to_dense": _ratio(fused, dense),
        "two_pass_to_dense": _ratio(two_pass, dense),
        "dequantize_to_dense": _ratio(best("dequantize"), dense),
        "fused_to_two_pass": _ratio(fused, two_pass),
        "int8_to_bf16_pages": _ratio(int8, bf16),
        "int8_to_bf16_page_bytes": _ratio(size["int8"], size["bf16"]),
    }


def _by_format(rows: Iterable[Read]) -> dict[str, dict[str, float]]:
    """Milliseconds of the read paths that could be taken, by page format and path."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.kind in ("fused", "two-pass") and row.ms:
            path = row.name.removesuffix(f", {row.format} pages")
            times.setdefault(row.format, {})[path] = row.ms
    return times


def _ratio(a: float | None, b: float | None) -> float | None:
    return _rounded(a / b) if a and b else None


def _peaks(setting: Setting) -> dict[str, Any]:
    """Per format: what the allocator held at most beyond q, k and v, for one layer's pages and a read."""
    peaks = {name: _peak(setting.with_format(name)) for name in ("int8", "bf16")}
    return {**peaks, "int8_to_bf16": _ratio(*(peak.get("bytes") for peak in peaks.values()))}


def _peak(setting: Setting) -> dict[str, Any]:
    s = setting
    try:
        path = choose(s.spec, s.geometry, s.heads, s.device, s.dtype)
        before = torch.cuda.memory_allocated()
        one = Inputs(s)
        read = CachedAttention(one.cache, path).layer(0)
        _, peak = _peak_of(partial(read, one.q, one.k, one.v), since=before)
    except Exception as error:
        return {"failed": _first_line(error)}
    inputs = one.q.nbytes + one.k.nbytes + one.v.nbytes
    return {"path": str(path), "bytes": peak - inputs, "pool_bytes": one.cache.nbytes}


def _peak_of(do: Callable[[], Any], since: int | None = None) -> tuple[int, int]:
    """What `do` leaves and the most there was meanwhile, both beyond what was allocated before (CUDA)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() if since is None else since
    torch.cuda.reset_peak_memory_stats()
    out = do()
    torch.cuda.synchronize()
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    del out
    return kept, peak


def _median_ms(call: Call, device: torch.device) -> float:
    """Over many calls, each on the next set of inputs."""
    turn = cycle(range(SETS))
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(lambda: call(next(turn)), warmup=25, rep=100, return_mode="median"))
    times: list[float] = []
    end = time.perf_counter() + CPU_S
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        call(next(turn))
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), ''):.160}"


def _rounded(value: float | None) -> float | None:
    """To five digits."""
    return None if value is None else float(f"{value:.5g}")


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def _describe(setting: Setting) -> dict[str, Any]:
    s, g = setting, setting.geometry
    return {
        "name": s.shape,
        "cache": str(s.spec),
        "dtype": DTYPES[s.dtype],
        "heads": s.heads,
        "kv_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "height": g.height,
        "width": g.width,
        "tokens": g.tokens,
        "pages": s.pages,
        "queries": s.queries,
        "keys": s.keys,
        "flops": s.flops(s.keys),
    }


def render(report: dict[str, Any]) -> Group:
    """The report as tables for people."""
    from rich.console import Group

    shape = report["shape"]
    lines = [
        f"{report['hardware']}, torch {report['torch']}, triton {report['triton']}",
        f"{shape['name']}, {shape['cache']}: {shape['queries']:,} queries, {shape['keys']:,} keys in "
        f"{shape['pages']} pages and the chunk, {shape['heads']} heads of {shape['head_dim']}, "
        f"{shape['dtype']}",
    ]
    tail = [
        *(f"{name.replace('_', ' ')} {value:.3f}" for name, value in report["ratios"].items() if value),
        f"a rollout here would take: {report['chosen']}",
        *(f"left out: {name}: {reason}" for name, reason in report["left_out"].items()),
    ]
    if report["not_installed"]:
        tail.append(f"not installed: {', '.join(report['not_installed'])}")
    for name, peak in report.get("peak", {}).items():
        if isinstance(peak, dict):
            tail.append(f"peak with {name} pages: {_peak_text(peak)}")
    parts = [_rows_table(report["rows"]), _small_table("ceiling", report["ceilings"].values())]
    parts.append(_small_table("cost", report["costs"].values()))
    return Group(*lines, *parts, *tail)


def _peak_text(peak: dict[str, Any]) -> str:
    if "failed" in peak:
        return str(peak["failed"])
    all_of_it, pages = peak["bytes"] / 1e6, peak["pool_bytes"] / 1e6
    return f"{all_of_it:.1f} MB by {peak['path']}, pages alone {pages:.1f} MB"


def _rows_table(rows: Iterable[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("read")
    for name in ("ms", "min-max", "TFLOP/s", "of matmul", "of ceiling", "GB/s", "scratch MB", "rel L2"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "failed" in row:
            table.add_row(f"{row['name']}\n  {row['failed']}")
            continue
        scratch = row["scratch_bytes"]
        span = f"{row['ms_min']:.3f}-{row['ms_max']:.3f}"
        table.add_row(
            row["name"], f"{row['ms']:.3f}", span, _cell(row["tflops"], ".4g"),
            _cell(row["of_matmul"], ".1%"), _cell(row["of_ceiling"], ".1%"), _cell(row["gb_per_s"], ".4g"),
            _cell(None if scratch is None else scratch / 1e6, ".1f"), f"{row['rel_l2']:.1e}",
        )  # fmt: skip
    return table


def _small_table(what: str, rows: Iterable[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(what)
    for name in ("ms", "min-max", "TFLOP/s", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "failed" in row:
            table.add_row(f"{row['name']}\n  {row['failed']}")
            continue
        span = f"{row['ms_min']:.4f}-{row['ms_max']:.4f}"
        rates = (_cell(row.get(name), ".4g") for name in ("tflops", "gb_per_s"))
        table.add_row(row["name"], f"{row['ms']:.4f}", span, *rates)
    return table


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
