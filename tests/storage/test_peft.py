"""An adapter's two files are PEFT's: written here and opened there, the other way round, and refused where damaged."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import (
    BIASED_FAST,
    ODD,
    ONE_VARIANT_FAST,
    SEVEN,
    TOKENS,
    assert_near,
    loss,
    opened,
    read_back,
    shake,
    their_logits,
    transformers_model,
    write_adapter,
    write_bases,
    write_dora,
)
from safetensors.torch import load_file, save_file
from sharded import whole
from torch.nn import functional as F

from llama.boundary.errors import UserError
from llama.model import Llama
from llama.storage.peft import Adapter, adapter_notes, load_adapter, read_adapter, save_adapter
from lora import apply_adapter


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return write_dora(tmp_path_factory.mktemp("saved") / "adapter")


@pytest.mark.parametrize("base", BIASED_FAST)
@pytest.mark.parametrize("variant", ONE_VARIANT_FAST)
def test_an_adapter_we_save_opens_in_peft_and_computes_the_same(ranks, bases, tmp_path, variant, base):
    """C37, C39: saved by two ranks, whole; PEFT warns of nothing missing and gives equal logits."""
    peft = pytest.importorskip("peft")
    adapter = Adapter(4, 6.0, dropout=0.1, variant=variant)
    written = ranks(2, write_adapter, bases[base], tmp_path / "adapter", adapter)[0]
    model = transformers_model(bases[base])
    alone = their_logits(model)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert_near(their_logits(model), written["logits"])
    assert (alone - written["logits"]).abs().max() > 0.1
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6.0, 0.1)
    assert (config.use_rslora, config.use_dora, config.bias) == (variant == "rslora", variant == "dora", "none")
    assert config.target_modules == set(SEVEN) and config.base_model_name_or_path == str(bases[base])
    theirs = peft.get_peft_model_state_dict(model)
    assert {name for name in theirs} == set(load_file(tmp_path / "adapter/adapter_model.safetensors"))


@pytest.mark.parametrize("base", BIASED_FAST)
@pytest.mark.parametrize("variant", ONE_VARIANT_FAST)
def test_an_adapter_that_peft_saves_loads_here_and_computes_the_same(ranks, bases, tmp_path, variant, base):
    """C37, C39: every setting PEFT writes is understood, on one rank and on two."""
    peft = pytest.importorskip("peft")
    asked = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=variant == "rslora",
                            use_dora=variant == "dora", target_modules=SEVEN, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers_model(bases[base]), asked).eval()
    shake(model)
    model.save_pretrained(tmp_path / "theirs")
    expected = their_logits(model)
    adapter = read_adapter(tmp_path / "theirs")
    assert replace(adapter, targets=()) == Adapter(4, 6, 0.1, variant, ())
    for world in (1, 2):
        assert_near(ranks(world, read_back, bases[base], tmp_path / "theirs")[-1]["logits"], expected)


def test_an_adapter_on_what_peft_calls_all_linear_loads_here(ranks, bases, tmp_path):
    """C37: of a small model PEFT then lists every linear by its whole name, such as model.layers.1.mlp.up_proj."""
    peft = pytest.importorskip("peft")
    asked = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers_model(bases["odd"]), asked).eval()
    shake(model)
    model.save_pretrained(tmp_path / "theirs")
    assert_near(ranks(1, read_back, bases["odd"], tmp_path / "theirs")[0]["logits"], their_logits(model))


def gradients(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = opened(base, read_adapter(folder))
    load_adapter(model, folder)
    loss(model.eval()).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", ONE_VARIANT_FAST)
def test_gradients_are_those_of_peft(ranks, bases, tmp_path, variant):
    """C37, C39: through a whole model, of the summed loss."""
    peft = pytest.importorskip("peft")
    ranks(1, write_adapter, bases["biased"], tmp_path / "adapter", Adapter(4, 6.0, variant=variant))
    base = transformers_model(bases["biased"])
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    F.cross_entropy(model(TOKENS[None]).logits[0, :-1], TOKENS[1:], reduction="sum").backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (found,) = ranks(1, gradients, bases["biased"], tmp_path / "adapter")
    assert len(found) == len(theirs) == 14 * (3 if variant == "dora" else 2)
    for name, gradient in found.items():
        their = theirs["base_model.model.model." + name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(gradient, their, rtol=1e-4, atol=1e-5 * float(their.abs().max()))


@pytest.mark.parametrize("variant", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_an_adapters_file_holds_whole_tensors_and_reads_back_bitwise_on_any_number_of_ranks(
    ranks, bases, tmp_path, variant
):
    """C37: from 4 ranks, some of which hold no row of an A; none is empty, none a slice."""
    adapter = Adapter(3, 6.0, variant=variant, targets=("q_proj", "down_proj"))
    written = ranks(4, write_adapter, bases["odd"], tmp_path / "adapter", adapter)[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json",
                                                                       "adapter_model.safetensors"]
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(stored) == len(written["values"]) == 4 * (3 if variant == "dora" else 2)
    for name, value in written["values"].items():
        in_file = stored["base_model.model.model." + name.replace("vector.weight", "vector")]
        assert in_file.numel() and torch.equal(in_file, value) and in_file.dtype == torch.float32
    for world in (1, 2, 4):
        found = ranks(world, read_back, bases["odd"], tmp_path / "adapter")[-1]
        assert all(torch.equal(found["values"][name], value) for name, value in written["values"].items())
        assert_near(found["logits"], written["logits"], 1e-6)


def test_an_adapter_on_one_layer_alone_reads_back_as_one(ranks, bases, tmp_path):
    """C37: its config must say so, or it could never be opened again."""
    adapter = Adapter(4, 8.0, targets=("1.self_attn.q_proj", "0.mlp.up_proj"))
    written = ranks(1, write_adapter, bases["odd"], tmp_path / "adapter", adapter)[0]
    assert len(written["values"]) == 4
    assert_near(ranks(1, read_back, bases["odd"], tmp_path / "adapter")[0]["logits"], written["logits"])


def write_twice(base: Path, folder: Path) -> list[str]:
    model, message = opened(base, Adapter(4, 8.0)), []
    save_adapter(model, folder, Adapter(4, 8.0), "base")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shake(model)
    for _ in range(2):
        try:
            save_adapter(model, folder, Adapter(4, 8.0), "base")
        except UserError as error:
            message.append(str(error))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    return message


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_saving_over_a_folder_that_exists_is_refused_on_every_rank(ranks, bases, tmp_path, world):
    """R17: the first result stays as it is."""
    for message in ranks(world, write_twice, bases["odd"], tmp_path / "adapter"):
        assert len(message) == 2 and all("adapter: exists already" in line and "\n" not in line for line in message)


A_NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
DAMAGE = {
    "missing": (lambda t: t.pop(A_NAME), "lacks 'base_model.model.model.layers.1.mlp.up_proj.lora_A.weight'"),
    "no magnitude": (lambda t: t.pop(A_NAME.replace("lora_A.weight", "lora_magnitude_vector")), "lacks 'base_model"),
    "foreign": (lambda t: t.update({A_NAME.replace("up_proj", "side_proj"): torch.ones(4, 30)}), "which nothing asks"),
    "of another layer": (lambda t: t.update({A_NAME.replace("1", "2"): t[A_NAME].clone()}), "which nothing asks for"),
    "a saved head": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(97, 30)}), "which nothing asks"),
    "another rank": (lambda t: t.update({A_NAME: torch.ones(8, 30)}), "F32 [8, 30], expected F32 [4, 30]"),
    "transposed": (lambda t: t.update({A_NAME: t[A_NAME].t().contiguous()}), "F32 [30, 4], expected F32 [4, 30]"),
    "empty": (lambda t: t.update({A_NAME: torch.zeros(0)}), "F32 [0], expected F32 [4, 30]"),
    "integers": (lambda t: t.update({A_NAME: torch.ones(4, 30, dtype=torch.int32)}), "I32 [4, 30], expected F32"),
    "NaN": (lambda t: t[A_NAME][3].__setitem__(29, math.nan), "is not finite"),
    "infinite": (lambda t: t[A_NAME][0].__setitem__(0, -math.inf), "is not finite"),
    "nothing": (lambda t: t.clear(), "lacks 'base_model"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_tensors_that_are_not_those_of_the_adapter_are_refused_in_one_line(saved, tmp_path, case):
    """C37, C4: missing, foreign, misshapen, empty, not finite."""
    change, expected = DAMAGE[case]
    shutil.copytree(saved, tmp_path / "adapter")
    tensors = load_file(saved / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    assert_load_refused(tmp_path / "adapter", expected)


def assert_load_refused(folder: Path, expected: str) -> None:
    model = Llama(ODD)
    apply_adapter(model, read_adapter(folder))
    with pytest.raises(UserError) as error:
        load_adapter(model, folder)
    assert expected in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_weights_that_is_cut_or_absent_is_refused_in_one_line(saved, tmp_path):
    """C37: also one of pickles, which is never opened."""
    for name in ("cut", "absent", "pickled"):
        shutil.copytree(saved, tmp_path / name)
        path = tmp_path / name / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1]) if name == "cut" else path.unlink()
    torch.save({}, tmp_path / "pickled/adapter_model.bin")
    assert_load_refused(tmp_path / "cut", "not a whole safetensors file")
    assert_load_refused(tmp_path / "absent", "has neither adapter_model.safetensors nor")
    assert_load_refused(tmp_path / "pickled", "has neither adapter_model.safetensors nor")


def load_damaged(base: Path, folder: Path) -> str:
    model = opened(base, read_adapter(folder))
    try:
        load_adapter(model, folder)
    except UserError as error:
        return str(error)
    return ""


def test_a_nan_that_one_rank_alone_reads_stops_all_of_them(ranks, bases, saved, tmp_path):
    """C4, C37: the last row is the last rank's."""
    shutil.copytree(saved, tmp_path / "adapter")
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors[A_NAME][3, 0] = math.nan
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    for message in ranks(2, load_damaged, bases["odd"], tmp_path / "adapter"):
        assert f"{A_NAME} is not finite" in message


SETTINGS = {
    "peft_type": {"peft_type": "IA3"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "layers_to_transform": {"layers_to_transform": [0]},
    "layers_to_transform one": {"layers_to_transform": 1},
    "exclude_modules": {"exclude_modules": ["q_proj"]},
    "target_parameters": {"target_parameters": ["weight"]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "kasa_config": {"kasa_config": {"beta": 0.1}},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "use_qalora": {"use_qalora": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},  # its base is what pissa left of it
    "init_lora_weights loftq": {"init_lora_weights": "loftq"},  # it makes up for the rounding of a packed base
    "init_lora_weights unknown": {"init_lora_weights": "from 2031"},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "use_dora": {"use_dora": True, "use_rslora": True},
    "r": {"r": 0},
    "r negative": {"r": -4},
    "r string": {"r": "8"},
    "r float": {"r": 8.0},
    "r true": {"r": True},
    "r null": {"r": None},
    "r list": {"r": [8]},
    "lora_alpha string": {"lora_alpha": "16"},
    "lora_alpha NaN": {"lora_alpha": math.nan},
    "lora_alpha infinite": {"lora_alpha": math.inf},
    "lora_alpha beyond floats": {"lora_alpha": 10**400},
    "lora_dropout": {"lora_dropout": 1.0},
    "lora_dropout negative": {"lora_dropout": -0.1},
    "lora_dropout string": {"lora_dropout": "0.1"},
    "target_modules null": {"target_modules": None},
    "target_modules numbers": {"target_modules": [1, 2]},
    "target_modules object": {"target_modules": 7},
    "target_modules none": {"target_modules": []},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_would_be_computed_otherwise_is_refused_by_name(saved, tmp_path, case):
    """C37, C39: PEFT would give other logits, so no adapter is opened half understood."""
    config = json.loads((saved / "adapter_config.json").read_text()) | {"use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | SETTINGS[case]))
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path)
    message = str(error.value)
    assert str(tmp_path / "adapter_config.json") in message and "\n" not in message and len(message) < 600
    assert case.split()[0] in message, message


def test_settings_that_change_nothing_are_not_refused(saved, tmp_path):
    """PEFT writes dozens of them, most as null or empty."""
    config = json.loads((saved / "adapter_config.json").read_text())
    harmless = {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
                "fan_in_fan_out": False, "lora_bias": False, "layer_replication": None, "use_qalora": False,
                "init_lora_weights": True, "megatron_core": "megatron.core", "revision": None, "a new one": None,
                "exclude_modules": None, "loftq_config": {}, "auto_mapping": None, "peft_version": "0.99",
                "ensure_weight_tying": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | harmless))
    assert replace(read_adapter(tmp_path), targets=()) == Adapter(4, 8.0, 0.0, "dora", ())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "all-linear"}))
    assert read_adapter(tmp_path).targets == ("all-linear",)
    assert adapter_notes(tmp_path) == [] == adapter_notes(None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | harmless | {"a new one": False, "more": [1]}))
    assert adapter_notes(tmp_path) == [f"{tmp_path / 'adapter_config.json'}: not used: 'a new one', 'more'"]


def test_every_setting_that_peft_writes_is_known(bases, tmp_path):
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert adapter_notes(tmp_path) == [] and read_adapter(tmp_path).rank == 4


@pytest.mark.parametrize("began", ["gaussian", "orthogonal", "mica"])
def test_an_adapter_that_began_otherwise_on_an_unchanged_base_computes_the_same(ranks, bases, tmp_path, began):
    """C37."""
    peft = pytest.importorskip("peft")
    asked = peft.LoraConfig(r=4, init_lora_weights=began, target_modules=SEVEN, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers_model(bases["odd"]), asked).eval()
    shake(model)
    model.save_pretrained(tmp_path / "theirs")
    assert_near(ranks(1, read_back, bases["odd"], tmp_path / "theirs")[0]["logits"], their_logits(model))


@pytest.mark.parametrize("began", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_refused_until_peft_has_converted_it(ranks, bases, tmp_path, began):
    """C37: PEFT subtracts from the base what the adapter begins with, so it would be wrong on the base itself."""
    peft = pytest.importorskip("peft")
    asked = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=began, target_modules=SEVEN, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers_model(bases["odd"]), asked).eval()
    assert (transformers_model(bases["odd"]).model.layers[0].mlp.up_proj.weight
            - model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight).abs().max() > 0.01
    model.peft_config["default"].init_lora_weights = True  # or the next line would begin anew
    model.save_pretrained(tmp_path / "begin")
    model.peft_config["default"].init_lora_weights = began
    shake(model)
    model.save_pretrained(tmp_path / "theirs")
    refused = f"init_lora_weights is {began}, which changes the base, .* path_initial_model_for_weight"
    with pytest.raises(UserError, match=refused):
        read_adapter(tmp_path / "theirs")
    expected = their_logits(model)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "begin")
    assert read_adapter(tmp_path / "converted").rank == 8
    assert_near(ranks(1, read_back, bases["odd"], tmp_path / "converted")[0]["logits"], expected)


@pytest.mark.parametrize("content", [
    None, b"", b"{", b"[]", b"[1]", b"7", b"null", b'"text"', b"\xff\xfe", b"{}", b'{"r": 8}',
    b'{"r": 8, "lora_alpha": 16}', b'{"r": 8, "target_modules": ["q_proj"]}', b"[" * 100_000,
], ids=lambda content: "absent" if content is None else repr(content[:20]))
def test_a_config_that_is_absent_or_no_settings_is_refused_in_one_line(tmp_path, content):
    """C37: the path, what was found, what was expected."""
    path = tmp_path / "adapter_config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path)
    message = str(error.value)
    assert "adapter_config.json" in message and ("expected" in message or "missing lora_alpha" in message)
    assert "\n" not in message and len(message) < 600




@pytest.mark.parametrize("kind", ["link", "fifo", "large"])
def test_an_adapter_config_that_is_no_small_file_of_the_folder_is_refused_at_once(tmp_path, kind):
    """R12, R13: neither followed out of the folder, nor waited for, nor read without end."""
    path = tmp_path / "adapter" / "adapter_config.json"
    path.parent.mkdir()
    if kind == "link":
        (tmp_path / "secret.json").write_text("{}")
        path.symlink_to(tmp_path / "secret.json")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 30)
    with pytest.raises(UserError, match="a link to|not a file|more than 67,108,864 bytes"):
        read_adapter(path.parent)


@pytest.mark.parametrize("value", ["false", 1, [], {}])
def test_a_switch_that_is_not_a_boolean_is_refused(tmp_path, value):
    """R13: "false" would be taken for true."""
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="use_rslora is .*, expected true or false"):
        read_adapter(tmp_path)
