"""Where every packed byte lies: the one place that computes sizes (normative text: ``docs/layout.md``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, Protocol, TypeAlias, get_args

from .errors import OTHER_HEAD_DIM, LayoutError
from .hadamard import supported_order
from .integers import integer

LAYOUT_VERSION = 1
"""Changes whenever the same vector and codec give different bytes."""

WIDTHS = (2, 3, 4)
"""Code widths: those that have a codebook."""
BITS: tuple[float, ...] = (2, 2.5, 3, 3.5, 4)
"""Bits of a coordinate, on average; 2.5 and 3.5 give half of the coordinates one bit more than the others."""

SCALE_BYTES = 2
PAGE_SIZE_MULTIPLE = 16
HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 1024
WIDEST_ALIGNMENT = 16

Form: TypeAlias = Literal["int8", "cubic"]
"""How levels are produced at read time: ``int8`` (byte lookup, keys), ``cubic`` (half polynomial, values)."""
FORMS: tuple[Form, ...] = get_args(Form)


class RowLayout(Protocol):
    """Any layout of one vector."""

    @property
    def head_dim(self) -> int:
        """Coordinates of a vector."""


def _check_head_dim(head_dim: object) -> int:
    head_dim = integer(head_dim, "head_dim", error=LayoutError)
    if head_dim % HEAD_DIM_MULTIPLE or not HEAD_DIM_MULTIPLE <= head_dim <= MAX_HEAD_DIM:
        raise LayoutError(
            f"head_dim is {head_dim}; the layout packs multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}, here "
            f"{' or '.join(map(str, _nearest_head_dims(head_dim)))}: {OTHER_HEAD_DIM}"
        )
    return head_dim


def _nearest_head_dims(head_dim: int) -> list[int]:
    packed = list(filter(supported_order, range(HEAD_DIM_MULTIPLE, MAX_HEAD_DIM + 1, HEAD_DIM_MULTIPLE)))
    below, above = ([n for n in packed if (n > head_dim) is is_above] for is_above in (False, True))
    return below[-1:] + above[:1]


def check_page_size(page_size: object) -> int:
    """``page_size`` as an int.

    Raises:
        LayoutError: it is no positive multiple of 16.
    """
    page_size = integer(page_size, "page_size", error=LayoutError)
    if page_size < PAGE_SIZE_MULTIPLE or page_size % PAGE_SIZE_MULTIPLE:
        raise LayoutError(f"page_size is {page_size}; it must be a positive multiple of {PAGE_SIZE_MULTIPLE}")
    return page_size


def check_version(version: object) -> None:
    """Raise ``LayoutError`` for bytes that follow another layout version than this release reads and writes."""
    if version != LAYOUT_VERSION:
        raise LayoutError(
            f"layout version is {version!r}; this release reads and writes {LAYOUT_VERSION}: use the release that "
            "wrote the bytes, or encode the vectors again"
        )


def check_bits(bits: object, where: str = "") -> float:
    """``bits`` as the layout writes it: an int for 2, 3 and 4, a float for 2.5 and 3.5.

    ``where`` follows the value in the error.

    Raises:
        LayoutError: ``bits`` is not one of :data:`BITS`.
    """
    if isinstance(bits, str):
        raise LayoutError(f"bits is {bits!r}{where}, a string: pass a number, one of {BITS}")
    if isinstance(bits, bool) or not isinstance(bits, Real) or bits not in BITS:
        raise LayoutError(f"bits is {bits!r}{where}; the packed layout has {BITS}: choose one of them")
    return int(float(bits)) if float(bits).is_integer() else float(bits)


def bits_pair(bits: object, where: str = "") -> tuple[float, float]:
    """``bits`` of keys and of values, from one number for both or a pair; see :func:`check_bits`.

    Raises:
        LayoutError: neither a number nor two, or one outside :data:`BITS`.
    """
    pair = bits if isinstance(bits, Sequence) and not isinstance(bits, str) else (bits, bits)
    if len(pair) != 2:
        raise LayoutError(f"bits is {bits!r}{where}; give one number for keys and values, or a pair (keys, values)")
    return check_bits(pair[0], where), check_bits(pair[1], where)


@dataclass(frozen=True, slots=True)
class VectorLayout:
    """One packed vector: a code row of ``code_bytes`` bytes and one fp16 scale.

    Args:
        head_dim: coordinates of the vector, a multiple of 8 in [8, 1024]; of 16 where ``bits`` is fractional.
        bits: bits of a coordinate: 2, 3 or 4; 2.5 (3 bits for the first half of the rotated coordinates, 2 for the
            second) or 3.5 (4 and 3).
        form: codebook form, ``"int8"`` or ``"cubic"``; it also decides the sign placement at 4 bits.
        version: layout version the bytes follow.

    Raises:
        LayoutError: a field is outside the set above.
    """

    head_dim: int
    bits: float
    form: Form
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim", _check_head_dim(self.head_dim))
        object.__setattr__(self, "bits", check_bits(self.bits))
        if self.is_mixed and self.head_dim % (2 * HEAD_DIM_MULTIPLE):
            raise LayoutError(
                f"head_dim is {self.head_dim}; {self.bits} bits need a multiple of {2 * HEAD_DIM_MULTIPLE}, because "
                f"each half is packed by itself: choose one of {WIDTHS} bits"
            )
        if self.form not in FORMS:
            raise LayoutError(f"form is {self.form!r}; the packed layout has {FORMS}: choose one of them")

    @property
    def is_mixed(self) -> bool:
        """Whether the two halves of the coordinates have codes of different widths."""
        return not isinstance(self.bits, int)

    @property
    def parts(self) -> tuple[VectorLayout, ...]:
        """Vectors of one width each whose code rows, one after the other, are the row of this one."""
        if not self.is_mixed:
            return (self,)
        low = int(self.bits)
        return tuple(VectorLayout(self.head_dim // 2, width, self.form, self.version) for width in (low + 1, low))

    @property
    def width(self) -> int:
        """Code width of every coordinate.

        Raises:
            LayoutError: the coordinates have two widths: see :attr:`parts`.
        """
        if self.is_mixed:
            raise LayoutError(f"{self.bits} bits are two code widths; read them from parts")
        return int(self.bits)

    @property
    def code_bytes(self) -> int:
        """Bytes of the code row."""
        return int(self.head_dim * self.bits) // 8

    @property
    def alignment(self) -> int:
        """Largest power of two, at most 16, that divides where each part of each row of a page starts."""
        starts = math.gcd(WIDEST_ALIGNMENT, *(part.code_bytes for part in self.parts))
        return starts & -starts

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale."""
        return SCALE_BYTES

    @property
    def nbytes(self) -> int:
        """All bytes of one vector."""
        return self.code_bytes + self.scale_bytes


@dataclass(frozen=True, slots=True)
class RawLayout:
    """One vector kept in full precision (values when ``compress_v=False``).

    Args:
        head_dim: coordinates of the vector.
        itemsize: bytes of a coordinate: 2 (fp16, bf16) or 4 (fp32).

    Raises:
        LayoutError: ``head_dim`` or ``itemsize`` is outside its range.
    """

    head_dim: int
    itemsize: int = 2
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim", _check_head_dim(self.head_dim))
        if self.itemsize not in (2, 4):
            raise LayoutError(f"itemsize is {self.itemsize}; raw vectors have 2 or 4 bytes a coordinate")

    @property
    def code_bytes(self) -> int:
        """Bytes of the stored coordinates."""
        return self.head_dim * self.itemsize

    @property
    def scale_bytes(self) -> int:
        """Zero: a raw vector has no scale."""
        return 0

    @property
    def nbytes(self) -> int:
        """All bytes of one vector."""
        return self.code_bytes


@dataclass(frozen=True, slots=True)
class ExactRows:
    """Tokens of a page that are kept in full precision too, beside their codes.

    Args:
        first: the tokens at offsets ``0 .. first - 1`` of the page have rows ``0 .. first - 1``.
        ring: rows that all tokens of the page take in turns: offset ``o`` has row ``first + o % ring``; 0 for none.
        itemsize: bytes of a coordinate: 2 (fp16, bf16) or 4 (fp32).

    Raises:
        LayoutError: a field is outside its range.
    """

    first: int = 0
    ring: int = 0
    itemsize: int = 2

    def __post_init__(self) -> None:
        for name in ("first", "ring"):
            number = getattr(self, name)
            if type(number) is not int or number < 0:
                raise LayoutError(f"exact rows: {name} is {number!r}; it must be a number of tokens, 0 for none")
        if self.itemsize not in (2, 4):
            raise LayoutError(f"exact rows: itemsize is {self.itemsize}; they have 2 or 4 bytes a coordinate")

    @property
    def rows(self) -> int:
        """Rows of a page and KV head, of a key and a value each."""
        return self.first + self.ring


@dataclass(frozen=True, slots=True)
class PageLayout:
    """One page: for each KV head a contiguous chunk ``[K codes][V codes][K scales][V scales][exact K][exact V]``.

    Args:
        key: layout of a key vector.
        value: layout of a value vector; :class:`RawLayout` keeps values in full precision.
        page_size: tokens of a page, a multiple of 16.
        kv_heads: KV heads of the layer.
        exact: tokens in full precision beside the packed ones; none by default.

    Attributes:
        exact_bytes: bytes of the exact rows of a chunk, those included that fill them up to whole bytes a token.
        chunk_bytes: bytes of one page of one KV head.

    Raises:
        LayoutError: ``page_size`` or ``kv_heads`` is out of range, the two layouts differ in version, or a page has
            fewer tokens than exact rows of a kind.
    """

    key: VectorLayout
    value: VectorLayout | RawLayout
    page_size: int
    kv_heads: int
    exact: ExactRows = ExactRows()
    # Asked for several times in each step of each layer.
    exact_bytes: int = field(init=False, repr=False, compare=False)
    chunk_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "page_size", check_page_size(self.page_size))
        object.__setattr__(self, "kv_heads", integer(self.kv_heads, "kv_heads", least=1, error=LayoutError))
        if self.key.version != self.value.version:
            raise LayoutError(
                f"key layout version {self.key.version} differs from value layout version {self.value.version}"
            )
        if max(self.exact.first, self.exact.ring) > self.page_size:
            raise LayoutError(
                f"page_size is {self.page_size}; {self.exact} need pages of at least "
                f"{max(self.exact.first, self.exact.ring)} tokens"
            )
        exact = self.exact.rows * (self.key.head_dim + self.value.head_dim) * self.exact.itemsize
        object.__setattr__(self, "exact_bytes", -(-exact // self.page_size) * self.page_size)
        object.__setattr__(self, "chunk_bytes", self.page_size * self.slot_bytes)

    @property
    def version(self) -> int:
        """Layout version the bytes of the page follow."""
        return self.key.version

    @property
    def value_offset(self) -> int:
        """First byte of the value codes inside a chunk."""
        return self.page_size * self.key.code_bytes

    @property
    def key_scale_offset(self) -> int:
        """First byte of the key scales inside a chunk."""
        return self.value_offset + self.page_size * self.value.code_bytes

    @property
    def value_scale_offset(self) -> int:
        """First byte of the value scales inside a chunk."""
        return self.key_scale_offset + self.page_size * self.key.scale_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one packed token of one KV head, keys and values and scales."""
        return self.key.nbytes + self.value.nbytes

    @property
    def exact_key_offset(self) -> int:
        """First byte of the exact keys inside a chunk: the packed tokens end there."""
        return self.page_size * self.token_bytes

    @property
    def exact_value_offset(self) -> int:
        """First byte of the exact values inside a chunk."""
        return self.exact_key_offset + self.exact.rows * self.key.head_dim * self.exact.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of a chunk for each of its tokens: :attr:`token_bytes` and a share of the exact rows."""
        return self.token_bytes + self.exact_bytes // self.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all KV heads."""
        return self.kv_heads * self.chunk_bytes

    def pages_shape(self, num_pages: int) -> tuple[int, int, int]:
        """Shape of the uint8 tensor that holds ``num_pages`` pages: ``[num_pages, kv_heads, chunk_bytes]``."""
        return (num_pages, self.kv_heads, self.chunk_bytes)

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens of one sequence occupy."""
        return -(-tokens // self.page_size)
