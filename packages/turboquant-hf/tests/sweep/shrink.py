"""Small random models from nothing but a model type: the family's own head_dim and layer kinds, little of the rest."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .special import CHANGES, LAYER_LISTS

VOCABULARY = 128
HEADS = 4
LARGEST_HEAD_DIM = 256
WINDOW = 8
LARGEST_MODEL = 40_000_000
SHARPER = 4.0
"""Queries and keys are multiplied by this each: a flat attention hides a wrong mask."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "n_inner",
            "dff",
            "intermediate_size_mlp",
            "dim_ff",
            "dense_intermediate_size",
            "shared_intermediate_size",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
        ),
        32,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
        2,
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_layer_start_index", "zero_expert_num"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention"), WINDOW),
    **dict.fromkeys(("window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    "index_topk": WINDOW,
    # Scores of few heads are zero for several keys, and which of them are chosen is chance.
    "index_n_heads": 16,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 32),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
}
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
)
HEAD_COUNTS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "attention_heads",
    "num_decoder_attention_heads",
    "num_encoder_attention_heads",
    "swa_num_attention_heads",
)
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups")
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim_model", "emb_dim", "embedding_dim", "lru_width")
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
ROLES: dict[str, Any] = {"is_decoder": True, "is_encoder_decoder": False}
"""A causal model of a family that also has encoders."""
SHARPENED = (
    "q_proj",
    "k_proj",
    "qkv",
    "query_key_value",
    "c_attn",
    "Wqkv",
    "in_proj",
    "q_b_proj",
    "kv_b_proj",
    "query",
    "attn.key",
    "self.key",
    "q_lin",
    "k_lin",
    "W_pack",
    "project_q",
    "project_k",
)


class CannotBuildError(Exception):
    """Why there is no small model of a type."""


@dataclass(frozen=True, slots=True)
class Small:
    """A small model.

    Attributes:
        model: in float32, evaluation mode.
        own_head_dim: head_dim of the family's default configuration; None where it has no such figure.
    """

    model: Any
    own_head_dim: int | None


def head_dim_of(config: Any) -> int | None:
    """head_dim that a configuration states or implies."""
    for name in ("head_dim", "dim_head", "kv_channels", "d_head"):
        if isinstance(vars(config).get(name), int):
            return int(vars(config)[name])
    width = _first(config, WIDTHS)
    heads = _first(config, HEAD_COUNTS)
    return width // heads if width and heads else None


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    # Not by attribute: one that varies between layers raises.
    found = (vars(config).get(name) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _layer_kinds(default: Any, layers: int | None) -> dict[str, Any]:
    """Every kind of layer that the default has, twice over where there is more than one."""
    changes: dict[str, Any] = {}
    for name in LAYER_LISTS:
        given = vars(default).get(name)
        if isinstance(given, list) and given:
            kinds = list(dict.fromkeys(given))
            changes[name] = (kinds * 4)[: layers or max(2, 2 * len(kinds))]
    return changes


def _changes(default: Any, layers: int | None) -> dict[str, Any]:
    has = {
        name for name in (*SIZES, *HEAD_COUNTS, *KV_HEADS, *WIDTHS, *LAYERS, *TOKENS, *ROLES) if name in vars(default)
    }
    own = head_dim_of(default) or 64
    head_dim = own if own <= LARGEST_HEAD_DIM else 64
    heads, kv = _first(default, HEAD_COUNTS), _first(default, KV_HEADS)
    kv_heads = HEADS if kv is None or kv == heads else (1 if kv == 1 else HEADS // 2)
    kinds = _layer_kinds(default, layers)
    count = max((len(given) for given in kinds.values()), default=layers or 2)
    kinds = {name: (given * count)[:count] for name, given in kinds.items()}
    figures: dict[str, Any] = {
        **{n: SIZES[n] for n in has & SIZES.keys()},
        **{n: TOKENS[n] for n in has & TOKENS.keys()},
    }
    for names, figure in ((LAYERS, count), (HEAD_COUNTS, HEADS), (KV_HEADS, kv_heads), (WIDTHS, HEADS * head_dim)):
        figures.update(dict.fromkeys(has & set(names), figure))
    # A window or a rank that a family does without stays absent.
    absent = {name for name in figures if vars(default)[name] is None and name not in TOKENS and name not in KV_HEADS}
    return {**{name: value for name, value in figures.items() if name not in absent}, **kinds}


def small_config(model_type: str) -> tuple[Any, int | None]:
    """Configuration of a small model, and the head_dim of the default one."""
    make = CONFIG_MAPPING[model_type]
    special = copy.deepcopy(CHANGES.get(model_type, {}))
    default = make(**special.pop("needed", {}))
    text = default.get_text_config(decoder=True)
    name = next((name for name in default.sub_configs if getattr(default, name, None) is text), None)
    # The text part of an encoder-decoder is a copy under other names.
    text = default if name is None else text
    changes = {**_changes(text, special.pop("layers", None)), **special}
    own = head_dim_of(text)
    if name is None:
        return make(**changes), own
    outer = {key: value for key, value in TOKENS.items() if hasattr(default, key)}
    return make(**{name: type(text)(**changes).to_dict(), **outer}), own


def sharpen(model: Any) -> None:
    """Scale the weights that make queries and keys."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and any(part in name for part in SHARPENED):
                weight.mul_(SHARPER)


def build(config: Any, attention: str | None = None, factory: Any = AutoModelForCausalLM.from_config) -> Any:
    """A random model of ``config`` with uneven attention, in float32."""
    with torch.device("meta"):
        size = sum(weight.numel() for weight in factory(copy.deepcopy(config)).parameters())
    if size > LARGEST_MODEL:
        raise CannotBuildError(f"{size / 1e6:.0f} million parameters after shrinking")
    torch.manual_seed(0)
    model = factory(config, attn_implementation=attention, dtype=torch.float32)
    sharpen(model)
    model.generation_config.use_cache = True
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def one_line(error: Exception) -> str:
    """Type and first line of an error."""
    return ": ".join((type(error).__name__, *str(error).strip().splitlines()[:1]))


def small_model(model_type: str) -> Small:
    """Build a small model of ``model_type``.

    Raises:
        CannotBuildError: and why.
    """
    try:
        config, own = small_config(model_type)
        return Small(build(config), own)
    except CannotBuildError:
        raise
    except Exception as error:
        raise CannotBuildError(one_line(error)) from error
