"""A conversation at a terminal: what the user types, and what the model's text may do to the screen."""

import sys
from contextlib import suppress
from select import select

from llama.boundary.errors import UserError, printable

# Spaces and joiners that scripts need. They cannot control a terminal, though Python does not call them printable.
HARMLESS = "\n\t\u00a0\u202f\u3000\u200c\u200d"
PASTED = 0.05  # seconds in which the next line of a pasted text follows


def show(text: str) -> None:
    """Write a piece of text to stdout at once. On a terminal, what could control it is spelled out."""
    sys.stdout.write(printable(text, HARMLESS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_message(prompt: str) -> str | None:
    """What the user types, until the line ends; of a text that is pasted, all its lines. None at the end of the input.

    Lines can be edited and called back where Python has readline. Raises UserError for what is not text.
    """
    if sys.stdin is None:  # it was closed
        return None
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        with suppress(ImportError):  # importing it is what makes `input` use it
            import readline  # noqa: F401
    lines = []
    try:
        lines.append(input(prompt if on_terminal else ""))
        while on_terminal and select([sys.stdin], [], [], PASTED)[0]:
            lines.append(input())
    except EOFError:
        return "\n".join(lines) if lines else None
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: byte {error.start} is not {error.encoding}, expected text") from None
    return "\n".join(lines)


def read_all() -> str:
    """The whole text on stdin, without the line end that a shell puts behind it. Raises UserError for other bytes."""
    if sys.stdin is None:
        raise UserError("stdin: is closed, expected text")
    try:
        return sys.stdin.buffer.read().decode().replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: byte {error.start} is not UTF-8, expected text") from None
