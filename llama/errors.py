"""The one kind of error a user can cause."""


class UserError(ValueError):
    """A mistake in what the program was given: a flag, a file, a setting.

    The message is one line: where, what was found, what was expected. Scripts print it and exit with status 2.
    """

    @property
    def lines(self) -> list[str]:
        """What to print: one line, whatever line breaks are in what the message quotes."""
        return [" ".join(str(self).splitlines())]
