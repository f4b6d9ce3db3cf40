"""What all prompts begin with is computed once for an evaluation, and no metric shows it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reviews import BUNDLED, CONFIG, IMDB, write_reviews
from sharded import build, this_process

import llama.evaluation.shared_prefix
from llama.data.examples import EncodedData, encode_file
from llama.data.tokenizer_files import load_tokenizer
from llama.evaluation.score import answer_ids, evaluate
from llama.evaluation.shared_prefix import shared_length
from llama.storage import pretrained

SLOW = pytest.mark.slow
NEVER = 10**9  # tokens to save: no evaluation saves so many


class Examples(list):
    """(ids, index of the first label) as the encoded data that `shared_length` reads."""

    def __getitem__(self, i):
        ids, label = super().__getitem__(i)
        return np.array(ids, np.int32), np.arange(len(ids)) >= label


@pytest.mark.parametrize(
    "examples, expected",
    [
        ([([1, 2, 3, 4, 5, 6], 5), ([1, 2, 3, 9, 5, 6], 5)], 3),
        ([([1, 2, 3, 4, 5, 6], 5), ([1, 2, 3, 4, 5, 6], 5)], 4),  # equal: the row of the label stays
        ([([1, 2, 3, 4, 5, 6], 5), ([1, 2, 3, 4], 3)], 2),  # the shorter one decides
        ([([1, 2, 3, 4, 5, 6], 1), ([1, 2, 3, 4, 5, 7], 5)], 0),  # every token is a label
        ([([1, 2, 3], 3), ([1, 2, 3], 3)], 2),  # no label at all: one token stays
        ([([1, 2, 3], 2), ([7, 2, 3], 2)], 0),
        ([], 0),
    ],
)
def test_the_shared_start_holds_no_row_of_a_label_and_leaves_each_example_a_token(examples, expected):
    assert shared_length(Examples(examples), range(len(examples))) == expected
    assert shared_length(Examples(examples), range(len(examples))[::-1]) == expected


def test_only_the_examples_that_are_scored_decide_what_is_shared():
    examples = Examples([([1, 2, 3, 4, 5], 4), ([9, 9, 9, 9], 3), ([1, 2, 3, 5, 5], 4)])
    assert shared_length(examples, [0, 2]) == 3 and shared_length(examples, [0, 1, 2]) == 0


def both_ways_on_rank(folder: Path, batch_size: int, every_token: bool = False, **arguments) -> list:
    """What `evaluate` returns and how many tokens the model read, with the shared prefix and without, in float64."""
    data = EncodedData.open(folder, Path("test.jsonl"))
    if every_token:
        data = data.labelling_prompts()
    model = build(CONFIG, this_process(), torch.float64)
    pretrained.initialize_weights(model, seed=1)
    streams = []
    model.embed_tokens.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].numel()))
    results = []
    with pytest.MonkeyPatch.context() as patched:
        for least in (llama.evaluation.shared_prefix.LEAST_SAVED, NEVER):
            patched.setattr(llama.evaluation.shared_prefix, "LEAST_SAVED", least)
            streams.clear()
            results.append((*evaluate(model, data, this_process(), batch_size, **arguments), list(streams)))
    return results


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> tuple[Path, list[int]]:
    """24 encoded reviews, as a folder that any rank can open, and the ids of the answers."""
    folder = tmp_path_factory.mktemp("reviews")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LLAMA_CACHE", str(folder))
        tokenizer = load_tokenizer(BUNDLED)
        encode_file(write_reviews(folder / "test.jsonl", 24), IMDB, tokenizer, 512)
    (encoded,) = [path for path in folder.iterdir() if path.is_dir()]
    return encoded, answer_ids(IMDB, tokenizer)


@pytest.mark.parametrize("size, batch_size", [(2, 5), *(pytest.param(*case, marks=SLOW) for case in [(1, 1), (3, 2)])])
def test_metrics_and_predictions_do_not_show_that_the_instruction_was_computed_once(ranks, reviews, size, batch_size):
    """C51, C52, C44: equal with and without, on any number of ranks; as many forwards on each rank."""
    folder, words = reviews
    shared = shared_length(EncodedData.open(folder, Path("test.jsonl")), range(24))
    assert shared > 50
    by_rank = ranks(size, both_ways_on_rank, folder, batch_size, words=words)
    for (metrics, _, streams), (plain_metrics, _, plain_streams) in by_rank:
        assert metrics == plain_metrics | {"loss": pytest.approx(plain_metrics["loss"], rel=1e-7)}
        assert 0 < metrics["accuracy"] < 1 and metrics["n"] == 24
        assert streams[0] == shared and len(streams) == 1 + len(plain_streams) == 1 + len(by_rank[0][1][2])
        assert sum(streams) < 0.75 * sum(plain_streams)
    ours = {i: example for (_, found, _), _ in by_rank for i, example in found.items()}
    plain = {i: example for _, (_, found, _) in by_rank for i, example in found.items()}
    assert sorted(ours) == sorted(plain) == list(range(24))
    for i, example in ours.items():
        assert example.probabilities == pytest.approx(plain[i].probabilities, abs=1e-12)
        assert example.is_right == plain[i].is_right and example.loss == pytest.approx(plain[i].loss, rel=1e-6)


def test_nothing_is_shared_where_it_would_not_pay(ranks, reviews):
    """Two examples save too little, and a perplexity needs the loss of every token."""
    folder, words = reviews
    for arguments in ({"limit": 2, "words": words}, {"every_token": True}):
        (((metrics, _, streams), plain),) = ranks(1, both_ways_on_rank, folder, 4, **arguments)
        assert (metrics, streams) == (plain[0], plain[2])


def test_the_weights_of_now_decide_and_not_those_of_the_last_evaluation(ranks, reviews):
    """A trainer evaluates the same rows again and again, with other weights."""
    folder, words = reviews
    ((before, after, expected),) = ranks(1, after_a_change_on_rank, folder, words)
    assert after == expected and after["loss"] != pytest.approx(before["loss"], rel=1e-3)


def after_a_change_on_rank(folder: Path, words: list[int]) -> list[dict]:
    data = EncodedData.open(folder, Path("test.jsonl"))
    model = build(CONFIG, this_process())
    metrics = []
    for seed in (1, 2):
        pretrained.initialize_weights(model, seed)
        metrics.append(evaluate(model, data, this_process(), 8, words=words)[0])
    other = build(CONFIG, this_process())
    pretrained.initialize_weights(other, seed=2)
    return [*metrics, evaluate(other, data, this_process(), 8, words=words)[0]]
