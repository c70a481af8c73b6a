"""The comparison has power: what is wrong with attention shows as a difference from the stock cache."""

from __future__ import annotations

import warnings

import pytest

from turboquant_hf import patch_model

from .identity import IdentityProvider, identity_provider
from .modes import MODES
from .mutations import MUTATIONS, Mutation, mutated_provider
from .row import attempt, outcome, packed_cache
from .shrink import small_model


def compared(mutation: Mutation, provider_class: type[IdentityProvider]) -> str:
    """Outcome of the mutation's mode over a provider."""
    model = small_model(mutation.model_type).model
    if mutation.attention is not None:
        model.set_attn_implementation(mutation.attention)
    run = MODES[mutation.mode]
    stock = run(model, None)
    patch_model(model, verify=False)
    with identity_provider(provider_class) as provider:
        cache = packed_cache(model, provider, **(mutation.options or {}))
        return outcome(stock, attempt(lambda: run(model, cache)))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str) -> None:
    mutation = MUTATIONS[name]
    wrong = mutated_provider(mutation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compared(mutation, IdentityProvider) == "equal"
        result = compared(mutation, wrong)
    assert wrong.changed > 0
    assert result.startswith("differs"), result
