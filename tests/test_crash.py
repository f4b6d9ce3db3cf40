"""The short form of benchmarks/crash.py: real processes, killed with -9 while they write, resumed, compared bitwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KILLS, FAULTS = 24, 8


@pytest.mark.slow
def test_no_kill_and_no_disk_error_loses_or_changes_anything(tmp_path):
    """R1, R3, R9, R23: full, asynchronous and LoRA runs of two ranks, tensor groups on four ranks; kills at every kind
    of change of the disk."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/crash.py"), "--kills", str(KILLS), "--faults",
                           str(FAULTS), "--scenarios", "full,async,lora,tensor", "--output",
                           str(tmp_path / "table.json")],
                          text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path,
                          timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    table = json.loads((tmp_path / "table.json").read_text())["total"]
    assert table["kills"] >= KILLS and table["disk errors"] >= FAULTS
    assert table["published checkpoints damaged or lost"] == table["PROBLEMS"] == 0
    assert {f"at a {call}" for call in ("write", "pwrite", "fsync", "mkdir", "rename", "replace")} <= table.keys()
    assert table["bitwise equal to the reference"] == table["runs brought to their end"] >= KILLS // 2 + FAULTS
