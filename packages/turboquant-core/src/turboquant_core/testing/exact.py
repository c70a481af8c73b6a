"""What the conformance suite asks of a provider that writes and reads exact rows."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from ..exact import ExactRowsProvider, attend_with_exact
from ..layout import ExactRows, PageLayout
from ..provider import KernelProvider
from ..reference import ReferenceProvider
from .cases import NAN_BYTE, PagedCase, paged_case, random_query
from .oracle import Float64, attend_one_query, page_vectors, relative_error


def exact_attention_oracle(
    query: Tensor,
    case: PagedCase,
    q_lens: list[int],
    *,
    recent: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Float64, Float64]:
    """Float64 attention over the case's first and recent tokens as they came, and the codes of those between."""
    layout, center = case.codec.layout, case.codec.key.center
    keys, values = page_vectors(case.pages, case.codec, query.dtype)
    raw_keys, raw_values = (x.cpu().double().numpy() for x in (case.key, case.value))
    if center is not None:
        raw_keys = raw_keys - center.cpu().double().numpy()
    q = query.cpu().double().numpy()
    out, lse = np.zeros((*q.shape[:2], values.shape[-1])), np.full(q.shape[:2], -np.inf)
    token = before = 0
    for length, q_len in zip(case.lengths, q_lens, strict=True):
        slots = case.slots[before : before + length].cpu().numpy()
        own = slice(before, before + length)
        for i in range(q_len if length else 0):
            position = length - q_len + i
            where = np.arange(position + 1)
            exact = (where < layout.exact.first) | (where > position - recent)
            for head in range(q.shape[1]):
                kv = head // (q.shape[1] // layout.kv_heads)
                at = (slots[where] // layout.page_size, kv, slots[where] % layout.page_size)
                k = np.where(exact[:, None], raw_keys[own][where, kv], keys[at])
                v = np.where(exact[:, None], raw_values[own][where, kv], values[at])
                sink = None if sinks is None else float(sinks[head])
                out[token + i, head], lse[token + i, head] = attend_one_query(
                    q[token + i, head], k, v, scaling, softcap, sink
                )
        token, before = token + q_len, before + length
    return out, lse


class ExactRowsChecks:
    """Tests of exact rows, skipped for a provider without them; part of :class:`ProviderConformance`."""

    device: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    head_dims: ClassVar[tuple[int, ...]]
    decode_tolerance: ClassVar[float]
    attention_tolerance: ClassVar[float]

    def layout(self, key_bits: float, value_bits: float | None, head_dim: int, **options: Any) -> PageLayout:
        """See :class:`ProviderConformance`."""
        raise NotImplementedError

    def require(self, provider: KernelProvider, layout: PageLayout, group_size: int = 1) -> None:
        """See :class:`ProviderConformance`."""
        raise NotImplementedError

    def exact_layout(
        self,
        provider: KernelProvider,
        exact: tuple[int, int],
        *,
        group: int = 1,
        bits: tuple[float, float | None] = (4, 4),
        head_dim: int | None = None,
        **options: Any,
    ) -> PageLayout:
        """A layout with ``(first, ring)`` exact rows, or a skip."""
        if not isinstance(provider, ExactRowsProvider):
            pytest.skip(f"{provider.name} has no exact rows")
        rows = ExactRows(*exact, self.dtype.itemsize)
        layout = self.layout(*bits, head_dim or self.head_dims[0], exact=rows, **options)
        self.require(provider, layout, group)
        return layout

    @pytest.mark.parametrize("rows", [(4, 0), (0, 5), (3, 16)], ids=str)
    def test_exact_rows_are_copies_and_no_other_byte_changes(
        self, provider: KernelProvider, rows: tuple[int, int]
    ) -> None:
        layout = self.exact_layout(provider, rows)
        assert isinstance(provider, ExactRowsProvider)
        case = paged_case(layout, [37, 5, 16], self.dtype, self.device)
        generator = torch.Generator().manual_seed(11)
        pages = torch.randint(0, 256, case.pages.shape, dtype=torch.uint8, generator=generator).to(self.device)
        expected, slots = pages.clone(), case.slots.clone()
        slots[40] = -1
        ReferenceProvider().store_exact(case.key, case.value, expected, slots, layout)
        provider.store_exact(case.key, case.value, pages, slots, layout)
        assert torch.equal(pages, expected)

    def test_codes_beside_exact_rows(self, provider: KernelProvider) -> None:
        layout = self.exact_layout(provider, (3, 7))
        case = paged_case(layout, [37, 5], self.dtype, self.device)
        pages = torch.full_like(case.pages, NAN_BYTE)
        expected = pages.clone()
        for target, packer in ((pages, provider), (expected, ReferenceProvider())):
            packer.store(case.key, case.value, target, case.slots, case.codec)
        assert torch.equal(pages[..., layout.exact_key_offset :], expected[..., layout.exact_key_offset :])
        got, wanted = (
            reader.gather(pages, case.block_table, case.codec, start=3, stop=30, dtype=torch.float32)
            for reader in (provider, ReferenceProvider())
        )
        for one, other in zip(got, wanted, strict=True):
            assert relative_error(one[:1], other[:1].cpu().double().numpy()) <= self.decode_tolerance + 1e-7

    def check_exact(
        self, provider: ExactRowsProvider, case: PagedCase, q_lens: list[int], group: int, recent: int, **options: Any
    ) -> None:
        """Compare packed and exact attention together with the float64 oracle, into NaN-filled output memory."""
        query = random_query(case, sum(q_lens), group, self.dtype)
        before = case.pages.clone()
        ragged = len(set(q_lens)) > 1
        start_loc = torch.tensor([0, *q_lens], device=self.device).cumsum(0).to(torch.int32) if ragged else None
        out = query.new_full((*query.shape[:2], case.codec.layout.value.head_dim), torch.nan)
        options["scaling"] = query.shape[-1] ** -0.5
        got = attend_with_exact(
            provider, query, case.pages, case.block_table, case.seq_lens, case.codec,
            recent=recent, query_start_loc=start_loc, out=out, **options,
        )  # fmt: skip
        assert got.out is out
        assert torch.equal(case.pages, before)
        expected, lse = exact_attention_oracle(query, case, q_lens, recent=recent, **options)
        assert relative_error(got.out, expected) <= self.attention_tolerance + 4 * torch.finfo(self.dtype).eps
        finite = torch.from_numpy(lse).isfinite()
        assert torch.equal(got.lse.cpu().isfinite(), finite)
        assert relative_error(got.lse.cpu()[finite], lse[finite.numpy()]) <= self.attention_tolerance

    @pytest.mark.parametrize(
        ("rows", "recent", "q_len"),
        [((4, 0), 0, 1), ((0, 6), 6, 1), ((4, 16), 9, 1), ((4, 9), 7, 3), ((16, 16), 13, 4), ((2, 3), 0, 3)],
        ids=str,
    )
    def test_attend_exact(
        self, provider: KernelProvider, rows: tuple[int, int], recent: int, q_len: int, group_size: int
    ) -> None:
        layout = self.exact_layout(provider, rows, group=group_size)
        assert isinstance(provider, ExactRowsProvider)
        lengths = [q_len, 0, 16, 19, 45]
        case = paged_case(layout, lengths, self.dtype, self.device)
        self.check_exact(provider, case, [q_len] * len(lengths), group_size, recent)

    def test_attend_exact_every_head_dim(self, provider: KernelProvider, head_dim: int) -> None:
        layout = self.exact_layout(provider, (4, 10), group=2, head_dim=head_dim, bits=(3, 4), page_size=32)
        assert isinstance(provider, ExactRowsProvider)
        case = paged_case(layout, [50, 3, 33], self.dtype, self.device)
        self.check_exact(provider, case, [1, 1, 1], 2, 10)

    def test_attend_exact_ragged_queries(self, provider: KernelProvider) -> None:
        layout = self.exact_layout(provider, (4, 12), group=4)
        assert isinstance(provider, ExactRowsProvider)
        case = paged_case(layout, [9, 40, 0, 70], self.dtype, self.device)
        self.check_exact(provider, case, [3, 1, 0, 5], 4, 8)

    @pytest.mark.parametrize("option", ["softcap", "sinks", "center", "value_head_dim", "raw values"])
    def test_attend_exact_options(self, provider: KernelProvider, option: str) -> None:
        changes: dict[str, Any] = {"value_head_dim": self.head_dims[-1]} if option == "value_head_dim" else {}
        bits = (4, None) if option == "raw values" else (4, 4)
        layout = self.exact_layout(provider, (4, 9), group=2, bits=bits, **changes)
        assert isinstance(provider, ExactRowsProvider)
        center = torch.randn(layout.kv_heads, layout.key.head_dim) * 3 if option == "center" else None
        case = paged_case(layout, [18, 3, 40], self.dtype, self.device, center=center)
        given: dict[str, Any] = {"softcap": 3.0} if option == "softcap" else {}
        if option == "sinks":
            given["sinks"] = torch.tensor([1.0, -2.0, 5.0, 0.0], device=self.device)
        self.check_exact(provider, case, [2, 2, 2], 2, 8, **given)

    def test_a_ring_that_is_too_small_is_refused(self, provider: KernelProvider) -> None:
        layout = self.exact_layout(provider, (4, 9))
        assert isinstance(provider, ExactRowsProvider)
        case = paged_case(layout, [40], self.dtype, self.device)
        with pytest.raises(ValueError, match="recent is 8 with 3 queries a sequence; a ring of 9"):
            self.check_exact(provider, case, [3], 1, 8)
