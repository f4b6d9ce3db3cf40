"""What a run tells: a table of what is not as by default, plain lines in a log, and a curve, also when it stops."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from runs import replaced
from torch import nn

from llama.boundary.errors import UserError
from llama.data.templates import TEMPLATES
from llama.storage.base import Base
from llama.training import curve
from llama.training import report as reports
from llama.training.journal import read_metrics
from llama.training.report import Report
from llama.training.settings import TrainingSettings

COUNTS = {"examples": 4, "tokens": 400, "labels": 4, "seconds": 0.5}
DATA = SimpleNamespace(counts=lambda: {"train": 12, "test": 4}, notes=lambda: ["a note"], template=TEMPLATES["imdb"],
                       test=None)  # fmt: skip


def begun(folder: Path, steps: int = 4, rank: int = 0, **changes) -> Report:
    """The report of a new run on one rank."""
    settings = TrainingSettings(output=str(folder), **changes).with_recipe(1)
    identity = settings.identity(None, None, {"template": "imdb", "bundled_sample": True, "fingerprint": "00"})
    identity |= {"steps": steps, "global_batch": 4}
    plan = SimpleNamespace(output=folder, identity=identity, steps=steps, first_step=0, saved=None, manifest=None,
                           dtype=torch.float32, schedule=SimpleNamespace(imbalance=lambda ranks: 0.0))  # fmt: skip
    process = SimpleNamespace(is_rank_zero=rank == 0, world_size=1, data_ranks=1, described="1 (cpu)", store=None,
                              device=torch.device("cpu"), mesh=SimpleNamespace(shape=(1, 1, 1)))  # fmt: skip
    report = Report(settings, plan, process)
    folder.mkdir(exist_ok=True)
    report.begin(nn.Linear(3, 5), Base.tiny(), DATA)
    return report


def test_the_screen_lists_what_is_not_as_by_default_and_run_json_has_all(tmp_path, capsys):
    report = begun(tmp_path, learning_rate=0.25, save_every=7, weight_decay=0.0)
    told = capsys.readouterr().out.splitlines()
    table = dict(line.split(maxsplit=1) for line in told if line.startswith("  "))
    assert table == {
        "output": str(tmp_path), "learning_rate": "0.25", "save_every": "7", "template": "imdb",
        "epochs": "3.5", "batch_size": "64", "beta2": "0.9", "dtype": "float32", "sharding": "grad", "eval_every": "50",
    }  # fmt: skip
    assert "20 trainable parameters" in told and "a note" in told
    assert "4 steps of 4 examples; ranks: 1 (cpu)" in told and not any("than the mean" in line for line in told)
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["settings"] == asdict(report.settings) | {"template": "imdb"}
    assert saved["identity"] == report.plan.identity and saved["examples"]["answers"] == 2
    assert saved["prompt"]["answers"].keys() == {" negative", " positive"}


def test_a_log_gets_a_line_before_each_evaluation_and_other_ranks_are_silent(tmp_path, capsys):
    report = begun(tmp_path)
    report.held_out(0, {"loss": 3.0, "n": 4})
    capsys.readouterr()
    with report.progress_bar():
        for step in (1, 2):
            report.step(step, 0.7, 1.0, 0.00025, COUNTS)
        report.held_out(2, {"loss": 0.5, "accuracy": 0.75, "n": 4})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("training: 2/4 steps, loss 0.7, rate 0.00025, 800 tokens/s, ") and first.endswith(" left")
    assert second == "step 2: loss 0.5000, accuracy 0.7500, n 4"
    report = begun(tmp_path, rank=1)
    with report.progress_bar():
        report.step(1, 0.7, 1.0, 0.00025, COUNTS)
        report.held_out(2, {"loss": 0.5})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("end", [UserError("step 3: loss nan"), SystemExit(75), RuntimeError("a bug"), None], ids=str)
def test_the_curve_is_drawn_at_evaluations_and_when_a_run_stops_or_fails(tmp_path, monkeypatch, end):
    """Not at once after a bug: then nobody knows whether other ranks wait."""
    drawn = []
    monkeypatch.setattr(curve, "draw", lambda runs, path: drawn.append((path.name, len(runs[0].train), runs[0].title)))
    report = begun(tmp_path)
    report.held_out(0, {"loss": 3.0, "accuracy": 0.5, "n": 4})
    try:
        with report.progress_bar():
            for step in (1, 2, 3):
                report.step(step, 0.7, 1.0, 0.00025, COUNTS)
                if step == 2:
                    report.held_out(2, {"loss": 0.5, "accuracy": 0.75, "n": 4})
            if end:
                raise end
    except type(end) as error:
        assert error is end
    title = "tiny on imdb (bundled sample): held-out accuracy 50.0 % → 75.0 %"
    expected = [("loss.png", 2, title)]
    if isinstance(end, UserError | SystemExit):
        expected.append(("loss.png", 3, title))
    assert drawn == expected


def test_a_run_goes_on_without_a_picture(tmp_path, monkeypatch, capsys):
    """As where matplotlib is not installed."""
    def draw(*_):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(curve, "draw", draw)
    report = begun(tmp_path)
    with report.progress_bar():
        for step in (1, 2):
            report.step(step, 0.7, 1.0, 0.00025, COUNTS)
            report.held_out(step, {"loss": 0.5, "n": 4})
    assert capsys.readouterr().out.count(f"{tmp_path}/loss.png: not drawn (No module named 'matplotlib')") == 1


def test_what_an_adapters_config_holds_and_is_not_used_is_told(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "new_switch": True}))
    begun(tmp_path / "run", model="base", adapter=str(tmp_path / "adapter"))
    assert "adapter_config.json: not used: 'new_switch'" in capsys.readouterr().out


def test_a_checkpoint_that_was_not_finished_is_told(tmp_path, capsys):
    (tmp_path / "checkpoints/step-000007.tmp").mkdir(parents=True)
    begun(tmp_path)
    assert f"{tmp_path}/checkpoints/step-000007.tmp: was not finished, and is left out" in capsys.readouterr().out


def test_every_nth_step_is_written_and_the_last_one(tmp_path):
    report = begun(tmp_path, steps=5, log_every=2)
    with report.progress_bar():
        for step in range(1, 6):
            report.step(step, 0.7, 1.0, 0.00025, COUNTS)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 5]


def test_the_peak_memory_of_a_run_is_that_of_the_rank_that_needed_the_most(ranks, tmp_path):
    """Not of all together: it says which GPU the run needs."""
    assert ranks(2, told_peak, tmp_path) == [300, 300]


def told_peak(folder: Path) -> int:
    with replaced(reports, peak_memory=lambda device: (100, 300)[dist.get_rank()]):
        begun(folder, rank=dist.get_rank()).finish("model", COUNTS, {}, {})
    return json.loads((folder / "summary.json").read_text())["peak_memory_bytes"]
