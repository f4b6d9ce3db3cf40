"""Whole runs for tests: their data, a run in a test worker or as a command, and what a run has left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from sharded import this_launch, this_process

import fsdp_train
from llama.boundary.errors import UserError
from llama.storage import manifest
from llama.storage.manifest import published, step_of
from llama.training import curve as curves
from llama.training.settings import TrainingSettings

ROOT = Path(fsdp_train.__file__).parent
WORDS = {0: ["dull", "weak", "slow"], 1: ["bright", "strong", "quick"]}
HANG = 240  # seconds: stops a test that hangs, and judges nothing


# What runs train on


def write_reviews(folder: Path, count: int = 12) -> Path:
    """Reviews of very different lengths, so that ranks and micro-batches never hold equal numbers of tokens."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = [{"text": " ".join(WORDS[i % 2][j % 3] for j in range(1 + (7 * i) % 41)), "label": i % 2}
                for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# Runs in test workers


@contextmanager
def replaced(owner: object, **values) -> Iterator[None]:
    """Other attributes of a module or class while the block runs; `monkeypatch` does not reach test workers."""
    kept = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


def train_here(
    cache: Path, chosen: TrainingSettings, die_in_step: int | None = None, draw: bool = False
) -> None:
    """`fsdp_train.main` in a test worker: its settings are `chosen`, and its processes have joined already.

    In its step number `die_in_step`, counted from 1, it stops as if it had been killed. `draw`: draw the loss curve,
    which takes a third of a short run's time.
    """
    os.environ["LLAMA_CACHE"] = str(cache)
    real, runs = fsdp_train.train_step, []

    def train_step(current: fsdp_train.Run, step: int):
        runs.append(current)
        if len(runs) == die_in_step:
            raise ConnectionResetError("pulled the plug")
        return real(current, step)

    curve = {} if draw else {"draw": lambda *_: None}
    joined = {
        "parse": lambda *_, **__: chosen,
        "launch": lambda: this_launch(chosen.sharding),
        "join": lambda *asked: nullcontext(this_process(*asked)),
    }
    with replaced(fsdp_train, train_step=train_step, **joined), replaced(curves, **curve):
        try:
            fsdp_train.main()
        except ConnectionResetError:
            assert die_in_step
            # A killed process takes its threads with it. Here the thread of an asynchronous save would live on and
            # publish a checkpoint in the middle of the run that is resumed.
            if runs[-1].saver.thread:
                runs[-1].saver.thread.join()


def refused(cache: Path, chosen: TrainingSettings) -> str:
    """The error that a run in a test worker ends with; "" where there is none."""
    try:
        train_here(cache, chosen)
    except UserError as error:
        return str(error)
    return ""


# Runs as commands


def environment(cache: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return kept | {"LLAMA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def launcher(ranks: int, *flags: str) -> list[str]:
    """The beginning of a command: torchrun, or Python alone for no ranks."""
    if not ranks:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *flags]


def run_command(*arguments: object, cwd: Path, cache: Path, ranks: int = 0) -> subprocess.CompletedProcess:
    """`fsdp_train.py` with these arguments, to its end."""
    return subprocess.run(
        [*launcher(ranks), str(ROOT / "fsdp_train.py"), *map(str, arguments)],
        cwd=cwd, env=environment(cache), text=True, capture_output=True, timeout=HANG,
    )  # fmt: skip


class Torchrun:
    """A run of two ranks under torchrun, in the background; `wrong`: Python that each of them executes first."""

    def __init__(self, folder: Path, cache: Path, *arguments: object, flags: tuple = (), wrong: str = ""):
        script = ROOT / "fsdp_train.py"
        if wrong:
            script = folder / "wrong.py"
            script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport fsdp_train\n{wrong}\n"
                              "fsdp_train.record(fsdp_train.run)(fsdp_train.main, keep_going=True)\n")
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self.agent = subprocess.Popen([*launcher(2, *flags), str(script), *map(str, arguments)],
                                          env=environment(cache), stdout=log, stderr=log, cwd=folder)

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *_) -> None:
        """Nothing outlives a test that failed."""
        if self.agent.poll() is None:
            workers = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
            for pid in [*map(int, workers), self.agent.pid]:
                os.kill(pid, signal.SIGKILL)
            self.agent.wait()

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit status, and everything that it printed."""
        self.agent.wait(HANG)
        return self.agent.returncode, self.log.read_text()


def wait_for(condition: Callable[[], object]) -> bool:
    """Look until the condition holds; False where it never does."""
    deadline = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# What runs have left behind


def lines_of(output: Path) -> list[dict]:
    """The whole lines of metrics.jsonl: a run that goes on may be writing another one."""
    text = (output / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_of(output: Path) -> list[dict]:
    """What every step has computed, without its times."""
    kept = ("step", "loss", "grad_norm", "learning_rate")
    return [{name: line[name] for name in kept} for line in lines_of(output) if "loss" in line]


def summary_of(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


def saved_steps(output: Path) -> list[int]:
    """The steps of all its checkpoints, oldest first."""
    return [step_of(path) for path in published(output / "checkpoints")]


def rewrite(saved: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest of a checkpoint, as an attacker might: its own digest is right again."""
    content = json.loads((saved / "manifest.json").read_text())
    del content["sha256"]
    change(content)
    (saved / "manifest.json").write_text(json.dumps(content | {"sha256": manifest._digest(content)}))


def final_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights and moments in the newest checkpoint."""
    newest = published(output / "checkpoints")[-1]
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether both hold equal tensors, bit for bit, under the same names, and at least one."""
    return bool(ours) and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_equal_runs(found: Path, expected: Path, steps: int) -> None:
    """Bit for bit: every loss, norm and rate of so many steps, and the weights and moments after the last one."""
    assert steps_of(found) == steps_of(expected)
    assert [line["step"] for line in steps_of(found)] == list(range(1, steps + 1))
    assert same(final_state(found), final_state(expected))
