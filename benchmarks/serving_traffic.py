"""What random traffic has brought: requests by how they ended, and probes whose answers must not change."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

PROBES = 4
PROBE_TOKENS = 24
TIE, TIE_IN_FLOAT32 = 1.0, 0.05
"""Nats, of a model in 16 bits and in 32. Sums are rounded in another order when the batch is another, or a prefix was
cached. Where that moves a coordinate to another code, logits shift by a part of what packing itself shifts them by, and
the text may part where two tokens were not far from a tie. Such turns are counted and the widest is told; the text of a
sequence that reads pages of another one often parts wider."""


@dataclass
class Traffic:
    """What has happened so far.

    Attributes:
        random: of arrivals, lengths and cancellations.
        longest: tokens of the longest prompt.
        tie: nats by which a token may have led where a probe's text parts from that of before.
        expected: tokens and logprobs of each probe, asked alone.
        open: requests under way.
        counts: of requests by how they ended, of probes, and of probes whose text parts at a tie.
        largest_tie: nats by which the expected token led in the widest of these.
        changed: probes whose text parts where no tie was.
        not_finite: answers with a logprob that is infinite or no number.
        errors: requests that ended otherwise than by their number of tokens, and what the engine raised.
    """

    random: random.Random
    longest: int
    tie: float
    expected: list[Any] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("sent", "done", "cancelled", "probes", "ties"), 0)
    )
    largest_tie: float = 0.0
    changed: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def probe(self, number: int) -> dict[str, list[int]]:
        """Prompt of a probe, the last ones of many blocks and more than one chunk."""
        length = 20 + number * (self.longest // 6)
        return {"prompt_token_ids": [5 + (17 * (number + 1) * position) % 4000 for position in range(length)]}

    def receive(self, output: Any) -> None:
        """Take what an engine answered: unfinished answers and those of cancelled requests are passed over."""
        name, answer = output.request_id, output.outputs[0]
        if not output.finished or name not in self.open:
            return
        self.open.discard(name)
        self.counts["done"] += 1
        if answer.finish_reason != "length":
            self.errors.append(f"{name} ended by {answer.finish_reason!r}")
            return
        self.check_finite(output)
        if name.startswith("probe"):
            self.counts["probes"] += 1
            self.compare(name, answer)

    def check_finite(self, output: Any) -> None:
        """Note an answer with a logprob that is infinite or no number."""
        if any(not math.isfinite(entry.logprob) for step in output.outputs[0].logprobs for entry in step.values()):
            self.not_finite.append(output.request_id)

    def compare(self, name: str, answer: Any) -> None:
        """Hold what a probe answered to what it answered alone, up to the first token that differs."""
        expected = self.expected[int(name.split("-")[1])]
        for index, (token, wanted) in enumerate(zip(answer.token_ids, expected.token_ids, strict=True)):
            if token == wanted:
                continue
            step = expected.logprobs[index]
            lead = step[wanted].logprob - step[token].logprob if token in step else math.inf
            if lead > self.tie:
                led = f"led by {lead:.3f} nats" if token in step else f"led by more than all of {len(step)} others"
                self.changed.append(f"{name}: token {index} is {token}, alone it was {wanted}, which {led}")
            else:
                self.counts["ties"] += 1
                self.largest_tie = max(self.largest_tie, lead)
            return
