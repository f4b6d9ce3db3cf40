"""What a model's files say about generation: each end of an answer is found, and what waits for a flag is named."""

import json
from pathlib import Path

import pytest
from chats import write_base
from transformers import GenerationConfig

from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.templates import TEMPLATES
from llama.storage.base import Base
from llama.storage.generation_config import generation_notes, stop_ids


@pytest.fixture
def folder(tmp_path) -> Path:
    """Its tokenizer, config.json and generation_config.json name token 0 as the end; 2 ends a turn of chatml."""
    return write_base(tmp_path / "base")


def write(folder: Path, name: str, **values) -> None:
    old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(old | values))


def notes(folder: Path, adapter: Path | None = None, **values) -> list[str]:
    """Without the name of the file, which each begins with."""
    (folder / "generation_config.json").write_text(json.dumps(values))
    return [note.partition(": ")[2] for note in generation_notes(Base.pretrained(str(folder)), adapter)]


@pytest.mark.parametrize("in_config, in_generation, expected", [
    (0, 0, {0}), (None, None, {0}), (5, [7, 8], {0, 5, 7, 8}), ([5, 6], 7, {0, 5, 6, 7}), ([], None, {0}),
])  # fmt: skip
def test_every_end_that_any_file_names_ends_an_answer(folder, in_config, in_generation, expected):
    """C15: also those that transformers, which reads generation_config.json alone, would know."""
    write(folder, "config.json", eos_token_id=in_config)
    write(folder, "generation_config.json", eos_token_id=in_generation)
    found = stop_ids(Base.pretrained(str(folder)))
    assert found == expected
    theirs = GenerationConfig.from_pretrained(folder).eos_token_id
    assert {*theirs} <= found if isinstance(theirs, list) else theirs is None or theirs in found


def test_a_chat_ends_in_its_end_of_turn_and_a_text_template_in_the_end_token(folder):
    """C15."""
    base = Base.pretrained(str(folder))
    assert stop_ids(base, Chat("chatml")) == {0, 2}
    assert stop_ids(base, Chat("zephyr")) == stop_ids(base, TEMPLATES["alpaca"]) == {0}
    assert stop_ids(Base.tiny()) == {Base.tiny().tokenizer.eos_id}


def test_an_adapter_brings_the_end_that_it_has_learned(folder, tmp_path):
    """C15: an adapter over another template than its base's has the end of its answers in its own folder."""
    base, adapter = Base.pretrained(str(folder)), tmp_path / "adapter"
    adapter.mkdir()
    assert stop_ids(base, adapter=adapter) == {0}  # PEFT alone writes no tokenizer beside an adapter
    write(adapter, "tokenizer_config.json", eos_token="<|im_end|>")
    assert stop_ids(base, adapter=str(adapter)) == {0, 2}
    write(adapter, "generation_config.json", eos_token_id=[2, 9])
    assert stop_ids(base, adapter=adapter) == {0, 2, 9}
    write(adapter, "tokenizer_config.json", eos_token="<|eot_id|>")
    with pytest.raises(UserError, match="eos_token is '<|eot_id|>', expected a control token of the base"):
        stop_ids(base, adapter=adapter)


@pytest.mark.parametrize("wrong", ["2", 2.0, True, [0, "2"], {}, [[2]]], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_id_is_refused_in_one_line(folder, name, wrong):
    base = Base.pretrained(str(folder))
    write(folder, name, eos_token_id=wrong)
    with pytest.raises(UserError, match=rf"{name}: eos_token_id is .*, expected a whole number or a list of them"):
        stop_ids(base)


@pytest.mark.parametrize("values, flags", [
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, "--temperature 0.6 --top_p 0.9"),
    ({"do_sample": True}, "--temperature 1.0"),
    ({"do_sample": True, "top_k": 20}, "--temperature 1.0 --top_k 20"),
    ({"repetition_penalty": 1.1, "max_new_tokens": 2048}, "--max_new_tokens 2048 --repetition_penalty 1.1"),
    ({"num_beams": 4, "early_stopping": True}, "--num_beams 4 --early_stopping true"),
], ids=str)  # fmt: skip
def test_settings_that_we_have_are_named_as_the_flags_to_type(folder, values, flags):
    (note,) = notes(folder, eos_token_id=0, transformers_version="4.40.0", **values)
    assert note.endswith(f"; they are used only as flags: {flags}") and note.startswith("asks for ")


@pytest.mark.parametrize("values", [
    {}, {"do_sample": False, "num_beams": 1}, {"temperature": None}, {"_from_model_config": True, "bos_token_id": 1},
    {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0},
], ids=str)  # fmt: skip
def test_what_we_do_anyway_is_no_note(folder, values):
    assert notes(folder, **values) == []


def test_what_is_not_used_is_named(folder):
    """Without do_sample transformers does not look at the temperature either, nor without beams at what ends them."""
    found = notes(folder, temperature=0.9, penalty_alpha=0.6, early_stopping=True, stop_strings=["\x1b"])
    assert found == ["not used: 'temperature', 'penalty_alpha', 'early_stopping', 'stop_strings'"]
    assert notes(folder, eos_token_id=[0, 259]) == ["eos_token_id 259 is no id of the model, which has 259"]


def test_an_adapters_own_file_counts_instead_of_the_bases(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert notes(folder, adapter, max_new_tokens=9) == notes(folder, max_new_tokens=9) != []
    write(adapter, "generation_config.json", eos_token_id=0)
    assert notes(folder, adapter, max_new_tokens=9) == []
    assert generation_notes(Base.tiny()) == []


@pytest.mark.parametrize("values", [
    {"temperature": "hot", "do_sample": True}, {"top_k": -1, "do_sample": True}, {"max_new_tokens": 1.5},
    {"num_beams": True}, {"early_stopping": "soon", "num_beams": 2}, {"repetition_penalty": 0},
], ids=str)  # fmt: skip
def test_a_setting_that_its_flag_would_not_take_is_refused_in_one_line(folder, values):
    with pytest.raises(UserError, match=rf"generation_config.json: {next(iter(values))} is .*, expected "):
        notes(folder, **values)
