"""Runs that are told to stop, that fail on one rank, that torchrun starts again: nothing hangs or comes twice."""

import io
import json
import os
import re
import signal
import time
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from runs import (
    Torchrun,
    assert_equal_runs,
    lines_of,
    refused,
    replaced,
    rewrite,
    run_command,
    saved_steps,
    steps_of,
    summary_of,
    train_here,
    write_reviews,
)

import fsdp_train
from llama.boundary.durable import locked
from llama.boundary.errors import UserError
from llama.boundary.launch import Launch
from llama.storage import checkpoint
from llama.training import curve, plan, stopping
from llama.training.settings import TrainingSettings
from llama.training.stopping import STOPPED, StopRequests

STEPS = 8
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "data", 16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(data: Path, out: Path, **changes) -> TrainingSettings:
    chosen = dict(data=str(data), template="imdb", output=str(out), batch_size=2, save_every=2, eval_limit=4,
                  epochs=2.0, eval_every=0, dtype="float32", max_length=192)
    return TrainingSettings(**(chosen | changes)).with_recipe(2)


def arguments(data: Path, out: Path) -> list[str]:
    """The same settings for the command line."""
    return ["--data", str(data), "--output", str(out), "--batch_size", "2", "--save_every", "2", "--eval_limit", "4",
            "--epochs", "2", "--eval_every", "0", "--dtype", "float32", "--max_length", "192", "--template", "imdb"]


@pytest.fixture(scope="module")
def uninterrupted(ranks, data, cache, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    ranks(2, train_here, cache, settings(data, out))
    return out


# Stopping


@pytest.mark.parametrize("number", [
    signal.SIGTERM, *(pytest.param(number, marks=slow) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
])  # fmt: skip
def test_a_signal_to_one_rank_stops_all_after_the_step_and_the_resumed_run_equals_the_uninterrupted(
    ranks, data, cache, uninterrupted, tmp_path, number
):
    """R8, C48, C49: rank 1 gets it in the middle of step 3; both save after that step and end with status 75. Rank 1
    waits until rank 0 has drawn: torchrun would end rank 0."""
    out = tmp_path / "out"
    chosen = partial(settings, data, out)
    (status, told, _), other = ranks(2, signalled, cache, chosen(), number)
    assert status == STOPPED and other == (STOPPED, "", True)
    assert told.splitlines()[-1] == (f"{number.name}: saved and stopped after step 3 of {STEPS}; continue with "
                                     f"--resume --output {out}")
    assert saved_steps(out) == [2, 3] and steps_of(out)[-1]["step"] == 3 and not (out / "model").exists()
    ranks(2, train_here, cache, chosen(resume="newest"))
    assert_equal_runs(out, uninterrupted, STEPS)


def signalled(cache: Path, chosen: TrainingSettings, number: int) -> tuple[int, str, bool]:
    """The exit status of a run in which rank 1 gets a signal in its third step, what it printed, and whether the curve
    was drawn by then."""
    real = fsdp_train.gradient_norm

    def gradient_norm(model):
        signals.append(number)
        if len(signals) == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), number)
        return real(model)

    def draw_slowly(_, path: Path):
        time.sleep(0.5)
        path.touch()

    signals = []
    printed = io.StringIO()
    signal.signal(number, signal.SIG_DFL)  # workers of tests ignore Ctrl-C
    with replaced(fsdp_train, gradient_norm=gradient_norm), replaced(curve, draw=draw_slowly), redirect_stdout(printed):
        with pytest.raises(SystemExit) as stopped:
            train_here(cache, chosen, draw=True)
    return stopped.value.code, printed.getvalue(), (Path(chosen.output) / "loss.png").exists()


def test_a_run_that_stops_first_ends_the_checkpoint_that_is_written_in_the_background(ranks, data, cache, tmp_path):
    """R8: the process may end at once, and the thread with it."""
    chosen = settings(data, tmp_path / "out", save_every=0, async_save=True)
    assert ranks(2, saved_when_stopped, cache, chosen) == [[3]] * 2


def saved_when_stopped(cache: Path, chosen: TrainingSettings) -> list[int]:
    """Which checkpoints there are when a run has stopped, if each takes a while to be written."""

    def late(*arguments):
        time.sleep(0.5)
        return write(*arguments)

    write = checkpoint._write
    with replaced(checkpoint, _write=late):
        signalled(cache, chosen, signal.SIGTERM)
        return saved_steps(Path(chosen.output))


@pytest.fixture
def nohup():
    """What is started meanwhile ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = """
import signal, time
requests = []
class StopRequests(fsdp_train.StopRequests):
    def __init__(self, *minutes):
        super().__init__(*minutes)
        requests.append(self)

real = fsdp_train.train_step
def train_step(current, step):
    if step == 2 and current.process.rank == 1:
        os.kill({to}, {number})
    if step == 2:  # until it has arrived
        while {waits} and not requests[0].received:
            time.sleep(0.01)
    return real(current, step)
fsdp_train.train_step, fsdp_train.StopRequests = train_step, StopRequests
"""


@pytest.mark.parametrize(("number", "to_agent", "flags"), [
    (signal.SIGTERM, True, ()), (signal.SIGUSR1, False, ()),
    (signal.SIGUSR1, True, ("--signals_to_handle", "SIGTERM,SIGUSR1")), (signal.SIGINT, True, ()),
    (signal.SIGHUP, True, ()),
], ids=["SIGTERM to torchrun", "SIGUSR1 to rank 1", "SIGUSR1 to torchrun", "Ctrl-C", "a closed terminal"])  # fmt: skip
@slow
def test_a_signal_saves_after_the_step_and_the_resumed_run_equals_the_uninterrupted(
    ranks, tmp_path, data, cache, uninterrupted, nohup, number, to_agent, flags
):
    """R8, C48: whichever process hears it, all stop after the same step; with nohup, torchrun still passes SIGHUP on.
    """
    out = tmp_path / "out"
    to = "os.getppid()" if to_agent else "os.getpid()"
    wrong = SIGNALS.format(to=to, number=int(number), waits=to_agent)
    with Torchrun(tmp_path, cache, *arguments(data, out), flags=flags, wrong=wrong) as run:
        status, told = run.end()
    assert status != 0 and f"{number.name}: saved and stopped after step 3" in told, told[-3000:]
    assert "--resume --output" in told
    if not to_agent:  # else torchrun reports the signal, not how its processes ended
        assert f"exitcode  : {STOPPED}" in told or f"exitcode: {STOPPED}" in told
    assert saved_steps(out) == [2, 3] and steps_of(out)[-1]["step"] == 3
    assert not (out / "model").exists() and not list((out / "checkpoints").glob("*.tmp"))
    ranks(2, train_here, cache, settings(data, out, resume="newest"))
    assert_equal_runs(out, uninterrupted, STEPS)


def hear(*numbers: int, pause: float = 0.0, ignored: int = 0, by_torchrun: bool = False) -> int:
    """Exit status of a process that hears these signals, with a pause after each; 7 when it goes on, and knows of them.
    It was started with the signal `ignored` ignored."""
    child = os.fork()
    if not child:
        for number in stopping.SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)
        heard = []
        started = {"launch": lambda: Launch(by_torchrun)}
        with replaced(stopping, **started), StopRequests(clock=lambda: len(heard) * pause) as requests:
            for number in numbers:
                os.kill(os.getpid(), number)
                heard.append(number)
            name = requests.agreed(False).stop
            os._exit(7 if name and signal.Signals[name] in numbers else 8)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_ctrl_c_or_sigterm_ends_at_once_but_not_the_same_one_passed_on_twice(capfd):
    """R8: torchrun passes on what SLURM has sent to every process; a warning before the end is no second signal."""
    interrupt, term, warning, hangup = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
    for number in (interrupt, term, warning, hangup):
        assert hear(number) == hear(number, number, pause=0.5) == 7
    for first, second in ((warning, term), (term, warning), (hangup, interrupt), (interrupt, hangup), (hangup, hangup)):
        assert hear(first, second, pause=9) == 7
    capfd.readouterr()
    for numbers in ((term, term), (warning, term, term), (interrupt, term), (hangup, interrupt, term)):
        assert hear(*numbers, pause=9) == 128 + term
    assert hear(interrupt, interrupt, pause=9) == hear(term, interrupt, pause=9) == 128 + interrupt
    told = [line for line in capfd.readouterr().err.splitlines() if line]
    assert told[-2:] == ["SIGTERM: finishing this step, then saving; once more ends at once",
                         "SIGINT again: ended at once, this step is not saved"]


def test_a_signal_that_is_ignored_stays_ignored_unless_torchrun_would_kill_for_it():
    """R8: nohup has SIGHUP ignored, and the run goes on; torchrun passes it on even so, and kills 30 s later."""
    for number in (signal.SIGHUP, signal.SIGINT):
        assert hear(number, ignored=number) == 8 and hear(number, ignored=number, by_torchrun=True) == 7


def test_a_checkpoint_is_saved_when_the_last_one_is_old(ranks):
    """R8: at the latest after so many minutes, whatever else was saved; one late clock is enough for all ranks."""
    now = [0.0]
    with StopRequests(30, clock=lambda: now[0]) as requests:

        def saves(minute: float, save_is_due: bool = False) -> bool:
            now[0] = 60 * minute
            return requests.agreed(False, save_is_due).save

        assert [saves(29.9), saves(30), saves(59.9), saves(60.1), saves(61)] == [False, True, False, True, False]
        assert saves(70, save_is_due=True) and not saves(99.9) and saves(100)
    with StopRequests(0, clock=lambda: now[0]) as requests:
        assert not saves(1e9) and saves(1e9, save_is_due=True)
    assert ranks(2, agreed_with_one_late_clock) == [(None, False, True, False)] * 2


def agreed_with_one_late_clock() -> tuple:
    """What is agreed on when the clock of rank 1 is at 30 minutes and that of rank 0 at 20; and whether again."""
    now = [0.0]
    with StopRequests(30, clock=lambda: now[0]) as requests:
        now[0] = 60.0 * (20 + 10 * dist.get_rank())
        return (*requests.agreed(False), requests.agreed(False).save)


def test_signals_mean_what_they_meant_before_once_the_steps_are_over():
    """R8: a run that ends gives the handlers back."""
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as requests:
        assert requests.agreed(False) == (None, False, False) and requests.agreed(True) == (None, True, False)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# A mistake of the user


@pytest.mark.parametrize("wrong, told", [
    (["--learning_rat", "1"], "fsdp_train.py: unrecognized arguments: --learning_rat 1. Did you mean --learning_rate?"),
    (["--data", "nowhere"], "--data nowhere: no such file or folder, nor one of the public data sets"),
    (["--batch_size", "999"], "16 examples, fewer than one global batch of 1998"),
], ids=["a flag", "before the ranks join", "after the ranks have joined"])  # fmt: skip
@slow
def test_a_mistake_under_torchrun_is_said_once_and_ends_torchruns_report(tmp_path, data, cache, wrong, told):
    """R9: by one rank, without a traceback of ours, and every rank ends with status 2. (Or by torchrun's signal, if it
    comes before that rank has read its flags.)"""
    with Torchrun(tmp_path, cache, *arguments(data, tmp_path / "out"), *wrong) as run:
        status, log = run.end()
    lines = [line for line in log.splitlines() if told in line]
    assert status != 0 and len(lines) == 2 and lines[1].startswith("  traceback : "), log[-3000:]
    statuses = re.findall(r"exitcode  : (-?\d+)", log)
    assert len(statuses) == 2 and "2" in statuses and set(statuses) <= {"2", "-15"}
    assert log.count("Traceback") == 1  # torchrun's own, of its ChildFailedError
    assert "line" not in log.split("Traceback")[0]


# One rank fails


WRONG = """
import llama.storage.checkpoint
real = {where}
def wrong(*args, **kwargs):
    raise RuntimeError("the first of all")
if os.environ["RANK"] == "1":
    {where} = wrong
"""


@pytest.mark.parametrize("phase", [
    pytest.param("fsdp_train.load_data", id="data"), pytest.param("fsdp_train.Llama.forward", id="forward"),
    pytest.param("fsdp_train.gradient_norm", id="backward"),
    pytest.param("llama.storage.checkpoint.write_tensors", id="save"),
    pytest.param("fsdp_train.evaluate", id="evaluation"),
])  # fmt: skip
@slow
def test_a_rank_that_fails_ends_all_and_its_traceback_comes_first(tmp_path, data, cache, phase):
    """R9: in data, forward, backward, save and evaluation; no rank waits for the one that is gone."""
    with Torchrun(tmp_path, cache, *arguments(data, tmp_path / "out"), wrong=WRONG.format(where=phase)) as run:
        status, told = run.end()
    tracebacks = told.split("Traceback (most recent call last)")[1:]
    assert status != 0 and "the first of all" in tracebacks[0], told[-3000:]
    assert "rank0" not in tracebacks[0].split("RuntimeError")[0], told[-3000:]
    assert "rank      : 1" in told.split("Root Cause")[1]
    assert saved_steps(tmp_path / "out") == []


# Started again


DIES = """
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
real = fsdp_train.train_step
def train_step(current, step):
    if (attempt, step, current.process.rank) in {deaths}:
        {before}
        os.kill(os.getpid(), 9)
    return real(current, step)
fsdp_train.train_step = train_step
"""


@pytest.mark.parametrize("flags", [[], ["--async_save"]], ids=["at once", "in the background"])
@slow
def test_torchrun_starts_it_again_and_it_continues_from_its_newest_checkpoint(
    tmp_path, data, cache, uninterrupted, flags
):
    """R10, R23: after kill -9 of each rank in turn, without --resume; no step twice in metrics.jsonl."""
    out = tmp_path / "out"
    # When step 4 is saved, the checkpoint of step 2 is whole, also where it was written in the background.
    wrong = DIES.format(deaths={(0, 4, 1), (1, 6, 0)}, before="pass")
    with Torchrun(tmp_path, cache, *arguments(data, out), *flags, flags=("--max_restarts", "3"), wrong=wrong) as run:
        status, told = run.end()
    assert status == 0 and told.count("resuming after step") == 2, told[-3000:]
    assert_equal_runs(out, uninterrupted, STEPS)
    assert len(lines_of(out)) == STEPS + 2  # and an evaluation before and after
    assert summary_of(out)["examples"] == 4 * STEPS


@slow
def test_a_restart_in_a_folder_chosen_by_itself_takes_no_other_runs_folder(tmp_path, data, cache, uninterrupted):
    """R10, R17: without --output a second run is at data-tiny-2; a restart of the first stays with its own."""
    words = [word for word in arguments(data, tmp_path) if word not in ("--output", str(tmp_path))]
    other_run = "os.mkdir('runs/data-tiny-2'); open('runs/data-tiny-2/run.json', 'w').write('{{}}')"
    wrong = DIES.format(deaths={(0, 4, 0)}, before=other_run.format())
    with Torchrun(tmp_path, cache, *words, flags=("--max_restarts", "3"), wrong=wrong) as run:
        status, told = run.end()
    assert status == 0 and "resuming after step 4" in told, told[-3000:]
    assert [p.name for p in (tmp_path / "runs/data-tiny-2").iterdir()] == ["run.json"]
    assert_equal_runs(tmp_path / "runs/data-tiny", uninterrupted, STEPS)


def test_a_restart_resumes_from_the_newest_only_once_its_first_attempt_has_begun(tmp_path):
    """R10: until then the first attempt's --resume step-N stands; and a new run starts anew in its own folder."""
    process, identity = SimpleNamespace(store=dist.HashStore()), {"steps": 9}
    chosen = SimpleNamespace(resume="step-1", output=str(tmp_path), allow_changed="")
    (tmp_path / "run.json").write_text("{}")
    for step in (1, 2):
        path = tmp_path / f"checkpoints/step-{step:06d}"
        path.mkdir(parents=True)
        content = {"step": step, "ranks": 1, "settings": identity, "held_out": {}, "files": {},
                   "totals": dict.fromkeys(("examples", "tokens", "labels", "seconds"), 1)}
        (path / "manifest.json").write_text(json.dumps(content | {"sha256": ""}))
        rewrite(path, lambda content: None)

    def saved() -> str:
        with ExitStack() as locks:
            return plan._choose_run(chosen, identity, process, "unused", locks)[1].name

    assert [saved(), saved()] == ["step-000001"] * 2
    process.store.set(plan.BEGUN, "")
    assert saved() == "step-000002"


# Two at once


def test_a_run_is_held_by_one_process(tmp_path):
    """R21, R17: until its block is left."""
    with locked(tmp_path, wait=False):
        told = "in use by another run"
        with pytest.raises(UserError, match=told), locked(tmp_path, wait=False):
            pass
    with locked(tmp_path, wait=False):
        pass


def test_a_second_resume_of_a_run_that_goes_on_is_refused_on_every_rank(ranks, data, cache, uninterrupted):
    """R2: two writers of one folder."""
    with locked(uninterrupted, wait=False):
        told = ranks(2, refused, cache, settings(data, uninterrupted, resume="newest"))
    assert told == [f"{uninterrupted}: in use by another run; wait until it ends, or name another folder"] * 2


@slow
def test_a_second_resume_of_a_run_that_goes_on_is_one_line(tmp_path, data, cache, uninterrupted):
    """R2: of the command, with exit status 2."""
    with locked(uninterrupted, wait=False):
        done = run_command(*arguments(data, uninterrupted), "--resume", cwd=tmp_path, cache=cache)
    assert done.returncode == 2 and done.stderr.endswith(
        f"{uninterrupted}: in use by another run; wait until it ends, or name another folder\n")
