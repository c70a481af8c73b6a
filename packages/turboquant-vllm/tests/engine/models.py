"""Small random models of the kinds of attention that vLLM knows, as configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
ALTERNATING = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 32},
    "soft caps and windows": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 32,
        "sliding_window": 32,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "sinks and windows": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": 2 * ALTERNATING,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 256,
        },
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
    },
    "shared pages": {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "head_dim": 32,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": 2 * ["sliding_attention", *ALTERNATING],
        "sliding_window": 32,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512,
        "altup_num_inputs": 2,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "intermediate_size": 6 * [96],
        "activation_sparsity_pattern": 6 * [0.0],
    },
    "two head sizes": {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "head_dim": 32,
        "global_head_dim": 64,
        "layer_types": 2 * ALTERNATING,
        "sliding_window": 32,
        "hidden_size_per_layer_input": 0,
    },
    "state space": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_attention_heads": 2,
        "layer_types": 2 * ["mamba", "attention"],
        "layers_block_type": 2 * ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 32,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 96,
        "attention_multiplier": 0.25,
    },
    "latent": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 4,
        "moe_intermediate_size": 32,
    },
    "position biases": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": 2,
        "n_head": 4,
        "num_hidden_layers": 2,
    },
}
RANDOM: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": False,
}
"""Arguments of an engine of such a model: each prompt is computed at once."""
IDS = [[7 + (13 * i * i) % 480 for i in range(150)], list(range(20, 60)), [9, 8]]


def model(folder: Path, kind: str, **config: Any) -> str:
    """Folder of a model of :data:`MODELS`; its weights are made by the runner."""
    path = folder / kind.replace(" ", "-")
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**COMMON, **MODELS[kind], **config}))
    return str(path)
