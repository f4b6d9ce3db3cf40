"""Exact match: how often the model writes the very answer of the row.

Where the row's answer ends in a number behind ####, as in GSM8K (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168),
the first number behind #### in the model's text must have the same value: 1,000 and $1000.00 are the same. Else the
texts must be the same, apart from the space around them.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from llama.evaluation.intervals import Interval, wilson

NUMBER = r"####\s*([-+]?\s*\$?\s*[-+]?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+))"
ANYWHERE = re.compile(NUMBER)
AT_THE_END = re.compile(NUMBER + r"\s*$")


class ExactMatch:
    """The share of examples with the right answer."""

    def __init__(self):
        self.about = {"match": "the number behind ####, where the row's answer ends in one; else the stripped text"}

    def compare(self, reference: str, text: str) -> dict:
        """The expected answer, the one found in the text (None if no number is behind ####), and whether they match."""
        end = AT_THE_END.search(reference)
        if end is None:
            expected = reference.strip()
            found = text.strip()
            return {"expected": expected, "found": found, "match": expected == found}
        right = value_of(end[1])
        number = ANYWHERE.search(text)
        if number is None:
            return {"expected": f"{right:f}", "found": None, "match": False}
        written = value_of(number[1])
        return {"expected": f"{right:f}", "found": f"{written:f}", "match": written == right}

    def summarise(self, found: Sequence[Mapping]) -> tuple[dict, dict[str, Interval | None]]:
        right = sum(example["match"] for example in found)
        values = {
            "exact_match": right / len(found),
            "without_number": sum(example["found"] is None for example in found),
        }
        return values, {"exact_match": wilson(right, len(found))}


def value_of(number: str) -> Decimal:
    """The value of a number as people write it: without its commas, its $, and a dot that ends a sentence."""
    return Decimal(re.sub(r"[,$\s]", "", number).rstrip("."))
