"""What a config.json may say, and how everything else is refused: one line that names the value."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from llama.model.config import ROPE_TYPES, TINY, ConfigError, ModelConfig, RopeScaling
from llama.model.rope import rope_frequencies

VALID = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
POSITIVE = [*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
            "initializer_range"]


def refusal(values, *named: str) -> None:
    """ModelConfig.from_dict(values) must raise a ConfigError of one line, with the place once and `named` in it."""
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(values, where="here/config.json")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("here/config.json: ") and message.count("config.json") == 1
    for name in named:
        assert name in message


def without(*names: str) -> dict:
    return {name: value for name, value in VALID.items() if name not in names}


@pytest.mark.parametrize("values", [None, 3, "llama", [VALID], True])
def test_what_is_not_an_object_is_refused(values):
    refusal(values, type(values).__name__)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "Llama", "", None, 7, ["llama\n"]])
def test_another_model_type_is_refused_by_name(model_type):
    refusal(VALID | {"model_type": model_type}, "model_type", repr(model_type))


def test_a_missing_model_type_is_refused():
    refusal(without("model_type"), "model_type", "None")


@pytest.mark.parametrize("activation", ["gelu", "swish\n", None, 1])
def test_another_activation_is_refused_by_name(activation):
    refusal(VALID | {"hidden_act": activation}, "hidden_act", repr(activation))


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_number_is_named_and_null_counts_as_missing(name):
    refusal(without(name), "missing", name)
    refusal(VALID | {name: None}, "missing", name)


def test_all_missing_numbers_are_named_at_once():
    refusal({"model_type": "llama"}, *REQUIRED)


@pytest.mark.parametrize("value", [0, -4, "48", [], {}, True, float("nan"), float("inf"), "a\nb"])
@pytest.mark.parametrize("name", POSITIVE)
def test_a_number_of_the_wrong_kind_is_named_with_its_value(name, value):
    refusal(VALID | {name: value}, name, repr(value))


@pytest.mark.parametrize("name", [name for name in POSITIVE if "rope" not in name and "r_r" not in name
                                  and "eps" not in name])
def test_a_size_that_is_not_whole_is_refused(name):
    refusal(VALID | {name: 4.5}, name, "4.5")


@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_a_switch_that_is_not_true_or_false_is_refused(name, value):
    refusal(VALID | {name: value}, name, repr(value))


@pytest.mark.parametrize("changes, named", [
    ({"num_key_value_heads": 3}, ["4", "3"]),
    ({"num_key_value_heads": 8}, ["4", "8"]),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["48", "5"]),
    ({"head_dim": 13}, ["head_dim", "13"]),
    ({"hidden_size": 4}, ["head_dim", "1"]),
])
def test_numbers_that_contradict_each_other_are_named(changes, named):
    refusal(VALID | changes, *named)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling, named", [
    ("linear\n", ["rope", "linear\\n"]),
    ([1], ["rope", "[1]"]),
    ({"rope_type": "yarn", "factor": 4.0}, ["rope_type", "'yarn'"]),
    ({"type": "dynamic", "factor": 4.0}, ["rope_type", "'dynamic'"]),
    ({"type": None}, ["rope_type", "None"]),
    ({"rope_type": ["llama3"]}, ["rope_type", "['llama3']"]),
    ({"rope_type": "linear"}, ["linear", "factor"]),
    ({"rope_type": "linear", "factor": 0}, ["factor", "0"]),
    ({"rope_type": "linear", "factor": "4"}, ["factor", "'4'"]),
    ({"rope_type": "linear", "factor": True}, ["factor", "True"]),
    ({"rope_type": "llama3", "factor": 8.0}, ["low_freq_factor", "high_freq_factor", "original_max_position_embed"]),
    (LLAMA3 | {"high_freq_factor": None}, ["high_freq_factor", "None"]),
    (LLAMA3 | {"original_max_position_embeddings": -1}, ["original_max_position_embeddings", "-1"]),
    (LLAMA3 | {"low_freq_factor": 4.0}, ["low_freq_factor", "high_freq_factor", "4.0"]),
    (LLAMA3 | {"low_freq_factor": 5.0}, ["low_freq_factor", "high_freq_factor", "5.0"]),
    (LLAMA3 | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    (LLAMA3 | {"rope_theta": "big"}, ["rope_theta", "'big'"]),
])
def test_a_rope_scaling_that_cannot_be_honoured_is_named(key, scaling, named):
    """C30: what is not understood must not be ignored."""
    refusal(VALID | {key: scaling}, *named)


def test_a_partial_rotary_factor_is_refused_wherever_it_stands():
    """A Llama rotates all of each head; 1, or nothing, is what its configs say."""
    refusal(VALID | {"partial_rotary_factor": 0.25}, "partial_rotary_factor", "0.25")
    refusal(VALID | {"partial_rotary_factor": 1.0, "rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "0.5")
    ModelConfig.from_dict(VALID | {"partial_rotary_factor": 1.0})
    ModelConfig.from_dict(VALID | {"partial_rotary_factor": None})


@pytest.mark.parametrize("scaling", [("yarn", 4.0), ("linear", -4.0), ("llama3", 8.0, 4.0, 4.0)])
def test_a_rope_scaling_given_in_code_is_checked_like_one_that_was_read(scaling):
    """C30: rope_frequencies would leave a type that it does not know unscaled."""
    with pytest.raises(ConfigError):
        replace(TINY, rope_scaling=RopeScaling(*scaling))


def test_what_may_be_left_out_gets_hugging_faces_defaults():
    config = ModelConfig.from_dict(without("num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
                                           "rope_theta", "tie_word_embeddings", "hidden_act"))
    theirs = LlamaConfig(**{name: VALID[name] for name in REQUIRED})
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "attention_bias", "mlp_bias", "initializer_range"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rope_scaling.rope_type == theirs.rope_parameters["rope_type"] == "default"


def test_null_means_left_out():
    config = ModelConfig.from_dict(VALID | {"head_dim": None, "rope_scaling": None, "num_key_value_heads": None})
    assert (config.head_dim, config.num_key_value_heads, config.rope_scaling) == (12, 4, RopeScaling())


@pytest.mark.parametrize("config", [
    TINY,
    replace(TINY, head_dim=20, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, rope_theta=5e5),
    replace(TINY, rope_scaling=RopeScaling("linear", factor=4.0)),
    replace(TINY, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 512), num_key_value_heads=1),
])
def test_to_dict_survives_json_and_transformers(config, tmp_path):
    """C34: ours -> config.json -> transformers -> config.json -> ours changes nothing."""
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_folder(tmp_path) == config
    LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert ModelConfig.from_folder(tmp_path) == config


@pytest.mark.parametrize("content, named", [
    (b"", "not valid JSON"),
    (b'{"model_type": "llama"', "not valid JSON"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b'{"model_type": "llama", "model_type', "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    (b"[]", "list"),
    (b"null", "NoneType"),
    (b'{"model_type": "bert"}', "'bert'"),
], ids=range(9))
def test_a_file_that_holds_no_config_is_refused_by_its_path(content, named, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_folder(tmp_path)
    message = str(error.value)
    assert "\n" not in message and named in message and message.startswith(f"{tmp_path / 'config.json'}: ")


def test_a_missing_file_and_a_folder_in_its_place_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="not a file"):
        ModelConfig.from_folder(tmp_path)


# What json.loads can return, with keys and words that mean something to the reader.
WORDS = [*VALID, "head_dim", "attention_bias", "rope_scaling", "rope_parameters", "type", *LLAMA3,
         "partial_rotary_factor", *ROPE_TYPES, "llama", "silu"]
words = st.sampled_from(WORDS) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers(-2, 130) | st.integers() | st.floats() | words
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=6))


def read(values) -> None:
    try:
        config = ModelConfig.from_dict(values)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert ModelConfig.from_dict(config.to_dict()) == config


@settings(max_examples=60, deadline=None)
@given(anything)
def test_no_json_value_raises_anything_but_a_config_error(values):
    read(values)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), anything, max_size=4))
@example({"rope_scaling": LLAMA3})
@example({"hidden_size": 10**400})
def test_no_change_to_a_valid_config_raises_anything_but_a_config_error(changes):
    read(VALID | changes)


positive = st.floats(1e-3, 1e4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["linear", "llama3"]), positive, positive, positive, st.integers(1, 200_000))
@example("llama3", 8.0, 4.0, 4.0, 8192)
def test_a_scaling_that_is_accepted_gives_frequencies_between_plain_and_divided_ones(kind, f, low, high, length):
    """C30: never NaN, as equal low and high factors would give."""
    scaling = {"rope_type": kind, "factor": f, "low_freq_factor": low, "high_freq_factor": high,
               "original_max_position_embeddings": length}
    try:
        config = ModelConfig.from_dict(VALID | {"rope_scaling": scaling})
    except ConfigError:
        return
    plain = rope_frequencies(ModelConfig.from_dict(VALID))
    ends = torch.stack([plain, plain / f])
    frequencies = rope_frequencies(config)
    assert (frequencies >= ends.amin(0) * 0.999).all() and (frequencies <= ends.amax(0) * 1.001).all()
