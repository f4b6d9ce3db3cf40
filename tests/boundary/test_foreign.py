"""Folders as people have them: cloned without git-lfs, in another format, or with an error page saved as a file.

Each is refused in one line that names the cause and the way out.
"""

import json
import shutil
from pathlib import Path

import pytest

from llama.boundary.errors import UserError
from llama.boundary.untrusted import read_json
from llama.data.rows import read
from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama
from llama.storage.base import TINY, TINY_TOKENIZER, Base
from llama.storage.companions import Companions
from llama.storage.config_json import config_to_json
from llama.storage.peft import read_adapter
from llama.storage.pretrained import export_model, initialize_weights

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 1044992\n"
PAGE = "\n<!DOCTYPE html><html><title>401 Unauthorized</title></html>"
LFS = ["is a git-lfs pointer", "run `git lfs pull`"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "model"
    model = Llama(TINY)
    initialize_weights(model, 0)
    export_model(model, path, config_to_json(TINY), Companions(load_tokenizer(TINY_TOKENIZER).files))
    return path


@pytest.mark.parametrize("changes, named", [
    ({WEIGHTS: POINTER}, [WEIGHTS, *LFS]),
    ({"tokenizer.json": None, "tokenizer.model": POINTER}, ["tokenizer.model", *LFS]),
    ({"tokenizer.json": POINTER}, ["tokenizer.json", *LFS]),
    ({"config.json": POINTER}, ["config.json", *LFS]),
    ({WEIGHTS: None, INDEX: POINTER}, [INDEX, *LFS]),
    ({WEIGHTS: PAGE}, [WEIGHTS, "is a web page", "download it again"]),
    ({"config.json": PAGE}, ["config.json", "is a web page"]),
    ({WEIGHTS: "Entry not found\n"}, [WEIGHTS, "is text that begins 'Entry not found'", "download it again"]),
    ({WEIGHTS: "GGUF\3\0\0"}, [WEIGHTS, "is a GGUF file of llama.cpp"]),
    ({WEIGHTS: "PK\3\4\0\0"}, [WEIGHTS, "is a zip archive, perhaps a pickle"]),
    ({WEIGHTS: None, "pytorch_model.bin": "x"}, ["'pytorch_model.bin'", "can run code", "save_pretrained"]),
    ({WEIGHTS: None, "pytorch_model-00001-of-00002.bin": "x"}, ["pytorch_model-00001-of", "can run code"]),
    ({WEIGHTS: None, "model-00001-of-00002.safetensors": "x"}, ["model-00001-of", f"a shard without {INDEX}"]),
    ({WEIGHTS: None, "small.Q4_K.gguf": "x"}, ["'small.Q4_K.gguf'", "llama.cpp"]),
    ({WEIGHTS: None, "consolidated.00.pth": "x"}, ["'consolidated.00.pth'", "Meta", "convert_llama_weights_to_hf.py"]),
    ({WEIGHTS: None, "config.json": None, "consolidated.00.pth": "x", "params.json": "{}"}, ["no config.json", "Meta"]),
    ({"config.json": None, "adapter_config.json": "{}"}, ["no config.json", "an adapter", "--adapter"]),
    ({WEIGHTS: None, "config.json": None, "run.json": "{}"}, ["no config.json", "the record of a run", "model/"]),
    ({WEIGHTS: None}, [f"has neither {WEIGHTS} nor {INDEX}"]),
], ids=range(19))  # fmt: skip
def test_a_model_folder_of_another_kind_is_refused_with_its_cause(whole, tmp_path, changes, named):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    for name, text in changes.items():
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        Base.pretrained(str(folder))
    message = str(error.value)
    assert str(folder) in message and "\n" not in message and all(words in message for words in named), message


def test_a_runs_folder_in_place_of_an_adapter_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="^[^\\n]+: has no adapter_config.json, .* a run, .* its adapter/ as --adapter"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_that_are_a_pointer_or_a_page_are_refused_as_a_whole(tmp_path, name):
    """R15: not as so many bad rows, which --skip_bad_rows would leave out."""
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name}: is a git-lfs pointer"):
        list(read(tmp_path / name))
    (tmp_path / name).write_text(PAGE)
    with pytest.raises(UserError, match=f"{name}: is a web page"):
        list(read(tmp_path / name))


def test_a_file_that_is_damaged_otherwise_keeps_its_own_error(whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    (folder / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Base.pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(config_to_json(TINY))[:-1])
    with pytest.raises(UserError, match="expected a JSON object"):
        read_json(folder, "config.json")
