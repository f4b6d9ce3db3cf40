"""From a record of settings to a command line, for every script, and from an error to one line and an exit status.

Flags keep the names of the fields, with underscores as torchrun's own have; hyphens are accepted.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

from llama.boundary.config_file import flags_from
from llama.boundary.errors import UserError, printable
from llama.boundary.launch import is_local_rank_zero, refuse_copies, tell_torchrun
from llama.boundary.records import Settings, described_range, kind_of
from llama.boundary.streams import finish_output, forgiving, open_missing

INTERRUPTED = "interrupted"
PATIENCE = 10.0  # seconds: once local rank 0 has ended, torchrun ends the others within a second
OfScript = TypeVar("OfScript", bound=Settings)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors with a suggestion. It reads --learning-rate as --learning_rate."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)
        self.unknown: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        words = [self._with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        looks_like_a_flag = re.compile(r"[-\u2013\u2014]+[A-Za-z]")  # also with the dashes of a word processor
        self.unknown = [w for w in words if looks_like_a_flag.match(w) and not self._knows(w.partition("=")[0])]
        known, others = super().parse_known_args(words, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return known, others

    def _knows(self, flag: str) -> bool:
        return flag in self._option_string_actions

    def _with_underscores(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        flag = underscored(flag)
        return flag + equals + value if self._knows(flag) else word

    def error(self, message: str) -> NoReturn:
        if self.unknown and "required: --" in message:  # the required flag may be the one that is misspelt
            message = f"unrecognized arguments: {self.unknown[0]}"
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        close = []
        if choice:
            close = get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
        elif self.unknown and "unrecognized" in message:
            close = probably_meant(self.unknown[0].partition("=")[0], self._option_string_actions)
        hint = f". Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{self.prog}: {message:.1000}{hint}")


def underscored(flag: str) -> str:
    """--learning-rate -> --learning_rate; a word that is no flag stays as it is."""
    return f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag


def probably_meant(word: str, flags: Iterable[str]) -> list[str]:
    """The flags that have these initials, as --bs is --batch_size; or else the one that is spelt most alike."""
    names = {flag.strip("-"): flag for flag in flags}
    word = word.strip("-\u2013\u2014").replace("-", "_")
    of_initials = []
    for name, flag in names.items():
        initials = "".join(part[:1] for part in name.split("_"))
        if initials == word:
            of_initials.append(flag)
    return of_initials or [names[name] for name in get_close_matches(word, names, n=1)]


def parse(settings: type[OfScript], argv: Sequence[str] | None = None, description: str | None = None) -> OfScript:
    """Build `settings` from the command line. Raises UserError for unknown flags and values of the wrong kind.

    Each class that `settings` inherits fields from is a group of --help, under the first line of its docstring.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    entries = {entry.name: entry for entry in fields(settings)}
    for owner in settings.__mro__:
        names = [name for name in vars(owner).get("__annotations__", {}) if name in entries]
        if names:
            title = (owner.__doc__ or "").partition("\n")[0]
            group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, entries.pop(name))
    found = parser.parse_args(argv)
    if getattr(found, "config", None) is not None:  # the flags of a file, where the command line does not say otherwise
        parser.set_defaults(**flags_from(Path(found.config), settings))
        found = parser.parse_args(argv)
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()})


def _add_flag(group: argparse._ArgumentGroup, entry: Field) -> None:
    kind = kind_of(entry)
    help_text = entry.metadata["help"].replace("%", "%%")
    if kind is bool:  # --compile, or --compile false, against a --config that says true
        options: dict = {"nargs": "?", "const": True, "default": False, "metavar": "false"}
        group.add_argument(f"--{entry.name}", type=true_or_false, help=help_text, **options)
        return
    if kind == tuple[str, ...]:  # may be given several times
        options = {"action": "append", "default": [], "metavar": "TEXT"}
        group.add_argument(f"--{entry.name}", help=help_text, **options)
        return
    required = entry.default is MISSING
    notes = [described_range(entry.metadata)]
    if required:
        notes.append("required")
    elif entry.default not in (None, ""):  # these: the help text itself says what happens without the flag
        notes.append(f"default: {entry.default}")
    note = "; ".join(filter(None, notes))
    group.add_argument(
        f"--{entry.name}",
        type=kind,
        choices=entry.metadata["choices"],
        required=required,
        default=None if required else entry.default,
        help=f"{help_text} ({note})" if note else help_text,
        **({"nargs": "?", "const": entry.metadata["bare"]} if entry.metadata["bare"] else {}),
    )


def announce(notes: Iterable[str]) -> None:
    """Print sentences that a user should know to stderr, once per machine."""
    for note in notes:
        if is_local_rank_zero():
            print(printable(note), file=sys.stderr, flush=True)


def true_or_false(word: str) -> bool:
    if word not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected nothing, true or false, found {word!r:.40}")
    return word == "true"


def run(main: Callable[[], object], keep_going: bool = False) -> None:
    """Call `main`. A UserError becomes one line on stderr, once per machine, and exit status 2 on every rank.

    An OSError, such as a full disk, also becomes one line and status 2; it may happen on one rank only. Ctrl-C becomes
    one line and status 130. When the reader of stdout has gone, as after `| head`, the program ends with status 141,
    as other commands do. With `keep_going` it goes on: what it prints is not its result.
    """
    _prepare_streams(keep_going)
    try:
        refuse_copies(Path(sys.argv[0]).name)
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        _let_rank_zero_speak()
        status, text = 2, "\n".join(error.lines)
    except OSError as error:
        if error.errno is None:
            raise
        status, text = 2, f"{error.filename or 'output'}: {error.strerror}"
        if isinstance(error, BrokenPipeError) and not keep_going:
            status, text = 141, ""
    except KeyboardInterrupt:
        status, text = 130, INTERRUPTED if is_local_rank_zero() else ""
    finally:
        finish_output()
    if text:
        print(text, file=sys.stderr, flush=True)
        tell_torchrun(text)
    sys.exit(status)


def _prepare_streams(keep_going: bool) -> None:
    # They are not Python's own in a test, and not when `run` is called again.
    stdout_is_own = sys.stdout is sys.__stdout__
    stderr_is_own = sys.stderr is sys.__stderr__
    open_missing()
    if stderr_is_own:
        sys.stderr = forgiving(sys.stderr)
    if keep_going and stdout_is_own:
        sys.stdout = forgiving(sys.stdout)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # or a character that the terminal cannot show would raise
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _report_uncaught  # for Ctrl-C outside of `run`: while the script imports torch


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        if is_local_rank_zero():
            print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)
    else:
        sys.__excepthook__(kind, error, trace)


def _let_rank_zero_speak() -> None:
    """On other ranks, wait until torchrun ends this process: it does so as soon as one rank has ended, and that must be
    the one that prints. Return where this does not happen: then this rank alone has met the error."""
    if not is_local_rank_zero():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
        time.sleep(PATIENCE)
