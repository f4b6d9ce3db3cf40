"""Quantised linears with the rooms around them: loaded from a folder, sharded over ranks, under adapters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded import build, this_process, whole
from torch import nn

from llama.boundary.errors import UserError
from llama.boundary.untrusted import read_json
from llama.model.config import ModelConfig
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments
from llama.model.quantize import KINDS, quantize
from llama.storage import slices
from llama.storage.base import config_from_json, config_to_json
from llama.storage.peft import Adapter
from llama.storage.pretrained import export_model, initialize_weights, load_weights
from lora import apply_adapter, initialize_adapter

# Widths are multiples of 64, as NF4 wants them; 192 rows, and 6 of k_proj and v_proj, which 4 ranks hold 2, 2, 2, 0.
CONFIG = ModelConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=32,
                     num_key_value_heads=1, head_dim=6, initializer_range=0.2, attention_bias=True)
# For int8 no size need divide by anything.
ODD = ModelConfig(vocab_size=97, hidden_size=30, intermediate_size=43, num_hidden_layers=2, num_attention_heads=3,
                  num_key_value_heads=1, head_dim=10, initializer_range=0.2)
TOKENS = torch.randint(97, (23,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Pretrained folders in fp32: one whose widths divide into blocks, one where nothing divides."""
    made = {}
    for name, config in (("blocks", CONFIG), ("odd", ODD)):
        model = Llama(config)
        initialize_weights(model, seed=0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 if p.ndim == 1 else 0.0)
        made[name] = tmp_path_factory.mktemp("folders") / name
        export_model(model, made[name], config_to_json(config), dtype=torch.float32)
    return made


def opened(folder: Path, kind: str, dtype: torch.dtype) -> Llama:
    def change(model: Llama) -> None:
        model.requires_grad_(False)
        quantize(model, kind)

    config = config_from_json(read_json(folder, "config.json"), folder)
    model = build(config, this_process(), dtype, change)
    load_weights(model, folder)
    return model


def loaded(folder: Path, kind: str, piece: int) -> tuple[dict, list[tuple[int, int]]]:
    """Every parameter made whole; and the bytes and rows of each piece that was read to be packed."""
    pieces, real_piece, real = [], slices.COPIED_AT_ONCE, KINDS[kind].quantize_rows

    def watched(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces.append((rows.nbytes, len(rows)))
        return real(rows)

    slices.COPIED_AT_ONCE, KINDS[kind].quantize_rows = piece, staticmethod(watched)
    try:
        model = opened(folder, kind, torch.float32)
    finally:
        slices.COPIED_AT_ONCE, KINDS[kind].quantize_rows = real_piece, staticmethod(real)
    return {name: whole(p) for name, p in model.named_parameters()}, pieces


@pytest.mark.parametrize("world, kind, base", [
    (4, "int8", "odd"),
    (4, "nf4", "blocks"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (1, "int8", "odd"), (2, "int8", "odd"), (1, "int8", "blocks"), (2, "int8", "blocks"), (4, "int8", "blocks"),
        (1, "nf4", "blocks"), (2, "nf4", "blocks"),
    ]),
])
def test_loading_packs_each_ranks_rows_a_piece_at_a_time_to_the_same_bits(ranks, folders, world, kind, base):
    """C38, C40, R25: no rank ever holds the model, or a large matrix, in a wide form; ranks without a row take part."""
    stored, piece = load_file(folders[base] / "model.safetensors"), 2048
    results = ranks(world, loaded, folders[base], kind, piece)
    linears = [name for name, value in stored.items() if "proj.weight" in name]
    for values, _ in results:
        for name, value in stored.items():
            found = {key: values[f"{name.removeprefix('model.')}{key[6:]}"] for key in
                     (KINDS[kind].packed(1) if name in linears else ["weight"])}
            expected = KINDS[kind].quantize_rows(value) if name in linears else {"weight": value}
            assert all(torch.equal(found[key], expected[key]) for key in expected), name
    pieces = [entry for _, part in results for entry in part]
    assert sum(rows for _, rows in pieces) == sum(len(stored[name]) for name in linears)
    assert len(pieces) > 2 * len(linears) and max(size for size, _ in pieces) <= piece


def logits_and_bits(folder: Path, kind: str, dtype: torch.dtype) -> dict:
    """Logits, and what a layer saw of its packed parameters while it computed, against what was loaded."""
    model, seen = opened(folder, kind, dtype), {}
    linear = model.layers[1].self_attn.k_proj
    linear.register_forward_pre_hook(
        lambda module, _: seen.update({k: whole(v) for k, v in module.packed_weight().items()}))
    documents = PackedDocuments([len(TOKENS)])
    with torch.no_grad():
        logits = model.eval().logits(TOKENS, documents)
    return {"logits": logits, "seen": seen}


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16],
                         ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_sharded_logits_are_the_one_rank_ones_and_scales_reach_the_layer_unrounded(ranks, folders, kind, dtype):
    """C38, R25: integers pass FSDP's mixed precision as they are, and with them the bytes of fp32 scales."""
    base = folders["blocks"]
    (alone,) = ranks(1, logits_and_bits, base, kind, dtype)
    weight = load_file(base / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    expected = KINDS[kind].quantize_rows(weight)
    for found in (alone, *ranks(2, logits_and_bits, base, kind, dtype), *ranks(4, logits_and_bits, base, kind, dtype)):
        assert torch.equal(found["logits"], alone["logits"]) and found["logits"].dtype == dtype
        assert found["seen"].keys() == expected.keys()
        assert all(torch.equal(found["seen"][name], expected[name]) for name in expected)
    scale = expected["weight_scale"].view(torch.float32)
    assert not torch.equal(scale, scale.bfloat16().float())


def rounded(kind: str, rows: torch.Tensor) -> torch.Tensor:
    return KINDS[kind].dequantize_rows(*KINDS[kind].quantize_rows(rows).values(), dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_plain_model_with_the_rounded_weights(ranks, folders, kind):
    """C38: all linears of the layers are rounded, embedding and lm_head are not."""
    stored = load_file(folders["blocks"] / "model.safetensors")
    plain = Llama(CONFIG)
    plain.load_state_dict({
        name.removeprefix("model."): rounded(kind, value) if "proj.weight" in name else value
        for name, value in stored.items()})
    documents = PackedDocuments([len(TOKENS)])
    with torch.no_grad():
        expected = plain.double().logits(TOKENS, documents)
    (found,) = ranks(1, logits_and_bits, folders["blocks"], kind, torch.float32)
    assert (found["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_saved_tensor_of_another_shape_is_refused_before_anything_is_packed(ranks, folders, tmp_path):
    """R18: the check is of the file's shape, not of the packed one."""
    stored = load_file(folders["blocks"] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(stored | {name: stored[name][:, :32].contiguous()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["blocks"] / "config.json").read_text())
    for message in ranks(2, refused, tmp_path, "nf4"):
        assert "up_proj.weight' is F32 [128, 32], expected F32 [128, 64]" in message


def refused(folder: Path, kind: str) -> str:
    try:
        opened(folder, kind, torch.float32)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_an_adapter_nothing_that_is_whole_is_kept_for_the_backward(kind, variant):
    """QLoRA's point: the packed rows are, and are made whole again when they are needed."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"linear": KINDS[kind](nn.Linear(192, 24, bias=False))})])

    holder, kept = Holder(), []
    linear = holder.layers[0]["linear"]
    rows = torch.randn(24, 192, generator=torch.Generator().manual_seed(0))
    for name, value in linear.quantize_rows(rows).items():
        linear.get_parameter(name).copy_(value)
    apply_adapter(holder, Adapter(rank=2, alpha=2.0, variant=variant))
    initialize_adapter(holder, 0)
    x = torch.randn(5, 192, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x).sum().backward()
    packed = {tensor.data_ptr() for tensor in linear.packed_weight().values()}
    assert {tensor.data_ptr() for tensor in kept} >= packed
    assert all(tensor.numel() <= 5 * 192 < 24 * 192 for tensor in kept if tensor.data_ptr() not in packed)
