"""planner.py: a table that a user can act on, mistakes in one line, and times beside those of one H200."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import planner
from llama.boundary.command_line import parse
from llama.boundary.errors import UserError
from llama.storage.named_shapes import NAMED_SHAPES
from llama.training.planner import refuse_what_cannot_fit
from llama.training.planner_settings import PlannerSettings
from llama.training.settings import TrainingSettings
from lora import Changes

ROOT = Path(__file__).resolve().parents[1]
H200 = {"peak_tflops": 989.0, "memory_gb_s": 4270.0}


def say(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["planner.py", *words])
    planner.main()
    return capsys.readouterr().out


def test_the_fastest_that_fits_is_marked_and_its_flags_are_the_trainer_s(monkeypatch, capsys):
    """What fits comes first; both parts are sorted by time. No line but the command is wider than 100 columns."""
    out = say(monkeypatch, capsys, "--model", "8b", "--gpus", "16", "--gpu_memory", "40", "--rows", "0")
    lines = out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("BEST", " yes", "  no"))]
    fits = [float(row[6]) <= 38 for row in rows]
    assert [row[0] for row in rows] == ["BEST", *["yes"] * (sum(fits) - 1), *["no"] * fits.count(False)]
    for wanted in (True, False):
        seconds = [float(row[8]) for row, is_so in zip(rows, fits, strict=True) if is_so == wanted]
        assert seconds == sorted(seconds)
    assert len(rows) == 5 * 4 * 3
    assert max(map(len, lines[:-1])) <= 100
    words = lines[-1].partition("fsdp_train.py ")[2].split()
    chosen = parse(TrainingSettings, [word if word != "8b" else "DIR" for word in words])
    assert [chosen.sharding, str(chosen.tensor_parallel), chosen.activation_checkpointing] == rows[0][1:4]
    assert chosen.batch_tokens == 4096


def test_where_nothing_fits_it_says_what_is_nearest_and_what_would_help(monkeypatch, capsys):
    out = say(monkeypatch, capsys, "--model", "8b", "--gpus", "1", "--gpu_memory", "24", "--rows", "2")
    assert "\nBEST" not in out and "nothing fits into 22.8 GB; nearest, " in out
    assert "with --lora_rank 8: 18.6 GB, fits" in out and "with --gpus 4: 34.2 GB, does not fit either" in out
    assert out.endswith("with --gpus 8: 17.2 GB, fits\n")


def test_a_folder_needs_only_its_config(tmp_path, monkeypatch, capsys):
    config = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 128}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = say(monkeypatch, capsys, "--model", str(tmp_path), "--gpus", "2", "--gpu_memory", "1")
    assert f"fsdp_train.py --model {tmp_path} " in out


@pytest.mark.parametrize("words, problem", [
    (["--model", "70c", "--gpus", "4"], "--model 70c: no such folder, expected a folder with one, or one of tiny, 1b"),
    (["--model", "8b", "--gpus", "0"], "planner.py: --gpus 0: expected 1 to"),
    (["--model", "8b", "--gpus", "12"], "--gpus 12: expected fewer than --node_gpus 8, or a multiple of it"),
    (["--model", "8b", "--gpus", "8", "--tensor_parallel", "3"], "--tensor_parallel 3: expected a number that divides"),
    (["--model", "1b", "--gpus", "16", "--node_gpus", "16", "--tensor_parallel", "16"],
     "--tensor_parallel 16: the model has 8 key/value heads, expected at least 16"),
    (["--model", "8b", "--gpus", "8", "--sharding", "hybrid"], "--sharding hybrid: expected several nodes for it"),
    (["--model", "8b", "--gpus", "8", "--quantize", "nf4"], "--quantize nf4: expected --lora_rank with it"),
    (["--model", "8b", "--gpus", "8", "--lora_rank", "8", "--lora_targets", "x"], "LoRA target 'x'"),
    (["--model", str(ROOT), "--gpus", "8"], "has no config.json"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_a_mistake_is_one_line(words, problem, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["planner.py", *words])
    with pytest.raises(UserError) as error:
        planner.main()
    assert problem in str(error.value) and "\n" not in str(error.value)


MEASURED = {  # jobs of benchmarks/results/gpu_h200.json, and how far off the forecast may be
    "1b-full": ("1b", {}, "none", 0.15),
    "8b-lora": ("8b", {"lora_rank": 8}, "none", 0.15),
    "8b-lora-ckpt": ("8b", {"lora_rank": 8}, "full", 0.15),
    "8b-lora-nf4-ckpt": ("8b", {"lora_rank": 8, "quantize": "nf4"}, "full", 0.15),
}


@pytest.mark.parametrize("job", MEASURED)
def test_the_forecast_is_near_the_steps_that_its_rates_come_from(job):
    """One H200. The rates were fitted to these four runs, so this holds the formulas together; it proves no other."""
    name, flags, checkpointing, tolerance = MEASURED[job]
    jobs = json.loads((ROOT / "benchmarks/results/gpu_h200.json").read_text())["jobs"]
    (measured,) = (found["tokens_per_s"] for found in jobs if found["job"] == job)
    settings = PlannerSettings(model=name, gpus=1, activation_checkpointing=checkpointing, **flags, **H200)
    (row,) = planner.compared(settings)
    assert row.tokens_per_second == pytest.approx(measured, rel=tolerance)


def refuse(memory: float | None, **flags) -> None:
    settings = TrainingSettings(model="DIR", dtype="bfloat16", batch_tokens=4096, **flags).with_recipe(1)
    changes = Changes(settings.quantize, settings.asked_adapter())
    process = SimpleNamespace(world_size=1, data_ranks=1, device=torch.device("cpu"))
    refuse_what_cannot_fit(settings, NAMED_SHAPES["1b"], changes.apply, process, memory)


def test_a_run_whose_states_cannot_fit_is_refused_with_what_would_fit():
    """1.24 billion weights: 16 bytes each, 19.8 GB."""
    refuse(None)  # on a CPU
    refuse(20e9)
    with pytest.raises(UserError) as error:
        refuse(19e9)
    assert str(error.value) == (
        "--model DIR: on each rank weights (4.9 GB), gradients (4.9) and moments (9.9) alone take 19.8 GB, and this "
        "GPU has 19.0; no other sharding fits; python planner.py shows what would"
    )
    refuse(12.5e9, optimizer="adamw8bit")
    refuse(3e9, lora_rank=8)


def test_the_trainer_s_refusal_names_a_setting_that_fits(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    settings = TrainingSettings(model="DIR", sharding="none", batch_tokens=4096, dtype="bfloat16").with_recipe(4)
    process = SimpleNamespace(world_size=4, data_ranks=4, device=torch.device("cpu"))
    with pytest.raises(UserError, match="this GPU has 16.0; expected --sharding full"):
        refuse_what_cannot_fit(settings, NAMED_SHAPES["1b"], lambda model: None, process, 16_000_000_000)


@pytest.mark.slow
def test_the_peak_of_a_real_run_is_within_15_percent(smollm2):
    """All of SmolLM2 trained on this machine's CPU: what tensors take above the weights' loading."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/memory.py"), "--check", str(smollm2), "--tokens",
                           "512", "--only", "0"], text=True, capture_output=True, timeout=600)
    row = done.stdout.splitlines()[-1].split("|")
    assert row[3] == row[4] and abs(float(row[-2].strip(" %"))) <= 15, done.stdout + done.stderr[-3000:]
