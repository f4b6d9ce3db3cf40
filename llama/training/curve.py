"""loss.png: a picture of what a run has measured. Draw one run, or compare several, at any time, also while they train:

    python -m llama.training.curve RUN [RUN ...] [--output FILE]

The panels, from above: loss; accuracy, where it was measured; learning rate and the gradient's norm.
"""

import json
import math
import os
import time
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama.boundary.command_line import Parser, run
from llama.boundary.errors import UserError, as_user_error, one_line, printable
from llama.training.journal import read_metrics

FEWEST_TO_SMOOTH = 20  # with fewer steps a mean hides more than it shows
SECONDS_BETWEEN = 30  # a run draws at most this often; importing matplotlib alone takes a second
COLOURS = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#a50f15", "#636363", "#b8860b", "#008080")
GREY = "#636363"


@dataclass(frozen=True)
class Curve:
    """What is drawn of one run: its name, the lines of its metrics.jsonl, and what guessing would reach."""

    name: str
    lines: list[dict]
    answers: int = 0  # how many answers there are to choose from; 0: answers are free text
    on_prompts: bool = False  # whether the training loss is that of prompts too

    @property
    def train(self) -> list[dict]:
        return [line for line in self.lines if "loss" in line]

    def held_out(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric was measured on held-out data, and its values."""
        measured = [line for line in self.lines if name in line.get("held_out", {})]
        return [line["step"] for line in measured], [line["held_out"][name] for line in measured]

    def chance_loss(self) -> float | None:
        """Of a model that knows the answers by heart and guesses which: ln(answers) for each example, over its labels.
        None where answers are free text, or the labels of an answer are not known."""
        first = self.train[0] if self.train else {}
        if not self.answers or self.on_prompts or "labels" not in first:
            return None
        examples = round(first["examples_per_second"] * first["seconds"])
        return math.log(self.answers) * examples / first["labels"]

    @property
    def title(self) -> str:
        """The name and the result so far."""
        for metric, form in (("accuracy", "{:.1%}"), ("loss", "{:.4g}")):
            values = self.held_out(metric)[1]
            if values:
                return f"{self.name}: held-out {metric} {_from_to(values, form)}"
        return f"{self.name}: training loss {_from_to([line['loss'] for line in self.train], '{:.4g}')}"


def _from_to(values: list[float], form: str) -> str:
    """The first value and the last, or the only one."""
    return " → ".join(form.format(value) for value in [values[0], *values[1:][-1:]]).replace("%", " %")


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
        self.path, self.complain, self.clock = path, complain, clock
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


def figure_of(curves: list[Curve]):
    """The matplotlib Figure. Each of several runs has a colour; a single run has one for each kind of line."""
    from matplotlib.figure import Figure  # without pyplot: it needs no screen, and keeps no list of figures
    from matplotlib.ticker import MaxNLocator

    has_accuracy = any(curve.held_out("accuracy")[0] for curve in curves)
    heights = [3, 1.2, 1] if has_accuracy else [3, 1]
    figure = Figure(figsize=(8, 1 + sum(heights)), dpi=120, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_loss(panels[0], curves)
    if has_accuracy:
        _draw_accuracy(panels[1], curves)
    _draw_rate_and_norm(panels[-1], curves)
    for panel in panels:
        panel.grid(alpha=0.25)
    panels[-1].set_xlabel("optimizer step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    last = max(line["step"] for curve in curves for line in curve.lines)
    panels[-1].set_xlim(-0.03 * last, 1.03 * last)
    title = curves[0].title if len(curves) == 1 else f"{len(curves)} runs"
    panels[0].set_title(_plain(title), fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def _draw_loss(panel, curves: list[Curve]) -> None:
    single = len(curves) == 1
    for curve, colour in zip(curves, _colours(curves), strict=True):
        steps = [line["step"] for line in curve.train]
        losses = [line["loss"] for line in curve.train]
        name = "training loss" if single else _plain(curve.title)
        if len(steps) < FEWEST_TO_SMOOTH:
            panel.plot(steps, losses, ".-", color=colour, linewidth=1.2, label=name)
        else:
            panel.plot(steps, losses, color=colour, alpha=0.35, linewidth=0.8, label=name if single else None)
            reach, means = smoothed(losses)
            name = f"geometric mean of {2 * reach + 1} steps" if single else name
            panel.plot(steps[reach:-reach], means, color=colour, linewidth=1.8, label=name)
        steps, losses = curve.held_out("loss")
        if steps:
            colour = COLOURS[1] if single else colour
            panel.plot(steps, losses, label="held-out loss" if single else None, **_points(steps, colour))
    panel.set_ylabel("loss (nats per label)")
    _scale(panel, [line["loss"] for curve in curves for line in curve.train])
    chances = {(curve.answers, curve.chance_loss()) for curve in curves if curve.chance_loss()}
    for answers, loss in chances:
        factor = "" if math.isclose(loss, math.log(answers)) else f" x {loss / math.log(answers):.2g}"
        _draw_chance(panel, loss, f"chance: ln {answers}{factor} = {loss:.3g}")


def _draw_accuracy(panel, curves: list[Curve]) -> None:
    single = len(curves) == 1
    for curve, colour in zip(curves, _colours(curves), strict=True):
        steps, accuracy = curve.held_out("accuracy")
        panel.plot(steps, [100 * part for part in accuracy], **_points(steps, COLOURS[2] if single else colour))
    for answers in {curve.answers for curve in curves if curve.answers}:
        _draw_chance(panel, 100 / answers, f"chance: {100 / answers:.3g} %")
    panel.set(ylabel="held-out\naccuracy (%)", ylim=(-3, 103))


def _draw_rate_and_norm(panel, curves: list[Curve]) -> None:
    """The rate to the left; to the right the norm before clipping, on a logarithmic scale."""
    single = len(curves) == 1
    right = panel.twinx()
    for curve, colour in zip(curves, _colours(curves), strict=True):
        for axis, name, own in ((panel, "learning_rate", GREY), (right, "grad_norm", COLOURS[3])):
            measured = [(line["step"], line[name]) for line in curve.train if name in line]
            style = {"linewidth": 0.8, "alpha": 0.6} if axis is right else {"linewidth": 1.5}
            style["marker"] = "." if len(measured) < FEWEST_TO_SMOOTH else ""
            axis.plot(*zip(*measured, strict=True), color=own if single else colour, **style)
    panel.set_ylabel("learning rate", color=GREY)
    panel.yaxis.set_major_formatter(lambda value, _: _decimal(value))
    panel.set_ylim(bottom=0)
    right.set_ylabel("gradient norm" if single else "gradient norm\n(thin)", color=COLOURS[3])
    _scale(right, [line["grad_norm"] for curve in curves for line in curve.train if "grad_norm" in line])


def _colours(curves: list[Curve]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(curves))]


def _points(steps: list[int], colour: str) -> dict:
    """How values are drawn that were measured rarely: as points. Nobody knows what was between them; a dotted line
    leads the eye where there are more than two."""
    line = ":" if len(steps) > 2 else ""
    return {"color": colour, "marker": "o", "markersize": 5, "linewidth": 0.8, "linestyle": line}


def _draw_chance(panel, height: float, text: str) -> None:
    panel.axhline(height, color=GREY, linewidth=0.8, linestyle="--")
    panel.annotate(
        text, (0.995, height), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=GREY,
    )  # fmt: skip


def _scale(panel, values: list[float]) -> None:
    """A logarithmic axis where the values differ by more than a factor of 3, with plain decimals at its ticks."""
    from matplotlib.ticker import LogLocator, NullLocator

    positive = [value for value in values if 0 < value < math.inf]
    if not positive or max(positive) < 3 * min(positive):
        panel.ticklabel_format(useOffset=False, style="plain")
        return
    decades = math.log10(max(positive) / min(positive))
    digits = (1, 2, 5)
    if decades < 1:
        digits = (1, 1.5, 2, 3, 5, 7)
    elif decades > 2.5:
        digits = (1,)
    panel.set_yscale("log", nonpositive="mask")
    panel.yaxis.set_major_locator(LogLocator(subs=digits))
    panel.yaxis.set_major_formatter(lambda value, _: _decimal(value))
    panel.yaxis.set_minor_locator(NullLocator())


def _decimal(value: float) -> str:
    """0.00002 instead of 2e-05."""
    return np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="-")


def _plain(text: str) -> str:
    """The text as it is: without control characters, and with $ as $, between which matplotlib reads formulas."""
    return printable(text).replace("$", r"\$")


def smoothed(losses: list[float]) -> tuple[int, list[float]]:
    """`reach`, and the geometric mean over each step with the `reach` steps before and after it.

    The first and the last `reach` steps have none: a mean of fewer would jump with every step. An arithmetic mean would
    show for a long time the first losses, which are many times larger than those that follow.
    """
    reach = max(2, len(losses) // 40)
    smallest = min((loss for loss in losses if loss > 0), default=1.0)
    width = 2 * reach + 1
    logs = np.log(np.maximum(losses, smallest))
    return reach, np.exp(np.convolve(logs, np.full(width, 1 / width), "valid")).tolist()


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
