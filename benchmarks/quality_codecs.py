"""This project's codecs as pairs of functions (:class:`scoring.VectorCodec`), every variant that a sweep asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from calibration import Calibration
from scoring import Method, Raw, VectorCodec
from torch import Tensor

from turboquant_core import Codec, ReferenceProvider, VectorLayout
from turboquant_core.codec import KEY_STREAM, VALUE_STREAM
from turboquant_core.outliers import OUTLIER_FRACTION, TurboQuantOutliers, outlier_channels
from turboquant_core.preset import Preset
from turboquant_core.scale import CACHE_RULE, ScaleRule
from turboquant_core.shaping import shaped
from turboquant_core.trellis import TurboQuantTrellis
from turboquant_hf.automatic_center import automatic_center

KEY_FORM, VALUE_FORM = "int8", "cubic"
REFERENCE = ReferenceProvider()


@dataclass(frozen=True)
class Packed:
    """The packed format: one codec for each layer."""

    codecs: list[Codec]

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        codec, rows = self.codecs[layer], x.transpose(1, 2)
        return REFERENCE.decode(REFERENCE.encode(rows, codec), codec).transpose(1, 2)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return self.codecs[layer].layout.nbytes


@dataclass(frozen=True)
class Trellis:
    """The experimental trellis code: one quantizer for each layer."""

    quantizers: list[TurboQuantTrellis]

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        quantizer, rows = self.quantizers[layer], x.transpose(1, 2)
        return quantizer.decode(quantizer.encode(rows)).transpose(1, 2)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return self.quantizers[layer].layout.nbytes


@dataclass(frozen=True)
class Outliers:
    """The paper's split of channels: one quantizer for each layer and KV head."""

    quantizers: list[list[TurboQuantOutliers]]

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        heads = zip(x.unbind(1), self.quantizers[layer], strict=True)
        return torch.stack([quantizer.decode(quantizer.encode(head)) for head, quantizer in heads], 1)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return self.quantizers[layer][0].vector_bytes


@dataclass(frozen=True)
class MeanOfFirst:
    """Keys centred by the mean of the first ``tokens`` of their own sequence (None: of all of it), then coded."""

    codec: VectorCodec
    tokens: int | None

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        mean = x[:, :, : self.tokens].mean(2, keepdim=True)
        return self.codec(x - mean, layer) + mean

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return self.codec.vector_bytes(head_dim, layer)


@dataclass(frozen=True)
class Automatic:
    """Keys centred as the caches of turboquant-hf decide from the first ``tokens`` of a sequence (None: all)."""

    codec: VectorCodec
    tokens: int | None

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        return torch.cat([self._one(row, layer) for row in x.split(1)])

    def _one(self, x: Tensor, layer: int) -> Tensor:
        center = automatic_center(x[:, :, : self.tokens])
        mean = x.new_zeros(()) if center is None else center.unsqueeze(-2)
        return self.codec(x - mean, layer) + mean

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return self.codec.vector_bytes(head_dim, layer)


@dataclass(frozen=True)
class Offset:
    """A model with key bias: every key carries the same vector, which softmax does not see, when it is stored."""

    codec: VectorCodec
    vectors: list[Tensor]

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        return self.codec(x + self.vectors[layer].unsqueeze(-2), layer)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return self.codec.vector_bytes(head_dim, layer)


@dataclass(frozen=True)
class ByLayer:
    """Another codec in each layer."""

    codecs: list[VectorCodec]

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        return self.codecs[layer](x, layer)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return self.codecs[layer].vector_bytes(head_dim, layer)


@dataclass(frozen=True)
class Codecs:
    """Makes codecs for a model.

    Attributes:
        layers: of the model.
        head_dim: coordinates of a key and of a value.
        seed: of the rotation.
        calibration: of the model.
        divergence: KL divergence of methods on a text that is not scored.
        preset: of ``turboquant doctor``, to be scored.
        weights_mean: mean keys of random tokens, per layer: from the weights alone, without a text.
    """

    layers: int
    head_dim: int
    seed: int
    calibration: Calibration
    divergence: Callable[[list[Method]], list[float]] | None = None
    preset: Preset | None = None
    weights_mean: list[Tensor] | None = None

    def key(
        self,
        bits: float,
        rule: ScaleRule = CACHE_RULE,
        *,
        center: Sequence[Tensor | None] | None = None,
        shape: bool = False,
        seed_of: Callable[[int], int] | None = None,
    ) -> Packed:
        """The format's keys; ``center`` per layer, ``shape`` by the calibrated queries, ``seed_of`` a layer."""
        weights = self.calibration.query_moment if shape else None
        return self._packed(VectorLayout(self.head_dim, bits, KEY_FORM), rule, KEY_STREAM, center, weights, seed_of)

    def value(
        self,
        bits: float,
        rule: ScaleRule = CACHE_RULE,
        *,
        shape: bool = False,
        stream: int = VALUE_STREAM,
        seed_of: Callable[[int], int] | None = None,
    ) -> Packed:
        """The format's values; ``shape`` by the output projection."""
        weights = self.calibration.output_moment if shape else None
        layout = VectorLayout(self.head_dim, bits, VALUE_FORM)
        return self._packed(layout, rule, stream, None, weights, seed_of)

    def _packed(
        self,
        layout: VectorLayout,
        rule: ScaleRule,
        stream: int,
        center: Sequence[Tensor | None] | None,
        weights: list[Tensor] | None,
        seed_of: Callable[[int], int] | None,
    ) -> Packed:
        def of_layer(layer: int) -> Codec:
            seed = self.seed if seed_of is None else seed_of(layer)
            own = None if center is None else center[layer]
            codec = Codec.create(
                layout, seed=seed, stream=stream, scale_rule=rule, center=own, device=self.calibration.device
            )
            return codec if weights is None else shaped(codec, weights[layer])

        return Packed([of_layer(layer) for layer in range(self.layers)])

    def default(self, name: str, bits: float, family: str | None = None, **windows: int) -> Method:
        """What a cache does without options."""
        return Method(name, self.key(bits), self.value(bits), family, **windows)

    def shaped(self, name: str, bits: float, family: str | None = None, **windows: int) -> Method:
        """Shaped codes of keys and values, keys centred by the calibration's mean."""
        key = self.key(bits, center=self.calibration.key_mean, shape=True)
        return Method(name, key, self.value(bits, shape=True), family, **windows)

    def by_layer(self, name: str, bits: Mapping[tuple[int, int], float]) -> Method:
        """Bits by layer and side, 0 for keys and 1 for values; what is not named stays exact."""
        sides = []
        for side, make in enumerate((self.key, self.value)):
            sides.append(ByLayer([make(bits[i, side]) if (i, side) in bits else RAW for i in range(self.layers)]))
        return Method(name, *sides)

    def of_preset(self, name: str, preset: Preset, family: str | None = None) -> Method:
        """What a cache does that follows a preset."""
        bits = [preset.layer_bits(i) for i in range(self.layers)]
        centers = [preset.centers.get(i) for i in range(self.layers)]
        keys, values = (
            ByLayer([self.key(k, center=centers) for k, _ in bits]),
            ByLayer([self.value(v) for _, v in bits]),
        )
        return Method(name, keys, values, family, preset.windows.sink_tokens, preset.windows.recent_tokens)

    def trellis(self, name: str, bits: int, family: str | None = None, *, centre: bool = False) -> Method:
        """Keys and values as trellis-coded sequences."""

        def coded(stream: int, centers: list[Tensor] | None) -> Trellis:
            own = [None] * self.layers if centers is None else centers
            options: dict[str, Any] = {"scale_rule": "unbiased", "stream": stream, "device": self.calibration.device}
            return Trellis([TurboQuantTrellis(self.head_dim, bits, self.seed, center=c, **options) for c in own])

        key = coded(KEY_STREAM, self.calibration.key_mean if centre else None)
        return Method(name, key, coded(VALUE_STREAM, None), family)

    def outliers(self, name: str, bits: tuple[int, int]) -> Method:
        """The channels of most energy on the calibration text at ``bits[0]``, the others at ``bits[1]``."""

        def coded(energy: list[Tensor], stream: int) -> Outliers:
            count = round(OUTLIER_FRACTION * self.head_dim)
            seed, device = self.seed + stream, self.calibration.device

            def of_head(head: Tensor) -> TurboQuantOutliers:
                channels = outlier_channels(head.sqrt().unsqueeze(0), count)
                return TurboQuantOutliers(channels, self.head_dim, bits, seed, device, scale_rule="unbiased")

            return Outliers([[of_head(head) for head in layer] for layer in energy])

        keys, values = self.calibration.key_energy, self.calibration.value_energy
        return Method(name, coded(keys, KEY_STREAM), coded(values, VALUE_STREAM))

    def slow_offset(self, times: float) -> list[Tensor]:
        """Vectors ``[kv_heads, head_dim]`` on the slowest rotary channels, ``times`` the keys' mean norm.

        Key biases of trained models (Qwen2 and its like) sit there, where the position embedding turns them least.
        """
        generator, found = torch.Generator().manual_seed(self.seed), []
        slow = torch.arange(self.head_dim) % (self.head_dim // 2) >= self.head_dim // 2 - self.head_dim // 8
        for mean in self.calibration.key_mean:
            vector = torch.randn(mean.shape, generator=generator) * slow
            vector *= times * self.head_dim**0.5 / vector.norm(dim=-1, keepdim=True)
            found.append(vector.to(mean.device))
        return found


RAW = Raw()
