"""The kinds of error a user can cause, and how they are printed."""


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
