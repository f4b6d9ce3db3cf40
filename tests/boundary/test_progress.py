"""Long work tells how far it is: on a terminal by a bar, in a log by plain lines, each written at once."""

import io
import sys

import pytest

from llama.boundary import progress
from llama.boundary.progress import Progress, duration


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal
        self.flushed = ""

    def isatty(self) -> bool:
        return self.is_terminal

    def flush(self) -> None:
        self.flushed = self.getvalue()


@pytest.fixture
def streams(monkeypatch):
    """streams(out, err): whether each is a terminal."""

    def make(out: bool, err: bool) -> tuple[Stream, Stream]:
        for name, is_terminal in (("stdout", out), ("stderr", err)):
            monkeypatch.setattr(sys, name, Stream(is_terminal))
        return sys.stdout, sys.stderr

    return make


def test_a_log_gets_a_line_every_half_minute_and_no_bar(streams):
    out, err = streams(False, False)
    now = [0.0]
    with Progress("training", "steps", total=329, first=100, is_main=True, clock=lambda: now[0]) as shown:
        for now[0] in range(7, 71, 7):
            shown.update(facts="loss 0.693")
        lines = ["training: 105/329 steps, loss 0.693, 26:08 left", "training: 110/329 steps, loss 0.693, 25:33 left"]
        assert out.flushed.splitlines() == lines  # after 35 and 70 seconds, and at once
        shown.tell()
    assert out.getvalue().splitlines() == [*lines, lines[1]] and err.getvalue() == ""


def test_work_of_unknown_length_tells_what_is_done(streams):
    out, err = streams(False, False)
    now = [0.0]
    with Progress("encoding rows.jsonl", "rows", clock=lambda: now[0]) as shown:
        for now[0] in (20.0, 40.0):
            shown.update(2000)
    assert err.flushed == "encoding rows.jsonl: 4000 rows\n" and out.getvalue() == ""


@pytest.mark.parametrize(("out", "err", "bar", "lines"), [(True, True, True, False), (False, True, True, True),
                                                          (True, False, False, True), (False, False, False, True)])
def test_a_bar_needs_a_terminal_and_whoever_has_none_gets_lines(streams, out, err, bar, lines):
    """`> log` alone leaves the bar on the terminal; `2> log` shows lines on it."""
    stdout, stderr = streams(out, err)
    with Progress("training", "steps", total=3, is_main=True) as shown:
        shown.update(facts="loss 0.693")
        shown.tell()
    assert ("loss 0.693" in stderr.getvalue()) == bar == bool(stderr.getvalue())
    assert ("loss 0.693" in stdout.getvalue()) == lines == bool(stdout.getvalue())
    assert not bar or "\r" in stderr.getvalue()


def test_other_ranks_are_silent_and_items_are_counted(streams):
    out, err = streams(False, False)
    now = [0.0]

    def items():
        for now[0] in (31.0, 62.0):
            yield now[0]

    silent = Progress("evaluating", "batches", 2, silent=True, clock=lambda: now[0])
    assert list(silent.over(items())) == [31.0, 62.0] and out.getvalue() == err.getvalue() == ""
    now[0] = 0.0
    shown = Progress("evaluating", "batches", 2, clock=lambda: now[0])
    assert list(shown.over(items())) == [31.0, 62.0] and shown.done == 2
    assert out.getvalue() == ""  # it may be somebody's JSON
    assert err.getvalue().splitlines() == ["evaluating: 1/2 batches, 0:31 left", "evaluating: 2/2 batches, 0:00 left"]


def test_a_line_appears_at_once_in_a_log(streams):
    out, _ = streams(False, False)
    progress.say("step 5")
    assert out.flushed == "step 5\n"


def test_durations_are_as_on_a_clock():
    assert [duration(x) for x in (0, 9.6, 65, 3599.7, 7210)] == ["0:00", "0:10", "1:05", "1:00:00", "2:00:10"]


def test_other_work_has_a_bar_that_disappears_even_where_stdout_is_a_file(streams):
    out, err = streams(False, True)
    with Progress("evaluating", "batches", 2) as shown:
        shown.update()
        shown.tell()
    assert out.getvalue() == "" and "evaluating" in err.getvalue() and err.getvalue().endswith("\r")
