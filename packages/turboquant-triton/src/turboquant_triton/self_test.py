"""A small attention on the device, compared with the reference, before the byte-permute form is trusted.

Its unpacking relies on the register order of Triton's dot operands. A Triton release that changed it would give wrong
numbers without an error; here it is refused by name.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
import triton

from turboquant_core import CacheCodec, PackedSequences, PageLayout, ReferenceProvider, VectorLayout

# The second is left to the kernel that single warps do not take part in.
_HEAD_DIMS = (128, 96)
_TOKENS = 96
_TOLERANCE = 0.05
"""Int8 queries and fp16 weights stay far below; a wrong register order gives an error near 1."""


def _relative_error(bits: float, head_dim: int, device: torch.device) -> float:
    from .attend import AttendOptions, attend

    layout = PageLayout(VectorLayout(head_dim, bits, "int8"), VectorLayout(head_dim, bits, "cubic"), 64, 1)
    store = PackedSequences(1, CacheCodec.create(layout), ReferenceProvider(), torch.float32)
    generator = torch.Generator().manual_seed(int(2 * bits))
    store.append(*torch.randn(2, 1, 1, _TOKENS, head_dim, generator=generator))
    query = torch.randn(1, 2, head_dim, generator=generator).half()
    past = store.past()
    lengths = torch.tensor([_TOKENS], dtype=torch.int32)
    expected = past.provider.attend(query, past.pages, past.block_table, lengths, past.codec, scaling=0.05).out
    got = attend(
        query.to(device),
        past.pages.to(device),
        past.block_table.to(device),
        lengths.to(device),
        past.codec.to(device),
        AttendOptions(0.05, None, None),
        query_start_loc=None,
        seq_starts=None,
        sinks=None,
        out=None,
        workspace=None,
        permute=True,
    ).out.cpu()
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@lru_cache(maxsize=16)
def self_test_reason(device: torch.device, mixed: bool) -> str | None:
    """None when every width agrees with the reference on ``device``; else what to do. Runs once per device.

    ``mixed`` asks for the widths two of which make up fractional bits as well.
    """
    for head_dim, bits in product(_HEAD_DIMS, (2, 2.5, 3, 3.5, 4) if mixed else (2, 3, 4)):
        error = _relative_error(bits, head_dim, device)
        if not error <= _TOLERANCE:
            return (
                f"{bits}-bit attention fails its self-test on {torch.cuda.get_device_name(device)} with Triton "
                f"{triton.__version__} (relative error {error:.3g}): register layouts differ from those assumed; use "
                "TritonProvider(portable=True), or another Triton release"
            )
    return None
