"""What turboquant-hf answers to the prompts of the serving preflight, in the form of its engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from turboquant_hf import turboquant


def transformers_texts(model: Path, prompts: list[list[int]], tokens: int, top: int, bits: int) -> list[dict[str, Any]]:
    """Greedy ``tokens`` after each prompt, by a patched model in bfloat16 with the options of the vLLM plug-in.

    Returns:
        Of each prompt ``tokens`` and, for each, the ``top`` largest ``logprobs`` by token.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
    with turboquant(loaded, bits=bits, recent_tokens=0, center_keys=False, verify=False):
        return [_text(loaded, prompt, tokens, top) for prompt in prompts]


def _text(model: Any, prompt: list[int], tokens: int, top: int) -> dict[str, Any]:
    given = torch.tensor([prompt], device=model.device)
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = [torch.log_softmax(logits[0].float(), -1).topk(top) for logits in made.logits]
    return {
        "tokens": made.sequences[0, len(prompt) :].tolist(),
        "logprobs": [dict(zip(step.indices.tolist(), step.values.tolist(), strict=True)) for step in steps],
    }
