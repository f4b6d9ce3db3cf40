"""What is asked of the hub: of a data set all files, of a model those that are read; or an error."""

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from llama.boundary import hub
from llama.boundary.errors import UserError

SPLITS = {"train": "train", "test": "validation"}


@pytest.fixture
def fake(tmp_path, monkeypatch) -> dict:
    """A hub of three train files and one validation file, which can be out of reach; and what was downloaded."""
    on_hub = [f"main/train/000{i}.parquet" for i in range(3)] + ["main/validation/0000.parquet", "main/train/a.txt"]
    state = {"reachable": True, "asked": [], "fail_at": None}

    def download(repo: str, name: str, local_files_only: bool = False, **_) -> str:
        path = tmp_path / name
        if name == state["fail_at"]:
            raise OSError("the line is dead")
        if not path.exists() and (local_files_only or name not in on_hub):
            raise LocalEntryNotFoundError(name)
        if not path.exists():
            state["asked"].append(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        return str(path)

    class Api:
        def list_repo_tree(self, repo: str, folder: str, **_):
            return [Entry(name) for name in on_hub if name.startswith(folder)]

    class Entry:
        def __init__(self, path: str):
            self.path = path

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "_is_reachable", lambda: state["reachable"])
    return state


def names(found: dict[str, tuple[Path, ...]]) -> dict[str, list[str]]:
    return {split: [path.name for path in paths] for split, paths in found.items()}


def test_every_parquet_file_of_a_split_is_downloaded_and_the_first_one_last(fake):
    """D27: so that later, without the hub, a first file means that all are there."""
    expected = {"train": ["0000.parquet", "0001.parquet", "0002.parquet"], "test": ["0000.parquet"]}
    assert names(hub.download_dataset("org/set", "main", SPLITS)) == expected
    assert [name.rpartition("/")[2][:4] for name in fake["asked"]] == ["0002", "0001", "0000", "0000"]
    fake["reachable"] = False
    assert names(hub.download_dataset("org/set", "main", SPLITS)) == expected


def test_a_download_that_broke_off_is_never_taken_for_the_whole(fake):
    """D27: neither at once nor later without the hub."""
    fake["fail_at"] = "main/train/0001.parquet"
    with pytest.raises(UserError, match="the hub said: the line is dead"):
        hub.download_dataset("org/set", "main", SPLITS)
    fake["reachable"] = False
    with pytest.raises(UserError, match="the hub, which has org/set, cannot be reached"):
        hub.download_dataset("org/set", "main", SPLITS)


def test_of_a_model_every_file_that_is_read_is_downloaded_and_no_pickle(fake, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how) or str(tmp_path))
    assert hub.find_model("org/model") == tmp_path
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
              "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    names = [*wanted, "pytorch_model.bin", "consolidated.00.pth"]
    assert [name for name in names if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])] == wanted
