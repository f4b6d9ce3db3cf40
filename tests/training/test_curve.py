"""The loss curve: a picture with a line for all that was measured, and none for what nobody measured."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama.boundary.errors import UserError
from llama.training import curve as curves
from llama.training.curve import Picture, draw, name_of, read_curve
from llama.training.figure import Curve, figure_of, smoothed

ROOT = Path(curves.__file__).parents[2]


def steps(count: int, **changes) -> list[dict]:
    return [{"step": n, "loss": 3 / n, "grad_norm": 1 / n, "learning_rate": 1e-3, "labels": 4,
             "examples_per_second": 8.0, "seconds": 0.5} | changes for n in range(1, count + 1)]  # fmt: skip


def held_out(step: int, **metrics) -> dict:
    return {"step": step, "held_out": {"n": 4} | metrics}


CURVES = {
    "one step": steps(1),
    "no evaluation": steps(5),
    "with loss": [held_out(0, loss=3.0), *steps(30)],
    "with accuracy": [held_out(0, loss=3.0, accuracy=0.5), *steps(30), held_out(30, loss=1.0, accuracy=0.75)],
    "a loss of zero": [*steps(30), *steps(1, step=31, loss=0.0)],
    "a loss that is not a number": [*steps(5), *steps(1, step=6, loss=float("nan"))],
    "lines without norm and rate": [{"step": n, "loss": 1.0} for n in range(1, 4)],
}


def lines_of(panel) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_xdata()) for line in panel.get_lines()}


def texts_of(panel) -> list[str]:
    return [text.get_text() for text in panel.texts]


@pytest.mark.parametrize("case", CURVES)
def test_a_picture_has_a_line_for_all_there_is_and_none_for_what_is_not(tmp_path, case):
    from matplotlib.image import imread

    drawn = Curve("tiny on imdb", CURVES[case], answers=2)
    draw([drawn], tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png")[..., :3].std() > 0.02
    figure = figure_of([drawn])
    accuracy = [panel for panel in figure.axes if "accuracy" in panel.get_ylabel()]
    labels = lines_of(figure.axes[0])
    assert labels["training loss"] == [line["step"] for line in CURVES[case] if "loss" in line]
    assert ("held-out loss" in labels) == case.startswith("with ")
    assert len(accuracy) == (case == "with accuracy") and len(figure.axes) == 3 + len(accuracy)
    assert any("geometric mean" in label for label in labels) == (len(labels["training loss"]) >= 20)


@pytest.mark.parametrize(("count", "reach"), [(20, 2), (30, 2), (329, 8)])
def test_the_mean_is_that_of_the_logarithm_around_each_step(count, reach):
    """Of a loss that falls to a tenth in so many steps it is that loss; an arithmetic mean would be far above."""
    losses = (8 * 10 ** (-np.arange(count) / 10)).tolist()
    found, means = smoothed(losses)
    assert found == reach and means == pytest.approx(losses[reach:-reach])
    spiky = [1.0, *[math.e] * (count - 1)]
    assert smoothed(spiky)[1][0] == pytest.approx(math.exp(2 * reach / (2 * reach + 1)))


def test_a_mean_is_drawn_over_the_step_in_its_middle_and_accuracy_in_percent():
    figure = figure_of([Curve("", CURVES["with accuracy"])])
    (mean,) = [x for label, x in lines_of(figure.axes[0]).items() if "geometric mean" in label]
    assert mean == list(range(3, 29))  # of 5 steps each
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [50, 75]


def test_points_on_held_out_data_are_points_and_two_of_them_are_not_joined():
    """Nobody has measured what lies between; a dotted line may lead the eye from the third on."""
    for count, style in ((1, "None"), (2, "None"), (3, ":")):
        lines = [*steps(760), *(held_out(380 * n, loss=1.0, accuracy=0.5) for n in range(count))]
        for panel in figure_of([Curve("tiny on imdb", lines, 2)]).axes[:2]:
            (points,) = [line for line in panel.get_lines() if line.get_marker() == "o"]
            assert points.get_linestyle() == style and points.get_linewidth() < 1


def test_chance_is_a_labelled_line_where_there_are_answers_to_choose_from():
    """ln of their number, for each example; with two labels an answer it is half of that for each label."""
    lines = CURVES["with accuracy"]
    loss, accuracy, *_ = figure_of([Curve("", lines, answers=2)]).axes
    assert texts_of(loss) == ["chance: ln 2 = 0.693"] and texts_of(accuracy) == ["chance: 50 %"]
    assert any(line.get_ydata()[0] == pytest.approx(math.log(2)) for line in loss.get_lines())
    two_labels = [line | {"labels": 8} if "labels" in line else line for line in lines]
    loss, accuracy, *_ = figure_of([Curve("", two_labels, answers=4)]).axes
    assert texts_of(loss) == ["chance: ln 4 x 0.5 = 0.693"] and texts_of(accuracy) == ["chance: 25 %"]
    assert texts_of(figure_of([Curve("", lines)]).axes[0]) == []
    assert texts_of(figure_of([Curve("", lines, 2, on_prompts=True)]).axes[0]) == []


@pytest.mark.parametrize("count", [1, 3, 30, 329])
def test_the_axes_have_whole_steps_and_plain_decimals(count):
    lines = steps(count) if count < 30 else [line | {"loss": 8 * 10 ** (-line["step"] / 100)} for line in steps(count)]
    figure = figure_of([Curve("", lines)])
    figure.draw_without_rendering()
    for panel in figure.axes:
        ticks = [text.get_text().replace("\N{MINUS SIGN}", "-") for text in panel.get_yticklabels()]
        assert ticks and not any("e" in text or "$" in text for text in ticks)
    assert all(float(tick).is_integer() for tick in figure.axes[-1].get_xticks())


def test_the_title_has_names_instead_of_paths_and_the_result():
    identity = {"model": "/big/disk/Llama-2-7b-hf/", "data": "../my/reviews.jsonl", "bundled_sample": False}
    assert name_of(identity) == "Llama-2-7b-hf on reviews.jsonl"
    name = name_of({"model": "tiny", "data": "imdb", "bundled_sample": True})
    assert Curve(name, CURVES["with accuracy"]).title == (
        "tiny on imdb (bundled sample): held-out accuracy 50.0 % → 75.0 %")
    assert Curve("a", CURVES["with loss"]).title == "a: held-out loss 3"
    assert Curve("a", steps(3)).title == "a: training loss 3 → 1"
    title = figure_of([Curve("$x$ \x1b[1m 中", steps(3))]).axes[0].get_title()
    assert title == r"\$x\$ \x1b[1m 中: training loss 3 → 1"


def test_several_runs_have_a_colour_each(tmp_path):
    runs = [Curve(name, CURVES["with accuracy"], 2) for name in "abc"]
    panel, *_ = figure_of(runs).axes
    assert [text.get_text().partition(":")[0] for text in panel.get_legend().get_texts()] == list("abc")
    assert panel.get_title() == "3 runs"
    points = [line.get_color() for line in panel.get_lines() if line.get_marker() == "o"]
    assert len(set(points)) == 3


def test_a_run_draws_at_most_every_half_minute_and_always_at_its_end(tmp_path, monkeypatch):
    now, drawn = [0.0], []
    monkeypatch.setattr(curves, "draw", lambda runs, path: drawn.append(now[0]))
    picture = Picture(tmp_path / "loss.png", pytest.fail, clock=lambda: now[0])
    picture.draw(Curve("", [held_out(0, loss=1.0)]))  # no step yet
    for now[0] in (0.0, 10.0, 29.0, 31.0, 60.0, 62.0):
        picture.draw(Curve("", steps(3)))
    assert drawn == [0.0, 31.0, 62.0]
    picture.draw(Curve("", steps(3)), is_last=True)
    assert drawn[3:] == [62.0]


def test_a_picture_that_cannot_be_drawn_is_told_once_and_leaves_the_old_one_whole(tmp_path, monkeypatch):
    """A full disk in the middle of the file; and never a part of a picture, nor a file of another name."""
    from matplotlib.figure import Figure

    path, told = tmp_path / "loss.png", []
    draw([Curve("", steps(3))], path)
    whole = path.read_bytes()

    def savefig(self, target, **_):
        Path(target).write_bytes(whole[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    picture = Picture(path, told.append)
    for _ in range(2):
        picture.draw(Curve("", steps(3)), is_last=True)
    assert told == [f"{path}: not drawn ([Errno 28] No space left on device)"]
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def folder_of_a_run(folder: Path, lines: list[dict], on_prompts: bool = False) -> Path:
    folder.mkdir()
    about = {"identity": {"model": "tiny", "data": "imdb", "bundled_sample": True}, "examples": {"answers": 2},
             "settings": {"train_on_prompt": on_prompts}}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.slow
def test_the_command_draws_a_run_that_still_trains_and_compares_several(tmp_path):
    """Its last line is half written."""
    first = folder_of_a_run(tmp_path / "first", CURVES["with accuracy"])
    with open(first / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    second = folder_of_a_run(tmp_path / "second", steps(3))

    def command(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "llama.training.curve", *arguments], cwd=tmp_path, text=True,
                              capture_output=True, env={"PYTHONPATH": str(ROOT)})  # fmt: skip

    done = command(first)
    assert (done.returncode, done.stderr) == (0, "") and "50.0 % → 75.0 %" in done.stdout, done.stderr
    assert (first / "loss.png").read_bytes().startswith(b"\x89PNG")
    done = command(first, second, "--output", "both.png")
    assert done.returncode == 0 and "second: tiny on imdb (bundled sample): training loss" in done.stdout, done.stderr
    assert (tmp_path / "both.png").exists() and not (second / "loss.png").exists()
    done = command(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "run.json" in done.stderr


@pytest.mark.parametrize("on_prompts", [False, True])
def test_a_runs_folder_says_whether_chance_is_the_loss_of_its_answers(tmp_path, on_prompts):
    """Not where the training loss is that of prompts, too."""
    curve = read_curve(folder_of_a_run(tmp_path / "run", steps(3), on_prompts))
    assert (curve.answers, curve.on_prompts, curve.chance_loss() is None) == (2, on_prompts, on_prompts)


def test_a_folder_without_a_run_or_a_step_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match="run.json: No such file"):
        read_curve(tmp_path)
    with pytest.raises(UserError, match="metrics.jsonl: has no step yet"):
        read_curve(folder_of_a_run(tmp_path / "begun", [held_out(0, loss=1.0)]))
