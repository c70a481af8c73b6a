"""What CI sweeps: every family that the documentation names; the rest is ``nox -s sweep``."""

from __future__ import annotations

SUBSET = (
    "bloom",
    "cohere",
    "deepseek_v2",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt2",
    "gpt_oss",
    "gptj",
    "granite",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "olmo",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "starcoder2",
)
"""InternLM and Yi are Llama's attention; ``starcoder2`` stands for biases."""
