"""A run's folder as --model or --adapter: what is refused, and that any other folder is left as it is."""

import json
from pathlib import Path

import pytest

from llama.boundary.errors import UserError
from llama.evaluation.settings import EvaluationSettings
from llama.training.finished_run import from_runs
from lora import MergeSettings


def settings(model: object, adapter: object, quantize: str = "none") -> MergeSettings:
    return MergeSettings(model=str(model), adapter=str(adapter), output="out", quantize=quantize)


def make_run(folder: Path, left: str | None, **chosen) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"settings": {"model": "base", "quantize": "none"} | chosen}))
    if left:
        (folder / left).mkdir()
    return folder


def test_a_merge_takes_the_adapter_of_a_run_and_its_rounding(tmp_path, capsys):
    """C37: merging without the rounding that the adapter has learned to correct would be another model."""
    run = make_run(tmp_path / "run", "adapter", quantize="nf4")
    assert from_runs(settings("base", run)) == settings("base", run / "adapter", "nf4")
    assert capsys.readouterr().err == f"--adapter {run}: using {run}/adapter, over linears in nf4\n"
    assert from_runs(settings("base", run, "int8")) == settings("base", run / "adapter", "int8")


def test_prompts_are_those_of_the_run_where_no_flag_says_otherwise(tmp_path, capsys):
    """C12: the data set of another template keeps its own."""
    of_run = {"data": "mine.jsonl", "template": "mine.txt", "system": None, "control_tokens": None, "max_length": 99,
              "truncate_side": "right"}
    run = make_run(tmp_path / "run", "model", **of_run)

    def prompts(**flags) -> tuple:
        found = from_runs(EvaluationSettings(model=str(run), **flags))
        return found.template, found.max_length

    assert prompts(data="other.jsonl") == ("mine.txt", 99)
    assert f"prompts as in {run}: --template mine.txt, --max_length 99\n" in capsys.readouterr().err
    assert prompts(data="other.jsonl", template="imdb") == ("imdb", 99)
    assert prompts(data="alpaca") == (None, 512)
    make_run(tmp_path / "wrong", "model", **of_run | {"max_length": "all"})
    with pytest.raises(UserError, match="max_length is 'all', expected a whole number"):
        from_runs(EvaluationSettings(model=str(tmp_path / "wrong"), data="x"))


def test_folders_that_are_no_runs_and_hub_ids_stay_as_they_are(tmp_path, capsys):
    """Also a model's folder that somebody has copied a run.json into."""
    make_run(tmp_path / "model", None)
    (tmp_path / "model/config.json").touch()
    chosen = settings(tmp_path / "model", "nobody/an-adapter")
    assert from_runs(chosen) == chosen and capsys.readouterr().err == ""


def test_a_run_that_has_not_left_what_is_asked_for_is_one_line_with_the_way_out(tmp_path):
    unfinished = make_run(tmp_path / "unfinished", None)
    model = make_run(tmp_path / "model", "model")
    tuned = make_run(tmp_path / "tuned", "adapter", model=7)
    for chosen, expected in (
        (settings(unfinished, "a"), f"has neither model/ nor adapter/; .*checkpoints.py export {unfinished} OUT"),
        (settings("base", unfinished), f"has no adapter/; .*checkpoints.py export {unfinished} OUT"),
        (settings("base", model), "has no adapter/; it has left a model: give it to --model"),
        (settings(tuned, "a"), "has an adapter of its own, expected a base for a"),
    ):
        with pytest.raises(UserError, match=expected):
            from_runs(chosen)
