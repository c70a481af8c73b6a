"""A server whose batches grow and shrink does not stop to compile: few forms of each kernel serve them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# Equal and unequal query lengths, in each of the two forms, for few sequences, more and hundreds; pieces of an item in
# powers of 4; keys and values.
FORMS = {
    "attend_prepare_kernel": 12,
    "attend_warp_kernel": 2,
    "attend_portable_kernel": 2,
    "attend_merge_kernel": 7,
    "gather_kernel": 2,
    "store_kernel": 1,
    "encode_kernel": 1,
    "decode_kernel": 1,
}


def test_batches_and_lengths_compile_nothing_anew() -> None:
    program = Path(__file__).with_name("specializations.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    asked = json.loads(result.stdout)
    assert asked.keys() == FORMS.keys()
    assert all(asked[name] <= FORMS[name] for name in FORMS), asked
