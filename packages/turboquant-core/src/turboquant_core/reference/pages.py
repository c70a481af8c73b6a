"""Views of a page's fields, and the two operations that move vectors in and out of pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_device, check_integers, check_pages_used
from ..codec import CacheCodec, Codec
from ..layout import PageLayout
from ..provider import Gathered, Packed
from .vectors import decode, decode_rotated, encode


def field_views(pages: Tensor, layout: PageLayout) -> tuple[Packed, Packed]:
    """Key and value fields of all pages, sharing their storage.

    Returns:
        Two :class:`Packed`: codes uint8 ``[num_pages, kv_heads, page_size, code_bytes]`` and scales fp16
        ``[num_pages, kv_heads, page_size]`` (no elements for raw values).

    Raises:
        ValueError: ``pages`` is not uint8 of ``layout.pages_shape(num_pages)``, or not contiguous.
    """
    check_pages(pages, layout)
    value, key_scale, value_scale = layout.value_offset, layout.key_scale_offset, layout.value_scale_offset
    key_codes = pages[..., :value].unflatten(-1, (layout.page_size, layout.key.code_bytes))
    value_codes = pages[..., value:key_scale].unflatten(-1, (layout.page_size, layout.value.code_bytes))
    key_scales = pages[..., key_scale:value_scale].view(torch.float16)
    value_scales = pages[..., value_scale : layout.exact_key_offset].view(torch.float16)
    return Packed(key_codes, key_scales), Packed(value_codes, value_scales)


def check_pages(pages: Tensor, layout: PageLayout) -> None:
    """Raise ``ValueError`` unless ``pages`` is contiguous uint8 ``layout.pages_shape(num_pages)``."""
    expected = layout.pages_shape(pages.shape[0] if pages.dim() else 0)
    if pages.dtype != torch.uint8 or tuple(pages.shape) != expected or not pages.is_contiguous():
        raise ValueError(
            f"pages are {pages.dtype} {tuple(pages.shape)}, contiguous={pages.is_contiguous()}; the layout needs "
            f"contiguous torch.uint8 {expected}"
        )


def store(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
    """Reference of :meth:`KernelProvider.store`."""
    layout = codec.layout
    check_device(codec.key.device, "the codec", key=key, value=value, pages=pages, slot_mapping=slot_mapping)
    key_fields, value_fields = field_views(pages, layout)
    _check_store(key, value, pages, slot_mapping, layout)
    keep = slot_mapping >= 0
    slots = slot_mapping[keep].long()
    page, offset = slots // layout.page_size, slots % layout.page_size
    packed_key = encode(key[keep], codec.key, "key")
    packed_value = _encode_value(value[keep], codec)
    key_fields.codes[page, :, offset] = packed_key.codes
    key_fields.scales[page, :, offset] = packed_key.scales
    value_fields.codes[page, :, offset] = packed_value.codes
    if codec.value is not None:
        value_fields.scales[page, :, offset] = packed_value.scales


def _encode_value(value: Tensor, codec: CacheCodec) -> Packed:
    if codec.value is not None:
        return encode(value, codec.value, "value")
    if value.element_size() * value.shape[-1] != codec.layout.value.code_bytes:
        raise ValueError(f"value is {value.dtype}; the raw layout stores {codec.layout.value}")
    return Packed(value.contiguous().view(torch.uint8), torch.empty(0, dtype=torch.float16, device=value.device))


def _check_store(key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, layout: PageLayout) -> None:
    check_integers(slot_mapping=slots)
    if slots.dim() != 1:
        raise ValueError(f"slot_mapping has shape {tuple(slots.shape)}; it must be [tokens]")
    tokens = slots.shape[0]
    for name, tensor, head_dim in (("key", key, layout.key.head_dim), ("value", value, layout.value.head_dim)):
        if tuple(tensor.shape) != (tokens, layout.kv_heads, head_dim):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; slot_mapping and layout need "
                f"{(tokens, layout.kv_heads, head_dim)}"
            )
    limit = pages.shape[0] * layout.page_size
    if tokens and not (int(slots.min()) >= -1 and int(slots.max()) < limit):
        raise ValueError(
            f"slot_mapping holds slots {int(slots.min())} to {int(slots.max())}; these pages have slots 0 to "
            f"{limit - 1} and -1 for a skipped token"
        )


def gather(
    pages: Tensor,
    block_table: Tensor,
    codec: CacheCodec,
    *,
    start: int,
    stop: int,
    dtype: torch.dtype,
    rotated: bool,
    raw_dtype: torch.dtype | None = None,
) -> Gathered:
    """Reference of :meth:`KernelProvider.gather`; raw values were stored as ``raw_dtype`` (None: as ``dtype``)."""
    check_device(codec.key.device, "the codec", pages=pages, block_table=block_table)
    key_fields, value_fields = field_views(pages, codec.layout)
    check_integers(block_table=block_table)
    if block_table.dim() != 2:
        raise ValueError(f"block_table has shape {tuple(block_table.shape)}; it must be [batch, max_pages]")
    limit = block_table.shape[1] * codec.layout.page_size
    if not 0 <= start <= stop <= limit:
        raise ValueError(f"token range {start}..{stop} does not lie in the 0..{limit} tokens of the block table")
    positions = torch.arange(start, stop, device=pages.device)
    page = block_table[:, positions // codec.layout.page_size].long()
    check_pages_used(page, pages.shape[0])
    offset = (positions % codec.layout.page_size).expand_as(page)
    keys = Packed(key_fields.codes[page, :, offset], key_fields.scales[page, :, offset])
    values = value_fields.codes[page, :, offset]
    if codec.value is None:
        decoded = values.view(_raw_dtype(raw_dtype or dtype, codec.layout)).to(dtype)
    else:
        decoded = _decode(Packed(values, value_fields.scales[page, :, offset]), codec.value, dtype, rotated)
    return Gathered(_decode(keys, codec.key, dtype, rotated).transpose(1, 2), decoded.transpose(1, 2))


def _decode(packed: Packed, codec: Codec, dtype: torch.dtype, rotated: bool) -> Tensor:
    return decode_rotated(packed, codec).to(dtype) if rotated else decode(packed, codec, dtype)


def _raw_dtype(dtype: torch.dtype, layout: PageLayout) -> torch.dtype:
    itemsize = layout.value.code_bytes // layout.value.head_dim
    if itemsize != dtype.itemsize:
        raise ValueError(f"raw values have {itemsize} bytes a coordinate; they cannot be read as {dtype}")
    return dtype
