"""Sizes of pages, and which layer a name means."""

from __future__ import annotations

import pytest

from turboquant_core import LayoutError
from turboquant_vllm.options import LayerBits
from turboquant_vllm.packing import LayerShape, layer_index

WIDE = LayerShape(kv_heads=8, head_dim=128, itemsize=2)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.3.self_attn.attn", 3),
        ("language_model.model.layers.27.self_attn.attn", 27),
        ("layers.11.attn", 11),
        ("transformer.h.5.attn", 5),
        ("attn", None),
        ("model.layers2.attn", None),
    ],
)
def test_layer_index(name: str, index: int | None) -> None:
    assert layer_index(name) == index


@pytest.mark.parametrize(
    ("bits", "token_bytes"),
    [
        (LayerBits(4, 4), 132),
        (LayerBits(3.5, 3.5), 116),
        (LayerBits(4, 3), 116),
        (LayerBits(3, 3), 100),
        (LayerBits(2, 2), 68),
        (LayerBits(4, "raw"), 64 + 2 + 256),
    ],
)
def test_token_bytes(bits: LayerBits, token_bytes: int) -> None:
    assert WIDE.token_bytes(bits) == token_bytes
    assert WIDE.page_layout(bits, 64).page_bytes == 8 * 64 * token_bytes


@pytest.mark.parametrize(("bits", "gain"), [(4, 3.75), (3, 5.0), (2, 7.3)])
def test_the_capacity_that_is_promised(bits: int, gain: float) -> None:
    assert WIDE.uncompressed_token_bytes / WIDE.token_bytes(LayerBits(bits, bits)) >= gain


def test_a_page_that_cannot_be_packed() -> None:
    with pytest.raises(LayoutError, match="head_dim is 100"):
        LayerShape(1, 100, 2).page_layout(LayerBits())
