"""No request of a serving engine waits for a compiler: its start compiles every form that its decode steps launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_start_of_an_engine_compiles_every_form_of_a_decode_step() -> None:
    program = Path(__file__).with_name("warm_forms.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads(result.stdout) == []
