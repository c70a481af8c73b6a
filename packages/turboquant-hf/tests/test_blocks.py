"""Blocks of ``turboquant()`` within one another, around threads, and around models in a wrapper."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from turboquant_core import TurboQuantError
from turboquant_hf import TurboQuantCache, check_model_compatibility, patch, patch_model, turboquant, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT

from .conftest import CONFIGS, build
from .test_modes import seq2seq


def generated(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, return_dict_in_generate=True, **arguments)


def cache_of(out: Any) -> Any:
    return out[CACHE_ARGUMENT]


def in_a_thread(call: Any) -> Any:
    """What ``call`` returns in another thread, or its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:  # noqa: BLE001
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@contextmanager
def block(model: Any, **options: Any) -> Iterator[None]:
    with turboquant(model, verify=False, **options):
        yield


def test_a_block_in_a_block(llama: Any, prompt: torch.Tensor) -> None:
    with block(llama, bits=4):
        with block(llama, bits=3):
            assert cache_of(generated(llama, prompt)).layers[0].bits == (3, 3)
        assert cache_of(generated(llama, prompt)).layers[0].bits == (4, 4)
        assert llama.config._attn_implementation == "turboquant"
    assert llama.config._attn_implementation == "sdpa"
    assert type(cache_of(generated(llama, prompt))) is DynamicCache
    assert not {"_prepare_cache_for_generation", "prepare_inputs_for_generation"} & set(vars(llama))


def test_blocks_that_end_in_another_order(llama: Any, prompt: torch.Tensor) -> None:
    """As those of coroutines may."""
    first, second = block(llama, bits=4), block(llama, bits=3)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert cache_of(generated(llama, prompt)).layers[0].bits == (3, 3)
    second.__exit__(None, None, None)
    assert type(cache_of(generated(llama, prompt))) is DynamicCache


def test_a_patched_model_stays_patched(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_model(llama, verify=False)
    with block(llama):
        pass
    assert llama.config._attn_implementation == "turboquant"

    def fails(*_: Any) -> None:
        raise TurboQuantError("no")

    monkeypatch.setattr(patch, "verify_model", fails)
    with pytest.raises(TurboQuantError, match="no"):
        patch_model(llama)
    assert llama.config._attn_implementation == "turboquant"
    unpatch_model(llama)
    assert llama.config._attn_implementation == "sdpa"


def test_threads(llama: Any, prompt: torch.Tensor) -> None:
    """A block is for all threads, as streamers need it; its options are those of one of them."""

    def other() -> None:
        with block(llama, bits=2):
            raise AssertionError("calls of both blocks would get these caches")

    with block(llama, bits=4):
        assert isinstance(in_a_thread(lambda: cache_of(generated(llama, prompt))), TurboQuantCache)
        error = in_a_thread(other)
        assert isinstance(error, RuntimeError)
        assert "open one block around all threads" in str(error)
        assert cache_of(generated(llama, prompt)).layers[0].bits == (4, 4)


def test_a_copy_of_the_model_is_in_no_block(llama: Any, prompt: torch.Tensor) -> None:
    with block(llama):
        copied = copy.deepcopy(llama)
        assert type(cache_of(generated(copied, prompt))) is DynamicCache


class Wrapper(torch.nn.Module):
    """As adapters are: it passes on what the model has, and generates by the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Wrapper, lambda model: torch.compile(model, backend="eager")], ids=["own", "compile"])
def test_a_model_in_a_wrapper(llama: Any, prompt: torch.Tensor, wrap: Any) -> None:
    wrapped = wrap(llama)
    with turboquant(wrapped):
        assert isinstance(cache_of(generated(wrapped, prompt)), TurboQuantCache)
    cache = patch_model(wrapped)
    generated(wrapped, prompt, **{CACHE_ARGUMENT: cache})
    assert [layer.path for layer in cache.summary().layers] == ["fused", "fused"]
    with pytest.raises(ValueError, match="start a new cache"):
        generated(wrapped, prompt.flip(1), **{CACHE_ARGUMENT: cache})
    assert check_model_compatibility(wrapped)["compatible"]
    unpatch_model(wrapped)
    assert llama.config._attn_implementation == "sdpa"
    assert not llama._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_drafts_of_a_model_that_is_in_a_block_too(name: str, prompt: torch.Tensor) -> None:
    """A drafting model's cache takes tokens back, also where its windows slide."""
    if name == "gemma2" and not hasattr(DynamicCache, "activate_past_recording"):
        pytest.skip("no tokens are taken back from a sliding window before Transformers 5.14")
    model, assistant = build(*CONFIGS[name]), build(*CONFIGS[name])
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    with block(model), block(assistant):
        expected = generated(model, prompt, max_new_tokens=12).sequences
        drafted = generated(model, prompt, max_new_tokens=12, assistant_model=assistant).sequences
    assert torch.equal(drafted, expected)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_decoder_keeps_cross_attention_apart(name: str) -> None:
    """Transformers puts it into the cache of the decoder where it is given that alone."""
    model, inputs = seq2seq(name)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    pair = EncoderDecoderCache(TurboQuantCache(model.config), DynamicCache())
    out = [model.generate(**inputs, **options, **{CACHE_ARGUMENT: pair})]
    cache = TurboQuantCache(model.config)
    out.append(model.generate(**inputs, **options, **{CACHE_ARGUMENT: cache}))
    with block(model):
        out.append(model.generate(**inputs, **options))
    expected, *others = (getattr(one, "sequences", one) for one in out)
    assert all(torch.equal(other, expected) for other in others)
    assert cache.get_seq_length() == pair.get_seq_length()


def test_one_cache_in_two_threads(llama: Any, prompt: torch.Tensor) -> None:
    cache = patch_model(llama, verify=False)
    errors: list[Any] = []

    def meanwhile(_: Any, scores: torch.Tensor) -> torch.Tensor:
        errors.append(in_a_thread(lambda: generated(llama, prompt, **{CACHE_ARGUMENT: cache})))
        return scores

    out = generated(llama, prompt, **{CACHE_ARGUMENT: cache}, logits_processor=[meanwhile]).sequences
    assert all("another thread is generating over this cache" in str(error) for error in errors)
    assert len(errors) == 6
    assert torch.equal(out, generated(llama, prompt, **{CACHE_ARGUMENT: TurboQuantCache(llama.config)}).sequences)
