"""Flags made from a dataclass: each mistake is one line, and no flag comes or goes unnoticed."""

import dataclasses
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import data
from llama.boundary import command_line
from llama.boundary.command_line import parse, run
from llama.boundary.errors import UserError
from llama.boundary.records import Settings, described_range, kind_of, setting
from llama.data.examples import BadRows
from llama.evaluation.settings import EvaluationSettings, GenerateSettings
from llama.training.settings import TrainingSettings
from lora import MergeSettings


@dataclass(frozen=True, kw_only=True)
class Example(Settings):
    """what to try"""

    model: str = setting(help="which one")
    steps: int = setting(10, "how many, 100 % of them", at_least=1)
    rate: float | None = setting(None, "how fast; 1 unless it is late", above=0)
    side: str = setting("left", "where", choices=("left", "right"))
    loud: bool = setting(False, "say more")

    def checks(self):
        return [("steps", "10 at most with --loud", not (self.loud and self.steps > 10))]


SETTINGS = [Example, data.Settings, TrainingSettings, EvaluationSettings, GenerateSettings, MergeSettings]


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example.py"])


def test_flags_become_a_typed_dataclass():
    assert parse(Example, ["--model", "m"]) == Example(model="m")
    given = parse(Example, ["--model", "m", "--steps=7", "--rate", "1e-3", "--side", "right", "--loud"])
    assert given == Example(model="m", steps=7, rate=0.001, side="right", loud=True)
    assert [type(value) for value in dataclasses.astuple(given)] == [str, int, float, str, bool]


@pytest.mark.parametrize("word, meant", [
    ("--lr", "--lora_rank or --learning_rate"),
    ("--bs=4", "--batch_size"),
    ("--wd", "--weight_decay"),
    ("--max-len", "--max_length"),
    ("-resume", "--resume"),
    ("--no_async_save", "--async_save"),
])  # fmt: skip
def test_initials_and_other_dashes_still_name_the_flag_that_was_meant(word, meant):
    with pytest.raises(UserError) as error:
        parse(TrainingSettings, [word])
    assert str(error.value).endswith(f"unrecognized arguments: {word}. Did you mean {meant}?")


@pytest.mark.parametrize("arguments, flag", [
    (["--model", "m", "--colour", "red"], "unrecognized arguments: --colour red"),
    (["--model", "m", "--step", "3"], "--step"),
    (["--model", "m", "--learning-rate", "3"], "unrecognized arguments: --learning-rate 3"),
    (["--model", "m", "--stepps", "3"], "unrecognized arguments: --stepps 3. Did you mean --steps?"),
    (["--model", "m", "--stepps=3"], "unrecognized arguments: --stepps=3. Did you mean --steps?"),
    (["--modle", "m", "--steps", "3"], "unrecognized arguments: --modle. Did you mean --model?"),
    (["--modle=m"], "unrecognized arguments: --modle=m. Did you mean --model?"),
    (["-model", "m"], "unrecognized arguments: -model. Did you mean --model?"),
    (["--model", "m", "\u2014stepps", "3"], "unrecognized arguments: \u2014stepps 3. Did you mean --steps?"),
    (["--model", "m", "--side", "rihgt"], "(choose from 'left', 'right'). Did you mean right?"),
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
    message = str(error.value)
    assert message.startswith("example.py: ") and flag in message and "\n" not in message


def test_a_flag_may_be_written_with_hyphens_and_its_value_keeps_them():
    """As many other programs have it; only whole names of flags are changed."""
    for words in (["--max-length", "7"], ["--max-length=7"]):
        assert parse(data.Settings, [*words, "--data", "my-rows.jsonl"]).max_length == 7
    assert parse(data.Settings, ["--data-dir=my--own-dir", "--data", "a-b"]).data_dir == "my--own-dir"


def test_settings_name_all_that_is_wrong_with_them_in_one_line():
    """C4: however they were made; a value that contradicts another one is named with it, and NaN is out of range."""
    Example(model="m", steps=11)
    for given, message in (
        ({"steps": 0}, "--steps 0: expected 1 or more"),
        ({"rate": float("nan")}, "--rate nan: expected more than 0"),
        ({"steps": 11, "loud": True}, "--steps 11: expected 10 at most with --loud"),
        ({"steps": -1, "rate": -2.0}, "--steps -1: expected 1 or more; --rate -2.0: expected more than 0"),
    ):
        for make in (lambda given=given: Example(model="m", **given),
                     lambda given=given: dataclasses.replace(Example(model="m"), **given)):
            with pytest.raises(UserError) as error:
                make()
            assert error.value.lines == [f"example.py: {message}"]
    with pytest.raises(UserError, match=r"^example.py: --steps 0: expected 1 or more$"):
        parse(Example, ["--model", "m", "--steps", "0"])


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_are_given_by_name_and_never_change(settings):
    """By position two flags could be mixed up; and a run does what was checked."""
    required = {entry.name: "x" for entry in dataclasses.fields(settings) if entry.default is dataclasses.MISSING}
    required |= {"prompt": "x"} if settings is GenerateSettings else {}
    made = settings(**required)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.model = "y"
    with pytest.raises(TypeError, match="positional"):
        settings("x", **required)


def test_a_flag_may_be_given_several_times_where_it_holds_several_texts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    given = ["--model", "m", "--prompt", "x"]
    assert parse(GenerateSettings, given).stop == ()
    for _ in range(2):  # one command line leaves nothing behind for the next
        assert parse(GenerateSettings, [*given, "--stop", "\n\n", "--stop=-b"]).stop == ("\n\n", "-b")
    with pytest.raises(UserError, match="--stop.*: expected texts that are not empty"):
        parse(GenerateSettings, [*given, "--stop", ""])


@pytest.mark.parametrize("given, problem", [
    ({}, "--prompt: expected one of --prompt, --prompts and --chat"),
    ({"prompt": "x", "chat": True}, "--prompt x: expected one of --prompt, --prompts and --chat"),
    ({"prompts": "x", "chat": True}, "--prompts x: expected one of --prompt, --prompts and --chat"),
    ({"prompts": ""}, "--prompts : expected the name of a file"),
    ({"prompt": "", "output": "x"}, "--output x: expected --prompts with it"),
    ({"prompts": "x", "output": ""}, "--output : expected the name of a file"),
])  # fmt: skip
def test_what_to_answer_is_said_exactly_once(given, problem):
    with pytest.raises(UserError) as error:
        GenerateSettings(model="m", **given)
    assert problem in str(error.value)


def help_of(settings: type, capsys) -> dict[str, str]:
    """The help text of each flag, on one line."""
    with pytest.raises(SystemExit) as stopped:
        parse(settings, ["--help"])
    assert stopped.value.code == 0
    entries = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    entries = [entry.split("\n\n")[0] for entry in entries]  # without the heading of the next group
    return {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries}


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_help_states_what_each_flag_means_its_range_and_its_default_once(settings, capsys, monkeypatch):
    """DESIGN, command line. Where None stands for "it depends", the flag's own text says on what."""
    monkeypatch.setenv("COLUMNS", "500")
    found = help_of(settings, capsys)
    for entry in dataclasses.fields(settings):
        text, described = found[f"--{entry.name}"], described_range(entry.metadata)
        default = "" if entry.default in (None, "", ()) else f"default: {entry.default}"
        if entry.default is dataclasses.MISSING:
            default = "required"
        if kind_of(entry) is bool:
            default = ""  # a switch is off unless it is given
            assert entry.default is False
        notes = "; ".join(filter(None, [described, default]))
        assert text.endswith(entry.metadata["help"] + (f" ({notes})" if notes else "")), text
        assert len(re.findall(r"\(required|default: ", text)) <= 1, text
        assert len(entry.metadata["help"]) > 3
    assert set(found) == {f"--{entry.name}" for entry in dataclasses.fields(settings)} | {"-h"}


@pytest.mark.parametrize("settings", [TrainingSettings, EvaluationSettings, GenerateSettings])
def test_the_help_shows_every_flag_once_under_the_heading_of_the_class_that_declares_it(settings, capsys):
    """A script may have fifty flags: those of one subject stand together."""
    with pytest.raises(SystemExit):
        parse(settings, ["--help"])
    groups = re.split(r"\n(?=\S.*:\n)", capsys.readouterr().out)
    found = {group.splitlines()[0]: re.findall(r"^  --(\w+)", group, re.MULTILINE) for group in groups}
    found.pop("options:")
    expected = {}
    for owner in settings.__mro__:
        if owner not in (Settings, object) and owner.__annotations__:
            expected[f"{owner.__doc__.splitlines()[0]}:"] = list(owner.__annotations__)
    usage = next(heading for heading in found if heading.startswith("usage: "))
    assert found.pop(usage) == [] and found == expected
    assert sorted(sum(found.values(), [])) == sorted(entry.name for entry in dataclasses.fields(settings))


DATA_FLAGS = "data data_dir template max_length truncate_side system control_tokens test_fraction skip_bad_rows"
SHOWING_FLAGS = DATA_FLAGS + " model show output"
TRAINING_FLAGS = DATA_FLAGS + """
    model adapter quantize train_layers lora_rank lora_alpha lora_dropout lora_targets lora_variant train_on_prompt
    epochs max_steps batch_size batch_tokens group_by_length gradient_accumulation_steps
    learning_rate lr_schedule warmup_ratio optimizer beta2 weight_decay max_grad_norm seed
    dtype sharding tensor_parallel cpu_offload defer_gradient_sync activation_checkpointing compile
    output eval_every eval_limit sample_prompts save_every save_minutes async_save keep_checkpoints
    resume allow_changed log_every track config
"""
MERGING_FLAGS = "model adapter output quantize dtype"
EVALUATION_FLAGS = DATA_FLAGS + """
    model adapter quantize split limit metric stride harness harness_path batch_size dtype output predictions
    max_new_tokens temperature top_k top_p min_p repetition_penalty no_repeat_ngram_size
    num_beams length_penalty early_stopping seed
"""

GENERATING_FLAGS = """
    template truncate_side system control_tokens skip_bad_rows max_length model adapter quantize dtype
    max_new_tokens temperature top_k top_p min_p repetition_penalty no_repeat_ngram_size
    num_beams length_penalty early_stopping seed stop
    prompt prompts chat output batch_size sharding
"""


@pytest.mark.parametrize("settings, flags", [
    (data.Settings, SHOWING_FLAGS), (TrainingSettings, TRAINING_FLAGS), (EvaluationSettings, EVALUATION_FLAGS),
    (MergeSettings, MERGING_FLAGS), (GenerateSettings, GENERATING_FLAGS),
], ids=["data", "fsdp_train", "evaluate", "lora", "generate"])  # fmt: skip
def test_the_command_line_grows_only_on_purpose(settings, flags):
    """A new flag is a promise to users: it is added here, too."""
    assert sorted(entry.name for entry in dataclasses.fields(settings)) == sorted(flags.split())


def as_rank(monkeypatch, rank: int | None) -> None:
    """torchrun's variables for this rank of four on one machine; for None, none of them."""
    values = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "MASTER_ADDR": "here", "MASTER_PORT": 29500}
    for name, value in values.items():
        monkeypatch.delenv(name, raising=False)
        if rank is not None:
            monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank, waits", [(None, False), (0, False), (1, True), (3, True)])
def test_run_prints_a_user_error_once_and_every_rank_exits_with_status_2(monkeypatch, capsys, rank, waits):
    """R9: local rank 0 speaks, and torchrun ends the others while they wait for that. One whom nobody ends is the only
    rank that has met the error, and speaks for itself."""
    as_rank(monkeypatch, rank)
    before = signal.getsignal(signal.SIGTERM)
    waited = []

    def main():
        raise UserError("rows.jsonl:3: found\nthis, expected that")

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command_line.time, "sleep", sleep)
    try:
        for printed in (not waits, True):
            with pytest.raises(SystemExit) as stopped:
                run(main)
            out, err = capsys.readouterr()
            assert stopped.value.code == 2 and out == ""
            assert err == ("rows.jsonl:3: found this, expected that\n" if printed else "")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert waited == ([command_line.PATIENCE] * 2 if waits else [])


def test_run_prints_bad_rows_a_line_each(monkeypatch, capsys):
    """R9, R15: and their number last; whatever they quote, none of them has a line break."""
    as_rank(monkeypatch, 0)

    def main():
        raise BadRows(Path("rows.jsonl"), ["rows.jsonl:3: this", "rows.jsonl:7: that"], 12, 90)

    with pytest.raises(SystemExit) as stopped:
        run(main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    expected = "rows.jsonl:3: this\nrows.jsonl:7: that\nrows.jsonl: 12 of 90 rows cannot be used; "
    assert err.startswith(expected) and err.count("\n") == 3


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


@pytest.mark.parametrize("error, status, told", [
    (PermissionError(13, "Permission denied", "/x/run.json"), 2, "/x/run.json: Permission denied\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"), (BrokenPipeError(32, "Broken pipe"), 141, ""),
], ids=["no permission", "ctrl-c", "nobody reads"])  # fmt: skip
def test_what_comes_from_outside_is_one_line_at_most(capsys, error, status, told):
    """R3: the rank that met a full disk or a forbidden file names it; Ctrl-C has no traceback."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == status and capsys.readouterr() == ("", told)


OUT_OF_RANGE = {
    "max_length": [1, 0], "test_fraction": [-0.1, 1.0, float("nan")],
    "epochs": [0.0, -1.0, float("nan"), float("inf"), 1e9], "max_steps": [-1], "batch_size": [0, -3],
    "batch_tokens": [-1, 1, 511], "lora_rank": [-1], "lora_alpha": [0.0, -1.0, float("nan"), float("inf")],
    "lora_dropout": [-0.1, 1.0, float("nan")], "gradient_accumulation_steps": [0],
    "learning_rate": [0.0, -1e-3, float("nan"), float("inf")],
    "beta2": [-0.1, 1.0, float("nan")], "warmup_ratio": [-0.1, 1.1, float("nan")],
    "weight_decay": [-0.1, float("nan"), float("inf")], "max_grad_norm": [-1.0, float("nan"), float("inf")],
    "seed": [-1], "tensor_parallel": [0, -2],
    "eval_every": [-1], "eval_limit": [-1], "sample_prompts": [-1], "save_every": [-1],
    "save_minutes": [-1.0, float("nan"), float("inf")],
    "keep_checkpoints": [0, -2], "log_every": [0],
}  # fmt: skip
OF_THE_OTHERS = {
    data.Settings: {"max_length": [1, 0], "test_fraction": [-0.1, 1.0, float("nan")], "show": [-1]},
    EvaluationSettings: {"max_length": [1, 0], "test_fraction": [-0.1, 1.0, float("nan")], "batch_size": [0],
                        "limit": [-1], "stride": [0], "max_new_tokens": [-1, (1 << 20) + 1],
                        "temperature": [-0.1, 1000.1, float("nan")], "top_k": [-1], "top_p": [0.0, 1.1],
                        "min_p": [-0.1, 1.1], "repetition_penalty": [0.0, float("inf")], "no_repeat_ngram_size": [-1],
                        "num_beams": [0], "length_penalty": [float("nan"), float("inf")], "seed": [-1]},
}
EVERY_SCRIPT = {TrainingSettings: OUT_OF_RANGE} | OF_THE_OTHERS


@pytest.mark.parametrize("settings", EVERY_SCRIPT, ids=lambda settings: settings.__module__)
def test_settings_out_of_range_are_refused_all_in_one_line(settings):
    """C4: NaN is out of every range; ten mistakes are named at once, not one in each run."""
    wrong, script = EVERY_SCRIPT[settings], "example.py"
    settings(model="x")
    for name, values in wrong.items():
        needed = {"lora_rank": 8} if name.startswith("lora_") else {}
        for value in values:
            with pytest.raises(UserError, match=rf"^{script}: --{name} {value}: expected [^\n;]+$"):
                settings(model="x", **needed | {name: value})
    with pytest.raises(UserError) as error:
        settings(model="x", **{name: values[0] for name, values in wrong.items()})
    named = re.findall(r"--(\w+) \S+: expected", str(error.value))
    assert sorted(named) == sorted(wrong) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings", EVERY_SCRIPT, ids=lambda settings: settings.__module__)
def test_every_number_among_the_flags_has_a_range(settings):
    """The list above holds every number: a new one cannot be forgotten."""
    numbers = {entry.name for entry in dataclasses.fields(settings)
               if entry.type in (int, float, int | None, float | None)}
    assert numbers == set(EVERY_SCRIPT[settings])


@pytest.mark.parametrize("settings, flags, message", [
    (TrainingSettings, {"batch_tokens": 600, "group_by_length": True}, "--batch_tokens 600: expected 0 with --gro"),
    (TrainingSettings, {"batch_tokens": 600, "max_length": 700}, "--batch_tokens 600: expected 0, or --max_length "),
    (EvaluationSettings, {"predictions": "a", "output": "a"}, "--predictions a: expected another file than --output"),
    (EvaluationSettings, {"predictions": "a", "output": "b/../a"}, "--predictions a: expected another file than --out"),
    (EvaluationSettings, {"data": "a.jsonl", "output": "./a.jsonl"}, "--output ./a.jsonl: expected another file than"),
    (EvaluationSettings, {"data": "a.jsonl", "predictions": "a.jsonl"}, "--predictions a.jsonl: expected another file"),
], ids=["packs by length", "packs too short", "one file for two", "two ways to one file", "result over the data",
        "predictions over the data"])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings, flags, message):
    """R7: and each of them alone is fine."""
    with pytest.raises(UserError, match=rf"^example.py: {message}"):
        settings(model="x", **flags)
    for name, value in flags.items():
        settings(model="x", **{name: value})


def test_the_least_and_the_most_of_each_range_are_in_it():
    """C4: as a pack that holds just the longest example."""
    TrainingSettings(max_length=2, test_fraction=0.0, epochs=1e6, max_steps=0, batch_size=1, batch_tokens=2, seed=0,
                     warmup_ratio=1.0, beta2=0.0, weight_decay=0.0, max_grad_norm=0.0, keep_checkpoints=-1,
                     tensor_parallel=1)
    TrainingSettings(test_fraction=0.999, batch_tokens=0, group_by_length=True, warmup_ratio=0.0, keep_checkpoints=1)
    EvaluationSettings(model="x", batch_size=1, limit=0, predictions="a", metric="accuracy", output="b")
    data.Settings(show=0)
