"""metrics.jsonl survives any crash: at most the line that was being written is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama.training import journal
from llama.training.journal import Journal, read_metrics

ROOT = Path(journal.__file__).parents[2]


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
        while len(read_metrics(path)) <= resumed + 100 and writer.poll() is None:
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        steps = [line["step"] for line in read_metrics(path)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > resumed + 100
        assert len(path.read_bytes().splitlines()) - len(steps) in (0, 1)
        resumed = len(steps) // 2
