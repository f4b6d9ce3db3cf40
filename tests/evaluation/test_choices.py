"""Multiple choice: lm-eval's definitions written out over a forward for each option, and rows that are no questions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reviews import CONFIG, IMDB, plain_model
from sharded import build, this_process

from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.encoding import encode_rows
from llama.data.options import OptionsTemplate, rows_of
from llama.data.templates import TEMPLATES, Segment, Template
from llama.data.tokenizer_files import load_tokenizer
from llama.evaluation.choices import Choices, read_questions
from llama.model import PackedDocuments
from llama.storage import pretrained
from llama.storage.base import TINY_TOKENIZER

QUIZ = Template("quiz", "Q: {question...}\nA:[[ {answer}]]")
ROWS = [
    {"question": "Is the film good?", "choices": ["yes", "no, it is slow and weak"], "answer": 0},
    {"question": "What is it?", "choices": ["a film", "a film with a plot", "caf\u00e9 \u6f22\u5b57"],
     "answer": "a film with a plot"},
    {"question": "Who \u00e9t\u00e9?", "choices": ["1", "0"], "answer": 1},
    {"question": "long " * 60, "choices": ["bright and strong " * 3, "weak", "slow"], "answer": "slow"},
    *({"question": f"Number {i}?", "choices": ["the film " * (i + 1), "\u6f22\u00e9" * (i + 1), "x", "good"],
       "answer": i % 4} for i in range(5)),
    *({"question": f"Which {i}?", "choices": ["qzxjQZ"[: 1 + i % 5], "\u6f22\u5b57" * (1 + i % 4)], "answer": i % 2}
      for i in range(12)),
]  # fmt: skip


@pytest.fixture
def quiz(tmp_path) -> Path:
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@torch.no_grad()
def by_definition(rows: list[dict], template: Template, max_length: int) -> list[list[float]]:
    """log p of each option, the sum over its tokens, each option alone behind the prompt that generation would get."""
    tokenizer, model = load_tokenizer(TINY_TOKENIZER), plain_model()
    found = []
    for row in rows:
        options = [tokenizer.encode(" " + text, starts_text=False) for text in row["choices"]]
        segments, _ = template.render(row | {"answer": row["choices"][0]}, "")
        room = max_length - max(map(len, options))
        (prompt,) = encode_rows([[s for s in segments if not s.answer]], tokenizer, room, "right")
        of_row = []
        for option in options:
            ids = torch.tensor(prompt.ids + option)
            p = model.logits(ids, PackedDocuments([len(ids)])).double().log_softmax(-1)
            of_row.append(sum(float(p[len(prompt.ids) + i - 1, id]) for i, id in enumerate(option)))
        found.append(of_row)
    return found


def score_on_rank(path: Path, batch_size: int, max_length: int):
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    numbers = range(1, len(ROWS) + 1)
    questions = read_questions([path], numbers, OptionsTemplate(QUIZ), tokenizer, max_length, "right")
    model = build(CONFIG, this_process())
    pretrained.initialize_weights(model, seed=1)
    metric = Choices(questions, tokenizer, batch_size)
    outcome = metric.score(model, this_process())
    return outcome.as_json() | metric.about, list(outcome.lines)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_options_are_compared_as_lm_eval_does(ranks, quiz, size):
    """C51, C54, C12: acc, acc_norm and acc_bytes for any batch size and number of ranks; the lines give them again."""
    expected = by_definition(ROWS, QUIZ, 64)
    right = [row["choices"].index(row["answer"]) if isinstance(row["answer"], str) else row["answer"] for row in ROWS]
    of_length = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode("utf-8"))}
    accuracy, chosen = {}, {}
    for name, length in of_length.items():
        divided = [np.array(of_row) / np.array([float(length(text)) for text in row["choices"]])
                   for of_row, row in zip(expected, ROWS, strict=True)]  # fmt: skip
        chosen[name] = [int(np.argmax(values)) for values in divided]
        accuracy[name] = np.mean(np.array(chosen[name]) == right)
    assert chosen["acc"] != chosen["acc_norm"] != chosen["acc_bytes"] and 0 < accuracy["acc"] < 1
    for batch_size in (1, 4):
        for found, lines in ranks(size, score_on_rank, quiz, batch_size, 64):
            assert {name: found[name] for name in accuracy} == accuracy and found["n"] == len(ROWS)
            assert found["cut_prompts"] == 1 and found["intervals"]["acc"]["method"] == "Wilson score"
            assert [line["row"] for line in lines] == list(range(1, len(ROWS) + 1))
            for i, line in enumerate(lines):
                assert line["log_likelihoods"] == pytest.approx(expected[i], rel=1e-5)
                assert line["answer"] == ROWS[i]["choices"][right[i]] and line["choices"] == ROWS[i]["choices"]
            for name in accuracy:
                key = "prediction" + name.removeprefix("acc")
                assert [line["choices"].index(line[key]) for line in lines] == chosen[name]
                assert np.mean([line[key] == line["answer"] for line in lines]) == found[name]


def test_answer_words_are_options_that_are_whole():
    """C12: also those that begin alike, which the accuracy of one forward cannot tell apart."""
    template = OptionsTemplate(Template("alike", "{text}\n[[It is {label=positive,positive not}.]]"))
    question = template.question({"text": "Fine.", "label": 1}, "x:1")
    assert question.options == [Segment("It is positive.", answer=True), Segment("It is positive not.", answer=True)]
    assert (question.texts, question.right) == (["positive", "positive not"], 1)
    assert [segment.text for segment in question.prompt] == ["Fine.\n"]
    assert OptionsTemplate(IMDB).question({"text": "x", "label": 0}, "x:1").texts == ["negative", "positive"]


def test_an_option_is_what_training_would_learn_without_its_end_token():
    """C12: the same segments as a row with that answer."""
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    row = ROWS[1]
    question = OptionsTemplate(QUIZ).question(row, "x:1")
    for text, option in zip(row["choices"], question.options, strict=True):
        segments, _ = QUIZ.render(row | {"answer": text}, "x:1")
        (trained,) = encode_rows([segments], tokenizer, 512, "right")
        (scored,) = encode_rows([[*question.prompt, option]], tokenizer, 512, "right")
        assert scored.ids == trained.ids[:-1] and trained.ids[-1] == tokenizer.eos_id
        assert scored.is_answer == trained.is_answer[:-1]


WRONG = {
    "no list": ({"choices": "yes"}, "choices is 'yes', expected a list of two or more texts"),
    "absent": ({"choices": None}, "choices is None, expected a list of two or more texts"),
    "one option": ({"choices": ["yes"]}, "choices is ['yes'], expected a list of two or more texts"),
    "numbers": ({"choices": [1, 2]}, "choices is [1, 2], expected a list of two or more texts"),
    "blank": ({"choices": ["yes", " "]}, "choices.1 is empty"),
    "twice": ({"choices": ["yes", "no", "yes"]}, "choices.0 and choices.2 are the same text"),
    "beyond": ({"answer": 2}, "answer is 2, expected one of its choices, or an index from 0 to 1"),
    "negative": ({"answer": -1}, "answer is -1, expected one of"),
    "bool": ({"answer": True}, "answer is True, expected one of"),
    "unknown": ({"answer": "maybe"}, "answer is 'maybe', expected one of"),
    "no answer": ({"answer": None}, "answer is None, expected one of"),
    "no question": ({"question": None}, "found fields"),
    "NUL": ({"choices": ["a\0b", "c"]}, "character 1 of answer is NUL"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_row_that_is_no_question_is_a_bad_row(case):
    change, expected = WRONG[case]
    row = {"question": "?", "choices": ["yes", "no"], "answer": 0} | change
    with pytest.raises(UserError) as error:
        OptionsTemplate(QUIZ).render(row, "rows.jsonl:3")
    assert str(error.value).startswith("rows.jsonl:3: ") and expected in str(error.value)


def test_an_index_is_an_index_also_where_options_are_numbers():
    assert OptionsTemplate(QUIZ).question({"question": "?", "choices": ["1", "0"], "answer": 1}, "").right == 1
    assert OptionsTemplate(QUIZ).question({"question": "?", "choices": ["1", "0"], "answer": "1"}, "").right == 0


@pytest.mark.parametrize("template", [Template("two", "{a}[[{b} {c}]]"), Template("quotes", "{a}[[{tags.0}]]")])
def test_a_template_with_another_answer_than_one_field_is_refused(template):
    with pytest.raises(UserError, match="--metric multiple_choice: expected a template whose answer is one f"):
        OptionsTemplate(template)


def test_conversations_have_no_options():
    with pytest.raises(UserError, match="expected a text template, found the conversations of llama3"):
        OptionsTemplate(Chat("llama3"))
    assert OptionsTemplate(TEMPLATES["gsm8k"]).columns == {"question", "answer", "choices"}


def test_an_option_that_does_not_fit_is_one_line(quiz):
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    with pytest.raises(UserError, match=r"quiz.jsonl:1: an option does not fit into --max_length 8 tokens"):
        read_questions([quiz], [1], OptionsTemplate(QUIZ), tokenizer, 8, "right")


def test_an_option_whose_first_token_nothing_predicts_is_one_line(tmp_path, monkeypatch):
    """Without BOS and without a prompt only later tokens would be scored, and longer options would win."""
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    monkeypatch.setattr(tokenizer, "bos_id", None)
    path = tmp_path / "bare.jsonl"
    path.write_text('{"answer": "frozen water", "choices": ["frozen water", "hot water of the sea"]}\n')
    with pytest.raises(UserError, match=r"bare.jsonl:1: an option does not fit .* with one or more before it$"):
        read_questions([path], [1], OptionsTemplate(Template("bare", "[[{answer}]]")), tokenizer, 64, "right")


def test_rows_are_found_again_by_their_numbers_over_several_files(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    paths[0].write_text('{"x": 1}\n\n{"x": 2}\n')
    paths[1].write_text('{"x": 3}\n{\n{"x": 4}\n')
    found = [(number, where, row["x"]) for number, where, row in rows_of(paths, {3, 4, 5, 6})]
    assert found == [(3, f"{paths[0]}:3", 2), (4, f"{paths[1]}:1", 3), (6, f"{paths[1]}:3", 4)]
