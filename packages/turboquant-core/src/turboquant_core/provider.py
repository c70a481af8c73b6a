"""What a kernel provider offers, and the small records that pass through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .codec import CacheCodec, Codec
from .integers import integer
from .layout import PageLayout


class Packed(NamedTuple):
    """Packed vectors outside pages: ``codes`` uint8 ``[..., code_bytes]``, ``scales`` fp16 ``[...]``."""

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """True bytes: codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


class Attended(NamedTuple):
    """Attention result: ``out`` ``[tokens, q_heads, value_head_dim]`` in the query's dtype and ``lse`` float32
    ``[tokens, q_heads]``, the natural logarithm of the softmax denominator (attention sinks included), ``-inf``
    where it has no term: a query that sees no key, without a sink.
    """

    out: Tensor
    lse: Tensor


class Gathered(NamedTuple):
    """Keys ``[batch, kv_heads, length, head_dim]`` and values ``[batch, kv_heads, length, value_head_dim]``."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """What a layer or cache needs from a provider for its lifetime.

    Attributes:
        layout: the pages it keeps (bits, head_dims, page size, layout version).
        device: where the pages live; a name such as ``"cuda:0"`` becomes a ``torch.device``.
        dtype: of queries, keys and values.
        group_size: query heads per KV head.

    Raises:
        ValueError: ``dtype`` is no dtype of torch, or ``group_size`` no positive integer.
    """

    layout: PageLayout
    device: torch.device
    dtype: torch.dtype
    group_size: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}; it must be a torch.dtype, such as torch.bfloat16")
        object.__setattr__(self, "device", torch.device(self.device))
        object.__setattr__(self, "group_size", integer(self.group_size, "group_size", least=1))


@runtime_checkable
class KernelProvider(Protocol):
    """The six operations over packed vectors. All of them are required.

    ``name`` selects the provider; the highest ``priority`` wins automatic selection (the reference has 0).
    Inputs are never modified except ``pages`` by :meth:`store` and ``out`` by :meth:`attend`.
    """

    @property
    def name(self) -> str:
        """Name by which a caller asks for this provider."""
        ...

    @property
    def priority(self) -> int:
        """Rank in automatic selection; higher first."""
        ...

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        """None when every operation works for ``request``, else one sentence saying what does not and why."""
        ...

    def encode(self, x: Tensor, codec: Codec) -> Packed:
        """Centre, rotate, quantize and pack float ``[..., head_dim]`` (``[..., kv_heads, head_dim]`` with a centre)."""
        ...

    def decode(self, packed: Packed, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
        """Inverse of :meth:`encode` up to quantization: ``[..., head_dim]`` of ``dtype``, centre added back."""
        ...

    def scores(self, query: Tensor, packed: Packed, codec: Codec, *, scaling: float) -> Tensor:
        """``scaling * Q K^T`` from packed keys, float32 ``[..., q_len, kv_len]``.

        ``query`` is ``[..., q_len, head_dim]``, ``packed.codes`` ``[..., kv_len, code_bytes]``. Every key has
        lost the centre, so with a centre a row differs from the plain scores by a constant.
        """
        ...

    def store(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
        """Pack keys and values into their slots, in place; no other byte of ``pages`` changes.

        Args:
            key: ``[tokens, kv_heads, head_dim]`` float.
            value: ``[tokens, kv_heads, value_head_dim]`` float.
            pages: uint8 of shape ``codec.layout.pages_shape(num_pages)``.
            slot_mapping: integer ``[tokens]``; slot = page * page_size + offset; -1 skips the token.
            codec: the layer's codecs.
        """
        ...

    def attend(
        self,
        query: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        codec: CacheCodec,
        *,
        scaling: float,
        query_start_loc: Tensor | None = None,
        seq_starts: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Attended:
        """Causal attention of the last tokens of each sequence over its packed pages.

        Query ``i`` of the ``q_len`` of a sequence sits at position ``p = seq_len - q_len + i`` and sees the keys
        ``j`` with ``seq_start <= j <= p`` and, with a window, ``j > p - window``.

        Args:
            query: ``[tokens, q_heads, head_dim]``, sequences one after the other.
            pages: uint8 of shape ``codec.layout.pages_shape(num_pages)``.
            block_table: int32 ``[batch, max_pages]``, page of each ``page_size`` tokens of a sequence.
            seq_lens: int32 ``[batch]``, keys in the pages, those of the query tokens included; 0 for a padded row.
            codec: the layer's codecs.
            scaling: multiplier of ``Q K^T``.
            query_start_loc: int32 ``[batch + 1]``, first query of each sequence; None when all have
                ``tokens // batch`` queries.
            seq_starts: int32 ``[batch]``, first visible position (left padding); None for 0.
            window: keys a query sees, itself included; None for all.
            softcap: ``c`` in ``c * tanh(score / c)``; None for none.
            sinks: float ``[q_heads]``, logits that only enlarge the softmax denominator.
            out: written and returned when given: ``[tokens, q_heads, value_head_dim]``, the query's dtype.
            workspace: uint8 scratch of at least :meth:`workspace_bytes`; allocated when None.

        Raises:
            ValueError: arguments do not fit one another, or keys are centred and ``softcap`` or ``sinks`` is given.
        """
        ...

    def workspace_bytes(self, request: KernelRequest, tokens: int, batch: int) -> int:
        """Scratch bytes that :meth:`attend` needs for any ``tokens`` queries of ``batch`` sequences."""
        ...

    def gather(
        self,
        pages: Tensor,
        block_table: Tensor,
        codec: CacheCodec,
        *,
        start: int,
        stop: int,
        dtype: torch.dtype,
        rotated: bool = False,
    ) -> Gathered:
        """Decode token positions ``start .. stop-1`` of every sequence of ``block_table``.

        ``rotated=True`` leaves keys and values in the rotated space (centre not added back): rotate the query
        once instead of every key.
        """
        ...
