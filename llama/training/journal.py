"""The folder of one run: what was asked (run.json), what happened (metrics.jsonl, loss.png), what came of it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.boundary.errors import UserError, printable
from llama.storage.atomic import replace_durably


def choose_folder(wanted: str | None, default: str, resume: bool) -> Path:
    """Make and name the folder of this run. A former run's folder is only ever continued, and only when asked.

    Where none is `wanted`, `default`, or the first free of default-2, default-3, ...; to resume, the newest of those.
    Raises UserError for a wanted folder that is taken, to resume where no run of ours is, and where none can be made.
    """
    if wanted is not None:
        folder = Path(wanted)
        # A run that was killed as it began can leave a file that had no name yet.
        taken = folder.exists() and (not folder.is_dir() or any(path.suffix != ".tmp" for path in folder.iterdir()))
        if resume and not (folder / "run.json").is_file():
            raise UserError(f"--resume: {folder} holds no run (no run.json)")
        if taken and not resume:
            raise UserError(f"--output {folder}: exists already; name another folder, or continue it with --resume")
        _make(folder, exist_ok=True)
        return folder
    names = [default, *(f"{default}-{number}" for number in range(2, 10_000))]
    if not resume:
        return next(Path(name) for name in names if _make(Path(name), exist_ok=False))
    if not Path(default).exists():
        raise UserError(f"--resume: there is no run to continue at {default}")
    newest = [name for name in names if Path(name).exists()][-1]
    if not (Path(newest) / "run.json").is_file():  # somebody else's, or of a run that died before it began
        raise UserError(f"--resume: {newest} holds no run (no run.json)")
    return Path(newest)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process writes into the folder meanwhile. The system lets go of it when this process dies.

    Raises UserError when another one is at it, as two `--resume` of one run would be. Where the file system knows no
    locks, it promises nothing.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing this run; expected it to have ended") from None
        except OSError:
            pass  # not every file system knows locks
        yield
    finally:
        os.close(handle)


def _make(folder: Path, exist_ok: bool) -> bool:
    """False when the folder is there already: perhaps another run that started at the same moment."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from None
    return True


class Journal:
    """Appends one whole line a step to metrics.jsonl; a process that dies can only lose the line it was writing.

    A disk that refuses a line is told in `error`: other ranks may be waiting, so it is not raised in the middle of a
    step.
    """

    def __init__(self, folder: Path, resumed_step: int = 0):
        self.path = folder / "metrics.jsonl"
        self.error: UserError | None = None
        # A run without any checkpoint begins again, and measures its step 0 again.
        kept = read_metrics(self.path) if resumed_step else []
        self.lines = [line for line in kept if line["step"] <= resumed_step]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        replace_durably(self.path, text)  # steps after the checkpoint will be done, and written, again
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **line) -> None:
        self.lines.append(line)
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            self.error = UserError(f"{self.path}: {error.strerror}")

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a line cut short by a crash is left out, and so is all after it."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                if type(line["step"]) is not int:
                    break
            except (ValueError, TypeError, KeyError):
                break
            lines.append(line)
    return lines


def draw_loss_curve(lines: list[dict], out: Path, title: str) -> None:
    """Training loss (every step, and its running mean), held-out loss and accuracy where they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if not train:
        return
    steps, losses = zip(*train, strict=True)
    smooth, mean = [], losses[0]
    for loss in losses:
        mean += (loss - mean) * max(0.1, 1 / (len(smooth) + 1))
        smooth.append(mean)
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120)
    axis.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training loss, each step")
    axis.plot(steps, smooth, color="#08519c", linewidth=1.8, label="training loss, running mean")
    tested = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
    if tested:
        axis.plot([s for s, _ in tested], [m["loss"] for _, m in tested], "o-", color="#d94801", label="held-out loss")
    axis.set(xlabel="optimizer step", ylabel="loss (nats per label)", yscale="log",
             title=printable(title).replace("$", r"\$"))
    axis.grid(alpha=0.25)
    handles, labels = axis.get_legend_handles_labels()
    if any("accuracy" in m for _, m in tested):
        right = axis.twinx()
        right.plot([s for s, _ in tested], [m["accuracy"] for _, m in tested], "s--", color="#238b45",
                   label="held-out accuracy")
        right.set(ylabel="accuracy", ylim=(0, 1.02))
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))  # room for the legend below
    figure.savefig(out)
    plt.close(figure)
