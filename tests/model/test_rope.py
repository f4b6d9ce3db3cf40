"""Rotary frequencies and tables against transformers, float64, and what a scaling may do."""

from copy import deepcopy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_llama import BASE, config_of, exact_rope_table, llama3
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama.model.rope import rope_frequencies, rope_table


@pytest.mark.parametrize("variant", [{}, {"rope_theta": 500000.0}, llama3(8.0), llama3(32.0)])
def test_rotary_tables_are_fp32_and_right_to_1e_3_at_position_8191(variant):
    """C29: whatever the dtype of the model or of the process."""
    config = config_of(BASE | variant | {"head_dim": 128})
    positions = torch.tensor([0, 1, 255, 257, 4095, 8191])
    torch.set_default_dtype(torch.bfloat16)
    try:
        tables = rope_table(config, positions)
    finally:
        torch.set_default_dtype(torch.float32)
    for table, exact in zip(tables, exact_rope_table(config, positions), strict=True):
        assert table.dtype == torch.float32
        assert (table - exact).abs().max() <= 1e-3


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_equal_transformers(factor):
    """C30: inv_freq equals the formula of transformers, for the settings of Llama 3.1 (x 8) and 3.2 (x 32)."""
    raw = BASE | {"head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 131072} | llama3(factor)
    raw["rope_scaling"]["original_max_position_embeddings"] = 8192
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**deepcopy(raw)), device="cpu")
    frequencies = rope_frequencies(config_of(raw))
    assert attention_factor == 1.0 and frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_linear_frequencies_equal_transformers(theta):
    """C30: every frequency divided by the factor."""
    raw = BASE | {"rope_theta": theta, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](LlamaConfig(**deepcopy(raw)), device="cpu")
    assert torch.equal(rope_frequencies(config_of(raw)), expected)


positive = st.floats(1e-3, 1e4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["linear", "llama3"]), positive, positive, positive, st.integers(1, 200_000))
@example("llama3", 8.0, 4.0, 4.0, 8192)
def test_a_scaling_that_is_accepted_gives_frequencies_between_plain_and_divided_ones(kind, f, low, high, length):
    """C30: never NaN, as equal low and high factors would give."""
    scaling = {"rope_type": kind, "factor": f, "low_freq_factor": low, "high_freq_factor": high,
               "original_max_position_embeddings": length}
    try:
        config = config_of(BASE | {"rope_scaling": scaling})
    except ValueError:
        assert kind == "llama3" and low >= high
        return
    plain = rope_frequencies(config_of(BASE))
    ends = torch.stack([plain, plain / f])
    frequencies = rope_frequencies(config)
    assert (frequencies >= ends.amin(0) * 0.999).all() and (frequencies <= ends.amax(0) * 1.001).all()


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 10**30},
    {"rope_type": "llama3", "factor": 10**30, "low_freq_factor": 1, "high_freq_factor": 10**30,
     "original_max_position_embeddings": 8192},
])  # fmt: skip
def test_whole_numbers_are_numbers_however_large(scaling):
    """JSON has one kind of number: 1 followed by 30 zeros is 1e30."""
    floats = {name: float(value) if type(value) is int else value for name, value in scaling.items()}
    floats["original_max_position_embeddings"] = 8192
    whole = config_of(BASE | {"rope_theta": 10**30, "rope_scaling": scaling})
    same = config_of(BASE | {"rope_theta": 1e30, "rope_scaling": floats})
    assert torch.equal(rope_frequencies(whole), rope_frequencies(same))
