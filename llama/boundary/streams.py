"""Standard streams that cannot end a run: what nobody can read any more is dropped."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


class Forgiving(io.FileIO):
    """A file whose writes never fail: the reader has gone (as after `| head`), the disk is full, the terminal closed.

    Each write is tried, so a log goes on once the disk has room again.
    """

    def write(self, data) -> int:
        with suppress(OSError):
            written = super().write(data)
            if written is not None:  # None: the stream does not block, and is full
                return written
        return len(data)


def open_missing() -> None:
    """Fill the places of standard streams that are closed (`>&-`): otherwise the next file that is opened would get the
    number of one, and whatever is printed would be written into it. To write to these streams still fails."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # gets the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)


def forgiving(stream: TextIO) -> TextIO:
    """The same standard stream, but one whose writes never fail."""
    assert isinstance(stream, io.TextIOWrapper)  # as Python's own are
    stream.flush()
    raw = Forgiving(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def finish_output() -> None:
    """Write out what is still buffered for stdout. Where that fails, drop it: Python would try again at its end, print
    a traceback and change the exit status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
