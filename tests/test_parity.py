"""The short form of benchmarks/parity.py: every setting of parallelism does what one process does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from five_steps import MOVED, SETTINGS, Runs, has_float64, is_near

ROOT = Path(__file__).resolve().parents[1]
# Each setting with one thing to train, in turn, so that all are there.
CASES = []
for number, (setting, about) in enumerate(SETTINGS.items()):
    if about.ranks > 1:
        CASES.append((setting, about.trained[number % len(about.trained)]))
FAST = [("tensor-2", "lora-tied")]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("setting, trained", CASES)
def test_a_setting_does_what_one_process_does(runs, setting, trained):
    """C1, C2, C5, C11, C31: losses, gradient norms, updated weights and moments of five clipped steps on examples of
    very unequal length, with ranks that get no label and no example."""
    dtype = torch.float64 if has_float64(SETTINGS[setting], trained) else torch.float32
    found = runs.parity(setting, trained, dtype)
    assert is_near(found, setting, dtype), found


@pytest.mark.slow
@pytest.mark.parametrize("saver, reader", zip(MOVED, MOVED[1:] + MOVED[:1], strict=True))
def test_a_checkpoint_of_one_setting_continues_under_another(runs, saver, reader):
    """C11, R7: the steps that are left, the weights, the moments and the export are those of the run that went on."""
    found = runs.moved(saver, reader, "all-tied")
    assert is_near(found, saver, torch.float32), found


@pytest.mark.slow
@pytest.mark.parametrize("setting", MOVED)
def test_a_checkpoint_continues_bit_for_bit_under_its_own_setting(runs, setting):
    assert runs.moved(setting, setting, "all-tied")["bitwise"]


def test_a_mistyped_setting_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/parity.py"), "--settings", "full-3"], text=True,
                          capture_output=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "--settings full-3: unknown, expected some of alone, " in done.stderr
