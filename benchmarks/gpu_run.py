"""What needs a GPU, step after step on one host, within a time: correctness, kernels, Transformers, vLLM.

    python benchmarks/gpu_run.py --minutes 9 --out results_here
    python benchmarks/gpu_run.py --minutes 9 --out results_here --steps preflight tests kernels

Each step is a process of its own with a limit of its own; its output is in ``OUT/STEP.txt`` as it comes, its figures in
``OUT/STEP*.json``. With two GPUs, steps whose times count run on the first and the others beside them on the last; with
one GPU all run one after the other, in the order of the table. A step that fails or runs out of time does not stop the
others, but is named, and the exit status says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from report import table

ROOT = Path(__file__).parents[1]
TAIL = 1500


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        arguments: of the interpreter; ``{out}`` is the folder of the results.
        seconds: its limit.
        timed: whether its figures are times, so that it has the first GPU alone.
    """

    arguments: tuple[str, ...]
    seconds: float
    timed: bool


# Few test processes: those beside them are timed by a host that must not wait for a core.
PYTEST = (
    "-m",
    "pytest",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:benchmark",
    "-n",
    "6",
    "--tb=short",
    "-rfE",
    "--maxfail=20",
)
STEPS = {
    "preflight": Step(("benchmarks/serving_preflight.py", "--out", "{out}"), 280, False),
    "kernels": Step(("benchmarks/kernels.py", "--page-sizes", "128", "--json", "{out}/kernels.json"), 400, True),
    "decode": Step(("benchmarks/transformers_decode.py", "--json", "{out}/transformers_decode.json"), 500, True),
    "serving": Step(("benchmarks/serving.py", "--out", "{out}/serving.json"), 580, True),
    "soak": Step(("benchmarks/serving.py", "--soak", "10", "--out", "{out}/serving_soak.json"), 700, False),
    "tests": Step((*PYTEST, "packages/turboquant-triton/tests", "-m", "not slow"), 560, False),
}


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``code`` of the process, None when its time was up, and the ``seconds`` that it took."""

    name: str
    code: int | None
    seconds: float


def run_step(name: str, step: Step, out: Path, gpu: int, end: float) -> Outcome:
    """Run one step on ``gpu`` until its limit or ``end`` (a time of :func:`time.monotonic`)."""
    started = time.monotonic()
    limit = min(step.seconds, end - started)
    if limit <= 0:
        return Outcome(name, None, 0.0)
    command = [sys.executable, *(argument.format(out=out) for argument in step.arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with (out / f"{name}.txt").open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            # Engines and test workers are children of the step.
            os.killpg(process.pid, 9)
            process.wait()
            code = None
    return Outcome(name, code, time.monotonic() - started)


def run_lane(names: list[str], out: Path, gpu: int, end: float) -> list[Outcome]:
    return [run_step(name, STEPS[name], out, gpu, end) for name in names]


def run_all(names: list[str], out: Path, gpus: int, seconds: float) -> list[Outcome]:
    """All steps, in two lanes where there are two GPUs."""
    end = time.monotonic() + seconds
    timed = [name for name in names if STEPS[name].timed]
    lanes = [names] if gpus < 2 else [timed, [name for name in names if name not in timed]]
    with ThreadPoolExecutor(len(lanes)) as pool:
        running = [pool.submit(run_lane, lane, out, gpu * (gpus - 1), end) for gpu, lane in enumerate(lanes)]
        return [outcome for lane in running for outcome in lane.result()]


def summary(outcomes: list[Outcome], out: Path) -> str:
    """The end of each step's output, then how each ended."""
    parts = []
    for outcome in outcomes:
        log = out / f"{outcome.name}.txt"
        text = log.read_text(errors="replace") if log.exists() else ""
        parts.append(f"--- {outcome.name}\n{text[-TAIL:]}")
    ended = {0: "passed", None: "out of time"}
    rows = [[o.name, ended.get(o.code, f"failed ({o.code})"), o.seconds] for o in outcomes]
    return "\n".join([*parts, "", table(["step", "ended", "seconds"], rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of outputs and JSON files")
    parser.add_argument("--minutes", type=float, default=60.0, help="all steps together")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--gpus", type=int, help="default: as many as the driver lists")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpus = arguments.gpus
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    if gpus < 1:
        raise SystemExit("no CUDA device: these steps are for a GPU; `nox` checks what a CPU can")
    outcomes = run_all(arguments.steps, arguments.out.resolve(), gpus, 60 * arguments.minutes)
    print(summary(outcomes, arguments.out))
    sys.exit(int(any(outcome.code != 0 for outcome in outcomes)))


if __name__ == "__main__":
    main()
