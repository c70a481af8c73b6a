"""Bad input to the operations: one clear error, or a documented result, and nothing half-written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from turboquant_core import (
    CacheCodec,
    Codec,
    KernelRequest,
    LayoutError,
    Packed,
    PageLayout,
    ReferenceProvider,
    TurboQuantKVCache,
    VectorLayout,
    pack_codes,
    select_provider,
    unpack_codes,
)

LAYOUT = PageLayout(VectorLayout(64, 4, "int8"), VectorLayout(64, 4, "cubic"), page_size=16, kv_heads=2)
PROVIDER = ReferenceProvider()


def vectors(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 2, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pages() -> torch.Tensor:
    return torch.full(LAYOUT.pages_shape(4), 7, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 60, "bits": 4, "form": "int8"}, "head_dim is 60"),
        ({"head_dim": 2048, "bits": 4, "form": "int8"}, "2048"),
        ({"head_dim": 64, "bits": 5, "form": "int8"}, "bits is 5"),
        ({"head_dim": 64, "bits": 4.25, "form": "int8"}, "bits is 4.25"),
        ({"head_dim": 64, "bits": 4, "form": "linear"}, "'linear'"),
        ({"head_dim": 64.0, "bits": 4, "form": "int8"}, "head_dim is 64.0; it must be an integer"),
        ({"head_dim": "64", "bits": 4, "form": "int8"}, "head_dim is '64'"),
        ({"head_dim": 64, "bits": "4", "form": "int8"}, "bits is '4'"),
        ({"head_dim": 64, "bits": True, "form": "int8"}, "bits is True"),
    ],
)
def test_layouts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        VectorLayout(**arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_spoils_itself_alone(bad: float) -> None:
    codec = Codec.create(LAYOUT.key)
    x = vectors(3)
    clean = PROVIDER.encode(x, codec)
    x[1, 0, 5] = bad
    packed = PROVIDER.encode(x, codec)
    assert packed.scales[1, 0].isnan()
    assert PROVIDER.decode(packed, codec)[1, 0].isnan().all()
    mask = torch.ones(3, 2, dtype=torch.bool)
    mask[1, 0] = False
    assert torch.equal(packed.codes[mask], clean.codes[mask])
    assert torch.equal(packed.scales[mask], clean.scales[mask])


def test_zero_vectors_decode_to_zero() -> None:
    for vector in (LAYOUT.key, LAYOUT.value):
        codec = Codec.create(vector)  # type: ignore[arg-type]
        packed = PROVIDER.encode(torch.zeros(3, 64), codec)
        assert not packed.scales.any()
        assert not PROVIDER.decode(packed, codec).any()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 64, dtype=torch.int64), "int64"),
        (torch.zeros(2, 32), "head_dim = 64"),
        (torch.zeros(()), "last dimension"),
        (torch.zeros(2, 64, device="meta"), "meta"),
        ([[0.0] * 64], r"x is a list; it must be a torch\.Tensor"),
        (np.zeros((2, 64)), r"x is a ndarray; it must be a torch\.Tensor"),
    ],
)
def test_encode(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PROVIDER.encode(x, Codec.create(LAYOUT.key))


def test_decode_of_scales_that_do_not_fit() -> None:
    codec = Codec.create(LAYOUT.key)
    packed = PROVIDER.encode(torch.zeros(2, 64), codec)
    with pytest.raises(ValueError, match="scales are"):
        PROVIDER.decode(Packed(packed.codes, packed.scales.float()), codec)
    with pytest.raises(ValueError, match="scales are"):
        PROVIDER.decode(Packed(packed.codes, packed.scales[:1]), codec)


@pytest.mark.parametrize(
    ("slots", "message"),
    [([0, 64], "0 to 64"), ([-2, 3], "-2"), ([1.0, 2.0], "integer"), ([0], "slot_mapping")],
)
def test_store_refuses_before_it_writes(pages: torch.Tensor, slots: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PROVIDER.store(vectors(2), vectors(2, 1), pages, torch.tensor(slots), CacheCodec.create(LAYOUT))
    assert (pages == 7).all()


def test_store_into_other_pages(pages: torch.Tensor) -> None:
    codec, slots = CacheCodec.create(LAYOUT), torch.tensor([0, 1])
    for wrong in (pages.to(torch.int8), pages[..., :-2].contiguous(), pages[..., ::2], pages[0]):
        with pytest.raises(ValueError, match="pages are"):
            PROVIDER.store(vectors(2), vectors(2, 1), wrong, slots, codec)


def attend(pages: torch.Tensor, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 4, 64),
        "block_table": torch.tensor([[0, 1]], dtype=torch.int32),
        "seq_lens": torch.tensor([20], dtype=torch.int32),
        "scaling": 0.1,
        **changes,
    }
    query, table, lengths = (arguments.pop(name) for name in ("query", "block_table", "seq_lens"))
    return PROVIDER.attend(query, pages, table, lengths, CacheCodec.create(LAYOUT), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(1, 3, 64)}, "multiple of 2"),
        ({"query": torch.zeros(1, 4, 32)}, "head_dim = 64"),
        ({"seq_lens": torch.tensor([33], dtype=torch.int32)}, "33 tokens"),
        ({"seq_lens": torch.tensor([], dtype=torch.int32)}, "seq_lens"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int32)}, "block_table"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"sinks": torch.zeros(3)}, "q_heads = 4"),
        ({"out": torch.zeros(1, 4, 32)}, "out is"),
        ({"query_start_loc": torch.tensor([0, 2])}, "query_start_loc"),
    ],
)
def test_attend(pages: torch.Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(pages, **changes)


def test_gather_beyond_the_block_table(pages: torch.Tensor) -> None:
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"5\.\.33"):
        PROVIDER.gather(pages, table, CacheCodec.create(LAYOUT), start=5, stop=33, dtype=torch.float32)


def test_another_layout_version_is_refused() -> None:
    newer = PageLayout(replace(LAYOUT.key, version=2), replace(LAYOUT.value, version=2), page_size=16, kv_heads=2)
    reason = PROVIDER.unsupported_reason(KernelRequest(newer, torch.device("cpu"), torch.float32))
    assert reason == "layout version 2, this provider implements 1"
    with pytest.raises(LayoutError, match="version 2"):
        PageLayout(replace(LAYOUT.key, version=2), LAYOUT.value, page_size=16, kv_heads=2)
    row = torch.zeros(1, 64, dtype=torch.uint8)
    for use in (Codec.create, lambda layout: pack_codes(row, layout), lambda layout: unpack_codes(row[:, :32], layout)):
        with pytest.raises(LayoutError, match="layout version is 2; this release reads and writes 1"):
            use(newer.key)


@pytest.mark.parametrize("option", [{"softcap": 2.0}, {"sinks": torch.zeros(4)}])
def test_centred_keys_refuse_what_sees_the_shift(pages: torch.Tensor, option: dict[str, Any]) -> None:
    codec = CacheCodec.create(LAYOUT, center=torch.zeros(2, 64))
    table, lengths = torch.tensor([[0]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match=next(iter(option))):
        PROVIDER.attend(torch.zeros(1, 4, 64), pages, table, lengths, codec, scaling=0.1, **option)


@pytest.mark.parametrize("bits", [(4,), (4, 3, 2), "44", [4, "3"]])
def test_bits_of_a_cache(bits: Any) -> None:
    with pytest.raises(LayoutError, match="bits is"):
        TurboQuantKVCache(1, 2, 64, bits)


def test_numbers_of_numpy_and_lists_are_taken() -> None:
    cache = TurboQuantKVCache(1, 2, 64, [np.int64(4), np.float64(2.5)])
    assert (cache.layout.key.bits, cache.layout.value.bits) == (4, 2.5)


@pytest.mark.parametrize("q_len", [0, 1])
def test_a_step_without_queries_has_no_output(q_len: int) -> None:
    cache = TurboQuantKVCache(1, 2, 64, 4)
    cache.append(torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64))
    assert cache.attend(torch.randn(1, 4, q_len, 64)).out.shape == (1, 4, q_len, 64)


@pytest.mark.parametrize("name", ["query", "pages", "block_table", "seq_lens", "query_start_loc", "seq_starts", "out"])
def test_attend_names_what_is_on_another_device(pages: torch.Tensor, name: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 4, 64),
        "pages": pages,
        "block_table": torch.tensor([[0]]),
        "seq_lens": torch.tensor([1]),
        "query_start_loc": torch.tensor([0, 1]),
        "seq_starts": torch.tensor([0]),
        "out": torch.zeros(1, 4, 64),
    }
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        PROVIDER.attend(**arguments, codec=CacheCodec.create(LAYOUT), scaling=0.1)


@pytest.mark.parametrize("name", ["key", "value", "pages", "slot_mapping"])
def test_store_names_what_is_on_another_device(pages: torch.Tensor, name: str) -> None:
    arguments = {"key": vectors(1), "value": vectors(1), "pages": pages, "slot_mapping": torch.tensor([3])}
    before = pages.clone()
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        PROVIDER.store(**arguments, codec=CacheCodec.create(LAYOUT))
    assert torch.equal(pages, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(1, 4, 64, dtype=torch.int32)}, "query is torch.int32; it must be a floating-point"),
        ({"query": torch.ones(1, 0, 64)}, r"q_heads \(a multiple of 2\)"),
        ({"block_table": torch.tensor([[4]])}, "block_table names pages 4 to 4 .* 0 to 3"),
        ({"block_table": torch.tensor([[-1]])}, "block_table names pages -1 to -1"),
        ({"block_table": torch.tensor([[0.0]])}, "block_table is torch.float32; it must hold integers"),
        ({"seq_lens": torch.tensor([True])}, "seq_lens is torch.bool"),
        ({"seq_lens": torch.tensor([-3])}, "a sequence has -3 tokens"),
        ({"seq_starts": torch.tensor([0, 0])}, r"seq_starts has shape \(2,\); it must be \[batch = 1\]"),
    ],
)
def test_what_attend_reads_is_checked(pages: torch.Tensor, changes: dict[str, Any], message: str) -> None:
    arguments = {"query": torch.zeros(1, 4, 64), "block_table": torch.tensor([[0]]), "seq_lens": torch.tensor([1])}
    with pytest.raises(ValueError, match=message):
        PROVIDER.attend(pages=pages, codec=CacheCodec.create(LAYOUT), scaling=0.1, **(arguments | changes))


ATTENDED = ["query", "pages", "block_table", "seq_lens", "query_start_loc", "seq_starts", "sinks", "out"]


@pytest.mark.parametrize("name", ATTENDED)
def test_attend_wants_tensors(pages: torch.Tensor, name: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 4, 64),
        "pages": pages,
        "block_table": torch.tensor([[0]]),
        "seq_lens": torch.tensor([1]),
        name: [0],
    }
    with pytest.raises(ValueError, match=rf"{name} is a list; it must be a torch\.Tensor"):
        PROVIDER.attend(**arguments, codec=CacheCodec.create(LAYOUT), scaling=0.1)


@pytest.mark.parametrize("name", ["key", "value", "pages", "slot_mapping"])
def test_store_wants_tensors(pages: torch.Tensor, name: str) -> None:
    arguments: dict[str, Any] = {"key": vectors(1), "value": vectors(1), "pages": pages, "slot_mapping": torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"{name} is a list; it must be a torch\.Tensor"):
        PROVIDER.store(**{**arguments, name: [0]}, codec=CacheCodec.create(LAYOUT))


def test_requests_take_names_of_devices() -> None:
    request = KernelRequest(LAYOUT, "cpu", torch.float32)  # type: ignore[arg-type]
    assert request == KernelRequest(LAYOUT, torch.device("cpu"), torch.float32)
    assert PROVIDER.unsupported_reason(request) is None
    assert select_provider(request, "reference").name == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "dtype is 'float32'; it must be a torch.dtype"),
        ({"group_size": 0}, "group_size is 0; it must be an integer of at least 1"),
        ({"group_size": 4.0}, r"group_size is 4\.0; it must be an integer of at least 1"),
    ],
)
def test_requests(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"layout": LAYOUT, "device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        KernelRequest(**arguments | change)


@pytest.mark.parametrize("slots", [torch.tensor([True]), torch.tensor(3), torch.tensor([0.0])])
def test_slots_of_another_kind(pages: torch.Tensor, slots: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="slot_mapping"):
        PROVIDER.store(vectors(1), vectors(1), pages, slots, CacheCodec.create(LAYOUT))


def test_gather_wants_a_table_of_pages_that_exist(pages: torch.Tensor) -> None:
    for table in (torch.tensor([0]), torch.tensor([[9]])):
        with pytest.raises(ValueError, match="block_table"):
            PROVIDER.gather(pages, table, CacheCodec.create(LAYOUT), start=0, stop=3, dtype=torch.float32)
