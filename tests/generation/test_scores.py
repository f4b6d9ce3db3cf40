"""The processed scores against transformers' logits processors, in the order in which its generate builds them."""

import random

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from llama.boundary.errors import UserError
from llama.generation.scores import process
from llama.generation.settings import LONGEST_ANSWER, GenerationSettings

INF = torch.inf


def of_transformers(scores, texts, settings, stops=0):
    """As generate does it for a model that has `stops` stop ids."""
    config = GenerationConfig(
        do_sample=settings.draws, num_beams=settings.num_beams, repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size, temperature=settings.temperature or 1.0,
        top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p,
    )  # fmt: skip
    config._eos_token_tensor = torch.arange(stops) if stops else None
    shape = dict(hidden_size=2, intermediate_size=2, num_hidden_layers=0, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2, **shape))
    processors = model._get_logits_processor(config, len(texts[0]), device="cpu", model_kwargs={})
    return processors(torch.tensor(texts), scores.float() if scores.dtype != torch.float64 else scores)


def random_case(seed: int, vocab_size: int, dtype: torch.dtype = torch.float32):
    r = random.Random(seed)
    rows = r.choice([1, 3])
    scores = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = scores * r.choice([0.1, 1, 4])
    length = r.randint(1, 60)
    texts = [[r.randrange(min(vocab_size, 9)) for _ in range(length)] for _ in range(rows)]
    temperature = r.choice([0.0, 1.0, 0.8, 3.0])
    filters = {}
    if temperature:
        filters = {"top_k": r.choice([0, 1, 3, 40]), "top_p": r.choice([1, 0.9, 0.5, 0.1]), "min_p": r.choice([0, 0.3])}
    settings = GenerationSettings(
        temperature=temperature, repetition_penalty=r.choice([1.0, 1.3, 0.7]), num_beams=r.choice([1, 3]),
        no_repeat_ngram_size=r.choice([0, 2, 3] + [1] * (vocab_size > 9)), **filters,
    )  # fmt: skip
    return scores.to(dtype), texts, settings


def kept(settings, stops: int) -> int:
    return max(2, 1 + stops) if settings.num_beams > 1 else 1


@pytest.mark.parametrize("dtype", [
    pytest.param(torch.float32, marks=pytest.mark.slow), pytest.param(torch.float64, marks=pytest.mark.slow),
    torch.bfloat16,
], ids=str)  # fmt: skip
def test_every_mixture_of_settings_equals_transformers(dtype):
    """bfloat16 scores tie: there the order in which top-p drops equal tokens is whatever torch.sort does."""
    for seed in range(40):
        scores, texts, settings = random_case(seed, random.Random(seed).choice([5, 50, 1000]), dtype)
        before = scores.clone()
        stops = seed % 3
        ours = process(scores, texts, settings, kept(settings, stops))
        expected = of_transformers(scores, texts, settings, stops)
        assert ours.dtype == expected.dtype == (dtype if dtype == torch.float64 else torch.float32)
        if dtype == torch.bfloat16:
            ours, expected = ours.sort().values, expected.sort().values
        assert torch.equal(ours, expected), (seed, settings)
        assert torch.equal(scores, before)


def test_in_a_large_vocabulary_only_likely_tokens_are_sorted_and_the_same_ones_stay():
    scores, texts = random_case(0, 128256)[0][:1], [[1]]
    scores[:, :300] += 14
    for settings in (
        GenerationSettings(temperature=0.8, top_p=0.75),
        GenerationSettings(temperature=1.0, top_p=0.99),
        GenerationSettings(temperature=0.8, top_k=40, top_p=0.75, no_repeat_ngram_size=3),
    ):
        ours = process(scores, texts, settings)
        assert torch.equal(ours, of_transformers(scores, texts, settings)) and 2 < int((ours > -INF).sum()) < 2000


def test_tokens_that_tie_with_the_last_of_top_k_stay():
    tied = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert process(tied, [[0]], GenerationSettings(temperature=1.0, top_k=2)).tolist() == [[-INF, 3, 2, 2, 2, -INF]]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, count in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.88, 4)):
        ours = process(scores, [[0]], GenerationSettings(temperature=1.0, top_p=top_p))
        assert int((ours > -INF).sum()) == count, top_p


def test_of_tokens_that_tie_top_p_drops_the_lowest_ids():
    settings = GenerationSettings(temperature=1.0, top_p=0.5)
    ours = process(torch.cat([torch.zeros(1, 64), torch.full((1, 64), -99.0)], -1), [[0]], settings)
    assert (ours[0] > -INF).nonzero().flatten().tolist() == list(range(32, 64))


def test_the_filters_leave_as_many_tokens_as_beams_ask_for():
    scores = torch.tensor([[0.0, -50.0, -60.0, -70.0]])
    for filters in (dict(top_k=1), dict(top_p=0.1), dict(min_p=1.0), dict(top_k=1, top_p=0.1, min_p=1.0)):
        settings = GenerationSettings(temperature=1.0, **filters)
        for keep in (1, 2, 3, 4, 5):
            assert int((process(scores, [[0]], settings, keep) > -INF).sum()) == min(keep, 4)


def test_rows_of_unequal_length_are_processed_as_if_alone():
    scores, texts, _ = random_case(3, 50)
    scores = torch.cat([scores, scores, scores])[:3]
    texts = [[1, 2, 3, 1, 2], [7], [4, 4, 4]]
    settings = GenerationSettings(temperature=0.8, top_p=0.9, top_k=30, repetition_penalty=1.5, no_repeat_ngram_size=2)
    together = process(scores, texts, settings)
    for row, text in enumerate(texts):
        assert torch.equal(together[row : row + 1], process(scores[row : row + 1], [text], settings))
    assert together[0, 3] == together[2, 4] == -INF  # 2 3 and 4 4 were there


def test_a_token_is_penalized_once_however_often_it_came_and_away_from_being_chosen():
    scores = torch.tensor([[4.0, -4.0, 4.0, 0.0]])
    ours = process(scores, [[0, 0, 0, 1, 3]], GenerationSettings(repetition_penalty=2.0))
    assert ours.tolist() == [[2, -8, 4, 0]]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_run_of_tokens_occurs_twice(size):
    """Greedy writing over three tokens: each run of `size` is new, until there is none that would be."""
    text, r = [0], random.Random(0)
    while True:
        scores = process(torch.tensor([[r.random() for _ in range(3)]]), [text], GenerationSettings(
            no_repeat_ngram_size=size))  # fmt: skip
        runs = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        assert len(set(runs)) == len(runs)
        for token in range(3):
            assert (tuple([*text, token][-size:]) in runs) == (scores[0, token] == -INF)
        if scores.max() == -INF:
            break
        text.append(int(scores.argmax()))
    assert len(text) >= 3


def test_a_vocabulary_of_one_token_passes_every_filter_and_ends_with_no_repeat():
    one, settings = torch.zeros(1, 1), dict(temperature=1.0, top_k=3, top_p=0.1, min_p=1.0, repetition_penalty=2.0)
    assert process(one, [[0]], GenerationSettings(**settings), keep=3).tolist() == [[0]]
    assert process(one, [[0, 0]], GenerationSettings(**settings, no_repeat_ngram_size=1), keep=3).tolist() == [[-INF]]


def test_logits_that_are_no_numbers_are_refused_and_ruled_out_tokens_are_not():
    for bad in ([0.0, torch.nan], [0.0, INF], [-INF, -INF]):
        with pytest.raises(ValueError, match="^the model's logits are NaN or infinite: its weights are unusable$"):
            process(torch.tensor([[0.0, 1.0], bad]), [[0], [0]], GenerationSettings())
    settings = GenerationSettings(temperature=0.5, top_k=2, top_p=0.9, min_p=0.01)
    assert process(torch.tensor([[0.0, -INF]]), [[0]], settings).tolist() == [[0, -INF]]


def test_settings_are_allowed_as_far_as_float32_reaches():
    scores = torch.tensor([[1e4, 1e-4, 0.0, -1e4]])
    for wide in (dict(temperature=1e-6), dict(repetition_penalty=100.0), dict(repetition_penalty=0.01)):
        ours = process(scores, [[0, 1, 2, 3]], GenerationSettings(**wide))
        assert ours.isfinite().all()
    for power in (-5.0, 5.0):
        divided = torch.tensor(-1e6) / LONGEST_ANSWER**power
        assert GenerationSettings(num_beams=2, length_penalty=power) and divided.isfinite() and divided < 0
    wider = [
        dict(temperature=1e-7),
        dict(repetition_penalty=1e-30),
        dict(repetition_penalty=1e30),
        dict(num_beams=2, length_penalty=6.0),
        dict(num_beams=1001),
    ]
    for settings in wider:
        with pytest.raises(UserError, match=f"--{list(settings)[-1]}.*expected"):
            GenerationSettings(**settings)
