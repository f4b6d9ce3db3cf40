"""What --model names, and what a config.json may say: anything else is refused in one line that names the value."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama.boundary.errors import UserError
from llama.boundary.untrusted import read_json
from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama, PackedDocuments
from llama.model.config import ROPE_TYPES, RopeScaling
from llama.model.rope import rope_frequencies
from llama.storage.base import TINY, TINY_TOKENIZER, Base, check_fit
from llama.storage.companions import Companions
from llama.storage.config_json import config_from_json, config_to_json, unused_keys
from llama.storage.pretrained import export_model, initialize_weights
from llama.storage.slices import write_tensors

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
    """config_from_json(values) must raise a UserError of one line, with the place once and `named` in it."""
    with pytest.raises(UserError) as error:
        config_from_json(values, where="here/config.json")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("here/config.json: ") and message.count("config.json") == 1
    for name in named:
        assert name in message


def without(*names: str) -> dict:
    return {name: value for name, value in VALID.items() if name not in names}


# What a config.json may say


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


@pytest.mark.parametrize("name, largest", [
    ("vocab_size", 2**24), ("hidden_size", 2**24), ("intermediate_size", 2**24), ("num_attention_heads", 2**24),
    ("head_dim", 2**24), ("num_hidden_layers", 2**10),
])  # fmt: skip
def test_a_size_far_beyond_any_llama_is_refused_before_it_takes_memory(name, largest):
    """R13: and the largest one is not."""
    refusal(VALID | {name: largest + 1}, name, str(largest + 1), str(largest))
    refusal(VALID | {name: 10**400}, name, str(largest))
    assert getattr(config_from_json(VALID | {"head_dim": 12} | {name: largest}), name) == largest


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
    (LLAMA3 | {"high_freq_factor": None}, ["llama3", "lacks high_freq_factor"]),
    (LLAMA3 | {"original_max_position_embeddings": -1}, ["original_max_position_embeddings", "-1"]),
    (LLAMA3 | {"low_freq_factor": 4.0}, ["low_freq_factor", "high_freq_factor", "4.0"]),
    (LLAMA3 | {"low_freq_factor": 5.0}, ["low_freq_factor", "high_freq_factor", "5.0"]),
    (LLAMA3 | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    (LLAMA3 | {"rope_theta": "big"}, ["rope_theta", "'big'"]),
])
def test_a_rope_scaling_that_cannot_be_honoured_is_named(key, scaling, named):
    """C30: what is not understood must not be ignored, and no default may stand for a number that is null."""
    refusal(VALID | {key: scaling}, *named)


def test_a_partial_rotary_factor_is_refused_wherever_it_stands():
    """A Llama rotates all of each head; 1, or nothing, is what its configs say."""
    refusal(VALID | {"partial_rotary_factor": 0.25}, "partial_rotary_factor", "0.25")
    refusal(VALID | {"partial_rotary_factor": 1.0, "rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "0.5")
    config_from_json(VALID | {"partial_rotary_factor": 1.0})
    config_from_json(VALID | {"partial_rotary_factor": None})


def test_what_may_be_left_out_gets_hugging_faces_defaults():
    config = config_from_json(without("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
                                      "tie_word_embeddings", "hidden_act"))
    theirs = LlamaConfig(**{name: VALID[name] for name in REQUIRED})
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "attention_bias", "mlp_bias", "initializer_range"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rope_scaling.rope_type == theirs.rope_parameters["rope_type"] == "default"


def test_null_means_left_out():
    config = config_from_json(VALID | {"head_dim": None, "rope_scaling": None, "num_key_value_heads": None})
    assert (config.head_dim, config.num_key_value_heads, config.rope_scaling) == (12, 4, RopeScaling())


@pytest.mark.parametrize("config", [
    TINY,
    replace(TINY, head_dim=20, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, rope_theta=5e5),
    replace(TINY, rope_scaling=RopeScaling("linear", factor=4.0)),
    replace(TINY, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 512), num_key_value_heads=1),
])
def test_a_config_survives_json_and_transformers(config, tmp_path):
    """C34: ours -> config.json -> transformers -> config.json -> ours changes nothing."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(config)))
    assert config_from_json(read_json(tmp_path, "config.json")) == config
    LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert config_from_json(read_json(tmp_path, "config.json")) == config


# What json.loads can return, with keys and words that mean something to the reader.
WORDS = [*VALID, "head_dim", "attention_bias", "rope_scaling", "rope_parameters", "type", *LLAMA3,
         "partial_rotary_factor", *ROPE_TYPES, "llama", "silu"]
words = st.sampled_from(WORDS) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers(-2, 130) | st.integers() | st.floats() | words
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=6))


def read(values: dict) -> None:
    try:
        config = config_from_json(values)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert config_from_json(config_to_json(config)) == config
        assert not any("\n" in note for note in unused_keys(values))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(words, anything, max_size=6))
def test_no_json_object_raises_anything_but_a_user_error(values):
    """R13: an object is what `read_json` has made sure of."""
    read(values)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), anything, max_size=4))
@example({"rope_scaling": LLAMA3})
@example({"hidden_size": 10**400})
@example({"rope_theta": 10**400})
def test_no_change_to_a_valid_config_raises_anything_but_a_user_error(changes):
    """R13."""
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
        config = config_from_json(VALID | {"rope_scaling": scaling})
    except UserError:
        return
    plain = rope_frequencies(config_from_json(VALID))
    ends = torch.stack([plain, plain / f])
    frequencies = rope_frequencies(config)
    assert (frequencies >= ends.amin(0) * 0.999).all() and (frequencies <= ends.amax(0) * 1.001).all()


# What --model names


SMALL = replace(TINY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=4, max_position_embeddings=64)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole model folder with the bundled tokenizer."""
    model = Llama(SMALL)
    initialize_weights(model, 3)
    special_tokens = {"bos_token_id": 1, "eos_token_id": [2, 3]}
    export_model(model, tmp_path / "model", config_to_json(SMALL) | special_tokens,
                 Companions(load_tokenizer(TINY_TOKENIZER).files), torch.float32)
    return tmp_path / "model"


def test_transformers_opens_the_tokenizer_of_an_export_as_it_is(folder):
    """C18, R24: with the packages of requirements-dev.txt, so without protobuf, and it gives the ids of training."""
    from transformers import AutoTokenizer

    reference, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    trained = load_tokenizer(TINY_TOKENIZER / "tokenizer.model")
    texts = ["A dull film.", " two  spaces\n", "</s> 2024 日本", ""]
    ids = [reference(text, split_special_tokens=True)["input_ids"] for text in texts]
    assert ids == tokenizer.encode_batch(texts) == trained.encode_batch(texts)
    assert (reference.bos_token_id, reference.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert reference.decode(ids[0], skip_special_tokens=True) == texts[0]


def test_an_export_has_every_file_of_the_tokenizer_also_those_in_its_folder(folder, tmp_path):
    """R17, R24: named chat templates lie in a folder, which an attempt that died leaves behind, too."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    base = Base.pretrained(str(folder))
    stale = tmp_path / "again.tmp/additional_chat_templates/rag.jinja"
    stale.parent.mkdir(parents=True)
    stale.write_text("{{ mess")
    export_model(Llama(SMALL), tmp_path / "again", base.config_json, Companions(base.tokenizer.files))
    for file in base.tokenizer.files:
        assert (tmp_path / "again" / file.relative_to(folder)).read_bytes() == file.read_bytes()
    stale.parent.mkdir(parents=True)
    stale.with_name("thesis.tex").write_text("something")
    with pytest.raises(UserError, match="thesis.tex: not from an attempt to write"):
        export_model(Llama(SMALL), tmp_path / "again", base.config_json, Companions(base.tokenizer.files), replace=True)


def test_a_folder_is_opened_with_all_that_fits_together(folder):
    """C34: the config.json is kept as it is, for an export; weights are only looked at."""
    base = Base.pretrained(str(folder), 64)
    assert base.config == SMALL == config_from_json(base.config_json)
    assert base.config_json["eos_token_id"] == [2, 3] and base.folder == folder and base.name == str(folder)
    assert base.tokenizer.vocab_size == 1280
    model, original = Llama(base.config), Llama(SMALL)
    base.load(model)
    initialize_weights(original, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_the_tiny_preset_starts_from_random_weights_of_the_seed():
    """C32: it has no files, so no fingerprint."""
    base = Base.open("tiny", 1024)
    assert (base.config, base.folder, base.fingerprint) == (TINY, None, None)
    assert config_from_json(base.config_json) == TINY and base.config_json["eos_token_id"] == base.tokenizer.eos_id
    models = [Llama(TINY) for _ in range(3)]
    base.load(models[0], 5)
    base.load(models[1], 6)
    initialize_weights(models[2], 5)
    first, other, expected = (model.layers[0].mlp.up_proj.weight for model in models)
    assert torch.equal(first, expected) and not torch.equal(first, other)


@pytest.mark.parametrize("content, named", [
    (b"", "Expecting value: line 1 column 1 (char 0), expected a JSON object"),
    (b'{"model_type": "llama"', "expected a JSON object"),
    (b"\xff\xfe{}", "can't decode byte 0xff in position 0: invalid start byte, expected a JSON object"),
    (b'{"model_type": "llama", "model_type', "expected a JSON object"),
    (b'{"model_type": "llama", "model_type": "llama"}', "a name comes twice, expected a JSON object"),
    (b"[" * 100_000, "recursion depth exceeded"),
    (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "limit (4300 digits)"),
    (b"[]", "found list, expected a JSON object"),
    (b"null", "found NoneType, expected a JSON object"),
    (b"3", "found int, expected a JSON object"),
    (b'"llama"', "found str, expected a JSON object"),
    (b"true", "found bool, expected a JSON object"),
    (b'{"model_type": "bert"}', "model_type is 'bert', expected 'llama'"),
], ids=range(13))  # fmt: skip
def test_a_file_that_holds_no_config_is_refused_by_its_path(content, named, folder):
    """R13."""
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        Base.pretrained(str(folder))
    message = str(error.value)
    assert "\n" not in message and named in message and message.startswith(f"{folder / 'config.json'}: ")


def test_a_missing_file_and_a_folder_in_its_place_are_refused(folder):
    """Most often --model names another folder than the user thinks."""
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=f"^{folder}: has no config.json, expected a Hugging Face model folder$"):
        Base.pretrained(str(folder))
    ways_out = {
        "run.json": "give its model/ as --model, or its adapter/", "manifest.json": "checkpoints.py export RUN OUT",
    }  # fmt: skip
    for name, way_out in ways_out.items():
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match=f"has no config.json, .*; it has '{name}', .*{way_out}"):
            Base.pretrained(str(folder))
        (folder / name).unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(UserError, match="config.json: is missing or not a file"):
        Base.pretrained(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"^--model {folder}: no such folder, expected a Hugging Face folder or a hub"):
        Base.pretrained(str(folder))


def test_a_tokenizer_texts_and_weights_that_do_not_fit_the_config_are_refused(folder):
    """C34, R13: before anything takes memory."""
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    check_fit(SMALL, tokenizer, 64)
    with pytest.raises(UserError, match=f"^{tokenizer.path}: the tokenizer has 1280 ids, the model only 1279$"):
        check_fit(replace(SMALL, vocab_size=1279), tokenizer, 64)
    with pytest.raises(UserError, match="^--max_length 65: the model was made for at most 64 tokens$"):
        Base.pretrained(str(folder), 65)
    with pytest.raises(UserError, match="^--max_length 1025: the model was made for at most 1024 tokens$"):
        Base.open("tiny", 1025)
    (folder / "model.safetensors").unlink()
    write_tensors({"model.norm.weight": torch.ones(9)}, folder)
    wrong = r"lacks .* more; 'model.norm.weight' is F32 \[9\], expected F32 \[8\]"
    with pytest.raises(UserError, match=f"^{folder}: {wrong}"):
        Base.pretrained(str(folder))


def test_the_fingerprint_tells_weights_apart_and_is_the_same_for_a_copy(folder):
    """R7: a resumed run needs the weights that it began with, wherever they are now."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    first = Base.pretrained(str(folder)).fingerprint
    assert first == Base.pretrained(str(copy)).fingerprint and len(first) == 16
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert first != Base.pretrained(str(copy)).fingerprint


def test_a_config_that_changed_is_another_base(folder):
    """R7: the same weights with another RoPE compute something else."""
    first = Base.pretrained(str(folder)).fingerprint
    values = read_json(folder, "config.json")
    (folder / "config.json").write_text(json.dumps(values | {"transformers_version": "5.99"}))
    assert Base.pretrained(str(folder)).fingerprint == first
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 500000.0}))
    assert Base.pretrained(str(folder)).fingerprint != first


def under_other_names(folder: Path) -> list[Path]:
    """Store the folder's weights in files whose names only an index knows."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file_of = {name: f"weights-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(file_of.values()):
        save_file({name: weights[name] for name in weights if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return [folder / file for file in sorted(set(file_of.values()))]


def test_the_fingerprint_covers_whatever_files_the_index_names(folder):
    """R7: and no file that is not read, which is announced instead."""
    files = under_other_names(folder)
    base = Base.pretrained(str(folder))
    first = base.fingerprint
    for name in ("model-of-old.safetensors", "rotary.safetensors"):
        shutil.copy(files[0], folder / name)
    with_another = Base.pretrained(str(folder))
    assert with_another.fingerprint == first and base.notes == []
    assert with_another.notes == [f"{folder}: not used: 'model-of-old.safetensors', 'rotary.safetensors'"]
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert Base.pretrained(str(folder)).fingerprint != first
        content[-1] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_head_beside_a_tied_embedding_is_loaded_where_it_differs_as_transformers_does(folder, tmp_path, shift):
    """C34: the logits are those of transformers 5, also of the folder that an export of it makes."""
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += shift
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    base = Base.pretrained(str(folder))
    assert base.config.tie_word_embeddings is (shift == 0)
    expected = [f"{folder / 'config.json'}: tie_word_embeddings is true, but the file's lm_head.weight is not the "
                "embedding, so both are loaded, as transformers 5 does"]  # fmt: skip
    assert base.notes == (expected if shift else [])
    model, tokens = Llama(base.config), torch.arange(60)
    base.load(model)
    export_model(model, tmp_path / "out", base.config_json, Companions(base.tokenizer.files), torch.float32)
    assert read_json(tmp_path / "out", "config.json")["tie_word_embeddings"] is (shift == 0)
    with torch.no_grad():
        ours = model.logits(tokens, PackedDocuments([60]))
        for opened in (folder, tmp_path / "out"):
            theirs = LlamaForCausalLM.from_pretrained(opened, dtype=torch.float32).eval()(tokens[None]).logits[0]
            assert (ours - theirs).abs().max() < 1e-3


def test_a_head_of_another_shape_beside_a_tied_embedding_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.ones(7, 8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"'lm_head.weight' is F32 \[7, 8\], expected F32 \[1280, 8\]"):
        Base.pretrained(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_a_base_is_that_of_most_of_its_weights(folder, dtype):
    """Norms are sometimes kept in fp32 beside weights in bf16; what config.json says does not count."""
    weights = load_file(folder / "model.safetensors")
    stored = {name: tensor if tensor.ndim == 1 else tensor.to(dtype) for name, tensor in weights.items()}
    save_file(stored, folder / "model.safetensors")
    assert Base.pretrained(str(folder)).dtype == dtype


def test_of_a_bases_dtypes_the_one_with_the_most_numbers_counts_and_not_that_of_the_most_tensors(folder):
    """A large embedding outweighs many small matrices."""
    weights = load_file(folder / "model.safetensors")
    large = {name: tensor.half() for name, tensor in weights.items() if len(tensor) == SMALL.vocab_size}
    assert 2 * sum(tensor.numel() for tensor in large.values()) > sum(tensor.numel() for tensor in weights.values())
    save_file(weights | large, folder / "model.safetensors")
    assert Base.pretrained(str(folder)).dtype == torch.float16
