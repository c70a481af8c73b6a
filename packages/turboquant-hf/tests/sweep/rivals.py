"""The rows of the compatibility tables of fused-turboquant 0.1.0 (its README), in their order."""

from __future__ import annotations

from typing import NamedTuple


class RivalRow(NamedTuple):
    """One row: its name, what that project says, and the model types that it is here."""

    name: str
    verdict: str
    model_types: tuple[str, ...]


ROWS = (
    RivalRow("Llama 3.1 / 3.2 / 3.3", "tested", ("llama",)),
    RivalRow("Qwen3", "tested", ("qwen3",)),
    RivalRow("Qwen2.5", "tested", ("qwen2",)),
    RivalRow("Mistral 7B / Small 3", "expected", ("mistral",)),
    RivalRow("Phi-4", "expected", ("phi3",)),
    RivalRow("Command R / R+", "expected", ("cohere",)),
    RivalRow("Yi 1.5", "expected", ("llama",)),
    RivalRow("InternLM 2 / 3", "expected", ("internlm3",)),
    RivalRow("Qwen3-MoE", "expected", ("qwen3_moe",)),
    RivalRow("Mixtral", "expected", ("mixtral",)),
    RivalRow("OLMoE", "expected", ("olmoe",)),
    RivalRow("Zen4-Max", "expected", ()),
    RivalRow("Qwen2-VL", "expected", ("qwen2_vl",)),
    RivalRow("InternVL 2 / 3", "expected", ("internvl",)),
    RivalRow("LLaVA (Llama, Vicuna)", "expected", ("llava",)),
    RivalRow("Qwen3.5-MoE", "expected", ("qwen3_5_moe_text",)),
    RivalRow("DeepSeek V3", "refused: latent attention", ("deepseek_v3",)),
    RivalRow("DeepSeek V3.2", "refused: latent attention", ("deepseek_v32",)),
    RivalRow("DeepSeek V4", "refused: latent attention", ("deepseek_v4",)),
    RivalRow("Llama 4 Scout / Maverick", "refused: query and key norm, chunked attention", ("llama4_text",)),
    RivalRow("Gemma 3", "refused: sliding window", ("gemma3_text",)),
    RivalRow("Mistral Small 4", "refused: sliding window", ("mistral4",)),
    RivalRow("Phi-3 / 3.5", "refused: fused projection, head_dim 96", ("phi3",)),
    RivalRow("GPT-2", "refused: no rotary embedding, fused projection", ("gpt2",)),
    RivalRow("BLOOM", "refused: no rotary embedding, fused projection", ("bloom",)),
    RivalRow("Falcon", "refused: no rotary embedding, fused projection", ("falcon",)),
    RivalRow("Nemotron 3 Super", "refused: Mamba layers", ("nemotron_h",)),
)
NOTES = {
    "Zen4-Max": "not in Transformers",
    "Mistral Small 4": "latent attention in Transformers, part of a vision model",
}
