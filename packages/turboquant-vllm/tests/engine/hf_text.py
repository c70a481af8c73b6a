"""Greedy text over the packed cache of turboquant-hf: ``python hf_text.py JOB``.

The last line is JSON: the tokens of the prompts and those written.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID251 - what the plug-in is compared with

from turboquant_hf import patch_model  # noqa: TID251
from turboquant_hf.compat import CACHE_ARGUMENT  # noqa: TID251


@torch.inference_mode()
def write(model: Any, cache: Any, prompt: list[int], tokens: int) -> list[int]:
    written: list[int] = []
    given = torch.tensor([prompt])
    for _ in range(tokens):
        given = model(given, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
        written.append(int(given))
    return written


def main() -> None:
    job = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in job["texts"]]
    written = []
    for prompt in prompts:
        cache = patch_model(model, verify=False, **job["cache"])
        written.append(write(model, cache, prompt, job["tokens"]))
    print(json.dumps({"prompts": prompts, "written": written}))


if __name__ == "__main__":
    main()
