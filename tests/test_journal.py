"""A run's folder: never somebody else's, never overwritten; its journal survives any crash."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama.boundary.errors import UserError
from llama.training import journal
from llama.training.journal import Journal, choose_folder, draw_loss_curve, read_metrics

ROOT = Path(journal.__file__).parents[1]


@pytest.fixture
def default(tmp_path) -> str:
    return str(tmp_path / "runs" / "imdb-tiny")


def run_in(folder: Path) -> Path:
    """What a run leaves in its folder, as far as these rules look."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    return folder


# The folder


def test_each_run_gets_a_folder_of_its_own(default):
    """R17: the first keeps its name and its files, the next ones are counted from 2."""
    names = []
    for _ in range(3):
        names.append(run_in(choose_folder(None, default, resume=False)).name)
    assert names == ["imdb-tiny", "imdb-tiny-2", "imdb-tiny-3"]


def test_a_free_name_is_never_one_that_anything_has(default, tmp_path):
    """R17: neither a file nor an empty folder."""
    (tmp_path / "runs").mkdir()
    Path(default).write_text("a file")
    Path(f"{default}-2").mkdir()
    assert choose_folder(None, default, resume=False) == Path(f"{default}-3")
    assert Path(default).read_text() == "a file"


def test_to_resume_finds_the_newest_run(default):
    """Of the default's, or the one that is named."""
    runs = [run_in(choose_folder(None, default, resume=False)) for _ in range(3)]
    assert choose_folder(None, default, resume=True) == runs[2]
    assert choose_folder(str(runs[0]), default, resume=True) == runs[0]
    assert choose_folder(None, f"{default}-other", resume=False) == Path(f"{default}-other")


def test_a_wished_folder_is_taken_only_if_it_is_new_or_empty(default, tmp_path):
    """R17: what is in it stays as it is."""
    assert choose_folder(str(tmp_path / "new"), default, resume=False) == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert choose_folder(str(tmp_path / "empty"), default, resume=False) == tmp_path / "empty"
    taken = run_in(tmp_path / "taken")
    (tmp_path / "file").write_text("")
    for name in ("taken", "file"):
        with pytest.raises(UserError, match=rf"^--output .*{name}: exists already; .* --resume$"):
            choose_folder(str(tmp_path / name), default, resume=False)
    assert [path.name for path in taken.iterdir()] == ["run.json"]


def test_only_a_run_of_ours_is_resumed(default, tmp_path):
    """R17: no folder, a file, somebody else's folder, wished or by default."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("meow")
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "photos", "file"):
        with pytest.raises(UserError, match=rf"^--resume: .*{name} holds no run \(no run.json\)$"):
            choose_folder(str(tmp_path / name), default, resume=True)
    with pytest.raises(UserError, match="^--resume: there is no run to continue at .*imdb-tiny$"):
        choose_folder(None, default, resume=True)
    run_in(Path(default))
    Path(f"{default}-2").mkdir()
    with pytest.raises(UserError, match=r"^--resume: .*imdb-tiny-2 holds no run"):
        choose_folder(None, default, resume=True)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    """R3, R17: below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--output .*file/run: Not a directory$"):
        choose_folder(str(tmp_path / "file" / "run"), "unused", resume=False)


# The journal


def steps_in(path: Path) -> list[int]:
    """As any reader would, without this project: every line is whole."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_line_is_whole_on_disk_as_soon_as_it_is_written(tmp_path):
    """R23: numbers come back exactly."""
    written = Journal(tmp_path)
    lines = [{"step": step, "loss": 1 / (step + 3), "tokens": 2**40} for step in range(1, 50)]
    for number, line in enumerate(lines, 1):
        written.write(**line)
        assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines[:number]
    written.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == lines == written.lines


def test_a_tail_cut_anywhere_is_ignored_and_removed_by_the_next_run(tmp_path):
    """R23: at every byte of the last line."""
    whole = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n'
    path = tmp_path / "metrics.jsonl"
    for keep in range(25, len(whole) + 1):
        path.write_bytes(whole[:keep])
        steps = [1, 2] if keep >= len(whole) - 1 else [1]  # without its newline the second line is whole all the same
        assert [line["step"] for line in read_metrics(path)] == steps
        resumed = Journal(tmp_path, resumed_step=2)
        resumed.write(step=3, loss=2.0)
        resumed.close()
        assert steps_in(path) == [*steps, 3]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("tail", [b"\0" * 100, b'{"step": 3, "lo\0\0\0', b"\xff\xfe", b"["])
def test_whatever_a_power_cut_leaves_behind_the_last_line_is_ignored(tmp_path, tail):
    """R23: file systems fill what was not written with zeros, or with what lay there."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n' + tail)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    Journal(tmp_path, resumed_step=2).close()
    assert steps_in(path) == [1, 2]


def test_steps_after_the_checkpoint_are_written_again_and_once(tmp_path):
    """R23, R10: strictly increasing after a resume, and held-out lines stay with their step."""
    path = tmp_path / "metrics.jsonl"
    first = Journal(tmp_path)
    first.write(step=0, held_out={"loss": 3.0})
    for step in range(1, 8):
        first.write(step=step, loss=1.0)
        if step % 2 == 0:
            first.write(step=step, held_out={"loss": 2.0})
    first.close()
    resumed = Journal(tmp_path, resumed_step=4)
    assert [line["step"] for line in resumed.lines] == [0, 1, 2, 2, 3, 4, 4]
    for step in (5, 6):
        resumed.write(step=step, loss=0.5)
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == resumed.lines
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 0.5), (6, 0.5)]  # fmt: skip
    assert [line["step"] for line in lines if "held_out" in line] == [0, 2, 4]


def test_a_run_resumed_before_its_first_checkpoint_begins_its_journal_again(tmp_path):
    """R23: or step 0 would be there twice."""
    for _ in range(2):
        begun = Journal(tmp_path, resumed_step=0)
        begun.write(step=0, held_out={"loss": 3.0})
        begun.write(step=1, loss=1.0)
        begun.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [0, 1]


WRITER = """
import sys
sys.path.insert(0, {root!r})
from llama.training.journal import Journal
from pathlib import Path
journal = Journal(Path({folder!r}), {resumed})
for step in range({resumed} + 1, 10**9):
    journal.write(step=step, loss=1 / step, note="x" * (step % 5000))
"""


def test_kill_9_of_the_writer_costs_at_most_the_line_being_written(tmp_path):
    """R23: three times in a row, resumed from what the last one left."""
    path, resumed = tmp_path / "metrics.jsonl", 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER.format(root=str(ROOT), folder=str(tmp_path),
                                                                       resumed=resumed)])  # fmt: skip
        deadline = time.monotonic() + 60
        while len(read_metrics(path)) <= resumed + 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        steps = [line["step"] for line in read_metrics(path)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > resumed + 100
        assert len(path.read_bytes().splitlines()) - len(steps) in (0, 1)
        resumed = len(steps) // 2


# The curve

TRAINED = [{"step": step, "loss": 3 / step} for step in range(1, 6)]
LINES = {
    "one line": TRAINED[:1],
    "no evaluation": TRAINED,
    "with loss": [{"step": 0, "held_out": {"loss": 3.0, "n": 4}}, *TRAINED],
    "with accuracy": [*TRAINED, {"step": 5, "held_out": {"loss": 1.0, "accuracy": 0.75, "n": 4}}],
    "a loss that is not a number": [*TRAINED, {"step": 6, "loss": float("nan")}],
}


@pytest.mark.parametrize("case", LINES)
def test_the_loss_curve_is_drawn(tmp_path, monkeypatch, case):
    """A PNG of the stated size, with a curve for all there is and none for what is not."""
    from matplotlib import pyplot as plt
    from matplotlib.image import imread

    drawn = []
    monkeypatch.setattr(plt, "close", lambda figure, close=plt.close: (drawn.append(figure), close(figure)))
    draw_loss_curve(LINES[case], tmp_path / "loss.png", "tiny on imdb (bundled sample)")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (540, 960) and picture[..., :3].std() > 0.02
    (figure,) = drawn
    left, *right = figure.axes
    labels = [line.get_label() for axis in figure.axes for line in axis.get_lines()]
    assert left.get_title() == "tiny on imdb (bundled sample)"
    assert list(left.get_lines()[0].get_xdata()) == [line["step"] for line in LINES[case] if "loss" in line]
    assert ("held-out loss" in labels) == case.startswith("with ")
    assert ("held-out accuracy" in labels) == (case == "with accuracy") == bool(right)
    assert [text.get_text() for text in left.figure.legends[0].get_texts()] == labels


def test_the_running_mean_begins_as_the_mean_of_all_losses(tmp_path, monkeypatch):
    """So that the first loss does not weigh for ever; and no steps make no picture."""
    from matplotlib import pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    draw_loss_curve(TRAINED, tmp_path / "loss.png", "")
    mean = drawn[0].axes[0].get_lines()[1].get_ydata()
    assert mean == pytest.approx([sum(line["loss"] for line in TRAINED[:n]) / n for n in range(1, 6)])
    monkeypatch.undo()
    plt.close(drawn[0])
    draw_loss_curve([{"step": 0, "held_out": {"loss": 1.0}}], tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()
