"""Frozen linears in 8 and 4 bits against NumPy in float64: codes, values, what they compute."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from llama.model.config import ModelConfig
from llama.model.decoder import Llama
from llama.model.quantize import KINDS, NF4, bytes_per_weight, quantize

# QLoRA (https://arxiv.org/abs/2305.14314), appendix E.
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# Widths are multiples of 64, as NF4 wants them.
CONFIG = ModelConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=32,
                     num_key_value_heads=1, head_dim=6, initializer_range=0.2, attention_bias=True)


def rows_of_all_kinds(width: int, seed: int = 0) -> torch.Tensor:
    """Like weights, with outliers, tiny, huge, with blocks and rows of zeros."""
    rows = torch.randn(24, width, generator=torch.Generator().manual_seed(seed)) * 0.02
    rows[1] *= 1e-6
    rows[2] *= 1e6
    rows[3] = 0
    rows[4, :64] = 0
    rows[5, width // 3], rows[6, width - 1] = 3.0, -3.0
    rows[7, 64 * (width // 64) - 1] = 1e-3 if width >= 64 else 0
    rows[8] *= torch.logspace(-4, 0, width)
    rows[9] = rows[9].abs()
    rows[10] = 0.5
    rows[11, :64] *= 1e-5
    return rows


def nearest(values: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of the nearest code, the lower of two as near; and by how much it is the nearest."""
    distances = np.abs(values[..., None] - code)
    two = np.sort(distances, -1)[..., :2]
    return distances.argmin(-1), two[..., 1] - two[..., 0]


def packed_by_numpy(kind: str, packed: dict[str, torch.Tensor]) -> np.ndarray:
    """Rows in float64 from the packed bytes, read as the file's format says."""
    weight = packed["weight"].numpy()
    scale = np.frombuffer(packed["weight_scale"].numpy().tobytes(), "<f4").astype(np.float64)[:, None]
    if kind == "int8":
        return weight.astype(np.float64) * scale
    codes = np.stack([weight >> 4, weight & 15], -1).reshape(len(weight), -1)
    absmax = packed["weight_absmax"].numpy().astype(np.float64) * scale
    return np.array(PAPER)[codes] * absmax.repeat(64, 1)


def dequantized(kind: str, rows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return KINDS[kind].dequantize_rows(*KINDS[kind].quantize_rows(rows).values(), dtype=dtype)


# The codes


def test_the_code_is_the_papers_and_its_quantiles_are_those_of_a_normal_distribution():
    """DESIGN, quantisation: literally, and by its construction: 8 quantiles above 0, 7 below, both ends at 1."""
    assert NF4.dtype == torch.float32 and torch.equal(NF4, torch.tensor(PAPER))
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    code = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4.numpy(), code / code.max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 30, 200, 576])
def test_int8_takes_the_nearest_of_255_steps_of_a_rows_absmax(width, dtype):
    """C38: s = absmax / 127; no weight is further off than s / 2; a row of zeros stays one."""
    rows = rows_of_all_kinds(width).to(dtype)
    packed = KINDS["int8"].quantize_rows(rows)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in packed.items()} == {
        "weight": ((24, width), torch.int8), "weight_scale": ((24, 4), torch.uint8)}
    values = rows.double().numpy()
    scale = np.abs(values).max(1, keepdims=True) / 127
    found = np.frombuffer(packed["weight_scale"].numpy().tobytes(), "<f4").astype(np.float64)[:, None]
    np.testing.assert_allclose(found, scale, rtol=1e-6)
    steps = values / np.where(scale > 0, scale, 1)
    codes = packed["weight"].numpy()
    assert np.abs(codes.astype(int)).max() == 127
    clear = np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1e-4  # else fp32 may see either as the nearer
    assert clear.mean() > 0.99 and np.array_equal(codes[clear], np.rint(steps)[clear])
    back = dequantized("int8", rows)
    np.testing.assert_allclose(back.numpy(), packed_by_numpy("int8", packed), rtol=1e-6, atol=0)
    assert (np.abs(back.double().numpy() - values) <= scale / 2 * (1 + 1e-4)).all() and not back[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [64, 192, 576])
def test_nf4_takes_the_nearest_of_16_codes_of_a_blocks_absmax(width, dtype):
    """C38: the first of two in a byte's upper half; absmaxes in 8 bits; the error is bounded by both roundings."""
    rows = rows_of_all_kinds(width).to(dtype)
    packed = KINDS["nf4"].quantize_rows(rows)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in packed.items()} == {
        "weight": ((24, width // 2), torch.uint8), "weight_absmax": ((24, width // 64), torch.uint8),
        "weight_scale": ((24, 4), torch.uint8)}
    values, code = rows.double().numpy(), np.array(PAPER, np.float32).astype(np.float64)
    blocks = values.reshape(24, -1, 64)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    expected, margin = nearest(blocks / np.where(absmax > 0, absmax, 1), code)
    weight = packed["weight"].numpy()
    codes = np.stack([weight >> 4, weight & 15], -1).reshape(blocks.shape)
    clear = margin > 1e-6
    assert clear.mean() > 0.99 and np.array_equal(codes[clear], expected[clear])

    scale = absmax.max(1, keepdims=True) / 255
    found = np.frombuffer(packed["weight_scale"].numpy().tobytes(), "<f4").astype(np.float64)
    np.testing.assert_allclose(found, scale.ravel(), rtol=1e-6)
    coarse = packed["weight_absmax"].numpy().astype(np.float64)[..., None] * found.reshape(scale.shape)
    # Half a step; but a block that is not all zeros keeps at least one step.
    assert (np.abs(coarse - absmax) <= np.where(absmax < scale / 2, scale, scale / 2) * (1 + 1e-4)).all()
    assert ((coarse > 0) == (absmax > 0)).all() and ((absmax < scale / 2) & (absmax > 0)).any() == (width > 64)

    back = dequantized("nf4", rows)
    np.testing.assert_allclose(back.numpy(), packed_by_numpy("nf4", packed), rtol=1e-6, atol=0)
    error = np.abs(back.double().numpy().reshape(blocks.shape) - blocks)
    bound = np.diff(code).max() / 2 * absmax + np.abs(coarse - absmax)
    assert (error <= bound * (1 + 1e-6)).all() and not back[3].any() and not back[4, :64].any()


def test_two_codes_share_a_byte_the_first_in_its_upper_half():
    """As bitsandbytes packs them; a block whose weights are the codes themselves comes back exactly."""
    row = torch.tensor([PAPER * 4])
    packed = KINDS["nf4"].quantize_rows(row)
    assert packed["weight"][0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert packed["weight_absmax"].tolist() == [[255]]
    torch.testing.assert_close(dequantized("nf4", row), row, rtol=1e-7, atol=0)


def test_halfway_between_two_codes_the_lower_one_is_taken():
    """So that every rank, device and version packs the same bytes."""
    between = (NF4[1:] + NF4[:-1]) / 2
    row = torch.cat([between, torch.nextafter(between, torch.tensor(2.0)), torch.nextafter(between, torch.tensor(-2.0)),
                     torch.ones(19)])
    weight = KINDS["nf4"].quantize_rows(row[None])["weight"][0]
    codes = torch.stack([weight >> 4, weight & 15], 1).flatten().tolist()
    assert codes[:15] == codes[30:45] == list(range(15)) and codes[15:30] == list(range(1, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_packed_as_if_it_were_alone(kind):
    """R25: or another number of ranks, or pieces, would give another model."""
    rows = rows_of_all_kinds(192)
    together = KINDS[kind].quantize_rows(rows)
    for i, row in enumerate(rows):
        alone = KINDS[kind].quantize_rows(row[None])
        assert all(torch.equal(alone[name][0], together[name][i]) for name in together)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_are_packed_to_no_rows(kind):
    """A rank may hold none of a short matrix, such as the keys' of a model with one key/value head."""
    packed = KINDS[kind].quantize_rows(torch.zeros(0, 192))
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == {
        name: (0, width) for name, (width, _) in KINDS[kind].packed(192).items()}
    assert KINDS[kind].dequantize_rows(*packed.values(), dtype=torch.float32).shape == (0, 192)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_values_are_the_fp32_ones_rounded(kind):
    """A weight is made whole in what is computed in: a rounding of each factor, and one of the product."""
    rows = rows_of_all_kinds(192)
    wide, narrow = dequantized(kind, rows), dequantized(kind, rows, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert ((narrow.float() - wide).abs() <= 3.02 * 2.0**-8 * wide.abs()).all()


@pytest.mark.parametrize("kind, most", [("int8", 1.02), ("nf4", 0.53)])
def test_bytes_per_weight_scales_included(kind, most):
    """DESIGN, quantisation: at SmolLM2's widths 576 and 1536, counted on the meta device and by hand."""
    config = ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2,
                         num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    with torch.device("meta"):
        model = Llama(config)
        weights = sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, nn.Linear))
        assert bytes_per_weight(model) == 0
        quantize(model, kind)
    packed = [p for name, p in model.layers.named_parameters() if "norm" not in name]
    held = sum(p.numel() * p.itemsize for p in packed)
    assert bytes_per_weight(model) == pytest.approx(held / weights) and held / weights <= most
    assert not any(p.is_floating_point() for p in packed)
    assert model.lm_head.weight.is_floating_point() and model.embed_tokens.weight.is_floating_point()
    if kind == "int8":
        assert sum(KINDS[kind].packed(200)[name][0] for name in ("weight", "weight_scale")) / 200 <= most


# What is computed


def quantized_pair(kind: str, bias: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Linear]:
    """A packed linear, and a plain one that holds the very weights that it stands for."""
    plain = nn.Linear(192, 24, bias=bias)
    packed = KINDS[kind](plain)
    with torch.no_grad():
        rows = rows_of_all_kinds(192)
        for name, value in packed.quantize_rows(rows / rows.std()).items():
            packed.get_parameter(name).copy_(value)
        reference = nn.Linear(192, 24, bias=bias, dtype=dtype)
        reference.weight.copy_(packed.base_weight())
        if bias:
            reference.bias.copy_(plain.bias)
    return packed.requires_grad_(False), reference.requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_linear_computes_as_a_plain_one_with_its_weights_does(kind, bias):
    """C38, C35: y and d_x, in fp32 tightly; nothing that is packed gets a gradient."""
    packed, plain = quantized_pair(kind, bias, torch.float32)
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(1))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [module(given) for module, given in zip((packed, plain), xs, strict=True)]
    d_y = torch.randn(9, 24, generator=torch.Generator().manual_seed(2))
    for y in ys:
        y.backward(d_y)
    for found, expected in (ys, [given.grad for given in xs]):
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert all(p.grad is None for p in packed.parameters())
    assert isinstance(packed, nn.Linear) and (packed.in_features, packed.out_features) == (192, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_it_stays_as_near_to_float64_as_bf16_allows(kind):
    """C38: outputs in bf16, errors of a percent of the largest value."""
    packed, plain = quantized_pair(kind, False, torch.float64)
    wide = torch.randn(9, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    narrow = wide.detach().bfloat16().requires_grad_()
    y, expected = packed(narrow), plain(wide)
    d_y = torch.randn(9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y.backward(d_y.bfloat16())
    expected.backward(d_y)
    for found, true in ((y, expected), (narrow.grad, wide.grad)):
        assert found.dtype == torch.bfloat16
        assert (found.double() - true).abs().max() <= 0.01 * true.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_whole_is_kept_for_the_backward(kind):
    """QLoRA's point: the packed rows are, and are made whole again when they are needed."""
    linear, kept = quantized_pair(kind, False, torch.float32)[0], []
    x = torch.randn(5, 192, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x).sum().backward()
    packed = {tensor.data_ptr() for tensor in linear.packed_weight().values()}
    assert {tensor.data_ptr() for tensor in kept} >= packed
    assert all(tensor.numel() <= 5 * 192 < 24 * 192 for tensor in kept if tensor.data_ptr() not in packed)


def test_a_width_that_does_not_divide_into_blocks_is_refused_by_name():
    """R18: before anything is read; int8 takes any width."""
    with torch.device("meta"):
        model = Llama(replace(CONFIG, intermediate_size=96))
        with pytest.raises(ValueError, match="^mlp.down_proj has 96 columns, expected a multiple of 64$"):
            quantize(model, "nf4")
        quantize(Llama(replace(CONFIG, intermediate_size=43)), "int8")


def test_a_bias_is_not_rounded():
    """It is added, as it was, to the product."""
    packed, plain = quantized_pair("int8", True, torch.float32)
    assert torch.equal(packed(torch.zeros(2, 192)), plain.bias.expand(2, -1)) and plain.bias.any()
