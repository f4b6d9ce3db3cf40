"""The public data sets, and the files that `--data` and `--data_dir` name."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama.boundary.errors import UserError, first_few
from llama.boundary.hub import download_dataset
from llama.boundary.records import Settings, setting
from llama.data.chat import LAYOUTS
from llama.data.rows import KINDS, READERS
from llama.data.templates import TEMPLATES

ROOT, LLAMA = Path(__file__).parents[2], Path(__file__).parents[1]
ASSETS = ROOT / "assets" if (ROOT / "fsdp_train.py").exists() else LLAMA / "assets"  # the clone, or as pip installs it
TINY_TOKENIZER = ASSETS / "tiny"  # of the built-in model
SAMPLE = ASSETS / "imdb_sample"
BUNDLED_SAMPLE = "DATA: the bundled sample of made-up reviews, NOT the real IMDB; give --data_dir for that"
HELD_OUT = 0.05  # of a data set without a test file
SHARD = re.compile(r"-(?P<index>\d{1,9})-of-(?P<count>\d{1,9})(-[0-9a-f]+)?$")  # as in train-00000-of-00003.parquet


class PublicDataset(NamedTuple):
    """A public data set. The template of the same name renders it."""

    repo: str  # on the hub
    config: str
    splits: dict[str, str]  # {our name: the hub's name}


BOTH = {"train": "train", "test": "test"}
TRAIN = {"train": "train"}
PUBLIC_DATASETS = {
    "imdb": PublicDataset("stanfordnlp/imdb", "plain_text", BOTH),
    "alpaca": PublicDataset("yahma/alpaca-cleaned", "default", TRAIN),
    "dolly": PublicDataset("databricks/databricks-dolly-15k", "default", TRAIN),
    "quotes": PublicDataset("Abirate/english_quotes", "default", TRAIN),
    "grammar": PublicDataset("jhu-clsp/jfleg", "default", {"train": "validation", "test": "test"}),
    "gsm8k": PublicDataset("openai/gsm8k", "main", BOTH),
    "chat": PublicDataset("HuggingFaceH4/no_robots", "default", BOTH),
}


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """how rows become prompts"""

    template: str | None = setting(
        None,
        f"how rows become prompts and answers: {', '.join(TEMPLATES)}, chat, {', '.join(LAYOUTS)}, or a file of your "
        "own; else the one that the rows' fields belong to",
    )
    system: str | None = setting(
        None,
        "the system turn of conversations that have none: a text, default (what the model's chat template inserts) or "
        "none; without this flag none, and a note if the model's chat template inserts one; generate.py then inserts "
        "it, except for what a run has left: that is asked as it was trained",
    )
    control_tokens: str | None = setting(
        None,
        "control tokens, with commas, that the texts of rows and templates may spell, such as "
        "'<|im_start|>,<|im_end|>' for rows that are rendered already; else what looks like one stays text",
    )
    truncate_side: str = setting("right", "which end of a prompt's text is cut", choices=("left", "right"))
    skip_bad_rows: bool = setting(False, "leave out rows that cannot be used, and count them")


@dataclass(frozen=True, kw_only=True)
class DataSettings(PromptSettings):
    """which data"""

    data: str = setting(
        "imdb",
        f"{', '.join(PUBLIC_DATASETS)}; a file ({KINDS}); or a folder with train.* and test.*; "
        "NAME:CATEGORY for the rows of one category, such as dolly:open_qa",
    )
    data_dir: str | None = setting(
        None, "folder with the public data set's train.* and test.*, or its only file; else downloaded from the hub"
    )
    max_length: int = setting(512, "tokens per example; only what the template allows is cut", at_least=2)
    test_fraction: float | None = setting(
        None,
        f"part of the rows to hold out, the same for every seed; {HELD_OUT:g} where there is no test file",
        at_least=0,
        below=1,
    )


@dataclass(frozen=True)
class Source:
    """The files of each split, in order, and whether they are the bundled sample instead of the real data set."""

    name: str
    files: dict[str, tuple[Path, ...]]
    category: str | None = None
    bundled_sample: bool = False
    unused: tuple[str, ...] = ()  # the names of further files of rows in its folder

    def notes(self) -> list[str]:
        """What a user should know: that this is the bundled sample, which files are not used, or that this is only one
        of several."""
        lines = [BUNDLED_SAMPLE] if self.bundled_sample else []
        if self.unused:
            lines.append(f"{next(iter(self.files.values()))[0].parent}: not used: {first_few(self.unused)}")
        for paths in self.files.values():
            shard = SHARD.search(_stem(paths[0]))
            if shard and len(paths) < int(shard["count"]):
                lines.append(f"{paths[0].name} is one of {int(shard['count'])} files; give their folder to use all")
        return lines


def resolve(data: str, data_dir: str | None, use_hub: bool = True) -> Source:
    """The train and test files of a public data set, or of a path. Raises UserError when there are none.

    A public data set is looked for in `data_dir`, or else on the hub. If the hub does not give `imdb`, the source is
    the bundled sample of made-up reviews, and says so.
    """
    name, colon, category = data.partition(":")
    if name in PUBLIC_DATASETS:
        if colon and not category:
            raise UserError(f"--data {data}: no category after the colon, expected one as in dolly:open_qa")
        return _resolve_public(name, data_dir, category or None, use_hub)
    names = ", ".join(PUBLIC_DATASETS)
    if data_dir is not None:
        raise UserError(f"--data_dir {data_dir}: only for a public data set ({names}), found --data {data}")
    path = Path(data)
    if path.is_dir():
        files = _split_files(path)
        return Source(data, files, unused=_unused(files))
    if path.is_file():
        return Source(data, {"train": (path,)})
    raise UserError(f"--data {data}: no such file or folder, nor one of the public data sets ({names})")


def _resolve_public(name: str, data_dir: str | None, category: str | None, use_hub: bool) -> Source:
    if data_dir is not None:
        path = Path(data_dir)
        bundled = os.path.realpath(path) == os.path.realpath(SAMPLE)
        if path.is_file():
            return Source(name, {"train": (path,)}, category, bundled)
        files = _split_files(path)
        return Source(name, files, category, bundled, _unused(files))
    try:
        if not use_hub:
            raise UserError("the hub was not asked")
        return Source(name, download_dataset(*PUBLIC_DATASETS[name]), category)
    except UserError as error:
        if name == "imdb":
            return Source(name, _split_files(SAMPLE), category, bundled_sample=True)
        given = name if category is None else f"{name}:{category}"
        raise UserError(f"--data {given}: {error}; give --data_dir, a folder with its {TRAIN_FILE}") from None


TRAIN_FILE = f"train.* ({KINDS})"


def _split_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    """{split: files} of a folder: train.* and test.*, where validation.* stands in for a missing one; or else its only
    data file as train. A split may be several files, as train-00000-of-00002.*."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    groups = _groups(folder)
    found = {}
    for split in ("train", "validation", "test"):
        groups_of_split = [paths for (stem, _), paths in groups.items() if stem == split]
        if len(groups_of_split) > 1:
            first, second = (paths[0].name for paths in groups_of_split[:2])
            raise UserError(f"{folder}: both {first} and {second}; expected one {split} file")
        if groups_of_split:
            found[split] = _all_shards(folder, groups_of_split[0])
    if "validation" in found:
        validation = found.pop("validation")
        found.setdefault("test" if "train" in found else "train", validation)
    if found:
        return found
    if len(groups) == 1:
        return {"train": _all_shards(folder, next(iter(groups.values())))}
    if not groups and (folder / "data").is_dir():  # where a data set's repository on the hub keeps its files
        return _split_files(folder / "data")
    others = f", found {len(groups)} others" if groups else ""
    raise UserError(f"{folder}: no train or test file, expected {TRAIN_FILE}{others}")


def _unused(files: dict[str, tuple[Path, ...]]) -> tuple[str, ...]:
    """The names of the data files beside these in their folder."""
    used = {path for paths in files.values() for path in paths}
    unused = []
    for paths in _groups(next(iter(used)).parent).values():
        unused += [path.name for path in paths if path not in used]
    return tuple(unused)


def _stem(path: Path) -> str:
    """The name without the suffix of its kind."""
    return path.name.removesuffix(".gz").rpartition(".")[0]


def _groups(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """{(stem, suffix): files} of the data files in a folder, where the files of one split share a stem."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(tuple(READERS)) and path.is_file():
            stem = _stem(path)
            kind = path.name.removeprefix(stem)
            groups.setdefault((SHARD.sub("", stem), kind), []).append(path)
    return groups


def _all_shards(folder: Path, paths: list[Path]) -> tuple[Path, ...]:
    """The files of a split in the order of their numbers. Raises UserError where one is missing or there are more."""
    shards = [SHARD.search(_stem(path)) for path in paths]
    if len(paths) == 1 and shards[0] is None:
        return tuple(paths)
    found = [(int(shard["index"]), int(shard["count"])) for shard in shards if shard]
    count = len(paths)
    if sorted(found) != [(index, count) for index in range(count)]:
        names = first_few([path.name for path in paths])
        raise UserError(f"{folder}: found {names}, expected every file of one set, from 0 to the number after -of-")
    return tuple(path for _, path in sorted(zip(found, paths, strict=True)))
