"""What the kernels support, answered before any of them is imported."""

from __future__ import annotations

import importlib.util
import os

import torch

from turboquant_core import LAYOUT_VERSION, KernelRequest, PageLayout, RawLayout, VectorLayout
from turboquant_core.exact import exact_rows_reason

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 16


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (``TRITON_INTERPRET=1``, read when Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def head_dim_multiple(vector: VectorLayout | RawLayout) -> int:
    """What head_dim must be a multiple of: each part of a code row is whole 16-bit words."""
    mixed = isinstance(vector, VectorLayout) and vector.is_mixed
    return 2 * _HEAD_DIM_MULTIPLE if mixed else _HEAD_DIM_MULTIPLE


def _layout_reason(layout: PageLayout) -> str | None:
    if layout.version != LAYOUT_VERSION:
        return f"layout version {layout.version}, this provider implements {LAYOUT_VERSION}"
    for vector in (layout.key, layout.value):
        multiple = head_dim_multiple(vector)
        if vector.head_dim > LARGEST_HEAD_DIM or vector.head_dim % multiple:
            bits = f" at {vector.bits} bits" if isinstance(vector, VectorLayout) and vector.is_mixed else ""
            return f"head_dim is {vector.head_dim}, needs a multiple of {multiple} up to {LARGEST_HEAD_DIM}{bits}"
    return None


def _device_reason(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with the GPU builds of torch"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"device is {device}, needs cuda (or TRITON_INTERPRET=1 for a slow check on the CPU)"


def unsupported_reason(request: KernelRequest) -> str | None:
    """See :meth:`turboquant_core.KernelProvider.unsupported_reason`."""
    reason = _device_reason(request.device) or _layout_reason(request.layout)
    if reason is not None:
        return reason
    if request.dtype not in _DTYPES:
        return f"dtype is {request.dtype}, needs one of {', '.join(map(str, _DTYPES))}"
    if request.dtype == torch.bfloat16 and interpreting():
        return "dtype is torch.bfloat16, which Triton's interpreter multiplies as raw bits; use torch.float16 there"
    value = request.layout.value
    if isinstance(value, RawLayout) and value.itemsize != request.dtype.itemsize:
        return f"raw values have {value.itemsize} bytes a coordinate, {request.dtype} has {request.dtype.itemsize}"
    return exact_rows_reason(request)


def permute_supported(layout: PageLayout, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention takes the byte-permute form.

    An NVIDIA GPU from sm_80, keys of the ``int8`` form, values of the ``cubic`` form or 16-bit values of the query's
    dtype.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if isinstance(layout.value, RawLayout):
        return layout.key.form == "int8" and layout.value.itemsize == dtype.itemsize == 2
    return layout.key.form == "int8" and layout.value.form == "cubic"


def single_warps_supported(layout: PageLayout, n: int) -> bool:
    """Whether single warps can attend with ``n`` query vectors each: codes of one width whose rows fill operands."""
    return n <= 16 and all(_fills_operands(vector) for vector in (layout.key, layout.value))


def _fills_operands(vector: VectorLayout | RawLayout) -> bool:
    if isinstance(vector, RawLayout) or vector.is_mixed:
        return False
    return vector.head_dim in (128, 256) or (vector.head_dim == 64 and vector.bits == 4)
