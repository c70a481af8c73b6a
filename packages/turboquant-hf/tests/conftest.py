"""Small random models of several families; attention made uneven, so that a wrong mask shows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from turboquant_hf import options

VOCABULARY = 97
TINY = Path(__file__).parents[3] / "examples" / "models" / "tiny"
"""A trained model with its tokenizer."""
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GQA = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 32}

CONFIGS: dict[str, tuple[PretrainedConfig, str]] = {
    "llama": (LlamaConfig(**GQA), "sdpa"),
    "llama-eager": (LlamaConfig(**GQA), "eager"),
    "qwen3": (Qwen3Config(**GQA), "sdpa"),
    "mistral": (MistralConfig(**GQA, sliding_window=None), "sdpa"),
    "phi3": (Phi3Config(**{**GQA, "hidden_size": 192, "num_attention_heads": 4, "head_dim": 48}), "sdpa"),
    "gpt2": (
        GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, eos_token_id=None),
        "sdpa",
    ),
    "gemma2": (Gemma2Config(**GQA, sliding_window=8, query_pre_attn_scalar=20), "eager"),
}
UNTOUCHED = {"falcon": FalconConfig(**COMMON, multi_query=True, new_decoder_architecture=False)}


@pytest.fixture(autouse=True)
def no_window_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short contexts would stay in the default window: these tests are about packed tokens, unless they say so."""
    if request.node.get_closest_marker("default_window") is None:
        monkeypatch.setattr(options, "RECENT_TOKENS", 0)


def build(config: PretrainedConfig, attention: str) -> Any:
    """A random model with sharper attention than at initialization."""
    torch.manual_seed(0)
    # Building writes into the config.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value", "c_attn")):
                weight.mul_(6)
    return model.eval()


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    """Every family whose attention can be registered."""
    return build(*CONFIGS[request.param])


@pytest.fixture
def llama() -> Any:
    """One model, where the family does not matter."""
    return build(*CONFIGS["llama"])


@pytest.fixture
def falcon() -> Any:
    """A model outside Transformers' attention interface."""
    return build(UNTOUCHED["falcon"], "sdpa")


@pytest.fixture
def prompt() -> torch.Tensor:
    """Token ids ``[1, 21]``."""
    return torch.randint(2, VOCABULARY, (1, 21), generator=torch.Generator().manual_seed(3))
