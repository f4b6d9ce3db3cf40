"""From a record of settings to a command line, for every script, and from an error to one line and an exit status.

Flags keep the names of the fields, with underscores as torchrun's own have.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from llama.boundary.errors import UserError
from llama.boundary.records import described_range, kind_of


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def parse(settings: type, argv: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Build `settings` from the command line. Raises UserError for unknown flags and values of the wrong kind.

    Each class that `settings` inherits fields from is a group of --help, under the first line of its docstring.
    """
    parser = Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    entries = {entry.name: entry for entry in fields(settings)}
    for owner in settings.__mro__:
        names = [name for name in vars(owner).get("__annotations__", {}) if name in entries]
        if names:
            group = parser.add_argument_group(owner.__doc__.splitlines()[0])
        for name in names:
            _add_flag(group, entries.pop(name))
    return settings(**vars(parser.parse_args(argv)))


def _add_flag(group, entry: Field) -> None:
    kind = kind_of(entry)
    help_text = entry.metadata["help"].replace("%", "%%")
    if kind is bool:
        group.add_argument(f"--{entry.name}", action="store_true", help=help_text)
        return
    required = entry.default is MISSING
    notes = [described_range(entry.metadata)]
    if required:
        notes.append("required")
    elif entry.default is not None:  # None: the help text itself says what happens without the flag
        notes.append(f"default: {entry.default}")
    notes = "; ".join(filter(None, notes))
    group.add_argument(
        f"--{entry.name}",
        type=kind,
        choices=entry.metadata["choices"],
        required=required,
        default=None if required else entry.default,
        help=f"{help_text} ({notes})" if notes else help_text,
        **({"nargs": "?", "const": entry.metadata["bare"]} if entry.metadata["bare"] else {}),
    )


def is_local_rank_zero() -> bool:
    """Whether this is the one process of its machine that reports; known before the processes have joined."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def run(main: Callable[[], None]) -> NoReturn | None:
    """Call `main`. A UserError becomes one line on stderr, once per machine, and exit status 2 on every rank.

    An OSError, such as a full disk, also becomes one line and status 2; it may happen on one rank only.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):  # or a character that the terminal cannot show would raise
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        if is_local_rank_zero():
            print("\n".join(error.lines), file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output is gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"{error.filename or 'output'}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
