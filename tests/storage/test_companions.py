"""What an export writes beside the weights: what was learned, in the places where others look for it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from chats import END, MESSAGES, OLD_TEMPLATE, TURN_END, trained_prompt, write_base, write_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama
from llama.storage.base import Base
from llama.storage.companions import Companions, chat_templates, of_adapter
from llama.storage.peft import Adapter, save_adapter
from llama.storage.pretrained import export_model
from lora import apply_adapter

# What chatml writes, in other words than our own.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def export(base: Base, folder: Path, **changes) -> Path:
    beside = Companions.of(base.tokenizer, base.config_json, CHATML, 2, **changes)
    export_model(Llama(base.config), folder, base.config_json, beside)
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_the_learned_end_of_turn_comes_first_wherever_others_look_for_it(tmp_path):
    """C12: a base that ends in another token is trained on messages. Its other settings stay."""
    base = Base.pretrained(str(write_base(tmp_path / "base")))
    assert (base.tokenizer.eos_id, base.config_json["eos_token_id"]) == (0, 0)
    folder = export(base, tmp_path / "export")
    for name in ("config.json", "generation_config.json"):
        assert read(folder, name)["eos_token_id"] == [2, 0]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token, theirs.eos_token_id) == (TURN_END, 2)
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [2, 0] and generation.temperature == 0.5
    assert Base.pretrained(str(folder)).tokenizer.eos_id == 2
    again = export(Base.pretrained(str(folder)), tmp_path / "again")  # nothing comes twice
    assert read(again, "generation_config.json") == read(folder, "generation_config.json")


def test_a_base_without_generation_settings_gets_those_of_its_config(tmp_path):
    """Else what generates would not know with which token a text begins."""
    base = Base.pretrained(str(write_base(tmp_path / "base")))
    files = [path for path in base.tokenizer.files if path.name != "generation_config.json"]
    config_json = base.config_json | {"bos_token_id": 1}
    export_model(Llama(base.config), tmp_path / "export", config_json, Companions(files, eos_ids=(2, 0)))
    assert read(tmp_path / "export", "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [2, 0]}


@pytest.mark.parametrize("known, expected", [(0, 0), (None, 0), ([0], 0), (2, [0, 2]), ([2, 0, 1], [0, 2, 1])])
def test_a_text_template_learns_the_tokenizers_own_end_which_every_list_then_holds(tmp_path, known, expected):
    """C12: config and tokenizer of the base may disagree."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    beside = Companions.of(tokenizer, {"eos_token_id": known})
    assert beside.special_tokens == {"eos_token_id": expected} and beside.eos_token is None
    beside.write(tmp_path)
    name = "tokenizer_config.json"
    assert (tmp_path / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()


def test_the_exports_chat_template_builds_the_prompt_that_was_trained(tmp_path):
    """C12: the same ids by transformers, from the model's folder and from the adapter's."""
    base = Base.pretrained(str(write_base(tmp_path / "base", chat_template=OLD_TEMPLATE)))
    model = Llama(base.config)
    adapter, chat = Adapter(2, 4.0), Chat("chatml")
    template, end = chat.chat_template(base.tokenizer), chat.end_of_turn(base.tokenizer)
    beside = Companions.of(base.tokenizer, base.config_json, template, end, "the card")
    export_model(model, tmp_path / "model", base.config_json, beside)
    apply_adapter(model, adapter)
    save_adapter(model, tmp_path / "adapter", adapter, base.name, beside)
    for folder in (tmp_path / "model", tmp_path / "adapter"):
        theirs = AutoTokenizer.from_pretrained(folder)
        ids = theirs.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True)["input_ids"]
        assert ids == trained_prompt(chat, base.tokenizer)
        assert theirs.eos_token == TURN_END and (folder / "README.md").read_text() == "the card"
        assert theirs.chat_template == {"default": template, "base": OLD_TEMPLATE}
        # Programs that know no chat_template.jinja read it here.
        assert read(folder, "tokenizer_config.json")["chat_template"] == template


NAMED = [{"name": "default", "template": OLD_TEMPLATE}, {"name": "tool_use", "template": "tools"}]
SPACED = [{"name": "default", "template": OLD_TEMPLATE}, {"name": "tool use", "template": "tools"}]


@pytest.mark.parametrize("settings, files, others", [
    ({}, {}, {}),
    ({"chat_template": CHATML}, {}, {}),
    ({}, {"chat_template.jinja": CHATML + "\n"}, {}),
    ({"chat_template": OLD_TEMPLATE}, {}, {"base": OLD_TEMPLATE}),
    ({"chat_template": NAMED}, {}, {"base": OLD_TEMPLATE, "tool_use": "tools"}),
    ({"chat_template": SPACED}, {}, {"base": OLD_TEMPLATE, "tool use": "tools"}),
    ({"chat_template": "unused"}, {"chat_template.jinja": OLD_TEMPLATE, "additional_chat_templates/rag.jinja": "rag"},
     {"base": OLD_TEMPLATE, "rag": "rag"}),
    ({}, {"chat_template.jinja": "newer", "additional_chat_templates/base.jinja": "oldest"},
     {"base": "oldest", "base-2": "newer"}),
], ids=range(8))  # fmt: skip
def test_no_chat_template_of_the_base_is_lost(tmp_path, settings, files, others):
    """The one that was trained takes the usual place; transformers finds the others by their names."""
    folder = write_tokenizer(tmp_path / "base", **settings)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    (tmp_path / "out").mkdir()
    Companions(paths, chat_template=CHATML).write(tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    expected = {"default": CHATML} | others
    assert (found if isinstance(found, dict) else {"default": found}) == expected
    assert chat_templates([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == expected


def test_files_that_say_nothing_new_are_copied_byte_by_byte(tmp_path):
    """Whatever a tokenizer's folder holds, and also where its JSON is written in another way."""
    folder = write_tokenizer(tmp_path / "base", chat_template=OLD_TEMPLATE, eos_token={"content": END, "lstrip": False})
    extra = {"special_tokens_map.json": '{"eos_token":  "<|endoftext|>"}', "added_tokens.json": "{ }",
             "additional_chat_templates/rag.jinja": "rag\r\n", "generation_config.json": '{"eos_token_id" : 0}'}
    for name, text in extra.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    (tmp_path / "out").mkdir()
    Companions(files, eos_ids=[0]).write(tmp_path / "out")
    for path in files:
        assert (tmp_path / "out" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert len(files) == len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 6
    (tmp_path / "turn").mkdir()
    Companions(files, [2, 0], TURN_END).write(tmp_path / "turn")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        assert read(tmp_path / "turn", name)["eos_token"] == TURN_END


def test_every_file_and_folder_of_an_export_is_forced_to_disk(tmp_path, monkeypatch):
    """R3: before the folder gets its name."""
    base = Base.pretrained(str(write_base(tmp_path / "base", chat_template=OLD_TEMPLATE)))
    synced = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = export(base, tmp_path / "export", card="card")
    unfinished = tmp_path / "export.tmp"
    written = {str(unfinished / path.relative_to(folder)) for path in folder.rglob("*")}
    assert len(written) == 9 and written | {str(unfinished), str(tmp_path)} <= synced


def test_an_export_that_died_makes_room_with_its_folder_of_templates(tmp_path):
    """R17: but not with a file in it that is none of ours."""
    base = Base.pretrained(str(write_base(tmp_path / "base", chat_template=OLD_TEMPLATE)))
    export(base, tmp_path / "export.tmp", card="card")
    thesis = tmp_path / "export.tmp/additional_chat_templates/thesis.tex"
    thesis.write_text("mine")
    with pytest.raises(UserError, match="thesis.tex: not from an attempt to write"):
        export(base, tmp_path / "export")
    thesis.unlink()
    export(base, tmp_path / "export")
    assert not (tmp_path / "export.tmp").exists()


def test_a_merge_learns_from_the_adapters_folder_what_its_answers_end_in(tmp_path):
    """An adapter of ours or of PEFT; one without a tokenizer leaves the base as it is."""
    base = Base.pretrained(str(write_base(tmp_path / "base", chat_template=OLD_TEMPLATE)))
    adapter = write_tokenizer(tmp_path / "adapter", eos_token={"content": TURN_END}, chat_template="newer")
    found = of_adapter(adapter, base.tokenizer, base.config_json)
    assert (found.eos_ids, found.eos_token, found.chat_template) == ([2, 0], TURN_END, "newer")
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "<|unknown|>"}')
    with pytest.raises(UserError, match=r"eos_token is '<\|unknown\|>', expected a control token of the base"):
        of_adapter(adapter, base.tokenizer, base.config_json)
    shutil.rmtree(adapter)
    adapter.mkdir()
    found = of_adapter(adapter, base.tokenizer, base.config_json)
    assert (found.eos_ids, found.eos_token, found.chat_template) == ([0], None, None)


@pytest.mark.parametrize("chat_template", [5, [5], [{"name": "../x", "template": "y"}], [{"name": "x"}]], ids=str)
def test_a_chat_template_that_is_none_is_one_line(tmp_path, chat_template):
    """R13: a name that would lead out of the folder, too."""
    folder = write_tokenizer(tmp_path / "tokenizer", chat_template=chat_template)
    with pytest.raises(UserError, match="tokenizer_config.json: ") as error:
        Companions([folder / "tokenizer_config.json"], chat_template="new").write(tmp_path)
    assert len(error.value.lines) == 1 and not (tmp_path / "x.jinja").exists()
