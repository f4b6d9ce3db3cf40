"""Low-rank adapters against explicit formulas and PEFT; their files both ways; folded into their base."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sharded import here, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import lora
from llama.boundary.errors import UserError
from llama.model.config import ModelConfig
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments
from llama.model.quantize import KINDS, quantize
from llama.parallel.distribute import build
from llama.storage import pretrained
from llama.storage.slices import WeightsError, local_slice, region
from llama.training.optim import build_adamw
from lora import VARIANTS, Adapter, LoRALinear

# Odd sizes: neither 2 nor 4 ranks divide 10, 30 or 97 rows evenly.
ODD = ModelConfig(vocab_size=97, hidden_size=30, intermediate_size=42, num_hidden_layers=2, num_attention_heads=3,
                  num_key_value_heads=1, head_dim=10, initializer_range=0.2)
BIASED = replace(ODD, attention_bias=True, mlp_bias=True)
BLOCKS = replace(ODD, hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16)  # as NF4 wants them
CONFIGS = {"odd": ODD, "biased": BIASED, "blocks": BLOCKS}
TOKENIZER = Path(lora.__file__).parent / "assets" / "tiny" / "tokenizer.model"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(97, (23,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Pretrained folders in fp32; biases are not zero, as `initialize` would leave them."""
    folders = {}
    for name, config in CONFIGS.items():
        model, generator = Llama(config), torch.Generator().manual_seed(1)
        pretrained.initialize(model, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += torch.randn(parameter.shape, generator=generator) / 4
        folders[name] = tmp_path_factory.mktemp("bases") / name
        pretrained.export(model, folders[name], config.to_dict(), dtype=torch.float32)
    return folders


def opened(folder: Path, adapter: Adapter | None = None, kind: str | None = None, dtype=torch.float32, **options):
    """A sharded model from a folder, quantised or not, with an adapter as it is at the start of a run."""

    def adapt(model: Llama) -> None:
        if kind:
            quantize(model, kind)
        if adapter:
            lora.apply(model, adapter)

    model = build(ModelConfig.from_folder(folder), here(), dtype, adapt=adapt, **options)
    pretrained.load(model, folder)
    if adapter:
        lora.initialize(model, seed=0)
    return model


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Adapters that change what the model computes, the same on any number of ranks."""
    generator = torch.Generator().manual_seed(7)
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        local, start = local_slice(parameter)
        noise = torch.randn(parameter.shape, generator=generator)[region(start, local)]
        local.add_(noise / 10 if parameter.ndim == 2 else noise * local / 5)


@torch.no_grad()
def logits(model: Llama, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    documents = PackedDocuments([len(tokens)])
    return model(tokens, documents.positions, documents).float()


def loss(model: Llama, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    documents = PackedDocuments([len(tokens)])
    return model(tokens, documents.positions, documents, torch.arange(len(tokens) - 1), tokens[1:])


class Holder(nn.Module):
    """What `apply` looks at: a module with `layers`."""

    def __init__(self, **linears: nn.Linear):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict(linears)])


# What is put where


def test_a_linear_with_an_adapter_is_still_a_linear_and_base_names_do_not_move():
    """C33: base checkpoints load untouched, with or without the adapter's own names beside them."""
    plain, model = Llama(BIASED), Llama(BIASED)
    lora.apply(model, Adapter(4, 8.0, variant="dora"))
    linears = lora.adapted(model)
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
            lora.apply(model, Adapter(4, 8.0, targets=targets))
        told = str(error.value)
        missing = [t for t in targets if t not in SEVEN][0]
        assert f"LoRA target {missing!r}: " in told and "\n" not in told
        assert "all-linear" in told and all(name in told for name in SEVEN)
        return
    lora.apply(model, Adapter(4, 8.0, targets=targets))
    assert sorted({name.rpartition(".")[2] for name in lora.adapted(model)}) == sorted(expected)
    assert len(lora.adapted(model)) == 2 * len(expected)


def test_one_layers_linear_alone_can_be_a_target():
    """Ends of names reach as far up as one layer: the tenth is not mistaken for the first."""
    model = Llama(replace(ODD, num_hidden_layers=11))
    lora.apply(model, Adapter(4, 8.0, targets=("0.self_attn.q_proj",)))
    assert list(lora.adapted(model)) == ["layers.0.self_attn.q_proj"]


def test_open_llama_3b_has_as_many_trainable_numbers_as_is_known():
    """C35: rank 8 on all seven linears, counted on the meta device, without the memory for any of them."""
    config = ModelConfig(vocab_size=32000, hidden_size=3200, intermediate_size=8640, num_hidden_layers=26,
                         num_attention_heads=32, num_key_value_heads=32, head_dim=100)
    with torch.device("meta"):
        model = Llama(config)
        lora.apply(model, Adapter(8, 16.0))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12_712_960
    assert sum(p.numel() for p in model.parameters()) == 3_439_186_560


# What is computed


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 3e-6), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_forward_and_all_gradients_are_those_of_the_formula(variant, dtype, tolerance, bias):
    """C39: W + s B A with s = alpha / r or alpha / sqrt(r); DoRA with the norm taken as a constant."""
    torch.manual_seed(0)
    linear = nn.Linear(20, 12, bias=bias)
    holder = Holder(linear=linear)
    lora.apply(holder, Adapter(4, 6.0, variant=variant))
    lora.initialize(holder, 0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_at_step_zero_the_logits_are_the_bases_bit_for_bit(ranks, bases, variant, dtype):
    """C39: B is zero and m the rows' own length, so ratios are exactly 1, also in bf16 and over a packed base."""
    for world, base, kind in ((1, "odd", None), (4, "odd", None), (2, "blocks", "int8"), (1, "blocks", "nf4")):
        found = ranks(world, step_zero, bases[base], Adapter(4, 8.0, variant=variant), dtype, kind)
        assert all(found), (world, kind)


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_step_zero_the_logits_are_those_of_a_base_with_biases_bit_for_bit(ranks, bases, variant):
    """C39: a bias that is taken off and put on again would round."""
    for dtype in (torch.float32, torch.bfloat16):
        assert ranks(1, step_zero, bases["biased"], Adapter(4, 8.0, variant=variant), dtype, None) == [True], dtype


def test_a_row_of_zeros_stays_one_under_dora():
    """C39: pruned models have such rows; their length 0 is divided by."""
    linear = nn.Linear(8, 4, bias=False)
    linear.weight.data[1] = 0
    holder = Holder(linear=linear)
    lora.apply(holder, Adapter(2, 2.0, variant="dora"))
    lora.initialize(holder, 0)
    x = torch.randn(3, 8)
    assert torch.equal(linear(x), F.linear(x, linear.weight))


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
        lora.apply(holder, Adapter(2, 2.0))
        lora.initialize(holder, seed)
        started.append(holder.layers[0]["linear"].lora_A.weight)
    assert not torch.equal(*started)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_in_train_mode_only_and_on_the_adapters_input_only(variant):
    """C39: evaluation never drops; with B at zero training does not show it either; the mean is kept."""
    torch.manual_seed(0)
    linears = {p: nn.Linear(40, 12) for p in (0.0, 0.25)}
    linears[0.25].load_state_dict(linears[0.0].state_dict())
    for p, linear in linears.items():
        holder = Holder(linear=linear)
        lora.apply(holder, Adapter(4, 4.0, dropout=p, variant=variant))
        lora.initialize(holder, 0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
def test_only_adapters_have_gradients_and_optimizer_state(ranks, bases, world, dtype):
    """C35, C7, C8: bytes counted; adapters in fp32 beside a base that is kept in what is computed in."""
    adapter = Adapter(4, 8.0, variant="dora")
    found = ranks(world, memory_of_a_step, bases["odd"], adapter, dtype)
    shapes = [linear for linear in lora.adapted(_meta(ODD, adapter)).values()]
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
        lora.apply(model, adapter)
    return model


def trained(folder: Path, adapter: Adapter, steps: int = 3, mode: bool = True, **options) -> dict:
    """The adapter after some steps, each rank on its own part of the tokens, and all that did not move."""
    model, ranks = opened(folder, adapter, **options), here()
    before = {name: whole(p) for name, p in model.named_parameters()}
    optimizer = build_adamw(model, 1e-2, 0.0)
    model.train(mode)
    for step in range(steps):
        torch.manual_seed(step)
        parts = torch.randint(97, (4, 16), generator=torch.Generator().manual_seed(step)).chunk(ranks.world_size)
        tokens = parts[ranks.rank].flatten()
        documents = PackedDocuments([16] * (len(tokens) // 16))
        rows = torch.arange(len(tokens) - 1)
        total = model(tokens, documents.positions, documents, rows[rows % 16 < 15], tokens[1:][rows % 16 < 15])
        (total * ranks.world_size / 60).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name: whole(p) for name, p in model.named_parameters()}
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    return {"adapter": {name: value for name, value in after.items() if ".lora_" in name},
            "base moved": [name for name in moved if ".lora_" not in name]}


@pytest.mark.parametrize("variant", VARIANTS)
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


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_with_activation_checkpointing_every_adapter_learns_though_the_embedding_is_frozen(ranks, bases, kind):
    """C36: nothing before the first layer asks for a gradient; after one step every B has one, dropout included."""
    adapter = Adapter(4, 8.0, dropout=0.2)
    plain = ranks(2, trained, bases["blocks"], adapter, 1, kind=kind)[0]["adapter"]
    found = ranks(2, trained, bases["blocks"], adapter, 1, kind=kind, activation_checkpointing=True)[0]["adapter"]
    learned = [name for name, value in found.items() if ".lora_B." in name and value.any()]
    assert len(learned) == 14
    assert all(torch.equal(found[name], plain[name]) for name in plain)  # dropped alike when computed again


# Files


def write_adapter(base: Path, folder: Path, adapter: Adapter, kind: str | None = None) -> dict:
    """Save an adapter that is not trivial; what the model then computes, and the adapter as it was."""
    model = opened(base, adapter, kind)
    shake(model)
    lora.save(model, folder, adapter, str(base))
    values = {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits(model.eval()), "values": values}


def read_back(base: Path, folder: Path, kind: str | None = None) -> dict:
    model = opened(base, lora.read_adapter(folder), kind)
    lora.load(model, folder)
    values = {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits(model.eval()), "values": values}


def peft_base(folder: Path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def their_logits(model) -> torch.Tensor:
    return model(TOKENS[None]).logits[0].float()


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("base", ["odd", "biased"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_we_save_opens_in_peft_and_computes_the_same(ranks, bases, tmp_path, variant, base):
    """C37, C39: saved by two ranks, whole; PEFT warns of nothing missing and gives equal logits."""
    peft = pytest.importorskip("peft")
    adapter = Adapter(4, 6.0, dropout=0.1, variant=variant)
    written = ranks(2, write_adapter, bases[base], tmp_path / "adapter", adapter)[0]
    model = peft_base(bases[base])
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


@pytest.mark.parametrize("base", ["odd", "biased"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_that_peft_saves_loads_here_and_computes_the_same(ranks, bases, tmp_path, variant, base):
    """C37, C39: every setting PEFT writes is understood, on one rank and on two."""
    peft = pytest.importorskip("peft")
    asked = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=variant == "rslora",
                            use_dora=variant == "dora", target_modules=SEVEN, task_type="CAUSAL_LM")
    model = peft.get_peft_model(peft_base(bases[base]), asked).eval()
    shake(model)
    model.save_pretrained(tmp_path / "theirs")
    expected = their_logits(model)
    adapter = lora.read_adapter(tmp_path / "theirs")
    assert replace(adapter, targets=()) == Adapter(4, 6, 0.1, variant, ())
    for world in (1, 2):
        assert_near(ranks(world, read_back, bases[base], tmp_path / "theirs")[-1]["logits"], expected)


def test_an_adapter_on_what_peft_calls_all_linear_loads_here(ranks, bases, tmp_path):
    """C37: of a small model PEFT then lists every linear by its whole name, such as model.layers.1.mlp.up_proj."""
    peft = pytest.importorskip("peft")
    asked = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(peft_base(bases["odd"]), asked).eval()
    shake(model)
    model.save_pretrained(tmp_path / "theirs")
    assert_near(ranks(1, read_back, bases["odd"], tmp_path / "theirs")[0]["logits"], their_logits(model))


def gradients(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = opened(base, lora.read_adapter(folder))
    lora.load(model, folder)
    loss(model.eval()).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_peft(ranks, bases, tmp_path, variant):
    """C37, C39: through a whole model, of the summed loss."""
    peft = pytest.importorskip("peft")
    ranks(1, write_adapter, bases["biased"], tmp_path / "adapter", Adapter(4, 6.0, variant=variant))
    model = peft.PeftModel.from_pretrained(peft_base(bases["biased"]), tmp_path / "adapter", is_trainable=True).eval()
    F.cross_entropy(model(TOKENS[None]).logits[0, :-1], TOKENS[1:], reduction="sum").backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (found,) = ranks(1, gradients, bases["biased"], tmp_path / "adapter")
    assert len(found) == len(theirs) == 14 * (3 if variant == "dora" else 2)
    for name, gradient in found.items():
        their = theirs["base_model.model.model." + name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(gradient, their, rtol=1e-4, atol=1e-5 * float(their.abs().max()))


@pytest.mark.parametrize("variant", ["lora", "dora"])
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
    model, told = opened(base, Adapter(4, 8.0)), []
    lora.save(model, folder, Adapter(4, 8.0), "base")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shake(model)
    for _ in range(2):
        try:
            lora.save(model, folder, Adapter(4, 8.0), "base")
        except WeightsError as error:
            told.append(str(error))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    return told


@pytest.mark.parametrize("world", [1, 2])
def test_saving_over_a_folder_that_exists_is_refused_on_every_rank(ranks, bases, tmp_path, world):
    """R17: the first result stays as it is."""
    for told in ranks(world, write_twice, bases["odd"], tmp_path / "adapter"):
        assert len(told) == 2 and all("adapter: exists already" in line and "\n" not in line for line in told)


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory) -> Path:
    """An adapter over `odd`, as a single process writes it."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = Llama(ODD)
    lora.apply(model, Adapter(4, 8.0, variant="dora"))
    lora.initialize(model, 0)
    shake(model)
    lora.save(model, folder, Adapter(4, 8.0, variant="dora"), str(bases["odd"]))
    return folder


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
    lora.apply(model, lora.read_adapter(folder))
    with pytest.raises(WeightsError) as error:
        lora.load(model, folder)
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
    model = opened(base, lora.read_adapter(folder))
    try:
        lora.load(model, folder)
    except WeightsError as error:
        return str(error)
    return ""


def test_a_nan_that_one_rank_alone_reads_stops_all_of_them(ranks, bases, saved, tmp_path):
    """C4, C37: the last row is the last rank's."""
    shutil.copytree(saved, tmp_path / "adapter")
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors[A_NAME][3, 0] = math.nan
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    for told in ranks(2, load_damaged, bases["odd"], tmp_path / "adapter"):
        assert f"{A_NAME} is not finite" in told


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
    "init_lora_weights loftq": {"init_lora_weights": "loftq"},
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
    lora.read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | SETTINGS[case]))
    with pytest.raises(UserError) as error:
        lora.read_adapter(tmp_path)
    told = str(error.value)
    assert str(tmp_path / "adapter_config.json") in told and "\n" not in told and len(told) < 600
    assert case.split()[0] in told or "expected the settings of a LoRA" in told, told


def test_settings_that_change_nothing_are_not_refused(saved, tmp_path):
    """PEFT writes dozens of them, most as null or empty."""
    config = json.loads((saved / "adapter_config.json").read_text())
    harmless = {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
                "fan_in_fan_out": False, "lora_bias": False, "layer_replication": None, "use_qalora": False,
                "init_lora_weights": True, "megatron_core": "megatron.core", "revision": None, "a new one": None,
                "exclude_modules": None, "loftq_config": {}, "auto_mapping": None, "peft_version": "0.99"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | harmless))
    assert replace(lora.read_adapter(tmp_path), targets=()) == Adapter(4, 8.0, 0.0, "dora", ())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "all-linear"}))
    assert lora.read_adapter(tmp_path).targets == ("all-linear",)


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
        lora.read_adapter(tmp_path)
    assert "adapter_config.json" in str(error.value) and ("expected" in str(error.value) or content is None)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# Folded in


def merged(base: Path, folder: Path, kind: str | None = None, exported: Path | None = None) -> dict:
    """Logits with an adapter folded into its base, which is rounded as `kind` before."""
    model = opened(base, lora.read_adapter(folder))
    lora.load(model, folder)
    lora.merge(model, kind)
    plain = Llama(ModelConfig.from_folder(base))
    result = {"logits": logits(model.eval()), "adapters": len(lora.adapted(model)),
              "same names": [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]}
    if exported:
        pretrained.export(model, exported, json.loads((base / "config.json").read_text()), dtype=torch.float32)
    return result


@pytest.mark.parametrize("base", ["odd", "biased"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_merged_model_computes_the_same_and_opens_in_transformers(ranks, bases, tmp_path, world, variant, base):
    """C38, C33: nothing of the adapter is left in it."""
    unmerged = ranks(1, write_adapter, bases[base], tmp_path / "adapter", Adapter(4, 6.0, variant=variant))[0]["logits"]
    found = ranks(world, merged, bases[base], tmp_path / "adapter", exported=tmp_path / "merged")[-1]
    assert_near(found["logits"], unmerged)
    assert (their_logits(peft_base(bases[base])) - unmerged).abs().max() > 0.1
    assert found["same names"] and found["adapters"] == 0
    assert_near(their_logits(peft_base(tmp_path / "merged")), unmerged)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")], ids=["all", "two of seven"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
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
        lora.merge(model)
    except ValueError as error:
        return str(error)
    return "folded into integers"


def test_folding_into_integers_themselves_is_refused(ranks, bases):
    """C38: the packed rows of int8 have the shape of weights, so nothing else would notice."""
    assert ranks(1, merge_packed, bases["blocks"]) != ["folded into integers"]


# The command


def command(*arguments, **options) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return subprocess.run([sys.executable, str(Path(lora.__file__)), *map(str, arguments)], text=True, timeout=300,
                          capture_output=True, env=environment | {"OMP_NUM_THREADS": "1"}, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base with the bundled tokenizer, as the command wants it."""
    model = Llama(replace(BLOCKS, vocab_size=1280))
    pretrained.initialize(model, seed=0)
    folder = tmp_path_factory.mktemp("folder") / "base"
    pretrained.export(model, folder, model.config.to_dict(), [TOKENIZER], torch.float32)
    return folder


def test_the_command_writes_a_folder_that_transformers_opens(ranks, folder, tmp_path):
    """C38: config, tokenizer and weights; with --quantize, those of the base that was trained over."""
    adapter = Adapter(4, 6.0, variant="rslora")
    expected = ranks(2, write_adapter, folder, tmp_path / "adapter", adapter, "nf4")[0]["logits"]
    out = tmp_path / "new/merged"
    done = command("--model", folder, "--adapter", tmp_path / "adapter", "--output", out, "--dtype", "float32",
                   "--quantize", "nf4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and len(done.stdout.splitlines()) == 1
    assert_near(their_logits(peft_base(out)), expected, 2e-5)
    assert (out / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_the_command_writes_bf16_of_the_merged_weights_unless_asked_otherwise(
    ranks, folder, tmp_path, monkeypatch, capsys
):
    """C38: 16 or 32 bits, never the packed ones; rounded once, from sums in fp32."""
    ranks(1, write_adapter, folder, tmp_path / "adapter", Adapter(4, 6.0))
    stored, base = load_file(tmp_path / "adapter/adapter_model.safetensors"), load_file(folder / "model.safetensors")
    for kind in ("none", "int8"):
        out = tmp_path / kind
        status, told = in_process(monkeypatch, capsys, "--model", folder, "--adapter", tmp_path / "adapter",
                                  "--output", out, "--quantize", kind)
        assert (status, told) == (0, [])
        found = load_file(out / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16} and found.keys() == base.keys()
        for name, weight in base.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_%s.weight"
            if key % "A" in stored and kind == "none":
                weight = weight.double() + 6 / 4 * stored[key % "B"].double() @ stored[key % "A"].double()
            if key % "A" not in stored or kind == "none":
                assert (found[name].double() - weight).abs().max() <= 2.0**-8 * weight.abs().max(), name


def in_process(monkeypatch, capsys, *arguments) -> tuple[int, list[str]]:
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, arguments)])
    status = 0
    try:
        lora.run(lora.main)
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr().err.splitlines()


MISTAKES = {
    "no flag": (["--adaptor", "x"], "--adaptor"),
    "no such model": (["--model", "nowhere"], "nowhere: no such folder"),
    "no such adapter": (["--adapter", "nowhere"], "nowhere/adapter_config.json: is missing"),
    "a file as adapter": (["--adapter", "{saved}/adapter_config.json"], "is missing or not a file"),
    "no such kind": (["--quantize", "int3"], "--quantize"),
    "output taken": (["--output", "{saved}"], "expected a name that is free"),
    "another base's adapter": (["--adapter", "{saved}"], "expected F32 [4, 64]"),
    "a linear it has not": (["--adapter", "{foreign}"], "'side_proj': no such linear"),
    "a rank without end": (["--adapter", "{giant}"], "r"),
    "widths that do not divide": (["--model", "{narrow}", "--adapter", "{on_narrow}", "--quantize", "nf4"],
                                  "expected a multiple of 64"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(
    ranks, bases, folder, saved, tmp_path, monkeypatch, capsys, case
):
    """R18: no traceback, and nothing is written."""
    places = {"saved": saved} | {name: tmp_path / name for name in ("foreign", "giant", "narrow", "on_narrow")}
    ranks(1, write_adapter, folder, tmp_path / "fitting", Adapter(4, 6.0))
    about = json.loads((tmp_path / "fitting/adapter_config.json").read_text())
    for name, change in (("foreign", {"target_modules": ["side_proj"]}), ("giant", {"r": 10**30})):
        shutil.copytree(tmp_path / "fitting", places[name])
        (places[name] / "adapter_config.json").write_text(json.dumps(about | change))
    if case == "widths that do not divide":
        narrow = Llama(replace(ODD, vocab_size=1280))
        pretrained.initialize(narrow, seed=0)
        pretrained.export(narrow, places["narrow"], narrow.config.to_dict(), [TOKENIZER])
        ranks(1, write_adapter, places["narrow"], places["on_narrow"], Adapter(4, 6.0))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments, expected = MISTAKES[case]
    arguments = [argument.format(**places) for argument in arguments]
    status, told = in_process(monkeypatch, capsys, "--model", folder, "--adapter", tmp_path / "fitting", "--output",
                              tmp_path / "merged", *arguments)
    assert status == 2 and len(told) == 1 and expected in told[0], told
    assert sorted(tmp_path.rglob("*")) == before and not dist.is_initialized()


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
        lora.read_adapter(path.parent)


@pytest.mark.parametrize("value", ["false", 1, [], {}])
def test_a_switch_that_is_not_a_boolean_is_refused(tmp_path, value):
    """R13: "false" would be taken for true."""
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="use_rslora, use_dora"):
        lora.read_adapter(tmp_path)
