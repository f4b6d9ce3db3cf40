"""Metrics of what a model writes: the texts of one prompt at a time, for any number of ranks."""

import json

import pytest
from reviews import plain_model
from sharded import this_process

from llama.boundary.errors import UserError
from llama.data.prompting import Prompt
from llama.data.tokenizer_files import load_tokenizer
from llama.evaluation.exact_match import ExactMatch
from llama.evaluation.written import Written, decoding
from llama.generation.decode import generate
from llama.generation.request import Request
from llama.generation.settings import GenerationSettings
from llama.storage.base import TINY_TOKENIZER

TOKENIZER = load_tokenizer(TINY_TOKENIZER)
SHORT = GenerationSettings(max_new_tokens=6)
STOPS = frozenset({TOKENIZER.eos_id})


def prompts(count: int = 7) -> list[Prompt]:
    """Of very different lengths, in the rows 2, 4, ...; the answer of every third one is what the model writes."""
    made = []
    for i in range(count):
        text = "the film was bright " * (1 + i * i % 5) + str(i)
        ids = TOKENIZER.encode(text)
        ((_, answer),) = generate(plain_model(), [Request(ids, SHORT, STOPS)], 1)
        reference = TOKENIZER.decode_new(answer.ids) if i % 3 == 0 else "something else"
        made.append(Prompt(2 * i + 2, ids, text, reference, was_cut=i == 1))
    return made


def write_on_rank(batch_size: int, settings: GenerationSettings = SHORT, longest: int = 0):
    asked = prompts()
    if longest:
        asked[1] = asked[1]._replace(ids=[5] * longest)
    metric = Written(ExactMatch(), asked, TOKENIZER, settings, STOPS, batch_size)
    try:
        outcome = metric.score(plain_model(), this_process())
    except UserError as error:
        return str(error)
    return outcome.as_json() | metric.about, list(outcome.lines), list(outcome.notes)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_prompt_is_answered_once_as_if_it_were_alone(ranks, size):
    """C51, C54: in the order of the rows, for any batch size and number of ranks; the lines give the metric again."""
    asked = prompts()
    alone = [next(generate(plain_model(), [Request(prompt.ids, SHORT, STOPS)], 1))[1] for prompt in asked]
    for batch_size in (1, 3):
        for found, lines, notes in ranks(size, write_on_rank, batch_size):
            assert [line["row"] for line in lines] == [2, 4, 6, 8, 10, 12, 14]
            assert [line["prediction"] for line in lines] == [TOKENIZER.decode_new(a.ids).strip() for a in alone]
            assert [(line["tokens"], line["ended_by"]) for line in lines] == [(len(a.ids), a.reason) for a in alone]
            assert found["exact_match"] == sum(line["match"] for line in lines) / 7 == 3 / 7
            assert sum(line["prediction"] == line["answer"].strip() for line in lines) == 3 and found["n"] == 7
            assert found["cut_prompts"] == 1 and found["reached_max_new_tokens"] == 7
            assert notes == ["texts that --max_new_tokens ended: 7"] and json.dumps(found)


def test_nothing_written_is_a_wrong_answer_and_is_said(ranks):
    for found, lines, notes in ranks(2, write_on_rank, 2, GenerationSettings(max_new_tokens=0)):
        assert (found["exact_match"], found["empty"], found["n"]) == (0.0, 7, 7)
        assert [line["prediction"] for line in lines] == [""] * 7
        assert notes[0] == "texts that are empty: 7"


def test_a_mistake_that_one_rank_meets_ends_all(ranks):
    """R19: no rank waits for an answer that never comes."""
    first, second = ranks(2, write_on_rank, 2, longest=5000)
    assert first == second and "5000 tokens" in first


def write_without_answers():
    asked = [prompt._replace(reference=None) for prompt in prompts(2)]
    with pytest.raises(UserError, match="none of 2 rows has an answer"):
        Written(ExactMatch(), asked, TOKENIZER, SHORT, STOPS, 1)
    metric = Written(ExactMatch(), [*asked, *prompts(1)], TOKENIZER, SHORT, STOPS, 1)
    outcome = metric.score(plain_model(), this_process())
    return outcome.as_json() | metric.about, outcome.notes


def test_prompts_without_an_answer_are_left_out_and_counted(ranks):
    """A conversation may end with a question."""
    for found, notes in ranks(2, write_without_answers):
        assert (found["without_answer"], found["n"], found["exact_match"]) == (2, 1, 1.0)
        assert notes[0] == "rows without an answer, which are left out: 2"


@pytest.mark.parametrize("flags, method", [
    ({}, "greedy"), ({"num_beams": 2}, "beam search"), ({"temperature": 0.5}, "sampling"),
    ({"temperature": 0.5, "num_beams": 2, "seed": 3}, "beam sampling"),
])  # fmt: skip
def test_how_texts_were_written_is_named(flags, method):
    named = decoding(GenerationSettings(**flags))
    assert named["method"] == method and named == named | flags
    assert named.keys() == {"method", *GenerationSettings.__dataclass_fields__}
