"""What loss.png shows: the panels are loss; accuracy, where it was measured; learning rate and the gradient's norm."""

import math
from dataclasses import dataclass

import numpy as np

from llama.boundary.errors import printable

FEWEST_TO_SMOOTH = 20  # with fewer steps a mean hides more than it shows
OF_RUNS = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#a50f15", "#008080", "#b8860b", "#525252")  # colours
TRAINING, HELD_OUT, ACCURACY, NORM, *_ = OF_RUNS  # of a single run
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
        losses = [line["loss"] for line in self.train]
        return f"{self.name}: training loss {_from_to(losses, '{:.4g}')}"


def _from_to(values: list[float], form: str) -> str:
    """The first value and the last, or the only one."""
    ends = [values[0], *values[1:][-1:]]
    texts = [form.format(value) for value in ends]
    return " → ".join(texts).replace("%", " %")


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
    last = max(line["step"] for curve in curves for line in curve.lines)
    panels[-1].set_xlim(-0.03 * last, 1.03 * last)
    panels[-1].set_xlabel("optimizer step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    title = curves[0].title if len(curves) == 1 else f"{len(curves)} runs"
    panels[0].set_title(_plain(title), fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def _coloured(curves: list[Curve], own: str) -> list[tuple[Curve, str]]:
    """Each curve with its colour: `own` for a single one."""
    if len(curves) == 1:
        return [(curves[0], own)]
    return [(curve, OF_RUNS[number % len(OF_RUNS)]) for number, curve in enumerate(curves)]


def _draw_loss(panel, curves: list[Curve]) -> None:
    single = len(curves) == 1
    for curve, colour in _coloured(curves, TRAINING):
        name = "training loss" if single else _plain(curve.title)
        _draw_training_loss(panel, curve, colour, name, single)
    for curve, colour in _coloured(curves, HELD_OUT):
        _draw_points(panel, *curve.held_out("loss"), colour, "held-out loss" if single else None)
    panel.set_ylabel("loss (nats per label)")
    losses = [line["loss"] for curve in curves for line in curve.train]
    _scale(panel, losses)
    for answers, loss in {(curve.answers, curve.chance_loss()) for curve in curves}:
        if loss:
            per_label = loss / math.log(answers)
            factor = "" if math.isclose(per_label, 1) else f" x {per_label:.2g}"
            _draw_chance(panel, loss, f"chance: ln {answers}{factor} = {loss:.3g}")


def _draw_training_loss(panel, curve: Curve, colour: str, name: str, single: bool) -> None:
    steps = [line["step"] for line in curve.train]
    losses = [line["loss"] for line in curve.train]
    if len(steps) < FEWEST_TO_SMOOTH:
        panel.plot(steps, losses, ".-", color=colour, linewidth=1.2, label=name)
        return
    panel.plot(steps, losses, color=colour, alpha=0.35, linewidth=0.8, label=name if single else None)
    reach, means = smoothed(losses)
    panel.plot(
        steps[reach:-reach],
        means,
        color=colour,
        linewidth=1.8,
        label=f"geometric mean of {2 * reach + 1} steps" if single else name,
    )


def _draw_accuracy(panel, curves: list[Curve]) -> None:
    for curve, colour in _coloured(curves, ACCURACY):
        steps, accuracy = curve.held_out("accuracy")
        percent = [100 * part for part in accuracy]
        _draw_points(panel, steps, percent, colour)
    for answers in {curve.answers for curve in curves if curve.answers}:
        chance = 100 / answers
        _draw_chance(panel, chance, f"chance: {chance:.3g} %")
    panel.set_ylabel("held-out\naccuracy (%)")
    panel.set_ylim(-3, 103)


def _draw_rate_and_norm(panel, curves: list[Curve]) -> None:
    """The rate to the left, and to the right the norm before clipping, thin."""
    right = panel.twinx()
    for curve, colour in _coloured(curves, GREY):
        _draw_line(panel, curve, "learning_rate", color=colour, linewidth=1.5)
    for curve, colour in _coloured(curves, NORM):
        _draw_line(right, curve, "grad_norm", color=colour, linewidth=0.8, alpha=0.6)
    panel.set_ylabel("learning rate", color=GREY)
    panel.yaxis.set_major_formatter(lambda value, _: _decimal(value))
    panel.set_ylim(bottom=0)
    right.set_ylabel("gradient norm\n(thin)", color=NORM)
    lines = [line for curve in curves for line in curve.train]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    _scale(right, norms)


def _draw_line(axis, curve: Curve, name: str, **style) -> None:
    lines = [line for line in curve.train if name in line]
    marker = "." if len(lines) < FEWEST_TO_SMOOTH else ""
    steps = [line["step"] for line in lines]
    values = [line[name] for line in lines]
    axis.plot(steps, values, marker=marker, **style)


def _draw_points(panel, steps: list[int], values: list[float], colour: str, label: str | None = None) -> None:
    """What was measured rarely, as points: nobody knows what was between. From three on a dotted line leads the eye."""
    if not steps:
        return
    panel.plot(
        steps,
        values,
        color=colour,
        marker="o",
        markersize=5,
        linewidth=0.8,
        linestyle=":" if len(steps) > 2 else "",
        label=label,
    )


def _draw_chance(panel, height: float, text: str) -> None:
    """What guessing reaches, as a line with its name at the right end."""
    panel.axhline(height, color=GREY, linewidth=0.8, linestyle="--")
    panel.annotate(
        text,
        xy=(0.995, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color=GREY,
    )


def _scale(panel, values: list[float]) -> None:
    """A logarithmic axis where the values differ by more than a factor of 3, with plain decimals at its ticks."""
    from matplotlib.ticker import LogLocator, NullLocator

    positive = [value for value in values if 0 < value < math.inf]
    if not positive or max(positive) < 3 * min(positive):
        panel.ticklabel_format(useOffset=False, style="plain")
        return
    decades = math.log10(max(positive) / min(positive))
    digits: tuple[float, ...] = (1, 2, 5)
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
    weights = np.full(width, 1 / width)
    means = np.convolve(logs, weights, "valid")
    return reach, np.exp(means).tolist()
