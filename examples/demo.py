"""Generate with an ordinary and with packed KV caches, and compare: text, bytes, quality, speed.

``nox -s demo``, or ``python examples/demo.py`` where the packages are installed. Everything it needs is in the
repository; it writes ``examples/output/memory.png``.
"""

from __future__ import annotations

import argparse
import textwrap
import warnings
from pathlib import Path

import torch
from comparison import BITS, Result, Sample, compare, load_model, memory_by_context
from plots import plot_memory
from tqdm import tqdm

HERE = Path(__file__).parent
WIDTH = 100
NOTES = """
bytes: keys and values of all layers, scales included; packed caches keep the last 16 tokens in 16 bits. KL divergence
(nats per token) and same top token: the text after the prompt, scored through each cache against the 16-bit cache. same
text: generated tokens before the first that differs; one close call changes all that follow, so the divergence says
more. tokens/s: of the median step, where the PyTorch reference decodes the cache at each step; times vary from run to
run and from machine to machine. The speed of packed attention comes with a GPU kernel provider."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "models" / "tiny", help="folder of a Transformers model")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "constitution.txt", help="file to continue")
    parser.add_argument("--context", type=int, default=3072, help="tokens of the prompt")
    parser.add_argument(
        "--score", type=int, default=256, help="tokens of the text that follow, for the quality figures"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "output", help="folder for the plot")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model} is no folder of a Transformers model: it has no config.json")
    if not arguments.text.is_file():
        parser.error(f"--text {arguments.text} is no file")
    for name, least in {"context": 1, "score": 1, "new_tokens": 2, "threads": 1}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}")
    return arguments


def name(bits: int | None) -> str:
    return "16-bit cache" if bits is None else f"{bits}-bit cache"


def print_texts(results: list[Result], prompt_end: str) -> None:
    print(f"\nThe prompt ends: ...{prompt_end!r}\n")
    for result in results:
        print(f"{name(result.bits)}:")
        print(textwrap.fill(" ".join(result.text.split()), WIDTH, initial_indent="    ", subsequent_indent="    "))


def print_table(results: list[Result]) -> None:
    print(
        f"\n{'cache':<13}{'bytes':>10}{'compression':>13}{'KL divergence':>15}{'same top token':>16}"
        f"{'same text':>11}{'tokens/s':>10}"
    )
    for result in results:
        quality = ["-", "-", "-"]
        if result.bits is not None:
            shared = f"{result.shared_tokens}/{result.generated}"
            quality = [f"{result.kl_divergence:.4f}", f"{100 * result.same_top:.1f} %", shared]
        print(
            f"{name(result.bits):<13}{result.stored:>10}{result.compression:>12.2f}x{quality[0]:>15}{quality[1]:>16}"
            f"{quality[2]:>11}{result.tokens_per_second:>10.1f}"
        )
    print(NOTES)


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    # So small a model gains nothing from more, and they wait for one another where anything else runs beside them.
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    sample = Sample.take(tokenizer, text, arguments.context, arguments.score, arguments.new_tokens)
    steps = len(BITS) * sample.steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tqdm(total=steps, desc="comparing caches", unit="step", ncols=WIDTH) as progress:
            results = compare(model, tokenizer, sample, progress.update)
        memory = memory_by_context(model, sample.prompt)
    print_texts(results, tokenizer.decode(sample.prompt[0, -24:]))
    print_table(results)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print("\n" + textwrap.fill(f"Warning: {message}", WIDTH))
    picture = plot_memory(memory, arguments.output / "memory.png")
    print(f"\nMemory against context: {picture}")


if __name__ == "__main__":
    main()
