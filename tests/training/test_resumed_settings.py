"""A resumed run with other settings: refused with the way out in one line, or told what becomes of the run."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import refused, steps_of, summary_of, train_here, write_reviews

import llama
from llama.boundary.errors import UserError
from llama.storage.manifest import compare, published, read_manifest
from llama.training.optim import learning_rate
from llama.training.settings import IDENTITY, TrainingSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(data: Path, out: Path, **changes) -> TrainingSettings:
    chosen = dict(data=str(data), template="imdb", output=str(out), epochs=2.0, batch_size=4, max_length=192,
                  dtype="float32", eval_limit=4, learning_rate=1e-3, eval_every=0)
    return TrainingSettings(**(chosen | changes)).with_recipe(1)


@pytest.mark.parametrize("name", IDENTITY)
def test_a_resume_names_the_one_setting_that_differs_and_how_to_allow_it(name):
    """R7: the warm-up as any other."""
    values = asdict(TrainingSettings(model="one"))
    saved = TrainingSettings.identity(SimpleNamespace(**values), "base", None, {})
    now = TrainingSettings.identity(SimpleNamespace(**values | {name: "other"}), "base", None, {})
    with pytest.raises(UserError) as error:
        compare(Path("step-000001"), saved, now)
    told = str(error.value)
    assert f"settings: {name} was {values[name]!r}, is 'other'; to go on" in told
    assert f"add --allow_changed {name};" in told and "another --output" in told and "\n" not in told
    compare(Path("step-000001"), saved, now, allowed=name)


def test_the_way_out_lists_what_is_allowed_already_and_what_is_still_missing():
    """One try is enough."""
    saved, now = {"epochs": 1, "steps": 5, "seed": 0}, {"epochs": 2, "steps": 10, "seed": 0}
    with pytest.raises(UserError, match="--allow_changed epochs,steps;"):
        compare(Path("x"), saved, now)
    with pytest.raises(UserError, match="settings: steps was 5, is 10; .*--allow_changed epochs,steps;"):
        compare(Path("x"), saved, now, allowed="epochs")
    with pytest.raises(UserError, match="'lr': expected names among epochs, seed, steps"):
        compare(Path("x"), saved, now, allowed="lr")


def told_by(cache: Path, chosen: TrainingSettings) -> str:
    with redirect_stdout(io.StringIO()) as told:
        train_here(cache, chosen)
    return told.getvalue()


@pytest.mark.slow
def test_a_finished_run_trains_longer_on_the_schedule_of_all_its_steps(ranks, data, cache, tmp_path):
    """R7: the refusal names the whole flag; then the rate jumps to that of the longer schedule, and the run says so."""
    out = tmp_path / "out"
    ranks(1, train_here, cache, settings(data, out, warmup_ratio=0.0))
    longer = partial(settings, data, out, epochs=4.0, resume="newest")
    (told,) = ranks(1, refused, cache, longer(warmup_ratio=0.5))
    assert "epochs was 2.0, is 4.0; steps was 6, is 12; warmup_ratio was 0.0, is 0.5" in told
    assert "add --allow_changed epochs,steps,warmup_ratio;" in told
    (told,) = ranks(1, told_by, cache, longer(warmup_ratio=0.0, allow_changed="epochs,steps"))
    assert "changed since then: epochs was 2.0, is 4.0; steps was 6, is 12\n" in told
    assert "rate follows the schedule over all 12 steps: it is 0.000486 in step 7 and was 0.0001 in step 6\n" in told
    rates = [line["learning_rate"] for line in steps_of(out)]
    first = [learning_rate(step, 6, 1e-3, "cosine", 0.0) for step in range(6)]
    assert rates == first + [learning_rate(step, 12, 1e-3, "cosine", 0.0) for step in range(6, 12)]
    assert summary_of(out)["steps"] == 12 and summary_of(out)["examples"] == 48


@pytest.mark.slow
def test_a_replay_of_a_run_that_was_changed_on_its_way_is_not_called_the_same(ranks, data, cache, tmp_path):
    """Its learning rate followed another schedule first."""
    out = tmp_path / "out"
    ranks(1, train_here, cache, settings(data, out, max_steps=1))
    ranks(1, train_here, cache, settings(data, out, max_steps=2, resume="newest", allow_changed="steps"))
    replayed = settings(data, tmp_path / "again", max_steps=2, config=str(out / "run.json"))
    (told,) = ranks(1, told_by, cache, replayed)
    assert "run.json: this run differs: that one changed after step 1: steps was 1, is 2\n" in told


def test_run_json_and_the_manifest_say_which_version_wrote_them(ranks, data, cache, tmp_path):
    out = tmp_path / "out"
    ranks(1, train_here, cache, settings(data, out, max_steps=1))
    about, manifest = json.loads((out / "run.json").read_text()), read_manifest(published(out / "checkpoints")[0])
    assert about["version"] == manifest.version == llama.__version__ == "0.1.0"
    assert about["identity"] == manifest.identity
    flags = {entry.name for entry in fields(TrainingSettings)}
    assert about["settings"].keys() == flags and about["settings"]["template"] == "imdb"
    recorded = TrainingSettings(**about["settings"])
    assert vars(recorded.with_recipe(1)) == vars(recorded)
