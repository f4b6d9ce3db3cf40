"""Whatever goes wrong with what is read from outside is one line: where, what was found, what was expected."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.boundary.errors import UserError, as_user_error, first_few, one_line, printable, reason

HOSTILE = "a\r\nb\x1b[31m\x00\u2028\u202e\ud800c"  # line breaks, a colour, NUL, text turned round, half a character


def test_a_user_error_is_no_value_error():
    """A block that expects a ValueError of Python's own must not take a user's mistake for one."""
    assert not issubclass(UserError, ValueError) and issubclass(UserError, Exception)


def test_what_is_printed_of_an_error_is_one_line():
    """R9, R15: whatever the message quotes."""
    assert UserError("rows.jsonl:3: found\nthis,\r\nexpected that").lines == ["rows.jsonl:3: found this, expected that"]
    (line,) = UserError(HOSTILE).lines
    assert line.isprintable() and r"\x1b[31m" in line and r"\u202e" in line


def test_characters_that_could_control_a_terminal_are_spelled_out():
    assert printable("naïve 日本 \x1b[2J\x07\n") == "naïve 日本 \\x1b[2J\\x07\\n"
    assert printable("a\tb\x1b", keep="\t") == "a\tb\\x1b"


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_becomes_printable_and_printable_text_stays_as_it_is(text):
    assert printable(text).isprintable() or not text
    assert (printable(text) == text) == text.isprintable()


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_the_message_of_any_error_becomes_one_short_line(text):
    line = one_line(ValueError(text))
    assert line and line.isprintable() and len(line) <= 300


def test_an_error_without_words_is_called_by_its_type():
    assert one_line(KeyError()) == "KeyError" and one_line(RecursionError()) == "RecursionError"
    assert one_line(ValueError("\n\x00 ")) == "ValueError"
    assert one_line(ValueError("x" * 1000)) == "x" * 300


def test_the_reason_of_a_systems_error_is_what_the_system_says():
    assert reason(PermissionError(13, "Permission denied", "/x/y")) == "Permission denied"
    assert reason(OSError("ours, without a number")) == "ours, without a number"
    assert reason(ValueError("three\nlines\nhere")) == "three lines here"
    assert reason(KeyError("weight_map")) == "has no 'weight_map'"


@pytest.mark.parametrize("mistake, words", [
    (lambda: open("/nowhere/at all"), "No such file or directory"),
    (lambda: b"\xff".decode(), "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    (lambda: json.loads("{"), "Expecting property name enclosed in double quotes"),
    (lambda: json.loads("[" * 100_000), "recursion"),
    (lambda: {}["weight_map"], "here.json: has no 'weight_map', expected an index"),
    (lambda: [][3], "list index out of range"),
    (lambda: None.items(), "has no attribute 'items'"),
    (lambda: 3 + "x", "unsupported operand"),
    (lambda: float(10**400), "too large"),
    (lambda: int("1" * 5000), "4300 digits"),
], ids=range(10))  # fmt: skip
def test_any_error_in_reading_outside_data_becomes_one_line_with_its_place(mistake, words):
    """R13: where, what was found, what was expected."""
    with pytest.raises(UserError) as error, as_user_error("here.json", "an index"):
        mistake()
    message = str(error.value)
    assert message.startswith("here.json: ") and words in message and message.endswith(", expected an index")
    assert "\n" not in message and error.value.__cause__ is None and error.value.__suppress_context__


def test_without_an_expectation_the_line_ends_with_the_reason():
    with pytest.raises(UserError, match="^here.json: a b$"), as_user_error("here.json"):
        raise ValueError("a\nb")


def test_a_user_error_goes_through_as_it_is():
    """It says already where, and what was expected."""
    inner = UserError("inner.json: x, expected y")
    with pytest.raises(UserError) as error, as_user_error("outer.json", "z"):
        raise inner
    assert error.value is inner


@pytest.mark.parametrize("error", [AssertionError("ours"), KeyboardInterrupt(), SystemExit(3), MemoryError()], ids=repr)
def test_a_bug_an_interrupt_and_an_exit_are_left_alone(error):
    with pytest.raises(type(error)) as raised, as_user_error("here.json"):
        raise error
    assert raised.value is error


def test_names_are_listed_up_to_three_and_the_others_are_counted():
    assert first_few([]) == "" and first_few(["a"]) == "'a'" and first_few(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert first_few(list("abcde")) == "'a', 'b', 'c' and 2 more"
    assert first_few([HOSTILE]).isprintable() and len(first_few(["x" * 10_000] * 4)) < 400
