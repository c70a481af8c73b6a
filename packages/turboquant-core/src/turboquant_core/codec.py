"""Everything that turns a vector into bytes and back: layout, rotation signs, codebook, scale rule, key centre."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .codebook import format_codebook
from .errors import LayoutError
from .halves import by_part, joined
from .layout import PageLayout, RawLayout, VectorLayout, check_version
from .rotation import rotation_signs
from .scale import CACHE_RULE, ScaleRule, check_scale_rule
from .search import searched_codes

KEY_STREAM = 0
VALUE_STREAM = 1


@dataclass(frozen=True, slots=True)
class Codec:
    """How one kind of vector (keys or values of a layer) is coded.

    Attributes:
        layout: where the bytes lie.
        signs: float32 ``[head_dim]``, +-1, the random diagonal of the rotation.
        levels: float32 ``[2**bits]``, ascending, for a coordinate of unit variance; with fractional bits those of the
            first half's width and behind them those of the second's (see :attr:`tables`).
        boundaries: float32 ``[2**bits - 1]``, midpoints of the levels; a coordinate on a boundary takes the lower code.
            With fractional bits the two widths' one after the other, too.
        scale_rule: how the stored scale is chosen (:mod:`turboquant_core.scale`).
        center: float32 ``[kv_heads, head_dim]`` subtracted before the rotation, or None. Softmax does not
            change when every key of a row loses the same vector, so attention never adds it back.
    """

    layout: VectorLayout
    signs: Tensor
    levels: Tensor
    boundaries: Tensor
    scale_rule: ScaleRule
    center: Tensor | None = None

    @classmethod
    def create(
        cls,
        layout: VectorLayout,
        *,
        seed: int = 42,
        stream: int = KEY_STREAM,
        scale_rule: ScaleRule = "unbiased",
        center: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Codec:
        """Build the format's codec for ``layout``.

        Args:
            layout: the packed vector.
            seed: rotation seed, in [0, 2**64).
            stream: 0 for keys, 1 for values, so that the two have independent signs.
            scale_rule: see :mod:`turboquant_core.scale`.
            center: ``[kv_heads, head_dim]`` float, or None.
            device: where the tensors live.

        Raises:
            LayoutError: no Hadamard matrix of order ``head_dim`` is known, or ``layout`` is of another version.
            ValueError: unknown scale rule, or ``center`` has another shape or is not finite.
        """
        check_version(layout.version)
        check_scale_rule(scale_rule)
        check_center_shape(center, layout.head_dim)
        tables = [format_codebook(layout.form, part.width).tensors(device) for part in layout.parts]
        return cls(
            layout=layout,
            signs=rotation_signs(layout.head_dim, seed=seed, stream=stream, device=device),
            levels=torch.cat([levels for levels, _ in tables]),
            boundaries=torch.cat([boundaries for _, boundaries in tables]),
            scale_rule=scale_rule,
            center=None if center is None else center.to(device=device, dtype=torch.float32),
        )

    @property
    def device(self) -> torch.device:
        """Device of the codec's tensors."""
        return self.signs.device

    @property
    def tables(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Levels and boundaries of each part of the layout: one pair, or two with fractional bits."""
        sizes = [1 << part.width for part in self.layout.parts]
        return tuple(zip(self.levels.split(sizes), self.boundaries.split([n - 1 for n in sizes]), strict=True))

    def codes_of(self, unit: Tensor) -> Tensor:
        """Codes that are written: float ``[..., head_dim]`` of unit variance to uint8 of the same shape."""
        if self.scale_rule == "searched":
            return searched_codes(unit, self.nearest_codes, self.levels_of)
        return self.nearest_codes(unit)

    def nearest_codes(self, unit: Tensor) -> Tensor:
        """Code of the nearest level: float ``[..., head_dim]`` of unit variance to uint8 of the same shape."""
        parts = zip(by_part(unit, self.layout), self.tables, strict=True)
        return joined([torch.bucketize(own.contiguous(), bounds).to(torch.uint8) for own, (_, bounds) in parts])

    def levels_of(self, codes: Tensor) -> Tensor:
        """Level of each code: uint8 ``[..., head_dim]`` to float32 of the same shape."""
        parts = zip(by_part(codes, self.layout), self.tables, strict=True)
        return joined([levels[own.long()] for own, (levels, _) in parts])

    def to(self, device: torch.device | str) -> Codec:
        """The same codec with its tensors on ``device``."""
        center = None if self.center is None else self.center.to(device)
        return replace(
            self,
            signs=self.signs.to(device),
            levels=self.levels.to(device),
            boundaries=self.boundaries.to(device),
            center=center,
        )


def check_center_shape(center: Tensor | None, head_dim: int) -> None:
    """Raise ``ValueError`` unless ``center`` is None or finite float ``[kv_heads, head_dim]``."""
    if center is None:
        return
    if center.dim() != 2 or center.shape[-1] != head_dim or not center.is_floating_point():
        raise ValueError(
            f"center is {center.dtype} {tuple(center.shape)}; it must be float [kv_heads, head_dim = {head_dim}]"
        )
    if not bool(center.isfinite().all()):
        raise ValueError("center holds a NaN or an infinity, which would spoil every key: compute it from finite keys")


@dataclass(frozen=True, slots=True)
class CacheCodec:
    """Codecs of a layer's pages.

    Attributes:
        layout: the page.
        key: codec of the keys.
        value: codec of the values; None when the layout keeps values in full precision.
    """

    layout: PageLayout
    key: Codec
    value: Codec | None

    @classmethod
    def create(
        cls,
        layout: PageLayout,
        *,
        seed: int = 42,
        key_scale: ScaleRule = CACHE_RULE,
        value_scale: ScaleRule = CACHE_RULE,
        center: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> CacheCodec:
        """Build the codecs of ``layout``.

        Args:
            layout: the page.
            seed: rotation seed, in [0, 2**64).
            key_scale: scale rule of keys.
            value_scale: scale rule of values.
            center: float ``[kv_heads, head_dim]`` subtracted from every key, or None.
            device: where the tensors live.

        Raises:
            LayoutError: a head_dim has no known Hadamard matrix, or ``center`` does not fit ``kv_heads``.
            ValueError: unknown scale rule, or ``center`` has another shape or is not finite.
        """
        check_center_shape(center, layout.key.head_dim)
        if center is not None and center.shape[0] != layout.kv_heads:
            raise LayoutError(f"center has {center.shape[0]} rows; the layout has kv_heads = {layout.kv_heads}")
        key = Codec.create(layout.key, seed=seed, stream=KEY_STREAM, scale_rule=key_scale, center=center, device=device)
        value = None
        if not isinstance(layout.value, RawLayout):
            value = Codec.create(layout.value, seed=seed, stream=VALUE_STREAM, scale_rule=value_scale, device=device)
        return cls(layout=layout, key=key, value=value)

    def to(self, device: torch.device | str) -> CacheCodec:
        """The same codecs with their tensors on ``device``."""
        return replace(self, key=self.key.to(device), value=None if self.value is None else self.value.to(device))


def check_center(codec: CacheCodec, softcap: float | None, sinks: Tensor | None) -> None:
    """Raise ``ValueError`` for centred keys with a soft-cap or sinks.

    A centre shifts every score of a row by the same constant. Softmax does not see it; both of these do.
    """
    if codec.key.center is not None and (softcap is not None or sinks is not None):
        name = "softcap" if softcap is not None else "sinks"
        raise ValueError(f"attention with {name} does not work over centred keys: store them without a center")
