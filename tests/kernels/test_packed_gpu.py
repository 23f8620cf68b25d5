"""Decoding packed pages on a GPU, whose matrix units the interpreter does not have."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.packed_cases import CASES, Case, assert_decodes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decode(case: Case, dtype: torch.dtype) -> None:
    assert_decodes(case, dtype, "cuda")
