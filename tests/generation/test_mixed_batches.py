"""Texts of every kind in one batch with a cache, against each of them alone without a cache."""

import random

import pytest
import torch
from small_llama import BASE, config_of, randomize

from llama.generation.beams import Beams
from llama.generation.decode import generate
from llama.generation.request import Answer, Request
from llama.generation.sampling import RandomNumbers, choose
from llama.generation.scores import process
from llama.generation.settings import GenerationSettings
from llama.model import Llama, PackedDocuments


def logits_of(model: Llama, texts: list[list[int]]) -> torch.Tensor:
    """(texts, V): each text is read from its start."""
    with torch.no_grad():
        return torch.cat([
            model.logits(torch.tensor(text), PackedDocuments([len(text)], torch.device("cpu")),
                         torch.tensor([len(text) - 1])) for text in texts
        ])  # fmt: skip


def alone(model: Llama, request: Request, positions: int) -> Answer:
    settings, left = request.settings, positions - len(request.prompt)
    if settings.num_beams > 1:
        beams, texts = Beams(request.prompt, settings, request.stop_ids, left), [request.prompt]
        while not beams.done:
            tokens, parents = beams.advance(logits_of(model, texts))
            texts = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return beams.answer()
    numbers, ids = RandomNumbers(settings.seed, request.prompt), []
    while len(ids) < min(settings.max_new_tokens, left):
        text = [*request.prompt, *ids]
        uniform = numbers.uniform(len(ids)).tolist() if settings.draws else None
        (token,) = choose(process(logits_of(model, [text]), [text], settings), uniform)
        if token is None:
            return Answer(ids, "no_repeat")
        if token in request.stop_ids:
            return Answer(ids, "stop")
        ids.append(token)
    return Answer(ids, "length" if len(ids) == settings.max_new_tokens else "context")


def random_request(r: random.Random, vocab_size: int, positions: int) -> Request:
    how = dict(
        temperature=r.choice([0.0, 0.0, 0.8, 2.0]), num_beams=r.choice([1, 1, 2, 4, 7]), seed=r.randint(0, 3),
        max_new_tokens=r.choice([0, 1, 2, 5, 17, 30]), no_repeat_ngram_size=r.choice([0, 0, 1, 2, 3]),
        repetition_penalty=r.choice([1.0, 1.0, 1.4]),
    )  # fmt: skip
    if how["temperature"]:
        how |= dict(top_k=r.choice([0, 3, 40]), top_p=r.choice([1.0, 0.75]), min_p=r.choice([0.0, 0.05]))
    if how["num_beams"] > 1:
        early_stopping = r.choice(["true", "false", "never"])
        how |= dict(length_penalty=r.choice([-1.0, 0.0, 1.0, 2.0]), early_stopping=early_stopping)
    prompt = [r.randrange(vocab_size) for _ in range(r.randint(1, min(positions, 11)))]
    stop_ids = frozenset(r.sample(range(vocab_size), min(vocab_size, r.choice([0, 0, 1, 2]))))
    return Request(prompt, GenerationSettings(**how), stop_ids)


@pytest.mark.slow
def test_texts_of_every_kind_in_one_batch_equal_each_alone_without_a_cache():
    """C24, C55: greedy, drawn and with beams; vocabularies of one token, few positions, prompts that fill them."""
    reasons = set()
    for seed in range(16):
        r = random.Random(seed)
        raw = BASE | {"vocab_size": r.choice([1, 2, 3, 5, 20, 96]), "max_position_embeddings": r.choice([12, 40, 300])}
        model = Llama(config_of(raw | r.choice([{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}])))
        randomize(model, seed)
        model = model.double().eval()
        positions = raw["max_position_embeddings"]
        requests = [random_request(r, raw["vocab_size"], positions) for _ in range(r.randint(1, 9))]
        for index, answer in generate(model, requests, r.randint(1, 5)):
            assert answer == alone(model, requests[index], positions), (seed, requests[index])
            reasons.add(answer.reason)
    assert reasons == {"length", "context", "stop", "no_repeat"}
