"""Import one installed package, load its entry points and make one call."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, distribution, version
from pathlib import Path
from typing import Any


def check_core() -> None:
    import torch

    from turboquant_core import TurboQuantKVCache

    cache = TurboQuantKVCache(batch=1, kv_heads=2, head_dim=64, bits=4)
    keys = torch.randn(1, 2, 5, 64, generator=torch.Generator().manual_seed(0))
    cache.append(keys, keys)
    error = (cache.read().keys - keys).norm() / keys.norm()
    assert error < 0.15, f"4-bit keys come back with a relative error of {error:.3f}"
    check_core_data(keys)


def check_core_data(keys: Any) -> None:
    """What is read from files beside the code."""
    from turboquant_core.doctor import default_text
    from turboquant_core.trellis import TurboQuantTrellis

    quantizer = TurboQuantTrellis(64, 3)
    error = (quantizer.decode(quantizer.encode(keys)) - keys).norm() / keys.norm()
    assert error < 0.2, f"trellis-coded keys come back with a relative error of {error:.3f}"
    assert len(default_text()) > 1000


def check_entry(entry: EntryPoint) -> None:
    """Make what an entry point names, or ask a command for its version."""
    loaded = entry.load()
    if entry.group == "console_scripts":
        subprocess.run([Path(sys.executable).with_name(entry.name), "--version"], check=True)
    else:
        loaded()


def main(package: str) -> None:
    """Smoke-test ``turboquant-<package>``; an exception is a failure."""
    name = f"turboquant-{package}"
    module = import_module(f"turboquant_{package}")
    assert module.__version__ == version(name)
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert not missing, f"{name} lists names that it does not have: {missing}"
    entries = distribution(name).entry_points
    for entry in entries:
        check_entry(entry)
    check_core()
    print(f"{name} {module.__version__}; entry points: {', '.join(entry.name for entry in entries) or 'none'}")


if __name__ == "__main__":
    main(sys.argv[1])
