"""Exact match: numbers as GSM8K's graders read them, and texts."""

import json
import re

import pytest

from llama.evaluation.exact_match import ExactMatch

SAME = [
    ("#### 18", "She has 9 + 9 = 18.\n#### 18"),
    ("#### 18", "#### 18.0"),
    ("#### 18", "####18"),
    ("#### 18", "#### $18.00."),
    ("#### 1,000", "#### 1000"),
    ("#### 1000", "#### $1,000"),
    ("#### -5", "#### -$5"),
    ("#### -5", "#### $-5"),
    ("#### 0.5", "#### .50"),
    ("#### 18", "#### 18\nQuestion: another one\n#### 7"),
    ("long way\n#### 2,125\n", "so #### 2125 eggs"),
    ("#### 0", "#### -0"),
    ("a blue dog", " a blue dog\n"),
    ("#### Heading", "#### Heading"),
]  # fmt: skip
OTHER = [
    ("#### 18", "18"),
    ("#### 18", ""),
    ("#### 18", "#### 180"),
    ("#### 18", "#### eighteen"),
    ("#### 18", "#### -18"),
    ("#### 18", "the answer is #### 1.8"),
    ("#### 18", "#### 7\n#### 18"),
    ("#### 1000000000000000000001", "#### 1000000000000000000000"),
    ("18", "18.0"),
    ("a blue dog", "A blue dog"),
    ("text", ""),
]  # fmt: skip


@pytest.mark.parametrize("reference, text", SAME)
def test_these_are_the_same(reference, text):
    assert ExactMatch().compare(reference, text)["match"] is True


@pytest.mark.parametrize("reference, text", OTHER)
def test_these_are_not(reference, text):
    assert ExactMatch().compare(reference, text)["match"] is False


def test_what_was_compared_is_shown():
    found = ExactMatch().compare("so 9\n#### 1,018", "#### $18.50.")
    assert found == {"expected": "1018", "found": "18.50", "match": False}
    assert ExactMatch().compare("#### 18", "no") == {"expected": "18", "found": None, "match": False}
    assert ExactMatch().compare(" x ", "y") == {"expected": "x", "found": "y", "match": False}


def test_the_share_of_matches_has_wilsons_interval():
    pairs = [("#### 2", "#### 2"), ("#### 2", "two"), ("#### 2", "#### 3"), ("a", "b")]
    values, intervals = ExactMatch().summarise([ExactMatch().compare(*pair) for pair in pairs])
    assert values == {"exact_match": 0.25, "without_number": 1} and intervals["exact_match"].method == "Wilson score"


def test_every_answer_of_gsm8k_is_a_number_that_its_own_grader_finds(assets):
    """https://github.com/openai/grade-school-math: the number behind ####, without commas. The whole test set."""
    for line in (assets / "gsm8k/test.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        theirs = re.search(r"#### (\-?[0-9\.\,]+)", answer)[1].replace(",", "")
        found = ExactMatch().compare(answer, answer)
        assert found == {"expected": theirs, "found": theirs, "match": True}
        assert not ExactMatch().compare(answer, answer + "1")["match"]
