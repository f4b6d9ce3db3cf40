"""--track: the lines of metrics.jsonl, passed on to TensorBoard, Weights & Biases or Trackio as they are written.

metrics.jsonl stays the record of the run; a tracker only shows it, and one that fails never ends the run. None of them
is installed with this project: each is imported when it is asked for.
"""

import uuid
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import Any

from llama.boundary.durable import replace_durably
from llama.boundary.errors import UserError, one_line

TRACKERS = ("none", "tensorboard", "wandb", "trackio")  # the packages have these names
PROJECT = "llama-fine-tuning"


def is_installed(kind: str) -> bool:
    return kind == "none" or util.find_spec(kind) is not None


class TensorBoard:
    """Files in RUN/tensorboard. Of what it holds already, TensorBoard hides what is after `first_step`."""

    def __init__(self, folder: Path, settings: dict, first_step: int):
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.writer.add_text("settings", "\n".join(f"    {key} = {value}" for key, value in settings.items()))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def name_file(folder: Path, kind: str) -> Path:
    """Exists once a run has been shown in this tracker."""
    return folder / f"{kind}.name"


def start(kind: str, folder: Path, settings: dict, first_step: int):
    """What has `log(values, step)` and `finish()`: wandb and trackio have both as functions of the module.

    A resumed run continues under the name that it had: RUN/wandb.name holds it.
    """
    path = name_file(folder, kind)
    if not path.exists():
        replace_durably(path, f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}\n")
    name = path.read_text(encoding="utf-8").strip()
    if kind == "tensorboard":
        return TensorBoard(folder, settings, first_step)
    module = import_module(kind)
    where = {"id": name, "dir": str(folder)} if kind == "wandb" else {}
    module.init(project=PROJECT, name=name, config=settings, resume="allow", **where)
    return module


class Tracker:
    """Passes on each line once, also if a resumed run takes the steps after its checkpoint, and writes them, again."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        settings: dict,
        first_step: int,
        earlier: list[dict],
        complain: Callable[[str], None],
    ):
        """`earlier`: what metrics.jsonl held when this process began.

        Raises UserError for a tracker that does not start. A resumed run goes on without it: perhaps nobody is there.
        """
        self.kind = kind
        self.complain = complain
        self.target: Any = None  # what `start` returns
        self.passed_on: set[tuple[int, bool]] = set()
        if name_file(folder, kind).exists():
            # wandb and trackio keep what they have; TensorBoard hides what it has after first_step.
            kept = [line for line in earlier if kind != "tensorboard" or line["step"] <= first_step]
            self.passed_on = {_mark(line) for line in kept}
        try:
            self.target = start(kind, folder, settings, first_step)
        except (Exception, SystemExit) as error:
            if not first_step:
                raise UserError(f"--track {kind}: does not start ({one_line(error)}); leave --track out") from None
            complain(f"--track {kind}: does not start, the run goes on without it ({one_line(error)})")

    def log(self, line: dict) -> None:
        """Pass on the numbers of a line: {"train/loss": 0.7, ...} or {"held_out/accuracy": 0.5, ...}."""
        if _mark(line) in self.passed_on:
            return
        self.passed_on.add(_mark(line))
        part, values = ("held_out", line["held_out"]) if "held_out" in line else ("train", line)
        values = {f"{part}/{name}": value for name, value in values.items() if name != "step"}
        self._try(lambda: self.target.log(values, step=line["step"]))

    def finish(self) -> None:
        self._try(lambda: self.target.finish())

    def _try(self, action: Callable[[], object]) -> None:
        """Whatever fails in a tracker is no reason to lose a run. It is told once, and the tracker is left alone."""
        if not self.target:
            return
        try:
            action()
        except (Exception, SystemExit) as error:  # SystemExit: a package may think that it is the program
            self.target = None
            self.complain(f"--track {self.kind}: failed, the run goes on without it ({one_line(error)})")


def _mark(line: dict) -> tuple[int, bool]:
    """Tells the lines of a run apart: a step has one of training and one of evaluation."""
    return line["step"], "held_out" in line
