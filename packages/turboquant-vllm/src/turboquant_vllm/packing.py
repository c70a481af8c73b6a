"""From options and a layer's shape to its pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from turboquant_core import PageLayout, RawLayout, VectorLayout
from turboquant_core.layout import PAGE_SIZE_MULTIPLE, ExactRows

from .widths import LayerBits

_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def layer_index(layer_name: str) -> int | None:
    """Index in a name such as ``model.layers.3.self_attn.attn``; None when the name has none."""
    found = _LAYER_INDEX.search(layer_name)
    return int(found.group(1)) if found else None


def layer_count(vllm_config: Any) -> int:
    """Layers of the model, draft model not counted."""
    return int(vllm_config.model_config.hf_text_config.num_hidden_layers)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the pages of a layer depend on, this rank's heads only.

    Attributes:
        kv_heads: KV heads.
        head_dim: coordinates of a key and of a value.
        itemsize: bytes of a coordinate in the model's dtype.
    """

    kv_heads: int
    head_dim: int
    itemsize: int

    def page_layout(
        self,
        bits: LayerBits,
        page_size: int = PAGE_SIZE_MULTIPLE,
        exact: ExactRows = ExactRows(),  # noqa: B008 (immutable)
    ) -> PageLayout:
        """Layout of a page of ``page_size`` tokens, some of them in full precision too.

        Raises:
            LayoutError: head_dim or page_size cannot be packed.
        """
        value: VectorLayout | RawLayout
        if isinstance(bits.v_bits, str):
            value = RawLayout(self.head_dim, self.itemsize)
        else:
            value = VectorLayout(self.head_dim, bits.v_bits, "cubic")
        return PageLayout(VectorLayout(self.head_dim, bits.k_bits, "int8"), value, page_size, self.kv_heads, exact)

    def token_bytes(self, bits: LayerBits) -> int:
        """Bytes of one token and KV head: keys, values and scales."""
        return self.page_layout(bits).token_bytes

    @property
    def uncompressed_token_bytes(self) -> int:
        """The same in the model's dtype."""
        return 2 * self.head_dim * self.itemsize
