"""Low-rank adapters against explicit formulas and PEFT, and folded into their base."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapters import (
    BIASED,
    BIASED_FAST,
    BLOCKS,
    ODD,
    ONE_VARIANT_FAST,
    SEVEN,
    assert_near,
    config_of,
    logits,
    loss,
    opened,
    their_logits,
    transformers_model,
    write_adapter,
    write_bases,
    write_dora,
)
from safetensors.torch import load_file, save_file
from sharded import this_process, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import lora
from llama.boundary.choices import ADAPTER_VARIANTS
from llama.boundary.command_line import run
from llama.boundary.errors import UserError
from llama.model import Llama, ModelConfig, PackedDocuments
from llama.storage import pretrained
from llama.storage.base import Base, config_to_json
from llama.storage.companions import Companions
from llama.storage.peft import Adapter, load_adapter, read_adapter
from llama.storage.rounding import Rounding
from llama.training.optim import build_adamw
from lora import (
    Changes,
    LoRAInt8Linear,
    LoRALinear,
    LoRANF4Linear,
    adapted,
    apply_adapter,
    initialize_adapter,
    merge,
    open_model,
    train_only,
)

SLOW = pytest.mark.slow
DTYPES = [pytest.param(torch.float32, marks=SLOW, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
TOKENIZER = Path(lora.__file__).parent / "assets" / "tiny" / "tokenizer.model"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return write_dora(tmp_path_factory.mktemp("saved") / "adapter")




class Holder(nn.Module):
    """What `apply` looks at: a module with `layers`."""

    def __init__(self, **linears: nn.Linear):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict(linears)])


# What is put where


def test_a_linear_with_an_adapter_is_still_a_linear_and_base_names_do_not_move():
    """C33: base checkpoints load untouched, with or without the adapter's own names beside them."""
    plain, model = Llama(BIASED), Llama(BIASED)
    apply_adapter(model, Adapter(4, 8.0, variant="dora"))
    linears = adapted(model)
    assert set(linears) == {f"layers.{i}.{part}.{name}" for i in range(2) for name in SEVEN
                            for part in ["self_attn" if name in SEVEN[:4] else "mlp"]}
    assert all(isinstance(module, nn.Linear) and type(module) is LoRALinear for module in linears.values())
    ours = [name for name, _ in model.named_parameters() if ".lora_" not in name]
    assert ours == [name for name, _ in plain.named_parameters()]
    added = {name for name, _ in model.named_parameters()} - set(ours)
    assert added == {f"{linear}.{own}.weight" for linear in linears
                     for own in ("lora_A", "lora_B", "lora_magnitude_vector")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added


@pytest.mark.parametrize("targets, expected", [
    (("all-linear",), SEVEN), (("q_proj", "v_proj"), ["q_proj", "v_proj"]), (("mlp.down_proj",), ["down_proj"]),
    (("proj", "k_proj"), None), (("q_proj", "lm_head"), None), (("Q_proj",), None), (("",), None),
    (("mlp",), None), (("embed_tokens",), None),
], ids=str)
def test_targets_are_ends_of_names_and_one_that_matches_nothing_lists_what_there_is(targets, expected):
    """R18: a name that is misspelt, or not of a linear in the layers, would else train nothing in silence."""
    model = Llama(ODD)
    if expected is None:
        with pytest.raises(UserError) as error:
            apply_adapter(model, Adapter(4, 8.0, targets=targets))
        message = str(error.value)
        missing = [t for t in targets if t not in SEVEN][0]
        assert f"LoRA target {missing!r}: " in message and "\n" not in message
        assert "all-linear" in message and all(name in message for name in SEVEN)
        return
    apply_adapter(model, Adapter(4, 8.0, targets=targets))
    assert sorted({name.rpartition(".")[2] for name in adapted(model)}) == sorted(expected)
    assert len(adapted(model)) == 2 * len(expected)


def test_one_layers_linear_alone_can_be_a_target():
    """Ends of names reach as far up as one layer: the tenth is not mistaken for the first."""
    model = Llama(replace(ODD, num_hidden_layers=11))
    apply_adapter(model, Adapter(4, 8.0, targets=("0.self_attn.q_proj",)))
    assert list(adapted(model)) == ["layers.0.self_attn.q_proj"]


def test_open_llama_3b_has_as_many_trainable_numbers_as_is_known():
    """C35: rank 8 on all seven linears, counted on the meta device, without the memory for any of them."""
    config = ModelConfig(vocab_size=32000, hidden_size=3200, intermediate_size=8640, num_hidden_layers=26,
                         num_attention_heads=32, num_key_value_heads=32, head_dim=100)
    with torch.device("meta"):
        model = Llama(config)
        apply_adapter(model, Adapter(8, 16.0))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12_712_960
    assert sum(p.numel() for p in model.parameters()) == 3_439_186_560


# What is computed


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("variant", ADAPTER_VARIANTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 3e-6), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_forward_and_all_gradients_are_those_of_the_formula(variant, dtype, tolerance, bias):
    """C39: W + s B A with s = alpha / r or alpha / sqrt(r); DoRA with the norm taken as a constant."""
    torch.manual_seed(0)
    linear = nn.Linear(20, 12, bias=bias)
    holder = Holder(linear=linear)
    apply_adapter(holder, Adapter(4, 6.0, variant=variant))
    initialize_adapter(holder, 0)
    for parameter in (linear.lora_B.weight, linear.lora_magnitude_vector and linear.lora_magnitude_vector.weight):
        if parameter is not None:
            parameter.data += torch.rand_like(parameter)
    holder.to(dtype)
    trainable = {name: p for name, p in linear.named_parameters() if p.requires_grad}
    x, d_y = (torch.randn(9, n, dtype=torch.float64) for n in (20, 12))

    theirs = {name: p.detach().double().requires_grad_() for name, p in linear.named_parameters()}
    their_x = x.clone().requires_grad_()
    scale = {"lora": 6 / 4, "rslora": 6 / 4**0.5, "dora": 6 / 4}[variant]
    weight = theirs["weight"].detach() + scale * theirs["lora_B.weight"] @ theirs["lora_A.weight"]
    if variant == "dora":
        weight = (theirs["lora_magnitude_vector.weight"] / weight.detach().pow(2).sum(1).sqrt())[:, None] * weight
    expected = their_x @ weight.t() + (theirs["bias"].detach() if bias else 0)
    expected.backward(d_y)

    our_x = x.to(dtype).requires_grad_()
    found = linear(our_x)
    found.backward(d_y.to(dtype))
    assert found.dtype == dtype and len(trainable) == (3 if variant == "dora" else 2)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(our_x.grad.double(), their_x.grad, rtol=tolerance, atol=tolerance)
    for name, parameter in trainable.items():
        assert theirs[name].grad.abs().max() > 0.1
        torch.testing.assert_close(parameter.grad.double(), theirs[name].grad, rtol=tolerance, atol=tolerance)
    assert linear.weight.grad is None and (not bias or linear.bias.grad is None)


def step_zero(folder: Path, adapter: Adapter, dtype: torch.dtype, kind: str | None) -> bool:
    with_adapter, base = (logits(opened(folder, put_on, kind, dtype)) for put_on in (adapter, None))
    return bool(torch.equal(with_adapter, base)) and bool(base.abs().max() > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ONE_VARIANT_FAST)
def test_at_step_zero_the_logits_are_the_bases_bit_for_bit(ranks, bases, variant, dtype):
    """C39: B is zero and m the rows' own length, so ratios are exactly 1, also in bf16 and over a packed base."""
    for world, base, kind in ((1, "odd", None), (4, "odd", None), (2, "blocks", "int8"), (1, "blocks", "nf4")):
        found = ranks(world, step_zero, bases[base], Adapter(4, 8.0, variant=variant), dtype, kind)
        assert all(found), (world, kind)


@pytest.mark.parametrize("variant", ONE_VARIANT_FAST)
def test_at_step_zero_the_logits_are_those_of_a_base_with_biases_bit_for_bit(ranks, bases, variant):
    """C39: a bias that is taken off and put on again would round."""
    for dtype in (torch.float32, torch.bfloat16):
        assert ranks(1, step_zero, bases["biased"], Adapter(4, 8.0, variant=variant), dtype, None) == [True], dtype


def test_a_row_of_zeros_stays_one_under_dora():
    """C39: pruned models have such rows; their length 0 is divided by."""
    linear = nn.Linear(8, 4, bias=False)
    linear.weight.data[1] = 0
    holder = Holder(linear=linear)
    apply_adapter(holder, Adapter(2, 2.0, variant="dora"))
    initialize_adapter(holder, 0)
    x = torch.randn(3, 8)
    assert torch.equal(linear(x), F.linear(x, linear.weight))


def test_the_lengths_of_long_rows_are_exact():
    """C39: at the start, in every forward, and when merged. torch.linalg.vector_norm is 9e-6 off here, on a CPU."""
    linear = nn.Linear(14_336, 3, bias=False)
    linear.weight.data.fill_(0.1)
    holder = Holder(linear=linear)
    apply_adapter(holder, Adapter(2, 2.0, variant="dora"))
    initialize_adapter(holder, 0)
    exact = linear.weight.double().norm(dim=1)
    magnitude = linear.lora_magnitude_vector.weight
    for lengths in (magnitude, linear.row_norms()):
        torch.testing.assert_close(lengths.double(), exact, rtol=2e-7, atol=0)
    magnitude.data.fill_(3.0)
    merge(holder)
    torch.testing.assert_close(linear.weight.double().norm(dim=1), torch.full_like(exact, 3.0), rtol=2e-7, atol=0)


def values_at_start(folder: Path, adapter: Adapter) -> dict[str, torch.Tensor]:
    model = opened(folder, adapter)
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_start_alike_bit_for_bit_on_any_number_of_ranks(ranks, bases):
    """C35, R25: A uniform in +-1/sqrt(in), another one everywhere; B zero; m the length of each row."""
    adapter = Adapter(8, 8.0, variant="dora")
    (alone,), base = ranks(1, values_at_start, bases["odd"], adapter), load_file(bases["odd"] / "model.safetensors")
    for world in (2, 4):
        for found in ranks(world, values_at_start, bases["odd"], adapter):
            assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)
    drawn = []
    for name, value in alone.items():
        linear, _, kind = name.removesuffix(".weight").rpartition(".")
        weight = base[f"model.{linear}.weight"].double()
        assert value.dtype == torch.float32
        if kind == "lora_A":
            assert value.shape == (8, weight.shape[1])
            drawn.append(value.flatten() * math.sqrt(weight.shape[1]))
        elif kind == "lora_B":
            assert value.shape == (weight.shape[0], 8) and not value.any()
        else:
            torch.testing.assert_close(value.double(), weight.pow(2).sum(1).sqrt(), rtol=1e-6, atol=0)
    assert len({float(values[0]) for values in drawn}) == len(drawn) == 14
    drawn = torch.cat(drawn)
    assert drawn.abs().max() <= 1 and drawn.abs().max() > 0.99
    assert abs(float(drawn.mean())) < 0.05 and float(drawn.var()) == pytest.approx(1 / 3, rel=0.1)


def test_another_seed_starts_another_adapter():
    """Runs of several seeds would else be one run."""
    started = []
    for seed in (0, 1):
        holder = Holder(linear=nn.Linear(6, 6))
        apply_adapter(holder, Adapter(2, 2.0))
        initialize_adapter(holder, seed)
        started.append(holder.layers[0]["linear"].lora_A.weight)
    assert not torch.equal(*started)


@pytest.mark.parametrize("variant", ADAPTER_VARIANTS)
def test_dropout_is_in_train_mode_only_and_on_the_adapters_input_only(variant):
    """C39: evaluation never drops; with B at zero training does not show it either; the mean is kept."""
    torch.manual_seed(0)
    linears = {p: nn.Linear(40, 12) for p in (0.0, 0.25)}
    linears[0.25].load_state_dict(linears[0.0].state_dict())
    for p, linear in linears.items():
        holder = Holder(linear=linear)
        apply_adapter(holder, Adapter(4, 4.0, dropout=p, variant=variant))
        initialize_adapter(holder, 0)
    plain, dropping = linears.values()
    x = torch.randn(6, 40)
    assert torch.equal(dropping.train()(x), plain(x))
    for linear in linears.values():
        linear.lora_B.weight.data.fill_(1.0)
    assert torch.equal(dropping.eval()(x), plain(x))
    dropping.train()
    assert not torch.equal(dropping(x), dropping(x))
    mean = torch.stack([dropping(x) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, plain(x), rtol=0, atol=0.12)
    assert (dropping(x) - plain(x)).abs().max() > 0.3


# What is trained


def memory_of_a_step(folder: Path, adapter: Adapter, dtype: torch.dtype) -> dict:
    """Bytes on this rank after a step, by what they are for."""
    model = opened(folder, adapter, dtype=dtype)
    parameters = dict(model.named_parameters())
    optimizer = build_adamw(model, 1e-3, 0.1)
    loss(model).backward()
    optimizer.step()

    def size(tensors) -> int:
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    frozen = [p for p in parameters.values() if not p.requires_grad]
    return {
        "trained": size(p for p in parameters.values() if p.requires_grad),
        "gradients": size(p.grad for p in parameters.values() if p.grad is not None),
        "frozen gradients": sum(p.grad is not None for p in frozen),
        "moments": size(t for state in optimizer.state.values() for t in state.values() if t.ndim),
        "in the optimizer": {name for name, p in parameters.items() for group in optimizer.param_groups
                             for q in group["params"] if p is q},
        "frozen": {p.dtype for p in frozen},
        "adapter": {p.dtype for name, p in parameters.items() if ".lora_" in name},
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [pytest.param(1, marks=SLOW), 2])
def test_only_adapters_have_gradients_and_optimizer_state(ranks, bases, world, dtype):
    """C35, C7, C8: bytes counted; adapters in fp32 beside a base that is kept in what is computed in."""
    adapter = Adapter(4, 8.0, variant="dora")
    found = ranks(world, memory_of_a_step, bases["odd"], adapter, dtype)
    shapes = [linear for linear in adapted(_meta(ODD, adapter)).values()]
    numbers = sum(4 * (linear.in_features + linear.out_features) + linear.out_features for linear in shapes)
    assert sum(rank["trained"] for rank in found) == 4 * numbers
    for rank in found:
        assert rank["gradients"] == rank["trained"] and rank["moments"] == 2 * rank["trained"]
        assert rank["frozen gradients"] == 0 and all(".lora_" in name for name in rank["in the optimizer"])
        assert len(rank["in the optimizer"]) == 3 * 14
        assert rank["frozen"] == {dtype} and rank["adapter"] == {torch.float32}


def _meta(config: ModelConfig, adapter: Adapter) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
        apply_adapter(model, adapter)
    return model


def trained(folder: Path, adapter: Adapter, steps: int = 3, mode: bool = True, **how) -> dict:
    """The adapter after some steps, each rank on its own part of the tokens, and all that did not move."""
    model = opened(folder, adapter, **how)
    process = this_process()
    before = {name: whole(p) for name, p in model.named_parameters()}
    optimizer = build_adamw(model, 1e-2, 0.0)
    model.train(mode)
    for step in range(steps):
        torch.manual_seed(step)
        parts = torch.randint(97, (4, 16), generator=torch.Generator().manual_seed(step)).chunk(process.world_size)
        tokens = parts[process.rank].flatten()
        documents = PackedDocuments([16] * (len(tokens) // 16))
        rows = torch.arange(len(tokens) - 1)
        total = model(tokens, documents, rows[rows % 16 < 15], tokens[1:][rows % 16 < 15])
        (total * process.world_size / 60).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name: whole(p) for name, p in model.named_parameters()}
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    return {"adapter": {name: value for name, value in after.items() if ".lora_" in name},
            "base moved": [name for name in moved if ".lora_" not in name]}


@pytest.mark.parametrize("variant", ONE_VARIANT_FAST)
@pytest.mark.slow
def test_a_trained_adapter_does_not_depend_on_the_number_of_ranks(ranks, bases, variant):
    """C35: after three steps it equals the 1-process run's; the base has not moved by a bit."""
    adapter = Adapter(4, 8.0, variant=variant)
    (alone,) = ranks(1, trained, bases["odd"], adapter)
    assert alone["base moved"] == [] and all(value.any() for value in alone["adapter"].values())
    for world in (2, 4):
        found = ranks(world, trained, bases["odd"], adapter)[-1]
        assert found["base moved"] == []
        for name, value in alone["adapter"].items():
            torch.testing.assert_close(found["adapter"][name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [pytest.param(None, marks=SLOW), pytest.param("int8", marks=SLOW), "nf4"])
def test_with_activation_checkpointing_every_adapter_learns_though_the_embedding_is_frozen(ranks, bases, kind):
    """C36: nothing before the first layer asks for a gradient; after one step every B has one, dropout included."""
    adapter = Adapter(4, 8.0, dropout=0.2)
    plain = ranks(2, trained, bases["blocks"], adapter, 1, kind=kind)[0]["adapter"]
    found = ranks(2, trained, bases["blocks"], adapter, 1, kind=kind, activation_checkpointing="full")[0]["adapter"]
    learned = [name for name, value in found.items() if ".lora_B." in name and value.any()]
    assert len(learned) == 14
    assert all(torch.equal(found[name], plain[name]) for name in plain)  # dropped alike when computed again


# What is done to a model before it is sharded


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("parts, expected", [
    (["last:1"], ("layers.1.",)), (["last:2"], ("layers.",)), (["norm"], ("norm.",)),
    (["last:1", "norm", "lm_head"], ("layers.1.", "norm.", "lm_head.")), (["embed_tokens"], ("embed_tokens.",)),
], ids=str)  # fmt: skip
def test_only_the_named_parts_are_trained(parts, expected):
    """C31: all others are frozen, whatever they were before."""
    model = Llama(ODD)
    train_only(model, parts)
    assert trained_names(model) == {name for name, _ in model.named_parameters() if name.startswith(expected)}
    assert len(trained_names(model)) >= len(parts)


@pytest.mark.parametrize("parts, expected", [
    (["last:3"], "--train_layers last:3: the model has 2 layers"),
    (["lm_head"], "--train_layers lm_head: lm_head and embed_tokens are one matrix, expected both or neither"),
    (["norm", "embed_tokens"], "--train_layers embed_tokens: lm_head and embed_tokens are one matrix"),
], ids=str)  # fmt: skip
def test_a_part_that_the_model_does_not_have_alone_is_refused(parts, expected):
    """R18: more layers than there are; one end of a tied matrix."""
    tied = Llama(replace(ODD, tie_word_embeddings=True))
    with pytest.raises(UserError, match=f"^{expected}"):
        train_only(tied, parts)
    train_only(tied, ["lm_head", "embed_tokens"])
    assert trained_names(tied) == {"embed_tokens.weight"}


@pytest.mark.parametrize("kind, adapted_class", [
    ("none", LoRALinear), ("int8", LoRAInt8Linear), ("nf4", LoRANF4Linear)])  # fmt: skip
def test_changes_pack_the_linears_first_and_then_put_the_adapter_on(kind, adapted_class):
    """C35: only the adapter is trained; a part of the model that is to be frozen is, adapter or not."""
    model = Llama(BLOCKS)
    Changes(kind, Adapter(4, 8.0, targets=("q_proj",))).apply(model)
    assert {type(linear) for linear in adapted(model).values()} == {adapted_class}
    assert len(trained_names(model)) == 4 and all(".lora_" in name for name in trained_names(model))
    Changes(train_layers="none").apply(model)
    assert not trained_names(model)
    plain = Llama(BLOCKS)
    Changes(train_layers="last:1,norm").apply(plain)
    assert trained_names(plain) == {name for name, _ in plain.named_parameters()
                                    if name.startswith(("layers.1.", "norm."))}  # fmt: skip


def test_widths_that_cannot_be_packed_are_one_line_that_names_the_flag():
    """R18: the linear's name, its columns, what was expected."""
    with pytest.raises(UserError, match="^--quantize nf4: .*_proj has 30 columns, expected a multiple of 64$"):
        Changes("nf4").apply(Llama(ODD))


# Folded in


def merged(base: Path, folder: Path, kind: str | None = None, exported: Path | None = None) -> dict:
    """Logits with an adapter folded into its base, which is rounded as `kind` before."""
    model = opened(base, read_adapter(folder))
    load_adapter(model, folder)
    merge(model, kind)
    plain = Llama(config_of(base))
    result = {"logits": logits(model.eval()), "adapters": len(adapted(model)),
              "same names": [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]}
    if exported:
        pretrained.export_model(model, exported, json.loads((base / "config.json").read_text()), dtype=torch.float32)
    return result


@pytest.mark.parametrize("base", BIASED_FAST)
@pytest.mark.parametrize("variant", ONE_VARIANT_FAST)
@pytest.mark.parametrize("world", [pytest.param(1, marks=SLOW), 2])
def test_a_merged_model_computes_the_same_and_opens_in_transformers(ranks, bases, tmp_path, world, variant, base):
    """C38, C33: nothing of the adapter is left in it."""
    unmerged = ranks(1, write_adapter, bases[base], tmp_path / "adapter", Adapter(4, 6.0, variant=variant))[0]["logits"]
    found = ranks(world, merged, bases[base], tmp_path / "adapter", exported=tmp_path / "merged")[-1]
    assert_near(found["logits"], unmerged)
    assert (their_logits(transformers_model(bases[base])) - unmerged).abs().max() > 0.1
    assert found["same names"] and found["adapters"] == 0
    assert_near(their_logits(transformers_model(tmp_path / "merged")), unmerged)


@pytest.mark.parametrize("targets", [
    pytest.param(("all-linear",), marks=SLOW, id="all"), pytest.param(("q_proj", "down_proj"), id="two of seven")])
@pytest.mark.parametrize("variant", [pytest.param("lora", marks=SLOW), "dora"])
@pytest.mark.parametrize("kind", [pytest.param("int8", marks=SLOW), "nf4"])
def test_an_adapter_over_a_quantised_base_is_folded_into_that_base(ranks, bases, tmp_path, kind, variant, targets):
    """C38: folded into the original it is another model. All linears were rounded, also those without an adapter."""
    base, folder, adapter = bases["blocks"], tmp_path / "adapter", Adapter(4, 6.0, variant=variant, targets=targets)
    unmerged = ranks(1, write_adapter, base, folder, adapter, kind)[0]["logits"]
    for world in (1, 2):
        assert_near(ranks(world, merged, base, folder, kind)[-1]["logits"], unmerged, 2e-5)
    into_the_original = ranks(1, merged, base, folder)[0]["logits"]
    assert (into_the_original - unmerged).abs().max() > 1e-3 * unmerged.abs().max()


def merge_packed(base: Path) -> str:
    model = opened(base, Adapter(4, 6.0), "int8")
    try:
        merge(model)
    except ValueError as error:
        return str(error)
    return "folded into integers"


def test_folding_into_integers_themselves_is_refused(ranks, bases):
    """C38: the packed rows of int8 have the shape of weights, so nothing else would notice."""
    assert ranks(1, merge_packed, bases["blocks"]) != ["folded into integers"]


# Whole, to be used


def open_both_ways(folder: Path, adapter: Path | None, kind: str, dtype: torch.dtype) -> dict:
    """The logits of the sharded and of the whole model on this rank; rank 0 does not compute the latter's."""
    process = this_process()
    base = Base("base", folder, {}, config_of(folder), None, torch.float32, [])  # type: ignore[arg-type]
    changes = Changes(kind, adapter and read_adapter(adapter), adapter_folder=adapter and str(adapter))
    sharded = open_model(base, changes, process, dtype)
    model = open_model(base, changes, process, dtype, whole=True)
    parameters = list(model.parameters())
    floats = {p.dtype for p in parameters if p.is_floating_point()}
    plain = not model.training and not any(p.requires_grad or isinstance(p, DTensor) for p in parameters)
    expected = logits(sharded.eval())
    found = logits(model) if process.rank == process.world_size - 1 else None
    return {"found": found, "expected": expected, "plain": plain, "dtypes": floats}


@pytest.mark.parametrize("world_size, dtype", [(1, torch.float32), pytest.param(2, torch.bfloat16, marks=SLOW)])
@pytest.mark.parametrize("kind", [pytest.param("none", marks=SLOW), pytest.param("int8", marks=SLOW), "nf4"])
@pytest.mark.parametrize("variant", [pytest.param(None, marks=SLOW), *ONE_VARIANT_FAST])
def test_a_whole_model_computes_what_a_sharded_one_does_and_needs_no_other_rank(
    ranks, bases, tmp_path, variant, kind, world_size, dtype
):
    """Adapters over plain and over packed weights; every number is in the dtype asked for, and nothing is trained."""
    adapter = None
    if variant:
        adapter = tmp_path / "adapter"
        ranks(1, write_adapter, bases["blocks"], adapter, Adapter(4, 6.0, variant=variant), kind)
    for rank, result in enumerate(ranks(world_size, open_both_ways, bases["blocks"], adapter, kind, dtype)):
        assert result["plain"] and result["dtypes"] == {dtype}
        if rank == world_size - 1:
            assert torch.equal(result["found"], result["expected"])


# The command


def command(*arguments, **options) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return subprocess.run([sys.executable, str(Path(lora.__file__)), *map(str, arguments)], text=True, timeout=300,
                          capture_output=True, env=environment | {"OMP_NUM_THREADS": "1"}, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base with the bundled tokenizer, as the command wants it."""
    model = Llama(replace(BLOCKS, vocab_size=1280))
    pretrained.initialize_weights(model, seed=0)
    folder = tmp_path_factory.mktemp("folder") / "base"
    pretrained.export_model(model, folder, config_to_json(model.config), Companions([TOKENIZER]), torch.float32)
    return folder


@pytest.mark.slow
def test_the_command_writes_a_folder_that_transformers_opens(ranks, folder, tmp_path):
    """C38: config, tokenizer and weights; with --quantize, those of the base that was trained over."""
    adapter = Adapter(4, 6.0, variant="rslora")
    expected = ranks(2, write_adapter, folder, tmp_path / "adapter", adapter, "nf4")[0]["logits"]
    out = tmp_path / "new/merged"
    done = command("--model", folder, "--adapter", tmp_path / "adapter", "--output", out, "--dtype", "float32",
                   "--quantize", "nf4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and len(done.stdout.splitlines()) == 1
    assert_near(their_logits(transformers_model(out)), expected, 2e-5)
    assert (out / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


@pytest.mark.parametrize("stored_as, asked", [
    pytest.param("float32", None, marks=SLOW), ("bfloat16", None), ("float32", "bfloat16"),
])  # fmt: skip
def test_the_command_writes_the_merged_weights_in_the_bases_dtype_unless_asked_otherwise(
    ranks, folder, tmp_path, monkeypatch, capsys, stored_as, asked
):
    """C38: never the packed ones; rounded once, from sums in fp32; the part that rounding lost is said."""
    base = load_file(folder / "model.safetensors")
    start = tmp_path / "base"
    shutil.copytree(folder, start)
    save_file({name: t.to(getattr(torch, stored_as)) for name, t in base.items()}, start / "model.safetensors")
    base = {name: tensor.float() for name, tensor in load_file(start / "model.safetensors").items()}
    ranks(1, write_adapter, start, tmp_path / "adapter", Adapter(4, 6.0))
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for kind in ("none", "int8"):
        out = tmp_path / kind
        flags = ["--model", start, "--adapter", tmp_path / "adapter", "--output", out, "--quantize", kind]
        status, message, said = in_process(monkeypatch, capsys, *flags, *(["--dtype", asked] if asked else []))
        assert (status, message) == (0, [])
        found = load_file(out / "model.safetensors")
        dtype = getattr(torch, asked or stored_as)
        assert {tensor.dtype for tensor in found.values()} == {dtype} and found.keys() == base.keys()
        lost = changed = 0.0
        for name, weight in base.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_%s.weight"
            if key % "A" in stored and kind == "none":
                update = 6 / 4 * stored[key % "B"].double() @ stored[key % "A"].double()
                weight = weight.double() + update
                lost += float((found[name].double() - weight).square().sum())
                changed += float(update.square().sum())
            if key % "A" not in stored or kind == "none":
                assert (found[name].double() - weight).abs().max() <= 2.0**-8 * weight.abs().max(), name
        if kind == "none":
            told = float(re.search(rf"error of rounding to {asked or stored_as} is ([\d.]+)% of what", said)[1])
            assert told == pytest.approx(100 * math.sqrt(lost / changed), abs=0.06)


def test_a_merge_that_overflows_in_the_dtype_of_the_file_writes_nothing(ranks, folder, tmp_path, monkeypatch, capsys):
    """It is finite in float32; a float16 ends at 65,504."""
    ranks(1, write_adapter, folder, tmp_path / "adapter", Adapter(4, 1e9))
    out = tmp_path / "merged"
    flags = ["--model", folder, "--adapter", tmp_path / "adapter", "--output", out, "--dtype", "float16"]
    status, (message,), _ = in_process(monkeypatch, capsys, *flags)
    assert status == 2 and "a weight is not finite in float16, so nothing was written" in message
    assert not out.exists()


def merged_with_rounding(base: Path, adapter: Path) -> tuple[float, float]:
    """The part that bf16 and fp32 lose of an adapter, on all ranks."""
    parts = []
    for dtype in (torch.bfloat16, torch.float32):
        model, rounding = opened(base, read_adapter(adapter)), Rounding(dtype)
        load_adapter(model, adapter)
        merge(model, rounding=rounding)
        parts.append(rounding.relative_error())
    return tuple(parts)


def test_the_part_of_an_adapter_that_rounding_loses_is_the_same_on_any_number_of_ranks(ranks, bases, saved):
    alone = ranks(1, merged_with_rounding, bases["odd"], saved)[0]
    assert 0.001 < alone[0] < 0.1 and alone[1] < 1e-6
    for found in ranks(4, merged_with_rounding, bases["odd"], saved):
        assert found == pytest.approx(alone, rel=1e-5)


def in_process(monkeypatch, capsys, *arguments) -> tuple[int, list[str], str]:
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, arguments)])
    status = 0
    try:
        run(lora.main)
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    return status, err.splitlines(), out


MISTAKES = {
    "no flag": (["--adaptor", "x"], "--adaptor"),
    "no such model": (["--model", "nowhere"], "nowhere: no such folder"),
    "no such adapter": (["--adapter", "nowhere"], "nowhere/adapter_config.json: is missing"),
    "a file as adapter": (["--adapter", "{saved}/adapter_config.json"], "is missing or not a file"),
    "no such kind": (["--quantize", "int3"], "--quantize"),
    "output taken": (["--output", "{saved}"], "expected a name that is free"),
    "another base's adapter": (["--adapter", "{saved}"], "expected F32 [4, 64]"),
    "a linear it has not": (["--adapter", "{foreign}"], "'side_proj': no such linear"),
    "a rank without end": (["--adapter", "{giant}"], "expected 1 to 65536"),
    "widths that do not divide": (["--model", "{narrow}", "--adapter", "{on_narrow}", "--quantize", "nf4"],
                                  "expected a multiple of 64"),
}


@pytest.fixture(scope="module")
def places(ranks, folder, saved, tmp_path_factory) -> dict[str, Path]:
    """Folders for the mistakes: adapters that fit, and such that do not."""
    parent = tmp_path_factory.mktemp("mistakes")
    names = ("fitting", "foreign", "giant", "narrow", "on_narrow")
    places = {"saved": saved} | {name: parent / name for name in names}
    ranks(1, write_adapter, folder, places["fitting"], Adapter(4, 6.0))
    about = json.loads((places["fitting"] / "adapter_config.json").read_text())
    for name, change in (("foreign", {"target_modules": ["side_proj"]}), ("giant", {"r": 10**30})):
        shutil.copytree(places["fitting"], places[name])
        (places[name] / "adapter_config.json").write_text(json.dumps(about | change))
    narrow = Llama(replace(ODD, vocab_size=1280))
    pretrained.initialize_weights(narrow, seed=0)
    pretrained.export_model(narrow, places["narrow"], config_to_json(narrow.config), Companions([TOKENIZER]))
    ranks(1, write_adapter, places["narrow"], places["on_narrow"], Adapter(4, 6.0))
    return places


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(folder, places, tmp_path, monkeypatch, capsys, case):
    """R18: no traceback, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    arguments, expected = MISTAKES[case]
    arguments = [argument.format(**places) for argument in arguments]
    status, message, _ = in_process(
        monkeypatch, capsys, "--model", folder, "--adapter", places["fitting"], "--output", "merged", *arguments
    )
    assert status == 2 and len(message) == 1 and expected in message[0], message
    assert not list(tmp_path.iterdir()) and not dist.is_initialized()
