"""The benchmarks of greedy text and of needles measure what they say, on the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from lab_text import agreement, compare, figures, pieces, write  # noqa: E402
from retrieval import answers, batches  # noqa: E402

from turboquant_hf import TurboQuantCache, patch_model, unpatch_model  # noqa: E402

LENGTH, TOKENS = 48, 12


@pytest.fixture(scope="module")
def model() -> Any:
    folder = ROOT / "examples" / "models" / "tiny"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "models" / "tiny", local_files_only=True)
    return pieces(tokenizer, (ROOT / "examples" / "data" / "constitution.txt").read_text(encoding="utf-8"), 3, LENGTH)


@pytest.fixture(scope="module")
def written(model: Any, prompts: Tensor) -> Tensor:
    return write(model, prompts, TOKENS)


def packed(model: Any, bits: float = 4) -> TurboQuantCache:
    return patch_model(model, bits, verify=False)


def test_full_precision_writes_what_generate_writes(model: Any, prompts: Tensor, written: Tensor) -> None:
    unpatch_model(model)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    # generate() suppresses the end token to reach the length; up to a first one the texts are the same.
    kept = (written != model.generation_config.eos_token_id).long().cumprod(1).bool()
    assert kept.sum() > TOKENS
    assert torch.equal(generated[:, LENGTH:][kept], written[kept])


def test_an_exact_cache_agrees_in_every_step(model: Any, prompts: Tensor, written: Tensor) -> None:
    unpatch_model(model)
    assert agreement(model, DynamicCache(config=model.config), prompts, written).all()


def test_sequences_of_a_batch_are_measured_as_if_alone(model: Any, prompts: Tensor, written: Tensor) -> None:
    together = agreement(model, packed(model), prompts, written)
    alone = [agreement(model, packed(model), p, w) for p, w in zip(prompts.split(1), written.split(1), strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert together.shape == (len(prompts), TOKENS - 1)


def test_a_free_run_differs_first_where_agreement_fails_first(model: Any, prompts: Tensor, written: Tensor) -> None:
    options = {"bits": 2, "recent_tokens": 0}
    equal, free = compare(model, options, prompts.split(2), list(written.split(2)))
    prefixes = [x.long().cumprod(1).sum(1).tolist() for x in (equal, free)]
    assert prefixes[0] == prefixes[1]
    assert not free.all()


def test_figures_are_those_of_the_steps() -> None:
    equal = torch.tensor([[True, True, True], [True, False, True], [False, True, True]])
    free = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert figures(equal, free) == {
        "prompts": 3,
        "tokens": 9,
        "same_top": pytest.approx(7 / 9),
        "identical_texts": 1,
        "mean_equal_prefix": pytest.approx(4 / 3),
        "shortest_equal_prefix": 0,
        "same_place_in_a_free_run": pytest.approx(4 / 9),
    }


def test_a_needle_counts_when_every_token_of_the_answer_is_the_greedy_one(
    model: Any, prompts: Tensor, written: Tensor
) -> None:
    expected = written[:, :4].clone()
    expected[1, 3] = (expected[1, 3] + 1) % model.config.vocab_size
    unpatch_model(model)
    found = answers(model, DynamicCache(config=model.config), prompts, expected, 20)
    assert found == [True, False, True]


def test_needles_of_one_batch_are_equally_long() -> None:
    rows = [{"length": n, "prompt_ids": [0] * n, "answer_ids": [0]} for n in (5, 3, 5, 5, 3)]
    sizes = [[row["length"] for row in group] for group in batches(rows, 2)]
    assert sizes == [[5, 5], [5], [3, 3]]


def test_the_page_says_what_the_file_says() -> None:
    caches = json.loads((ROOT / "benchmarks" / "results" / "text_lab.json").read_text())["results"]["caches"]
    page = " ".join((ROOT / "docs" / "hf.md").read_text(encoding="utf-8").split())
    four, three = caches["4 bit"], caches["3 bit"]
    assert four["same_top"] >= 0.95
    for sentence in (
        f"Of the {four['tokens']} that a cache decides",
        f"{four['same_top']:.1%} at 4 bits and {three['same_top']:.1%} at 3".replace("%", " %"),
        f"{four['mean_equal_prefix']:.2f} tokens on average at 4 bits, {three['mean_equal_prefix']:.2f} at 3",
        f"{four['same_place_in_a_free_run']:.0%} and {three['same_place_in_a_free_run']:.0%}".replace("%", " %"),
    ):
        assert sentence in page
