"""The public data sets, and the files that `--data` and `--data_dir` name."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama.boundary.errors import UserError
from llama.boundary.hub import download_dataset
from llama.boundary.records import Settings, setting
from llama.data.chat import LAYOUTS
from llama.data.rows import READERS
from llama.data.templates import TEMPLATES

ASSETS = Path(__file__).parents[2] / "assets"
TINY_TOKENIZER = ASSETS / "tiny"  # of the built-in model
SAMPLE = ASSETS / "imdb_sample"
BUNDLED_SAMPLE = "DATA: the bundled sample of made-up reviews, NOT the real IMDB; give --data_dir for that"
HELD_OUT = 0.05  # of a data set without a test file


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
class DataSettings(Settings):
    """which data"""

    data: str = setting(
        "imdb",
        f"{', '.join(PUBLIC_DATASETS)}; a file ({', '.join(READERS)}); or a folder with train.* and test.*; "
        "NAME:CATEGORY for the rows of one category, such as dolly:open_qa",
    )
    data_dir: str | None = setting(
        None, "folder with the public data set's train.* and test.*, or its only file; else downloaded from the hub"
    )
    template: str | None = setting(
        None,
        f"how rows become prompts and answers: {', '.join(TEMPLATES)}, chat, {', '.join(LAYOUTS)}, or a file of your "
        "own; else the one that the rows' fields belong to",
    )
    system: str | None = setting(
        None,
        "the system turn of conversations that have none: a text, default (what the model's chat template inserts) or "
        "none; else none, and it is told where the model's chat template inserts one",
    )
    max_length: int = setting(512, "tokens per example; only what the template allows is cut", at_least=2)
    control_tokens: str | None = setting(
        None,
        "control tokens, with commas, that the texts of rows and templates may spell, such as "
        "'<|im_start|>,<|im_end|>' for rows that are rendered already; else what looks like one stays text",
    )
    truncate_side: str = setting("right", "which end of a prompt's text is cut", choices=("left", "right"))
    test_fraction: float | None = setting(
        None,
        f"part of the rows to hold out, the same for every seed; {HELD_OUT:g} where there is no test file",
        at_least=0,
        below=1,
    )
    skip_bad_rows: bool = setting(False, "leave out rows that cannot be used, and count them")


@dataclass(frozen=True)
class Source:
    """The files of a data set, and whether they are the bundled sample instead of the real one."""

    name: str
    files: dict[str, Path]
    category: str | None = None
    bundled_sample: bool = False


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
        return Source(data, _split_files(path))
    if path.is_file():
        return Source(data, {"train": path})
    raise UserError(f"--data {data}: no such file or folder, nor one of the public data sets ({names})")


def _resolve_public(name: str, data_dir: str | None, category: str | None, use_hub: bool) -> Source:
    if data_dir is not None:
        path = Path(data_dir)
        bundled = os.path.realpath(path) == os.path.realpath(SAMPLE)
        files = {"train": path} if path.is_file() else _split_files(path)
        return Source(name, files, category, bundled)
    try:
        if not use_hub:
            raise UserError("the hub was not asked")
        return Source(name, download_dataset(*PUBLIC_DATASETS[name]), category)
    except UserError as error:
        if name == "imdb":
            return Source(name, _split_files(SAMPLE), category, bundled_sample=True)
        wanted = "train" + " or train".join(READERS)
        given = name if category is None else f"{name}:{category}"
        raise UserError(f"--data {given}: {error}; give --data_dir, a folder with its {wanted}") from None


def _split_files(folder: Path) -> dict[str, Path]:
    """{split: file} of a folder: train.* and test.*, where validation.* stands in for a missing one; or else its only
    data file as train."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = {}
    for split in ("train", "validation", "test"):
        paths = [path for path in (folder / f"{split}{suffix}" for suffix in READERS) if path.is_file()]
        if len(paths) > 1:
            raise UserError(f"{folder}: both {paths[0].name} and {paths[1].name}; expected one {split} file")
        if paths:
            found[split] = paths[0]
    if "validation" in found:
        validation = found.pop("validation")
        found.setdefault("test" if "train" in found else "train", validation)
    if found:
        return found
    readable = [path for path in folder.iterdir() if path.name.endswith(tuple(READERS))]
    files = sorted(path for path in readable if path.is_file())
    if len(files) == 1:
        return {"train": files[0]}
    wanted = " or ".join("train" + suffix for suffix in READERS)
    others = f", found {len(files)} others" if files else ""
    raise UserError(f"{folder}: no train or test file, expected {wanted}{others}")
