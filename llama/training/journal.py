"""metrics.jsonl: one line for every step, whole even after a crash."""

import json
from pathlib import Path

from llama.boundary.durable import replace_durably
from llama.boundary.errors import UserError


class Journal:
    """Appends whole lines to metrics.jsonl. A process that is killed loses at most the line it was writing.

    An error of the disk is kept in `error` and not raised: other ranks may be in the middle of a step.
    """

    def __init__(self, folder: Path, resumed_step: int = 0):
        self.path = folder / "metrics.jsonl"
        self.error: UserError | None = None
        # A run that has no checkpoint yet starts again from step 0, and measures step 0 again.
        kept = read_metrics(self.path) if resumed_step else []
        self.lines = [line for line in kept if line["step"] <= resumed_step]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        replace_durably(self.path, text)  # steps after the checkpoint will be trained, and written, again
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
    """The lines of a metrics.jsonl, up to the first one that is damaged (a crash can cut off the last line)."""
    lines: list[dict] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if type(line["step"]) is not int:
                break
        except (ValueError, TypeError, KeyError):
            break
        lines.append(line)
    return lines
