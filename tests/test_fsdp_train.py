"""The whole run: resumed equals uninterrupted, bad input stops it in one line, a killed rank ends it."""

import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import (
    HANG,
    ROOT,
    Torchrun,
    assert_equal_runs,
    environment,
    final_state,
    launcher,
    lines_of,
    refused,
    replaced,
    run_command,
    saved_steps,
    steps_of,
    summary_of,
    train_here,
    wait_for,
    write_reviews,
)
from safetensors.torch import load_file

import fsdp_train
from data import hold_out
from llama.data.batches import Schedule
from llama.data.examples import EncodedData, encode_file
from llama.data.templates import TEMPLATES
from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama, PackedDocuments
from llama.storage import checkpoint, pretrained
from llama.storage.base import TINY, TINY_TOKENIZER
from llama.storage.manifest import published, read_manifest
from llama.training.journal import Journal
from llama.training.settings import TrainingSettings

pytestmark = pytest.mark.usefixtures("cache")

STEPS = 6  # of 12 examples, twice, 4 a step


def write_questions(path: Path, count: int = 40, bad: int = 0) -> Path:
    """Rows with free answers of very different lengths, in one file; `bad` more of them, one after every second."""
    path.parent.mkdir(exist_ok=True)
    rows = [{"instruction": f"Say {i}.", "input": "slow " * (i % 3), "output": " ".join(["bright"] * (1 + 7 * i % 31))}
            for i in range(count)]
    for i in range(bad):
        rows.insert(3 * i + 2, {"instruction": f"Say nothing {i}.", "input": "", "output": ""})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(data: Path, output: Path, **changes) -> TrainingSettings:
    template = "imdb" if data.is_dir() else None  # a folder of reviews, or a file of questions
    base = dict(data=str(data), template=template, output=str(output), epochs=2.0, batch_size=2, max_length=192,
                dtype="float32", eval_limit=4, learning_rate=1e-3)
    return TrainingSettings(**(base | changes)).with_recipe(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def train(ranks, cache):
    """train(2, settings(...), die_in_step): a run on so many ranks."""
    return lambda size, chosen, die_in_step=None, **how: ranks(size, train_here, cache, chosen, die_in_step, **how)


@pytest.fixture(scope="module")
def errors(ranks, cache):
    """errors(2, settings(...)): what a run says on each rank as it ends; "" where it comes to its end."""
    return lambda size, chosen: ranks(size, refused, cache, chosen)


@pytest.fixture(scope="module")
def uninterrupted(train, data, tmp_path_factory):
    """uninterrupted(2): the folder of a run that nobody interrupts, made once for each number of ranks."""
    made = {}

    def of(size: int) -> Path:
        if size not in made:
            made[size] = tmp_path_factory.mktemp("uninterrupted") / f"{size}"
            train(size, settings(data, made[size], batch_size=4 // size))
        return made[size]

    return of


slow = pytest.mark.slow


# Resumed equals uninterrupted


@pytest.mark.parametrize(("size", "die_in_step"), [
    pytest.param(1, 3, marks=slow), pytest.param(2, 3, marks=slow), (2, 6)])  # fmt: skip
def test_a_crashed_and_resumed_run_equals_the_uninterrupted_one_bitwise(
    train, uninterrupted, data, tmp_path, size, die_in_step
):
    """C48, R1, R25: mid-epoch (step 3) and after an epoch's edge (step 6 of 3 + 3); weights, moments, losses."""
    out = tmp_path / "out"
    chosen = partial(settings, data, out, batch_size=4 // size, save_every=2)
    train(size, chosen(), die_in_step)
    assert not (out / "model").exists()
    train(size, chosen(resume="newest"))
    assert_equal_runs(out, uninterrupted(size), STEPS)


@slow
@pytest.mark.parametrize("plan", [{"batch_tokens": 400}, {"group_by_length": True}], ids=["packs", "by length"])
def test_a_crashed_and_resumed_run_of_another_plan_equals_the_uninterrupted_one_bitwise(train, tmp_path, plan):
    """C48, R1: a step's packs, and its companions of like length, are a function of the step alone."""
    rows = write_questions(tmp_path / "rows.jsonl", 24)
    whole, out = tmp_path / "whole", tmp_path / "crashed"
    train(2, settings(rows, whole, **plan))
    train(2, settings(rows, out, save_every=2, **plan), 4)
    assert saved_steps(out) == [2]
    train(2, settings(rows, out, save_every=2, resume="newest", **plan))
    assert_equal_runs(out, whole, len(steps_of(whole)))
    assert len(steps_of(whole)) > 4


@slow
@pytest.mark.parametrize("case", [
    {"async_save": True},
    {"gradient_accumulation_steps": 2, "batch_size": 1, "async_save": True},
    {"gradient_accumulation_steps": 2, "batch_size": 1, "defer_gradient_sync": True, "sharding": "grad"},
], ids=["async", "accumulation, async", "accumulation, deferred"])  # fmt: skip
def test_a_crashed_and_resumed_run_of_another_kind_equals_the_uninterrupted_one_bitwise(train, data, tmp_path, case):
    """C48, R1: also where the newest checkpoint was written in the background."""
    whole, out = tmp_path / "whole", tmp_path / "crashed"
    chosen = partial(settings, data, **case)
    train(2, chosen(whole))
    train(2, chosen(out, save_every=2), 6)
    assert saved_steps(out) == [2, 4]
    train(2, chosen(out, save_every=2, resume="newest"))
    assert_equal_runs(out, whole, STEPS)


@pytest.mark.slow
def test_a_save_in_the_background_that_a_crash_cuts_short_is_as_if_it_had_never_begun(
    ranks, train, uninterrupted, data, cache, tmp_path
):
    """C48, R1: half of it is there when the run dies; the resumed run says so, and equals the uninterrupted one."""
    out = tmp_path / "out"
    chosen = partial(settings, data, out, save_every=2, async_save=True)
    ranks(2, crashing_while_it_saves, cache, chosen())
    assert saved_steps(out) == [2] and (out / "checkpoints/step-000004.tmp/model.safetensors").exists()
    train(2, chosen(resume="newest"))
    assert_equal_runs(out, uninterrupted(2), STEPS)
    assert not list((out / "checkpoints").glob("*.tmp"))


def crashing_while_it_saves(cache: Path, chosen: TrainingSettings) -> None:
    """Dies in step 6, when the weights after step 4 are written but not yet the moments."""
    real = checkpoint.write_tensors

    def write_tensors(tensors, folder: Path, stem: str, **how) -> None:
        if "step-000004" in folder.name and stem == "optimizer":
            raise ConnectionError("pulled the plug")
        real(tensors, folder, stem, **how)

    with replaced(checkpoint, write_tensors=write_tensors), pytest.warns(UserWarning, match="step 4 was not saved"):
        train_here(cache, chosen, die_in_step=6)


@pytest.mark.parametrize("size", [pytest.param(1, marks=slow), 2])
@pytest.mark.slow
def test_a_checkpoint_right_after_an_evaluation_holds_the_trained_shards(train, data, tmp_path, size):
    """C48: after a forward without backward FSDP shows whole bf16 copies of weights, which must not be saved."""
    whole, out = tmp_path / "whole", tmp_path / "crashed"
    common = dict(batch_size=4 // size, eval_every=1, save_every=1, dtype="bfloat16", max_steps=3)
    train(size, settings(data, whole, **common))
    train(size, settings(data, out, **common), 3)
    train(size, settings(data, out, resume="newest", **common))
    assert_equal_runs(out, whole, 3)
    assert summary_of(out)["before"] == summary_of(whole)["before"] != {}  # measured by the first part
    weight = final_state(out)["embed_tokens.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    assert final_state(out)["embed_tokens.weight.exp_avg"].abs().sum() > 0


def test_a_checkpoint_says_only_what_was_measured_after_its_own_step(train, data, tmp_path):
    """Else the best one would be chosen by the loss of another."""
    common = dict(batch_size=4, eval_every=2, save_every=1, keep_checkpoints=-1, max_steps=4)
    train(1, settings(data, tmp_path / "out", **common))
    found = published(tmp_path / "out" / "checkpoints")
    assert [bool(read_manifest(path).held_out) for path in found] == [False, True, False, True]


@slow
def test_a_run_resumed_twice_equals_the_uninterrupted_one_bitwise(train, uninterrupted, data, tmp_path):
    """C48: the second resume is where drift shows."""
    out = tmp_path / "crashed"
    chosen = partial(settings, data, out, save_every=1)
    train(2, chosen(), 3)
    train(2, chosen(resume="newest"), 4)
    assert saved_steps(out) == [4, 5]
    train(2, chosen(resume="newest"))
    assert_equal_runs(out, uninterrupted(2), STEPS)


@pytest.mark.parametrize(("before", "after"), [
    pytest.param(4, 1, marks=slow), pytest.param(4, 2, marks=slow), pytest.param(4, 3, marks=slow), (1, 2),
])  # fmt: skip
def test_a_run_resumes_on_another_number_of_ranks(train, tmp_path, before, after):
    """C48, R6: the same global batches, so the same curve to fp32 rounding."""
    data = write_reviews(tmp_path / "data", 24)
    chosen, out = partial(settings, data), tmp_path / "moved"
    train(1, chosen(tmp_path / "whole", batch_size=12))
    train(before, chosen(out, batch_size=12 // before, save_every=2), 3)
    train(after, chosen(out, batch_size=12 // after, save_every=2, resume="newest"))
    expected, found = steps_of(tmp_path / "whole"), steps_of(out)
    assert len(expected) == len(found) == 4
    for a, b in zip(expected, found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# Free answers, packs, prompts as labels


def encoded_questions(path: Path) -> EncodedData:
    return encode_file(path, TEMPLATES["alpaca"], load_tokenizer(TINY_TOKENIZER), 192)


def training_lines(output: Path) -> list[dict]:
    return [line for line in lines_of(output) if "loss" in line]


@pytest.mark.parametrize("size", [pytest.param(1, marks=slow), 2])
@pytest.mark.slow
def test_packs_hold_every_example_once_an_epoch_and_never_more_tokens_than_asked(train, tmp_path, size):
    """C23, C26: counted in what the run wrote down; free answers are scored by their loss alone."""
    path, out = write_questions(tmp_path / "rows.jsonl", 25), tmp_path / "out"
    train(size, settings(path, out, batch_tokens=400, test_fraction=0.08), draw=True)
    encoded = encoded_questions(path)
    train, test = (encoded.subset(chosen) for chosen in hold_out(25, 0.08))
    lines, summary = training_lines(out), summary_of(out)
    assert (len(train), len(test)) == (23, 2) and summary["examples"] == 2 * 23
    for name, per_epoch in (("tokens", train.lengths.sum()), ("labels", train.label_counts.sum())):
        assert summary[name] == sum(line[name] for line in lines) == 2 * per_epoch
    assert max(line["tokens"] for line in lines) <= size * 400
    assert len(lines) < 2 * 23 / (2 * size)  # more than two examples a pack
    assert set(summary["after"]) == {"loss", "n"} and summary["after"]["n"] == 2
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert (out / "loss.png").stat().st_size > 1000


@slow
def test_grouped_by_length_every_example_comes_once_an_epoch_among_its_like(train, tmp_path):
    """C26: and the longest one in the first step, where it needs its memory at once."""
    path = write_questions(tmp_path / "rows.jsonl")
    plans = {False: tmp_path / "random", True: tmp_path / "grouped"}
    for grouped, out in plans.items():
        train(2, settings(path, out, batch_size=4, group_by_length=grouped, test_fraction=0.0, epochs=1.0))
    lengths, spread = encoded_questions(path).lengths, {}
    for grouped, out in plans.items():
        lines = training_lines(out)
        assert sum(line["tokens"] for line in lines) == lengths.sum() and len(lines) == 5  # of 8 examples each
        spread[grouped] = np.std([line["tokens"] for line in lines])
    assert spread[True] > 2 * spread[False]  # a step of short ones, a step of long ones
    schedule = Schedule(lengths, 1.0, 2, 4, group_by_length=True, seed=0)
    expected = [sum(int(lengths[part].sum()) for part in schedule.micro_batches(step)) for step in range(5)]
    assert [line["tokens"] for line in training_lines(plans[True])] == expected
    assert lengths.max() in [lengths[i] for part in schedule.micro_batches(0) for i in part]


@torch.no_grad()
def plain_loss(encoded: EncodedData, prompts: bool) -> tuple[float, int]:
    """Of the tiny model as a run begins with it: the mean loss over labels, one example at a time; and their number."""
    model = Llama(TINY)
    pretrained.initialize_weights(model, seed=0)
    total, labels = 0.0, 0
    for ids, is_answer in (encoded[i] for i in range(len(encoded))):
        ids = torch.from_numpy(np.array(ids)).long()
        logits = model.logits(ids, PackedDocuments([len(ids)]))
        losses = F.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")
        chosen = torch.ones(len(losses), dtype=torch.bool) if prompts else torch.from_numpy(np.array(is_answer))[1:]
        total, labels = total + float(losses[chosen].sum()), labels + int(chosen.sum())
    return total / labels, labels


@pytest.mark.parametrize("prompts", [pytest.param(False, marks=slow), True])
def test_the_loss_is_over_the_answers_or_with_prompts_over_every_token_but_the_first(train, tmp_path, prompts):
    """C1, C2, C52: the first step's, over all examples, is that of a plain loop; held out are answers only."""
    path, out = write_questions(tmp_path / "rows.jsonl", 17), tmp_path / "out"
    train(2, settings(path, out, train_on_prompt=prompts, max_steps=1, batch_size=8))
    train, test = (encoded_questions(path).subset(part) for part in hold_out(17, 0.05))
    loss, labels = plain_loss(train, prompts)
    (line,) = training_lines(out)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["labels"] == labels == (train.lengths.sum() - 16 if prompts else train.label_counts.sum())
    assert summary_of(out)["before"] == {"loss": pytest.approx(plain_loss(test, False)[0], rel=1e-5), "n": 1}


def test_run_json_says_what_was_held_out_and_a_resume_needs_the_same(train, errors, tmp_path):
    """R7, C51: the choice does not depend on the run's seed; another one, or other labels, is another run."""
    path, about = write_questions(tmp_path / "rows.jsonl"), {}
    for seed in (0, 1):
        train(1, settings(path, tmp_path / f"out{seed}", seed=seed, test_fraction=0.2, max_steps=1))
        about[seed] = json.loads((tmp_path / f"out{seed}/run.json").read_text())["examples"]
    assert about[0]["held_out"] == {"fraction": 0.2, "seed": 0, "examples": 8}
    assert (about[0]["train"], about[0]["test"], about[0]["bad_rows"]) == (32, 8, 0) and about[0] == about[1]
    for changes in ({"test_fraction": 0.3}, {"test_fraction": 0.0}, {"test_fraction": 0.2, "train_on_prompt": True}):
        other = settings(path, tmp_path / "out0", max_steps=1, resume="newest", **changes)
        assert "fingerprint was" in errors(1, other)[0], changes


def test_bad_rows_stop_a_run_before_it_makes_any_folder(tmp_path, monkeypatch, capsys):
    """R15: the first five are told by file and line, then how many there are, and what to do."""
    path = write_questions(tmp_path / "rows.jsonl", 20, bad=7)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fsdp_train.py", "--data", "rows.jsonl", "--batch_size", "4"])
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stopped:
        fsdp_train.run(fsdp_train.main)
    told = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("rows.jsonl")]
    assert stopped.value.code == 2 and len(told) == 6
    assert told[:5] == [f"rows.jsonl:{number}: output is empty" for number in (3, 6, 9, 12, 15)]
    assert told[5].startswith("rows.jsonl: 7 of 27 rows cannot be used; ") and "--skip_bad_rows" in told[5]
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "cache"} and path.exists()


@slow
def test_a_run_without_its_bad_rows_is_the_run_of_a_clean_file_and_says_how_many(train, tmp_path):
    """R15: every loss bit for bit, and the count in run.json, once though both parts come from that file."""
    clean = write_questions(tmp_path / "clean.jsonl", 20)
    spoiled = write_questions(tmp_path / "spoiled.jsonl", 20, bad=7)
    for path, flags in ((clean, {}), (spoiled, {"skip_bad_rows": True})):
        train(2, settings(path, tmp_path / path.stem, batch_size=4, epochs=1.0, **flags))
    assert steps_of(tmp_path / "spoiled") == steps_of(tmp_path / "clean") and steps_of(tmp_path / "clean")
    counts = [json.loads((tmp_path / name / "run.json").read_text())["examples"] for name in ("clean", "spoiled")]
    assert [about["bad_rows"] for about in counts] == [0, 7] and counts[0]["train"] == counts[1]["train"] == 19


SUMMARY = {"data", "bundled_sample", "model", "ranks", "steps", "examples", "tokens", "labels", "train_seconds",
           "total_seconds", "examples_per_second", "tokens_per_second", "peak_memory_bytes", "before", "after",
           "samples"}
LINE = {"step", "loss", "grad_norm", "learning_rate", "tokens", "labels", "examples_per_second", "tokens_per_second",
        "peak_memory_bytes", "seconds"}


def test_a_run_leaves_what_the_readme_says_and_nothing_else(uninterrupted):
    """R24: each file, and what is in those that other programs may read."""
    out = uninterrupted(2)
    files = {"run.json", "metrics.jsonl", "summary.json", "model", "checkpoints"}  # and loss.png, not drawn here
    assert {path.name for path in out.iterdir()} == files
    assert set(summary_of(out)) == SUMMARY and set(summary_of(out)["after"]) == {"loss", "accuracy", "n"}
    before, *lines, after = lines_of(out)
    assert set(before) - {"samples"} == set(after) == {"step", "held_out"}
    assert (before["step"], after["step"]) == (0, STEPS)
    assert all(set(line) == LINE for line in lines) and len(lines) == STEPS
    assert before["held_out"] == summary_of(out)["before"] and after["held_out"] == summary_of(out)["after"]


@slow
def test_the_plain_command_runs_twice_and_keeps_the_first_result(tmp_path):
    """R17: the README's command on one process; the second run gets a folder of its own."""
    data = write_reviews(tmp_path / "data")
    arguments = ("--data", str(data), "--template", "imdb", "--max_steps", "2", "--batch_size", "4",
                 "--eval_limit", "8")
    first = run_command(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs/data-tiny"
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in run.iterdir()} == {"run.json", "metrics.jsonl", "loss.png", "summary.json", "model",
                                                     "checkpoints"}
    second = run_command(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert second.returncode == 0 and (tmp_path / "runs/data-tiny-2/summary.json").exists()
    assert kept == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    summary = summary_of(run)
    assert set(summary) == SUMMARY and summary["steps"] == 2 and summary["examples"] == summary["labels"] == 8
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(run / "model")
    trained = {k: v.bfloat16() for k, v in load_file(run / "checkpoints/step-000002/model.safetensors").items()}
    assert torch.equal(opened.model.layers[1].mlp.up_proj.weight.bfloat16(), trained["layers.1.mlp.up_proj.weight"])


# Mistakes


BAD = {
    "unknown flag": (["--learning_rat", "1"], "learning_rat"),
    "no such data": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "no such model": (["--model", "nowhere"], "nowhere"),
    "too few examples": (["--batch_size", "1000"], "fewer than one global batch"),
    "too few packs": (["--batch_tokens", "100000", "--gradient_accumulation_steps", "2"],
                      "12 examples in 1 packs of --batch_tokens 100000, fewer than one global batch of 2"),
    "packs too short": (["--batch_tokens", "100"], "--batch_tokens 100: expected 0, or --max_length 512 or more"),
    "fraction beside a test file": (["--test_fraction", "0.1"], "--test_fraction 0.1: expected a data set without"),
    "no such template": (["--template", "nowhere.txt"], "--template nowhere.txt: no such file"),
    "too long for the model": (["--max_length", "100000"], "--max_length 100000"),
    "several at once": (["--batch_size", "0", "--epochs", "-1"], "--epochs -1.0"),
    "taken output": (["--output", "."], "exists already"),
    "nothing to resume": (["--resume", "--output", "empty"], "no run"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_exit_status_2(data, tmp_path, case, monkeypatch, capsys):
    """No traceback for a user's mistake; nothing is written."""
    arguments, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    monkeypatch.setattr(sys, "argv", ["fsdp_train.py", "--data", str(data), "--template", "imdb", "--batch_size", "4",
                                      *arguments])
    with pytest.raises(SystemExit) as stopped:
        fsdp_train.run(fsdp_train.main)
    told = capsys.readouterr().err.strip().splitlines()
    told = [line for line in told if line.strip() and " rows" not in line]
    assert stopped.value.code == 2 and len(told) == 1 and expected in told[0], told
    assert not [p for p in tmp_path.rglob("*.safetensors")] and (tmp_path / "mine").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_weights_change(ranks, data, cache, tmp_path):
    """C4, R11: every rank raises, naming the step and the newest whole checkpoint; broken weights are not saved."""
    out = tmp_path / "out"
    never, every = settings(data, tmp_path / "never"), settings(data, out, save_every=1)
    ((updates, told),) = set(ranks(2, stopped_by_nan, cache, never))
    assert updates == 2 and told.startswith("step 4: loss nan, gradient norm nan: not finite")
    assert told.endswith("whole checkpoints: none yet") and "\n" not in told
    ((updates, told),) = set(ranks(2, stopped_by_nan, cache, every))
    assert updates == 2 and told.startswith("step 3: a weight is no longer finite, so nothing was saved")
    assert told.endswith(f"whole checkpoints: {out}/checkpoints/step-000002") and "\n" not in told
    assert saved_steps(out) == [1, 2] and not (out / "model").exists() and not (tmp_path / "never/model").exists()


def stopped_by_nan(cache: Path, chosen: TrainingSettings) -> tuple[int, str]:
    """The last update that was made, counted from 0, and the error."""
    real, updates = fsdp_train.learning_rate, []

    def poison(step: int, *rest) -> float:  # called just before each update: the third one is infinitely long
        updates.append(step)
        return float("inf") if step == 2 else real(step, *rest)

    with replaced(fsdp_train, learning_rate=poison):
        told = refused(cache, chosen)
    return updates[-1], told


def test_a_gradient_that_is_not_finite_stops_the_run_although_its_loss_is(ranks, data, cache, tmp_path):
    """R11: it would make every weight infinite or NaN."""
    (told,) = ranks(1, stopped_by_infinite_gradient, cache, settings(data, tmp_path / "out"))
    assert re.match(r"step 1: loss \d\S*, gradient norm inf: not finite, so the weights were left as they were", told)
    assert not (tmp_path / "out" / "model").exists()


def stopped_by_infinite_gradient(cache: Path, chosen: TrainingSettings) -> str:
    with replaced(fsdp_train, gradient_norm=lambda model: torch.tensor(float("inf"))):
        return refused(cache, chosen)


def test_a_mistake_that_one_rank_alone_meets_ends_all_of_them(ranks, data, cache, tmp_path):
    """R9, C43: rank 1 finds no data, and says so to the others instead of leaving them waiting for it."""
    for told in ranks(2, refused_where_rank_1_has_no_data, cache, settings(data, tmp_path / "out")):
        assert told.startswith("--data nowhere: no such file or folder")
    assert not (tmp_path / "out").exists()


def refused_where_rank_1_has_no_data(cache: Path, chosen: TrainingSettings) -> str:
    return refused(cache, replace(chosen, data="nowhere") if dist.get_rank() == 1 else chosen)


@pytest.mark.parametrize("name, values", [("seed", (0, 1)), ("sharding", ("full", "grad")), ("batch_size", (2, 99))])
def test_ranks_whose_settings_or_data_differ_do_not_start(ranks, data, cache, tmp_path, name, values):
    """R10: or one would wait for ever for what the others do not do."""
    for told in ranks(2, refused_where_ranks_differ, cache, settings(data, tmp_path / "out"), name, values):
        told_values = f"{name} is {values[0]!r} and {values[1]!r}"
        assert told.startswith(f"ranks 0 and 1 do not agree: {told_values}; expected the same flags, files and")
    assert not (tmp_path / "out").exists()


def refused_where_ranks_differ(cache: Path, chosen: TrainingSettings, name: str, values: tuple) -> str:
    return refused(cache, replace(chosen, **{name: values[dist.get_rank()]}))


@slow
@pytest.mark.parametrize("flags, problem", [
    (["--data", "nowhere"], "nowhere: no such file or folder"),
    (["--tensor_parallel", "2"], "--tensor_parallel 2: the number of processes on a node is 1, expected a multiple"),
])  # fmt: skip
def test_a_mistake_that_one_node_alone_meets_ends_all_of_them(data, cache, tmp_path, flags, problem):
    """R9, C43: two launchers stand for two nodes; the second is refused, and nobody waits for it to join."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [
        subprocess.Popen(
            [*launcher(1, *address, "--node_rank", str(rank)), str(ROOT / "fsdp_train.py"), "--data", str(data),
             "--template", "imdb", "--output", str(tmp_path / "out"), *more],
            env=environment(cache), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank, more in enumerate([[], flags])
    ]
    told = [node.communicate(timeout=HANG)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert all(problem in text for text in told), told


# Going on with a run


def test_other_settings_are_refused_by_name_also_by_a_finished_run(train, errors, data, tmp_path):
    """R7: each difference, before anything is loaded; with the same settings a finished run says so and stays."""
    out = tmp_path / "out"
    chosen = partial(settings, data, out, max_steps=2)
    train(1, chosen())
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (told,) = errors(1, chosen(resume="newest", learning_rate=0.5, seed=3))
    assert "learning_rate was 0.001, is 0.5; seed was 0, is 3" in told
    assert errors(1, chosen(resume="newest")) == [""]
    assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_only_the_user_goes_back(
    train, errors, uninterrupted, data, tmp_path
):
    """R5, C48: with --resume step-N the newer ones are set aside, and the run ends as the uninterrupted one."""
    out = tmp_path / "out"
    chosen = partial(settings, data, out, save_every=1, keep_checkpoints=-1)
    train(2, chosen(), 4)
    newest = published(out / "checkpoints")[-1]
    weights = bytearray((newest / "optimizer.safetensors").read_bytes())
    weights[-9] ^= 4
    (newest / "optimizer.safetensors").write_bytes(weights)
    for told in errors(2, chosen(resume="newest")):
        assert f"{newest}/optimizer.safetensors: damaged" in told and "--resume step-000002" in told
    assert saved_steps(out) == [1, 2, 3]
    train(2, chosen(resume="step-2", save_every=0))
    assert_equal_runs(out, uninterrupted(2), STEPS)
    assert [p.name for p in (out / "checkpoints").glob("*.aside")] == ["step-000003.aside"]


def test_settings_that_changed_on_purpose_are_allowed_by_name(train, errors, data, tmp_path):
    """R7: and recorded in the next checkpoint."""
    out = tmp_path / "out"
    train(1, settings(data, out, max_steps=6, save_every=2), 4)
    changed = partial(settings, data, out, max_steps=6, resume="newest", learning_rate=0.5)
    assert "learning_rate was 0.001, is 0.5" in errors(1, changed())[0]
    assert "expected names among" in errors(1, changed(allow_changed="lr"))[0]
    train(1, changed(allow_changed="learning_rate"))
    assert read_manifest(published(out / "checkpoints")[-1]).identity["learning_rate"] == 0.5
    assert [line["learning_rate"] > 0.01 for line in steps_of(out)] == [False] * 2 + [True] * 4


def test_a_disk_that_takes_no_more_metrics_stops_all_ranks_after_the_step(ranks, data, cache, tmp_path):
    """R3, R9: only rank 0 writes them, but none is left waiting."""
    out = tmp_path / "out"
    told = ranks(2, with_full_journal, cache, settings(data, out, save_every=2), 3, "loss")
    assert told == [f"{out}/metrics.jsonl: No space left on device"] * 2
    assert saved_steps(out) == [2] and not (out / "model").exists()


def test_a_checkpoint_is_never_ahead_of_its_metrics(ranks, train, data, cache, tmp_path):
    """R3, R23: an evaluation that could not be written down would be missing after a resume from there."""
    out = tmp_path / "out"
    chosen = partial(settings, data, out, save_every=1, eval_every=1, max_steps=3)
    told = ranks(2, with_full_journal, cache, chosen(), 2, "held_out")
    assert told == [f"{out}/metrics.jsonl: No space left on device"] * 2
    assert saved_steps(out) == [1]
    train(2, chosen(resume="newest"))
    assert [line["step"] for line in lines_of(out) if "held_out" in line] == [0, 1, 2, 3]


def with_full_journal(cache: Path, chosen: TrainingSettings, step: int, kind: str) -> str:
    """What is told where the disk refuses this line."""
    real = Journal.write

    def write(journal: Journal, **line) -> None:
        if line["step"] == step and kind in line:
            journal.file.close()
            journal.file = open("/dev/full", "a")
        real(journal, **line)

    with replaced(Journal, write=write):
        return refused(cache, chosen)


def test_a_run_that_goes_on_is_not_finished_before_it_is(train, ranks, data, cache, tmp_path):
    """R1: it was finished once, went back to an older checkpoint, and died as it wrote its result."""
    out = tmp_path / "out"
    common = dict(save_every=1, keep_checkpoints=-1, max_steps=2)
    train(1, settings(data, out, **common))
    first = (out / "model/model.safetensors").read_bytes()
    changed = partial(settings, data, out, learning_rate=1e-4, allow_changed="learning_rate", **common)
    assert ranks(1, dying_at_its_end, cache, changed(resume="step-1")) == ["pulled the plug"]
    assert not (out / "summary.json").exists()
    train(1, changed(resume="newest"))
    assert (out / "summary.json").exists() and (out / "model/model.safetensors").read_bytes() != first
    shutil.rmtree(out / "model")
    train(1, changed(resume="newest"))
    assert (out / "model/model.safetensors").exists()


def dying_at_its_end(cache: Path, chosen: TrainingSettings) -> str:
    def export_model(*_, **__):
        raise ConnectionAbortedError("pulled the plug")

    with replaced(fsdp_train, export_model=export_model), pytest.raises(ConnectionAbortedError) as died:
        train_here(cache, chosen)
    return str(died.value)


@pytest.mark.slow
def test_a_checkpoint_beyond_the_runs_end_is_refused(train, errors, data, tmp_path):
    """R7: fewer steps than are done already."""
    out = tmp_path / "out"
    train(1, settings(data, out, max_steps=3))
    shorter = settings(data, out, max_steps=2, resume="newest", allow_changed="steps")
    assert "is after step 3, but this run has only 2 steps" in errors(1, shorter)[0]


def test_a_folder_deleted_during_the_run_is_told_and_the_model_is_written(ranks, data, cache, tmp_path):
    """R3: nothing says that all is there."""
    out = tmp_path / "out"
    told = ranks(2, with_deleted_folder, cache, settings(data, out, max_steps=3))
    assert told == [f"{out}/metrics.jsonl: deleted during the run; model/ was written, nothing else"] * 2
    assert (out / "model/model.safetensors").exists() and not (out / "summary.json").exists()


def with_deleted_folder(cache: Path, chosen: TrainingSettings) -> str:
    real = fsdp_train.learning_rate

    def deleting(step: int, *rest) -> float:
        if step == 1:
            shutil.rmtree(chosen.output, ignore_errors=True)
        return real(step, *rest)

    with replaced(fsdp_train, learning_rate=deleting):
        return refused(cache, chosen)


def test_an_output_that_cannot_be_opened_is_told_on_every_rank(errors, data, tmp_path):
    """R3, R9: a link to nowhere."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for told in errors(2, settings(data, tmp_path / "link")):
        assert str(tmp_path / "link") in told


def test_a_lost_checkpoint_never_lets_a_resume_replace_the_model(errors, data, tmp_path):
    """R17: without the checkpoint it would be a new start over a finished run."""
    for result in ("model", "adapter"):
        out = tmp_path / f"with-{result}"
        (out / result).mkdir(parents=True)
        (out / "run.json").write_text("{}")
        (told,) = errors(1, settings(data, out, resume="newest"))
        assert f"{out} has a result but no checkpoint to continue from" in told and (out / result).exists()


DIES = """
real = fsdp_train.train_step
def train_step(current, step):
    with open(f"pid-{{current.process.rank}}", "w") as file:
        file.write(str(os.getpid()))
    if step == 5 and current.process.rank == {rank}:
        os.kill(os.getpid(), 9)
    return real(current, step)
fsdp_train.train_step = train_step
"""


@pytest.mark.parametrize("killed_rank", [0, 1])
@slow
def test_killing_one_rank_ends_all_and_names_it(data, cache, uninterrupted, tmp_path, killed_rank):
    """R9: kill -9 mid-step under torchrun; then --resume finishes the run from the newest whole checkpoint."""
    out = tmp_path / "out"
    arguments = ("--data", data, "--template", "imdb", "--output", out, "--batch_size", 2, "--save_every", 2,
                 "--eval_limit", 4, "--epochs", 2, "--max_length", 192, "--dtype", "float32", "--learning_rate", 1e-3)
    with Torchrun(tmp_path, cache, *arguments, wrong=DIES.format(rank=killed_rank)) as run:
        status, told = run.end()
    assert status != 0 and re.search(rf"rank\s*:\s*{killed_rank}\b", told) and "-9" in told, told[-3000:]
    workers = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert saved_steps(out) == [2, 4] and not (out / "model").exists()

    done = run_command(*arguments, "--resume", "--max_steps", 0, cwd=tmp_path, cache=cache, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_runs(out, uninterrupted(2), STEPS)
    assert (out / "model/config.json").exists()
