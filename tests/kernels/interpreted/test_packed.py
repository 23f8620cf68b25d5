"""Decoding packed pages: the kernel against its torch reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.packed_cases import CASES, ENCODED, Case, assert_decodes, assert_encodes

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode(case: Case, dtype: torch.dtype) -> None:
    assert_decodes(case, dtype, "cpu")


@pytest.mark.parametrize("case", ENCODED, ids=str)
@pytest.mark.parametrize("least_error", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_encode(case: Case, dtype: torch.dtype, least_error: bool) -> None:
    assert_encodes(case, dtype, "cpu", least_error)
