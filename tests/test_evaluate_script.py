"""evaluate.py as a command: a result on stdout, predictions in a file, mistakes in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from reviews import BUNDLED, CONFIG, IMDB, example_by_example, plain_model, write_reviews
from runs import replaced
from sharded import this_process

import evaluate
from data import hold_out
from llama.boundary.command_line import run
from llama.boundary.errors import UserError
from llama.data.examples import encode_file
from llama.data.templates import TEMPLATES
from llama.data.tokenizer_files import load_tokenizer
from llama.evaluation.score import answer_ids, sample_indices
from llama.storage import pretrained
from llama.storage.base import config_to_json
from llama.storage.companions import Companions
from llama.storage.peft import Adapter, save_adapter
from lora import adapted, apply_adapter, initialize_adapter

pytestmark = pytest.mark.usefixtures("cache")

ROOT = Path(evaluate.__file__).parent
WORDS = ["negative", "positive"]
HEADLINE = re.compile(r"(?:(\w+) \S+ \((?:\S+ to \S+, at 95%|no interval)\); )*n \d+")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A Hugging Face folder with the tiny model's weights in fp32."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    pretrained.export_model(plain_model(), folder, config_to_json(CONFIG), Companions([BUNDLED]), torch.float32)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews") / "reviews.jsonl", 23)


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """evaluate.py in this process: (exit status, stdout, stderr without progress bars)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    status = 0
    try:
        run(evaluate.main)
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    return status, out, "\n".join(line for line in lines if line.strip() and "it/s" not in line and "%|" not in line
                                  and not line.startswith(("encoding", "evaluating", "reading", "writing"))
                                  and not HEADLINE.fullmatch(line))  # fmt: skip


def as_process(folder: Path, *arguments) -> tuple[int, str, str]:
    """evaluate.py in a process of its own, started in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *map(str, arguments)], env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("how", ["called", pytest.param("as a process", marks=pytest.mark.slow)])
def test_the_command_scores_a_file_and_its_predictions_give_the_accuracy_again(
    exported, reviews, tmp_path, monkeypatch, capsys, how
):
    """C51, C54: one line per review in the file's order; stdout is the result and nothing else."""
    written, predictions = tmp_path / "new folder/result.json", tmp_path / "predictions.jsonl"
    arguments = ("--model", exported, "--data", reviews, "--template", "imdb", "--batch_size", 4, "--dtype", "float32",
                 "--output", written, "--predictions", predictions)  # fmt: skip
    if how == "called":
        status, out, err = command(monkeypatch, capsys, *arguments)
    else:
        status, out, err = as_process(tmp_path, *arguments)
    assert status == 0, err
    result = json.loads(out)
    assert result == json.loads(written.read_text())

    words = answer_ids(IMDB, load_tokenizer(BUNDLED))
    encoded = encode_file(reviews, IMDB, load_tokenizer(BUNDLED), 512)
    loss, accuracy, n, guesses = example_by_example(plain_model(), encoded, words)
    assert result["n"] == n == 23 and result["bad_rows"] == 0 and not result["bundled_sample"]
    assert (result["template"], result["split"], result["held_out"]) == ("imdb", None, None)
    assert result["loss"] == pytest.approx(loss, rel=1e-6) and result["accuracy"] == accuracy

    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 24))
    assert [line["answer"] for line in lines] == [WORDS[row["label"]] for row in rows]
    for i, line in enumerate(lines):
        negative, positive = line["probabilities"].values()
        assert [negative, positive] == pytest.approx(guesses[i], abs=1e-5) and [*line["probabilities"]] == WORDS
        assert line["probability"] == max(negative, positive) == line["probabilities"][line["prediction"]]
        before, _, after = TEMPLATES["imdb"].source.partition("{text...}")
        assert line["prompt"] == before + rows[i]["text"] + after.partition("[[")[0].removesuffix(" ")
    assert sum(line["prediction"] == line["answer"] for line in lines) / len(lines) == result["accuracy"]
    again = sum(line["loss"] for line in lines) / sum(line["tokens"] for line in lines)
    assert again == pytest.approx(result["loss"], rel=1e-12)


def test_what_the_models_files_hold_and_nothing_uses_is_announced_on_stderr(
    exported, reviews, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"attention_dropout": 0.1, "new\n": [], "absent": None}))
    status, out, err = command(monkeypatch, capsys, "--model", folder, "--data", reviews, "--template", "imdb",
                               "--dtype", "float32")  # fmt: skip
    assert status == 0 and json.loads(out)["n"] == 23
    assert err == f"{folder / 'config.json'}: not used: 'attention_dropout', 'new\\n'"


def test_perplexity_is_the_exponential_of_the_loss_over_every_token(exported, reviews, tmp_path, monkeypatch, capsys):
    """C52: of a limited choice from a named part of a folder."""
    (tmp_path / "test.jsonl").write_text(reviews.read_text())
    status, out, err = command(monkeypatch, capsys, "--model", exported, "--data", tmp_path, "--metric", "perplexity",
                               "--template", "imdb", "--limit", 6, "--dtype", "float32", "--output",
                               tmp_path / "result.json")  # fmt: skip
    assert status == 0 and json.loads(out) == json.loads((tmp_path / "result.json").read_text()), err
    encoded = encode_file(reviews, IMDB, load_tokenizer(BUNDLED), 512)
    chosen = sample_indices(23, 6).tolist()
    loss, *_ = example_by_example(plain_model(), encoded, [0, 1], every_token=True, indices=chosen)
    result = json.loads(out)
    assert result["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert result["n"] == 6 and result["split"] == "test"


@pytest.mark.slow
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
    encoded = encode_file(path, IMDB, load_tokenizer(BUNDLED), 512, skip_bad_rows=True)
    words = answer_ids(IMDB, load_tokenizer(BUNDLED))
    for split, chosen in (("test", test), ("train", train)):
        status, out, err = command(
            monkeypatch, capsys, "--model", exported, "--data", path, "--test_fraction", 0.25, "--split", split,
            "--template", "imdb", "--skip_bad_rows", "--dtype", "float32", "--predictions",
            tmp_path / "predictions.jsonl")
        assert status == 0, err
        result = json.loads(out)
        loss, accuracy, n, _ = example_by_example(plain_model(), encoded, words, indices=chosen.tolist())
        assert result["split"] == split and result["held_out"] == {"fraction": 0.25, "seed": 0, "examples": len(test)}
        assert (result["n"], result["bad_rows"], result["accuracy"]) == (n, 1, accuracy) and n == len(chosen)
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
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


@pytest.mark.parametrize("metric", [None, pytest.param("loss", marks=pytest.mark.slow), "perplexity"])
def test_free_answers_are_scored_by_their_loss_and_whole_texts_by_perplexity(
    exported, questions, monkeypatch, capsys, metric
):
    """C52: loss is the default where there are no answer words; no accuracy is made up."""
    flags = ["--metric", metric] if metric else []
    status, out, err = command(monkeypatch, capsys, "--model", exported, "--data", questions, "--batch_size", 3,
                               "--dtype", "float32", *flags)  # fmt: skip
    assert status == 0, err
    result = json.loads(out)
    encoded = encode_file(questions, TEMPLATES["gsm8k"], load_tokenizer(BUNDLED), 512)
    loss, *_ = example_by_example(plain_model(), encoded, [0, 1], every_token=metric == "perplexity")
    assert result["loss"] == pytest.approx(loss, rel=1e-6) and result["n"] == 11 and result["template"] == "gsm8k"
    assert "accuracy" not in result and ("perplexity" in result) == (metric == "perplexity")
    assert result.get("perplexity", np.exp(loss)) == pytest.approx(np.exp(loss), rel=1e-5)


@pytest.mark.slow
def test_answer_words_are_scored_by_accuracy_unless_asked_otherwise(exported, reviews, monkeypatch, capsys):
    """C52: the loss is of the answers alone, the same with either metric; perplexity is of every token."""
    result = {}
    for metric in (None, "accuracy", "loss", "perplexity"):
        flags = ["--metric", metric] if metric else []
        status, out, _ = command(monkeypatch, capsys, "--model", exported, "--data", reviews, "--dtype", "float32",
                                 "--template", "imdb", *flags)  # fmt: skip
        assert status == 0
        result[metric] = {name: value for name, value in json.loads(out).items() if "second" not in name}
    assert result[None] == result["accuracy"] and "perplexity" not in result[None]
    assert "accuracy" not in result["loss"] and result["loss"]["loss"] == pytest.approx(result[None]["loss"], rel=1e-6)
    assert "accuracy" not in result["perplexity"] and abs(result["perplexity"]["loss"] - result["loss"]["loss"]) > 0.1


def share(rights: list[bool]) -> float:
    return sum(rights) / len(rights)


def loss_again(lines: list[dict]) -> float:
    return sum(line["loss"] for line in lines) / sum(line["tokens"] for line in lines)


def perplexity_again(lines: list[dict]) -> dict:
    return {"perplexity": np.exp(loss_again(lines)), "loss": loss_again(lines)}


def accuracy_again(lines: list[dict]) -> dict:
    return {"accuracy": share([line["prediction"] == line["answer"] for line in lines])}


def choices_again(lines: list[dict]) -> dict:
    found = {}
    for name, length in {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}.items():
        rights = []
        for line in lines:
            scores = [value / length(text)
                      for value, text in zip(line["log_likelihoods"], line["choices"], strict=True)]  # fmt: skip
            rights.append(line["choices"][int(np.argmax(scores))] == line["answer"])
        found[name] = share(rights)
    return found


def matches_again(lines: list[dict]) -> dict:
    return {"exact_match": share([line["prediction"] == line["answer"].strip() for line in lines])}


def rouge_again(lines: list[dict]) -> dict:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(line["answer"], line["prediction"]) for line in lines]
    return {kind: np.mean([score[kind].fmeasure for score in scores]) for kind in kinds}


# Of each metric: the flags, and its values from the lines of predictions alone.
EVERY_METRIC = {
    "accuracy": (["--data", "{reviews}", "--template", "imdb"], accuracy_again),
    "loss": (["--data", "{questions}"], lambda lines: {"loss": loss_again(lines)}),
    "perplexity": (["--data", "{questions}"], perplexity_again),
    "perplexity of a text": (["--data", "{text}", "--max_length", "16"], perplexity_again),
    "multiple_choice": (["--data", "{quiz}"], choices_again),
    "exact_match": (["--data", "{questions}", "--max_new_tokens", "5"], matches_again),
    "rouge": (["--data", "{questions}", "--max_new_tokens", "5", "--num_beams", "2"], rouge_again),
}


REPEATED = ("loss", "rouge", "exact_match")  # as perplexity, and as texts that are written and compared
METRICS = [pytest.param(case, marks=pytest.mark.slow) if case in REPEATED else case for case in EVERY_METRIC]


@pytest.mark.parametrize("case", METRICS)
def test_the_predictions_of_every_metric_give_it_again(
    exported, reviews, questions, tmp_path, monkeypatch, capsys, case
):
    """C51, C54: a line for each chosen example in the order of the file; a result with n and 95 % intervals."""
    if case == "rouge":
        pytest.importorskip("rouge_score")
    metric = case.partition(" ")[0]
    places = {"reviews": reviews, "questions": questions}
    places |= {"text": tmp_path / "text.txt", "quiz": tmp_path / "quiz.jsonl"}
    places["text"].write_text("the film was slow and bright .\n" * 9)
    places["quiz"].write_text("".join(json.dumps({"question": f"{i}?", "choices": ["good film", f"slow {i}", "x"],
                                                  "answer": i % 3}) + "\n" for i in range(11)))  # fmt: skip
    flags, again = EVERY_METRIC[case]
    flags = [flag.format(**places) for flag in flags]
    status, out, err = command(monkeypatch, capsys, "--model", exported, "--dtype", "float32", "--limit", 7, "--metric",
                               metric, *flags, "--predictions", tmp_path / "p.jsonl")  # fmt: skip
    assert status == 0, err
    result, lines = json.loads(out), [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == result["n"] == 7 and result["metric"] == metric and result["limit"] == 7
    if case == "perplexity of a text":
        assert [line["window"] for line in lines] == list(range(7)) and (result["window"], result["stride"]) == (16, 8)
    else:
        size = 23 if case == "accuracy" else 11
        assert [line["row"] for line in lines] == [1 + i for i in sample_indices(size, 7).tolist()]
    for name, value in again(lines).items():
        assert result[name] == pytest.approx(value, rel=1e-9)
    for name, interval in result["intervals"].items():
        if interval:
            assert interval["low"] <= result[name] <= interval["high"] and interval["confidence"] == 0.95


def test_all_ranks_together_write_a_prediction_of_each_example(ranks, exported, reviews, cache, tmp_path):
    for size in (1, 2):
        ranks(size, predict_on_ranks, cache, exported, reviews, tmp_path / f"{size}.jsonl")
    alone, together = ([json.loads(line) for line in (tmp_path / f"{size}.jsonl").read_text().splitlines()]
                       for size in (1, 2))  # fmt: skip
    assert [line["row"] for line in together] == [line["row"] for line in alone] == list(range(1, 24))
    for line, expected in zip(together, alone, strict=True):
        assert line["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


def predict_on_ranks(cache: Path, model: Path, data: Path, predictions: Path) -> None:
    os.environ["LLAMA_CACHE"] = str(cache)
    flags = ["--model", model, "--template", "imdb", "--data", data, "--dtype", "float32", "--predictions", predictions]
    with replaced(evaluate, join=lambda: nullcontext(this_process())):
        with replaced(sys, argv=["evaluate.py", *map(str, flags)]), redirect_stdout(None):
            evaluate.main()


def test_fields_that_no_prompt_uses_are_told_on_stderr(exported, tmp_path, monkeypatch, capsys):
    """D20: stdout stays the result alone."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "A fine film.", "label": 1, "stars": 5}) + "\n")
    status, out, err = command(monkeypatch, capsys, "--model", exported, "--template", "imdb", "--data", data)
    assert status == 0 and json.loads(out)["n"] == 1
    assert err == "fields of the rows that are not used: 'stars'"


def test_files_of_an_earlier_result_stay_as_they_are_until_there_is_another(
    exported, reviews, tmp_path, monkeypatch, capsys
):
    """Whether they can be written is tried first, without a change to them."""
    old, new = tmp_path / "old.json", tmp_path / "new.jsonl"
    old.write_text("kept")
    seen = []

    def fails(*_, **__):
        seen.append((old.read_text(), new.exists()))
        raise UserError("no model")

    monkeypatch.setattr(evaluate, "open_model", fails)
    status, *_ = command(monkeypatch, capsys, "--model", exported, "--data", reviews, "--template", "imdb",
                         "--output", old, "--predictions", new)  # fmt: skip
    assert status == 2 and seen == [("kept", False)]


@pytest.mark.slow
def test_rows_without_labels_are_predicted_where_predictions_are_asked_for(
    exported, reviews, tmp_path, monkeypatch, capsys
):
    """C54: the same predictions as with labels; nothing is scored, and it is said. Else such a row is a bad row."""
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    unlabelled, out = tmp_path / "new.jsonl", tmp_path / "predictions.jsonl"
    labels = [{}, {"label": None}]  # absent, or null
    lines = [json.dumps({"text": row["text"]} | labels[i % 2]) + "\n" for i, row in enumerate(rows)]
    unlabelled.write_text("".join(lines))
    common = ("--model", exported, "--template", "imdb", "--dtype", "float32")
    predicted = {}
    for path in (reviews, unlabelled):
        status, result, err = command(monkeypatch, capsys, *common, "--data", path, "--predictions", out)
        assert status == 0, err
        predicted[path] = [json.loads(line) for line in out.read_text().splitlines()]
    assert err == "rows without a label: 23; they are predicted, and nothing is scored"
    result = json.loads(result)
    assert (result["n"], result["without_label"]) == (0, 23) and not {"loss", "accuracy"} & result.keys()
    assert [line.pop("answer") for line in predicted[reviews]] == [WORDS[row["label"]] for row in rows]
    assert all(line.pop("loss") > 0 and line.pop("tokens") for line in predicted[reviews])
    assert predicted[unlabelled] == predicted[reviews]
    status, _, err = command(monkeypatch, capsys, *common, "--data", unlabelled)
    assert status == 2 and "new.jsonl: 23 of 23 rows cannot be used" in err


@pytest.mark.slow
def test_a_runs_folder_stands_for_what_the_run_has_left(exported, reviews, tmp_path, monkeypatch, capsys):
    """A model, or an adapter with the base and the rounding of the run; which it was is said."""
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    adapter = Adapter(2, 64.0)
    model = plain_model()
    apply_adapter(model, adapter)
    initialize_adapter(model, 0)
    with torch.no_grad():
        for linear in adapted(model).values():
            linear.lora_B.weight.fill_(0.1)
    run.mkdir()
    save_adapter(model, tuned / "adapter", adapter, "base")
    shutil.copytree(exported, run / "model")
    (run / "run.json").write_text("{}")
    (tuned / "run.json").write_text(json.dumps({"settings": {"model": str(exported), "quantize": "int8"}}))

    def scored(*flags) -> tuple[dict, str]:
        data = ("--data", reviews, "--template", "imdb", "--dtype", "float32")
        status, out, err = command(monkeypatch, capsys, *data, *flags)
        assert status == 0, err
        return {name: value for name, value in json.loads(out).items() if "second" not in name}, err

    plain, _ = scored("--model", exported)
    found, said = scored("--model", run)
    assert said == f"--model {run}: using {run}/model"
    assert found == plain | {"model": str(run / "model")}
    rounded, _ = scored("--model", exported, "--adapter", tuned / "adapter", "--quantize", "int8")
    assert rounded["loss"] != plain["loss"]
    taken = f"--adapter {tuned}: using {tuned}/adapter, over linears in int8"
    assert scored("--model", exported, "--adapter", tuned) == (rounded, taken)
    assert scored("--model", tuned) == (rounded, f"--model {tuned}: using its base, {exported}\n{taken}")


MISTAKES = {
    "unknown flag": (["--modle", "x"], "--modle"),
    "no such model": (["--model", "nowhere"], "--model nowhere: no such folder"),
    "no such data": (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file or folder"),
    "no such part": (["--data", "{parts}", "--split", "test"], "--split test: "),
    "no such choice": (["--metric", "rouge-2"], "--metric"),
    "several numbers": (["--batch_size", "0", "--limit", "-1"], "--limit -1: expected 0 or more; --batch_size 0"),
    "too long": (["--max_length", "100000"], "--max_length 100000: the model was made for at most 2048 tokens"),
    "too short": (["--max_length", "20"], "reviews.jsonl:1: no label is left within --max_length 20 tokens"),
    "bad row": (["--data", "{bad}"], "bad.jsonl:2: not valid JSON"),
    "accuracy of free text": (["--data", "{free}", "--template", "gsm8k", "--metric", "accuracy"],
                              "--metric accuracy: expected a template"),
    "fraction beside a test file": (["--data", "imdb", "--data_dir", str(ROOT / "assets" / "imdb_sample"),
                                     "--test_fraction", "0.1"], "--test_fraction 0.1: expected a data set without"),
    "nothing held out": (["--data", "{parts}", "--test_fraction", "0", "--split", "test"], "--split test: "),
    "empty file": (["--data", "{empty}"], "empty.jsonl: no rows"),
    "predictions nowhere": (["--predictions", ""], "--predictions : expected the name of a file"),
    "metrics nowhere": (["--output", ""], "--output : expected the name of a file"),
    "beams of what is not written": (["--num_beams", "2"], "--num_beams 2: expected --metric rouge or exact_match"),
    "windows of rows": (["--stride", "2", "--metric", "perplexity"], "--stride 2: expected a text file with --metric"),
    "words compared as texts": (["--metric", "rouge"], "--metric rouge: expected a template whose answers are free"),
    "words of free text": (["--data", "{free}", "--template", "gsm8k", "--metric", "multiple_choice"],
                           "free.jsonl:1: choices is None, expected a list of two or more texts"),
    "a text with a template": (["--data", "{text}", "--template", "imdb"], "--template imdb: expected rows with it"),
    "accuracy of a text": (["--data", "{text}", "--metric", "rouge"], "--metric rouge: expected perplexity for a text"),
    "neither text nor rows": (["--data", "{other}"], "rows.xlsx: expected a name ending in .parquet, .jsonl"),
    "tokenizer of another model": (["--model", "{small}"], "the tokenizer has 1280 ids, the model only 1000"),
    "damaged weights": (["--model", "{cut}"], "model.safetensors: not a whole safetensors file"),
    "result cannot be written": (["--output", "{parts}"], "--output {parts}: Is a directory"),
    "predictions cannot be written": (["--predictions", "{bad}/a"], "--predictions {bad}/a: "),
    "no such text": (["--data", "nowhere.txt", "--metric", "perplexity"], "--data nowhere.txt: no such file or folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(exported, reviews, tmp_path, monkeypatch, capsys, case):
    """R15, R18, R19: found before any scoring."""
    places = {name: tmp_path / name for name in ("parts", "small", "cut")}
    places |= {name: tmp_path / f"{name}.jsonl" for name in ("bad", "empty", "free")} | {"text": tmp_path / "text.txt"}
    places |= {"other": tmp_path / "rows.xlsx"}
    places["other"].write_text("x")
    places["text"].write_text("A film.\n" * 9)
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
    status, out, err = command(monkeypatch, capsys, "--model", exported, "--data", reviews, "--template", "imdb",
                               "--limit", 2, *arguments)  # fmt: skip
    # The first five bad rows, and how many there are.
    lines = {"bad row": 2, "words of free text": 2, "too short": 6}.get(case, 1)
    assert status == 2 and len(err.splitlines()) == lines and expected.format(**places) in err.splitlines()[0], err
    assert not dist.is_initialized() and not out
