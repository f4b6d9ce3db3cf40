"""The short form of benchmarks/crash.py: real processes, killed with -9 while they write, resumed, compared bitwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("kills", "faults", "scenarios"), [
    (2, 1, "async"), pytest.param(24, 12, "full,async,lora", marks=pytest.mark.slow)])  # fmt: skip
def test_no_kill_and_no_disk_error_loses_or_changes_anything(tmp_path, kills, faults, scenarios):
    """R1, R3, R9, R23: full, asynchronous and LoRA runs of two ranks; the long form at every kind of change."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/crash.py"), "--kills", str(kills), "--faults",
                           str(faults), "--scenarios", scenarios, "--output", str(tmp_path / "table.json")], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    table = json.loads((tmp_path / "table.json").read_text())["total"]
    assert table["kills"] >= kills and table["disk errors"] >= faults
    assert table["published checkpoints damaged or lost"] == table["PROBLEMS"] == 0
    if kills > 20:
        assert {f"at a {call}" for call in ("write", "pwrite", "fsync", "mkdir")} <= table.keys()
    assert table["bitwise equal to the reference"] == table["runs brought to their end"] >= kills // 2 + faults
