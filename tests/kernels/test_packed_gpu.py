"""Decoding packed pages on a GPU, whose matrix units the interpreter does not have."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.packed_cases import CASES, ENCODED, Case, assert_decodes, assert_encodes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decode(case: Case, dtype: torch.dtype) -> None:
    assert_decodes(case, dtype, "cuda")


@pytest.mark.parametrize("case", ENCODED, ids=str)
@pytest.mark.parametrize("least_error", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_encode(case: Case, dtype: torch.dtype, least_error: bool) -> None:
    assert_encodes(case, dtype, "cuda", least_error)
