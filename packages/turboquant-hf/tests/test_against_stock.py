"""Every operation on a cache, one after another, gives what the stock cache gives, when the codec loses nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, MistralConfig

from turboquant_hf import TurboQuantCache, patch_model
from turboquant_hf.compat import CACHE_ARGUMENT

from .conftest import CONFIGS, GQA, VOCABULARY, build
from .sweep.identity import IdentityProvider, identity_provider

PROMPT = 21
LONGEST_CROP = 9
SLIDING = {"compress_sliding": True}
MISTRAL = (MistralConfig(**GQA, sliding_window=12), "sdpa")
GEMMA2 = (Gemma2Config(**GQA, sliding_window=12, query_pre_attn_scalar=20), "eager")
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (CONFIGS["llama"], {}),
    "sinks": (CONFIGS["llama"], {"sink_tokens": 3}),
    "recent": (CONFIGS["llama"], {"recent_tokens": 5}),
    "sinks and recent": (CONFIGS["llama"], {"sink_tokens": 3, "recent_tokens": 5}),
    "start after": (CONFIGS["llama"], {"start_after": 23, "recent_tokens": 2}),
    "sliding": (MISTRAL, SLIDING),
    "sliding and recent": (MISTRAL, {**SLIDING, "recent_tokens": 5}),
    "sliding stays stock": (GEMMA2, {"sink_tokens": 3, "recent_tokens": 5}),
    "sliding and sinks": (GEMMA2, {**SLIDING, "sink_tokens": 3, "recent_tokens": 5}),
}
RECORDS_PAST = hasattr(DynamicCache, "activate_past_recording")


@pytest.fixture
def provider() -> Iterator[str]:
    shared = IdentityProvider()
    with identity_provider(lambda: shared) as name:  # type: ignore[arg-type]
        yield name


class Pair:
    """A model over a packed cache and over the stock cache, of left-padded sequences."""

    def __init__(self, kind: str, provider: str, *, record: bool = True) -> None:
        config, self.options = KINDS[kind]
        self.model = build(*config)
        patch_model(self.model, verify=False, **self.options)
        self.provider = provider
        self.is_recording = record and RECORDS_PAST and "liding" in kind
        self.ids = torch.Generator().manual_seed(1)
        self.begin(self.empty(), DynamicCache(config=self.model.config))

    def empty(self) -> TurboQuantCache:
        return TurboQuantCache(self.model.config, page_size=16, provider=self.provider, **self.options)

    def begin(self, packed: TurboQuantCache, stock: Any) -> None:
        self.packed, self.stock = packed, stock
        if self.is_recording:
            for cache in (packed, stock):
                cache.activate_past_recording()
        self.mask = torch.zeros(3, 0, dtype=torch.long)
        prompt = torch.ones(3, PROMPT, dtype=torch.long)
        prompt[1, :6], prompt[2, :1] = 0, 0
        self.step(PROMPT, prompt)

    @torch.no_grad()
    def step(self, tokens: int, mask: torch.Tensor | None = None) -> None:
        """Logits of both caches agree at the last token."""
        batch = self.mask.shape[0]
        ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=self.ids)
        self.mask = torch.cat((self.mask, torch.ones_like(ids) if mask is None else mask), 1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        inputs: dict[str, Any] = {"attention_mask": self.mask, "position_ids": positions, "use_cache": True}
        got, expected = (
            self.model(ids, **inputs, **{CACHE_ARGUMENT: cache}).logits[:, -1] for cache in (self.packed, self.stock)
        )
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        assert self.packed.get_seq_length() == self.stock.get_seq_length() == self.mask.shape[1]
        layers = range(len(self.stock.layers))
        assert [self.packed.get_mask_sizes(2, i) for i in layers] == [self.stock.get_mask_sizes(2, i) for i in layers]

    def crop(self, tokens: int) -> None:
        for cache in (self.packed, self.stock):
            cache.crop(-tokens)
        self.mask = self.mask[:, : self.mask.shape[1] - tokens]

    def take(self, indices: torch.Tensor, operation: str, *arguments: Any) -> None:
        for cache in (self.packed, self.stock):
            getattr(cache, operation)(*(arguments or (indices,)))
        self.mask = self.mask[indices]

    def reorder(self, order: list[int]) -> None:
        self.take(torch.tensor(order), "reorder_cache")

    def repeat(self, times: int) -> None:
        self.take(torch.arange(self.mask.shape[0]).repeat_interleave(times), "batch_repeat_interleave", times)

    def select(self, kept: list[int]) -> None:
        self.take(torch.tensor(kept), "batch_select_indices")

    def copy(self) -> None:
        """Go on with copies; what was copied from is used for something else."""
        before = self.packed, self.stock, self.mask
        copies = copy.deepcopy(before[:2])
        self.step(2)
        self.packed, self.stock, self.mask = *copies, before[2]

    def reset(self) -> None:
        self.packed.reset()
        self.begin(self.packed, DynamicCache(config=self.model.config))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "operation",
    [
        lambda pair: pair.crop(2),
        lambda pair: pair.crop(LONGEST_CROP),
        lambda pair: pair.reorder([2, 0, 0]),
        lambda pair: pair.repeat(2),
        lambda pair: pair.select([2, 0]),
        lambda pair: pair.take(torch.tensor([True, False, True]), "batch_select_indices"),
        lambda pair: pair.copy(),
        lambda pair: pair.reset(),
    ],
    ids=["crop", "crop-far", "reorder", "repeat", "select", "select-mask", "copy", "reset"],
)
def test_an_operation(kind: str, operation: Any, provider: str) -> None:
    pair = Pair(kind, provider)
    pair.step(3)
    crops = "crop" in operation.__code__.co_names
    if crops and "liding" in kind and not RECORDS_PAST:
        pytest.skip("sliding layers record their past since 5.14")
    operation(pair)
    for tokens in (1, 2, 1):
        pair.step(tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_operations(kind: str, seed: int, provider: str) -> None:
    choose = random.Random(seed)
    pair = Pair(kind, provider)
    names = ["step", "step", "reorder", "repeat", "select", "copy", "reset"]
    if "liding" not in kind or RECORDS_PAST:
        names += ["crop"] * 2
    for _ in range(8):
        batch, length = pair.mask.shape
        match choose.choice(names):
            case "crop":
                # A stock layer that records its past keeps it from one crop to the next.
                pair.step(choose.randint(1, 6))
                pair.crop(choose.randint(1, pair.mask.shape[1] - length))
            case "reorder":
                pair.reorder([choose.randrange(batch) for _ in range(batch)])
            case "repeat" if batch < 4:
                pair.repeat(2)
            case "select":
                pair.select(choose.sample(range(batch), max(batch - 1, 1)))
            case "copy":
                pair.copy()
            case "reset":
                pair.reset()
        pair.step(choose.randint(1, 4))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sliding stays stock"])
def test_a_file(kind: str, provider: str, tmp_path: Path) -> None:
    pair = Pair(kind, provider, record=False)
    pair.step(3)
    pair.packed.save(tmp_path / "cache.safetensors")
    pair.packed = pair.empty()
    pair.packed.load(tmp_path / "cache.safetensors")
    for tokens in (1, 2, 1):
        pair.step(tokens)
    pair.reorder([2, 0, 0])
    pair.step(1)


@pytest.mark.parametrize("options", [{}, {"sink_tokens": 3, "recent_tokens": 5}], ids=["plain", "windows"])
@pytest.mark.parametrize(
    "mode",
    [
        {"num_return_sequences": 3, "do_sample": True},
        {"num_return_sequences": 2, "num_beams": 2, "do_sample": True},
        {"num_return_sequences": 3, "num_beams": 3},
    ],
    ids=["sampling", "sampled beams", "beams"],
)
def test_several_answers(llama: Any, prompt: torch.Tensor, mode: Any, options: Any, provider: str) -> None:
    stock = answer(llama, prompt, DynamicCache(config=llama.config), **mode)
    patch_model(llama, verify=False)
    cache = TurboQuantCache(llama.config, page_size=16, provider=provider, **options)
    assert torch.equal(answer(llama, prompt, cache, **mode), stock)
    assert len(set(map(tuple, stock.tolist()))) > 1


@pytest.mark.parametrize("options", [{}, {"sink_tokens": 3, "recent_tokens": 5}], ids=["plain", "windows"])
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "untouched"])
def test_generate_goes_on_after_a_call_of_the_model(
    llama: Any, prompt: torch.Tensor, options: Any, patched: bool, provider: str
) -> None:
    if patched:
        patch_model(llama, verify=False)
    answers = []
    for cache in (
        TurboQuantCache(llama.config, page_size=16, provider=provider, **options),
        DynamicCache(config=llama.config),
    ):
        with torch.no_grad():
            llama(prompt[:, :9], use_cache=True, **{CACHE_ARGUMENT: cache})
            llama(prompt[:, 9:14], use_cache=True, **{CACHE_ARGUMENT: cache})
        answers.append(answer(llama, prompt, cache))
        assert cache.get_seq_length() == answers[-1].shape[1] - 1
    assert torch.equal(*answers)


def answer(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, **arguments)
