"""What a metric finds, whichever it is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from llama.evaluation.intervals import Interval
from llama.model import Llama
from llama.parallel.processes import Process


@dataclass(frozen=True)
class Outcome:
    """values:    the numbers of the result, by name, with `n`, what they are of.
    intervals: of some of these; None where there are too few examples.
    lines:     one for each example in the order of the file, from which the values can be computed again; made when
               they are asked for, once.
    notes:     what a user should know about the numbers.
    """

    values: dict
    intervals: Mapping[str, Interval | None]
    lines: Iterable[dict]
    notes: Sequence[str] = ()

    def as_json(self) -> dict:
        shown = {}
        for name, interval in self.intervals.items():
            shown[name] = asdict(interval) if interval else None
        return self.values | {"intervals": shown}

    def headline(self) -> str:
        """accuracy 0.8712 (0.8665 to 0.8759, at 95 %); loss 0.3301 (0.3208 to 0.3390, at 95 %); n 25000"""
        parts = []
        for name, interval in self.intervals.items():
            around = "no interval"
            if interval:
                around = f"{interval.low:.4g} to {interval.high:.4g}, at {interval.confidence:.0%}"
            parts.append(f"{name} {self.values[name]:.4g} ({around})")
        return "; ".join([*parts, f"n {self.values['n']}"])


class Metric(Protocol):
    """A metric on data that is read already.

    about:     what decides its numbers, for the result.
    generates: whether it needs the whole model on each rank, to write answers without waiting for other ranks.
    """

    about: dict
    generates: bool

    def score(self, model: Llama, process: Process) -> Outcome:
        """The same outcome on every rank, for any number of ranks. Collective."""
