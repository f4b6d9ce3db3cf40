"""Beam search against transformers, against every text of a toy model, and against its definition in ten lines."""

import itertools
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama.generation.beams import Beams
from llama.generation.request import Answer
from llama.generation.sampling import RandomNumbers
from llama.generation.settings import GenerationSettings

INF = torch.inf
NONE: frozenset[int] = frozenset()


def run(model, prompt, settings, stop_ids=NONE, positions_left=1000) -> Answer:
    """The answer of a model without a cache: a function from texts to logits (texts, V)."""
    beams = Beams(prompt, settings, stop_ids, positions_left)
    texts = [prompt]
    while not beams.done:
        assert beams.rows == len(texts) > 0
        tokens, parents = beams.advance(model(texts))
        texts = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
    return beams.answer()


def markov(seed: int, vocab_size: int):
    """A model whose logits depend on the last two tokens."""
    table = torch.randn(vocab_size, vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)).double() * 2
    return lambda texts: torch.stack([table[text[-2] if len(text) > 1 else 0, text[-1]] for text in texts])


def fixed(*logits: float):
    """A model that says the same whatever came before."""
    return lambda texts: torch.tensor(logits).repeat(len(texts), 1)


def log_probability(model, prompt, ids) -> float:
    texts = [[*prompt, *ids[:length]] for length in range(len(ids))]
    return sum(float(model([text]).log_softmax(-1)[0, token]) for text, token in zip(texts, ids, strict=True))


def by_definition(model, prompt, settings, stop_ids):
    """The num_beams best texts of each length live on; those among them that end are kept, until there are enough."""
    living, ended = [(0.0, [])], []
    for length in range(1, settings.max_new_tokens + 1):
        steps = [(score, ids, model([[*prompt, *ids]])[0].log_softmax(-1).tolist()) for score, ids in living]
        longer = [(score + s, [*ids, i]) for score, ids, scores in steps for i, s in enumerate(scores)]
        longer.sort(reverse=True)
        is_end = [ids[-1] in stop_ids or length == settings.max_new_tokens for _, ids in longer]
        best = zip(longer[: settings.num_beams], is_end, strict=False)
        ended += [(score / length**settings.length_penalty, ids) for (score, ids), end in best if end]
        living = [text for text, end in zip(longer, is_end, strict=True) if not end][: settings.num_beams]
        if settings.early_stopping == "true" and len(ended) >= settings.num_beams:
            break
    return max(ended)[1]


@pytest.mark.parametrize("early_stopping", ["true", "never"])
def test_beams_follow_their_definition(early_stopping):
    """`never` ends early only where nothing can win any more, so it finds what a search to the end finds."""
    for seed in range(60):
        r = random.Random(seed)
        settings = GenerationSettings(
            num_beams=r.randint(2, 6), max_new_tokens=r.randint(1, 9), length_penalty=r.choice([-1.0, 0.0, 0.5, 2.0]),
            early_stopping=early_stopping,
        )  # fmt: skip
        model, stop_ids = markov(seed, 7), frozenset(r.sample(range(7), r.choice([0, 1, 2])))
        ids = by_definition(model, [1, 2], settings, stop_ids)
        stopped = ids[-1] in stop_ids
        expected = Answer(ids[:-1], "stop") if stopped else Answer(ids, "length")
        assert run(model, [1, 2], settings, stop_ids) == expected, (seed, settings)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_with_room_for_every_text_the_best_of_all_is_found(length_penalty):
    """Every text of up to five of three tokens is scored; 2 ends a text."""
    ended = [ids for n in range(1, 6) for ids in itertools.product(range(3), repeat=n) if 2 not in ids[:-1]]
    ended = [list(ids) for ids in ended if ids[-1] == 2 or len(ids) == 5]
    settings = GenerationSettings(num_beams=len(ended), max_new_tokens=5, length_penalty=length_penalty)
    for seed in range(5):
        model = markov(seed, 3)
        best = max(ended, key=lambda ids: log_probability(model, [0], ids) / len(ids) ** length_penalty)
        assert run(model, [0], settings, frozenset([2])).ids == [i for i in best if i != 2]


def test_the_rows_are_one_before_the_first_step_and_the_best_beams_after_it():
    beams = Beams([5, 5], GenerationSettings(num_beams=2, max_new_tokens=3), NONE, 9)
    assert beams.rows == 1
    assert beams.advance(torch.tensor([[0.0, 3.0, 1.0]])) == ([1, 2], [0, 0])
    assert beams.rows == 2
    # Scores -0.2 and -2.2. A certain token of the second beam is worth less than two doubtful ones of the first ...
    assert beams.advance(torch.tensor([[0.1, 0.0, -0.1], [9.0, 0.0, 0.0]])) == ([0, 1], [0, 0])
    # ... and then more: the third of the first beam's tokens was one of three, the second beam's is certain.
    assert beams.advance(torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 9.0]])) == ([], [])
    assert beams.done and beams.rows == 2 and beams.answer() == Answer([1, 1, 2], "length")


def steps_and_answer(settings: GenerationSettings, *probabilities: list[float]) -> tuple[int, list[int]]:
    """Of a model whose tokens 1 and 2 end a text, and have these probabilities behind a text of each length."""
    beams = Beams([0], settings, frozenset([1, 2]), 99)
    steps = 0
    while not beams.done:
        beams.advance(torch.tensor(probabilities[min(steps, len(probabilities) - 1)]).log().repeat(beams.rows, 1))
        steps += 1
    return steps, beams.answer().ids


@pytest.mark.parametrize("early_stopping, steps, ids", [("true", 1, []), ("false", 1, []), ("never", 5, [0] * 5)])
def test_only_never_waits_for_a_long_text_that_may_still_win(early_stopping, steps, ids):
    """Both beams end at once with -0.8. What lives has -2.3, and at the greatest length -2.3 / 25."""
    settings = GenerationSettings(num_beams=2, max_new_tokens=5, length_penalty=2.0, early_stopping=early_stopping)
    assert steps_and_answer(settings, [0.1, 0.45, 0.45], [1.0, 0.0, 0.0]) == (steps, ids)


def test_the_worst_text_that_ended_is_one_of_the_num_beams_best():
    """After three steps -1.2, -1.8 and -2.5 ended. What lives has -2.47: more than the last, and not enough."""
    settings = GenerationSettings(num_beams=2, max_new_tokens=9, length_penalty=0.0)
    assert steps_and_answer(settings, [0.4, 0.3, 0.3], [0.7, 0.2, 0.1], [0.3, 0.6, 0.1])[0] == 3


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_one_beam_is_greedy_and_max_new_tokens_of_none_or_one_are_kept(num_beams):
    model, settings = markov(0, 6), GenerationSettings(num_beams=num_beams, max_new_tokens=1)
    assert run(model, [3], settings) == Answer([int(model([[3]]).argmax())], "length")
    assert run(model, [3], GenerationSettings(num_beams=num_beams, max_new_tokens=0)) == Answer([], "length")
    greedy = [3]
    while len(greedy) < 8:
        greedy.append(int(model([greedy]).argmax()))
    if num_beams == 1:
        assert run(model, [3], GenerationSettings(max_new_tokens=7)).ids == greedy[1:]


def test_the_model_s_last_position_ends_an_answer():
    settings = GenerationSettings(num_beams=3, max_new_tokens=5)
    short = run(markov(1, 6), [3], GenerationSettings(num_beams=3, max_new_tokens=4))
    assert run(markov(1, 6), [3], settings, NONE, 4) == Answer(short.ids, "context")
    assert run(markov(1, 6), [3], settings, NONE, 5).reason == "length"
    assert run(markov(1, 6), [3], settings, NONE, 0) == Answer([], "context")


def test_stop_ids_that_are_all_of_the_vocabulary_or_outside_it():
    settings = GenerationSettings(num_beams=3, max_new_tokens=5)
    assert run(markov(1, 4), [3], settings, frozenset(range(4))) == Answer([], "stop")
    assert run(markov(1, 4), [3], settings, frozenset(range(9))) == Answer([], "stop")
    assert run(markov(1, 4), [3], settings, frozenset([70, 71])) == run(markov(1, 4), [3], settings)


@pytest.mark.parametrize("draws", [False, True])
def test_beams_wider_than_the_vocabulary_and_vocabularies_of_one_and_two_tokens(draws):
    settings = dict(num_beams=50, temperature=float(draws))
    assert run(fixed(1.0), [0], GenerationSettings(max_new_tokens=3, **settings)) == Answer([0, 0, 0], "length")
    assert run(fixed(1.0), [0], GenerationSettings(**settings), frozenset([0])) == Answer([], "stop")
    assert run(fixed(0.0, 1.0), [0], GenerationSettings(max_new_tokens=7, **settings)).ids == [1] * 7


@pytest.mark.parametrize("draws", [False, True])
def test_where_every_token_would_repeat_an_n_gram_the_answer_ends(draws):
    settings = dict(num_beams=2, no_repeat_ngram_size=1)
    if draws:
        settings |= dict(temperature=1.0, top_k=2, top_p=0.99, min_p=0.01)
    assert run(fixed(1.0), [0], GenerationSettings(**settings)) == Answer([], "no_repeat")
    answer = run(fixed(1.0, 0.0, 0.5), [0], GenerationSettings(**settings))
    assert answer.reason == "no_repeat" and sorted(answer.ids) == [1, 2]
    assert run(fixed(1.0, 0.0, 0.5), [0], GenerationSettings(**settings), frozenset([2])).reason == "stop"


def test_ruled_out_tokens_are_in_no_beam_and_logits_that_are_no_numbers_are_refused():
    assert run(fixed(0.0, -INF, -INF), [0], GenerationSettings(num_beams=4, max_new_tokens=3)).ids == [0, 0, 0]
    for bad in (torch.nan, INF, -INF):
        with pytest.raises(ValueError, match="^the model's logits are NaN or infinite: its weights are unusable$"):
            run(fixed(bad, bad), [0], GenerationSettings(num_beams=4))


def test_beams_that_tie_give_the_same_answer_again_and_no_text_twice():
    settings = GenerationSettings(num_beams=3, max_new_tokens=6)
    beams, texts = Beams([0], settings, frozenset([1]), 99), [[0]]
    while not beams.done:
        tokens, parents = beams.advance(torch.zeros(len(texts), 5))
        texts = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        assert len(set(map(tuple, texts))) == len(texts)
    assert beams.answer() == run(fixed(0, 0, 0, 0, 0), [0], settings, frozenset([1]))


def test_drawn_beams_depend_on_prompt_and_seed_alone_and_have_the_probabilities_of_the_scores():
    """One beam and one token: the first candidate that is drawn is the answer."""
    counts = torch.zeros(3)
    model = fixed(0.0, 1.0, 2.0)
    for seed in range(1000):
        settings = GenerationSettings(max_new_tokens=1, temperature=0.8, seed=seed)
        counts[run(model, [0], settings).ids[0]] += 1
    expected = 1000 * (torch.tensor([0.0, 1.0, 2.0]) / 0.8).softmax(-1)
    assert float(((counts - expected) ** 2 / expected).sum()) < 13.82  # of 2 degrees of freedom, once in 1000
    settings = [GenerationSettings(num_beams=3, max_new_tokens=12, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (run(markov(0, 9), [4, 4], s) for s in settings)
    assert first == again != other


def tiny_llama(seed: int, vocab_size: int, dtype: torch.dtype):
    """Weights that make neighbours matter, and a function from texts to logits beside the model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.6, bos_token_id=None, eos_token_id=None,
    )).to(dtype).eval()  # fmt: skip

    @torch.no_grad()
    def logits(texts):
        return model(torch.tensor(texts), use_cache=False).logits[:, -1]

    return model, logits


def of_transformers(model, prompt, settings, stop_ids) -> tuple[Answer, float]:
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), pad_token_id=0,
        do_sample=settings.draws, temperature=settings.temperature or 1.0, top_k=settings.top_k, top_p=settings.top_p,
        min_p=settings.min_p, num_beams=settings.num_beams, max_new_tokens=settings.max_new_tokens,
        length_penalty=settings.length_penalty, no_repeat_ngram_size=settings.no_repeat_ngram_size,
        early_stopping={"true": True, "false": False, "never": "never"}[settings.early_stopping],
        repetition_penalty=settings.repetition_penalty, eos_token_id=sorted(stop_ids) or None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ids = out.sequences[0, len(prompt) :].tolist()[: int((out.beam_indices[0] >= 0).sum())]
    stopped = bool(ids) and ids[-1] in stop_ids
    return Answer(ids[:-1], "stop") if stopped else Answer(ids, "length"), float(out.sequences_scores[0])


def random_settings(r: random.Random, **others) -> GenerationSettings:
    return GenerationSettings(
        num_beams=r.randint(2, 5), max_new_tokens=r.randint(1, 20), length_penalty=r.choice([-1.0, 0.0, 1.0, 2.0]),
        early_stopping=r.choice(["true", "false", "never"]), no_repeat_ngram_size=r.choice([0, 0, 2, 3]),
        repetition_penalty=r.choice([1.0, 1.0, 1.3, 0.8]), **others,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_beams_equal_transformers_token_for_token(dtype):
    for seed in range(60):
        r = random.Random(seed)
        vocab_size = r.choice([8, 11, 17, 40])
        model, logits = tiny_llama(seed, vocab_size, dtype)
        prompt = [r.randrange(vocab_size) for _ in range(r.randint(1, 9))]
        settings, stop_ids = random_settings(r), frozenset(r.sample(range(vocab_size), r.choice([0, 1, 2])))
        expected, _ = of_transformers(model, prompt, settings, stop_ids)
        assert run(logits, prompt, settings, stop_ids) == expected, (seed, settings)


@pytest.mark.slow
def test_beams_wider_than_the_vocabulary_equal_transformers():
    """Where no text of transformers ended, its score is -1e9 and it gives some text that is not complete."""
    compared = 0
    for seed in range(60):
        r = random.Random(seed)
        vocab_size = r.choice([3, 4, 5])
        model, logits = tiny_llama(seed, vocab_size, torch.float64)
        prompt = [r.randrange(vocab_size) for _ in range(r.randint(1, 4))]
        settings = GenerationSettings(
            num_beams=r.randint(5, 9), max_new_tokens=r.randint(1, 9), length_penalty=r.choice([-1.0, 0.0, 1.0, 2.0]),
            early_stopping=r.choice(["true", "false", "never"]), no_repeat_ngram_size=r.choice([0, 0, 3]),
        )  # fmt: skip
        stop_ids = frozenset(r.sample(range(vocab_size), r.choice([0, 1])))
        expected, score = of_transformers(model, prompt, settings, stop_ids)
        ours = run(logits, prompt, settings, stop_ids)
        if score > -1e8:
            compared += 1
            assert ours == expected, (seed, settings)
    assert compared > 50


def draw_as_ours(monkeypatch: pytest.MonkeyPatch, prompt: list[int], seed: int) -> None:
    """transformers' only random act in beam search is torch.multinomial: let it use our numbers, step by step."""
    places = itertools.count()
    numbers = RandomNumbers(seed, prompt)

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        is_possible = probabilities[0] > 0
        uniform = torch.from_numpy(numbers.uniform(next(places), int(is_possible.sum())))
        keys = probabilities[0].double().log()
        keys[is_possible] += -(-(1 - uniform).log()).log()
        return keys.topk(num_samples).indices[None]

    monkeypatch.setattr(torch, "multinomial", multinomial)


@pytest.mark.slow
def test_drawn_beams_equal_transformers_when_it_draws_with_the_same_numbers(monkeypatch):
    for seed in range(60):
        r = random.Random(seed)
        model, logits = tiny_llama(seed, 40, torch.float32)
        prompt = [r.randrange(40) for _ in range(r.randint(1, 9))]
        filters = dict(top_k=r.choice([0, 20, 30]), top_p=r.choice([1.0, 1.0, 0.95]), min_p=r.choice([0.0, 0.0, 0.001]))
        settings = random_settings(r, temperature=r.choice([0.8, 1.0, 2.0]), seed=seed, **filters)
        stop_ids = frozenset(r.sample(range(40), r.choice([0, 1, 2])))
        draw_as_ours(monkeypatch, prompt, seed)
        expected, score = of_transformers(model, prompt, settings, stop_ids)
        if score > -1e8:
            assert run(logits, prompt, settings, stop_ids) == expected, (seed, settings)


@pytest.mark.slow
def test_alpaca_s_mixture_of_settings_equals_transformers(monkeypatch):
    """4 beams, top-k 40, top-p 0.75, temperature 0.8, no repeated trigram, 256 tokens."""
    settings = GenerationSettings(
        num_beams=4, top_k=40, top_p=0.75, temperature=0.8, no_repeat_ngram_size=3, max_new_tokens=256, seed=1
    )
    for seed in range(3):
        model, logits = tiny_llama(seed, 200, torch.float32)
        prompt = [5, 6, 7 + seed]
        draw_as_ours(monkeypatch, prompt, 1)
        expected, score = of_transformers(model, prompt, settings, frozenset([3]))
        assert score > -1e8 and run(logits, prompt, settings, frozenset([3])) == expected
