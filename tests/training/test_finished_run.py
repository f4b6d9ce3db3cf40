"""A run's folder as --model or --adapter: what is refused, and that any other folder is left as it is."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from small_checkpoints import small_state

from llama.boundary.errors import UserError
from llama.boundary.records import Settings, setting
from llama.evaluation.settings import EvaluationSettings, GenerateSettings
from llama.storage.checkpoint import Saver
from llama.storage.settings import MergeSettings
from llama.training.finished_run import from_runs


@dataclass(frozen=True, kw_only=True)
class OfScript(Settings):
    """The least that a script has which uses a model."""

    model: str = setting()
    adapter: str | None = setting(None)
    quantize: str = setting("none")
    template: str | None = setting(None)


def settings(model: object, adapter: object, quantize: str = "none") -> OfScript:
    return OfScript(model=str(model), adapter=adapter and str(adapter), quantize=quantize)


LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "variant": "dora", "targets": ["q_proj", "up_proj"]}


@pytest.fixture(autouse=True)
def bases(tmp_path, monkeypatch):
    """What runs began with, where they found it."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other_base"):
        (tmp_path / name).mkdir()


def save_checkpoint(run: Path, step: int, **changed) -> Path:
    """Of a small model; from_runs reads its manifest only."""
    identity = {"model": "base", "seed": 0, "quantize": "none", "train_layers": "all", "base": None, "lora": None,
                "data": "mine.jsonl", "template": "mine.txt"}  # fmt: skip
    Saver(run / "checkpoints", -1).save(step, small_state(), identity | changed, {}, {})
    return run / f"checkpoints/step-{step:06d}"


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


def test_the_tasks_of_a_harness_are_not_asked_with_the_runs_template(tmp_path, capsys):
    """They have prompts of their own, and beside a template they would be refused."""
    run = make_run(tmp_path / "run", "model", data="mine.jsonl", template="mine.txt", max_length=99)
    asked = EvaluationSettings(model=str(run / "model"), harness="hellaswag")
    found = from_runs(asked)
    assert (found.template, found.max_length, found.harness) == (asked.template, asked.max_length, "hellaswag")
    assert "prompts as in" not in capsys.readouterr().err


def test_a_run_that_has_not_ended_gives_its_newest_checkpoint_by_name(tmp_path, capsys):
    run = make_run(tmp_path / "run", None)
    save_checkpoint(run, 1)
    newest = save_checkpoint(run, 2)
    assert from_runs(settings(run, None)) == settings(newest, None)
    assert capsys.readouterr().err == (
        f"--model {run}: has neither model/ nor adapter/, because the run has not ended; taking its newest checkpoint\n"
        f"--model {run}: using {newest}\n"
    )
    tuned = make_run(tmp_path / "tuned", None)
    newest = save_checkpoint(tuned, 1, lora=LORA, quantize="nf4")
    assert from_runs(settings(tuned, None)) == settings("base", newest, "nf4")
    assert f"--adapter {tuned}: using {newest}, over linears in nf4\n" in capsys.readouterr().err
    assert from_runs(settings("other", tuned)).adapter == str(newest)
    with pytest.raises(UserError, match=f"--adapter {run}: holds a model, expected an adapter; give it as --model"):
        from_runs(settings("base", run))


def test_a_checkpoint_and_what_lies_in_a_runs_folder_are_taken_as_the_run_is(tmp_path, capsys, monkeypatch):
    """C12, C37: its prompts, its base and the base's rounding; run.json tells more than a manifest, but need not be."""
    run = make_run(tmp_path / "run", "model", data="mine.jsonl", template="mine.txt", max_length=99)
    chosen = EvaluationSettings(model=str(run / "model"), data="other.jsonl")
    found = from_runs(chosen)
    assert (found.model, found.template, found.max_length) == (chosen.model, "mine.txt", 99)
    assert capsys.readouterr().err == f"prompts as in {run}: --template mine.txt, --max_length 99\n"
    saved = save_checkpoint(run, 3, model="other_base", lora=LORA, quantize="int8")
    found = from_runs(EvaluationSettings(model=str(saved), data="other.jsonl"))
    assert (found.model, found.adapter, found.quantize) == ("other_base", str(saved), "int8")
    assert (found.template, found.max_length) == ("mine.txt", 99)
    assert f"--model {saved}: using its base, other_base\n" in capsys.readouterr().err
    (run / "run.json").unlink()
    found = from_runs(EvaluationSettings(model=str(saved), data="other.jsonl"))
    assert (found.model, found.adapter, found.template, found.max_length) == ("other_base", str(saved), "mine.txt", 512)
    monkeypatch.chdir(saved)
    assert from_runs(settings("base", ".")).adapter == str(saved)
    monkeypatch.chdir(tmp_path)

    tuned = make_run(tmp_path / "tuned", "adapter", quantize="nf4")
    assert from_runs(settings(tuned / "adapter", None)) == settings("base", tuned / "adapter", "nf4")
    assert from_runs(settings("other", tuned / "adapter")) == settings("other", tuned / "adapter", "nf4")


def test_a_script_gets_only_the_settings_that_it_has(tmp_path):
    """C12."""
    run = make_run(tmp_path / "run", "model", template="mine.txt", max_length=99)
    assert from_runs(OfScript(model=str(run))) == OfScript(model=str(run / "model"), template="mine.txt")
    run = make_run(tmp_path / "long", "model", max_length=99)
    assert from_runs(GenerateSettings(model=str(run), prompt="Hi")).max_length == 99  # cut as in training
    merge = MergeSettings(model=str(run), adapter="a", output="out")
    assert from_runs(merge) == replace(merge, model=str(run / "model"))


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
    lost = save_checkpoint(make_run(tmp_path / "lost", None), 1)
    (lost / "manifest.json").unlink()
    moved = make_run(tmp_path / "moved", "adapter", model="/nowhere/base")
    for chosen, expected in (
        (settings(unfinished, "a"), "--model .*unfinished: has neither model/ nor adapter/, nor a checkpoint"),
        (settings("base", unfinished), "--adapter .*unfinished: has neither model/ nor adapter/, nor a checkpoint"),
        (settings("base", model), "has no adapter/; it has left a model: give it to --model"),
        (settings("base", model / "model"), "--adapter .*/model/model: holds a model, expected an adapter"),
        (settings(tuned, "a"), "has an adapter of its own, expected a base for a"),
        (settings(tuned, None), "run.json: model is 7, expected what a run writes"),
        (settings(moved, None), "/nowhere/base: no such .*if the base has moved, --model FOLDER --adapter .*/moved"),
        (settings(lost, None), "step-000001/manifest.json: damaged .*is missing.*there is no older checkpoint"),
    ):
        with pytest.raises(UserError, match=expected):
            from_runs(chosen)


def test_a_conversation_with_what_a_run_left_has_no_system_turn_that_training_did_not_have(tmp_path):
    """C12: the chat template of an adapter's base may insert one."""
    for template, system, expected in (("chatml", None, "none"), ("chatml", "Be brief.", "Be brief."),
                                       ("alpaca", None, None)):  # fmt: skip
        run = make_run(tmp_path / f"{template} {system}", "model", template=template, system=system)
        assert from_runs(GenerateSettings(model=str(run), prompt="Hi")).system == expected
        assert from_runs(GenerateSettings(model=str(run), prompt="Hi", system="Mine.")).system == "Mine."
