"""Codes to bytes and back: the host's only statement of the bit order (``docs/layout.md``).

A code row is a sequence of nibbles; nibble ``i`` is bits ``4*(i%2) .. 4*(i%2)+3`` of byte ``i//2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .halves import by_part, joined
from .layout import VectorLayout, check_version

_SIGN_SHIFTS = (7, 15, 23, 31, 3, 11, 19, 27)
"""Bit of coordinate ``j``'s sign in a 32-bit word of the 4-bit int8 form.

Where a byte-permute instruction in sign-replicate mode reads it: byte ``j`` of the word for the low four
coordinates, of the word shifted left by four for the high four.
"""


def _join_nibbles(nibbles: Tensor) -> Tensor:
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _split_nibbles(row: Tensor) -> Tensor:
    return torch.stack((row & 15, row >> 4), dim=-1).flatten(-2)


def _pack_2bit(codes: Tensor) -> Tensor:
    low, high = codes.chunk(2, dim=-1)
    return _join_nibbles(low | (high << 2))


def _unpack_2bit(row: Tensor) -> Tensor:
    nibbles = _split_nibbles(row)
    return torch.cat((nibbles & 3, nibbles >> 2), dim=-1)


def _pack_3bit(codes: Tensor) -> Tensor:
    *planes, rest = codes.chunk(4, dim=-1)
    nibbles = [plane | (((rest >> p) & 1) << 3) for p, plane in enumerate(planes)]
    return _join_nibbles(torch.cat(nibbles, dim=-1))


def _unpack_3bit(row: Tensor) -> Tensor:
    nibbles = _split_nibbles(row)
    planes = nibbles.chunk(3, dim=-1)
    rest = (planes[0] >> 3) | ((planes[1] >> 3) << 1) | ((planes[2] >> 3) << 2)
    return torch.cat((nibbles & 7, rest), dim=-1)


def _pack_4bit_int8(codes: Tensor) -> Tensor:
    words = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8).to(torch.int64)
    negative = (words < 8).to(torch.int64)
    magnitude = torch.where(words < 8, 7 - words, words - 8)
    shifts = torch.arange(0, 32, 4, device=codes.device)
    signs = torch.tensor(_SIGN_SHIFTS, device=codes.device)
    word = ((magnitude << shifts) | (negative << signs)).sum(-1)
    byte_shifts = torch.arange(0, 32, 8, device=codes.device)
    return ((word.unsqueeze(-1) >> byte_shifts) & 255).to(torch.uint8).flatten(-2)


def _unpack_4bit_int8(row: Tensor) -> Tensor:
    words = row.reshape(*row.shape[:-1], row.shape[-1] // 4, 4)
    magnitude = torch.stack((words & 7, (words >> 4) & 7), dim=-1).flatten(-2)
    negative = torch.cat((words >> 7, (words >> 3) & 1), dim=-1)
    return torch.where(negative == 1, 7 - magnitude, 8 + magnitude).flatten(-2)


def pack_codes(codes: Tensor, layout: VectorLayout) -> Tensor:
    """Pack codes into code rows.

    Args:
        codes: uint8 ``[..., head_dim]``, values in ``[0, 2**width)``, ascending in level; the first half of the
            coordinates has the larger width where ``bits`` is fractional.
        layout: the row's layout.

    Returns:
        uint8 ``[..., code_bytes]``.

    Raises:
        LayoutError: another layout version.
        ValueError: wrong dtype, last dimension or code range.
    """
    check_version(layout.version)
    _check_row(codes, layout.head_dim, "codes", "head_dim")
    for part, own in zip(layout.parts, by_part(codes, layout), strict=True):
        if own.numel() and int(own.max()) >= 1 << part.width:
            raise ValueError(f"a code is {int(own.max())}; {part.width}-bit codes end at {(1 << part.width) - 1}")
    return pack_checked_codes(codes, layout)


def pack_checked_codes(codes: Tensor, layout: VectorLayout) -> Tensor:
    """Pack codes known to be in range; no host synchronisation (see :func:`pack_codes`)."""
    return joined([_pack(own, part) for part, own in zip(layout.parts, by_part(codes, layout), strict=True)])


def _pack(codes: Tensor, layout: VectorLayout) -> Tensor:
    if layout.width == 2:
        return _pack_2bit(codes)
    if layout.width == 3:
        return _pack_3bit(codes)
    return _pack_4bit_int8(codes) if layout.form == "int8" else _join_nibbles(codes)


def unpack_codes(row: Tensor, layout: VectorLayout) -> Tensor:
    """Inverse of :func:`pack_codes`: uint8 ``[..., code_bytes]`` to uint8 ``[..., head_dim]``.

    Raises:
        LayoutError: another layout version.
        ValueError: wrong dtype or last dimension.
    """
    check_version(layout.version)
    _check_row(row, layout.code_bytes, "packed rows", "code_bytes")
    rows = row.split([part.code_bytes for part in layout.parts], dim=-1)
    return joined([_unpack(own, part) for part, own in zip(layout.parts, rows, strict=True)])


def _unpack(row: Tensor, layout: VectorLayout) -> Tensor:
    if layout.width == 2:
        return _unpack_2bit(row)
    if layout.width == 3:
        return _unpack_3bit(row)
    return _unpack_4bit_int8(row) if layout.form == "int8" else _split_nibbles(row)


def _check_row(rows: Tensor, width: int, what: str, name: str) -> None:
    if rows.dtype != torch.uint8:
        raise ValueError(f"{what} are {rows.dtype}; they must be torch.uint8")
    if rows.dim() == 0 or rows.shape[-1] != width:
        raise ValueError(f"{what} have shape {tuple(rows.shape)}; the last dimension must be {name} = {width}")
