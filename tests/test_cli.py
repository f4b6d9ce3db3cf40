"""Flags made from a dataclass: each mistake is one line, and no flag comes or goes unnoticed."""

import dataclasses
import re
import sys
from dataclasses import dataclass

import pytest

import evaluate
import fsdp_train
from llama.cli import parse, run, setting
from llama.errors import UserError


@dataclass(frozen=True)
class Example:
    model: str = setting(help="which one")
    steps: int = setting(10, "how many, 100 % of them")
    rate: float | None = setting(None, "how fast; 1 unless it is late")
    side: str = setting("left", "where", choices=("left", "right"))
    loud: bool = setting(False, "say more")


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example.py"])


def test_flags_become_a_typed_dataclass():
    assert parse(Example, ["--model", "m"]) == Example("m")
    given = parse(Example, ["--model", "m", "--steps=7", "--rate", "1e-3", "--side", "right", "--loud"])
    assert given == Example("m", 7, 0.001, "right", True)
    assert [type(value) for value in dataclasses.astuple(given)] == [str, int, float, str, bool]


@pytest.mark.parametrize("arguments, flag", [
    (["--model", "m", "--colour", "red"], "unrecognized arguments: --colour red"),
    (["--model", "m", "--step", "3"], "--step"),
    (["--model", "m", "--learning-rate", "3"], "--learning-rate"),
    (["--model", "m", "stray"], "stray"),
    (["--model", "m", "--side", "up"], "--side: invalid choice: 'up'"),
    (["--model", "m", "--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--model", "m", "--steps", "1.5"], "--steps: invalid int value: '1.5'"),
    (["--model", "m", "--rate", "fast"], "--rate: invalid float value: 'fast'"),
    (["--model", "m", "--steps"], "--steps: expected one argument"),
    (["--model", "m", "--loud", "yes"], "yes"),
    (["--steps", "3"], "required: --model"),
    ([], "required: --model"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_a_mistake_is_a_user_error_of_one_line_that_names_the_flag(arguments, flag):
    """Unknown, shortened, of the wrong kind, missing: argparse's words after the script's name."""
    with pytest.raises(UserError) as error:
        parse(Example, arguments)
    told = str(error.value)
    assert told.startswith("example.py: ") and flag in told and "\n" not in told


def help_of(settings: type, capsys) -> dict[str, str]:
    """The help text of each flag, on one line."""
    with pytest.raises(SystemExit) as stopped:
        parse(settings, ["--help"])
    assert stopped.value.code == 0
    entries = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    return {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries}


@pytest.mark.parametrize("settings", [Example, fsdp_train.Settings, evaluate.Settings])
def test_the_help_states_what_each_flag_means_and_its_default_once(settings, capsys, monkeypatch):
    """DESIGN, command line. Where None stands for "it depends", the flag's own text says on what."""
    monkeypatch.setenv("COLUMNS", "200")
    told = help_of(settings, capsys)
    for entry in dataclasses.fields(settings):
        text, expected = told[f"--{entry.name}"], f"(default: {entry.default})"
        for default, words in ((dataclasses.MISSING, "(required)"), (None, "(optional)"), (False, "(default: off)")):
            expected = words if entry.default is default else expected
        assert text.endswith(expected), text
        assert len(re.findall(r"\(default|\(required|\(optional|default:", text)) == 1, text
        assert entry.metadata["help"] in text and len(entry.metadata["help"]) > 3
    assert set(told) == {f"--{entry.name}" for entry in dataclasses.fields(settings)} | {"-h"}


TRAINING_FLAGS = """
    model data data_dir max_length truncate_side
    epochs max_steps batch_size gradient_accumulation_steps learning_rate lr_schedule warmup_ratio beta2
    weight_decay max_grad_norm seed
    dtype sharding defer_gradient_sync activation_checkpointing compile
    output eval_every eval_limit save_every keep_checkpoints resume log_every
"""
EVALUATION_FLAGS = """
    model data data_dir split limit metric batch_size max_length truncate_side dtype output predictions
"""


@pytest.mark.parametrize("settings, flags", [
    (fsdp_train.Settings, TRAINING_FLAGS), (evaluate.Settings, EVALUATION_FLAGS)])  # fmt: skip
def test_the_command_line_grows_only_on_purpose(settings, flags):
    """A new flag is a promise: whoever adds one writes it down here, and in the README."""
    assert [entry.name for entry in dataclasses.fields(settings)] == flags.split()


@pytest.mark.parametrize("rank, printed", [(None, True), ("0", True), ("1", False), ("10", False)])
def test_run_prints_a_user_error_once_and_every_rank_exits_with_status_2(monkeypatch, capsys, rank, printed):
    """R9: four ranks that find the same mistake say it once on each machine."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)

    def main():
        raise UserError("rows.jsonl:3: found\nthis, expected that")

    with pytest.raises(SystemExit) as stopped:
        run(main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err == ("rows.jsonl:3: found this, expected that\n" if printed else "")


def test_run_leaves_everything_else_alone(capsys):
    """A bug of ours keeps its traceback, and success is silent."""
    assert run(lambda: None) is None
    for error in (ValueError("ours"), OSError("ours, without a file"), SystemExit(7)):

        def main(error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            run(main)
        assert raised.value is error
    assert capsys.readouterr() == ("", "")


def test_what_the_system_refuses_is_one_line_and_an_interrupt_none(capsys):
    """R3: a full disk or a forbidden file is told by name, by whichever rank met it."""
    for error, status in ((PermissionError(13, "Permission denied", "/x/run.json"), 2), (KeyboardInterrupt(), 130)):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as stopped:
            run(main)
        assert stopped.value.code == status
    assert capsys.readouterr() == ("", "/x/run.json: Permission denied\n")


OUT_OF_RANGE = {
    "epochs": [0.0, -1.0, float("nan"), float("inf"), 1e9], "max_steps": [-1], "batch_size": [0, -3],
    "gradient_accumulation_steps": [0], "learning_rate": [0.0, -1e-3, float("nan"), float("inf")],
    "beta2": [-0.1, 1.0, float("nan")], "warmup_ratio": [-0.1, 1.1, float("nan")],
    "weight_decay": [-0.1, float("nan"), float("inf")], "max_grad_norm": [-1.0, float("nan"), float("inf")],
    "max_length": [1, 0], "seed": [-1], "eval_every": [-1], "eval_limit": [-1], "save_every": [-1],
    "keep_checkpoints": [0, -2], "log_every": [0],
}  # fmt: skip


def test_training_settings_out_of_range_are_refused_all_in_one_line():
    """C4: NaN is out of every range; ten mistakes are told at once and not one a run."""
    fsdp_train.Settings()
    for name, values in OUT_OF_RANGE.items():
        for value in values:
            with pytest.raises(UserError, match=rf"^fsdp_train.py: --{name} {value}: expected [^\n]+$") as error:
                fsdp_train.Settings(**{name: value})
            assert str(error.value).count("--") == 1
    with pytest.raises(UserError) as error:
        fsdp_train.Settings(**{name: values[0] for name, values in OUT_OF_RANGE.items()})
    assert re.findall(r"--(\w+)", str(error.value)) == list(OUT_OF_RANGE) and "\n" not in str(error.value)


def test_every_number_among_the_training_flags_has_a_range():
    """So that a new one cannot be forgotten above."""
    numbers = {entry.name for entry in dataclasses.fields(fsdp_train.Settings)
               if entry.type in (int, float, int | None, float | None)}  # fmt: skip
    assert numbers == set(OUT_OF_RANGE)
