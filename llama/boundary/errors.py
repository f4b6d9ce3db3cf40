"""The kinds of error a user can cause, and how they are printed."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what the program was given: a flag, a file, a setting.

    The message is one line: where, what was found, what was expected. Scripts print it and exit with status 2.
    """

    @property
    def lines(self) -> list[str]:
        """What to print: one line, whatever is in what the message quotes."""
        return [printable(" ".join(str(self).splitlines()))]


def printable(text: str, keep: str = "") -> str:
    """The text with what could steer a terminal, or cannot be encoded, spelled as \\x1b; `keep`s are left alone."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


class WeightsError(UserError):
    """Weights that cannot be read or written. One line: where, what was found, what was expected."""


def one_line(error: Exception) -> str:
    """Its message, which may quote a hostile file, without line breaks and terminal escapes."""
    shown = "".join(c if c.isprintable() else " " for c in str(error))
    return shown.strip()[:300] or type(error).__name__


def some(names: Sequence[str]) -> str:
    """The first names, and how many there are beyond. Names from a file may be long and hold line breaks."""
    return ", ".join(f"{name!r:.100}" for name in names[:3]) + (len(names) > 3) * f" and {len(names) - 3} more"
