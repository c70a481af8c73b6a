"""The byte-permute kernel in the interpreter, its inline assembly emulated: masks, addresses, softmax, pieces."""

from __future__ import annotations

import os
from typing import Any

import emulated_asm
import pytest
import torch
import triton.language as tl
from torch import Tensor

from turboquant_core import Attended, CacheCodec
from turboquant_core.testing import ProviderConformance
from turboquant_core.testing.cases import page_layout
from turboquant_triton import TritonProvider
from turboquant_triton.attend import AttendOptions, attend

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU runs the assembly itself")


class EmulatedProvider(TritonProvider):
    """Takes the byte-permute form on a CPU."""

    def attend(
        self, query: Tensor, pages: Tensor, block_table: Tensor, seq_lens: Tensor, codec: CacheCodec, **given: Any
    ) -> Attended:
        options = AttendOptions(given.pop("scaling"), given.pop("window", None), given.pop("softcap", None))
        memory = dict.fromkeys(("query_start_loc", "seq_starts", "sinks", "out", "workspace")) | given
        return attend(query, pages, block_table, seq_lens, codec, options, **memory, permute=True)


class Suite(ProviderConformance):
    """Only its comparison with the oracle is used here; the tolerance is that of int8 queries."""

    __test__ = False
    dtype = torch.float16
    attention_tolerance = 5e-2


SUITE = Suite()


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> EmulatedProvider:
    monkeypatch.setattr(tl, "inline_asm_elementwise", emulated_asm.inline_asm_elementwise)
    monkeypatch.setattr("turboquant_triton.attend.single_warps_supported", lambda layout, n: False)
    return EmulatedProvider()


def check(provider: TritonProvider, lengths: list[int], q_len: int, group: int, *bits: Any, **options: Any) -> None:
    head_dim, page_size = options.pop("head_dim", 64), options.pop("page_size", 64)
    layout = page_layout(*bits, head_dim, page_size=page_size, kv_heads=1)
    SUITE.check_attend(provider, SUITE.case(layout, lengths), [q_len] * len(lengths), group, **options)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (3, 3), (2, 2), (4, 2), (3, None)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_width(head_dim: int, key_bits: int, value_bits: int | None, provider: TritonProvider) -> None:
    check(provider, [150, 17], 1, 4, key_bits, value_bits, head_dim=head_dim)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2.5, 3.5), (3.5, 2.5), (3.5, 4), (2, 2.5)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_fractional_bits(head_dim: int, key_bits: float, value_bits: float, provider: TritonProvider) -> None:
    check(provider, [70, 17], 1, 4, key_bits, value_bits, head_dim=head_dim)


@pytest.mark.parametrize("head_dim", [80, 112, 160, 192])
def test_padded_head_dims(head_dim: int, provider: TritonProvider) -> None:
    check(provider, [70], 1, 2, 3, 4, head_dim=head_dim)
    check(provider, [70], 1, 2, 2, 3, head_dim=head_dim)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_page_sizes_and_empty_sequences(page_size: int, provider: TritonProvider) -> None:
    check(provider, [0, 1, 63, 64, 65, 129], 1, 2, 4, 3, page_size=page_size)


@pytest.mark.parametrize(("q_len", "group"), [(1, 8), (1, 16), (1, 33), (2, 3), (5, 2), (8, 4)])
def test_groups_and_query_lengths(q_len: int, group: int, provider: TritonProvider) -> None:
    check(provider, [70, max(q_len, 9)], q_len, group, 4, 4)


@pytest.mark.parametrize(
    "options",
    [{"window": 9}, {"softcap": 2.0}, {"seq_starts": [7, 0]}, {"window": 20, "softcap": 3.0, "seq_starts": [3, 40]}],
    ids=str,
)
def test_options(options: dict[str, Any], provider: TritonProvider) -> None:
    check(provider, [70, 66], 2, 2, 4, 4, **options)


def test_sinks(provider: TritonProvider) -> None:
    check(provider, [70, 1], 1, 2, 4, 4, sinks=torch.tensor([1.0, -2.0]))
