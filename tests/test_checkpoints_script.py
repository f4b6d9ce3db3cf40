"""checkpoints.py: what a run's checkpoints are, whether they are whole, and what each exports to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import same
from safetensors.torch import load_file
from sharded import whole

import checkpoints
from llama.boundary.errors import UserError
from llama.model import Llama
from llama.parallel.processes import join
from llama.storage.base import TINY, Base
from llama.storage.checkpoint import Saver
from llama.storage.manifest import Manifest, published, read_manifest
from llama.storage.peft import Adapter, read_adapter
from llama.training.optim import build_adamw
from llama.training.state import training_state
from lora import Changes, open_model

# What checkpoints.py reads of a run's identity.
IDENTITY = {"model": "tiny", "base": None, "seed": 3, "quantize": "none", "train_layers": "all", "lora": None}
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "variant": "dora", "targets": ["q_proj", "up_proj"]}


def save_run(folder: Path, steps: list[int], losses: dict | None = None, **changed) -> Path:
    """A run of a model of the tiny shape, with checkpoints of these steps; after each the trained weights grow by 1."""
    identity = IDENTITY | changed
    adapter = Adapter(**LORA | {"targets": tuple(LORA["targets"])}) if identity["lora"] else None
    changes = Changes(identity["quantize"], adapter, identity["train_layers"])
    model = Llama(TINY)
    changes.apply(model)
    Base.open(identity["model"]).load(model, identity["seed"])
    changes.load(model, identity["seed"])
    optimizer = build_adamw(model, 0.1, 0.0)
    saver = Saver(folder / "checkpoints", -1)
    for step in steps:
        held_out = {"loss": losses[step], "n": 8} if losses and step in losses else {}
        saver.save(step, training_state(model, optimizer), identity, {}, held_out)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 1
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """checkpoints.py in this process, with these words behind it: what it prints."""

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["checkpoints.py", *map(str, words)])
        capsys.readouterr()
        checkpoints.main()
        return capsys.readouterr().out

    return call


def test_the_command_lists_and_verifies(tmp_path, call, capsys):
    """R5: what is there, what keeps it, what is damaged; an error where anything is."""
    folder = save_run(tmp_path, [1, 2, 3], losses={1: 0.1, 3: 0.4}) / "checkpoints"
    (folder / "step-000002/keep").touch()
    (folder / "step-000004.tmp").mkdir()
    lines = call("list", tmp_path).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step-000001", "step-000002", "step-000003", "step-000004.tmp"]
    first, second, third, fourth = lines
    assert first.endswith("loss 0.1  n 8  best") and second.endswith("pinned") and third.endswith("newest")
    assert "1 rank " in first and "unfinished" in fourth
    whole = ["step-000001 is whole", "step-000002 is whole", "step-000003 is whole"]
    assert call("verify", tmp_path).splitlines() == whole
    assert call("verify", tmp_path, "--step", "step-2").splitlines() == whole[1:2]
    (folder / "step-000002/model.safetensors").write_text("x")
    (folder / "step-000001/manifest.json").write_text("x")
    assert call("verify", tmp_path, "--step", "best") == "step-000003 is whole\n"
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        call("verify", tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "step-000001 is damaged", "step-000002 is damaged", "step-000003 is whole"]  # fmt: skip
    assert "damaged" in call("list", tmp_path).splitlines()[0]


def test_the_commands_mistakes_are_one_line(tmp_path, call):
    """C4: where, what was found, what was expected."""
    save_run(tmp_path, [1])
    for words, expected in (
        (["list", tmp_path / "absent"], "absent: has no checkpoint, expected the folder of a run"),
        (["frob", tmp_path], "invalid choice: 'frob'"),
        ([], "required: command"),
        (["verify", tmp_path, "--step", "step-9"], "has no checkpoint 'step-9'"),
        (["verify", tmp_path, "--step", "best"], "no checkpoint has a held-out"),
        (["export", tmp_path], "required: out"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            call(*words)
        assert len(error.value.lines) == 1 and "\n" not in str(error.value)


@pytest.mark.slow
def test_as_a_process_a_mistake_ends_with_status_2(tmp_path):
    """C4: one line on stderr, nothing on stdout."""
    words = [sys.executable, Path(checkpoints.__file__), "list", tmp_path / "absent"]
    done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True)
    told = f"{tmp_path}/absent: has no checkpoint, expected the folder of a run, such as runs/imdb-tiny\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_a_checkpoint_exports_the_model_as_it_was_at_its_step(tmp_path, call):
    """R24: the newest one where no step is named; with the tokenizer, as a folder that opens as a base."""
    save_run(tmp_path / "run", [1, 2])
    for name, flags, grown, dtype in (
        ("newest", [], 1, "bfloat16"), ("older", ["--step", "step-1", "--dtype", "float32"], 0, "float32")
    ):  # fmt: skip
        out = tmp_path / name
        said = call("export", tmp_path / "run", out, *flags)
        assert said == f"{out}: the model after step {1 + grown}; exported in {dtype}\n"
        assert Base.pretrained(str(out)).dtype == getattr(torch, dtype)
        expected = Llama(TINY)
        Base.tiny().load(expected, seed=3)
        for parameter, tensor in load_file(out / "model.safetensors").items():
            wanted = expected.get_parameter(parameter.removeprefix("model.")) + grown
            assert torch.equal(tensor, wanted.to(tensor.dtype)), parameter
        assert Base.pretrained(str(out)).config == TINY


def test_a_checkpoint_of_trained_layers_exports_with_the_frozen_weights_that_the_seed_draws(tmp_path, call):
    """R24: what was frozen is not in the checkpoint; the seed is."""
    save_run(tmp_path / "run", [1, 2], train_layers="last:1")
    assert not any("layers.0" in name for name in load_file(tmp_path / "run/checkpoints/step-000002/model.safetensors"))
    call("export", tmp_path / "run", tmp_path / "out")
    drawn = Llama(TINY)
    Base.tiny().load(drawn, seed=3)
    found = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in found.items():
        grown = 1 if "layers.1" in name else 0
        wanted = drawn.get_parameter(name.removeprefix("model.")) + grown
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name


def test_a_checkpoint_of_an_adapter_exports_the_adapter(tmp_path, call):
    """R24: in PEFT's format, with the settings that the run had."""
    save_run(tmp_path / "tiny", [1])
    call("export", tmp_path / "tiny", tmp_path / "base")
    base = Base.pretrained(str(tmp_path / "base"))
    save_run(tmp_path / "run", [1, 2], lora=LORA, quantize="int8", model=base.name, base=base.fingerprint)
    with pytest.raises(UserError, match="--dtype bfloat16: .* is of an adapter, which is kept in float32"):
        call("export", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert call("export", tmp_path / "run", tmp_path / "out") == f"{tmp_path / 'out'}: the adapter after step 2\n"
    assert read_adapter(tmp_path / "out") == Adapter(2, 4.0, 0.0, "dora", ("q_proj", "up_proj"))
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == base.name
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    in_checkpoint = load_file(tmp_path / "run/checkpoints/step-000002/model.safetensors")
    assert len(weights) == len(in_checkpoint) == 2 * 2 * 3
    for name, tensor in in_checkpoint.items():
        their_name = "base_model.model.model." + name.replace("_vector.weight", "_vector")
        assert torch.equal(weights[their_name], tensor)


def weights_of(base: Base, **changes) -> dict[str, torch.Tensor]:
    """Of the model that evaluate.py and generate.py would use."""
    with join() as process:
        model = open_model(base, Changes(train_layers="none", **changes), process, torch.float32)
        return {name: whole(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("trained", [pytest.param("all", marks=pytest.mark.slow), "last:1,norm"])
@pytest.mark.parametrize("kind", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_checkpoint_opened_as_a_model_is_the_model_that_it_exports_to(tmp_path, call, trained, kind):
    """R24: also packed, and also where frozen weights come from the base."""
    run = save_run(tmp_path / "run", [1, 2], train_layers=trained)
    call("export", run, tmp_path / "out", "--dtype", "float32")
    saved = Base.pretrained(str(run / "checkpoints/step-000002"))
    if kind == "nf4" and trained != "all":
        with pytest.raises(UserError, match="--quantize: only weights from files are rounded"):
            weights_of(saved, quantize=kind)
        return
    (run / "checkpoints/step-000002/optimizer.safetensors").unlink()  # it is not needed
    assert same(weights_of(saved, quantize=kind), weights_of(Base.pretrained(str(tmp_path / "out")), quantize=kind))
    with pytest.raises(UserError, match="has no config.json, .*checkpoints.py export RUN OUT --step step-N"):
        Base.open(str(run / "checkpoints/step-000002"))  # nothing is trained on a folder that a run may delete


@pytest.mark.slow
def test_an_adapters_checkpoint_on_its_base_is_the_adapter_that_it_exports_to(tmp_path, call):
    """R24, C37."""
    save_run(tmp_path / "tiny", [1])
    call("export", tmp_path / "tiny", tmp_path / "base")
    base = Base.pretrained(str(tmp_path / "base"))
    run = save_run(tmp_path / "run", [1, 2], lora=LORA, quantize="nf4", model=base.name, base=base.fingerprint)
    call("export", run, tmp_path / "out")
    found = []
    for folder in (run / "checkpoints/step-000002", tmp_path / "out"):
        found.append(weights_of(base, quantize="nf4", adapter=read_adapter(folder), adapter_folder=str(folder)))
    assert same(*found) and any("lora_magnitude" in name for name in found[0])
    with pytest.raises(UserError, match="step-000001: holds an adapter, expected a model; give it as --adapter"):
        Base.pretrained(str(run / "checkpoints/step-000001"))
    with pytest.raises(UserError, match="step-000001: holds a model, expected an adapter; give it as --model"):
        read_adapter(tmp_path / "tiny/checkpoints/step-000001")
    weights = run / "checkpoints/step-000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors: damaged: .* bytes.*; the one before it is step-000001"):
        weights_of(base, quantize="nf4", adapter=read_adapter(weights.parent), adapter_folder=str(weights.parent))


@pytest.mark.slow
def test_an_export_needs_the_weights_that_the_run_began_with(tmp_path, call):
    """R7, R17: another base under the same path, a base that has moved, a name that is taken, a damaged checkpoint."""
    save_run(tmp_path / "tiny", [1])
    call("export", tmp_path / "tiny", tmp_path / "base")
    base = Base.pretrained(str(tmp_path / "base"))
    run = save_run(tmp_path / "run", [1], model=str(tmp_path / "base"), base=base.fingerprint)
    for name in (str(tmp_path / "base"), ".", "/", ".."):
        with pytest.raises(UserError, match="exists already"):
            call("export", run, name)
    (tmp_path / "base").rename(tmp_path / "moved")
    way_out = r"if it has moved: python checkpoints.py export .*run OUT --step step-000001 --model FOLDER"
    with pytest.raises(UserError, match=rf"base: no such folder.*; {way_out}"):
        call("export", run, tmp_path / "out")
    call("export", run, tmp_path / "out", "--model", tmp_path / "moved")
    shutil.rmtree(tmp_path / "out")
    weights = bytearray((tmp_path / "moved/model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "moved/model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="the run began with other weights or another config.json than .*moved now"):
        call("export", run, tmp_path / "out", "--model", tmp_path / "moved")
    weights[len(weights) // 2] ^= 1
    (tmp_path / "moved/model.safetensors").write_bytes(weights)
    (run / "checkpoints/step-000001/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        call("export", run, tmp_path / "out", "--model", tmp_path / "moved")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [
    {"quantize": "bogus"}, {"quantize": []}, {"train_layers": 7}, {"train_layers": "last:x"}, {"lora": 5},
    {"lora": LORA | {"rank": -1}}, {"lora": LORA | {"rank": "2"}}, {"lora": LORA | {"rank": 10**30}},
    {"lora": LORA | {"targets": 3}}, {"lora": LORA | {"targets": ["side_proj"]}}, {"lora": {"rank": 1}},
    {"lora": LORA | {"more": 1}}, {"model": 3}, {"model": None}, {"model": "nowhere"}, {},
], ids=str)  # fmt: skip
def test_a_manifest_that_does_not_say_what_the_run_was_is_one_line(tmp_path, call, change):
    """R7, R14: also where its digest is right."""
    path = save_run(tmp_path / "run", [1]) / "checkpoints/step-000001"
    manifest = read_manifest(path)
    identity = IDENTITY | change if change else {}
    text = Manifest(1, 1, identity, {}, {}, manifest.files).to_text()
    (path / "manifest.json").write_text(text)
    assert json.loads(text)["settings"] == identity and published(tmp_path / "run/checkpoints") == [path]
    with pytest.raises(UserError) as error:
        call("export", tmp_path / "run", tmp_path / "out")
    message = str(error.value)
    assert "\n" not in message and (str(path) in message or "side_proj" in message or "nowhere" in message)
    assert sorted(os.listdir(tmp_path)) == ["run"]
