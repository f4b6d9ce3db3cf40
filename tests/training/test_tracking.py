"""Trackers see the lines of metrics.jsonl, each once; without their package a run does not begin; none can end one."""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from runs import lines_of, train_here, write_reviews

from llama.boundary.errors import UserError
from llama.training.settings import TrainingSettings
from llama.training.tracking import TRACKERS, Tracker

KINDS = TRACKERS[1:]


class Fake:
    """Stands for a tracker's package: what a run calls it with."""

    def __init__(self):
        self.started, self.logged, self.finished, self.broken = [], [], 0, None

    def start(self, *arguments, **named) -> "Fake":
        self.started.append((*arguments, named))
        return self

    def log(self, values: dict, step: int) -> None:
        if self.broken:
            raise self.broken("no route to host")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def install(monkeypatch, kind: str) -> Fake:
    fake, module = Fake(), ModuleType(kind)
    module.__spec__ = ModuleSpec(kind, None)
    module.init, module.log, module.finish = fake.start, fake.log, fake.finish
    monkeypatch.setitem(sys.modules, kind, module)
    if kind == "tensorboard":
        writers = ModuleType("torch.utils.tensorboard")
        writers.SummaryWriter = fake.start
        fake.add_scalar = lambda name, value, step: fake.log({name: value}, step)
        fake.add_text = lambda name, text: None
        fake.flush, fake.close = (lambda: None), fake.finish
        monkeypatch.setitem(sys.modules, writers.__name__, writers)
    return fake


LINES = [
    {"step": 0, "held_out": {"loss": 3.0, "accuracy": 0.5}},
    *({"step": step, "loss": 1 / step, "grad_norm": 2.0} for step in range(1, 5)),
    {"step": 4, "held_out": {"loss": 0.5, "accuracy": 0.75}},
]


def numbers(fake: Fake) -> list[tuple[int, str, float]]:
    return [(step, name, value) for step, values in fake.logged for name, value in values.items()]


EXPECTED = [
    (0, "held_out/loss", 3.0), (0, "held_out/accuracy", 0.5),
    *(number for step in range(1, 5) for number in ((step, "train/loss", 1 / step), (step, "train/grad_norm", 2.0))),
    (4, "held_out/loss", 0.5), (4, "held_out/accuracy", 0.75),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_gets_every_number_of_every_line_under_its_step(tmp_path, monkeypatch, kind):
    fake = install(monkeypatch, kind)
    tracker = Tracker(kind, tmp_path, {"seed": 3}, 0, [], pytest.fail)
    for line in LINES:
        tracker.log(line)
    tracker.finish()
    assert numbers(fake) == EXPECTED and fake.finished == 1
    (*_, named), = fake.started
    if kind != "tensorboard":
        assert named["config"] == {"seed": 3} and named["name"].startswith(f"{tmp_path.name}-")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_step", [2, 0])
def test_a_resumed_run_goes_on_under_its_name_and_passes_no_line_on_twice(tmp_path, monkeypatch, kind, first_step):
    """It died after step 3 and its evaluation; its checkpoint is of step 2, or it had none.

    TensorBoard itself hides what is after the checkpoint, so there it is passed on again.
    """
    fake = install(monkeypatch, kind)
    earlier = [*LINES[:4], {"step": 3, "held_out": {"loss": 1.0}}]
    tracker = Tracker(kind, tmp_path, {}, 0, [], pytest.fail)
    for line in earlier:
        tracker.log(line)
    before = numbers(fake)
    tracker = Tracker(kind, tmp_path, {}, first_step, earlier, pytest.fail)
    for line in LINES:
        tracker.log(line)
    seen = numbers(fake)
    if kind == "tensorboard":
        assert [started[1]["purge_step"] for started in fake.started] == [1, first_step + 1]
        seen = [number for number in before if number[0] <= first_step] + seen[len(before) :]
        assert seen == EXPECTED
    else:
        assert seen == before + EXPECTED[-4:]
        assert fake.started[0] == fake.started[1] and fake.started[0][-1]["resume"] == "allow"


def test_a_tracker_that_comes_later_gets_what_was_before(tmp_path, monkeypatch):
    """A run that began without --track."""
    fake = install(monkeypatch, "wandb")
    tracker = Tracker("wandb", tmp_path, {}, 4, LINES, pytest.fail)
    for line in LINES:
        tracker.log(line)
    assert numbers(fake) == EXPECTED


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    for kind in KINDS:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=f"--track {kind}: expected its package.*: pip install {kind}$"):
            TrainingSettings(track=kind)
    assert TrainingSettings().track == "none"


@pytest.mark.parametrize("kind", [PermissionError, SystemExit])
def test_a_tracker_that_does_not_start_stops_a_new_run_and_no_resumed_one(tmp_path, monkeypatch, kind):
    fake, told = install(monkeypatch, "wandb"), []

    def start(**_):
        raise kind("not logged in\nsecond line")

    monkeypatch.setattr(sys.modules["wandb"], "init", start)
    with pytest.raises(UserError, match=r"^--track wandb: does not start \(not logged in second line\)"):
        Tracker("wandb", tmp_path, {}, 0, [], pytest.fail)
    tracker = Tracker("wandb", tmp_path, {}, 3, [], told.append)
    tracker.log(LINES[0])
    tracker.finish()
    assert len(told) == 1 and "the run goes on without it" in told[0] and not fake.logged


@pytest.mark.parametrize("kind", [ConnectionError, SystemExit])
def test_a_tracker_that_fails_later_is_told_once_and_left_alone(tmp_path, monkeypatch, kind):
    fake, told = install(monkeypatch, "trackio"), []
    tracker = Tracker("trackio", tmp_path, {}, 0, [], told.append)
    tracker.log(LINES[0])
    fake.broken = kind
    for line in LINES[1:]:
        tracker.log(line)
    tracker.finish()
    assert told == ["--track trackio: failed, the run goes on without it (no route to host)"]
    assert len(fake.logged) == 1 and fake.finished == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "data")


@pytest.mark.slow
def test_a_run_passes_on_what_it_writes_also_when_it_is_resumed(ranks, data, tmp_path):
    """Killed in step 4 after a checkpoint of step 2: the tracker has every step once, as metrics.jsonl has."""
    out = tmp_path / "out"
    chosen = partial(TrainingSettings, data=str(data), template="imdb", output=str(out), epochs=2.0,
                     batch_size=2, max_length=192, eval_limit=4, eval_every=3, save_every=2, track="wandb")  # fmt: skip
    logged = []
    for changes, die_in_step in (({}, 4), ({"resume": "newest"}, None)):
        logged += ranks(1, tracked, tmp_path / "cache", chosen, changes, die_in_step)[0]
    expected = [(line["step"], "held_out" in line) for line in lines_of(out)]
    assert logged == expected and expected == sorted(expected) and (0, True) in expected and (12, True) in expected


def tracked(cache: Path, chosen, changes: dict, die_in_step: int | None) -> list[tuple[int, bool]]:
    with pytest.MonkeyPatch.context() as patched:
        fake = install(patched, "wandb")
        train_here(cache, chosen(**changes).with_recipe(1), die_in_step)
    return [(step, any(name.startswith("held_out") for name in values)) for step, values in fake.logged]
