"""A second, unrelated prompt on a used cache is an error; a continuation in any form is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, CpmAntConfig, CpmAntForCausalLM, EncoderDecoderCache
from transformers.generation import GenerationConfig, GenerationMixin

from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, patch_model, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT, DynamicCache
from turboquant_hf.held_text import HeldText
from turboquant_hf.prompts import is_watched, prompts_watched
from turboquant_hf.verify import decoded_twin

from .conftest import CONFIGS, VOCABULARY, build


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, pad_token_id=0, max_new_tokens=4, do_sample=False, **{CACHE_ARGUMENT: cache}, **options)


@pytest.fixture
def more() -> torch.Tensor:
    return torch.tensor([[9, 8, 7]])


def test_a_longer_unrelated_prompt(llama: Any, prompt: torch.Tensor) -> None:
    cache = patch_model(llama)
    generate(llama, prompt, cache)
    other = torch.randint(2, 97, (1, 60), generator=torch.Generator().manual_seed(8))
    with pytest.raises(ValueError, match=r"does not begin with the 24 tokens.*reset\(\)"):
        generate(llama, other, cache)
    cache.reset()
    assert torch.equal(generate(llama, other, cache), generate(llama, other, TurboQuantCache(llama.config)))


@pytest.mark.parametrize("length", [5, 24])
def test_a_prompt_no_longer_than_the_cache(llama: Any, prompt: torch.Tensor, length: int) -> None:
    cache = patch_model(llama)
    full = generate(llama, prompt, cache)
    with pytest.raises(ValueError, match=f"has {length} tokens and the cache already holds 24"):
        generate(llama, full[:, :length], cache)


def test_continuations(llama: Any, prompt: torch.Tensor, more: torch.Tensor) -> None:
    cache = patch_model(llama)
    second = generate(llama, torch.cat((generate(llama, prompt, cache), more), 1), cache)
    branch = copy.deepcopy(cache)
    cache.crop(-10)
    third = generate(llama, torch.cat((second, more), 1), cache)
    assert third.shape == (1, second.shape[1] + 7)
    with pytest.raises(ValueError, match="does not begin"):
        generate(llama, second.flip(1).repeat(1, 2), branch)
    branch.batch_repeat_interleave(2)
    assert generate(llama, second.repeat(2, 1), branch).shape[0] == 2


def test_new_tokens_alone(llama: Any, prompt: torch.Tensor, more: torch.Tensor) -> None:
    """The mask then covers the cached tokens too, and nothing can be compared."""
    cache = patch_model(llama)
    last = generate(llama, prompt, cache)[:, -1:]
    new = torch.cat((last, more), 1)
    mask = torch.ones(1, cache.get_seq_length() + 4, dtype=torch.long)
    assert generate(llama, new, cache, attention_mask=mask).shape == (1, 8)


def test_a_prefix_that_came_in_unseen(llama: Any, prompt: torch.Tensor, more: torch.Tensor) -> None:
    cache = patch_model(llama)
    llama(prompt, **{CACHE_ARGUMENT: cache})
    full = torch.cat((prompt, more), 1)
    expected = generate(llama, full, copy.deepcopy(cache))
    assert torch.equal(generate(llama, full, cache), expected)


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"prefill_chunk_size": 6}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_a_second_turn_in_other_modes(llama: Any, prompt: torch.Tensor, more: torch.Tensor, mode: Any) -> None:
    cache = patch_model(llama)
    mode = {**mode, "eos_token_id": 1} if "prompt_lookup_num_tokens" in mode else mode
    first = generate(llama, prompt, cache, **mode)
    if "num_beams" in mode:
        # The sequences of the cache are beams, of which only one was returned.
        cache.batch_select_indices(torch.tensor([0]))
        first = cache.text._ids
    assert generate(llama, torch.cat((first, more, more), 1), cache).shape[1] > first.shape[1]


@pytest.mark.parametrize("where", ["call", "config", "assistant", "heads"])
def test_assisted_decoding_does_not_go_on(llama: Any, prompt: torch.Tensor, more: torch.Tensor, where: str) -> None:
    """Transformers puts the whole prompt behind what is cached there."""
    cache = TurboQuantCache(llama.config)
    second = torch.cat((generate(llama, prompt, cache), more), 1)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if where == "config":
        options = {"generation_config": GenerationConfig(**options)}
    elif where == "assistant":
        options = {"assistant_model": build(*CONFIGS["llama"])}
    elif where == "heads":
        options = {"use_mtp": True}
    with pytest.raises(ValueError, match="the cache holds 24 tokens, and assisted decoding puts the whole prompt"):
        generate(llama, second, cache, **options)
    assert cache.get_seq_length() == 24


def test_embeddings(llama: Any, prompt: torch.Tensor) -> None:
    cache = patch_model(llama)
    embeddings = llama.get_input_embeddings()(prompt)
    mask = torch.ones_like(prompt)
    options = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 4, "do_sample": False}
    got = llama.generate(inputs_embeds=embeddings, **{CACHE_ARGUMENT: cache}, **options)
    assert torch.equal(got, generate(llama, prompt, TurboQuantCache(llama.config))[:, -4:])


def test_a_copied_model_is_watched_as_itself(llama: Any, prompt: torch.Tensor) -> None:
    patch_model(llama)
    copied = copy.deepcopy(llama)
    assert copied.prepare_inputs_for_generation.__self__ is copied
    unpatch_model(llama)
    assert "prepare_inputs_for_generation" not in vars(llama)
    with pytest.raises(ValueError, match="not used by the model"):
        generate(copied, prompt, None, no_such_argument=1)


class TestAModelThatAddsTokens:
    """CPM-Ant puts learned tokens before each prompt: its cache holds more than the text."""

    @pytest.fixture
    def cpmant(self) -> Any:
        if "prepare_inputs_for_generation" not in vars(CpmAntForCausalLM):
            pytest.skip("this release of Transformers hands CPM-Ant single tokens, with which it fails over any cache")
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "dim_head": 32, "dim_ff": 64, "num_hidden_layers": 2}
        config = CpmAntConfig(vocab_size=VOCABULARY, prompt_length=6, segment_types=4, **sizes)
        config.eos_token_id = None
        return build(config, "eager")

    @pytest.fixture
    def cache(self, cpmant: Any) -> TurboQuantCache:
        return patch_model(cpmant, verify=False)

    def test_a_second_turn(self, cpmant: Any, cache: Any, prompt: torch.Tensor, more: torch.Tensor) -> None:
        twin = decoded_twin(TurboQuantCache(cpmant.config), cpmant.config)
        out = []
        for one in (cache, twin):
            first = generate(cpmant, prompt, one)
            out.append(generate(cpmant, torch.cat((first, more), 1), one))
        assert torch.equal(*out)
        assert cache.get_seq_length() == out[0].shape[1] - 1 + 6

    def test_another_prompt(self, cpmant: Any, cache: Any, prompt: torch.Tensor) -> None:
        full = generate(cpmant, prompt, cache)
        with pytest.raises(ValueError, match="does not begin with the 24 tokens"):
            generate(cpmant, full.flip(1).repeat(1, 2), cache)
        with pytest.raises(ValueError, match="has 24 tokens and the cache already holds 24"):
            generate(cpmant, full[:, :24], cache)

    def test_after_a_crop(self, cpmant: Any, cache: Any, prompt: torch.Tensor, more: torch.Tensor) -> None:
        full = generate(cpmant, prompt, cache)
        cache.crop(-4)
        other = torch.cat((full[:, :20], more), 1)
        assert torch.equal(generate(cpmant, other, cache)[:, :23], other)

    def test_text_cut_by_the_length_of_the_cache(
        self, cpmant: Any, cache: Any, prompt: torch.Tensor, more: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As Transformers does for models that do not say that they want all of it."""
        monkeypatch.setattr(
            type(cpmant), "prepare_inputs_for_generation", GenerationMixin.prepare_inputs_for_generation
        )
        unpatch_model(cpmant)
        patch_model(cpmant, verify=False)
        ids = torch.cat((prompt, more), 1)
        cache.text.note(prompt)
        cpmant(prompt, **{CACHE_ARGUMENT: cache})
        cache.text.measure(27)
        with pytest.raises(ValueError, match=r"^21 of the 24 tokens of the prompt reach the model: it put 6 tokens"):
            generate(cpmant, ids, cache)


def test_tokens_after_a_crop_are_not_taken_for_added_ones() -> None:
    text = HeldText()
    text.note(torch.zeros(1, 8))
    text.crop(5)
    text.measure(9)
    assert text.added == 0


class TestAModelThatWasNotPatched:
    """``generate`` checks there too, and leaves the model as it was."""

    @pytest.fixture(params=["llama", "gpt2", "falcon"])
    def untouched(self, request: pytest.FixtureRequest) -> Any:
        name = request.param
        return request.getfixturevalue(name) if name == "falcon" else build(*CONFIGS[name])

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("length", [60, 24, 5])
    def test_another_prompt(self, untouched: Any, prompt: torch.Tensor, length: int, batch: int) -> None:
        cache = TurboQuantCache(untouched.config)
        generate(untouched, prompt, cache)
        other = torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(8))
        with pytest.raises(ValueError, match=r"(start|belongs to another prompt; start) a new cache.*reset\(\)"):
            generate(untouched, other, cache)
        assert not {"prepare_inputs_for_generation", "generate"} & set(vars(untouched))
        assert not untouched._forward_pre_hooks
        cache.reset()
        expected = generate(untouched, other, TurboQuantCache(untouched.config))
        assert torch.equal(generate(untouched, other, cache), expected)

    def test_a_second_turn(self, untouched: Any, prompt: torch.Tensor, more: torch.Tensor) -> None:
        cache = TurboQuantCache(untouched.config)
        second = torch.cat((generate(untouched, prompt, cache), more), 1)
        twin = copy.deepcopy(cache)
        patch_model(untouched, verify=False)
        expected = generate(untouched, second, twin)
        unpatch_model(untouched)
        assert torch.equal(generate(untouched, second, cache), expected)

    def test_a_static_cache(self, llama: Any, prompt: torch.Tensor) -> None:
        cache = TurboQuantStaticCache(llama.config, 40)
        generate(llama, prompt, cache)
        with pytest.raises(ValueError, match="does not begin with the 24 tokens"):
            generate(llama, prompt.flip(1).repeat(1, 2)[:, :30], cache)
        cache.reset()
        with pytest.raises(ValueError, match="do not fit into a static cache with max_cache_len = 40"):
            generate(llama, prompt.repeat(1, 2), cache)

    def test_sinks_begin_behind_the_padding(self, llama: Any, prompt: torch.Tensor) -> None:
        """``generate`` has the mask, so that nobody needs to call ``note_padding`` there."""
        mask = torch.ones_like(prompt)
        mask[:, :5] = 0
        cache = TurboQuantCache(llama.config, sink_tokens=2)
        generate(llama, prompt, cache, attention_mask=mask)
        assert cache.layers[0].packed_sequences.sinks.starts.tolist() == [5]

    @pytest.mark.filterwarnings("ignore:.*past_key_values. is deprecated:FutureWarning")
    def test_a_cache_by_its_older_name(self, llama: Any, prompt: torch.Tensor) -> None:
        """Transformers 5.24 still takes it."""
        cache = TurboQuantCache(llama.config)
        options = {"past_key_values": cache, "max_new_tokens": 4, "pad_token_id": 0}
        llama.generate(prompt, **options)
        with pytest.raises(ValueError, match="does not begin with the 24 tokens"):
            llama.generate(prompt.flip(1).repeat(1, 2), **options)

    def test_blocks_of_several_threads(self, llama: Any) -> None:
        with prompts_watched(llama):
            with prompts_watched(llama):
                pass
            assert "prepare_inputs_for_generation" in vars(llama)
            assert not is_watched(llama)
        assert "prepare_inputs_for_generation" not in vars(llama)

    def test_a_model_that_is_patched_meanwhile(self, llama: Any) -> None:
        """In another thread, while this one generates."""
        with prompts_watched(llama):
            patch_model(llama, verify=False)
        assert is_watched(llama)
        unpatch_model(llama)
        assert not llama._forward_pre_hooks
        assert "prepare_inputs_for_generation" not in vars(llama)

    def test_other_caches_are_left_alone(self, llama: Any, prompt: torch.Tensor) -> None:
        TurboQuantCache(llama.config)
        stock = DynamicCache(config=llama.config)
        assert torch.equal(generate(llama, prompt, stock), generate(llama, prompt, None))


@pytest.mark.parametrize("is_patched", [True, False])
def test_the_decoder_of_an_encoder_decoder(prompt: torch.Tensor, is_patched: bool) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64, forced_eos_token_id=None, **sizes
    )
    config.eos_token_id = None
    torch.manual_seed(0)
    bart = BartForConditionalGeneration(config).eval()
    if is_patched:
        patch_model(bart, verify=False)
    cache = EncoderDecoderCache(TurboQuantCache(config), DynamicCache())
    generate(bart, prompt, cache)
    with pytest.raises(ValueError, match=r"prompt of 1 tokens goes behind the \d that the cache holds"):
        generate(bart, prompt.flip(1), cache)
