"""What a config.json says is used as transformers uses it, refused, or announced by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama.boundary.errors import UserError
from llama.model import Llama, PackedDocuments
from llama.storage.base import TINY
from llama.storage.config_json import config_from_json, config_to_json, unused_keys
from llama.storage.pretrained import export_model, initialize_weights, load_weights

SMALL = replace(TINY, vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
                head_dim=16, max_position_embeddings=256, tie_word_embeddings=False)  # fmt: skip
VALID = {name: value for name, value in config_to_json(SMALL).items() if not name.startswith("rope")}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
TOKENS = torch.arange(200) * 7 % 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small"
    model = Llama(SMALL)
    initialize_weights(model, 0)
    export_model(model, path, VALID, dtype=torch.float32)
    return path


@torch.no_grad()
def difference(folder: Path, values: dict) -> float:
    """The largest one between our logits and those of transformers, which opens this config.json by itself."""
    (folder / "config.json").write_text(json.dumps(values))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Llama(config_from_json(values))
    load_weights(ours, folder)
    return float((ours.logits(TOKENS, PackedDocuments([200])) - theirs(TOKENS[None]).logits[0]).abs().max())


@pytest.mark.parametrize("rope", [
    {"rope_parameters": LINEAR | {"rope_theta": 500.0}},
    {"rope_parameters": DEFAULT, "rope_scaling": {}},
    {"rope_parameters": DEFAULT | {"rope_theta": 10000.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3, "rope_theta": 500.0},
    {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3 | {"rope_theta": 500.0}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "rope_scaling": LINEAR | {"rope_theta": 500.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_scaling": LINEAR},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
    {"rope_parameters": DEFAULT, "rope_theta": 10000.0},
    {"rope_scaling": LINEAR | {"rope_theta": 7.0}, "rope_theta": 10000.0},
    {"rope_scaling": {"type": "default", "factor": 8.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 8.0}},
], ids=range(12))  # fmt: skip
def test_positions_are_rotated_as_transformers_does_whichever_keys_say_it(folder, rope):
    """C30: all of rope_scaling goes before all of rope_parameters; rope_theta may stand inside or beside them."""
    assert difference(folder, VALID | rope) < 1e-3


@pytest.mark.parametrize("rope, named", [
    ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, ["rope_theta is 500.0 in rope_parameters", "takes 10000.0"]),
    ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR | {"rope_theta": 7.0}}, ["500.0", "takes 7.0"]),
    ({"rope_parameters": DEFAULT, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type is 'yarn'"]),
    ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_type is 'dynamic'"]),
    ({"rope_parameters": DEFAULT, "rope_scaling": "linear"}, ["rope_scaling is 'linear', expected an object"]),
    ({"quantization_config": {"bits": 4, "quant_method": "gptq"}}, ["quantization_config is 'gptq'", "--quantize"]),
    ({"compression_config": {"format": "pack"}}, ["compression_config is {'format': 'pack'}"]),
    ({"per_layer_config": {"0": {"head_dim": 4}}}, ["per_layer_config", "the same numbers in all layers"]),
], ids=range(8))  # fmt: skip
def test_what_contradicts_itself_or_cannot_be_computed_is_refused_in_one_line(rope, named):
    """C30: transformers forgets the rope_theta of rope_parameters beside rope_scaling, and nobody can mean that."""
    with pytest.raises(UserError) as error:
        config_from_json(VALID | rope)
    assert "\n" not in str(error.value) and all(words in str(error.value) for words in named), error.value


@pytest.mark.parametrize("added, named", [
    ({"sliding_window": 4096, "layer_types": ["full_attention"], "x": 0}, "'sliding_window', 'layer_types', 'x'"),
    ({"attention_dropout": 0.1}, "'attention_dropout'"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "'architectures'"),
    ({"rope_scaling": LINEAR | {"beta_fast": 32}}, "'rope_scaling.beta_fast'"),
    ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 8.0}},
     "'rope_scaling.factor', 'rope_scaling.type'"),
    ({"rope_parameters": DEFAULT, "rope_theta": 10000.0}, "'rope_theta'"),
    ({f"key {i}\n": 1 for i in range(14)}, ", ".join(repr(f"key {i}\n") for i in range(12)) + " and 2 more"),
], ids=range(7))  # fmt: skip
def test_a_key_that_nothing_reads_is_announced_by_name(added, named):
    config_from_json(VALID | added)
    assert unused_keys(VALID | added) == [f"config.json: not used: {named}"]


def test_that_rope_parameters_give_way_is_announced():
    (note,) = unused_keys(VALID | {"rope_parameters": DEFAULT, "rope_scaling": LINEAR | {"rope_theta": 500.0}})
    assert note == "config.json: rope_scaling is used and rope_parameters is not, as in transformers 5"


def test_nothing_is_announced_of_what_transformers_writes_of_itself(tmp_path):
    """Every key that it gives a Llama, with its default; null counts as absent; and what it writes into a file."""
    defaults = LlamaConfig().to_dict()
    assert unused_keys(defaults | {"architectures": ["LlamaForCausalLM"], "a new one": None}) == []
    LlamaForCausalLM(LlamaConfig(**VALID)).save_pretrained(tmp_path)
    assert unused_keys(json.loads((tmp_path / "config.json").read_text())) == []
