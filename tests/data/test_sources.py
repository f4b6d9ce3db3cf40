"""Where the files of a data set are: public ones, folders and single files."""

import re

import pytest
from samples import write_rows

import llama.data.sources
from llama.boundary.errors import UserError
from llama.data.sources import ASSETS, PUBLIC_DATASETS, SAMPLE, Source, resolve


@pytest.fixture(autouse=True)
def no_hub(monkeypatch) -> None:
    def unreachable(*_):
        raise UserError("the hub, where it is ORG/NAME, cannot be reached")

    monkeypatch.setattr(llama.data.sources, "download_dataset", unreachable)


@pytest.mark.parametrize("name", PUBLIC_DATASETS)
@pytest.mark.parametrize("files, found", [
    (["train.jsonl", "test.parquet", "other.jsonl"], {"train": "train.jsonl", "test": "test.parquet"}),
    (["train.jsonl.gz", "validation.jsonl", "notes.txt"], {"train": "train.jsonl.gz", "test": "validation.jsonl"}),
    (["train.parquet", "validation.jsonl", "test.jsonl"], {"train": "train.parquet", "test": "test.jsonl"}),
    (["validation.jsonl", "test.jsonl"], {"train": "validation.jsonl", "test": "test.jsonl"}),
    (["validation.parquet"], {"train": "validation.parquet"}),
    (["train.jsonl"], {"train": "train.jsonl"}),
    (["test.jsonl"], {"test": "test.jsonl"}),
    (["databricks-dolly-15k.parquet", "README.md"], {"train": "databricks-dolly-15k.parquet"}),
], ids=lambda value: " ".join(value))  # fmt: skip
def test_a_named_set_is_found_in_a_folder_and_so_is_a_folder_without_a_name(tmp_path, name, files, found):
    """The file of each part; where validation stands in, for the one that is missing; else the only file."""
    for file in files:
        (tmp_path / file).write_text("")
    expected = {split: (tmp_path / file,) for split, file in found.items()}
    unused = resolve(name, str(tmp_path)).unused
    assert set(unused).isdisjoint(found.values())
    assert resolve(name, str(tmp_path)) == Source(name, expected, unused=unused)
    assert resolve(f"{name}:open_qa", str(tmp_path)) == Source(name, expected, "open_qa", unused=unused)
    assert resolve(str(tmp_path), None) == Source(str(tmp_path), expected, unused=unused)


@pytest.mark.parametrize("name", [None, "imdb"])
def test_files_of_rows_that_no_split_uses_are_named(tmp_path, name):
    """D: a validation file where there is a test file, too, or one of another name."""
    for file in ("train.jsonl", "test.jsonl", "validation.jsonl", "dev.csv", "notes.txt"):
        write_rows(tmp_path / file, [{"text": "x", "label": 1}])
    source = resolve(name, str(tmp_path), use_hub=False) if name else resolve(str(tmp_path), None, use_hub=False)
    assert source.notes() == [f"{tmp_path}: not used: 'dev.csv', 'validation.jsonl'"]
    single = tmp_path / "train.jsonl"
    assert resolve(str(single), None, use_hub=False).notes() == []


@pytest.mark.parametrize("name", PUBLIC_DATASETS)
def test_a_named_set_may_be_a_single_file_and_so_may_a_path(tmp_path, name):
    """R17: the file itself as --data_dir, or as --data."""
    path = write_rows(tmp_path / "rows.jsonl", [])
    assert resolve(name, str(path)) == Source(name, {"train": (path,)})
    assert resolve(str(path), None) == Source(str(path), {"train": (path,)})


@pytest.mark.parametrize("name", PUBLIC_DATASETS)
def test_a_named_set_is_had_from_the_hub_under_its_own_address(tmp_path, monkeypatch, name):
    """Repository, configuration and parts of each as the hub has them."""
    asked = []

    def download(*address):
        asked.append(address)
        return {split: (tmp_path / split,) for split in address[2]}

    monkeypatch.setattr(llama.data.sources, "download_dataset", download)
    source = resolve(f"{name}:c", None)
    assert source == Source(name, {split: (tmp_path / split,) for split in PUBLIC_DATASETS[name].splits}, "c")
    assert {"train"} <= set(source.files) <= {"train", "test"}
    assert asked == [tuple(PUBLIC_DATASETS[name])] and re.fullmatch(r"[\w-]+/[\w.-]+", asked[0][0])
    with pytest.raises(UserError, match="no category after the colon"):
        resolve(f"{name}:", None)


@pytest.mark.parametrize("name", [name for name in PUBLIC_DATASETS if name != "imdb"])
def test_where_the_hub_is_out_of_reach_one_line_says_what_to_do(name):
    """R17: the reason, and the flag that helps."""
    with pytest.raises(UserError) as error:
        resolve(name, None)
    (told,) = error.value.lines
    assert told.startswith(f"--data {name}: the hub, where it is ORG/NAME, cannot be reached; give --data_dir")


def test_imdb_falls_back_to_the_bundled_sample_and_the_source_says_so(tmp_path, monkeypatch):
    """Where the hub is out of reach or is not to be asked; also where the sample is named as a folder."""
    sources = [resolve("imdb", None)]
    monkeypatch.setattr(llama.data.sources, "download_dataset", lambda *_: pytest.fail("asked the hub"))
    sources += [resolve("imdb", None, use_hub=False), resolve("imdb", str(SAMPLE))]
    for source in sources:
        assert source.bundled_sample and source.name == "imdb" and set(source.files) == {"train", "test"}
        assert all(path.is_relative_to(ASSETS) and path.is_file() for (path,) in source.files.values())
    with pytest.raises(UserError, match="--data alpaca: .*give --data_dir"):
        resolve("alpaca", None, use_hub=False)


def test_what_cannot_be_found_is_named(tmp_path):
    """R15, R17: no such folder, nothing in it, too much in it, a folder for what is no named set."""
    for name in ("two/train.jsonl", "two/train.parquet", "many/a.jsonl", "many/b.parquet", "none/notes.txt", "a.jsonl"):
        write_rows(tmp_path / name, [])
    for call, expected in (
        (lambda: resolve("imbd", None), r"^--data imbd: no such file or folder, nor one of the public .*imdb"),
        (lambda: resolve("nowhere.jsonl", None), r"^--data nowhere.jsonl: no such file"),
        (lambda: resolve("imdb", str(tmp_path / "nowhere")), "nowhere: no such folder$"),
        (lambda: resolve("dolly", str(tmp_path / "none")), r"none: no train or test file, expected train.\* \(\.parq"),
        (lambda: resolve(str(tmp_path / "none"), None), "none: no train or test file"),
        (lambda: resolve(str(tmp_path / "many"), None), "many: no train or test file, .*, found 2 others$"),
        (lambda: resolve(str(tmp_path / "two"), None), "two: both train.* and train.*; expected one train file$"),
        (lambda: resolve(str(tmp_path / "a.jsonl"), str(tmp_path)), r"^--data_dir .*: only for a public data set \("),
    ):
        with pytest.raises(UserError, match=expected) as error:
            call()
        assert len(error.value.lines) == 1


@pytest.mark.parametrize("place", ["", "data"])
@pytest.mark.parametrize("ending", ["", "-0f3a9c1e5b7d2468"])
def test_a_split_of_several_files_is_all_of_them_in_the_order_of_their_numbers(tmp_path, place, ending):
    """D27: as the hub's repositories hold them, in a folder of their own or in `data`; ten come after nine."""
    names = [f"train-{i:02}-of-11{ending}.jsonl" for i in range(11)]
    for name in [*names, "test-00000-of-00001.jsonl", "README.md"]:
        write_rows(tmp_path / place / name, [])
    source = resolve(str(tmp_path), None)
    folder = tmp_path / place
    assert source.files == {
        "train": tuple(folder / name for name in names),
        "test": (folder / "test-00000-of-00001.jsonl",),
    }
    assert source.notes() == []


def test_a_missing_file_of_several_is_told_and_so_is_a_single_one_that_was_named(tmp_path):
    """D27: less than the whole is never taken in silence."""
    for i in (0, 2):
        write_rows(tmp_path / f"train-0000{i}-of-00003.jsonl", [])
    with pytest.raises(UserError, match="found 'train-00000-of-00003.jsonl', 'train-00002-of-00003.jsonl', expected"):
        resolve(str(tmp_path), None)
    one = resolve(str(tmp_path / "train-00002-of-00003.jsonl"), None)
    assert one.notes() == ["train-00002-of-00003.jsonl is one of 3 files; give their folder to use all"]
    write_rows(tmp_path / "train-00001-of-00003.jsonl", [])
    assert len(resolve(str(tmp_path), None).files["train"]) == 3
    write_rows(tmp_path / "train.jsonl", [])
    with pytest.raises(UserError, match="expected every file of one set"):
        resolve(str(tmp_path), None)
