"""Small files after a power cut: what a rename has published is whole, and the rename itself is on disk."""

import os
from pathlib import Path

import pytest
from disk import Disk

from llama.boundary.durable import replace_durably, sync, write_durably


@pytest.mark.parametrize("old", [None, "old"])
def test_a_replaced_file_is_on_disk_before_it_has_its_name_and_so_is_the_name_before_the_call_returns(tmp_path, old):
    """R1: first the new content, then the rename, then the folder that holds the name."""
    path = tmp_path / "run.json"
    if old:
        path.write_text(old)
    (tmp_path / "run.json.tmp").write_text("half of an earlier at")  # left by a run that was killed
    with Disk() as disk:
        replace_durably(path, "new")
    assert disk.renamed == [path] and disk.at_risk() == []
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["run.json"]


def test_a_new_file_is_on_disk_with_all_its_content_when_the_call_returns(tmp_path):
    """R1: and a file that is there already is never written over."""
    path, text = tmp_path / "config.json", "größer " * 5000
    with Disk() as disk:
        write_durably(path, text)
    assert disk.synced[path] == text.encode() == path.read_bytes()
    with pytest.raises(FileExistsError):
        write_durably(path, "other")


def content_is_missing(folder: Path) -> None:
    (folder / "x.tmp").write_text("new")
    os.replace(folder / "x.tmp", folder / "x")
    sync(folder)


def content_came_later(folder: Path) -> None:
    write_durably(folder / "x.tmp", "new")
    (folder / "x.tmp").write_text("newer")
    os.replace(folder / "x.tmp", folder / "x")
    sync(folder)


def name_is_missing(folder: Path) -> None:
    sync(folder)
    write_durably(folder / "x.tmp", "new")
    os.replace(folder / "x.tmp", folder / "x")


def file_of_a_folder_is_missing(folder: Path) -> None:
    (folder / "x.tmp").mkdir()
    (folder / "x.tmp" / "y").write_text("new")
    sync(folder / "x.tmp")
    os.rename(folder / "x.tmp", folder / "x")
    sync(folder)


@pytest.mark.parametrize("act", [content_is_missing, content_came_later, name_is_missing, file_of_a_folder_is_missing])
def test_the_watch_notices_what_it_is_there_to_notice(act, tmp_path):
    with Disk() as disk:
        act(tmp_path)
    assert len(disk.at_risk()) == 1
