"""Reads of packed pages beside others, and what the fused read must make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.tiny import relative_l2
from vidkv.kernels import int8
from vidkv.kernels.packed import pack, quantize
from vidkv.kernels.paged_attention import PageRun, Tile, attend_pages, attend_pages_reference
from vidkv.kernels.rope import temporal_phases

SPARE = 2
TILE = Tile(32, 32, 4, 1)
ROUNDED = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
"""rel-L2 with queries rounded as the kernel rounds them."""
QUERY_CODES = 1.5e-2
"""What the codes of queries cost besides, for normal inputs."""


@dataclass
class Case:
    """Inputs of one read. Slots that no table names hold nothing but ones, with scales of NaN."""

    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    queries: int = 20
    own: int = 9
    tokens: int = 17
    d: int = 32
    offsets: tuple[int, ...] = (-9, -2)
    coded: bool = False
    plain: bool = False
    turned: bool = True
    per_channel: bool = False
    dtype: torch.dtype = torch.float32
    tile: Tile = TILE
    page_lse: bool = True
    device: str = "cpu"
    runs: dict[str, PageRun] = field(init=False)
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        source = torch.Generator().manual_seed(self.tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source).to(self.device)

        b, kv, d = self.batch, self.kv_heads, self.d
        self.q = normal(b, self.heads, self.queries, d).to(self.dtype)
        self.k, self.v = (normal(b, kv, self.own, d).to(self.dtype) for _ in range(2))
        count = len(self.offsets)
        shape = count + SPARE, b, kv, self.tokens, d
        mean = normal(b, kv, d)
        k_codes, k_scale = quantize(normal(*shape), 4, d, False, True)
        v_codes, v_scale = quantize(normal(*shape), 4, d, self.per_channel, True)
        pages = {"k": pack(k_codes, 4), "v": pack(v_codes, 4), "k_scale": k_scale, "v_scale": v_scale}
        order = torch.randperm(count + SPARE, generator=source).to(self.device)
        self.runs = {"packed": self._run(pages, order, self.offsets, mean, self.turned)}
        if self.coded:
            codes = [
                int8.quantize(normal(*shape), -2 if side and self.per_channel else -1) for side in (0, 1)
            ]
            names = ("k", "k_scale", "v", "v_scale")
            pages = dict(zip(names, (x for pair in codes for x in pair), strict=True))
            self.runs["coded"] = self._run(pages, order.flip(0), (-4,), mean, False)
        if self.plain:
            pages = {name: normal(*shape).to(self.dtype) for name in ("k", "v")}
            self.runs["plain"] = self._run(pages, order.roll(1), (-1,), None, False)

    def _run(
        self,
        pages: dict[str, Tensor],
        order: Tensor,
        offsets: tuple[int, ...],
        mean: Tensor | None,
        turned: bool,
    ) -> PageRun:
        slots, unused = order[: len(offsets)], order[len(offsets) :]
        for buffer in pages.values():
            buffer[unused] = math.nan if buffer.is_floating_point() else 127
        temporal = temporal_phases(self.d, torch.tensor(offsets, device=self.device))
        return PageRun(pages, slots, temporal, mean, turned)

    def __str__(self) -> str:
        parts = {k: v for k, v in vars(self).items() if v != getattr(type(self), k, None)}
        return ",".join(f"{k}={v}" for k, v in parts.items() if k not in ("runs", "q", "k", "v"))

    def attend(self) -> tuple[Tensor, Tensor, Tensor]:
        coded, plain, packed = (self.runs.get(kind) for kind in ("coded", "plain", "packed"))
        return attend_pages(self.q, self.k, self.v, coded, plain, self.tile, self.page_lse, packed)

    def reference(self, exact_queries: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        coded, plain, packed = (self.runs.get(kind) for kind in ("coded", "plain", "packed"))
        return attend_pages_reference(self.q, self.k, self.v, coded, plain, exact_queries, packed)


def assert_reads(case: Case, rounded: float) -> None:
    """The kernels agree with float64 on decoded pages as far as the codes of queries allow, and beyond with
    what such codes make of it."""
    out, lse, per_page = case.attend()
    assert out.dtype == case.dtype and lse.dtype == per_page.dtype == torch.float32
    exact, exact_lse, exact_pages = case.reference()
    assert 0 < relative_l2(out, exact) <= QUERY_CODES
    assert float((lse - exact_lse).abs().max()) <= 0.05
    coded, coded_lse, coded_pages = case.reference(exact_queries=False)
    assert relative_l2(out, coded) <= rounded
    assert float((lse - coded_lse).abs().max()) <= 2 * rounded
    if case.page_lse:
        assert float((per_page - exact_pages).abs().max()) <= 0.1
        assert float((per_page - coded_pages).abs().max()) <= 5 * rounded
    else:
        assert per_page.numel() == 0
