"""A record is a dataclass whose fields declare their ranges. Flags and JSON files are checked by the same declarations.

    rank: int = setting(0, "train an adapter of this rank", at_least=0, at_most=65536)

states type, default, meaning and range once. The command line, its --help, and the readers of config.json,
adapter_config.json and a checkpoint's manifest all follow it.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from llama.boundary.errors import UserError, as_user_error

LARGEST = sys.maxsize  # of whole numbers: 2**63 - 1
BOUNDS = ("at_least", "at_most", "above", "below")
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "an object"}


def setting(
    default: Any = MISSING,
    help: str = "",
    choices: Sequence[str] | None = None,
    bare: str | None = None,
    **bounds: float,
) -> Any:
    """A field of a record. `bounds`: some of BOUNDS. `bare`: the value of a flag that has none."""
    return field(default=default, metadata={"help": help, "choices": choices, "bare": bare, **bounds})


def kind_of(entry: Field) -> Any:
    """The type of a field's values, such as bool or tuple[str, ...]: int for `int | None`, because None only ever means
    "not given"."""
    if isinstance(entry.type, UnionType):
        return next(kind for kind in get_args(entry.type) if kind is not type(None))
    return entry.type


def described_range(bounds: Mapping) -> str:
    """A field's range in words; "" where every value is allowed."""
    shown = {name: f"{bound:.15g}" for name, bound in bounds.items() if name in BOUNDS}  # 1000000, not 1e+06
    low, high, above, below = map(shown.get, BOUNDS)
    if low and high:
        return f"{low} to {high}"
    if low and below:
        return f"{low} to {below}, without {below}"
    if above and high:
        return f"more than {above}, at most {high}"
    if above:
        return f"more than {above}"
    return f"{low} or more" if low else ""


def in_range(value: float, bounds: Mapping) -> bool:
    """Whether a number is finite, has room in 64 bits, and is within its bounds."""
    return (
        abs(value) <= (LARGEST if isinstance(value, int) else sys.float_info.max)
        and value >= bounds.get("at_least", -math.inf)
        and value <= bounds.get("at_most", math.inf)
        and value > bounds.get("above", -math.inf)
        and value < bounds.get("below", math.inf)
    )


def expected_instead(entry: Field, value: Any) -> str:
    """What the field expects, if `value` is not allowed; "" if it is allowed."""
    kind = kind_of(entry)
    if value is None and entry.default is None:
        return ""
    range_text = described_range(entry.metadata)
    accepted = int | float if kind is float else kind
    if kind in TYPE_NAMES and (not isinstance(value, accepted) or isinstance(value, bool) is not (kind is bool)):
        return TYPE_NAMES[kind] + (f", {range_text}" if range_text else "")
    choices = entry.metadata.get("choices")
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    if kind in (int, float) and not in_range(value, entry.metadata):
        if isinstance(value, int) and abs(value) > LARGEST and "at_most" not in entry.metadata:
            return f"{range_text or 'a number'}, of at most 64 bits"
        return range_text or "a finite number"
    return ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a script. One UserError names every setting that is out of range or contradicts another."""

    def checks(self) -> list[tuple[str, str, bool]]:
        """Rules between settings, as (name of a setting, what is expected of it, whether the rule is satisfied)."""
        return []

    def __post_init__(self) -> None:
        found = [(entry.name, expected_instead(entry, getattr(self, entry.name))) for entry in fields(self)]
        out_of_range = {name for name, expected in found if expected}
        found += [(name, expected) for name, expected, is_so in self.checks() if not is_so and name not in out_of_range]
        wrong = [f"{self._given(name)}: expected {expected}" for name, expected in found if expected]
        if wrong:
            raise UserError(f"{Path(sys.argv[0]).name}: {'; '.join(wrong)}")

    def _given(self, name: str) -> str:
        """A flag and its value, as they would be typed; the flag alone where it has none."""
        value = getattr(self, name)
        return f"--{name}" if value is None else f"--{name} {value!s:.200}"


def read_record(kind: type, values: dict, where: str | Path) -> Any:
    """Build a record from JSON values; null counts as not given. Raises UserError for values that are missing, of
    another type or out of range, and for what the record itself refuses."""
    given = {name: value for name, value in values.items() if value is not None}
    missing = [entry.name for entry in fields(kind) if entry.name not in given and entry.default is MISSING]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    check_values(kind, given, where)
    with as_user_error(where):
        return kind(**given)


def check_values(kind: type, values: dict, where: str | Path) -> None:
    """Raises UserError for a value that its field of the record does not allow."""
    entries = {entry.name: entry for entry in fields(kind)}
    for name, value in values.items():
        expected = expected_instead(entries[name], value) if name in entries else "no field of this name"
        if expected:
            raise UserError(f"{where}: {name} is {value!r:.100}, expected {expected}")
