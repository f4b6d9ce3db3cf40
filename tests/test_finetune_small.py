"""Runs with adapters, packed bases, 8-bit moments, frozen layers: equal on any ranks, resumed, evaluated, refused."""

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import (
    final_state,
    refused,
    rewrite,
    same,
    saved_steps,
    steps_of,
    summary_of,
    train_here,
    write_reviews,
)
from safetensors.torch import load_file, save_file
from sharded import build, this_process

import checkpoints
import evaluate
import fsdp_train
from llama.boundary.command_line import parse
from llama.boundary.errors import UserError
from llama.model import Llama, ModelConfig, PackedDocuments
from llama.storage import pretrained
from llama.storage.base import TINY_TOKENIZER, Base, config_to_json
from llama.storage.companions import Companions
from llama.storage.manifest import published
from llama.training.optim import build_adamw
from llama.training.settings import TrainingSettings
from lora import Changes

pytestmark = pytest.mark.usefixtures("cache")

CONFIG = ModelConfig(vocab_size=1280, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
                     initializer_range=0.1)
CONFIGS = {"untied": CONFIG, "tied": replace(CONFIG, tie_word_embeddings=True),
           "narrow": replace(CONFIG, intermediate_size=96)}
LORA = {"lora_rank": 4, "lora_alpha": 8.0}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Pretrained folders in bf16, as an export is by default."""
    made = {}
    for name, config in CONFIGS.items():
        model = Llama(config)
        pretrained.initialize_weights(model, seed=0)
        made[name] = tmp_path_factory.mktemp("folders") / name
        pretrained.export_model(model, made[name], config_to_json(config),
                                Companions([TINY_TOKENIZER / "tokenizer.model"]))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def run(ranks, folders, data, cache, tmp_path):
    """run(2, "out", die_in_step, lora_rank=4, ...): a run on so many ranks, 4 examples a step; its folder."""

    def run(size: int, name: str, die_in_step: int | None = None, model: str = "untied", **changes) -> Path:
        ranks(size, train_here, cache, settings(folders[model], data, tmp_path / name, size, **changes), die_in_step)
        return tmp_path / name

    return run


def settings(model: Path, data: Path, output: Path, size: int = 1, **changes) -> TrainingSettings:
    """Of 3 steps an epoch, 4 in all."""
    base = dict(model=str(model), data=str(data), template="imdb", output=str(output), epochs=2.0,
                batch_size=4 // size, max_length=192, max_steps=4, dtype="float32", eval_limit=8, learning_rate=1e-2)
    return TrainingSettings(**(base | changes)).with_recipe(size)


def fast_only(chosen: str, cases: dict) -> list:
    """The names of all cases; all but the chosen ones (between bars) are for the slow tests."""
    return [case if case in chosen.split(" | ") else pytest.param(case, marks=slow) for case in cases]


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in steps_of(output)]


# The base's files


def printed(cache: Path, chosen: TrainingSettings) -> str:
    """What a run prints on this rank."""
    with redirect_stdout(io.StringIO()) as out:
        train_here(cache, chosen)
    return out.getvalue()


def test_a_run_says_once_what_it_does_not_use_and_exports_in_the_bases_dtype(ranks, folders, data, cache, tmp_path):
    """What rounding lost is measured against the base's files; nothing, for a base in fp32."""
    base = tmp_path / "base"
    shutil.copytree(folders["untied"], base)
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"sliding_window": 64}))
    first, second = ranks(2, printed, cache, settings(base, data, tmp_path / "out", 2, max_steps=1))
    assert first.count(f"{base / 'config.json'}: not used: 'sliding_window'\n") == 1 and second == ""
    assert "the error of rounding to float32 is 0.0% of what training has changed\n" in first
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model/model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "out/model/config.json").read_text())["sliding_window"] == 64


def test_a_base_that_changed_under_a_run_with_an_adapter_is_refused(folders, data, cache, tmp_path, ranks):
    """R7: also where only an index knows the names of the files."""
    base = tmp_path / "base"
    shutil.copytree(folders["untied"], base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "weights.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    chosen = settings(base, data, tmp_path / "out", save_every=1, **LORA)
    ranks(1, train_here, cache, chosen, 2)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, base / "weights.safetensors")
    message = ranks(1, refused, cache, replace(chosen, resume="newest"))[0]
    assert "base was" in message and "\n" not in message
    assert saved_steps(tmp_path / "out") == [1]


# Adapters


@pytest.mark.parametrize("sizes, changes, tolerance", [
    ((1, 2), {"quantize": "nf4"}, 1e-4), pytest.param((1, 2, 4), {"quantize": "nf4"}, 1e-4, marks=slow),
    pytest.param((1, 2, 4), {"quantize": "int8"}, 1e-4, marks=slow), pytest.param((1, 2, 4), {}, 1e-5, marks=slow),
    pytest.param((1, 2), {"lora_variant": "dora", "model": "tied"}, 1e-5, marks=slow),
], ids=str)  # fmt: skip
def test_a_run_with_an_adapter_is_the_same_on_any_number_of_ranks(run, sizes, changes, tolerance):
    """C35, C2: one loss curve, one adapter at its end; all of it learns, and only it is kept."""
    outs = {size: run(size, f"out{size}", **LORA | changes) for size in sizes}
    expected = losses_of(outs[1])
    assert len(expected) == 4 and summary_of(outs[1])["after"]["loss"] < summary_of(outs[1])["before"]["loss"] - 0.05
    for size, out in outs.items():
        assert losses_of(out) == pytest.approx(expected, abs=tolerance)
        written = {path.name for path in (out / "adapter").iterdir()}
        beside = {"README.md", "generation_config.json", "tokenizer.model"}
        assert written == {"adapter_config.json", "adapter_model.safetensors"} | beside
        assert not (out / "model").exists() and size == json.loads((out / "run.json").read_text())["ranks"]
        state = final_state(out)
        assert state and all(".lora_" in name for name in state)
        stored = load_file(out / "adapter/adapter_model.safetensors")
        assert all(value.any() for name, value in stored.items() if "lora_B" in name)
        kept = {name.removesuffix(".weight").removesuffix("_vector"): value for name, value in state.items()
                if ".exp_avg" not in name}
        adapter = {name.removeprefix("base_model.model.model.").removesuffix(".weight").removesuffix("_vector"): value
                   for name, value in stored.items()}
        assert same(kept, adapter)


def test_a_packed_base_computes_what_its_values_say_and_not_the_original(run):
    """C38: the losses of int8 are near those of fp32 and those of nf4 less so; neither is equal."""
    plain, int8, nf4 = (losses_of(run(1, kind, **LORA, quantize=kind, max_steps=1)) for kind in
                        ("none", "int8", "nf4"))
    assert 0 < abs(int8[0] - plain[0]) < abs(nf4[0] - plain[0]) < 0.5


@pytest.mark.slow
def test_dropout_is_another_run_and_evaluation_is_without_it(run):
    """C39: the losses differ from those without dropout, but not the one before training."""
    plain, dropped = run(1, "plain", **LORA, max_steps=3), run(1, "dropped", **LORA, lora_dropout=0.5, max_steps=3)
    assert losses_of(plain)[0] == losses_of(dropped)[0]  # B is zero in the first step
    assert all(abs(a - b) > 1e-6 for a, b in zip(losses_of(plain)[2:], losses_of(dropped)[2:], strict=True))
    assert summary_of(plain)["before"] == summary_of(dropped)["before"]


CRASHES = {
    "dropout, int8": {**LORA, "lora_dropout": 0.05, "quantize": "int8"},
    "dora, nf4, bf16": {**LORA, "lora_variant": "dora", "lora_dropout": 0.05, "quantize": "nf4", "dtype": "bfloat16",
                        "lora_targets": "q_proj,up_proj"},
    "adamw8bit": {"optimizer": "adamw8bit", "learning_rate": 1e-3},
    "frozen, bf16": {"train_layers": "last:1,norm", "learning_rate": 1e-3, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", fast_only("dropout, int8", CRASHES))
@pytest.mark.slow
def test_a_crashed_and_resumed_run_equals_the_uninterrupted_one_bitwise(run, case):
    """C48, R1, R25: losses, what was trained, and the moments; dropout is drawn as a function of the step."""
    whole = run(2, "whole", **CRASHES[case])
    out = run(2, "crashed", 4, save_every=2, **CRASHES[case])
    assert not any((out / result).exists() for result in ("adapter", "model"))
    assert saved_steps(out) == [2]
    run(2, "crashed", save_every=2, resume="newest", **CRASHES[case])
    assert steps_of(out) == steps_of(whole) and len(steps_of(out)) == 4
    assert same(final_state(out), final_state(whole))
    assert summary_of(out)["after"] == summary_of(whole)["after"]
    for result in ("adapter/adapter_model", "model/model"):
        path = f"{result}.safetensors"
        there = ("lora_rank" in CRASHES[case]) == (result == "adapter/adapter_model")
        assert (out / path).exists() == (whole / path).exists() == there
        if (out / path).exists():
            assert same(load_file(out / path), load_file(whole / path))


@slow
def test_a_run_with_an_adapter_resumes_on_another_number_of_ranks(run):
    """C48, R6: the same curve to rounding."""
    expected = losses_of(run(1, "whole", **LORA))
    run(4, "moved", 4, save_every=2, **LORA)
    assert losses_of(run(2, "moved", save_every=2, resume="newest", **LORA)) == pytest.approx(expected, abs=2e-5)


def test_a_finished_run_says_so_and_other_settings_of_an_adapter_are_refused_by_name(ranks, run, folders, data, cache):
    """R7: each setting that a resumed run must share."""
    out = run(1, "out", **LORA, max_steps=1)
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    resumed = partial(settings, folders["untied"], data, out, max_steps=1, resume="newest")
    assert ranks(1, refused, cache, resumed(**LORA)) == [""]
    for changes in (LORA | {"lora_rank": 8}, LORA | {"lora_alpha": 16.0}, LORA | {"lora_dropout": 0.1},
                    LORA | {"lora_targets": "q_proj"}, LORA | {"lora_variant": "rslora"}, LORA | {"quantize": "int8"},
                    LORA | {"optimizer": "adamw8bit"}, {}, {"train_layers": "last:1"}):
        told, = ranks(1, refused, cache, resumed(**changes))
        name = next((n for n in ("quantize", "optimizer", "train_layers") if n in changes), "lora")
        assert "made with other settings" in told and f"{name} was " in told and "\n" not in told, changes
    assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changes", [
    pytest.param({"lora_variant": "dora", "quantize": "nf4"}, marks=slow), {"lora_targets": "1.mlp.up_proj"},
], ids=str)  # fmt: skip
@pytest.mark.slow
def test_evaluate_and_a_continued_run_begin_where_the_adapter_ended(
    run, folders, data, tmp_path, monkeypatch, capsys, changes
):
    """C51, C37: evaluate.py --adapter gives the run's last loss, and --adapter's first loss is that, too."""
    first = run(2, "first", **LORA | changes)
    kind, after = changes.get("quantize", "none"), summary_of(first)["after"]
    told = {}
    for name, flags in (("with", ["--adapter", first / "adapter"]), ("without", [])):
        status, out, err = command(evaluate, monkeypatch, capsys, "--model", folders["untied"], "--data", data,
                                   "--template", "imdb", "--limit", 8, "--max_length", 192, "--dtype", "float32",
                                   "--quantize", kind, *flags)
        assert status == 0, err
        told[name] = json.loads(out)
    assert told["with"]["loss"] == pytest.approx(after["loss"], abs=1e-5) and told["with"]["n"] == 8
    assert told["with"]["accuracy"] == after["accuracy"]
    assert told["with"]["adapter"] == str(first / "adapter") and told["with"]["quantize"] == kind
    assert told["without"]["loss"] == pytest.approx(summary_of(first)["before"]["loss"], abs=1e-5)

    second = run(1, "second", adapter=str(first / "adapter"), quantize=kind)
    assert summary_of(second)["before"]["loss"] == pytest.approx(after["loss"], abs=1e-5)
    assert summary_of(second)["after"]["loss"] < after["loss"]
    configs = [json.loads((out / "adapter/adapter_config.json").read_text()) for out in (first, second)]
    assert configs[0] == configs[1] and configs[0]["r"] == 4
    assert not same(*(load_file(out / "adapter/adapter_model.safetensors") for out in (first, second)))


def command(module, monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """A script in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    status = 0
    try:
        module.run(module.main)
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    return status, out, err


# Frozen layers

PARTS = {
    "last:1": ("layers.1.",),
    "last:2": ("layers.0.", "layers.1."),
    "norm": ("norm.",),
    "last:1,norm": ("layers.1.", "norm."),
    "lm_head": ("lm_head.",),
    "embed_tokens": ("embed_tokens.",),
    "norm,lm_head": ("norm.", "lm_head."),
}


def step_of(folder: Path, parts: str, dtype: torch.dtype) -> dict:
    """After one step: who has a gradient, who has moments, and where autograd began."""
    model = build(CONFIG, this_process(), dtype, change=Changes(train_layers=parts).apply)
    pretrained.load_weights(model, folder)
    asks = {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _, inputs, i=i: asks.update({i: inputs[0].requires_grad}))
        layer.register_forward_hook(lambda _, inputs, y, i=i: asks.update({f"{i} out": y.requires_grad}))
    optimizer, parameters = build_adamw(model, 1e-3, 0.0), dict(model.named_parameters())
    tokens = torch.randint(1280, (33,), generator=torch.Generator().manual_seed(dist.get_rank()))
    model(tokens[:-1], PackedDocuments([32]), torch.arange(32), tokens[1:]).backward()
    optimizer.step()
    return {
        "gradients": {name for name, p in parameters.items() if p.grad is not None},
        "trainable": {name for name, p in parameters.items() if p.requires_grad},
        "fp32": {name for name, p in parameters.items() if p.dtype == torch.float32},
        "moments": {name for name, p in parameters.items() if p in optimizer.state},
        "moved": all(bool(p.grad.to_local().any()) for p in parameters.values() if p.grad is not None),
        "asks": asks,
    }


@pytest.mark.parametrize("parts", fast_only("last:1,norm | embed_tokens | lm_head", PARTS))
@pytest.mark.parametrize("world", [pytest.param(1, marks=slow), 2])
def test_what_is_frozen_has_no_gradient_and_no_moments_and_below_it_autograd_does_nothing(
    ranks, folders, world, parts
):
    """C35, C7: the input of the lowest trained layer asks for no gradient; bf16 is kept of what is frozen alone."""
    for found in ranks(world, step_of, folders["untied"], parts, torch.bfloat16):
        names = {name for name, _ in Llama(CONFIG).named_parameters() if name.startswith(PARTS[parts])}
        assert names and found["gradients"] == found["trainable"] == found["moments"] == found["fp32"] == names
        assert found["moved"]
        lowest = min(0 if "embed" in p else int(p[7]) if p.startswith("layers") else 2 for p in PARTS[parts])
        for layer in range(2):
            assert found["asks"][layer] == (layer > lowest or "embed_tokens" in parts)
            assert found["asks"][f"{layer} out"] == (layer >= lowest)


@pytest.mark.parametrize("size, parts", [
    pytest.param(1, "last:1", marks=slow), pytest.param(2, "norm", marks=slow), (2, "last:1,norm")])  # fmt: skip
def test_frozen_weights_are_exported_as_they_were(run, folders, size, parts):
    """C35: bit for bit; the rest has moved, and a checkpoint holds nothing else."""
    out = run(size, "out", train_layers=parts, max_steps=3)
    before, after = (load_file(path / "model.safetensors") for path in (folders["untied"], out / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.removeprefix("model.").startswith(PARTS[parts])}
    assert before.keys() == after.keys() and moved == expected and not (out / "adapter").exists()
    kept = load_file(published(out / "checkpoints")[-1] / "model.safetensors")
    assert {f"model.{name}" for name in kept} == expected
    assert {f"model.{name.rpartition('.')[0]}" for name in final_state(out) if ".exp_avg" in name} == expected
    assert summary_of(out)["after"]["loss"] < summary_of(out)["before"]["loss"]


@slow
def test_frozen_runs_are_the_same_on_any_number_of_ranks(run):
    """C2: to fp32 rounding."""
    expected = losses_of(run(1, "out1", train_layers="last:1,norm"))
    assert losses_of(run(4, "out4", train_layers="last:1,norm")) == pytest.approx(expected, abs=1e-4)


def test_both_ends_of_a_tied_matrix_are_trained_or_neither(run, folders, data):
    """C31: one alone is refused, both are one matrix that is trained once."""
    for part in ("lm_head", "embed_tokens", "last:1,lm_head"):
        assert_refused(settings(folders["tied"], data, Path("nowhere"), train_layers=part),
                       f"--train_layers {part.split(',')[-1]}: lm_head and embed_tokens are one matrix")
    out = run(2, "out", model="tied", train_layers="lm_head,embed_tokens", max_steps=2)
    before, after = (load_file(path / "model.safetensors") for path in (folders["tied"], out / "model"))
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["model.embed_tokens.weight"]


# Mistakes


def assert_refused(chosen: TrainingSettings, expected: str) -> None:
    with pytest.raises(UserError) as error:
        fsdp_train.read(chosen)
    assert expected in str(error.value) and "\n" not in str(error.value), error.value


CONTRADICTIONS = [
    ({"lora_rank": -1}, "--lora_rank -1: expected 0 to 65536"),
    ({"lora_rank": 4, "adapter": "a"}, "--lora_rank 4: expected 0 with --adapter"),
    ({"lora_rank": 4, "model": "tiny"}, "--lora_rank 4: expected 0 with --model tiny"),
    ({"adapter": "a", "model": "tiny"}, "--adapter a: expected a pretrained --model"),
    *(({"lora_rank": 4, "lora_alpha": alpha}, f"--lora_alpha {alpha}: expected more than 0")
      for alpha in (0.0, -1.0, float("inf"), float("nan"))),
    *(({"lora_rank": 4, "lora_dropout": part}, f"--lora_dropout {part}: expected 0 to 1, without 1")
      for part in (1.0, -0.1, float("nan"))),
    ({"quantize": "int8"}, "--quantize int8: expected --lora_rank or --adapter"),
    ({"quantize": "nf4", "train_layers": "last:1"}, "--quantize nf4: expected --lora_rank or --adapter"),
    ({"quantize": "nf4", "model": "tiny"}, "--quantize nf4: expected --lora_rank or --adapter"),
    ({"train_layers": "last:1", "lora_rank": 4}, "--train_layers last:1: expected all with an adapter"),
    ({"train_layers": "norm", "adapter": "a"}, "--train_layers norm: expected all with an adapter"),
    *(({"train_layers": parts}, f"--train_layers {parts}: expected all, or last:N and any of norm")
      for parts in ("last:0", "last:", "last:-1", "last:x", "last", "", "norms", "all,norm", "norm,", "norm, lm_head",
                    "last:1;norm", "layers.1")),
]


@pytest.mark.parametrize("given, expected", CONTRADICTIONS, ids=[str(given) for given, _ in CONTRADICTIONS])
def test_flags_that_contradict_each_other_are_one_line_that_names_them(monkeypatch, given, expected):
    """Before anything is read."""
    monkeypatch.setattr(sys, "argv", ["path/to/fsdp_train.py"])
    with pytest.raises(UserError) as error:
        TrainingSettings(data="imdb", **({"model": "a folder"} | given))
    assert str(error.value).startswith(f"fsdp_train.py: {expected}") and "\n" not in str(error.value)


def test_several_contradictions_are_told_at_once():
    """One line still."""
    with pytest.raises(UserError) as error:
        TrainingSettings(data="imdb", model="tiny", lora_rank=4, train_layers="norm", lora_dropout=2.0)
    told = str(error.value)
    assert all(flag in told for flag in ("--lora_rank 4", "--train_layers norm", "--lora_dropout 2.0"))
    assert "\n" not in told


@pytest.mark.parametrize("flag, value", [
    ("lora_variant", "vera"), ("quantize", "fp4"), ("optimizer", "adam"), ("lora_rank", "four"), ("lora_rank", "1.5"),
    ("lora_alpha", "much"),
])
def test_a_choice_that_there_is_not_is_one_line_that_names_the_flag(flag, value):
    """R18: as for every other flag."""
    with pytest.raises(UserError, match=rf"--{flag}.*{value}") as error:
        parse(TrainingSettings, ["--data", "imdb", "--model", "m", f"--{flag}", value])
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_model_is_refused_before_a_folder_is_made(folders, data, tmp_path):
    """R18: layers, widths and names that it has not; an adapter that is none, or another model's."""
    made = partial(settings, data=data, output=tmp_path / "out")
    refusals = [
        (made(folders["untied"], train_layers="last:3"), "--train_layers last:3: the model has 2 layers"),
        (made(folders["untied"], **LORA, lora_targets="q_proj,qkv_proj"), "LoRA target 'qkv_proj': no such linear"),
        (made(folders["untied"], **LORA, lora_targets=""), "LoRA target '': no such linear"),
        (made(folders["narrow"], **LORA, quantize="nf4"), "down_proj has 96 columns, expected a multiple of 64"),
        (made(folders["untied"], adapter=str(tmp_path / "nowhere")), "adapter_config.json: is missing"),
    ]
    for chosen, expected in refusals:
        assert_refused(chosen, expected)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused_on_every_rank(ranks, run, folders, data, cache, tmp_path):
    """R18, C37: the shapes are told; nothing of it is trained on."""
    out = run(1, "out", **LORA, max_steps=1)
    shutil.copytree(out / "adapter", tmp_path / "adapter")
    chosen = settings(folders["narrow"], data, tmp_path / "other", 2, adapter=str(tmp_path / "adapter"))
    for told in ranks(2, refused, cache, chosen):
        assert "is F32 [128, 4], expected F32 [96, 4]" in told and "\n" not in told
    assert not list((tmp_path / "other").glob("checkpoints/*")) and not (tmp_path / "other/adapter").exists()


def export(saved: Path, out: Path, moved_base: str | None = None) -> None:
    checkpoints.export(saved, out, moved_base)


EXPORTED = {
    "all": ({"learning_rate": 1e-3}, "model"),
    "last layer": ({"train_layers": "last:1,norm", "learning_rate": 1e-3, "optimizer": "adamw8bit"}, "model"),
    "adapter": ({**LORA, "quantize": "int8"}, "adapter"),
    "dora": ({**LORA, "lora_variant": "dora", "lora_targets": "q_proj,up_proj"}, "adapter"),
}


@pytest.mark.parametrize("case", fast_only("adapter", EXPORTED))
@pytest.mark.slow
def test_the_newest_checkpoint_exports_to_what_the_run_left_and_an_older_one_to_less(run, tmp_path, case):
    """R24: on one process what two have trained, every file of it but the time."""
    changes, result = EXPORTED[case]
    out = run(2, "out", save_every=2, **changes)
    older, newest = published(out / "checkpoints")
    export(newest, tmp_path / "newest")
    export(older, tmp_path / "older")
    expected = {p.name: p.read_bytes() for p in (out / result).iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "newest").iterdir()} == expected
    weights = next(name for name in expected if name.endswith(".safetensors"))
    assert (tmp_path / "older" / weights).read_bytes() != expected[weights]
    assert {p.name for p in (tmp_path / "older").iterdir()} == expected.keys()


def test_an_export_needs_the_weights_that_the_run_began_with(run, folders, data, cache, ranks, tmp_path):
    """R7, R17: another base under the same path; a name that is taken; a damaged checkpoint."""
    base = shutil.copytree(folders["untied"], tmp_path / "base")
    chosen = settings(base, data, tmp_path / "out", train_layers="last:1", max_steps=1)
    ranks(1, train_here, cache, chosen)
    (saved,) = published(tmp_path / "out/checkpoints")
    with pytest.raises(UserError, match="exists already"):
        export(saved, tmp_path / "out/model")
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="began with other weights"):
        export(saved, tmp_path / "exported")
    shutil.copy(folders["untied"] / "model.safetensors", base)
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        export(saved, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_tiny_run_of_frozen_layers_exports_with_the_weights_it_drew(ranks, data, cache, tmp_path):
    """R24: what was frozen is not in the checkpoint; the seed is."""
    chosen = TrainingSettings(data=str(data), template="imdb", output=str(tmp_path / "out"), max_length=192,
                              train_layers="last:1", max_steps=2, batch_size=4, eval_limit=8, seed=3).with_recipe(1)
    ranks(1, train_here, cache, chosen)
    export(published(tmp_path / "out/checkpoints")[-1], tmp_path / "exported")
    expected = (tmp_path / "out/model/model.safetensors").read_bytes()
    assert (tmp_path / "exported/model.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_an_export_finds_a_base_that_has_moved_and_refuses_nonsense(ranks, folders, data, cache, tmp_path):
    """R7, R14: whose digest is right, too."""

    base = shutil.copytree(folders["untied"], tmp_path / "base")
    ranks(1, train_here, cache, settings(base, data, tmp_path / "out", train_layers="last:1", max_steps=1))
    (saved,) = published(tmp_path / "out/checkpoints")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base"):
        export(saved, tmp_path / "exported")
    export(saved, tmp_path / "exported", str(tmp_path / "moved"))
    assert (tmp_path / "exported/model.safetensors").exists()
    (tmp_path / "moved").rename(base)
    for name in (".", "/", "..", ""):
        with pytest.raises(UserError, match="exists already"):
            export(saved, Path(name))
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "variant": "lora", "targets": ["q_proj"]}
    for change in ({"quantize": "bogus"}, {"quantize": []}, {"train_layers": 7}, {"train_layers": "last:x"},
                   {"lora": lora | {"rank": -1}}, {"lora": lora | {"targets": 3}}, {"lora": {"rank": 1}}, {"lora": 5},
                   {"model": 3}, {"model": None}, {"seed": 1} | {"lora": lora | {"rank": "2"}}):
        kept = (saved / "manifest.json").read_text()
        rewrite(saved, lambda content, change=change: content["settings"].update(change))
        with pytest.raises(UserError) as error:
            export(saved, tmp_path / "nonsense")
        assert "\n" not in str(error.value)
        (saved / "manifest.json").write_text(kept)
    assert not (tmp_path / "nonsense").exists()


def sharded_kinds(model: Path, **changes) -> dict[bool, set[str]]:
    """{whether it is trained: classes of its parameters and their local values}."""
    chosen = settings(model, Path("unused"), Path("unused"), **changes)
    adapted = Changes(chosen.quantize, chosen.asked_adapter(), chosen.train_layers)
    built = build(Base.open(str(model)).config, this_process(), torch.bfloat16, change=adapted.apply)
    kinds = {True: set(), False: set()}
    for parameter in built.parameters():
        kinds[parameter.requires_grad].add(type(parameter.data).__name__)
    return kinds


@pytest.mark.parametrize("changes", [
    pytest.param(LORA, marks=slow), LORA | {"quantize": "nf4"}, pytest.param({"train_layers": "last:1"}, marks=slow),
], ids=str)  # fmt: skip
def test_one_rank_shards_only_what_it_trains_and_two_shard_everything(ranks, folders, changes):
    """C35: alone, a gathered copy of frozen weights would cost time and memory for nothing."""
    (alone,) = ranks(1, sharded_kinds, folders["untied"], **changes)
    assert alone == {True: {"DTensor"}, False: {"Tensor"}}
    assert ranks(2, sharded_kinds, folders["untied"], **changes) == [{True: {"DTensor"}, False: {"DTensor"}}] * 2
