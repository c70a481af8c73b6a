"""Checks of the arguments of ``store``."""

from __future__ import annotations

from torch import Tensor

from turboquant_core import CacheCodec, PageLayout, VectorLayout
from turboquant_core.reference.pages import check_pages

from .checks import check_same_device
from .launch import check_packable


def check_store(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
    """Raise ``ValueError`` unless the arguments of ``store`` fit the layout and lie on the pages' device.

    The range of the slots is checked on the CPU only: on a GPU the host would have to wait for them.
    """
    layout = codec.layout
    check_pages(pages, layout)
    check_same_device(
        pages.device, key=key, value=value, slot_mapping=slot_mapping, **{"the codec's signs": codec.key.signs}
    )
    for vector in (layout.key, layout.value):
        if isinstance(vector, VectorLayout):
            check_packable(vector)
    _check_vectors(key, value, slot_mapping, layout)
    if codec.value is None and value.element_size() * value.shape[-1] != layout.value.code_bytes:
        raise ValueError(f"value is {value.dtype}; the raw layout stores {layout.value}")
    if pages.device.type == "cpu":
        _check_range(slot_mapping, pages.shape[0] * layout.page_size)


def _check_vectors(key: Tensor, value: Tensor, slot_mapping: Tensor, layout: PageLayout) -> None:
    if slot_mapping.dim() != 1 or slot_mapping.is_floating_point():
        raise ValueError(
            f"slot_mapping is {slot_mapping.dtype} {tuple(slot_mapping.shape)}; it must be an integer vector"
        )
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
