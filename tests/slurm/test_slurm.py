"""slurm/train.sbatch on a real SLURM, which cluster.sh starts on this machine for these tests."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from runs import ROOT, assert_equal_runs, lines_of, saved_steps, train_here, wait_for, write_reviews

from llama.boundary.command_line import parse
from llama.training.settings import TrainingSettings

CLUSTER = Path(__file__).with_name("cluster.sh")
NEEDED = ("munged", "slurmctld", "slurmd", "unshare")
STEPS = 60
pytestmark = pytest.mark.slow


class Slurm:
    """Nodes of two processes each, and what a user does with them."""

    def __init__(self, folder: Path, data: Path, cache: Path):
        self.folder = folder
        self.data = data
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))} | {
            "SLURM_CONF": str(folder / "slurm.conf"), "VENV": sys.prefix, "LLAMA_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def cluster(self, *words: object) -> None:
        done = subprocess.run([CLUSTER, *map(str, words)], text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr

    def __call__(self, *command: object) -> str:
        return subprocess.run(
            list(map(str, command)), text=True, capture_output=True, check=True, env=self.environment, cwd=ROOT
        ).stdout.strip()

    def flags(self, output: Path) -> list[str]:
        return ["--data", str(self.data), "--template", "imdb", "--output", str(output), "--max_steps", str(STEPS),
                "--epochs", "100", "--batch_size", "2", "--save_every", "20", "--eval_limit", "4", "--eval_every", "0",
                "--sample_prompts", "0", "--max_length", "192"]  # fmt: skip

    def submit(self, output: Path, *more: str) -> str:
        """The number of a new job that trains in this folder."""
        of_test = ["--gpus-per-node=2", "--cpus-per-task=1", f"--output={self.folder}/%j.log", "--parsable"]
        return self("sbatch", *of_test, "slurm/train.sbatch", *self.flags(output), *more)

    def state(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self("scontrol", "show", "job", job)))

    def end(self, job: str) -> tuple[str, int, str]:
        """Wait for its end: its state, how often it was started again, and its log."""
        assert wait_for(lambda: self.state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
        last = self.state(job)
        return last["JobState"], int(last["Restarts"]), (self.folder / f"{job}.log").read_text()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    missing = [program for program in NEEDED if not shutil.which(program)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and a SLURM to start; missing: {', '.join(missing) or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
    data = write_reviews(folder / "data", 16)
    slurm = Slurm(folder / "cluster", data, folder / "cache")
    slurm.cluster("start", slurm.folder)
    try:
        yield slurm
    finally:
        slurm.cluster("stop", slurm.folder)


@pytest.fixture(scope="module")
def uninterrupted(slurm, ranks, tmp_path_factory) -> Path:
    """Four processes of one machine, without SLURM."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    ranks(4, train_here, slurm.folder / "cache", parse(TrainingSettings, slurm.flags(out)).with_recipe(4))
    return out


def after_step(output: Path, step: int):
    """Whether the run in this folder has taken so many steps."""
    metrics = output / "metrics.jsonl"
    return lambda: metrics.is_file() and any(line["step"] >= step for line in lines_of(output))


def process_on(node: str, output: Path) -> int:
    """One of the processes that train in this folder, on this node."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            words = (process / "cmdline").read_text().split("\0")
            if "-u" in words and str(output) in words:  # torchrun itself, and srun, have no -u
                if f"SLURMD_NODENAME={node}\0" in (process / "environ").read_text():
                    return int(process.name)
    raise AssertionError(f"no process of {output} on {node}")


@contextmanager
def waiting(process: int) -> Iterator[None]:
    """The run does not end before what the block asks SLURM for has begun: one of its processes waits that long."""
    os.kill(process, signal.SIGSTOP)
    yield
    time.sleep(2)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


def test_two_nodes_of_two_processes_train_as_one_of_four(slurm, uninterrupted, tmp_path):
    out = tmp_path / "out"
    state, restarts, log = slurm.end(slurm.submit(out))
    assert (state, restarts) == ("COMPLETED", 0), log
    assert "on n[1-2]" in log and "ranks: 4 (cpu)" in log
    assert_equal_runs(out, uninterrupted, STEPS)


def test_a_job_whose_time_is_nearly_over_saves_and_comes_back_by_itself(slurm, uninterrupted, tmp_path):
    """R8: SLURM sends USR1 to the script, as scancel does here."""
    out = tmp_path / "out"
    job = slurm.submit(out)
    assert wait_for(after_step(out, 5))
    with waiting(process_on("n2", out)):
        slurm("scancel", "--batch", "--signal=USR1", job)
    state, restarts, log = slurm.end(job)
    assert (state, restarts) == ("COMPLETED", 1), log
    stopped = re.search(rf"SIGUSR1: saved and stopped after step (\d+) of {STEPS}", log)
    assert stopped and f"resuming after step {stopped[1]} of {STEPS}" in log
    assert_equal_runs(out, uninterrupted, STEPS)


def test_a_lost_node_is_named_and_the_job_continues_on_others(slurm, uninterrupted, tmp_path):
    out = tmp_path / "out"
    job = slurm.submit(out)
    assert wait_for(after_step(out, 21)) and saved_steps(out) == [20]
    slurm.cluster("kill", slurm.folder, "n2")
    state, restarts, log = slurm.end(job)
    slurm.cluster("boot", slurm.folder, "n2")
    assert (state, restarts) == ("COMPLETED", 1), log
    assert "Node failure on n2" in log and f"resuming after step 20 of {STEPS}" in log and "on n[1,3]" in log
    assert_equal_runs(out, uninterrupted, STEPS)


def test_a_killed_process_ends_the_job_with_its_nodes_name_and_new_jobs_continue(slurm, uninterrupted, tmp_path):
    """The second job is cancelled: it saves first, and is not started again."""
    out = tmp_path / "out"
    job = slurm.submit(out)
    assert wait_for(after_step(out, 21)) and saved_steps(out) == [20]
    os.kill(process_on("n2", out), signal.SIGKILL)
    state, restarts, log = slurm.end(job)
    assert (state, restarts) == ("FAILED", 0) and "srun: error: n2: task 1: Exited with exit code 1" in log, log

    job = slurm.submit(out)
    assert wait_for(after_step(out, 25))
    with waiting(process_on("n2", out)):
        slurm("scancel", job)
    state, restarts, log = slurm.end(job)
    assert (state, restarts) == ("CANCELLED", 0) and f"resuming after step 20 of {STEPS}" in log, log
    stopped = saved_steps(out)[-1]
    assert stopped >= 25

    state, restarts, log = slurm.end(slurm.submit(out))
    assert (state, restarts) == ("COMPLETED", 0) and f"resuming after step {stopped} of {STEPS}" in log, log
    assert_equal_runs(out, uninterrupted, STEPS)


def test_a_mistyped_flag_is_one_line_and_ends_the_job(slurm, tmp_path):
    state, restarts, log = slurm.end(slurm.submit(tmp_path / "out", "--epoch", "3"))
    assert (state, restarts) == ("FAILED", 0)
    assert log == "fsdp_train.py: unrecognized arguments: --epoch 3. Did you mean --epochs?\n"
