"""From a dataclass of settings to a command line, once, for every script.

A setting states its type, default and help in one place, its dataclass field. Flags keep the field's name, with
underscores as in torchrun's own.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NoReturn, get_args

from llama.boundary.errors import UserError


def setting(
    default: Any = MISSING, help: str = "", choices: Sequence[str] | None = None, bare: str | None = None
) -> Any:
    """A dataclass field that is also a flag; `bare`: what the flag means where no value follows it."""
    return field(default=default, metadata={"help": help, "choices": choices, "bare": bare})


@dataclass(frozen=True, kw_only=True)
class CheckedSettings:
    """Settings that tell in one UserError all that is out of range among them, or contradictory."""

    script: ClassVar[str]

    def checks(self) -> list[tuple[str, str, bool]]:
        """(name of the setting, what is expected of it, whether it is so); NaN is out of every range."""
        return []

    def __post_init__(self):
        wrong = [f"--{name} {getattr(self, name)}: expected {expected}"
                 for name, expected, fine in self.checks() if not fine]
        if wrong:
            raise UserError(f"{self.script}: {'; '.join(wrong)}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def parse(settings: type, argv: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Build `settings` from the command line. Raises UserError for unknown flags and values of the wrong kind."""
    parser = Parser(description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in fields(settings):
        flag, metadata = f"--{entry.name}", entry.metadata
        # `int | None` reads an int; None is only ever the default
        kind = next((t for t in get_args(entry.type) if t is not type(None)), entry.type)
        help_text = metadata["help"].replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=f"{help_text} (default: off)")
            continue
        required = entry.default is MISSING
        # What is done where nothing was given, the help text itself says: "default: none" would contradict it.
        shown = "required" if required else "optional" if entry.default is None else f"default: {entry.default}"
        optional = {"nargs": "?", "const": metadata["bare"]} if metadata["bare"] else {}
        parser.add_argument(flag, type=kind, choices=metadata["choices"], required=required, **optional,
                            default=None if required else entry.default, help=f"{help_text} ({shown})")
    return settings(**vars(parser.parse_args(argv)))


def is_local_first() -> bool:
    """Whether this is the one process of its machine that reports, known before processes have joined."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def run(main: Callable[[], None]) -> NoReturn | None:
    """Call `main`; a UserError becomes one line on stderr, once a machine, and exit status 2 on every rank.

    So does what the system refuses (a full disk, a forbidden file), which only one rank may have met.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):  # a locale without these letters must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        if is_local_first():
            print("\n".join(error.lines), file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"{error.filename or 'output'}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
