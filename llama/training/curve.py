"""loss.png: a picture of what a run has measured. Draw one run, or compare several, at any time, also while they train:

    python -m llama.training.curve RUN [RUN ...] [--output FILE]
"""

import json
import os
import time
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llama.boundary.command_line import Parser, run
from llama.boundary.errors import UserError, as_user_error, one_line
from llama.training.figure import Curve, figure_of
from llama.training.journal import read_metrics

SECONDS_BETWEEN = 30  # a run draws at most this often; importing matplotlib alone takes a second


def name_of(identity: dict) -> str:
    """The names of a run's model and data, without the folders that they are in."""
    model, data = (os.path.basename(os.path.normpath(identity[name]))[:40] for name in ("model", "data"))
    return f"{model} on {data}" + (" (bundled sample)" if identity["bundled_sample"] else "")


def read_curve(folder: Path) -> Curve:
    """The curve of a run's folder. Raises UserError where no run is, or none has taken a step."""
    about = folder / "run.json"
    with as_user_error(about, "the run.json of a run"):
        content = json.loads(about.read_text(encoding="utf-8"))
        identity, on_prompts = content["identity"], content["settings"]["train_on_prompt"]
        curve = Curve(
            name_of(identity),
            read_metrics(folder / "metrics.jsonl"),
            int(content["examples"]["answers"]),
            bool(on_prompts),
        )
    if not curve.train:
        raise UserError(f"{folder / 'metrics.jsonl'}: has no step yet, expected one or more")
    return curve


class Picture:
    """The loss.png of a run that goes on. It is drawn now and then; if that fails, the run goes on without it."""

    def __init__(self, path: Path, complain: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.path = path
        self.complain = complain
        self.clock = clock
        self.drawn: float | None = None
        self.has_complained = False

    def draw(self, curve: Curve, is_last: bool = False) -> None:
        """Draw, unless it was drawn a moment ago and this is not the last time, or there is no step yet."""
        if not curve.train:
            return
        if self.drawn is not None and self.clock() - self.drawn < SECONDS_BETWEEN and not is_last:
            return
        try:
            draw([curve], self.path)
        except Exception as error:  # whatever it is, it is no reason to lose a run
            if not self.has_complained:
                self.complain(f"{self.path}: not drawn ({one_line(error)})")
            self.has_complained = True
        self.drawn = self.clock()


def draw(curves: list[Curve], path: Path) -> None:
    """Write a PNG. Who opens it while it is written finds the old picture or the new one, never a part."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with warnings.catch_warnings(action="ignore"):  # of a name with characters that the font does not have
            figure_of(curves).savefig(unfinished, format="png")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="a run's folder")
    parser.add_argument("--output", type=Path, help="the picture (default: loss.png in the run; of several: runs.png)")
    asked = parser.parse_args()
    output = asked.output or (asked.run[0] / "loss.png" if len(asked.run) == 1 else Path("runs.png"))
    curves = [read_curve(folder) for folder in asked.run]
    if len(curves) > 1:  # they may train the same model on the same data
        named = zip(asked.run, curves, strict=True)
        curves = [replace(curve, name=f"{folder.name}: {curve.name}") for folder, curve in named]
    with as_user_error(f"--output {output}"):
        draw(curves, output)
    print(f"{output}: {'; '.join(curve.title for curve in curves)}")


if __name__ == "__main__":
    run(main)
