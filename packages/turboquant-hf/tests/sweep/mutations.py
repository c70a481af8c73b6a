"""Identity providers that get one thing wrong, which the sweep's comparison has to see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from turboquant_core import Attended, CacheCodec

from .identity import IdentityProvider

Arguments = dict[str, Any]


class Mutation(NamedTuple):
    """A change of the arguments of attention, and where it must show.

    Attributes:
        change: from the arguments of ``attend`` and the number of queries of a sequence to wrong arguments.
        model_type: a family that depends on them.
        mode: of the sweep.
        options: of the cache.
        attention: implementation of the model; None for its own.
    """

    change: Callable[[Arguments, int], Arguments]
    model_type: str
    mode: str
    options: Arguments | None = None
    attention: str | None = None


def _late_by_one(arguments: Arguments, q_len: int) -> Arguments:
    """Each of several queries misses its own key."""
    return {**arguments, "seq_lens": arguments["seq_lens"] - 1} if q_len > 1 else arguments


def _wider(arguments: Arguments, q_len: int) -> Arguments:
    """A single query is told of its window by where it starts to see."""
    starts = arguments["seq_starts"]
    return arguments if starts is None else {**arguments, "seq_starts": (starts - 2).clamp(min=0)}


MUTATIONS = {
    "mask dropped": Mutation(lambda arguments, _: {**arguments, "seq_starts": None}, "llama", "padded"),
    "sinks dropped": Mutation(lambda arguments, _: {**arguments, "sinks": None}, "gpt_oss", "greedy"),
    "soft cap dropped": Mutation(
        lambda arguments, _: {**arguments, "softcap": None}, "gemma2", "greedy", None, "eager"
    ),
    "own scaling": Mutation(lambda arguments, _: {**arguments, "scaling": 128**-0.5}, "granite", "greedy"),
    "causal order off by one": Mutation(_late_by_one, "llama", "chunked"),
    "window too wide": Mutation(_wider, "gemma3_text", "greedy", {"compress_sliding": True}),
}


def mutated_provider(mutation: Mutation) -> type[IdentityProvider]:
    """A provider class with the mutation; ``changed`` counts the calls that it changed."""

    class Mutated(IdentityProvider):
        changed = 0

        def attend(
            self, query: Tensor, pages: Tensor, block_table: Tensor, seq_lens: Tensor, codec: CacheCodec, **options: Any
        ) -> Attended:
            given = {
                "window": None,
                "seq_starts": None,
                "softcap": None,
                "sinks": None,
                **options,
                "seq_lens": seq_lens,
            }
            wrong = mutation.change(given, query.shape[0] // seq_lens.shape[0])
            type(self).changed += any(wrong[name] is not given[name] for name in given)
            return super().attend(query, pages, block_table, wrong.pop("seq_lens"), codec, **wrong)

    return Mutated
