"""The interpreter that these tests run in gives what Triton's own gives, and leaves the language as it was."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import Codec, VectorLayout
from turboquant_core.testing.cases import random_vectors
from turboquant_triton.kernels.encode import encode

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU needs no interpreter", allow_module_level=True)

from triton.runtime import interpreter


@triton.jit
def digits(first, second):
    """Neither commutative nor associative."""
    return 10 * first + second


def tensor(data: Any) -> tl.tensor:
    handle = interpreter.TensorHandle(data, tl.int32)
    return tl.tensor(handle, tl.block_type(tl.int32, list(data.shape)))


@settings(deadline=None)
@given(rows=st.sampled_from([1, 4]), columns=st.sampled_from([1, 8]), axis=st.integers(0, 1), seed=st.integers(0, 99))
def test_a_reduction_by_slices_combines_in_the_order_of_the_interpreter(
    rows: int, columns: int, axis: int, seed: int
) -> None:
    data = np.random.default_rng(seed).integers(0, 9, (rows, columns), dtype=np.int32)
    reduce = interpreter.ReduceOps.generic_reduce
    scope = interpreter._patch_lang(digits.fn)
    try:
        found = [f(interpreter.ReduceOps(axis, digits, False), (tensor(data),)) for f in (reduce, reduce.__wrapped__)]
    finally:
        scope.restore()
    ((quick,), (plain,)) = found
    assert quick.type == plain.type
    np.testing.assert_array_equal(quick.handle.data, plain.handle.data)


def packed(rule: Any) -> tuple[torch.Tensor, torch.Tensor]:
    codec = Codec.create(VectorLayout(64, 3, "int8"), scale_rule=rule)
    result = encode(random_vectors(torch.Generator().manual_seed(2), (3, 64), torch.float16), codec)
    return result.codes, result.scales


@pytest.mark.parametrize("rule", ["unbiased", "searched"])
def test_a_kernel_gives_the_same(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = packed(rule)
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.patch)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", interpreter.ReduceOps.generic_reduce.__wrapped__)
    for one, other in zip(quick, packed(rule), strict=True):
        assert torch.equal(one, other)


def test_the_language_is_restored_after_each_launch() -> None:
    before = tl.load, tl.tensor.__add__, tl.reduce
    for _ in range(2):
        packed("unbiased")
        assert (tl.load, tl.tensor.__add__, tl.reduce) == before
        assert not interpreter._patch_lang.done
