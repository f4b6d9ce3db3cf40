"""A range that is declared once serves flags, JSON files and help."""

import dataclasses
import math
import sys
from dataclasses import dataclass, field, fields, replace

import pytest
from hypothesis import given
from hypothesis import settings as searching
from hypothesis import strategies as st

import data
from evaluate import EvaluationSettings
from llama.boundary.command_line import parse
from llama.boundary.errors import UserError
from llama.boundary.records import (
    TYPE_NAMES,
    Settings,
    described_range,
    expected_instead,
    in_range,
    kind_of,
    read_record,
    setting,
)
from llama.model.config import ModelConfig, RopeScaling
from llama.storage.manifest import Manifest
from llama.storage.peft import Adapter
from llama.training.settings import TrainingSettings
from lora import MergeSettings

HUGE = 10**400  # too large for a float


@dataclass(frozen=True)
class Example:
    rank: int = setting(at_least=1, at_most=8)
    alpha: float = setting(16.0, above=0)
    share: float = setting(0.5, at_least=0, below=1)
    part: float = setting(1.0, above=0, at_most=2)
    steps: int = setting(0, at_least=0)
    limit: int | None = setting(None, at_least=1)
    anything: float = setting(0.0)
    whole: bool = setting(False)
    name: str = setting("x")
    counts: dict = setting(field(default_factory=dict).default_factory)
    targets: tuple[str, ...] = ("all",)

    def __post_init__(self):
        if self.rank == 7:
            raise ValueError("rank is 7,\nwhich nobody likes")


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """what to do"""

    rank: int = setting(2, "how wide", at_least=1, at_most=8)
    share: float | None = setting(None, "how much", at_least=0, below=1)


ENTRIES = {entry.name: entry for entry in fields(Example)}


@pytest.mark.parametrize("bounds, described, inside, outside", [
    ({"at_least": 1, "at_most": 8}, "1 to 8", [1, 8], [0, 9, -1, 0.99]),
    ({"at_least": 0, "at_most": 1.0}, "0 to 1", [0.0, 1.0, 0.5], [-1e-9, 1 + 1e-9]),
    ({"at_least": 1, "at_most": 2**24}, "1 to 16777216", [1, 2**24], [0, 2**24 + 1]),
    ({"at_least": 0, "below": 1}, "0 to 1, without 1", [0.0, 0.999], [1.0, -0.1]),
    ({"above": 0, "at_most": 1e6}, "more than 0, at most 1000000", [1e-9, 1e6], [0.0, -1.0, 1e9]),
    ({"above": 0}, "more than 0", [1e-300, 1e300], [0.0, -1.0]),
    ({"at_least": 2}, "2 or more", [2, 2**63 - 1], [1, -2, 2**63]),
    ({}, "", [0.0, -1e300, 1e300], []),
], ids=str)  # fmt: skip
def test_a_range_is_described_as_it_is_checked(bounds, described, inside, outside):
    """C4: infinity, NaN, and an integer that no float can hold are in no range."""
    assert described_range(bounds) == described
    assert all(in_range(value, bounds) for value in inside)
    for value in (*outside, math.inf, -math.inf, math.nan, HUGE, -HUGE):
        assert not in_range(value, bounds), value


RECORDS = [data.Settings, TrainingSettings, EvaluationSettings, MergeSettings, ModelConfig, RopeScaling, Adapter,
           Manifest]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record.__module__}.{record.__name__}")
def test_every_bound_that_is_declared_is_described(record):
    """A bound that only refuses, and that no help and no message states, would be a riddle."""
    for entry in fields(record):
        bounds = {name: entry.metadata[name] for name in entry.metadata.keys() & {"at_least", "at_most", "above",
                                                                                "below"}}
        described = described_range(bounds)
        assert all(f"{bound:.15g}" in described for bound in bounds.values()), entry.name
        assert set(entry.metadata) - {"help", "choices", "bare"} == bounds.keys(), entry.name


@pytest.mark.parametrize("name, value, expected", [
    ("rank", 1, ""), ("rank", 8, ""), ("rank", 0, "1 to 8"), ("rank", 9, "1 to 8"), ("rank", HUGE, "1 to 8"),
    ("rank", 2.0, "a whole number, 1 to 8"), ("rank", "2", "a whole number, 1 to 8"),
    ("rank", True, "a whole number, 1 to 8"), ("rank", None, "a whole number, 1 to 8"),
    ("rank", [2], "a whole number, 1 to 8"),
    ("alpha", 3, ""), ("alpha", 0.5, ""), ("alpha", 0, "more than 0"), ("alpha", math.nan, "more than 0"),
    ("alpha", math.inf, "more than 0"), ("alpha", HUGE, "more than 0, of at most 64 bits"),
    ("alpha", True, "a number, more than 0"), ("alpha", "1", "a number, more than 0"),
    ("alpha", None, "a number, more than 0"),
    ("anything", -3, ""), ("anything", math.inf, "a finite number"), ("anything", HUGE, "a number, of at most 64 bits"),
    ("anything", False, "a number"), ("steps", -1, "0 or more"), ("steps", HUGE, "0 or more, of at most 64 bits"),
    ("limit", None, ""), ("limit", 1, ""), ("limit", 0, "1 or more"), ("limit", "1", "a whole number, 1 or more"),
    ("whole", True, ""), ("whole", 1, "true or false"), ("whole", "true", "true or false"),
    ("whole", None, "true or false"), ("name", "", ""), ("name", 3, "text"), ("name", ["x"], "text"),
    ("name", True, "text"), ("counts", {}, ""), ("counts", [], "an object"), ("counts", 3, "an object"),
    ("targets", ("a", "b"), ""),
], ids=lambda value: f"{value!r:.20}")  # fmt: skip
def test_a_field_says_what_it_expects_where_a_value_is_not_that(name, value, expected):
    assert expected_instead(ENTRIES[name], value) == expected


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(HUGE),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
)


@searching(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(ENTRIES.keys() - {"targets"})), anything)
def test_what_a_field_accepts_is_of_its_type_and_in_its_range(name, value):
    """Whatever JSON can hold; a truth value is no number, and a whole number may stand where any number may."""
    entry = ENTRIES[name]
    if expected_instead(entry, value):
        return
    kind = kind_of(entry)
    assert value is None and entry.default is None or type(value) in ((int, float) if kind is float else (kind,))
    if kind in (int, float) and value is not None:
        assert abs(value) <= sys.float_info.max and in_range(value, entry.metadata)


def test_the_kind_of_a_field_that_may_be_none_is_that_of_its_values():
    assert kind_of(ENTRIES["limit"]) is int and kind_of(ENTRIES["whole"]) is bool
    assert kind_of(ENTRIES["targets"]) == tuple[str, ...] and kind_of(ENTRIES["targets"]) not in TYPE_NAMES


def test_one_declaration_serves_flags_json_and_help(capsys):
    """The same words in each of the three places."""
    with pytest.raises(UserError, match="--rank 9: expected 1 to 8$"):
        parse(Flags, ["--rank", "9"])
    with pytest.raises(UserError, match="^here.json: rank is 9, expected 1 to 8$"):
        read_record(Flags, {"rank": 9}, "here.json")
    with pytest.raises(SystemExit):
        parse(Flags, ["--help"])
    assert "how wide (1 to 8; default: 2)" in " ".join(capsys.readouterr().out.split())


def test_settings_name_everything_that_is_wrong_at_once():
    with pytest.raises(UserError, match="--rank 0: expected 1 to 8; --share 1.0: expected 0 to 1, without 1$"):
        Flags(rank=0, share=1.0)
    made = Flags(share=0.0)
    with pytest.raises(UserError, match="--share -1.0: expected 0 to 1, without 1$"):
        replace(made, share=-1.0)


def test_a_record_is_read_from_json_values():
    """null counts as not given: a default stands for it, or it is missing."""
    values = {"rank": 2, "alpha": None, "limit": None, "steps": 3, "targets": ("q",)}
    assert read_record(Example, values, "x") == Example(2, steps=3, targets=("q",))


@pytest.mark.parametrize("values, message", [
    ({}, "missing rank"),
    ({"rank": None}, "missing rank"),
    ({"rank": 0}, "rank is 0, expected 1 to 8"),
    ({"rank": True}, "rank is True, expected a whole number, 1 to 8"),
    ({"rank": 1, "alpha": "1\n2"}, r"alpha is '1\\n2', expected a number, more than 0"),
    ({"rank": 1, "colour": 3}, "colour is 3, expected no field of this name"),
    ({"rank": 7}, "rank is 7, which nobody likes"),
], ids=str)  # fmt: skip
def test_values_that_make_no_record_are_refused_with_the_place(values, message):
    """Missing, of another type, out of range, unknown, or refused by the record itself: one line."""
    with pytest.raises(UserError, match=f"^here.json: {message}$") as error:
        read_record(Example, values, "here.json")
    assert len(error.value.lines) == 1 and "\n" not in str(error.value)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(UserError) as error:
        read_record(Example, {"rank": 1, "name": ["x" * 10_000]}, "here.json")
    assert len(str(error.value)) < 200


def test_settings_never_change_and_are_given_by_name():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Flags().rank = 3
    with pytest.raises(TypeError, match="positional"):
        Flags(3)
