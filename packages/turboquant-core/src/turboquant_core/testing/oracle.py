"""float64 definitions that share no arithmetic with the reference: dense rotation, explicit loops, no fp32."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codec import CacheCodec, Codec
from ..packing import unpack_codes
from ..provider import Packed
from ..rotation import rotation_matrix

Float64 = NDArray[np.float64]


def relative_error(got: Tensor, expected: Float64) -> float:
    """``|got - expected| / |expected|`` in float64; infinity when ``got`` holds a NaN."""
    actual = got.detach().to("cpu", torch.float64).numpy()
    error = float(np.linalg.norm(actual - expected))
    return float("inf") if np.isnan(error) else error / max(float(np.linalg.norm(expected)), 1e-30)


def decode_oracle(packed: Packed, codec: Codec, *, centered: bool = False) -> Float64:
    """Decoded vectors ``[..., head_dim]``; ``centered=True`` does not add the centre back."""
    codes = unpack_codes(packed.codes.cpu(), codec.layout).numpy()
    halves = zip(codec.tables, np.split(codes, len(codec.tables), axis=-1), strict=True)
    levels = np.concatenate([table.cpu().double().numpy()[own] for (table, _), own in halves], axis=-1)
    rotated = levels * packed.scales.cpu().double().numpy()[..., None]
    # z = M x with M orthonormal, so rows times M is the inverse.
    decoded = rotated @ rotation_matrix(codec.signs.cpu()).double().numpy()
    if codec.center is not None and not centered:
        decoded = decoded + codec.center.cpu().double().numpy()
    return np.asarray(decoded)


def page_vectors(pages: Tensor, codec: CacheCodec, dtype: torch.dtype) -> tuple[Float64, Float64]:
    """Keys and values of every slot, ``[num_pages, kv_heads, page_size, head_dim]``, sliced byte by byte."""
    layout, raw = codec.layout, pages.cpu()
    lead = (raw.shape[0], layout.kv_heads, layout.page_size)

    def field(start: int, width: int) -> Tensor:
        return raw[..., start : start + width * layout.page_size].reshape(*lead, width)

    def scales(start: int) -> Tensor:
        return field(start, 2).contiguous().view(torch.float16).squeeze(-1)

    keys = decode_oracle(
        Packed(field(0, layout.key.code_bytes), scales(layout.key_scale_offset)), codec.key, centered=True
    )
    codes = field(layout.value_offset, layout.value.code_bytes)
    if codec.value is None:
        return keys, codes.contiguous().view(dtype).double().numpy()
    return keys, decode_oracle(Packed(codes, scales(layout.value_scale_offset)), codec.value)


def attention_oracle(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: list[int],
    q_lens: list[int],
    codec: CacheCodec,
    *,
    scaling: float,
    seq_starts: list[int] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Float64, Float64]:
    """Attention over packed pages in float64: out ``[tokens, q_heads, value_head_dim]``, lse ``[tokens, q_heads]``."""
    keys, values = page_vectors(pages, codec, query.dtype)
    q = query.detach().cpu().double().numpy()
    group = q.shape[1] // codec.layout.kv_heads
    out = np.zeros((*q.shape[:2], values.shape[-1]))
    lse = np.full(q.shape[:2], -np.inf)
    token = 0
    for row, (seq_len, q_len) in enumerate(zip(seq_lens, q_lens, strict=True)):
        for i in range(q_len if seq_len else 0):
            position = seq_len - q_len + i
            first = max(seq_starts[row] if seq_starts else 0, 0 if window is None else position - window + 1)
            where = np.arange(first, position + 1)
            page = block_table.cpu().numpy()[row][where // codec.layout.page_size]
            for head in range(q.shape[1]):
                sink = None if sinks is None else float(sinks[head])
                k = keys[page, head // group, where % codec.layout.page_size]
                v = values[page, head // group, where % codec.layout.page_size]
                out[token + i, head], lse[token + i, head] = attend_one_query(
                    q[token + i, head], k, v, scaling, softcap, sink
                )
        token += q_len
    return out, lse


def attend_one_query(
    q: Float64, k: Float64, v: Float64, scaling: float, softcap: float | None, sink: float | None
) -> tuple[Float64, float]:
    """Output ``[value_head_dim]`` and log-sum-exp of one query ``[head_dim]`` over keys and values ``[n, d]``."""
    scores = scaling * (k @ q)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    logits = scores if sink is None else np.append(scores, sink)
    if logits.size == 0:
        return np.zeros(v.shape[-1]), -np.inf
    lse = float(logits.max() + np.log(np.exp(logits - logits.max()).sum()))
    return np.asarray(np.exp(scores - lse) @ v), lse
