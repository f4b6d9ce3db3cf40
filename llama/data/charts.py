"""Two charts of a data set: how long its examples are, and which answers they have."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama.boundary.errors import printable
from llama.data.examples import EncodedData

MOST_BINS = 50
BAR = 0.4  # the width of a bar
LIMIT_COLOUR = "#d94801"
Splits = dict[str, EncodedData]


def draw(splits: Splits, answers: Sequence[str], max_length: int, folder: Path, title: str) -> None:
    """lengths.png: the lengths of the examples. labels.png: how many have each answer, or how many labels they have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for name in ("lengths", "labels"):
        figure, axis = plt.subplots(figsize=(8, 4), dpi=120)
        axis.set(ylabel="part of the examples", title=_plain(title))
        axis.yaxis.set_major_formatter("{x:.0%}")
        if name == "lengths":
            lengths = {split: data.lengths for split, data in splits.items()}
            _draw_counts(axis, lengths, "tokens per example")
            longest = max(values.max() for values in lengths.values())
            _draw_limit(axis, max_length, longest)
        elif answers:
            _draw_answers(axis, splits, answers)
        else:
            labels = {split: data.label_counts for split, data in splits.items()}
            _draw_counts(axis, labels, "labels per example")
        axis.legend()
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png")
        plt.close(figure)


def bins_of(counts: np.ndarray) -> np.ndarray:
    """The edges of at most 50 bins for whole numbers: halfway between two of them, and the same whole number apart.

    Bins of another width would hold now one whole number more and now one fewer: a comb that the data does not have.
    """
    lowest = int(counts.min())
    highest = int(counts.max())
    values = highest - lowest + 1
    width = -(-values // MOST_BINS)  # rounded up
    edges = np.arange(lowest, highest + width + 1, width)
    return edges - 0.5


def _draw_counts(axis, counts: dict[str, np.ndarray], xlabel: str) -> None:
    """A histogram of whole numbers for each split, in the same bins, so that splits of different sizes compare."""
    bins = bins_of(np.concatenate(list(counts.values())))
    for split, values in counts.items():
        weights = np.full(len(values), 1 / len(values))
        label = _label(split, len(values))
        axis.hist(values, bins=bins, weights=weights, alpha=0.6, label=label)
    axis.set_xlabel(xlabel)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_limit(axis, max_length: int, longest: int) -> None:
    """A line at --max_length if an example is that long. A line far to the right of them all would squeeze the bars."""
    if max_length <= longest:
        axis.axvline(max_length, color=LIMIT_COLOUR, linestyle="--", label=f"--max_length {max_length}")
    else:
        axis.plot([], [], " ", label=f"all are shorter than --max_length {max_length}")


def _draw_answers(axis, splits: Splits, answers: Sequence[str]) -> None:
    for number, (split, data) in enumerate(splits.items()):
        counts = np.bincount(data.answers, minlength=len(answers))
        shares = counts / len(data)
        middle = (len(splits) - 1) / 2
        offset = BAR * (number - middle)  # the splits' bars stand side by side
        places = offset + np.arange(len(answers))
        label = _label(split, len(data))
        axis.bar(places, shares, BAR, label=label)
    words = [_plain(answer.strip()) for answer in answers]
    axis.set_xticks(range(len(answers)), words)
    axis.set_xlabel("answer")


def _label(split: str, examples: int) -> str:
    return f"{split}, {examples} examples"


def _plain(text: str) -> str:
    return printable(text).replace("$", r"\$")  # matplotlib reads what is between two dollars as mathematics
