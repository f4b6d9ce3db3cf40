"""Scoring: every example once, and the numbers of a plain loop for any batch size and number of ranks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from reviews import BUNDLED, CONFIG, IMDB, example_by_example, plain_model, write_reviews
from sharded import build, this_process
from torch import nn

from llama.boundary.errors import UserError
from llama.boundary.untrusted import read_json
from llama.data.examples import EncodedData, encode_file
from llama.data.templates import Template
from llama.data.tokenizer_files import load_tokenizer
from llama.data.unlabelled import UnlabelledTemplate
from llama.evaluation import losses
from llama.evaluation.score import answer_ids, evaluate, sample_indices
from llama.storage import pretrained
from llama.storage.base import config_from_json

pytestmark = pytest.mark.usefixtures("cache")

SLOW = pytest.mark.slow
BATCH_SIZES = (1, 3, 8)
# Answers of several tokens, and of different numbers of them.
WORDY = Template("wordy", IMDB.source.replace("{label=negative,positive}", "{label=bad and rather too long,good one}"))


@pytest.fixture(scope="module")
def wordy(tmp_path_factory) -> tuple[Path, list[int]]:
    """19 encoded reviews with wordy answers, as a folder that any rank can open; and the answers' first tokens."""
    folder = tmp_path_factory.mktemp("wordy")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LLAMA_CACHE", str(folder))
        tokenizer = load_tokenizer(BUNDLED)
        encode_file(write_reviews(folder / "test.jsonl", 19), WORDY, tokenizer, 512)
        (encoded,) = [path for path in folder.iterdir() if path.is_dir()]
        return encoded, answer_ids(WORDY, tokenizer)


def opened(folder: Path) -> EncodedData:
    return EncodedData.open(folder, Path("test.jsonl"))


def score_on_rank(
    folder: Path, model_folder: Path | None = None, batch_sizes=BATCH_SIZES, every_token: bool = False, **arguments
) -> list:
    """On each rank, for each batch size: the metrics, this rank's predictions, how many forwards it ran."""
    encoded = opened(folder).labelling_prompts() if every_token else opened(folder)
    process = this_process()
    if model_folder:
        config = config_from_json(read_json(model_folder, "config.json"))
        model = build(config, process)
        pretrained.load_weights(model, model_folder)
    else:
        model = build(CONFIG, process)
        pretrained.initialize_weights(model, seed=1)
    forwards, results = [], []
    model.norm.register_forward_hook(lambda *_: forwards.append(1))  # each forward comes through it once
    for batch_size in batch_sizes:
        forwards.clear()
        results.append((*evaluate(model, encoded, process, batch_size, **arguments), len(forwards)))
    return results


@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_accuracy_and_loss_are_those_of_a_loop_over_examples(ranks, wordy, size):
    """C51, C52, C44: for any batch size and number of ranks; each example once, and as many forwards on each rank."""
    folder, words = wordy
    loss, accuracy, n, predictions = example_by_example(plain_model(), opened(folder), words)
    assert n == 19 and 0 < accuracy < 1 and {np.argmax(found) for found in predictions.values()} == {0, 1}
    by_rank = ranks(size, score_on_rank, folder, words=words)
    for batch_size, results in zip(BATCH_SIZES, zip(*by_rank, strict=True), strict=True):
        merged = {}
        for metrics, predicted, forwards in results:
            assert metrics == {"loss": pytest.approx(loss, rel=1e-6), "accuracy": accuracy, "n": 19}
            assert forwards == 1 + -(-19 // (size * batch_size))  # the first reads what all prompts share
            assert merged.keys().isdisjoint(predicted)
            merged |= {i: scored.probabilities for i, scored in predicted.items()}
        assert merged == {i: pytest.approx(found, abs=1e-5) for i, found in predictions.items()}


@pytest.mark.parametrize("every_token", [False, True])
def test_loss_and_perplexity_are_the_sum_of_losses_over_the_number_of_tokens(ranks, wordy, every_token):
    """C52: not a mean of means; over the answers, or over all tokens but each example's first."""
    folder, words = wordy
    encoded = opened(folder)
    loss, _, _, _ = example_by_example(plain_model(), encoded, words, every_token)
    for results in ranks(2, score_on_rank, folder, every_token=every_token):
        for metrics, predicted, _ in results:
            assert metrics == {"loss": pytest.approx(loss, rel=1e-6), "n": 19} and predicted == {}


@pytest.mark.parametrize(
    "most_logits", [pytest.param(1, marks=SLOW), 1280 * 200, pytest.param(1 << 27, marks=SLOW)],
    ids=["one at a time", "few together", "all"],
)  # fmt: skip
def test_losses_of_single_examples_add_up_to_the_loss(ranks, wordy, most_logits):
    """C51: each example's own loss, however many fit into one forward, and their sum over all ranks."""
    folder, words = wordy
    model, encoded = plain_model(), opened(folder)
    expected = {i: example_by_example(model, encoded, words, every_token=True, indices=[i])[0] for i in range(19)}
    by_rank = ranks(2, score_each_on_rank, folder, most_logits)
    for batch_size, results in zip(BATCH_SIZES, zip(*by_rank, strict=True), strict=True):
        merged = {}
        for metrics, found, forwards in results:
            assert metrics["n"] == 19 and merged.keys().isdisjoint(found) and forwards == results[0][2]
            merged |= found
        assert results[0][2] >= -(-19 // (2 * batch_size))
        assert {i: scored.loss / scored.labels for i, scored in merged.items()} == pytest.approx(expected, rel=1e-5)
        total = sum(scored.loss for scored in merged.values()) / sum(scored.labels for scored in merged.values())
        assert results[0][0]["loss"] == pytest.approx(total, rel=1e-12)


def score_each_on_rank(folder: Path, most_logits: int) -> list:
    losses.MOST_LOGITS, before = most_logits, losses.MOST_LOGITS
    try:
        return score_on_rank(folder, every_token=True, each=True)
    finally:
        losses.MOST_LOGITS = before


class FixedLogits(nn.Module):
    """One likely token, the label, among 128,255 unlikely ones, whatever the tokens are."""

    values = torch.randn(128_256, generator=torch.Generator().manual_seed(0)).index_fill_(0, torch.tensor([7]), 20.0)

    def logits(self, tokens, documents, rows):
        return self.values.expand(len(rows), -1)


class SameLabel:
    """4 examples of 3 tokens, of which the last is a label: token 7, the first of two answer words."""

    lengths, answers = np.full(4, 3), [0] * 4

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int):
        return np.array([1, 2, 7], np.int32), np.array([False, False, True])


def metrics_of_a_large_vocabulary() -> dict:
    return evaluate(FixedLogits(), SameLabel(), this_process(), batch_size=2, words=[7, 8])[0]


def test_the_loss_over_a_large_vocabulary_is_exact(ranks):
    """C52: torch.log_softmax in fp32 on a CPU is 1e-5 nats off, here a thirtieth of the loss."""
    exact = -float(FixedLogits.values.double().log_softmax(0)[7])
    (found,) = ranks(1, metrics_of_a_large_vocabulary)
    assert found == {"loss": pytest.approx(exact, abs=1e-6), "accuracy": 1.0, "n": 4} and exact < 1e-3


@pytest.mark.parametrize("size, limit", [(2, 1), *(pytest.param(3, limit, marks=SLOW) for limit in (1, 2, 7))])
def test_fewer_examples_than_ranks_do_not_hang(ranks, wordy, size, limit):
    """C44, R19: a rank without examples joins the others' forwards, and the metrics are of those there are."""
    folder, words = wordy
    chosen = sample_indices(19, limit).tolist()
    loss, accuracy, _, predictions = example_by_example(plain_model(), opened(folder), words, indices=chosen)
    by_rank = ranks(size, score_on_rank, folder, batch_sizes=[4], limit=limit, words=words)
    found = {i: scored.probabilities for ((_, part, _),) in by_rank for i, scored in part.items()}
    assert found == {i: pytest.approx(expected, abs=1e-5) for i, expected in predictions.items()}
    for ((metrics, _, forwards),) in by_rank:
        assert metrics == {"loss": pytest.approx(loss, rel=1e-6), "accuracy": accuracy, "n": limit} and forwards == 1


@pytest.mark.parametrize("labelled", [0, 7])
def test_rows_without_a_label_are_predicted_and_not_scored(ranks, wordy, tmp_path, monkeypatch, labelled):
    """C12, C51: as the same rows are that have one; the metrics are those of the others alone."""
    folder, words = wordy
    expected = example_by_example(plain_model(), opened(folder), words)[-1]
    rows = [json.loads(line) for line in (folder.parent / "test.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(1)
    known = sorted(rng.permutation(19)[:labelled].tolist())
    for i in range(19):
        if i not in known:
            rows[i] = {"text": rows[i]["text"]} | ({"label": None} if i % 2 else {})
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    encoded = encode_file(tmp_path / "some.jsonl", UnlabelledTemplate(WORDY), load_tokenizer(BUNDLED), 512)
    assert [i for i in range(19) if encoded.answers[i] >= 0] == known
    metrics = {"n": 0}
    if known:
        loss, accuracy, *_ = example_by_example(plain_model(), encoded, words, indices=known)
        metrics = {"loss": pytest.approx(loss, rel=1e-6), "accuracy": accuracy, "n": labelled}
    (cached,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    by_rank = ranks(2, score_on_rank, cached, words=words)
    for results in zip(*by_rank, strict=True):
        merged = {}
        for found, predicted, _ in results:
            assert found == metrics
            merged |= {i: scored.probabilities for i, scored in predicted.items()}
        assert merged == {i: pytest.approx(of_words, abs=1e-5) for i, of_words in expected.items()}


def test_a_limit_is_a_fixed_random_choice_and_not_the_first_of_a_file_sorted_by_label():
    """Files come sorted by label: half of the choice, more or less, is of either."""
    chosen = sample_indices(25_000, 1000).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == 1000 and 0 <= chosen[0] < chosen[-1] < 25_000
    assert 450 < sum(i >= 12_500 for i in chosen) < 550
    np.random.seed(5)
    assert sample_indices(25_000, 1000).tolist() == chosen
    for limit in (0, 10, 11):
        assert sample_indices(10, limit).tolist() == list(range(10))


def test_perplexity_of_a_real_model_equals_that_of_transformers(ranks, assets, tmp_path):
    """C52, RELIABILITY 4.2: stories260K over whole reviews, each given to transformers alone and unpadded."""
    from transformers import AutoModelForCausalLM

    folder = assets / "stories260K"
    encoded = encode_file(write_reviews(tmp_path / "test.jsonl", 5), IMDB, load_tokenizer(folder), 400)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for i in range(len(encoded)):
            ids = torch.from_numpy(np.array(encoded[i][0])).long()[None]
            nll += float(peer(ids, labels=ids).loss) * (ids.numel() - 1)
            tokens += ids.numel() - 1
    (cached,) = [path for path in Path(os.environ["LLAMA_CACHE"]).iterdir() if path.is_dir()
                 and np.array_equal(opened(path).tokens, encoded.tokens)]  # fmt: skip
    for results in ranks(2, score_on_rank, cached, folder, batch_sizes=[2], every_token=True):
        assert np.exp(results[0][0]["loss"]) == pytest.approx(np.exp(nll / tokens), rel=1e-5)


def test_answers_that_begin_alike_are_refused():
    """One forward looks at the first token of each answer; two that share it could not be told apart."""
    tokenizer = load_tokenizer(BUNDLED)
    with pytest.raises(UserError, match="begin with the same token"):
        answer_ids(Template("alike", "{text}[[ {label=positive,positive not}]]"), tokenizer)
    ids = answer_ids(IMDB, tokenizer)
    assert [tokenizer.decode([i], starts_text=False) for i in ids] == [" negative", " positive"]
