"""A codec as arguments that a custom operator can take: integers and tensors, and back.

Operators take no Python objects. A layout becomes a list of integers, whose objects are rebuilt once; a codec becomes
the list of its tensors, in the order signs, levels, boundaries and, where there is one, centre.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from .codec import CacheCodec, Codec
from .layout import FORMS, ExactRows, PageLayout, RawLayout, VectorLayout
from .scale import SCALE_RULES

_RAW = -1


def vector_integers(codec: Codec) -> list[int]:
    """Layout and scale rule of a codec: head_dim, half bits, form, layout version, scale rule."""
    layout = codec.layout
    rule = SCALE_RULES.index(codec.scale_rule)
    return [layout.head_dim, int(2 * layout.bits), FORMS.index(layout.form), layout.version, rule]


def cache_integers(codec: CacheCodec) -> list[int]:
    """Layout and scale rules of a cache's codecs: page size and KV heads, then keys, values and exact rows."""
    layout, key = codec.layout, vector_integers(codec.key)
    if isinstance(layout.value, RawLayout):
        value = [layout.value.head_dim, _RAW, layout.value.itemsize, layout.value.version, _RAW]
    else:
        assert codec.value is not None
        value = vector_integers(codec.value)
    exact = [layout.exact.first, layout.exact.ring, layout.exact.itemsize]
    return [layout.page_size, layout.kv_heads, *key, *value, *exact]


def codec_tensors(codec: Codec | None) -> list[Tensor]:
    """Tensors of a codec; none for values in full precision."""
    if codec is None:
        return []
    tensors = [codec.signs, codec.levels, codec.boundaries]
    return tensors if codec.center is None else [*tensors, codec.center]


@lru_cache(maxsize=256)
def vector_layout(integers: tuple[int, ...]) -> VectorLayout | RawLayout:
    """The layout that :func:`vector_integers` or :func:`cache_integers` wrote."""
    head_dim, half_bits, form, version, _ = integers
    if half_bits == _RAW:
        return RawLayout(head_dim, form, version)
    bits: Any = half_bits / 2 if half_bits % 2 else half_bits // 2
    return VectorLayout(head_dim, bits, FORMS[form], version)


@lru_cache(maxsize=256)
def page_layout(integers: tuple[int, ...]) -> PageLayout:
    """The page layout that :func:`cache_integers` wrote."""
    page_size, kv_heads = integers[:2]
    key = vector_layout(integers[2:7])
    assert isinstance(key, VectorLayout)
    return PageLayout(key, vector_layout(integers[7:12]), page_size, kv_heads, ExactRows(*integers[12:]))


def rebuild_codec(tensors: list[Tensor], integers: list[int]) -> Codec:
    """Inverse of :func:`codec_tensors` and :func:`vector_integers`."""
    layout = vector_layout(tuple(integers))
    assert isinstance(layout, VectorLayout)
    rule: Any = SCALE_RULES[integers[4]]
    return Codec(layout, tensors[0], tensors[1], tensors[2], rule, tensors[3] if len(tensors) == 4 else None)


def rebuild_cache_codec(key: list[Tensor], value: list[Tensor], integers: list[int]) -> CacheCodec:
    """Inverse of :func:`codec_tensors` of both halves and :func:`cache_integers`."""
    values = rebuild_codec(value, integers[7:12]) if value else None
    return CacheCodec(page_layout(tuple(integers)), rebuild_codec(key, integers[2:7]), values)
