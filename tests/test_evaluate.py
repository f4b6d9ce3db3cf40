"""Evaluation: every example once, and the numbers of a plain loop for any batch size and number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import evaluate
from data import hold_out
from evaluate import answer_ids, choose
from llama.data.encoding import EncodedData, encode_file
from llama.data.rows import DataError
from llama.data.templates import TEMPLATES, Template
from llama.data.tokenizer import load_tokenizer
from llama.model.config import ModelConfig
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments
from llama.parallel.distribute import Ranks, build
from llama.storage import pretrained

ROOT = Path(evaluate.__file__).parent
BUNDLED = ROOT / "assets" / "tiny" / "tokenizer.model"
CONFIG = ModelConfig(vocab_size=1280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, initializer_range=0.4)  # fmt: skip
BATCH_SIZES = (1, 3, 8)
IMDB = TEMPLATES["imdb"]
# Answers of several tokens, and of different numbers of them.
WORDY = Template("wordy", IMDB.source.replace("{label=negative,positive}", "{label=bad and rather too long,good one}"))


def write_reviews(path: Path, count: int) -> Path:
    """Reviews of very different lengths, sorted by label as IMDB's are."""
    words = "the film was slow and weak but I liked its quick bright strong plot".split()
    rows = [{"text": " ".join(words[(i + j * j) % len(words)] for j in range(1 + (11 * i) % 37)),
             "label": int(i >= count // 2)} for i in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("llama-cache")
        patched.setenv("LLAMA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def wordy(tmp_path_factory) -> tuple[Path, list[int]]:
    """19 encoded reviews with wordy answers, as a folder that any rank can open; and the answers' first tokens."""
    folder = tmp_path_factory.mktemp("wordy")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LLAMA_CACHE", str(folder))
        tokenizer = load_tokenizer(BUNDLED)
        encode_file(write_reviews(folder / "test.jsonl", 19), WORDY, tokenizer, 512, quiet=True)
        (encoded,) = [path for path in folder.iterdir() if path.is_dir()]
        return encoded, answer_ids(WORDY, tokenizer)


def opened(folder: Path) -> EncodedData:
    return EncodedData.open(folder, Path("test.jsonl"))


def plain_model(config: ModelConfig = CONFIG) -> Llama:
    model = Llama(config)
    pretrained.initialize(model, seed=1)
    return model


@torch.no_grad()
def example_by_example(model: Llama, encoded: EncodedData, words: list[int], every_token: bool = False, indices=None):
    """(loss, accuracy, n, predictions) by the definition: one example at a time, softmax in float64."""
    nll, labels, right, predictions = 0.0, 0, 0, {}
    for i in range(len(encoded)) if indices is None else indices:
        ids, is_answer = (np.array(x) for x in encoded[i])
        alone = PackedDocuments([len(ids)])
        logits = model(torch.from_numpy(ids).long(), alone.positions, alone).double().numpy()
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        places = [j for j in range(1, len(ids)) if every_token or is_answer[j]]
        nll -= sum(np.log(p[j - 1, ids[j]]) for j in places)
        labels += len(places)
        predictions[i] = int(np.argmax(p[np.flatnonzero(is_answer)[0] - 1, words]))
        right += predictions[i] == encoded.answers[i]
    return nll / labels, right / len(predictions), len(predictions), predictions


def score_on_rank(
    folder: Path, model_folder: Path | None = None, batch_sizes=BATCH_SIZES, every_token: bool = False, **arguments
) -> list:
    """On each rank, for each batch size: the metrics, this rank's predictions, how many forwards it ran."""
    encoded = opened(folder).labelling_prompts() if every_token else opened(folder)
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    here = Ranks(dist.get_rank(), size, torch.device("cpu"), mesh)
    model = build(ModelConfig.from_folder(model_folder) if model_folder else CONFIG, here, torch.float32)
    if model_folder:
        pretrained.load(model, model_folder)
    else:
        pretrained.initialize(model, seed=1)
    forwards, results = [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    for batch_size in batch_sizes:
        forwards.clear()
        results.append((*evaluate.evaluate(model, encoded, here, batch_size, **arguments), len(forwards)))
    return results


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accuracy_and_loss_are_those_of_a_loop_over_examples(ranks, wordy, size):
    """C51, C52, C44: for any batch size and number of ranks; each example once, and as many forwards on each rank."""
    folder, words = wordy
    loss, accuracy, n, predictions = example_by_example(plain_model(), opened(folder), words)
    assert n == 19 and 0 < accuracy < 1 and len(set(predictions.values())) == 2
    by_rank = ranks(size, score_on_rank, folder, words=words)
    for batch_size, results in zip(BATCH_SIZES, zip(*by_rank, strict=True), strict=True):
        merged = {}
        for metrics, predicted, forwards in results:
            assert metrics == {"loss": pytest.approx(loss, rel=1e-6), "accuracy": accuracy, "n": 19}
            assert forwards == -(-19 // (size * batch_size))
            assert merged.keys().isdisjoint(predicted)
            merged |= predicted
        assert merged == predictions


@pytest.mark.parametrize("every_token", [False, True])
def test_loss_and_perplexity_are_the_sum_of_losses_over_the_number_of_tokens(ranks, wordy, every_token):
    """C52: not a mean of means; over the answers, or over all tokens but each example's first."""
    folder, words = wordy
    encoded = opened(folder)
    loss, _, _, _ = example_by_example(plain_model(), encoded, words, every_token)
    for results in ranks(2, score_on_rank, folder, every_token=every_token):
        for metrics, predicted, _ in results:
            assert metrics == {"loss": pytest.approx(loss, rel=1e-6), "n": 19} and predicted == {}


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_fewer_examples_than_ranks_do_not_hang(ranks, wordy, limit):
    """C44, R19: a rank without examples joins the others' forwards, and the metrics are of those there are."""
    folder, words = wordy
    chosen = choose(19, limit).tolist()
    loss, accuracy, _, predictions = example_by_example(plain_model(), opened(folder), words, indices=chosen)
    by_rank = ranks(3, score_on_rank, folder, batch_sizes=[4], limit=limit, words=words)
    assert {i: guess for ((_, part, _),) in by_rank for i, guess in part.items()} == predictions
    for ((metrics, _, forwards),) in by_rank:
        assert metrics == {"loss": pytest.approx(loss, rel=1e-6), "accuracy": accuracy, "n": limit} and forwards == 1


def test_a_limit_is_a_fixed_random_choice_and_not_the_first_of_a_file_sorted_by_label():
    """Files come sorted by label: half of the choice, more or less, is of either."""
    chosen = choose(25_000, 1000).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == 1000 and 0 <= chosen[0] < chosen[-1] < 25_000
    assert 450 < sum(i >= 12_500 for i in chosen) < 550
    np.random.seed(5)
    assert choose(25_000, 1000).tolist() == chosen
    for limit in (0, 10, 11):
        assert choose(10, limit).tolist() == list(range(10))


def test_perplexity_of_a_real_model_equals_that_of_transformers(ranks, assets, tmp_path):
    """C52, RELIABILITY 4.2: stories260K over whole reviews, each given to transformers alone and unpadded."""
    from transformers import AutoModelForCausalLM

    folder = assets / "stories260K"
    encoded = encode_file(write_reviews(tmp_path / "test.jsonl", 5), IMDB, load_tokenizer(folder), 400, quiet=True)
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
    with pytest.raises(DataError, match="begin with the same token"):
        answer_ids(Template("alike", "{text}[[ {label=positive,positive not}]]"), tokenizer)
    ids = answer_ids(IMDB, tokenizer)
    assert [tokenizer.decode([i], continues=True) for i in ids] == [" negative", " positive"]


# The command


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A Hugging Face folder with the tiny model's weights in fp32."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    pretrained.export(plain_model(), folder, CONFIG.to_dict(), [BUNDLED], torch.float32)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews") / "reviews.jsonl", 23)


def test_the_command_scores_a_file_and_its_predictions_give_the_accuracy_again(exported, reviews, tmp_path):
    """C51, C54: one line per review in the file's order; stdout is the result and nothing else."""
    result, predictions = tmp_path / "new folder/result.json", tmp_path / "predictions.jsonl"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--model", exported, "--data", reviews, "--batch_size", "4",
         "--dtype", "float32", "--output", result, "--predictions", predictions],
        env=environment | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads(result.read_text())

    words = answer_ids(IMDB, load_tokenizer(BUNDLED))
    encoded = encode_file(reviews, IMDB, load_tokenizer(BUNDLED), 512, quiet=True)
    loss, accuracy, n, guesses = example_by_example(plain_model(), encoded, words)
    assert told["n"] == n == 23 and told["bad_rows"] == 0 and not told["bundled_sample"]
    assert (told["template"], told["split"], told["held_out"]) == ("imdb", None, None)
    assert told["loss"] == pytest.approx(loss, rel=1e-6) and told["accuracy"] == accuracy

    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 24))
    assert [line["answer"] for line in lines] == [("negative", "positive")[row["label"]] for row in rows]
    assert [line["prediction"] for line in lines] == [("negative", "positive")[guesses[i]] for i in range(23)]
    assert sum(line["prediction"] == line["answer"] for line in lines) / len(lines) == told["accuracy"]


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """evaluate.py in this process: (exit status, stdout, stderr without progress bars)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    status = 0
    try:
        evaluate.run(evaluate.main)
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    return status, out, "\n".join(line for line in lines if line.strip() and "it/s" not in line and "%|" not in line
                                  and not line.startswith(("encoding", "evaluating")))  # fmt: skip


def test_perplexity_is_the_exponential_of_the_loss_over_every_token(exported, reviews, tmp_path, monkeypatch, capsys):
    """C52: of a limited choice from a named part of a folder."""
    (tmp_path / "test.jsonl").write_text(reviews.read_text())
    status, out, err = command(monkeypatch, capsys, "--model", exported, "--data", tmp_path, "--metric", "perplexity",
                               "--limit", 6, "--dtype", "float32", "--output", tmp_path / "result.json")  # fmt: skip
    assert status == 0 and json.loads(out) == json.loads((tmp_path / "result.json").read_text()), err
    encoded = encode_file(reviews, IMDB, load_tokenizer(BUNDLED), 512, quiet=True)
    loss, *_ = example_by_example(plain_model(), encoded, [0, 1], every_token=True, indices=choose(23, 6).tolist())
    told = json.loads(out)
    assert told["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5) and told["n"] == 6 and told["split"] == "test"


def test_a_held_out_part_of_a_file_is_scored_when_asked_for_and_named_in_the_result(
    exported, tmp_path, monkeypatch, capsys
):
    """C51, C54: exactly the rows that training with the same flag leaves out, by their number in the file."""
    path = write_reviews(tmp_path / "reviews.jsonl", 23)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["text"] = " "  # row 5 is bad, so examples and rows are numbered differently
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = [number for number in range(1, 24) if number != 5]
    train, test = hold_out(22, 0.25)
    encoded = encode_file(path, IMDB, load_tokenizer(BUNDLED), 512, skip_bad_rows=True, quiet=True)
    words = answer_ids(IMDB, load_tokenizer(BUNDLED))
    for split, chosen in (("test", test), ("train", train)):
        status, out, err = command(
            monkeypatch, capsys, "--model", exported, "--data", path, "--test_fraction", 0.25, "--split", split,
            "--skip_bad_rows", "--dtype", "float32", "--predictions", tmp_path / "predictions.jsonl")
        assert status == 0, err
        told = json.loads(out)
        loss, accuracy, n, _ = example_by_example(plain_model(), encoded, words, indices=chosen.tolist())
        assert told["split"] == split and told["held_out"] == {"fraction": 0.25, "seed": 0, "examples": len(test)}
        assert (told["n"], told["bad_rows"], told["accuracy"]) == (n, 1, accuracy) and n == len(chosen)
        assert told["loss"] == pytest.approx(loss, rel=1e-6)
        lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
        assert [line["row"] for line in lines] == [good[i] for i in chosen]
        labels = [rows[good[i] - 1]["label"] for i in chosen]
        assert [line["answer"] for line in lines] == [("negative", "positive")[label] for label in labels]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Rows whose answers are free text of very different lengths."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} or not?", "answer": "good film " * (1 + i % 7)}) + "\n"
                            for i in range(11)))
    return path


@pytest.mark.parametrize("metric", [None, "loss", "perplexity"])
def test_free_answers_are_scored_by_their_loss_and_whole_texts_by_perplexity(
    exported, questions, monkeypatch, capsys, metric
):
    """C52: loss is the default where there are no answer words; no accuracy is made up."""
    flags = ["--metric", metric] if metric else []
    status, out, err = command(monkeypatch, capsys, "--model", exported, "--data", questions, "--batch_size", 3,
                               "--dtype", "float32", *flags)  # fmt: skip
    assert status == 0, err
    told = json.loads(out)
    encoded = encode_file(questions, TEMPLATES["gsm8k"], load_tokenizer(BUNDLED), 512, quiet=True)
    loss, *_ = example_by_example(plain_model(), encoded, [0, 1], every_token=metric == "perplexity")
    assert told["loss"] == pytest.approx(loss, rel=1e-6) and told["n"] == 11 and told["template"] == "gsm8k"
    assert "accuracy" not in told and ("perplexity" in told) == (metric == "perplexity")
    assert told.get("perplexity", np.exp(loss)) == pytest.approx(np.exp(loss), rel=1e-5)


def test_answer_words_are_scored_by_accuracy_unless_asked_otherwise(exported, reviews, monkeypatch, capsys):
    """C52: the loss is of the answers alone, the same with either metric; perplexity is of every token."""
    told = {}
    for metric in (None, "accuracy", "loss", "perplexity"):
        flags = ["--metric", metric] if metric else []
        status, out, _ = command(monkeypatch, capsys, "--model", exported, "--data", reviews, "--dtype", "float32",
                                 *flags)  # fmt: skip
        assert status == 0
        told[metric] = {name: value for name, value in json.loads(out).items() if "second" not in name}
    assert told[None] == told["accuracy"] and "perplexity" not in told[None]
    assert "accuracy" not in told["loss"] and told["loss"]["loss"] == pytest.approx(told[None]["loss"], rel=1e-6)
    assert "accuracy" not in told["perplexity"] and abs(told["perplexity"]["loss"] - told["loss"]["loss"]) > 0.1


MISTAKES = {
    "unknown flag": (["--modle", "x"], "--modle"),
    "no such model": (["--model", "nowhere"], "--model nowhere: no such folder"),
    "no such data": (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file or folder"),
    "no such part": (["--data", "{parts}", "--split", "test"], "--split test: "),
    "no such choice": (["--metric", "rouge-2"], "--metric"),
    "several numbers": (["--batch_size", "0", "--limit", "-1"], "--batch_size 0: expected 1 or more; --limit -1"),
    "too long": (["--max_length", "100000"], "--max_length 100000: the model was made for at most 2048 tokens"),
    "too short": (["--max_length", "20"], "reviews.jsonl:1: no label is left within --max_length 20 tokens"),
    "bad row": (["--data", "{bad}"], "bad.jsonl:2: not valid JSON"),
    "accuracy of free text": (["--data", "{free}", "--metric", "accuracy"], "--metric accuracy: expected a template"),
    "predicted free text": (["--data", "{free}", "--predictions", "p"], "--metric accuracy: expected a template with"),
    "fraction beside a test file": (["--data", "imdb", "--data_dir", str(ROOT / "assets" / "imdb_sample"),
                                     "--test_fraction", "0.1"], "--test_fraction 0.1: expected a data set without"),
    "nothing held out": (["--data", "{parts}", "--test_fraction", "0", "--split", "test"], "--split test: "),
    "empty file": (["--data", "{empty}"], "empty.jsonl: no rows"),
    "nothing to predict": (["--metric", "perplexity", "--predictions", "p.jsonl"], "--predictions p.jsonl"),
    "tokenizer of another model": (["--model", "{small}"], "the tokenizer has 1280 ids, the model only 1000"),
    "damaged weights": (["--model", "{cut}"], "model.safetensors: not a whole safetensors file"),
    "result cannot be written": (["--output", "{parts}"], "--output {parts}: Is a directory"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(exported, reviews, tmp_path, monkeypatch, capsys, case):
    """R15, R18, R19: found before any scoring, except that a result cannot be written."""
    places = {name: tmp_path / name for name in ("parts", "small", "cut")}
    places |= {name: tmp_path / f"{name}.jsonl" for name in ("bad", "empty", "free")}
    places["parts"].mkdir()
    first = reviews.read_text().splitlines()[0] + "\n"
    (places["parts"] / "train.jsonl").write_text(first)
    places["bad"].write_text(first + "{\n")
    places["empty"].write_text("")
    places["free"].write_text('{"question": "1?", "answer": "2"}\n')
    for name in ("small", "cut"):
        places[name].mkdir()
        for path in exported.iterdir():
            (places[name] / path.name).write_bytes(path.read_bytes()[: -1 if path.suffix == ".safetensors" else None])
    config = json.loads((exported / "config.json").read_text())
    (places["small"] / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    monkeypatch.chdir(tmp_path)

    arguments, expected = MISTAKES[case]
    arguments = [argument.format(**places) for argument in arguments]
    status, out, err = command(monkeypatch, capsys, "--model", exported, "--data", reviews, "--limit", 2, *arguments)
    lines = {"bad row": 2, "too short": 6}.get(case, 1)  # the first five bad rows, and how many there are
    assert status == 2 and len(err.splitlines()) == lines and expected.format(**places) in err.splitlines()[0], err
    assert not dist.is_initialized() and (not out or case == "result cannot be written")
