"""How far long work is: a bar on a terminal, and plain lines in a log, which would keep every state of a bar."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30
Item = TypeVar("Item")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, and leave a bar whole. To stdout, unless another stream is given."""
    stream = stream or sys.stdout
    tqdm.write(text, file=stream)
    stream.flush()  # a log is otherwise written in blocks, minutes late


class Progress:
    """Counts what is done of some long work. Use it as a context manager.

    Where stderr is a terminal, a bar is shown there; where it is not, a line every 30 seconds. `silent`: nothing.
    `is_main`: this is what the program is for. Then the bar stays on the screen, and the lines go to stdout, also where
    only that is not a terminal. Other work keeps to stderr: stdout may be somebody's JSON.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        first: int = 0,
        silent: bool = False,
        is_main: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        on_terminal = sys.stderr.isatty()
        self.what = what
        self.unit = unit
        self.total = total
        self.first = first
        self.clock = clock
        self.is_main = is_main
        self.in_lines = not silent and not (on_terminal and (sys.stdout.isatty() or not is_main))
        self.bar = tqdm(
            desc=what, total=total, initial=first, unit=f" {unit}", disable=silent or not on_terminal, leave=is_main
        )
        self.done = first
        self.facts = ""
        self.began = self.told = clock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, count: int = 1, facts: str = "") -> None:
        """So many more are done. `facts`: what to show beside the count from now on."""
        self.done += count
        self.facts = facts
        self.bar.set_postfix_str(facts, refresh=False)
        self.bar.update(count)
        if self.clock() - self.told >= SECONDS_BETWEEN_LINES:
            self.tell()

    def tell(self) -> None:
        """Print a line now, if this is a log."""
        self.told = self.clock()
        if self.in_lines:
            say(self.line(), sys.stdout if self.is_main else sys.stderr)

    def line(self) -> str:
        """training: 120/329 steps, loss 0.69, 1:02 left"""
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.what}: {self.done}{of} {self.unit}"]
        if self.facts:
            parts.append(self.facts)
        done_here = self.done - self.first
        if self.total is not None and done_here:
            seconds_each = (self.clock() - self.began) / done_here
            parts.append(f"{duration((self.total - self.done) * seconds_each)} left")
        return ", ".join(parts)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.update()


def duration(seconds: float) -> str:
    """1:05 for 65 seconds, 2:00:10 for 7210."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
