"""Packed pages of many shapes, and what a kernel must make of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.tiny import noise, relative_l2
from vidkv.kernels.packed import (
    MOST_ENCODED,
    _decode,
    _encode,
    decode_reference,
    dequantize,
    encode_reference,
    pack,
    quantize,
)
from vidkv.kernels.rope import temporal_phases

BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SPARE = 3


@dataclass(frozen=True)
class Case:
    """Pages on their way back.

    Attributes:
        group: channels of a scale; 0 for scales of channels.
        places: of the mean: 0 for none, 1 for all places, or every token's own.
    """

    bits: int
    d: int
    tokens: int
    group: int = 0
    turned: bool = True
    places: int = 1
    pages: int = 2
    heads: int = 2
    batch: int = 1
    timed: bool = True

    def __str__(self) -> str:
        parts = {k: v for k, v in vars(self).items() if v != getattr(type(self), k, None)}
        return ",".join(f"{name}={value}" for name, value in parts.items())


CASES = [
    Case(bits, d, tokens, group, turned, places)
    for bits, d, tokens, group, turned, places in (
        (4, 64, 16, 64, True, 1),
        (4, 64, 33, 32, True, 33),
        (4, 128, 40, 0, False, 1),
        (4, 32, 1, 16, True, 1),
        (2, 64, 16, 64, True, 16),
        (2, 64, 35, 16, False, 0),
        (2, 128, 70, 128, True, 1),
        (2, 128, 5, 0, True, 0),
        (8, 64, 31, 64, True, 1),
        (8, 16, 9, 8, False, 9),
        (8, 128, 33, 0, True, 1),
        (4, 256, 17, 256, True, 1),
    )
]
CASES += [
    Case(4, 64, 20, 64, pages=3, heads=3, batch=2),
    Case(2, 64, 20, 64, pages=1, heads=1, batch=3, timed=False),
]


ENCODED = [case for case in CASES if case.group == case.d <= MOST_ENCODED]
"""With one scale for a token: what the encoding kernel takes."""


def assert_decodes(case: Case, dtype: torch.dtype, device: str) -> None:
    """The kernel's pages against the reference's in float64."""
    slots = torch.randperm(case.pages + SPARE, generator=torch.Generator().manual_seed(1))[: case.pages]
    x = 3 * noise(case.pages + SPARE, case.batch, case.heads, case.tokens, case.d, seed=case.tokens)
    codes, scale = quantize(x, case.bits, case.group or case.d, not case.group, True)
    mean = noise(case.batch, case.heads, case.places, case.d, seed=2) if case.places else None
    phases = temporal_phases(case.d, torch.arange(-case.pages, 0)) if case.timed else None
    packed = pack(codes, case.bits)
    exact = decode_reference(packed, scale, slots, case.bits, case.turned, mean, phases, torch.float64)
    turns = None if phases is None else torch.view_as_real(phases).to(device)
    got = _decode(
        packed.to(device), scale.to(device), slots.to(device), case.bits, case.turned,
        None if mean is None else mean.to(device), turns, dtype,
    )  # fmt: skip
    assert got.dtype == dtype and got.shape == exact.shape
    assert relative_l2(got.cpu().double(), exact) < BOUNDS[dtype]


def assert_encodes(case: Case, dtype: torch.dtype, device: str, least_error: bool) -> None:
    """What the kernel wrote says as much as what the reference would have written, and nothing else is
    touched. Sums of the turning matrix in another order move numbers over the edge of a code: codes are
    compared by what they stand for."""
    slots = torch.randperm(case.pages + SPARE, generator=torch.Generator().manual_seed(1))[: case.pages]
    shape = (case.batch, case.heads, case.pages, case.tokens, case.d)
    x = (3 * noise(*shape, seed=case.tokens)).to(dtype)
    mean = noise(case.batch, case.heads, case.places, case.d, seed=2) if case.places else None
    size = case.pages + SPARE, case.batch, case.heads, case.tokens
    packed = torch.full((*size, case.d * case.bits // 8), 165, dtype=torch.uint8, device=device)
    scale = torch.full((*size, 1), -7.0, dtype=torch.float16, device=device)
    on_device = None if mean is None else mean.to(device)
    _encode(x.to(device), packed, scale, slots.to(device), case.bits, case.turned, least_error, on_device)
    untouched = sorted(set(range(len(packed))) - set(slots.tolist()))
    assert bool((packed[untouched] == 165).all()) and bool((scale[untouched] == -7).all())
    codes, scales = encode_reference(x, case.bits, case.d, False, case.turned, least_error, mean)
    if not case.turned:
        assert torch.equal(packed[slots].cpu(), codes) and torch.equal(scale[slots].cpu(), scales)
    wanted = x.float() if mean is None else x.float() - mean[:, :, None]
    back = [
        dequantize(c, s, case.bits, case.turned, torch.float32).movedim(0, 2)
        for c, s in ((packed[slots].cpu(), scale[slots].cpu()), (codes, scales))
    ]
    ours, theirs = (float((b - wanted).square().sum()) for b in back)
    assert abs(ours - theirs) <= 1e-3 * theirs
    assert float(((packed[slots].cpu() != codes).any(-1)).float().mean()) < 0.05
