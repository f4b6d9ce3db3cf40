"""--config: the flags of a file are checked as flags are, and those on the command line count more."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from llama.boundary.command_line import parse
from llama.boundary.config_file import flags_from
from llama.boundary.errors import UserError
from llama.training.settings import TrainingSettings


def written(folder: Path, content: object) -> Path:
    path = folder / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def parsed(path: Path, *arguments: str) -> TrainingSettings:
    return parse(TrainingSettings, ["--config", str(path), *arguments])


def test_flags_of_a_file_are_taken_and_those_of_the_command_line_count_more(tmp_path):
    path = written(tmp_path, {"learning_rate": 1, "max_steps": 5, "compile": True, "async_save": True, "epochs": None})
    expected = TrainingSettings(config=str(path), learning_rate=1.0, max_steps=5, compile=True, async_save=True)
    found = parsed(path)
    assert found == expected and type(found.learning_rate) is float
    found = parsed(path, "--max_steps", "0", "--compile", "false", "--cpu_offload")
    assert (found.max_steps, found.compile, found.async_save, found.cpu_offload) == (0, False, True, True)


def test_a_run_json_gives_its_flags_without_those_of_that_one_run(tmp_path):
    """The new run has a folder of its own, and begins at step 0."""
    was = TrainingSettings(learning_rate=0.1, seed=3, output="runs/old", resume="newest", allow_changed="seed",
                           config="first.json")  # fmt: skip
    path = written(tmp_path, {"version": "0.1.0", "settings": asdict(was), "identity": {"steps": 7}, "ranks": 4})
    assert parsed(path) == TrainingSettings(learning_rate=0.1, seed=3, config=str(path))
    assert parsed(written(tmp_path, {"output": "runs/mine"})).output == "runs/mine"


@pytest.mark.parametrize("content, told", [
    ({"learning_rat": 1e-4}, "'learning_rat' is no setting; did you mean learning_rate?"),
    ({"learning-rate": 1e-4}, "'learning-rate' is no setting; did you mean learning_rate?"),
    ({"\x1b[1m\n": 1}, r"'\x1b[1m\n' is no setting; --help lists them"),
    ({"steps": 100}, "'steps' is no setting; "),
    ({"config": "other.json"}, "'config' is no setting; a file cannot name another one"),
    ({"settings": {"seed": 1}, "max_steps": 5, "epochs": 2}, 'epochs, max_steps beside "settings", where'),
    ({"settings": {"seed": 1, "global_batch": 64}}, "'global_batch' is no setting; "),
    ({"settings": 3}, "'settings' is no setting; "),
    ({"seed": "3"}, "seed is '3', expected a whole number, 0 or more"),
    ({"max_steps": -1}, "max_steps is -1, expected 0 or more"),
    ({"max_steps": None}, "max_steps is None, expected a whole number, 0 or more"),
    ({"learning_rate": float("nan")}, "learning_rate is nan, expected more than 0"),
    ({"compile": "false"}, "compile is 'false', expected true or false"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd', expected one of adamw, adamw8bit"),
    ({"model": ["tiny"]}, "model is ['tiny'], expected text"),
    ('{"seed": 1, "seed": 2}', "a name comes twice"),
    ("[1]", "found list, expected a JSON object"),
    ("{", "expected a JSON object"),
], ids=str)  # fmt: skip
def test_what_is_no_setting_or_out_of_range_is_one_line_that_names_file_and_key(tmp_path, content, told):
    path = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        parsed(path)
    assert str(error.value).startswith(f"{path}: ") and told in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="gone.json"):
        flags_from(tmp_path / "gone.json", TrainingSettings)


@pytest.mark.parametrize("name", ["", "runs"])
def test_a_folder_or_an_empty_name_is_no_config_file(tmp_path, monkeypatch, name):
    """--config "$FILE" with a variable that is not set would otherwise train with the defaults."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="is a folder, expected a JSON file, such as the run.json in a run's folder"):
        parse(TrainingSettings, ["--config", name])


def test_settings_of_a_file_that_contradict_each_other_or_a_flag_are_refused(tmp_path):
    path = written(tmp_path, {"lora_rank": 8, "model": "x"})
    assert parsed(path).lora_rank == 8
    with pytest.raises(UserError, match="--lora_rank 8: expected 0 with --model tiny"):
        parsed(path, "--model", "tiny")
