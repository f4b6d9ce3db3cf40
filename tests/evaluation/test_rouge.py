"""ROUGE is that of the package rouge-score; here the counts are written out once more by hand."""

import sys
from collections import Counter

import pytest

from llama.boundary.errors import UserError
from llama.evaluation.rouge import KINDS, Rouge, in_sentences

# (reference, text): cases with stems, repeated words, sentences in another order, other letters, and nothing at all.
GOLDEN = [
    ("The cat sat on the mat.", "The cats sat on a mat."),
    ("police killed the gunman", "the gunman police killed"),
    ("A b c. D e f! G?", "D e f. A b c."),
    ("the the the the", "the"),
    ("It is 3.5 kg (about 7 lbs).", "It's about 3.5 kg"),
    ("Word", "word"),
    ("something", ""),
    ("\u6f22\u5b57", "\u6f22\u5b57"),
    ("   ", "text"),
    ("", ""),
]


def rouge_score():
    return pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge-score")


@pytest.mark.parametrize("reference, text", GOLDEN)
def test_rouge_is_that_of_rouge_score(reference, text):
    """C53: with the Porter stemmer; ROUGE-Lsum sees a sentence in each line."""
    scorer = rouge_score().RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    expected = scorer.score(in_sentences(reference), in_sentences(text))
    assert Rouge().compare(reference, text) == {kind: expected[kind].fmeasure for kind in KINDS}


def f_of_ngrams(reference: list[str], text: list[str], size: int) -> float:
    """Lin 2004: common runs of words, each counted as often as both have it."""
    grams = [Counter(zip(*(words[i:] for i in range(size)), strict=False)) for words in (reference, text)]
    common = sum((grams[0] & grams[1]).values())
    return 2 * common / max(1, sum(grams[0].values()) + sum(grams[1].values()))


def f_of_subsequence(reference: list[str], text: list[str]) -> float:
    best = [[0] * (len(text) + 1) for _ in range(len(reference) + 1)]
    for i, a in enumerate(reference):
        for j, b in enumerate(text):
            best[i + 1][j + 1] = best[i][j] + 1 if a == b else max(best[i][j + 1], best[i + 1][j])
    return 2 * best[-1][-1] / (len(reference) + len(text))


def test_rouge_is_what_its_definition_says():
    """C53: on words that the stemmer leaves alone, so that the package is checked, too."""
    rouge_score()
    reference, text = "a red dog ran to a red box", "the red dog ran off to the box a red"
    found = Rouge().compare(reference, text)
    words = (reference.split(), text.split())
    assert found["rouge1"] == pytest.approx(f_of_ngrams(*words, 1)) and 0 < found["rouge1"] < 1
    assert found["rouge2"] == pytest.approx(f_of_ngrams(*words, 2)) and 0 < found["rouge2"] < found["rouge1"]
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(f_of_subsequence(*words))


def test_sentences_stand_on_lines_of_their_own():
    assert in_sentences('One. Two! "Three?" (Four.) five\nsix. ') == 'One.\nTwo!\n"Three?"\n(Four.)\nfive\nsix.\n'
    assert in_sentences("Pi is 3.14, e.g. here") == "Pi is 3.14, e.g.\nhere"  # what a list of abbreviations would know
    rouge_score()
    found = Rouge().compare("A b c. D e f.", "D e f. A b c.")
    assert found["rougeLsum"] == 1.0 and found["rougeL"] == 0.5


def test_the_result_is_a_mean_over_examples_and_names_what_decides_it():
    rouge_score()
    rouge = Rouge()
    pairs = [("a red dog", "a red dog"), ("a red dog", ""), ("\u6f22\u5b57", "\u6f22\u5b57")]
    lines = [{"answer": reference} | rouge.compare(reference, text) for reference, text in pairs] * 7
    values, intervals = rouge.summarise(lines)
    assert values == dict.fromkeys(KINDS, pytest.approx(1 / 3)) | {"references_without_words": 7}
    assert intervals.keys() == set(KINDS) and "bootstrap over examples" in intervals["rouge1"].method
    assert rouge.about["stemmer"] == "Porter" and "rouge-score 0." in rouge.about["rouge"] and rouge.about["sentences"]


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
    with pytest.raises(UserError) as error:
        Rouge()
    assert str(error.value).endswith("pip install rouge-score") and len(error.value.lines) == 1
