"""The short form of benchmarks/crash.py: real processes, killed with -9 while they write, resumed, compared bitwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("kills", "faults"), [(3, 3), pytest.param(30, 12, marks=pytest.mark.slow)])
def test_no_kill_and_no_disk_error_loses_or_changes_anything(tmp_path, kills, faults):
    """R1, R3, R9, R23: full, asynchronous and LoRA runs of two ranks."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/crash.py"), "--kills", str(kills), "--faults",
                           str(faults), "--output", str(tmp_path / "table.json")], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    table = json.loads((tmp_path / "table.json").read_text())["total"]
    assert table["kills"] >= kills and table["disk errors"] >= faults
    assert table["published checkpoints damaged or lost"] == table["PROBLEMS"] == 0
    assert table["bitwise equal to the reference"] == table["runs brought to their end"] >= kills // 2 + faults
