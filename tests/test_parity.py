"""The short form of benchmarks/parity.py: every setting of parallelism does what one process does."""

import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from adapters import TOKENS, assert_near, their_logits, transformers_model
from five_steps import ADAPTERS, CONFIGS, MOVED, SETTINGS, TRAINED, Runs, is_near
from runs import final_state, run_command, steps_of, write_reviews

from llama.model import Llama, PackedDocuments
from llama.storage.peft import load_adapter
from llama.storage.pretrained import load_weights
from lora import apply_adapter

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
# What is trained changes from setting to setting, so that all of it is there. Two ranks do what four do.
LEFT_OUT = {"alone", "alone-accumulate", "alone-adamw8bit", "full-2", "grad-2", "zero1-2", "none-2",
            "full-2-compile", "full-2-adamw8bit", "full-2-accumulate", "hybrid-2x2-accumulate",
            "zero1-2-tensor-2-accumulate"}  # fmt: skip
CASES = [(name, setting.trained[number % len(setting.trained)])
         for number, (name, setting) in enumerate(SETTINGS.items()) if name not in LEFT_OUT]  # fmt: skip
AFTER = dict(zip(MOVED, [*MOVED[1:], MOVED[0]], strict=True))  # each of MOVED saves once and continues once


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), ranks)


@pytest.mark.parametrize("setting, trained", CASES)
def test_a_setting_does_what_one_process_does(runs, setting, trained):
    """C1, C2, C3, C5, C11, C31: losses, gradient norms, updated weights and moments of five clipped steps on examples
    of very unequal length, with ranks that get no label and no example."""
    dtype = torch.float64 if SETTINGS[setting].has_float64(trained) else torch.float32
    found = runs.parity(setting, trained, dtype)
    assert is_near(found, setting, dtype), found


@pytest.mark.parametrize("saver", AFTER)
def test_a_checkpoint_of_one_setting_continues_under_another(runs, saver):
    """R6: the steps that are left, the weights, the moments and the export are those of the run that went on."""
    found = runs.moved(saver, AFTER[saver], "all-tied")
    assert is_near(found, saver, torch.float32), found


@pytest.mark.parametrize("setting, trained", [("hybrid-2x2", "all-tied"), ("zero1-2-tensor-2", "all-tied"),
                                              ("zero1-2-tensor-2-adamw8bit", "all-blocks-untied")])  # fmt: skip
def test_a_checkpoint_continues_bit_for_bit_under_its_own_setting(runs, setting, trained):
    """R25: for the settings that shard most."""
    assert runs.moved(setting, setting, trained)["bitwise"]


@pytest.mark.parametrize("trained", ["all-untied", "dora-untied"])
def test_what_a_tensor_group_exports_gives_the_logits_of_one_process_in_transformers_and_peft(runs, trained):
    """R24: a model, and an adapter on the base that it was trained on."""
    shape, variant = TRAINED[trained].shape, TRAINED[trained].variant
    base, alone = runs.folder / "files" / shape / "base", runs.output("alone", trained)
    found = runs.output("zero1-2-tensor-2", trained)
    ours = Llama(CONFIGS[shape])
    if variant:
        theirs = peft.PeftModel.from_pretrained(transformers_model(base), found / "adapter")
        load_weights(ours, base)
        apply_adapter(ours, ADAPTERS[variant])
        load_adapter(ours, alone / "adapter")
    else:
        theirs = transformers_model(found / "model")
        load_weights(ours, alone / "model")
    with torch.no_grad():
        expected = ours.logits(TOKENS, PackedDocuments([len(TOKENS)]))
    assert_near(their_logits(theirs), expected)


def test_a_run_under_torchrun_continues_with_its_weights_cut_in_another_way(tmp_path):
    """R6: from FSDP on 4 ranks to ZeRO-1 over 2 tensor groups of 2; a run that was not interrupted is the oracle."""
    about = ["--data", write_reviews(tmp_path / "data", 40), "--template", "imdb", "--max_length", 96, "--max_steps", 4,
             "--save_every", 2, "--keep_checkpoints", -1, "--sample_prompts", 0]  # fmt: skip
    whole, moved = tmp_path / "whole", tmp_path / "moved"

    def train(*flags: object) -> None:
        done = run_command(*about, *flags, cwd=tmp_path, cache=tmp_path, ranks=4)
        assert done.returncode == 0, done.stderr[-3000:]

    train("--output", whole, "--sharding", "full", "--batch_size", 2)
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / "model")
    zero1 = ["--sharding", "zero1", "--tensor_parallel", 2, "--batch_size", 4]
    train("--output", moved, *zero1, "--resume", "step-000002")
    for found, expected in zip(steps_of(moved), steps_of(whole), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    expected = final_state(whole)
    for name, tensor in final_state(moved).items():
        assert (tensor - expected[name]).abs().max() <= 1e-5, name


def test_a_mistyped_setting_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/parity.py"), "--settings", "full-3"], text=True,
                          capture_output=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "--settings full-3: unknown, expected some of alone, " in done.stderr
