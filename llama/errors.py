"""The one kind of error a user can cause, and how it is printed."""


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
