"""A run's folder: never somebody else's, never overwritten."""

from pathlib import Path

import pytest

from llama.boundary.durable import locked
from llama.boundary.errors import UserError
from llama.training.run_folder import choose_folder


@pytest.fixture
def default(tmp_path) -> str:
    return str(tmp_path / "runs" / "imdb-tiny")


def run_in(folder: Path) -> Path:
    """What a run leaves in its folder, as far as these rules look."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    return folder


def test_each_run_gets_a_folder_of_its_own(default):
    """R17: the first keeps its name and its files, the next ones are counted from 2."""
    names = []
    for _ in range(3):
        names.append(run_in(choose_folder(None, default, resume=False)).name)
    assert names == ["imdb-tiny", "imdb-tiny-2", "imdb-tiny-3"]


def test_a_free_name_is_never_one_that_anything_has(default, tmp_path):
    """R17: neither a file nor an empty folder."""
    (tmp_path / "runs").mkdir()
    Path(default).write_text("a file")
    Path(f"{default}-2").mkdir()
    assert choose_folder(None, default, resume=False) == Path(f"{default}-3")
    assert Path(default).read_text() == "a file"


def test_to_resume_finds_the_newest_run(default):
    """Of the default's, or the one that is named."""
    runs = [run_in(choose_folder(None, default, resume=False)) for _ in range(3)]
    assert choose_folder(None, default, resume=True) == runs[2]
    assert choose_folder(str(runs[0]), default, resume=True) == runs[0]
    assert choose_folder(None, f"{default}-other", resume=False) == Path(f"{default}-other")


def test_a_wished_folder_is_taken_only_if_it_is_new_or_empty(default, tmp_path):
    """R17: what is in it stays as it is."""
    assert choose_folder(str(tmp_path / "new"), default, resume=False) == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert choose_folder(str(tmp_path / "empty"), default, resume=False) == tmp_path / "empty"
    taken = run_in(tmp_path / "taken")
    (tmp_path / "file").write_text("")
    for name in ("taken", "file"):
        with pytest.raises(UserError, match=rf"^--output .*{name}: exists already; .* --resume$"):
            choose_folder(str(tmp_path / name), default, resume=False)
    assert [path.name for path in taken.iterdir()] == ["run.json"]


def test_only_a_run_of_ours_is_resumed(default, tmp_path):
    """R17: no folder, a file, somebody else's folder, wished or by default."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("meow")
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "photos", "file"):
        with pytest.raises(UserError, match=rf"^--resume: .*{name} holds no run \(no run.json\); start one w"):
            choose_folder(str(tmp_path / name), default, resume=True)
    with pytest.raises(UserError, match="^--resume: there is no run to continue at .*imdb-tiny; start one with"):
        choose_folder(None, default, resume=True)
    run_in(Path(default))
    Path(f"{default}-2").mkdir()
    with pytest.raises(UserError, match=r"^--resume: .*imdb-tiny-2 holds no run"):
        choose_folder(None, default, resume=True)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    """R3, R17: below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--output .*file/run: Not a directory$"):
        choose_folder(str(tmp_path / "file" / "run"), "unused", resume=False)


def test_to_lock_a_folder_that_is_gone_makes_nothing(tmp_path):
    """A run whose folder was deleted, or is a link to nowhere, leaves no file where the folder was to be."""
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("gone", "link"):
        with pytest.raises(FileNotFoundError), locked(tmp_path / name, wait=False):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
