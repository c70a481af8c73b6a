"""The conformance suite: a pytest class that proves a kernel provider right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..codec import Codec
from ..layout import BITS, LAYOUT_VERSION, WIDTHS, Form, PageLayout, VectorLayout
from ..packing import unpack_codes
from ..provider import KernelProvider, KernelRequest, Packed
from ..reference import ReferenceProvider
from ..reference.pages import field_views
from ..rotation import rotate
from ..scale import SCALE_RULES
from .cases import (
    NAN_BYTE,
    PagedCase,
    code_distance,
    expected_scales,
    page_layout,
    paged_case,
    random_query,
    random_vectors,
)
from .exact import ExactRowsChecks
from .golden import golden_cases
from .oracle import attention_oracle, decode_oracle, relative_error

PROPERTY = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def any_lengths(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test over batches of sequences of any lengths, with draws of its own."""
    return PROPERTY(given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4), data=st.data())(test))


class ProviderConformance(ExactRowsChecks):
    """Subclass with one fixture, ``provider``; set the class attributes to what the provider promises.

    Attributes:
        device: where the tests run.
        dtype: of queries, keys and values.
        head_dims: sizes to test.
        bits: (key bits, value bits) pairs to test; None as value bits keeps values in 16 bits.
        page_sizes: page sizes to test.
        group_sizes: query heads per KV head to test.
        decode_tolerance: relative error allowed of ``decode`` and ``gather`` against float64.
        attention_tolerance: relative error allowed of ``scores`` and ``attend`` against float64.
        boundary_tolerance: a code may differ from the reference only where the coordinate lies this close to a
            boundary, in standard deviations.
        must_run: an unsupported base request fails instead of skipping; set it in a provider's own repository.
        must_run_mixed: so does an unsupported request with fractional bits.
    """

    device: ClassVar[str] = "cpu"
    dtype: ClassVar[torch.dtype] = torch.float32
    head_dims: ClassVar[tuple[int, ...]] = (64, 80, 96, 112, 128, 160, 192, 256)
    bits: ClassVar[tuple[tuple[float, float | None], ...]] = (
        (4, 4), (3, 3), (2, 2), (4, 2), (3, 4), (4, None), (2.5, 2.5), (3.5, 3.5), (3.5, 2), (4, 2.5)
    )  # fmt: skip
    page_sizes: ClassVar[tuple[int, ...]] = (16, 64)
    group_sizes: ClassVar[tuple[int, ...]] = (1, 4, 7)
    decode_tolerance: ClassVar[float] = 2e-6
    attention_tolerance: ClassVar[float] = 2e-6
    boundary_tolerance: ClassVar[float] = 1e-5
    must_run: ClassVar[bool] = False
    must_run_mixed: ClassVar[bool] = False

    @pytest.fixture
    def provider(self) -> KernelProvider:
        """The provider under test."""
        raise NotImplementedError("override the provider fixture")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize by the class attributes."""
        for name in ("head_dim", "bits_pair", "page_size", "group_size"):
            if name in metafunc.fixturenames:
                values = {
                    "head_dim": self.head_dims,
                    "bits_pair": self.bits,
                    "page_size": self.page_sizes,
                    "group_size": self.group_sizes,
                }[name]
                metafunc.parametrize(name, values, ids=str)

    def request_for(self, layout: PageLayout, group_size: int = 1) -> KernelRequest:
        """The request that a layer with ``layout`` would make."""
        return KernelRequest(layout, torch.device(self.device), self.dtype, group_size)

    def promises(self, layout: PageLayout) -> bool:
        """Whether ``bits`` names those of keys and those of values, each for itself: only what is promised must run."""
        value = layout.value.bits if isinstance(layout.value, VectorLayout) else None
        keys, values = ({pair[i] for pair in self.bits} for i in (0, 1))
        mixed = not {layout.key.bits, value} <= {*WIDTHS, None}
        return layout.key.bits in keys and value in values and (self.must_run_mixed or not mixed)

    def require(self, provider: KernelProvider, layout: PageLayout, group_size: int = 1) -> None:
        """Skip (or, with ``must_run``, fail where it is promised) when the provider says it cannot do ``layout``."""
        reason = provider.unsupported_reason(self.request_for(layout, group_size))
        if reason is not None and self.must_run and self.promises(layout):
            pytest.fail(f"{provider.name} must support {layout}: {reason}")
        if reason is not None:
            pytest.skip(reason)

    def layout(self, key_bits: float, value_bits: float | None, head_dim: int, **options: Any) -> PageLayout:
        """A page layout in the default forms; 16- or 32-bit values follow the tests' dtype."""
        return page_layout(key_bits, value_bits, head_dim, itemsize=self.dtype.itemsize, **options)

    def first_layout(self, **options: Any) -> PageLayout:
        """The layout of tests whose subject is something else than bits and head_dim."""
        return self.layout(*self.bits[0], self.head_dims[0], **options)

    def named_bits(self, *, mixed: bool) -> list[tuple[float, float]]:
        """Every pair of the bits that ``bits`` names for keys and for values; with a fractional one, or without."""
        keys = sorted({key for key, _ in self.bits})
        values = sorted({value for _, value in self.bits if value is not None})
        found = [pair for pair in product(keys, values) if (not set(pair) <= set(WIDTHS)) is mixed]
        if not found:
            pytest.skip(f"{'fractional' if mixed else 'whole'} bits are not named for keys and values: {self.bits}")
        return found

    def golden_layout(self, bits: float, form: Form, head_dim: int) -> PageLayout:
        """A page that asks for ``bits`` in the place of ``form``, keys or values, beside bits that ``bits`` names."""
        place = 0 if form == "int8" else 1
        named = [pair for pair in self.bits if pair[place] == bits]
        pair = named[0] if named else (bits, self.bits[0][1]) if place == 0 else (self.bits[0][0], bits)
        return self.layout(*pair, head_dim)

    def case(self, layout: PageLayout, lengths: list[int], **options: Any) -> PagedCase:
        """Random packed pages on the tests' device; 16-bit values follow the tests' dtype."""
        return paged_case(layout, lengths, self.dtype, self.device, **options)

    def check_attend(
        self,
        provider: KernelProvider,
        case: PagedCase,
        q_lens: list[int],
        group_size: int,
        *,
        ragged: bool = False,
        **options: Any,
    ) -> None:
        """Compare ``attend`` with the float64 oracle, into NaN-filled output memory."""
        query = random_query(case, sum(q_lens), group_size, self.dtype)
        before = query.clone(), case.pages.clone()
        shape = (*query.shape[:2], case.codec.layout.value.head_dim)
        out = torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
        arguments = {**options, "scaling": query.shape[-1] ** -0.5}
        start_loc = torch.tensor([0, *q_lens], device=self.device).cumsum(0).to(torch.int32) if ragged else None
        starts = options.get("seq_starts")
        arguments["seq_starts"] = None if starts is None else _int32(starts, self.device)
        got = provider.attend(
            query, case.pages, case.block_table, case.seq_lens, case.codec,
            query_start_loc=start_loc, out=out, **arguments,
        )  # fmt: skip
        assert got.out is out
        assert torch.equal(query, before[0]), "attend changed the query"
        assert torch.equal(case.pages, before[1]), "attend changed the pages"
        arguments["seq_starts"] = starts
        expected, lse = attention_oracle(
            query, case.pages, case.block_table, case.lengths, q_lens, case.codec, **arguments
        )
        assert relative_error(got.out, expected) <= self.attention_tolerance + 2 * _epsilon(self.dtype)
        finite = torch.from_numpy(lse).isfinite()
        assert torch.equal(got.lse.cpu().isfinite(), finite)
        assert relative_error(got.lse.cpu()[finite], lse[finite.numpy()]) <= self.attention_tolerance

    # The vector operations ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("form", ["int8", "cubic"])
    @pytest.mark.parametrize("bits", BITS)
    def test_golden_bytes(self, provider: KernelProvider, head_dim: int, bits: float, form: Any) -> None:
        golden = golden_cases()[(head_dim, bits, form)]
        layout = VectorLayout(head_dim, bits, form)
        self.require(provider, self.golden_layout(bits, form, head_dim))
        codec = Codec.create(layout, seed=golden.seed, stream=golden.stream, device=self.device)
        packed = provider.encode(golden.vectors.to(self.device, self.dtype), codec)
        assert torch.equal(packed.codes.cpu(), golden.codes)
        assert torch.equal(packed.scales.cpu(), golden.scales)

    @pytest.mark.parametrize("rule", SCALE_RULES)
    def test_encode_equals_the_reference(
        self, provider: KernelProvider, head_dim: int, bits_pair: tuple[float, float | None], rule: Any
    ) -> None:
        for vector in self._packed_vectors(provider, bits_pair, head_dim):
            self._check_encode(provider, Codec.create(vector, scale_rule=rule, device=self.device))

    def _packed_vectors(
        self, provider: KernelProvider, bits_pair: tuple[float, float | None], head_dim: int
    ) -> list[VectorLayout]:
        layout = self.layout(*bits_pair, head_dim)
        self.require(provider, layout)
        return [vector for vector in (layout.key, layout.value) if isinstance(vector, VectorLayout)]

    def _check_encode(self, provider: KernelProvider, codec: Codec) -> None:
        shape = (3, 5, codec.layout.head_dim)
        x = random_vectors(torch.Generator().manual_seed(7), shape, self.dtype).to(self.device)
        before = x.clone()
        got, expected = provider.encode(x, codec), ReferenceProvider().encode(x, codec)
        assert torch.equal(x, before), "encode changed its input"
        assert got.codes.shape == expected.codes.shape
        differs = unpack_codes(got.codes, codec.layout) != unpack_codes(expected.codes, codec.layout)
        rotated = rotate(x.float(), codec.signs)
        unit = rotated / rotated.square().mean(-1, keepdim=True).sqrt()
        assert (code_distance(unit, codec)[differs] <= self.boundary_tolerance).all()
        scales = expected_scales(got, expected, rotated, codec)
        torch.testing.assert_close(got.scales, scales, rtol=2e-3, atol=6e-8)

    def test_decode_equals_float64(
        self, provider: KernelProvider, head_dim: int, bits_pair: tuple[float, float | None]
    ) -> None:
        for vector in self._packed_vectors(provider, bits_pair, head_dim):
            codec = Codec.create(vector, device=self.device)
            packed = self._packed(codec, (2, 9))
            got = provider.decode(packed, codec, torch.float32)
            assert relative_error(got, decode_oracle(packed, codec)) <= self.decode_tolerance

    def _packed(self, codec: Codec, lead: tuple[int, ...], seed: int = 3) -> Packed:
        x = random_vectors(torch.Generator().manual_seed(seed), (*lead, codec.layout.head_dim), self.dtype)
        return ReferenceProvider().encode(x.to(self.device), codec)

    def test_scores_equal_float64(self, provider: KernelProvider, head_dim: int) -> None:
        for pair in {pair[0]: pair for pair in self.bits}.values():
            layout = self.layout(*pair, head_dim)
            self.require(provider, layout)
            codec = Codec.create(layout.key, device=self.device)
            packed = self._packed(codec, (2, 3, 37))
            query = torch.randn(2, 3, 5, head_dim).to(self.device, self.dtype)
            got = provider.scores(query, packed, codec, scaling=0.25)
            keys = decode_oracle(packed, codec, centered=True)
            expected = 0.25 * query.cpu().double().numpy() @ keys.swapaxes(-1, -2)
            assert got.dtype == torch.float32
            assert relative_error(got, expected) <= self.attention_tolerance

    def test_zero_nan_and_huge_vectors(self, provider: KernelProvider, bits_pair: tuple[float, float | None]) -> None:
        layout = self.layout(*bits_pair, self.head_dims[0])
        self.require(provider, layout)
        codec = Codec.create(layout.key, device=self.device)
        x = random_vectors(torch.Generator().manual_seed(5), (6, layout.key.head_dim), self.dtype).to(self.device)
        plain = provider.encode(x, codec)
        bad = x.clone()
        bad[1], bad[2, 3], bad[3, 0], bad[4] = 0, torch.nan, -torch.inf, torch.finfo(self.dtype).max
        got = provider.encode(bad, codec)
        assert got.scales[1] == 0
        assert got.scales[2:4].isnan().all()
        assert not unpack_codes(got.codes[2:4], layout.key).any()
        assert got.scales[4].isfinite()
        for untouched in (0, 5):
            assert torch.equal(got.codes[untouched], plain.codes[untouched])
            assert torch.equal(got.scales[untouched], plain.scales[untouched])
        decoded = provider.decode(got, codec)
        assert not decoded[1].any()
        assert decoded[2:4].isnan().all()
        assert decoded[[0, 4, 5]].isfinite().all()

    def test_center_is_removed_and_restored(self, provider: KernelProvider) -> None:
        layout = self.first_layout()
        self.require(provider, layout)
        center = torch.randn(layout.kv_heads, layout.key.head_dim) * 5
        codec = Codec.create(layout.key, center=center, device=self.device)
        x = torch.randn(7, layout.kv_heads, layout.key.head_dim).to(self.device, self.dtype)
        packed = provider.encode(x, codec)
        shifted = (x.float() - codec.center).to(torch.float32) if codec.center is not None else x
        expected = ReferenceProvider().encode(shifted, replace(codec, center=None))
        torch.testing.assert_close(packed.scales, expected.scales, rtol=2e-3, atol=6e-8)
        decoded = provider.decode(packed, codec, torch.float32)
        assert relative_error(decoded, decode_oracle(packed, codec)) <= self.decode_tolerance

    def test_non_contiguous_input(self, provider: KernelProvider) -> None:
        layout = self.first_layout()
        self.require(provider, layout)
        codec = Codec.create(layout.key, device=self.device)
        x = random_vectors(torch.Generator().manual_seed(2), (4, layout.key.head_dim, 6), self.dtype)
        strided = x.to(self.device).transpose(1, 2)
        got, expected = provider.encode(strided, codec), provider.encode(strided.contiguous(), codec)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.scales, expected.scales)

    # Pages ----------------------------------------------------------------------------------------------------------

    def test_store_writes_its_slots_and_no_other_byte(
        self, provider: KernelProvider, bits_pair: tuple[float, float | None], page_size: int
    ) -> None:
        layout = self.layout(*bits_pair, self.head_dims[0], page_size=page_size)
        self.require(provider, layout)
        case = self.case(layout, [page_size + 3, 5])
        generator = torch.Generator().manual_seed(11)
        pages = torch.randint(0, 256, case.pages.shape, dtype=torch.uint8, generator=generator).to(self.device)
        expected, slots = pages.clone(), case.slots.clone()
        slots[::3] = -1
        ReferenceProvider().store(case.key, case.value, expected, slots, case.codec)
        written = _written_bytes(layout, case, slots)
        provider.store(case.key, case.value, pages, slots, case.codec)
        provided = self._by_encode(provider, case, slots, expected.clone())
        assert torch.equal(pages, provided), "store and encode disagree"
        assert torch.equal(pages[~written], expected[~written]), "store changed a byte outside its slots"

    def _by_encode(self, provider: KernelProvider, case: PagedCase, slots: Any, pages: Any) -> Any:
        """The pages that the provider's own ``encode`` implies, placed by the reference's views."""
        layout, keep = case.codec.layout, slots >= 0
        page, offset = slots[keep] // layout.page_size, slots[keep] % layout.page_size
        for fields, codec, x in zip(
            field_views(pages, layout), (case.codec.key, case.codec.value), (case.key, case.value), strict=True
        ):
            if codec is not None:
                packed = provider.encode(x[keep], codec)
                fields.codes[page, :, offset], fields.scales[page, :, offset] = packed.codes, packed.scales
        return pages

    def test_store_of_no_tokens(self, provider: KernelProvider) -> None:
        layout = self.first_layout()
        self.require(provider, layout)
        case = self.case(layout, [16])
        before = case.pages.clone()
        provider.store(case.key[:0], case.value[:0], case.pages, case.slots[:0], case.codec)
        assert torch.equal(case.pages, before)

    def test_gather_equals_float64(
        self, provider: KernelProvider, head_dim: int, bits_pair: tuple[float, float | None]
    ) -> None:
        layout = self.layout(*bits_pair, head_dim)
        self.require(provider, layout)
        case = self.case(layout, [40, 33])
        dtype = self.dtype if bits_pair[1] is None else torch.float32
        got = provider.gather(case.pages, case.block_table, case.codec, start=7, stop=33, dtype=dtype)
        rotated = provider.gather(case.pages, case.block_table, case.codec, start=7, stop=33, dtype=dtype, rotated=True)
        expected = ReferenceProvider().gather(case.pages, case.block_table, case.codec, start=7, stop=33, dtype=dtype)
        tolerance = self.decode_tolerance + _epsilon(dtype)
        for name in ("keys", "values"):
            reference = getattr(expected, name).double().cpu().numpy()
            assert relative_error(getattr(got, name), reference) <= tolerance
        key = rotate(got.keys.float(), case.codec.key.signs)
        assert relative_error(rotated.keys.float(), key.double().cpu().numpy()) <= 4 * tolerance

    # Attention ------------------------------------------------------------------------------------------------------

    def test_attend_every_head_dim(
        self, provider: KernelProvider, head_dim: int, bits_pair: tuple[float, float | None]
    ) -> None:
        layout = self.layout(*bits_pair, head_dim)
        self.require(provider, layout, 2)
        self.check_attend(provider, self.case(layout, [50, 17]), [1, 1], 2)

    def test_attend_lengths_around_pages(self, provider: KernelProvider, page_size: int, group_size: int) -> None:
        layout = self.first_layout(page_size=page_size)
        self.require(provider, layout, group_size)
        lengths = [0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size]
        self.check_attend(provider, self.case(layout, lengths), [1] * len(lengths), group_size)

    def test_attend_several_queries_causal(
        self, provider: KernelProvider, bits_pair: tuple[float, float | None]
    ) -> None:
        layout = self.layout(*bits_pair, self.head_dims[0])
        self.require(provider, layout, 2)
        self.check_attend(provider, self.case(layout, [9, 40, 70]), [5, 5, 5], 2)

    def test_attend_ragged_queries(self, provider: KernelProvider) -> None:
        layout = self.first_layout()
        self.require(provider, layout, 4)
        self.check_attend(provider, self.case(layout, [9, 40, 0, 70]), [3, 1, 0, 8], 4, ragged=True)

    @pytest.mark.parametrize(
        "options",
        [
            {"window": 1},
            {"window": 20},
            {"softcap": 3.0},
            {"seq_starts": [0, 7, 30]},
            {"window": 9, "softcap": 2.0, "seq_starts": [3, 0, 25]},
        ],
        ids=str,
    )
    def test_attend_options(self, provider: KernelProvider, options: dict[str, Any]) -> None:
        layout = self.first_layout()
        self.require(provider, layout, 2)
        self.check_attend(provider, self.case(layout, [18, 40, 70]), [2, 2, 2], 2, **options)

    def test_attend_sinks(self, provider: KernelProvider) -> None:
        layout = self.first_layout()
        self.require(provider, layout, 2)
        sinks = torch.tensor([1.0, -2.0, 5.0, 0.0], device=self.device)
        self.check_attend(provider, self.case(layout, [18, 40]), [1, 1], 2, sinks=sinks)

    def test_attend_values_of_another_head_dim(self, provider: KernelProvider) -> None:
        layout = self.first_layout(value_head_dim=self.head_dims[-1])
        self.require(provider, layout, 2)
        self.check_attend(provider, self.case(layout, [18, 40]), [1, 1], 2)

    def test_attend_when_nothing_is_visible(self, provider: KernelProvider) -> None:
        layout = self.first_layout()
        self.require(provider, layout)
        case = self.case(layout, [0, 20])
        query = random_query(case, 2, 1, self.dtype)
        starts = _int32([0, 20], self.device)
        got = provider.attend(
            query, case.pages, case.block_table, case.seq_lens, case.codec, scaling=1.0, seq_starts=starts
        )
        assert not got.out.any()
        assert (got.lse == -torch.inf).all()

    @any_lengths
    def test_attend_any_lengths(self, provider: KernelProvider, lengths: list[int], data: st.DataObject) -> None:
        self._check_any_lengths(provider, lengths, data, mixed=False)

    @any_lengths
    def test_attend_any_lengths_in_fractional_bits(
        self, provider: KernelProvider, lengths: list[int], data: st.DataObject
    ) -> None:
        self._check_any_lengths(provider, lengths, data, mixed=True)

    def _check_any_lengths(
        self, provider: KernelProvider, lengths: list[int], data: st.DataObject, *, mixed: bool
    ) -> None:
        bits, group_size = data.draw(st.sampled_from(self.named_bits(mixed=mixed))), data.draw(st.integers(1, 9))
        layout = self.layout(*bits, self.head_dims[0])
        self.require(provider, layout, group_size)
        case = self.case(layout, lengths, seed=data.draw(st.integers(0, 1000)))
        self.check_attend(provider, case, [1] * len(lengths), group_size)

    # Rules of the protocol ------------------------------------------------------------------------------------------

    def test_unknown_layout_version_is_refused(self, provider: KernelProvider) -> None:
        key = VectorLayout(self.head_dims[0], 4, "int8", version=LAYOUT_VERSION + 1)
        value = VectorLayout(self.head_dims[0], 4, "cubic", version=LAYOUT_VERSION + 1)
        reason = provider.unsupported_reason(self.request_for(PageLayout(key, value, page_size=16, kv_heads=1)))
        assert reason is not None
        assert str(LAYOUT_VERSION + 1) in reason

    def test_name_and_priority(self, provider: KernelProvider) -> None:
        assert isinstance(provider, KernelProvider)
        assert provider.name
        assert isinstance(provider.priority, int)

    def test_workspace_is_enough(self, provider: KernelProvider) -> None:
        layout = self.first_layout()
        self.require(provider, layout, 2)
        case = self.case(layout, [60, 33])
        size = provider.workspace_bytes(self.request_for(layout, 2), tokens=2, batch=2)
        workspace = torch.full((size,), NAN_BYTE, dtype=torch.uint8, device=self.device)
        query = random_query(case, 2, 2, self.dtype)
        arguments = (query, case.pages, case.block_table, case.seq_lens, case.codec)
        got = provider.attend(*arguments, scaling=0.1, workspace=workspace)
        expected = provider.attend(*arguments, scaling=0.1)
        assert torch.equal(got.out, expected.out)

    def test_suite_is_intact(self) -> None:
        """A subclass may not silently drop or replace a test: mark it ``xfail(reason=...)`` instead."""
        for name in dir(ProviderConformance):
            if not name.startswith("test_"):
                continue
            own = getattr(type(self), name, None)
            if own is getattr(ProviderConformance, name):
                continue
            marks = {mark.name: mark for mark in getattr(own, "pytestmark", [])}
            assert "xfail" in marks, f"{type(self).__name__} replaces {name} without xfail(reason=...)"
            assert marks["xfail"].kwargs.get("reason"), f"{type(self).__name__}.{name}: xfail needs a reason"


def _int32(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _written_bytes(layout: PageLayout, case: PagedCase, slots: torch.Tensor) -> torch.Tensor:
    """Bool mask of the bytes that belong to ``slots``: those that change when the slots are overwritten twice."""
    zeros = torch.zeros_like(case.pages)
    ones = torch.full_like(case.pages, 0xFF)
    for pages in (zeros, ones):
        ReferenceProvider().store(case.key, case.value, pages, slots, case.codec)
    return zeros == ones
