"""The model that is laid out for generation computes what the model computes."""

import pytest
import torch
from small_llama import BASE, LENGTHS, config_of, llama3, random_tokens, randomize

from llama.generation.captured import CapturedSteps
from llama.generation.decode import generate
from llama.generation.layouts import Columns, Packed, Panels, Rows, choose
from llama.generation.request import Request
from llama.generation.settings import GenerationSettings
from llama.generation.step import FlatLlama, lay_out
from llama.model import Llama, PackedDocuments
from llama.model.quantize import quantize
from llama.storage.peft import Adapter
from lora import apply_adapter

LAYOUTS = [Rows, Columns, Panels, Packed]
SHAPES = [
    {}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "tie_word_embeddings": True}, {"head_dim": 6},
    {"attention_bias": True, "mlp_bias": True}, {"vocab_size": 9001, "tie_word_embeddings": True},
    llama3(8.0) | {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 72},
]  # fmt: skip


def random_model(raw: dict, dtype: torch.dtype = torch.float32) -> Llama:
    model = Llama(config_of(BASE | raw)).to(dtype)
    randomize(model)
    return model.requires_grad_(False)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float64, 1e-14)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_product_and_the_rows_of_its_matrix(layout, dtype, tolerance):
    """One row, several, and many take different ways; 70 outputs fill no whole number of panels."""
    if dtype == torch.float64 and layout is Packed:
        pytest.skip("oneDNN has no fp64")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 33, generator=generator).to(dtype)
    for bias in (torch.randn(70, generator=generator).to(dtype), None):
        laid_out = layout(weight, bias, {})
        for rows in (1, 5, 80):
            x = torch.randn(rows, 33, generator=generator).to(dtype)
            expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
            assert error_of(laid_out(x), expected) < tolerance
    if layout.has_rows:
        ids = torch.tensor([69, 0, 5, 69])
        assert torch.equal(laid_out.rows(ids), weight[ids])


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_logits_equal_the_models_in_fp32_and_fp64(shape, rows):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        model = random_model(SHAPES[shape], dtype)
        tokens = random_tokens(model.config.vocab_size)
        chosen = torch.tensor([0, 7, 62])
        expected = model.logits(tokens, PackedDocuments(LENGTHS))
        flat = lay_out(model, rows)
        assert isinstance(flat, FlatLlama)
        assert error_of(flat.logits(tokens, PackedDocuments(LENGTHS)), expected) < tolerance
        assert error_of(flat.logits(tokens, PackedDocuments(LENGTHS), chosen), expected[chosen]) < tolerance


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_equal_those_of_the_model_as_it_was(batch_size):
    model = random_model({"tie_word_embeddings": True})
    prompts = [random_tokens(96, [length], seed=length).tolist() for length in (5, 1, 40, 17)]
    requests = [Request(prompt, GenerationSettings(max_new_tokens=30)) for prompt in prompts]
    expected = dict(generate(model, requests, batch_size))
    assert dict(generate(lay_out(model, batch_size), requests, batch_size)) == expected


def test_steps_of_fixed_shapes_equal_the_steps_that_grow():
    """What a GPU records: 3 of 5 prompts at a time, so a row is left over, and the cache grows from 256 to 512."""
    model = random_model({"max_position_embeddings": 300})
    prompts = [random_tokens(96, [length], seed=length).tolist() for length in (5, 1, 240, 17, 3)]
    requests = [Request(prompt, GenerationSettings(max_new_tokens=30)) for prompt in prompts]
    expected = dict(generate(model, requests, 3))
    captured = CapturedSteps(model.logits)
    assert dict(generate(model, requests, 3, next_logits=captured)) == expected
    assert captured.keys.shape[2] == 512


def test_a_model_with_quantised_linears_or_an_adapter_stays_as_it_is():
    model = random_model({})
    quantize(model, "int8")
    assert lay_out(model, 1) is model
    model = random_model({})
    apply_adapter(model, Adapter(2, 4.0))
    assert lay_out(model, 1) is model


def test_a_missing_kernel_is_announced_and_the_plain_product_taken(monkeypatch, capsys):
    for layout in (Panels, Packed):
        monkeypatch.setattr(layout, "available", lambda *_: False)
    model = random_model({})
    tokens = random_tokens(96)
    expected = model.logits(tokens, PackedDocuments(LENGTHS))
    for rows in (1, 8):
        flat = lay_out(random_model({}), rows)
        assert type(flat.head) is Rows
        assert error_of(flat.logits(tokens, PackedDocuments(LENGTHS)), expected) < 1e-5
        assert capsys.readouterr().err.count("may take twice as long") == 1
    lay_out(random_model({}, torch.float64), 1)
    assert not capsys.readouterr().err


def test_the_layout_depends_on_device_dtype_and_rows():
    """Only a CPU reads slowly in the order of `Rows`. Where a kernel is missing, that order is taken."""
    narrow = torch.empty(64, 8)
    wide = torch.empty(9000, 8)
    assert choose(narrow.to("meta"), 1) is Rows and choose(narrow.double(), 8) is Rows
    assert choose(narrow, 1) is (Panels if Panels.available() else Rows)
    assert choose(wide, 1) is (Columns if Panels.available() else Rows)
    assert choose(wide.bfloat16(), 1) is choose(narrow, 1)
    assert choose(wide, 8) is (Packed if Packed.available(torch.float32) else Rows)
