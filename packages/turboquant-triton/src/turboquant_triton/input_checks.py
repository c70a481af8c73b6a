"""Checks of the arguments of store, gather, decode and scores that need no value from the device."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core import CacheCodec, Codec, Packed, PageLayout, RawLayout, VectorLayout
from turboquant_core.arguments import check_device, check_integers
from turboquant_core.reference.pages import check_pages
from turboquant_core.reference.vectors import check_packed

from .launch import check_packable


def check_store(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
    """Raise ``ValueError`` unless the arguments of ``store`` fit the layout and lie on the pages' device.

    The range of the slots is checked on the CPU only: on a GPU the host would have to wait for them.
    """
    layout = codec.layout
    check_pages(pages, layout)
    check_device(pages.device, "the pages", key=key, value=value, slot_mapping=slot_mapping)
    check_device(codec.key.device, "the codec", pages=pages)
    _check_layout(layout)
    _check_vectors(key, value, slot_mapping, layout)
    if codec.value is None and value.element_size() * value.shape[-1] != layout.value.code_bytes:
        raise ValueError(f"value is {value.dtype}; the raw layout stores {layout.value}")
    if pages.device.type == "cpu":
        _check_range(slot_mapping, pages.shape[0] * layout.page_size)


def check_gather(
    pages: Tensor, block_table: Tensor, codec: CacheCodec, start: int, stop: int, dtype: torch.dtype
) -> None:
    """Raise ``ValueError`` unless the arguments of ``gather`` fit the layout and lie on the pages' device."""
    layout = codec.layout
    check_pages(pages, layout)
    _check_layout(layout)
    check_device(codec.key.device, "the codec", pages=pages, block_table=block_table)
    check_integers(block_table=block_table)
    if block_table.dim() != 2:
        raise ValueError(f"block_table has shape {tuple(block_table.shape)}; it must be [batch, max_pages]")
    limit = block_table.shape[1] * layout.page_size
    if not 0 <= start <= stop <= limit:
        raise ValueError(f"token range {start}..{stop} does not lie in the 0..{limit} tokens of the block table")
    if isinstance(layout.value, RawLayout) and layout.value.itemsize != dtype.itemsize:
        raise ValueError(f"raw values have {layout.value.itemsize} bytes a coordinate; they cannot be read as {dtype}")


def check_codes(packed: Packed, codec: Codec) -> None:
    """Raise ``ValueError`` unless codes and scales are ``codec``'s and lie on its device."""
    check_packed(packed, codec)
    check_packable(codec.layout)
    if packed.codes.dtype != torch.uint8 or packed.codes.shape[-1] != codec.layout.code_bytes:
        raise ValueError(
            f"codes are {packed.codes.dtype} {tuple(packed.codes.shape)}; the layout needs torch.uint8 "
            f"[..., code_bytes = {codec.layout.code_bytes}]"
        )


def _check_layout(layout: PageLayout) -> None:
    for vector in (layout.key, layout.value):
        if isinstance(vector, VectorLayout):
            check_packable(vector)


def _check_vectors(key: Tensor, value: Tensor, slot_mapping: Tensor, layout: PageLayout) -> None:
    check_integers(slot_mapping=slot_mapping)
    if slot_mapping.dim() != 1:
        raise ValueError(f"slot_mapping has shape {tuple(slot_mapping.shape)}; it must be [tokens]")
    for name, x, head_dim in (("key", key, layout.key.head_dim), ("value", value, layout.value.head_dim)):
        expected = (slot_mapping.shape[0], layout.kv_heads, head_dim)
        if tuple(x.shape) != expected or not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; slot_mapping and layout need floating-point {expected}"
            )


def _check_range(slot_mapping: Tensor, slots: int) -> None:
    if slot_mapping.numel() and not (int(slot_mapping.min()) >= -1 and int(slot_mapping.max()) < slots):
        raise ValueError(
            f"slot_mapping holds slots {int(slot_mapping.min())} to {int(slot_mapping.max())}; these pages have slots "
            f"0 to {slots - 1} and -1 for a skipped token"
        )
