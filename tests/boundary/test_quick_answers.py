"""What is answered before torch is imported, which takes seconds: --help, and mistakes in flags."""

import subprocess
import sys
from pathlib import Path

import pytest

from llama.boundary import choices
from llama.model.quantize import KINDS
from llama.training.optim import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
ASKED = {
    "fsdp_train.py": (["--learning_rat", "3"], "--learning_rate"), "evaluate.py": (["--modle", "x"], "--model"),
    "generate.py": (["--promt", "x"], "--prompt"),
    "lora.py": (["--outptu", "x"], "--output"), "checkpoints.py": (["exprt", "x"], "export"),
}  # fmt: skip


def answer(script: str, *words: str) -> subprocess.CompletedProcess:
    """What a script says where torch cannot be imported."""
    program = f"import sys; sys.argv = {[str(ROOT / script), *words]}; sys.path[0] = {str(ROOT)!r}; {WITHOUT_TORCH}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("script", ASKED)
def test_help_and_mistakes_in_flags_do_not_wait_for_torch(script):
    wrong, meant = ASKED[script]
    helped, refused = answer(script, "--help"), answer(script, *wrong)
    assert helped.returncode == 0 and helped.stdout.startswith(f"usage: {script}") and helped.stderr == ""
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert refused.stderr.endswith(f"Did you mean {meant}?\n")


def test_each_command_of_checkpoints_shows_an_example():
    for command in ("list", "verify", "export"):
        assert f"example: python checkpoints.py {command} runs/" in answer("checkpoints.py", command, "--help").stdout


def test_the_names_that_flags_offer_are_those_that_the_code_knows():
    assert choices.QUANTIZED == tuple(KINDS) and choices.OPTIMIZERS == tuple(OPTIMIZERS)
