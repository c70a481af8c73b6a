"""The sweep's comparison for a model with an image or an encoder in front."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import EncoderDecoderCache

from turboquant_hf import patch_model, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT, DynamicCache

from .identity import identity_provider
from .modes import NEW_TOKENS, Generated
from .multimodal import FRONTED, Fronted
from .row import Row, attempt, by_path, note_layers, outcome, packed_cache

MODES: dict[str, dict[str, Any]] = {"padded": {}, "beams": {"num_beams": 2}}


def _generate(fronted: Fronted, cache: Any, options: dict[str, Any]) -> Generated:
    if cache is not None:
        options = {**options, CACHE_ARGUMENT: cache}
    out = fronted.model.generate(
        **fronted.inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return Generated(out.sequences, torch.stack(out.logits).float())


def sweep_fronted(name: str) -> Row:
    """Stock caches, then packed ones on the untouched and on the patched model, then stock ones again."""
    fronted = FRONTED[name]()
    row = Row(name, fronted.own_head_dim)
    stock = {mode: attempt(lambda o=options: _generate(fronted, None, o)) for mode, options in MODES.items()}
    with identity_provider() as provider:
        row.modes["untouched model"], row.untouched = _packed(
            fronted, row, provider, stock, {"padded": {}}, row.untouched_reasons
        )["padded"]
        patch_model(fronted.model, verify=False)
        for mode, (result, paths) in _packed(fronted, row, provider, stock, MODES, row.reasons).items():
            row.modes[mode], row.patched = result, paths
    again = attempt(lambda: _generate(fronted, None, {}))
    row.modes["stock cache while patched"] = outcome(stock["padded"], again)
    unpatch_model(fronted.model)
    again = attempt(lambda: _generate(fronted, None, {}))
    row.modes["stock cache after unpatching"] = outcome(stock["padded"], again)
    return row


def _packed(
    fronted: Fronted,
    row: Row,
    provider: str,
    stock: dict[str, Any],
    modes: dict[str, dict[str, Any]],
    reasons: list[str],
) -> dict[str, tuple[str, dict[str, int]]]:
    results = {}
    for mode, options in modes.items():
        cache = packed_cache(fronted.model, provider)
        whole: Any = EncoderDecoderCache(cache, DynamicCache()) if fronted.is_encoder_decoder else cache
        got = attempt(lambda c=whole, o=options: _generate(fronted, c, o))
        paths: dict[int, Counter[str]] = {}
        note_layers(row, cache, paths, reasons)
        results[mode] = outcome(stock[mode], got), by_path(paths)
    return results
