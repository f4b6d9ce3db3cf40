"""ROUGE: how many words and runs of words of a reference a text has, by the package `rouge-score`.

    ROUGE-N      common runs of N words            precision = common / of the text, recall = common / of the reference,
    ROUGE-L      longest common subsequence        F = 2 precision recall / (precision + recall)
    ROUGE-Lsum   the same for each sentence of the reference, put together

Lin 2004, https://aclanthology.org/W04-1013. A word is a run of the characters a-z and 0-9, in lower case; so texts in
other letters have no words, and get 0. The Porter stemmer, as in the recipes for summaries: "cats" equals "cat".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata

from llama.boundary.errors import UserError
from llama.evaluation.intervals import Interval, bootstrap

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
WORD = re.compile("[a-z0-9]", re.IGNORECASE)
# Not NLTK's, which downloads a model: behind . ! or ?, perhaps in quotes or brackets, and space.
END_OF_SENTENCE = re.compile(r"""([.!?]["')\]]*)\s+""")


class Rouge:
    """F of each kind, averaged over examples."""

    def __init__(self):
        try:
            scorer = import_module("rouge_score.rouge_scorer")
        except ImportError:
            expected = "expected it to be installed: pip install rouge-score"
            raise UserError(f"--metric rouge: the package rouge-score is not there, {expected}") from None
        self.score: Callable = scorer.RougeScorer(KINDS, use_stemmer=True).score
        self.about = {
            "rouge": f"F-measure of rouge-score {metadata.version('rouge-score')}, averaged over examples",
            "stemmer": "Porter",
            "sentences": "end behind . ! or ? with space after it, and at line breaks",
        }

    def compare(self, reference: str, text: str) -> dict:
        """F of each kind, for one example."""
        found = self.score(in_sentences(reference), in_sentences(text))
        return {kind: float(found[kind].fmeasure) for kind in KINDS}

    def summarise(self, found: Sequence[Mapping]) -> tuple[dict, dict[str, Interval | None]]:
        """The mean of each kind over examples, and its interval."""
        means = {}
        intervals = {}
        for kind in KINDS:
            column = [example[kind] for example in found]
            means[kind] = sum(column) / len(column)
            intervals[kind] = bootstrap(column)
        wordless = sum(WORD.search(example["answer"]) is None for example in found)
        return means | {"references_without_words": wordless}, intervals


def in_sentences(text: str) -> str:
    """The text with each sentence on a line of its own, where ROUGE-Lsum looks for them."""
    return END_OF_SENTENCE.sub(r"\1\n", text)
