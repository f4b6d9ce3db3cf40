"""Runs that are told to stop, that fail on one rank, that torchrun starts again: nothing hangs or comes twice."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from test_train import ROOT, children, environ_of, final_state, run_command, steps_of, wait_for, write_reviews

from llama.boundary.errors import UserError
from llama.parallel.distribute import name_of_attempt
from llama.storage import checkpoint
from llama.training import plan
from llama.training.journal import locked
from llama.training.stopping import STOPPED, StopRequests

STEPS = 50


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "data", 200)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(data, cache, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    out = tmp_path_factory.mktemp("reference") / "out"
    done = run_command(*arguments(data, out), cwd=out.parent, cache=cache, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def arguments(data: Path, out: Path) -> list[str]:
    return ["--data", str(data), "--output", str(out), "--batch_size", "4", "--save_every", "7", "--eval_limit", "8",
            "--epochs", "2", "--eval_every", "0", "--dtype", "float32"]


class Torchrun:
    """A run of two ranks under torchrun, in the background; `wrong`: a line of Python that one of them runs first."""

    def __init__(self, tmp_path: Path, cache: Path, *words: object, flags: tuple = (), wrong: str = ""):
        script = ROOT / "fsdp_train.py"
        if wrong:
            script = tmp_path / "wrong.py"
            script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport fsdp_train\n{wrong}\n"
                              "fsdp_train.run(fsdp_train.main)\n")
        self.log = tmp_path / "log"
        environment = os.environ | {"LLAMA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        with open(self.log, "w") as log:
            self.agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                                           *flags, str(script), *map(str, words)], env=environment, stdout=log,
                                          stderr=log, cwd=tmp_path)

    def worker(self, rank: int) -> int:
        return next(p for p in children(self.agent.pid) if f"RANK={rank}".encode() in environ_of(p))

    def end(self, seconds: float = 60) -> tuple[int, str]:
        try:
            self.agent.wait(seconds)
        finally:
            self.agent.kill()
        return self.agent.returncode, self.log.read_text()


def assert_equal_to(reference: Path, out: Path) -> None:
    assert steps_of(out) == steps_of(reference) and len(steps_of(out)) == STEPS
    expected, found = final_state(reference), final_state(out)
    assert all(found[name].equal(expected[name]) for name in expected) and found.keys() == expected.keys()


# Stopping


@pytest.mark.parametrize(("number", "to", "flags"), [
    (signal.SIGTERM, "agent", ()), pytest.param(signal.SIGUSR1, 1, (), marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, "agent", ("--signals_to_handle", "SIGTERM,SIGUSR1"), marks=pytest.mark.slow),
], ids=["SIGTERM to torchrun", "SIGUSR1 to rank 1", "SIGUSR1 to torchrun"])  # fmt: skip
def test_a_signal_saves_after_the_step_and_the_resumed_run_equals_the_uninterrupted(
    tmp_path, data, cache, reference, number, to, flags
):
    """R8, C48: SLURM's warning and its end; whichever process hears it, all stop after the same step."""
    out = tmp_path / "out"
    run = Torchrun(tmp_path, cache, *arguments(data, out), flags=flags)
    assert wait_for(lambda: (out / "metrics.jsonl").exists() and len(steps_of(out)) > 8, 120)
    os.kill(run.agent.pid if to == "agent" else run.worker(to), number)
    code, told = run.end(30)
    assert code != 0 and f"{number.name}: saved and stopped after step" in told and "--resume --output" in told
    if to != "agent":  # else torchrun reports the signal, not how its processes ended
        assert f"exitcode  : {STOPPED}" in told or f"exitcode: {STOPPED}" in told
    last = checkpoint.published(out / "checkpoints")[-1]
    assert checkpoint.step_of(last) == steps_of(out)[-1]["step"] < STEPS
    assert not (out / "model").exists() and not list((out / "checkpoints").glob("*.tmp"))
    done = run_command(*arguments(data, out), "--resume", cwd=tmp_path, cache=cache, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_to(reference, out)


def hear(*numbers: int, pause: float = 0.0) -> int:
    """Exit status of a process that hears these signals, with pauses between; 7 when it goes on, and knows of them."""
    child = os.fork()
    if not child:
        with StopRequests() as requests:
            for number in numbers:
                os.kill(os.getpid(), number)
                requests.since -= pause
            name, _ = requests.agreed(False)
            os._exit(7 if name and signal.Signals[name] in numbers else 8)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_sigterm_ends_at_once_but_not_the_same_one_passed_on_twice():
    """R8: torchrun passes on what SLURM has sent to every process; a warning before the end is no second signal."""
    term, warning = signal.SIGTERM, signal.SIGUSR1
    assert hear(term) == hear(warning) == hear(term, term) == hear(warning, warning, pause=9) == 7
    assert hear(warning, term, pause=9) == 7 and hear(term, warning, pause=9) == 7
    assert hear(term, term, pause=9) == hear(warning, term, term, pause=9) == 128 + term


def test_signals_mean_what_they_meant_before_once_the_steps_are_over():
    """R8: a run that ends gives the handlers back."""
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as requests:
        assert requests.agreed(False) == (None, False) and requests.agreed(True) == (None, True)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# One rank fails


def failing(where: str, call: int = 1) -> str:
    """Python that makes rank 1 fail in the call-th call of a function, in its own words."""
    return f"""
real, calls = {where}, []
def wrong(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        raise RuntimeError("the first of all")
    return real(*args, **kwargs)
if os.environ["RANK"] == "1":
    {where} = wrong
"""


@pytest.mark.parametrize("phase", [
    pytest.param("fsdp_train.load", marks=pytest.mark.slow, id="data"),
    pytest.param("fsdp_train.Llama.forward", marks=pytest.mark.slow, id="forward"),
    pytest.param("fsdp_train.gradient_norm", marks=pytest.mark.slow, id="backward"),
    pytest.param("fsdp_train.checkpoint.write_tensors", id="save"),
    pytest.param("fsdp_train.evaluate", marks=pytest.mark.slow, id="evaluation"),
])  # fmt: skip
def test_a_rank_that_fails_ends_all_and_its_traceback_comes_first(tmp_path, data, cache, phase):
    """R9: in data, forward, backward, save and evaluation; within fifty seconds."""
    run = Torchrun(tmp_path, cache, *arguments(data, tmp_path / "out"), wrong=failing(phase))
    began = time.monotonic()
    code, told = run.end(60)
    assert code != 0 and time.monotonic() - began < 50
    tracebacks = told.split("Traceback (most recent call last)")[1:]
    assert "the first of all" in tracebacks[0] and "rank0" not in tracebacks[0].split("RuntimeError")[0], told[-3000:]
    assert "rank      : 1" in told.split("Root Cause")[1]
    assert not checkpoint.published(tmp_path / "out/checkpoints")


# Started again


@pytest.mark.parametrize("flags", [[], ["--async_save"]], ids=["at once", "in the background"])
@pytest.mark.slow
def test_torchrun_starts_it_again_and_it_continues_from_its_newest_checkpoint(tmp_path, data, cache, reference, flags):
    """R10, R23: after kill -9 of each rank in turn, without --resume; no step twice in metrics.jsonl."""
    out = tmp_path / "out"
    run = Torchrun(tmp_path, cache, *arguments(data, out), *flags, flags=("--max_restarts", "3"))
    for rank, step in ((1, 7), (0, 21)):
        assert wait_for(lambda step=step: newest(out) >= step, 60), run.end(1)
        os.kill(run.worker(rank), signal.SIGKILL)
        assert wait_for(lambda rank=rank: run.log.read_text().count("resuming after step") > 1 - rank, 60), run.end(1)
    code, told = run.end(120)
    assert code == 0, told[-3000:]
    assert told.count("resuming after step") == 2
    assert_equal_to(reference, out)
    assert json.loads((out / "summary.json").read_text())["examples"] == 8 * STEPS


def newest(out: Path) -> int:
    """The step of the newest checkpoint."""
    found = checkpoint.published(out / "checkpoints")
    return checkpoint.step_of(found[-1]) if found else 0


@pytest.mark.slow
def test_a_restart_in_a_folder_chosen_by_itself_takes_no_other_runs_folder(tmp_path, data, cache):
    """R10, R17: without --output a second run is at data-tiny-2; a restart of the first stays with its own."""
    words = [word for word in arguments(data, tmp_path) if word not in ("--output", str(tmp_path))]
    run = Torchrun(tmp_path, cache, *words, flags=("--max_restarts", "3"))
    first = tmp_path / "runs/data-tiny"
    assert wait_for(lambda: checkpoint.published(first / "checkpoints"), 120)
    (tmp_path / "runs/data-tiny-2").mkdir()
    (tmp_path / "runs/data-tiny-2/run.json").write_text("{}")
    os.kill(run.worker(0), signal.SIGKILL)
    code, told = run.end(120)
    assert code == 0 and "resuming after step" in told, told[-3000:]
    assert [p.name for p in (tmp_path / "runs/data-tiny-2").iterdir()] == ["run.json"]
    assert [line["step"] for line in steps_of(first)] == list(range(1, STEPS + 1))


def test_an_attempt_has_one_name_whatever_dead_ones_left_in_the_store():
    """R10: counts of restarts may differ from node to node; some of the dead had asked, one without a name."""
    store = dist.HashStore()
    store.set(f"asked/{store.add('asked', 1)}", "dead")
    store.add("asked", 1)
    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            names = list(threads.map(lambda rank: name_of_attempt(store, rank, 4), range(4), timeout=20))
        assert len(set(names)) == 1 and not store.check([f"{names[0]}/seen"])
        store.set(f"{names[0]}/seen", "")
    assert name_of_attempt(store, 0, 1) != names[0]


def test_a_restart_resumes_from_the_newest_only_once_its_first_attempt_has_begun(tmp_path):
    """R10: until then the first attempt's --resume step-N stands; and a new run starts anew in its own folder."""
    here, binding = SimpleNamespace(store=dist.HashStore()), {"steps": 9}
    chosen = SimpleNamespace(resume="step-1", output=str(tmp_path), allow_changed="")
    (tmp_path / "run.json").write_text("{}")
    for step in (1, 2):
        path = tmp_path / f"checkpoints/step-{step:06d}"
        path.mkdir(parents=True)
        content = {"step": step, "ranks": 1, "settings": binding, "held_out": {}, "files": {},
                   "totals": dict.fromkeys(("examples", "tokens", "labels", "seconds"), 1)}
        (path / "manifest.json").write_text(json.dumps(content | {"sha256": checkpoint._digest(content)}))

    def saved() -> str:
        with ExitStack() as locks:
            return plan._choose_run(chosen, binding, here, "unused", locks)[1].name

    assert [saved(), saved()] == ["step-000001"] * 2
    here.store.set(plan.BEGUN, "")
    assert saved() == "step-000002"


# Two at once


def test_a_run_is_held_by_one_process(tmp_path):
    """R21, R17: until its block is left."""
    with locked(tmp_path):
        told = "another process is writing this run"
        with pytest.raises(UserError, match=told), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_second_resume_of_a_run_that_goes_on_is_refused(tmp_path, data, cache, reference):
    """R2: two writers of one folder."""
    with locked(reference):
        done = run_command(*arguments(data, reference), "--resume", cwd=tmp_path, cache=cache)
    assert done.returncode == 2 and done.stderr.endswith(
        f"{reference}: another process is writing this run; expected it to have ended\n")
