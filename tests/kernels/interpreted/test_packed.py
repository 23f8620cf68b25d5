"""Decoding packed pages: the kernel against its torch reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.packed_cases import CASES, Case, assert_decodes

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode(case: Case, dtype: torch.dtype) -> None:
    assert_decodes(case, dtype, "cpu")
