"""What needs a GPU, step after step on one host, within a time: correctness, kernels, quality, Transformers, vLLM.

    python benchmarks/gpu_run.py --minutes 9 --out results_here
    python benchmarks/gpu_run.py --minutes 9 --out results_here --steps quick kernels --fa3 fa3.so
    python benchmarks/gpu_run.py --minutes 9 --out results_here --steps quality long-text needles \
        --model MODEL --text TEXT --prompts PROMPTS
    python benchmarks/gpu_run.py --minutes 9 --out results_here --steps soak --soak 5

Each step is a process of its own with a limit of its own; its output is in ``OUT/STEP.txt`` as it comes, its figures in
``OUT/STEP*.json``, the tracebacks of failed tests in ``OUT/STEP.failures`` as they happen. With two GPUs, steps whose
times count run on the first and the others beside them on the last; with one GPU all run one after the other, in the
order of the command line. A step that fails or runs out of time does not stop the others, but is named, and the exit
status says so.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deadline import heed_interrupts, kill_group
from report import table
from serving_soak import STARTING_SECONDS

ROOT = Path(__file__).parents[1]
TAIL = 1500
# Seconds in which a step that is told to end may write what it knows.
LAST_WORDS = 8
# A soak ends its engine by itself when that is late, and must have the time to say so.
SOAK_SECONDS = STARTING_SECONDS + 30


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        arguments: of the interpreter; ``{out}`` is the folder of the results, ``{step}`` the name, ``{workers}`` how
            many processes may run beside one another, ``{soak}`` the minutes of random traffic,
            ``{model}``, ``{text}`` and ``{prompts}`` what quality is measured on.
        seconds: its limit, beside the minutes of random traffic.
        timed: whether its figures are times, so that it has the first GPU alone.
    """

    arguments: tuple[str, ...]
    seconds: float
    timed: bool


PACKAGE = "packages/turboquant-triton/tests"


def tests(seconds: float, *arguments: str) -> Step:
    """Tests in few processes: those beside them are timed by a host that must not wait for a core.

    A process that has nothing left to do takes over tests: a few take minutes.
    """
    plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "failures_at_once")
    options = (*plugins, "-n", "{workers}", "--dist", "worksteal")
    report = ("--tb=short", "-rfE", "--maxfail=40", "--junitxml={out}/{step}.xml")
    return Step(("-m", "pytest", "-q", *options, *report, *arguments), seconds, False)


def sweep(seconds: float, *classes: str) -> Step:
    """Launch parameters of ``classes``, compiled by as many processes as there are workers."""
    command = ("benchmarks/kernels.py", "--page-sizes", "128", "--json", "{out}/{step}.json")
    return Step((*command, "--processes", "{workers}", "--sweep", *classes), seconds, True)


def decoding(seconds: float, mode: str, *arguments: str) -> Step:
    """Caches of Transformers, with steps run in ``mode``; compiling takes most of the time of all modes but one."""
    return Step(
        ("benchmarks/transformers_decode.py", "--json", "{out}/transformers_{step}.json", "--modes", mode, *arguments),
        seconds,
        True,
    )


def quality(seconds: float, *sweeps: str) -> Step:
    """Sweeps of the KL divergence; its plot stays with the results."""
    files = ("--json", "{out}/quality_{step}.json", "--plot", "{out}/quality_{step}.png")
    command = ("benchmarks/quality.py", "{model}", "{text}", "--device", "cuda", *files)
    return Step((*command, "--sweep", *sweeps), seconds, False)


def needles(seconds: float, *variants: str) -> Step:
    """A hundred needle prompts of each length through caches in ``variants``."""
    command = ("benchmarks/retrieval.py", "{model}", "{prompts}", "--device", "cuda")
    size = ("--each", "100", "--batch", "10", "--chunk", "512", "--json", "{out}/quality_{step}.json")
    return Step((*command, *size, "--variants", *variants), seconds, False)


STEPS = {
    "quick": tests(
        150,
        *(f"{PACKAGE}/test_{name}.py" for name in ("quantize", "encode", "conformance")),
        "-k",
        "test_quantize or scale_rule or few_values or (TestPermuteHalf and (attend or store or encode))",
    ),
    "kernels": Step(("benchmarks/kernels.py", "--processes", "{workers}", "--json", "{out}/kernels.json"), 420, True),
    "sweep-128": sweep(240, "4/128/4", "3/128/4", "2/128/4"),
    "sweep-store": sweep(90, "store/4/128", "store/3/128"),
    "sweep-other": sweep(240, "4/64/4", "3/256/4", "4/128/16", "3/64/4", "2/64/4"),
    "preflight": Step(("benchmarks/serving_preflight.py", "--out", "{out}"), 420, False),
    "decode": decoding(500, "eager"),
    "serving": Step(("benchmarks/serving.py", "--out", "{out}/serving.json"), 580, True),
    "soak": Step(
        ("benchmarks/serving.py", "--soak", "{soak}", "--out", "{out}/serving_soak.json"), SOAK_SECONDS, False
    ),
    "operators": tests(200, *(f"{PACKAGE}/test_{name}.py" for name in ("operators", "attend", "exact", "launch"))),
    "tests": tests(
        560, PACKAGE, "-m", "not slow", *(f"--ignore={PACKAGE}/test_{name}.py" for name in ("conformance", "compile"))
    ),
    "conformance": tests(560, f"{PACKAGE}/test_conformance.py"),
    "quality": quality(300, "methods"),
    "long-text": quality(200, "windows", "defaults", "--context", "4096"),
    "needles": needles(400, "defaults", "windows", "--windows", "4,16", "4,64"),
    "decode-graphs": decoding(560, "graphs", "--cases", "1x4096", "8x4096", "1x32768", "1x131072"),
    "decode-compiled": decoding(560, "compiled", "--cases", "1x4096", "1x131072"),
}


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``code`` of the process, None when its time was up, and the ``seconds`` that it took."""

    name: str
    code: int | None
    seconds: float


@dataclass(frozen=True)
class Subject:
    """What quality is measured on: a Hugging Face folder, a text, and needle prompts of that model's tokenizer."""

    model: Path = ROOT / "examples" / "models" / "tiny"
    text: Path = ROOT / "examples" / "data" / "constitution.txt"
    prompts: Path | None = None

    def lacks(self, name: str) -> str | None:
        """Why a step cannot run; None where it can."""
        needed = {word: own for word, own in vars(self).items() if f"{{{word}}}" in STEPS[name].arguments}
        missing = [word for word, own in needed.items() if own is None or not own.exists()]
        return f"step {name} needs --{missing[0]}, and {needed[missing[0]]} is not there" if missing else None


@dataclass(frozen=True)
class Run:
    """What holds for all steps: folder of the results, processes beside one another, FlashAttention-3, the end.

    ``end`` is a time of :func:`time.monotonic`; ``subject`` is what quality is measured on; ``soak`` are the minutes of
    random traffic.
    """

    out: Path
    workers: int
    fa3: Path | None
    end: float
    subject: Subject = Subject()
    soak: float = 10.0

    def command(self, name: str) -> list[str]:
        """Command line of a step."""
        given = {"out": self.out, "step": name, "workers": self.workers, "soak": self.soak, **vars(self.subject)}
        words = [argument.format(**given) for argument in STEPS[name].arguments]
        library = ["--fa3", str(self.fa3)] if name == "kernels" and self.fa3 is not None else []
        return [sys.executable, *words, *library]

    def seconds(self, name: str) -> float:
        """What is left for a step: until its limit or the end of the run."""
        traffic = 60 * self.soak if "{soak}" in STEPS[name].arguments else 0.0
        return min(STEPS[name].seconds + traffic, self.end - time.monotonic())

    def environment(self, name: str, gpu: int) -> dict[str, str]:
        """Variables of a step's process."""
        path = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONPATH": path, "FAILURES": str(self.out / f"{name}.failures")}
        return {**os.environ, **own, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the step to end, so that it may still write what it knows, then end it with all its children."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS)
    kill_group(process)
    process.wait()


def run_step(name: str, run: Run, gpu: int) -> Outcome:
    """Run one step on ``gpu`` until its limit or the end of the run."""
    started = time.monotonic()
    limit = run.seconds(name)
    if limit <= 0:
        return Outcome(name, None, 0.0)
    with (run.out / f"{name}.txt").open("w") as sink:
        process = subprocess.Popen(
            run.command(name),
            cwd=ROOT,
            env=run.environment(name, gpu),
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            stop(process)
            code = None
    return Outcome(name, code, time.monotonic() - started)


def run_lane(names: list[str], run: Run, gpu: int) -> list[Outcome]:
    outcomes = []
    for name in names:
        outcomes.append(run_step(name, run, gpu))
        print(f"{name}: {ended(outcomes[-1])}, {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def run_all(names: list[str], run: Run, gpus: int) -> list[Outcome]:
    """All steps, in two lanes where there are two GPUs."""
    # Steps inherit it, and are told to end by SIGINT.
    heed_interrupts()
    timed = [name for name in names if STEPS[name].timed]
    lanes = [names] if gpus < 2 else [timed, [name for name in names if name not in timed]]
    with ThreadPoolExecutor(len(lanes)) as pool:
        running = [pool.submit(run_lane, lane, run, gpu * (gpus - 1)) for gpu, lane in enumerate(lanes)]
        return [outcome for lane in running for outcome in lane.result()]


def ended(outcome: Outcome) -> str:
    return {0: "passed", None: "out of time"}.get(outcome.code, f"failed ({outcome.code})")


def summary(outcomes: list[Outcome], out: Path) -> str:
    """The end of each step's output, then how each ended."""
    parts = []
    for outcome in outcomes:
        log = out / f"{outcome.name}.txt"
        text = log.read_text(errors="replace") if log.exists() else ""
        parts.append(f"--- {outcome.name}\n{text[-TAIL:]}")
    rows = [[outcome.name, ended(outcome), outcome.seconds] for outcome in outcomes]
    return "\n".join([*parts, "", table(["step", "ended", "seconds"], rows)])


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, or ``words`` in its place; ``subject`` and ``steps`` are complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of outputs and JSON files")
    parser.add_argument("--minutes", type=float, default=60.0, help="all steps together")
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="default: all; needles where there are --prompts")
    parser.add_argument("--gpus", type=int, help="default: as many as the driver lists")
    parser.add_argument("--workers", type=int, default=6, help="test and compile processes beside one another")
    parser.add_argument("--fa3", type=Path, help="vLLM's _vllm_fa3_C shared library; an installed vLLM otherwise")
    parser.add_argument("--model", type=Path, default=Subject.model, help="folder of the model for quality")
    parser.add_argument("--text", type=Path, default=Subject.text, help="text for quality")
    parser.add_argument("--prompts", type=Path, help="needle prompts for that model (retrieval.py says what they are)")
    parser.add_argument("--soak", type=float, default=Run.soak, metavar="MINUTES", help="random traffic of step soak")
    arguments = parser.parse_args(words)
    # Steps run in the root of the repository.
    given = (arguments.model, arguments.text, arguments.prompts)
    arguments.subject = Subject(*(path and path.resolve() for path in given))
    if arguments.steps is None:
        arguments.steps = [name for name in STEPS if name != "needles" or arguments.prompts]
    elif "soak" in arguments.steps and arguments.soak >= arguments.minutes:
        parser.error(
            f"--soak {arguments.soak:g} does not end within --minutes {arguments.minutes:g}, of which it also needs up "
            f"to {STARTING_SECONDS / 60:g} to start: ask for fewer minutes of traffic"
        )
    for name in arguments.steps:
        if (lacking := arguments.subject.lacks(name)) is not None:
            parser.error(lacking)
    return arguments


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpus = arguments.gpus
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    if gpus < 1:
        raise SystemExit("no CUDA device: these steps are for a GPU; `nox` checks what a CPU can")
    end = time.monotonic() + 60 * arguments.minutes
    run = Run(arguments.out.resolve(), arguments.workers, arguments.fa3, end, arguments.subject, arguments.soak)
    outcomes = run_all(arguments.steps, run, gpus)
    print(summary(outcomes, arguments.out))
    sys.exit(int(any(outcome.code != 0 for outcome in outcomes)))


if __name__ == "__main__":
    main()
