"""What makes a soak fail, by name."""

from __future__ import annotations

from typing import Any

SHOWN = 10
"""Of one kind in a sentence or a list."""


def failures(found: dict[str, Any]) -> list[str]:
    """A sentence for everything that a soak should have done and did not, or should not have done and did.

    Args:
        found: counts ``sent``, ``done``, ``cancelled``, ``probes``, ``lost`` and ``preemptions`` (None where vLLM does
            not count them); what went wrong, ``errors``, ``not_finite`` and ``changed``, one by one; ``over``, whether
            the traffic came to its end, and ``all_blocks_free`` then.

    Returns:
        Nothing when the soak passed.
    """
    return [*_not_done(found), *_went_wrong(found)]


def _not_done(found: dict[str, Any]) -> list[str]:
    wanted = {
        "done": "no request was answered",
        "cancelled": "no request was cancelled",
        "probes": "no probe was answered amid the traffic",
        "preemptions": "no request was preempted, which the size of the cache is meant to bring about",
    }
    named = [] if found["over"] else ["the traffic did not come to its end"]
    named += [sentence for count, sentence in wanted.items() if found[count] == 0]
    if found["preemptions"] is None:
        named.append("this vLLM has no counter of preemptions")
    return named


def _went_wrong(found: dict[str, Any]) -> list[str]:
    kinds = {"errors": "errors", "not_finite": "answers with a logprob that is not finite", "changed": "changed probes"}
    named = [
        f"{noun} ({len(found[kind])}): {'; '.join(found[kind][:SHOWN])}" for kind, noun in kinds.items() if found[kind]
    ]
    if found["lost"]:
        named.append(f"{found['lost']} requests were neither answered nor cancelled")
    if found["over"] and not found["all_blocks_free"]:
        named.append("blocks are still in use after the last request")
    return named
