"""UserError, the exception for every mistake in flags and files, and how it is printed as one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in what the program was given: a flag, a file, a setting.

    The message is one line: where, what was found, what was expected. Scripts print it and exit with status 2.
    """

    @property
    def lines(self) -> list[str]:
        """What to print: one line, even if the message quotes text that has line breaks."""
        return [printable(" ".join(str(self).splitlines()))]


@contextmanager
def as_user_error(where: str | Path, expected: str = "") -> Iterator[None]:
    """Turn any error in reading outside data into a UserError: where, what was found, what was expected.

    Keep the block short: inside it, a mistake of our own would look like a user's.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        ending = f", expected {expected}" if expected else ""
        raise UserError(f"{where}: {reason(error)}{ending}") from None


def reason(error: BaseException) -> str:
    """The cause in a few words: what the system says of a file, which key is missing, or the error's own message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"has no {one_line(error)}"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """The error's message without line breaks and terminal escapes: it may quote a hostile file."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return text.strip()[:300] or type(error).__name__


def printable(text: str, keep: str = "") -> str:
    """The text, with each character that could control a terminal spelled out, such as \\x1b. `keep` stays as it is."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first names, and how many more there are. Names from a file may be long or hold line breaks."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(f"{name!r:.100}" for name in names[:count]) + more
