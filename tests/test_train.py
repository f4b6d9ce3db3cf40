"""The whole run: resumed equals uninterrupted, bad input stops it in one line, a killed rank ends it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

import fsdp_train
from data import TINY_TOKENIZER, hold_out
from llama.boundary.errors import UserError
from llama.data.batches import Schedule
from llama.data.encoding import EncodedData, encode_file
from llama.data.templates import TEMPLATES
from llama.data.tokenizer import load_tokenizer
from llama.model.config import TINY
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments
from llama.parallel.distribute import Ranks
from llama.storage import checkpoint, pretrained

ROOT = Path(fsdp_train.__file__).parent
WORDS = {0: ["dull", "weak", "slow"], 1: ["bright", "strong", "quick"]}


def write_reviews(folder: Path, count: int = 40) -> Path:
    """Reviews of very different lengths, so that ranks and micro-batches never hold equal numbers of tokens."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = [{"text": " ".join(WORDS[i % 2][j % 3] for j in range(1 + (7 * i) % 41)), "label": i % 2}
                for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_questions(path: Path, count: int = 40, bad: int = 0) -> Path:
    """Rows with free answers of very different lengths, in one file; `bad` more of them, one after every second."""
    path.parent.mkdir(exist_ok=True)
    rows = [{"instruction": f"Say {i}.", "input": "slow " * (i % 3), "output": " ".join(["bright"] * (1 + 7 * i % 31))}
            for i in range(count)]
    for i in range(bad):
        rows.insert(3 * i + 2, {"instruction": f"Say nothing {i}.", "input": "", "output": ""})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(data: Path, output: Path, **changes) -> fsdp_train.Settings:
    base = dict(data=str(data), output=str(output), epochs=2.0, batch_size=4, max_length=192, dtype="float32",
                eval_limit=8, learning_rate=1e-3)
    return fsdp_train.Settings(**(base | changes)).with_recipe(1)


def run_here(chosen: fsdp_train.Settings, die_in_step: int | None = None) -> None:
    """`fsdp_train.main` inside a test worker's own process group; optionally dies like a crash would, mid-run."""
    here = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"),
                 init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",)))
    real, calls = fsdp_train.train_step, []

    def dying(*args):
        calls.append(1)
        if len(calls) == die_in_step:
            raise ConnectionError("pulled the plug")
        return real(*args)

    fsdp_train.train_step = dying
    try:
        fsdp_train.train(chosen, fsdp_train.prepare(chosen), here)
    except ConnectionError:
        assert die_in_step
    finally:
        fsdp_train.train_step = real


def steps_of(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: line[k] for k in ("step", "loss", "grad_norm", "learning_rate")} for line in lines if "loss" in line]


def final_state(output: Path) -> dict:
    newest = checkpoint.published(output / "checkpoints")[-1]
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path_factory.getbasetemp() / "llama-cache"))


def in_workers(folder: Path, chosen: fsdp_train.Settings, die_in_step: int | None = None) -> None:
    os.environ["LLAMA_CACHE"] = str(folder)
    run_here(chosen, die_in_step)


@pytest.mark.parametrize(("size", "die_in_step"), [(1, 4), (2, 4), (2, 6)])
def test_a_crashed_and_resumed_run_equals_the_uninterrupted_one_bitwise(ranks, tmp_path, size, die_in_step):
    """C48, R1, R25: mid-epoch (step 4) and after an epoch's edge (step 6 of 5 + 5); weights, moments, losses."""
    data, batch = write_reviews(tmp_path / "data"), 8 // size
    whole = settings(data, tmp_path / "whole", batch_size=batch)
    ranks(size, in_workers, tmp_path / "cache", whole)
    crashed = settings(data, tmp_path / "crashed", batch_size=batch, save_every=2)
    ranks(size, in_workers, tmp_path / "cache", crashed, die_in_step)
    assert not (tmp_path / "crashed/model").exists()
    ranks(size, in_workers, tmp_path / "cache", settings(data, tmp_path / "crashed", batch_size=batch, save_every=2,
                                                         resume="newest"))
    assert steps_of(tmp_path / "crashed") == steps_of(tmp_path / "whole")
    assert [line["step"] for line in steps_of(tmp_path / "crashed")] == list(range(1, 11))
    expected, found = final_state(tmp_path / "whole"), final_state(tmp_path / "crashed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("plan", [{"batch_tokens": 400}, {"group_by_length": True}], ids=["packs", "by length"])
def test_a_crashed_and_resumed_run_of_another_plan_equals_the_uninterrupted_one_bitwise(ranks, tmp_path, plan):
    """C48, R1: a step's packs, and its companions of like length, are a function of the step alone."""
    data = write_questions(tmp_path / "rows.jsonl")
    ranks(2, in_workers, tmp_path / "cache", settings(data, tmp_path / "whole", **plan))
    out = tmp_path / "crashed"
    ranks(2, in_workers, tmp_path / "cache", settings(data, out, save_every=2, **plan), 4)
    assert [p.name for p in checkpoint.published(out / "checkpoints")] == ["step-000002"]
    ranks(2, in_workers, tmp_path / "cache", settings(data, out, save_every=2, resume="newest", **plan))
    assert steps_of(out) == steps_of(tmp_path / "whole") and len(steps_of(out)) > 5
    expected, found = final_state(tmp_path / "whole"), final_state(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_right_after_an_evaluation_holds_the_trained_shards(ranks, tmp_path, size):
    """C48: after a forward without backward FSDP shows whole bf16 copies of weights, which must not be saved."""
    data, batch = write_reviews(tmp_path / "data"), 8 // size
    common = dict(batch_size=batch, eval_every=2, save_every=2, dtype="bfloat16")
    whole, out = tmp_path / "whole", tmp_path / "crashed"
    ranks(size, in_workers, tmp_path / "cache", settings(data, whole, **common))
    ranks(size, in_workers, tmp_path / "cache", settings(data, out, **common), 6)
    ranks(size, in_workers, tmp_path / "cache", settings(data, out, resume="newest", **common))
    assert steps_of(out) == steps_of(whole)
    assert all(torch.equal(a, b) for a, b in zip(final_state(whole).values(), final_state(out).values(), strict=True))
    weight = final_state(out)["embed_tokens.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    assert final_state(out)["embed_tokens.weight.exp_avg"].abs().sum() > 0


def test_a_run_resumed_twice_equals_the_uninterrupted_one_bitwise(ranks, tmp_path):
    """C48: the second resume is where drift shows."""
    data = write_reviews(tmp_path / "data")
    ranks(1, in_workers, tmp_path / "cache", settings(data, tmp_path / "whole", batch_size=8))
    out = tmp_path / "crashed"
    ranks(1, in_workers, tmp_path / "cache", settings(data, out, batch_size=8, save_every=1), 3)
    ranks(1, in_workers, tmp_path / "cache", settings(data, out, batch_size=8, save_every=1, resume="newest"), 4)
    ranks(1, in_workers, tmp_path / "cache", settings(data, out, batch_size=8, save_every=1, resume="newest"))
    assert steps_of(out) == steps_of(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(final_state(tmp_path / "whole").values(),
                                                 final_state(out).values(), strict=True))


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (4, 3), (1, 2)])
def test_a_run_resumes_on_another_number_of_ranks(ranks, tmp_path, before, after):
    """C48, R6: the same global batches, so the same curve to fp32 rounding."""
    data = write_reviews(tmp_path / "data", 48)
    ranks(1, in_workers, tmp_path / "cache", settings(data, tmp_path / "whole", batch_size=12))
    out = tmp_path / "moved"
    ranks(before, in_workers, tmp_path / "cache", settings(data, out, batch_size=12 // before, save_every=3), 5)
    ranks(after, in_workers, tmp_path / "cache", settings(data, out, batch_size=12 // after, save_every=3,
                                                          resume="newest"))
    expected, found = steps_of(tmp_path / "whole"), steps_of(out)
    assert len(expected) == len(found) == 8
    for a, b in zip(expected, found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# Free answers, packs, prompts as labels


def encoded_questions(path: Path, skip: bool = False) -> EncodedData:
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    return encode_file(path, TEMPLATES["alpaca"], tokenizer, 192, skip_bad_rows=skip, quiet=True)


def lines_of(output: Path) -> list[dict]:
    return [line for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.mark.parametrize("size", [1, 2])
def test_packs_hold_every_example_once_an_epoch_and_never_more_tokens_than_asked(ranks, tmp_path, size):
    """C23, C26: counted in what the run wrote down; free answers are scored by their loss alone."""
    path, out = write_questions(tmp_path / "rows.jsonl"), tmp_path / "out"
    ranks(size, in_workers, tmp_path / "cache", settings(path, out, batch_tokens=400))
    encoded = encoded_questions(path)
    train, test = (encoded.subset(chosen) for chosen in hold_out(40, 0.05))
    lines, summary = lines_of(out), json.loads((out / "summary.json").read_text())
    assert (len(train), len(test)) == (38, 2) and summary["examples"] == 2 * 38
    for name, per_epoch in (("tokens", train.lengths.sum()), ("labels", train.label_counts.sum())):
        assert summary[name] == sum(line[name] for line in lines) == 2 * per_epoch
    assert max(line["tokens"] for line in lines) <= size * 400
    assert len(lines) < 2 * 38 / (2 * size)  # more than two examples a pack
    assert set(summary["after"]) == {"loss", "n"} and summary["after"]["n"] == 2
    assert summary["after"]["loss"] < summary["before"]["loss"]


def test_grouped_by_length_every_example_comes_once_an_epoch_among_its_like(ranks, tmp_path):
    """C26: and the longest one in the first step, where it needs its memory at once."""
    path = write_questions(tmp_path / "rows.jsonl")
    plans = {False: tmp_path / "random", True: tmp_path / "grouped"}
    for grouped, out in plans.items():
        ranks(2, in_workers, tmp_path / "cache", settings(path, out, group_by_length=grouped, test_fraction=0.0))
    lengths, spread = encoded_questions(path).lengths, {}
    for grouped, out in plans.items():
        lines = lines_of(out)
        assert sum(line["tokens"] for line in lines) == 2 * lengths.sum() and len(lines) == 10  # of 8 examples each
        spread[grouped] = np.std([line["tokens"] for line in lines])
    assert spread[True] > 2 * spread[False]  # a step of short ones, a step of long ones
    schedule = Schedule(lengths, 2.0, 2, 4, group_by_length=True, seed=0)
    expected = [sum(int(lengths[part].sum()) for part in schedule.micro_batches(step)) for step in range(10)]
    assert [line["tokens"] for line in lines_of(plans[True])] == expected
    assert lengths.max() in [lengths[i] for part in schedule.micro_batches(0) for i in part]


@torch.no_grad()
def plain_loss(encoded: EncodedData, prompts: bool) -> tuple[float, int]:
    """Of the tiny model as a run begins with it: the mean loss over labels, one example at a time; and their number."""
    model = Llama(TINY)
    pretrained.initialize(model, seed=0)
    total, labels = 0.0, 0
    for ids, is_answer in (encoded[i] for i in range(len(encoded))):
        ids, alone = torch.from_numpy(np.array(ids)).long(), PackedDocuments([len(ids)])
        losses = F.cross_entropy(model(ids, alone.positions, alone)[:-1].double(), ids[1:], reduction="none")
        chosen = torch.ones(len(losses), dtype=torch.bool) if prompts else torch.from_numpy(np.array(is_answer))[1:]
        total, labels = total + float(losses[chosen].sum()), labels + int(chosen.sum())
    return total / labels, labels


@pytest.mark.parametrize("prompts", [False, True])
def test_the_loss_is_over_the_answers_or_with_prompts_over_every_token_but_the_first(ranks, tmp_path, prompts):
    """C1, C2, C52: the first step's, over all examples, is that of a plain loop; held out are answers only."""
    path, out = write_questions(tmp_path / "rows.jsonl", 17), tmp_path / "out"
    chosen = settings(path, out, train_on_prompt=prompts, max_steps=1, batch_size=8)
    ranks(2, in_workers, tmp_path / "cache", chosen)
    train, test = (encoded_questions(path).subset(part) for part in hold_out(17, 0.05))
    loss, labels = plain_loss(train, prompts)
    (line,) = lines_of(out)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["labels"] == labels == (train.lengths.sum() - 16 if prompts else train.label_counts.sum())
    before = json.loads((out / "summary.json").read_text())["before"]
    assert before == {"loss": pytest.approx(plain_loss(test, False)[0], rel=1e-5), "n": 1}


def test_run_json_says_what_was_held_out_and_a_resume_needs_the_same(ranks, tmp_path):
    """R7, C51: the choice does not depend on the run's seed; another one, or other labels, is another run."""
    path, about = write_questions(tmp_path / "rows.jsonl"), {}
    for seed in (0, 1):
        chosen = settings(path, tmp_path / f"out{seed}", seed=seed, test_fraction=0.2, max_steps=1)
        ranks(1, in_workers, tmp_path / "cache", chosen)
        about[seed] = json.loads((tmp_path / f"out{seed}/run.json").read_text())["examples"]
    assert about[0]["held_out"] == {"fraction": 0.2, "seed": 0, "examples": 8}
    assert (about[0]["train"], about[0]["test"], about[0]["bad_rows"]) == (32, 8, 0) and about[0] == about[1]
    for changes in ({"test_fraction": 0.3}, {"test_fraction": 0.0}, {"test_fraction": 0.2, "train_on_prompt": True}):
        other = settings(path, tmp_path / "out0", max_steps=1, resume="newest", **changes)
        assert "fingerprint was" in ranks(1, refused, tmp_path / "cache", other)[0], changes


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


def test_a_run_without_its_bad_rows_is_the_run_of_a_clean_file_and_says_how_many(ranks, tmp_path):
    """R15: every loss bit for bit, and the count in run.json, once though both parts come from that file."""
    clean = write_questions(tmp_path / "clean.jsonl", 20)
    spoiled = write_questions(tmp_path / "spoiled.jsonl", 20, bad=7)
    for path, flags in ((clean, {}), (spoiled, {"skip_bad_rows": True})):
        ranks(2, in_workers, tmp_path / "cache", settings(path, tmp_path / path.stem, **flags))
    assert steps_of(tmp_path / "spoiled") == steps_of(tmp_path / "clean") and steps_of(tmp_path / "clean")
    counts = [json.loads((tmp_path / name / "run.json").read_text())["examples"] for name in ("clean", "spoiled")]
    assert [about["bad_rows"] for about in counts] == [0, 7] and counts[0]["train"] == counts[1]["train"] == 19


def run_command(*arguments: str, cwd: Path, cache: Path, ranks: int = 0, **kwargs) -> subprocess.CompletedProcess:
    launcher = ([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks
                else [sys.executable])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    environment |= {"LLAMA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, str(ROOT / "fsdp_train.py"), *arguments], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=300, **kwargs)


@pytest.mark.slow
def test_the_plain_command_runs_twice_and_keeps_the_first_result(tmp_path):
    """R17: the README's command on one process; the second run gets a folder of its own."""
    data = write_reviews(tmp_path / "data")
    arguments = ("--data", str(data), "--max_steps", "2", "--batch_size", "4", "--eval_limit", "8")
    first = run_command(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs/data-tiny"
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in run.iterdir()} == {"run.json", "metrics.jsonl", "loss.png", "summary.json", "model",
                                                     "checkpoints"}
    second = run_command(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert second.returncode == 0 and (tmp_path / "runs/data-tiny-2/summary.json").exists()
    assert kept == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {
        "data", "bundled_sample", "model", "ranks", "steps", "examples", "tokens", "labels", "train_seconds",
        "total_seconds", "examples_per_second", "tokens_per_second", "peak_memory_bytes", "before", "after"}
    assert summary["steps"] == 2 and summary["examples"] == summary["labels"] == 8
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(run / "model")
    trained = {k: v.bfloat16() for k, v in load_file(run / "checkpoints/step-000002/model.safetensors").items()}
    assert torch.equal(opened.model.layers[1].mlp.up_proj.weight.bfloat16(), trained["layers.1.mlp.up_proj.weight"])


BAD = {
    "unknown flag": (["--learning_rat", "1"], "learning_rat"),
    "no such data": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "no such model": (["--model", "nowhere"], "nowhere"),
    "too few examples": (["--batch_size", "1000"], "fewer than one global batch"),
    "too few packs": (["--batch_tokens", "100000", "--gradient_accumulation_steps", "2"],
                      "40 examples in 1 packs of --batch_tokens 100000, fewer than one global batch of 2"),
    "packs too short": (["--batch_tokens", "100"], "--batch_tokens 100: expected 0, or --max_length 512 or more"),
    "fraction beside a test file": (["--test_fraction", "0.1"], "--test_fraction 0.1: expected a data set without"),
    "no such template": (["--template", "nowhere.txt"], "--template nowhere.txt: no such file"),
    "too long for the model": (["--max_length", "100000"], "--max_length 100000"),
    "several at once": (["--batch_size", "0", "--epochs", "-1"], "--epochs -1.0"),
    "taken output": (["--output", "."], "exists already"),
    "nothing to resume": (["--resume", "--output", "empty"], "no run"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, case, monkeypatch, capsys):
    """No traceback for a user's mistake; nothing is written."""
    data = write_reviews(tmp_path / "data")
    arguments, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fsdp_train.py", "--data", str(data), "--batch_size", "4", *arguments])
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        fsdp_train.run(fsdp_train.main)
    told = capsys.readouterr().err.strip().splitlines()
    told = [line for line in told if line.strip() and " rows" not in line]
    assert stopped.value.code == 2 and len(told) == 1 and expected in told[0], told
    assert not [p for p in tmp_path.rglob("*.safetensors")] and before[0].exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_weights_change(ranks, tmp_path):
    """C4, R11: every rank raises, naming the step and the newest whole checkpoint; broken weights are not saved."""
    assert ranks(2, stopped_by_nan, tmp_path, 0) == [(2, "step 4: loss nan")] * 2
    assert ranks(2, stopped_by_nan, tmp_path, 1) == [(2, "step 3: a weight")] * 2
    assert [p.name for p in checkpoint.published(tmp_path / "out1/checkpoints")] == ["step-000001", "step-000002"]


def stopped_by_nan(folder: Path, save_every: int) -> tuple[int, str]:
    """The last update that was made, and how the error begins."""
    os.environ["LLAMA_CACHE"] = str(folder / "cache")
    if dist.get_rank() == 0:
        write_reviews(folder / "data")
    dist.barrier()
    chosen = settings(folder / "data", folder / f"out{save_every}", save_every=save_every)
    real, updates = fsdp_train.learning_rate, []

    def poison(step, *rest):  # called just before each update: the third update is an infinite step
        updates.append(step)
        return float("inf") if step == 2 else real(step, *rest)

    fsdp_train.learning_rate = poison
    try:
        run_here(chosen)
    except UserError as error:
        told = str(error)
    finally:
        fsdp_train.learning_rate = real
    assert "\n" not in told and not (folder / f"out{save_every}/model").exists()
    return updates[-1], " ".join(told.split()[:4]).rstrip(",")


def test_a_mistake_that_one_node_alone_meets_ends_all_of_them(tmp_path):
    """R9, C43: two launchers stand for two nodes; the second finds no data, and nobody waits for it to join."""
    data = write_reviews(tmp_path / "data")
    environment = os.environ | {"LLAMA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--master_addr",
             "127.0.0.1", "--master_port", "29873", str(ROOT / "fsdp_train.py"), "--data", str(where), "--output",
             str(tmp_path / "out")],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank, where in enumerate([data, tmp_path / "nowhere"])
    ]
    told = [node.communicate(timeout=120)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert all("nowhere: no such file or folder" in text for text in told), told


def test_other_settings_are_refused_by_name_also_by_a_finished_run(ranks, tmp_path):
    """R7: each difference, before anything is loaded; with the same settings a finished run says so and stays."""
    data, out = write_reviews(tmp_path / "data"), tmp_path / "out"
    ranks(1, in_workers, tmp_path / "cache", settings(data, out))
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    told = ranks(1, refused, tmp_path / "cache", settings(data, out, resume="newest", learning_rate=0.5, seed=3))[0]
    assert "learning_rate was 0.001, is 0.5; seed was 0, is 3" in told
    assert ranks(1, refused, tmp_path / "cache", settings(data, out, resume="newest")) == [""]
    assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_damaged_newest_checkpoint_is_named_and_only_the_user_goes_back(ranks, tmp_path):
    """R5, C48: with --resume step-N the newer ones are set aside, and the run ends as the uninterrupted one."""
    data, out = write_reviews(tmp_path / "data"), tmp_path / "out"
    common = dict(batch_size=4, save_every=2, keep_checkpoints=-1)
    ranks(2, in_workers, tmp_path / "cache", settings(data, tmp_path / "whole", **common))
    ranks(2, in_workers, tmp_path / "cache", settings(data, out, **common), 8)
    newest = checkpoint.published(out / "checkpoints")[-1]
    weights = bytearray((newest / "optimizer.safetensors").read_bytes())
    weights[-9] ^= 4
    (newest / "optimizer.safetensors").write_bytes(weights)
    for told in ranks(2, refused, tmp_path / "cache", settings(data, out, resume="newest", **common)):
        assert f"{newest}/optimizer.safetensors: damaged" in told and "--resume step-000004" in told
    assert [checkpoint.step_of(p) for p in checkpoint.published(out / "checkpoints")] == [2, 4, 6]
    ranks(2, in_workers, tmp_path / "cache", settings(data, out, resume="step-4", **common))
    assert steps_of(out) == steps_of(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(final_state(tmp_path / "whole").values(), final_state(out).values(),
                                                 strict=True))
    assert [p.name for p in (out / "checkpoints").glob("*.aside")] == ["step-000006.aside"]


def test_settings_that_changed_on_purpose_are_allowed_by_name(ranks, tmp_path):
    """R7: and recorded in the next checkpoint."""
    data, out = write_reviews(tmp_path / "data"), tmp_path / "out"
    ranks(1, in_workers, tmp_path / "cache", settings(data, out, save_every=2), 4)
    changed = partial(settings, data, out, resume="newest", learning_rate=0.5)
    assert "learning_rate was 0.001, is 0.5" in ranks(1, refused, tmp_path / "cache", changed())[0]
    assert "expected names among" in ranks(1, refused, tmp_path / "cache", changed(allow_changed="lr"))[0]
    ranks(1, in_workers, tmp_path / "cache", changed(allow_changed="learning_rate"))
    newest = checkpoint.published(out / "checkpoints")[-1]
    assert checkpoint.read_manifest(newest).settings["learning_rate"] == 0.5
    assert [line["learning_rate"] > 0.01 for line in steps_of(out)] == [False] * 2 + [True] * 18


def test_a_disk_that_takes_no_more_metrics_stops_all_ranks_after_the_step(ranks, tmp_path):
    """R3, R9: only rank 0 writes them, but none is left waiting."""
    data, out = write_reviews(tmp_path / "data"), tmp_path / "out"
    told = ranks(2, with_full_journal, tmp_path / "cache", settings(data, out, save_every=2), 3, "loss")
    assert told == [f"{out}/metrics.jsonl: No space left on device", f"{out}: rank 0 could not write there"]
    assert checkpoint.step_of(checkpoint.published(out / "checkpoints")[-1]) == 2


def test_a_checkpoint_is_never_ahead_of_its_metrics(ranks, tmp_path):
    """R3, R23: an evaluation that could not be written down would be missing after a resume from there."""
    data, out = write_reviews(tmp_path / "data"), tmp_path / "out"
    common = dict(save_every=2, eval_every=2)
    told = ranks(2, with_full_journal, tmp_path / "cache", settings(data, out, **common), 4, "held_out")
    assert told == [f"{out}/metrics.jsonl: No space left on device"] * 2
    assert [checkpoint.step_of(path) for path in checkpoint.published(out / "checkpoints")] == [2]
    ranks(2, in_workers, tmp_path / "cache", settings(data, out, resume="newest", **common))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" in line] == [0, 2, 4, 6, 8, 10]


def with_full_journal(cache: Path, chosen: fsdp_train.Settings, step: int, kind: str) -> str:
    """What is told where the disk refuses this line."""
    from llama.training.journal import Journal

    real = Journal.write

    def write(journal: Journal, **line):
        if line["step"] == step and kind in line:
            journal.file.close()
            journal.file = open("/dev/full", "a")
        real(journal, **line)

    Journal.write = write
    try:
        return refused(cache, chosen)
    finally:
        Journal.write = real


@pytest.mark.parametrize("case", [
    {"async_save": True}, {"gradient_accumulation_steps": 2, "batch_size": 2, "async_save": True},
    {"gradient_accumulation_steps": 2, "batch_size": 2, "defer_gradient_sync": True, "sharding": "grad"},
], ids=["async", "accumulation, async", "accumulation, deferred"])  # fmt: skip
def test_a_crashed_and_resumed_run_of_another_kind_equals_the_uninterrupted_one_bitwise(ranks, tmp_path, case):
    """C48, R1: whatever was being written in the background when the others died."""
    data = write_reviews(tmp_path / "data")
    ranks(2, in_workers, tmp_path / "cache", settings(data, tmp_path / "whole", **case))
    out = tmp_path / "crashed"
    ranks(2, in_workers, tmp_path / "cache", settings(data, out, save_every=2, **case), 6)
    assert checkpoint.step_of(checkpoint.published(out / "checkpoints")[-1]) in (2, 4)
    ranks(2, in_workers, tmp_path / "cache", settings(data, out, save_every=2, resume="newest", **case))
    assert steps_of(out) == steps_of(tmp_path / "whole") and len(steps_of(out)) == 10
    expected, found = final_state(tmp_path / "whole"), final_state(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_that_goes_on_is_not_finished_before_it_is(ranks, tmp_path):
    """R1: it was finished once, went back to an older checkpoint, and died as it wrote its result."""
    data, out = write_reviews(tmp_path / "data"), tmp_path / "out"
    common = dict(save_every=2, keep_checkpoints=-1)
    ranks(1, in_workers, tmp_path / "cache", settings(data, out, **common))
    first = (out / "model/model.safetensors").read_bytes()
    changed = partial(settings, data, out, learning_rate=1e-4, allow_changed="learning_rate", **common)
    with pytest.raises(AssertionError, match="pulled the plug"):
        ranks(1, dying_at_its_end, tmp_path / "cache", changed(resume="step-4"))
    assert not (out / "summary.json").exists()
    ranks(1, in_workers, tmp_path / "cache", changed(resume="newest"))
    assert (out / "summary.json").exists() and (out / "model/model.safetensors").read_bytes() != first
    shutil.rmtree(out / "model")
    ranks(1, in_workers, tmp_path / "cache", changed(resume="newest"))
    assert (out / "model/model.safetensors").exists()


def dying_at_its_end(cache: Path, chosen: fsdp_train.Settings) -> None:
    def export(*_):
        raise ConnectionAbortedError("pulled the plug")

    real, pretrained.export = pretrained.export, export
    try:
        in_workers(cache, chosen)
    finally:
        pretrained.export = real


def test_a_checkpoint_beyond_the_runs_end_is_refused(ranks, tmp_path):
    """R7: fewer steps than are done already."""
    data, out = write_reviews(tmp_path / "data"), tmp_path / "out"
    ranks(1, in_workers, tmp_path / "cache", settings(data, out, max_steps=3))
    shorter = settings(data, out, max_steps=2, resume="newest", allow_changed="steps")
    assert "is after step 3, but this run has only 2 steps" in ranks(1, refused, tmp_path / "cache", shorter)[0]


def test_a_folder_deleted_during_the_run_is_told_and_the_model_is_written(ranks, tmp_path):
    """R3: nothing says that all is there."""
    data, out = write_reviews(tmp_path / "data"), tmp_path / "out"
    told = ranks(2, with_deleted_folder, tmp_path / "cache", settings(data, out, max_steps=3))
    assert told == [f"{out}/metrics.jsonl: deleted during the run; model/ was written, nothing else"] * 2
    assert (out / "model/model.safetensors").exists() and not (out / "summary.json").exists()


def with_deleted_folder(cache: Path, chosen: fsdp_train.Settings) -> str:
    real = fsdp_train.learning_rate

    def deleting(step, *args):
        if step == 1:
            shutil.rmtree(chosen.output, ignore_errors=True)
        return real(step, *args)

    fsdp_train.learning_rate = deleting
    try:
        return refused(cache, chosen)
    finally:
        fsdp_train.learning_rate = real


def test_an_output_that_cannot_be_opened_is_told_on_every_rank(ranks, tmp_path):
    """R3, R9: a link to nowhere."""
    data = write_reviews(tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for told in ranks(2, refused, tmp_path / "cache", settings(data, tmp_path / "link")):
        assert str(tmp_path / "link") in told


def refused(cache: Path, chosen: fsdp_train.Settings) -> str:
    try:
        in_workers(cache, chosen)
    except UserError as error:
        return str(error)
    return ""


def test_a_lost_checkpoint_never_lets_a_resume_replace_the_model(tmp_path, monkeypatch, capsys):
    """R17: without the checkpoint it would be a new start over a finished run."""
    data = write_reviews(tmp_path / "data")
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/run.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["fsdp_train.py", "--data", str(data), "--batch_size", "4", "--resume", "--output",
                                      str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        fsdp_train.run(fsdp_train.main)
    assert "no checkpoint to continue from" in capsys.readouterr().err
    assert (tmp_path / "out/model").exists()


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("killed_rank", [0, 1])
@pytest.mark.slow
def test_killing_one_rank_ends_all_within_30_seconds_and_names_it(tmp_path, killed_rank):
    """R9: kill -9 mid-step under torchrun; then --resume finishes the run from the newest whole checkpoint."""
    data, out = write_reviews(tmp_path / "data", 400), tmp_path / "out"
    arguments = ["--data", str(data), "--output", str(out), "--batch_size", "4", "--save_every", "2", "--eval_limit",
                 "8", "--epochs", "2"]
    environment = os.environ | {"LLAMA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    log = open(tmp_path / "log", "w")
    agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                              str(ROOT / "fsdp_train.py"), *arguments], env=environment, stdout=log, stderr=log)
    try:
        assert wait_for(lambda: len(checkpoint.published(out / "checkpoints")) >= 2, 120)
        workers = children(agent.pid)
        victim = next(p for p in workers if f"RANK={killed_rank}".encode() in environ_of(p))
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        agent.wait(timeout=60)
        assert time.monotonic() - began < 30 and agent.returncode != 0
        assert wait_for(lambda: not any(Path(f"/proc/{p}").exists() for p in workers), 5)
    finally:
        agent.kill()
        log.close()
    told = (tmp_path / "log").read_text()
    assert re.search(rf"rank\s*:\s*{killed_rank}\b", told) and "-9" in told

    done = run_command(*arguments, "--resume", "--max_steps", "0", cwd=tmp_path, cache=tmp_path / "cache", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = steps_of(out)
    assert [line["step"] for line in lines] == list(range(1, 101))
    assert (out / "model/config.json").exists()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environ_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_devices_come_from_the_local_rank(monkeypatch):
    """C46: rank 9 of two 8-GPU nodes computes on the second GPU of its own node."""
    from llama.parallel.distribute import distribute as parallel

    chosen = []
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 8), ("set_device", chosen.append)):
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in (("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "here")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 9, 16)]))
    monkeypatch.setattr(parallel, "name_of_attempt", lambda *_: "first")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_, **__: None)
    with parallel.ranks() as here:
        assert here.device == torch.device("cuda", 1) and here.rank == 9
    assert chosen == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(UserError, match="9: this node has 8 GPUs"), parallel.ranks():
        pass
