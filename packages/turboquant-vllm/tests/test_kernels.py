"""Codecs made while vLLM builds a model are those made anywhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from turboquant_core import CacheCodec
from turboquant_vllm.kernels import outside_pools, own_codec
from turboquant_vllm.options import LayerBits
from turboquant_vllm.packing import LayerShape

CPU = torch.device("cpu")


@pytest.fixture
def building() -> Iterator[None]:
    """The default dtype and device under which vLLM builds a model."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_and_device_do_not_matter(building: None) -> None:
    layout = LayerShape(kv_heads=2, head_dim=64, itemsize=2).page_layout(LayerBits(4, 3))
    codec = own_codec(layout, 42, "unbiased", "least_squares", CPU, None)
    assert torch.get_default_dtype() == torch.bfloat16
    torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        expected = CacheCodec.create(layout, seed=42, key_scale="unbiased", value_scale="least_squares")
    for one, other in ((codec.key, expected.key), (codec.value, expected.value)):
        assert one is not None
        assert other is not None
        assert torch.equal(one.levels, other.levels)
        assert torch.equal(one.boundaries, other.boundaries)
        assert torch.equal(one.signs, other.signs)


def test_an_error_leaves_the_default_dtype_as_it_was(building: None) -> None:
    with pytest.raises(ZeroDivisionError):
        outside_pools(CPU, lambda: 1 / 0)
    assert torch.get_default_dtype() == torch.bfloat16
