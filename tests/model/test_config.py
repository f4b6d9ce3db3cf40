"""What numbers a configuration may hold: ranges that are declared in its fields, and relations between them."""

from dataclasses import fields, replace

import pytest

from llama.boundary.errors import UserError
from llama.boundary.records import read_record
from llama.model.config import LARGEST_DEPTH, LARGEST_SIZE, ROPE_TYPES, ModelConfig, RopeScaling

VALID = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
NUMBERS = [(kind, entry.name) for kind in (ModelConfig, RopeScaling) for entry in fields(kind)
           if entry.type in (int, float)]


@pytest.mark.parametrize("changes, message", [
    ({"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple of num_key_value_heads, 3"),
    ({"num_key_value_heads": 8}, "num_attention_heads is 4, expected a multiple of num_key_value_heads, 8"),
    ({"head_dim": 13}, "head_dim is 13, expected an even number: RoPE rotates pairs"),
])
def test_numbers_that_contradict_each_other_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        replace(ModelConfig(**VALID), **changes)
    assert str(error.value) == message


@pytest.mark.parametrize("low", [4.0, 5.0])
def test_the_low_factor_of_llama3_is_below_its_high_one(low):
    """C30: equal ones would divide by zero."""
    with pytest.raises(ValueError, match=f"low_freq_factor is {low}, expected less than high_freq_factor, 4.0"):
        RopeScaling("llama3", 8.0, low, 4.0)


@pytest.mark.parametrize("rope_type", ["yarn", "dynamic\n", "", None, 3])
def test_an_unknown_rope_type_is_refused_by_name(rope_type):
    """C30: rope_frequencies would leave a type that it does not know unscaled."""
    with pytest.raises(ValueError) as error:
        RopeScaling(rope_type)
    assert str(error.value) == f"rope_type is {rope_type!r}, expected one of default, linear, llama3"


def test_a_rope_type_of_any_length_makes_a_short_message():
    with pytest.raises(ValueError) as error:
        RopeScaling("y" * 10_000)
    assert len(str(error.value)) < 200


def test_the_numbers_that_a_rope_type_needs_are_fields():
    names = {entry.name for entry in fields(RopeScaling)}
    assert all(names.issuperset(needed) for needed in ROPE_TYPES.values())


@pytest.mark.parametrize("value", [0, -4, "48", [], {}, float("nan"), float("inf"), "a\nb"], ids=repr)
@pytest.mark.parametrize("kind, name", NUMBERS, ids=[name for _, name in NUMBERS])
def test_every_number_declares_a_range_that_a_reader_holds_it_to(kind, name, value):
    """One line, which names the place, the field and the value."""
    valid = VALID if kind is ModelConfig else {}
    with pytest.raises(UserError) as error:
        read_record(kind, valid | {name: value}, "config.json")
    assert str(error.value).startswith(f"config.json: {name} is {value!r}, expected ") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, name", [case for case in NUMBERS if "int" in str(case[0].__annotations__[case[1]])])
def test_a_size_is_whole_and_has_a_largest_value(kind, name):
    valid = VALID if kind is ModelConfig else {}
    most = LARGEST_DEPTH if name == "num_hidden_layers" else LARGEST_SIZE
    for value in (4.5, most + 1):
        with pytest.raises(UserError, match=f"{name} is {value}, expected "):
            read_record(kind, valid | {name: value}, "config.json")
    if name not in ("num_attention_heads", "num_key_value_heads"):  # which depend on each other
        assert getattr(read_record(kind, valid | {name: most}, "config.json"), name) == most


@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_a_switch_that_is_not_true_or_false_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is "):
        read_record(ModelConfig, VALID | {name: value}, "config.json")


def test_a_record_says_which_numbers_are_missing():
    with pytest.raises(UserError, match="missing vocab_size, head_dim"):
        read_record(ModelConfig, {name: VALID[name] for name in VALID.keys() - {"vocab_size", "head_dim"}}, "here")
