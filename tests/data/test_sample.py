"""The bundled sample is exactly what its generator writes, and no single word gives the verdict away."""

import json
import re
from collections import Counter

import pytest
from sentencepiece import SentencePieceProcessor

from assets import make_sample, make_tokenizer
from llama.data.templates import TEMPLATES
from llama.data.tokenizer_files import load_tokenizer

SPLITS = ["train", "test"]
NEGATION = re.compile(r"\b(not|never|nothing|nobody|far from|anything but)\b", re.I)
CONTRAST = re.compile(r"(?<!anything )\bbut\b|\b(yet|still|however|although|granted|even though)\b", re.I)


def committed(split):
    return (make_sample.FOLDER / f"{split}.jsonl").read_bytes()


def sentences(text):
    return re.split(r"(?<=[.]) ", text)


def words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.fixture(scope="module")
def rows():
    """Both files as committed, parsed."""
    return {split: [json.loads(line) for line in committed(split).splitlines()] for split in SPLITS}


@pytest.fixture(scope="module")
def occurrences(rows):
    """word -> (training reviews it occurs in, how many of them are positive)."""
    everywhere, positive = Counter(), Counter()
    for row in rows["train"]:
        everywhere.update(words(row["text"]))
        positive.update(words(row["text"]) if row["label"] else ())
    return {word: (count, positive[word]) for word, count in everywhere.items()}


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceProcessor(model_file=str(make_tokenizer.MODEL))


def test_the_generator_writes_the_committed_files_to_the_byte(tmp_path):
    make_sample.write_sample(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == committed(split)


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_has_a_text_and_a_label_and_nothing_else(rows, split):
    for row in rows[split]:
        assert list(row) == ["text", "label"]
        assert type(row["text"]) is str and type(row["label"]) is int and row["label"] in (0, 1)


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_is_one_to_six_whole_sentences(rows, split):
    """Only plain letters and commas, so an unfilled blank of the grammar could not hide."""
    for row in rows[split]:
        assert 1 <= len(sentences(row["text"])) <= 6
        for sentence in sentences(row["text"]):
            assert re.fullmatch(r"[A-Z][A-Za-z,; ]*[.]", sentence) and "  " not in sentence, row["text"]


def test_there_are_many_reviews_of_every_length(rows):
    lengths = Counter(len(sentences(row["text"])) for row in rows["train"])
    assert len(rows["train"]) >= 2000 and len(rows["test"]) >= 500
    assert all(lengths[n] >= 0.05 * len(rows["train"]) for n in range(1, 7)), lengths


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_the_reviews_are_positive_in_every_quarter_of_the_file(rows, split):
    labels = [row["label"] for row in rows[split]]
    assert abs(sum(labels) / len(labels) - 0.5) <= 0.01
    quarter = len(labels) // 4
    for start in range(0, 4 * quarter, quarter):
        assert 0.4 < sum(labels[start : start + quarter]) / quarter < 0.6


def test_no_text_occurs_twice_and_most_test_reviews_have_a_sentence_that_training_lacks(rows):
    texts = [row["text"] for split in SPLITS for row in rows[split]]
    assert len(set(texts)) == len(texts)
    known = {sentence for row in rows["train"] for sentence in sentences(row["text"])}
    new = [not known.issuperset(sentences(row["text"])) for row in rows["test"]]
    assert sum(new) >= 0.7 * len(new)


def test_no_single_word_is_a_rule_for_the_label(rows, occurrences):
    """The best rule "positive where this word occurs" (or negative) is near chance, even on its own rows."""
    total, positive = len(rows["train"]), sum(row["label"] for row in rows["train"])
    for word, (count, with_word) in occurrences.items():
        right = with_word + (total - positive) - (count - with_word)
        assert max(right, total - right) <= 0.60 * total, word


def test_every_common_word_is_at_home_in_both_labels(occurrences):
    """Even where a word occurs it leans only slightly, because negation and contrast turn it round."""
    common = {word: positive / count for word, (count, positive) in occurrences.items() if count >= 100}
    assert len(common) >= 150
    assert {word: share for word, share in common.items() if not 0.3 <= share <= 0.7} == {}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("pattern", [NEGATION, CONTRAST], ids=["negation", "contrast"])
def test_many_reviews_of_either_label_have_negation_and_contrast(rows, split, label, pattern):
    texts = [row["text"] for row in rows[split] if row["label"] == label]
    assert sum(bool(pattern.search(text)) for text in texts) >= 0.25 * len(texts)


def test_training_the_tokenizer_again_gives_the_committed_bytes(tmp_path):
    for name in ("first.model", "second.model"):
        make_tokenizer.write_tokenizer(tmp_path / name)
        assert (tmp_path / name).read_bytes() == make_tokenizer.MODEL.read_bytes()
    make_tokenizer.write_json(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (make_tokenizer.FOLDER / name).read_bytes()


def test_both_forms_of_the_tokenizer_give_the_reviews_the_same_ids(tokenizer, rows):
    """C18: SentencePiece's are the ids of tokenizer.json, which this project and transformers read."""
    texts = [row["text"] for split in SPLITS for row in rows[split][::10]]
    assert [ids[1:] for ids in load_tokenizer(make_tokenizer.FOLDER).encode_batch(texts)] == tokenizer.encode(texts)


def test_the_tokenizer_knows_the_prompt_of_the_imdb_template():
    rows = [{"text": "x", "label": label} for label in (0, 1)]
    prompt = "\n".join("".join(s.text for s in TEMPLATES["imdb"].render(row, "")[0]) for row in rows)
    assert set(filter(None, prompt.splitlines())) - {"x"} == set(make_tokenizer.PROMPT.splitlines())


def test_each_answer_is_one_token_after_the_prompt(tokenizer):
    """As a continuation, without the dummy prefix: what follows a newline, always a token of its own."""
    newline = tokenizer.encode("\n")
    ids = [tokenizer.encode("\n" + answer)[len(newline) :] for answer in TEMPLATES["imdb"].answers]
    assert [tokenizer.id_to_piece(i) for i in ids] == [["▁negative"], ["▁positive"]]
    assert ids[0] != ids[1]


def test_every_lower_case_word_of_the_reviews_is_one_piece(tokenizer, rows):
    texts = [row["text"] for split in SPLITS for row in rows[split]]
    plain = {word for text in texts for word in re.findall(r"(?<= )[a-z]+", text)}
    assert {word for word in plain if len(tokenizer.encode(word)) > 1} == set()


def test_the_special_tokens_are_llamas(tokenizer):
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)


@pytest.mark.parametrize("text", ["Grüße, 東京!", "2024 was\n\n odd ", "  two  spaces", "\t{tab}~", "🙂"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unk_id() not in tokenizer.encode(text)
