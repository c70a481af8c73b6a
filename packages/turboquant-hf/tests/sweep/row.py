"""What the sweep finds for one model type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from turboquant_core import LayoutError
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, patch_model, unpatch_model
from turboquant_hf.compat import DynamicCache, StaticCache

from .identity import identity_provider
from .modes import MODES, NEW_TOKENS, PROMPT_TOKENS, TOLERANCE, Generated, padded
from .shrink import CannotBuildError, Small, one_line, small_model

PAGE_SIZE = 16
ROOM = PROMPT_TOKENS + NEW_TOKENS + PAGE_SIZE
"""Of static caches: more than is needed, so that what is read behind the tokens shows."""
PATHS = ("fused", "intercepted", "decoded")


@dataclass(slots=True)
class Row:
    """One model type.

    Attributes:
        model_type: as Transformers names it.
        own_head_dim: head_dim of the family's default configuration.
        head_dims: ``key/value`` head_dims of the packed layers of the small model.
        patched: number of layers on each path after :func:`patch_model`; a layer on two paths counts as ``a+b``.
        untouched: the same for a model that is not patched.
        static: the padded batch over a static cache, as a mode; ``stock fails: ...`` where Transformers' own one does
            not give what its growing one does.
        modes: each mode with ``equal``, ``differs``, ``stock fails: ...`` or ``fails: ...``.
        reasons: why layers of the patched model were decoded.
        untouched_reasons: the same for the untouched model.
        uncompressed: kinds of layers that are not packed.
        refused: why there is no such model or cache; nothing else is set then.
    """

    model_type: str
    own_head_dim: int | None = None
    head_dims: list[str] = field(default_factory=list)
    patched: dict[str, int] = field(default_factory=dict)
    untouched: dict[str, int] = field(default_factory=dict)
    static: str | None = None
    modes: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    untouched_reasons: list[str] = field(default_factory=list)
    uncompressed: list[str] = field(default_factory=list)
    refused: str | None = None

    @property
    def is_equal(self) -> bool:
        """Every mode that the stock model can do gave the stock result."""
        return bool(self.modes) and all(_is_right(outcome) for outcome in self.modes.values())

    def record(self) -> dict[str, Any]:
        """For the file of expectations; what is empty is left out."""
        return {name: value for name, value in asdict(self).items() if value not in (None, [], {}) or name == "modes"}


def _is_right(outcome: str) -> bool:
    return outcome == "equal" or outcome.startswith("stock fails")


def stock_cache(model: Any) -> Any:
    """A cache of Transformers, which several turns need; one turn makes its own."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def packed_cache(model: Any, provider: str, **options: Any) -> TurboQuantCache:
    """An empty packed cache over the identity codec; every token is packed, as prompts are short."""
    options = {"recent_tokens": 0, **options}
    return TurboQuantCache(model.config, 4, page_size=PAGE_SIZE, provider=provider, **options)


def attempt(work: Callable[[], Generated]) -> Generated | str:
    """The result of ``work``, or its error as a text."""
    torch.manual_seed(0)
    try:
        return work()
    # Whatever a model raises is a finding.
    except Exception as error:  # noqa: BLE001
        return one_line(error)


def outcome(expected: Generated | str, got: Generated | str) -> str:
    """How a packed run compares with the stock run; a text is an error."""
    if isinstance(expected, str):
        return f"stock fails: {expected}"
    if isinstance(got, str):
        return f"fails: {got}"
    difference = expected.difference(got)
    return "equal" if difference <= TOLERANCE else f"differs: {difference:.1e}"


class Comparison:
    """One model over stock caches, then over packed ones.

    Args:
        small: the model.
        provider: name of the identity provider.
    """

    def __init__(self, small: Small, provider: str) -> None:
        self.model = small.model
        self.provider = provider
        self.row = Row(self.model.config.model_type, small.own_head_dim)
        self.stock = {
            name: attempt(lambda name=name, run=run: run(self.model, self._stock(name))) for name, run in MODES.items()
        }
        self.stock_static = self._stock_static()

    def _stock(self, mode: str) -> Any:
        return stock_cache(self.model) if mode == "turns" else None

    def patched(self) -> None:
        """All modes on the patched model, and a stock cache on it."""
        patch_model(self.model, verify=False)
        paths: dict[int, Counter[str]] = {}
        for name, run in MODES.items():
            cache = packed_cache(self.model, self.provider)
            got = attempt(lambda run=run, cache=cache: run(self.model, cache))
            self.row.modes[name] = outcome(self.stock[name], got)
            note_layers(self.row, cache, paths, self.row.reasons)
        self.row.patched = by_path(paths)
        self.row.modes["stock cache while patched"] = outcome(self.stock["padded"], attempt(self._plain))
        self.row.static = self._static()
        unpatch_model(self.model)
        self.row.modes["stock cache after unpatching"] = outcome(self.stock["padded"], attempt(self._plain))

    def _stock_static(self) -> str:
        text = self.model.config.get_text_config(decoder=True)
        return outcome(
            self.stock["padded"],
            attempt(lambda: padded(self.model, StaticCache(config=text, max_cache_len=ROOM))),
        )

    def _static(self) -> str:
        """A left-padded batch over a static cache, packed sliding windows included."""
        if self.stock_static != "equal":
            return f"stock fails: {self.stock_static}"
        options: dict[str, Any] = {"recent_tokens": 0, "page_size": PAGE_SIZE, "compress_sliding": True}
        packed = TurboQuantStaticCache(self.model.config, ROOM, provider=self.provider, **options)
        return outcome(self.stock["padded"], attempt(lambda: padded(self.model, packed)))

    def untouched(self) -> None:
        """A packed cache on a model that is left alone."""
        cache = packed_cache(self.model, self.provider)
        got = attempt(lambda: padded(self.model, cache))
        self.row.modes["untouched model"] = outcome(self.stock["padded"], got)
        paths: dict[int, Counter[str]] = {}
        note_layers(self.row, cache, paths, self.row.untouched_reasons)
        self.row.untouched = by_path(paths)

    def _plain(self) -> Generated:
        return padded(self.model, None)


def note_layers(row: Row, cache: TurboQuantCache, paths: dict[int, Counter[str]], reasons: list[str]) -> None:
    """Add what the layers of a used cache say to ``row``, to the paths of each layer and to the ``reasons``."""
    for layer, summary in zip(cache.layers, cache.summary().layers, strict=True):
        paths.setdefault(summary.layer_idx, Counter()).update(summary.path.split("+"))
        _add(row.uncompressed if summary.path == "uncompressed" else reasons, summary.reasons)
        if getattr(layer, "store", None) is not None:
            page = layer.packed_sequences.layout
            _add(row.head_dims, (f"{page.key.head_dim}/{page.value.head_dim}",))


def _add(known: list[str], found: tuple[str, ...]) -> None:
    """What is found and not known, without its count, in order."""
    known[:] = sorted({*known, *(text.rsplit(" (", 1)[0] if text.endswith(")") else text for text in found)})


def by_path(layers: dict[int, Counter[str]]) -> dict[str, int]:
    """Number of layers on each path; one that is never used says so."""
    names: Counter[str] = Counter()
    for seen in layers.values():
        used = [path for path in PATHS if seen[path]]
        names["+".join(used) or ("uncompressed" if seen["uncompressed"] else "unused")] += 1
    return dict(sorted(names.items()))


def sweep_model(model_type: str) -> Row:
    """Build, generate in every mode, compare."""
    try:
        small = small_model(model_type)
    except CannotBuildError as error:
        return Row(model_type, refused=f"cannot be built small: {error}")
    with identity_provider() as provider:
        try:
            packed_cache(small.model, provider)
        except (ValueError, LayoutError, AttributeError) as error:
            return Row(model_type, small.own_head_dim, refused=f"no packed cache: {one_line(error)}")
        comparison = Comparison(small, provider)
        failed = [error for error in comparison.stock.values() if isinstance(error, str)]
        if len(failed) == len(MODES):
            return Row(model_type, small.own_head_dim, refused=f"the stock model fails: {failed[0]}")
        comparison.row.model_type = model_type
        comparison.untouched()
        comparison.patched()
    row = comparison.row
    if not any(path in PATHS for paths in row.patched for path in paths.split("+")):
        return Row(model_type, small.own_head_dim, refused="its attention does not use the cache that it is given")
    return row
