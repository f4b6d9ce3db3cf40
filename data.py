"""The data sets: where their files are, which template renders them, what is held out. This script shows them.

    python data.py --data imdb --show 3                                          the bundled sample, as tiny sees it
    python data.py --data rows.jsonl --model DIR --template my.txt --show 3      rows and a template of your own
    python data.py --data dolly:open_qa --data_dir DIR --model DIR               counts, lengths and charts only

Rows are read (`llama/data/rows.py`), rendered as segments of text (`llama/data/templates.py`, `llama/data/chat.py`)
and encoded (`llama/data/encoding.py`). Labels are shown in colour, or [[between brackets]] where there is no colour.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama.boundary.command_line import CheckedSettings, is_local_first, parse, run, setting
from llama.boundary.errors import UserError, printable
from llama.boundary.hub import download_dataset, find_model
from llama.data.chat import LAYOUTS, Chat, layout_of
from llama.data.encoding import EncodedData, Renderer, encode_file
from llama.data.rows import READERS, DataError, read
from llama.data.templates import TEMPLATES, Template, described
from llama.data.tokenizer import Tokenizer, load_tokenizer

ASSETS = Path(__file__).parent / "assets"
TINY_TOKENIZER = ASSETS / "tiny"
SAMPLE = ASSETS / "imdb_sample"
BUNDLED_SAMPLE = "DATA: the bundled sample of made-up reviews, NOT the real IMDB; give --data_dir for that"


class Named(NamedTuple):
    """A public data set: the template of the same name renders it."""

    repo: str  # on the hub
    config: str
    splits: dict[str, str]  # ours, and the hub's names of them


BOTH = {"train": "train", "test": "test"}
NAMED = {
    "imdb": Named("stanfordnlp/imdb", "plain_text", BOTH),
    "alpaca": Named("yahma/alpaca-cleaned", "default", {"train": "train"}),
    "dolly": Named("databricks/databricks-dolly-15k", "default", {"train": "train"}),
    "quotes": Named("Abirate/english_quotes", "default", {"train": "train"}),
    "grammar": Named("jhu-clsp/jfleg", "default", {"train": "validation", "test": "test"}),
    "gsm8k": Named("openai/gsm8k", "main", BOTH),
    "chat": Named("HuggingFaceH4/no_robots", "default", BOTH),
}
HELD_OUT = 0.05  # of a data set without a test file
HELD_OUT_SEED = 0  # not the run's, so that runs of different seeds are tested on the same examples


@dataclass(frozen=True, kw_only=True)
class DataSettings(CheckedSettings):
    """What every script asks about its data."""

    data: str = setting("imdb", f"{', '.join(NAMED)}; a file ({', '.join(READERS)}); or a folder with train.* and "
                        "test.*; NAME:CATEGORY for rows of one category, as dolly:open_qa")
    data_dir: str | None = setting(None, "folder with the named data set's train.* and test.*, or its only file; "
                                   "else it is had from the hub")
    template: str | None = setting(None, f"how rows become prompts and answers: {', '.join(TEMPLATES)}, chat, "
                                   f"{', '.join(LAYOUTS)}, or a file of your own; else what the fields tell")
    max_length: int = setting(512, "tokens per example; only what the template allows is cut")
    truncate_side: str = setting("right", "which end of a prompt's text is cut", choices=("left", "right"))
    test_fraction: float | None = setting(None, "part of the rows to hold out, the same for every seed; "
                                          f"{HELD_OUT:g} where there is no test file")
    skip_bad_rows: bool = setting(False, "leave out rows that cannot be used, and count them")

    def checks(self):
        return [
            ("max_length", "2 or more", self.max_length >= 2),
            ("test_fraction", "0 to 1, without 1", self.test_fraction is None or 0 <= self.test_fraction < 1),
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Where the rows are


@dataclass(frozen=True)
class Source:
    """The files a data set was resolved to, and whether they are the bundled stand-in for the real one."""

    name: str
    files: dict[str, Path]
    category: str | None = None
    bundled_sample: bool = False


def resolve(data: str, data_dir: str | None, use_hub: bool = True) -> Source:
    """Find the train and test files of a named data set, or of a path. Raises DataError when there are none.

    A named set is looked for in `data_dir`, then on the hub; where neither has it, `imdb` falls back to the bundled
    synthetic sample, which the returned source says.
    """
    name, colon, category = data.partition(":")
    if name in NAMED:
        if colon and not category:
            raise DataError(f"--data {data}: no category after the colon, expected one as in dolly:open_qa")
        category = category or None
        if data_dir is not None:
            path = Path(data_dir)
            bundled = os.path.realpath(path) == os.path.realpath(SAMPLE)
            return Source(name, {"train": path} if path.is_file() else _split_files(path), category, bundled)
        try:
            if not use_hub:
                raise UserError("the hub was not asked")
            return Source(name, download_dataset(*NAMED[name]), category)
        except UserError as error:
            if name == "imdb":
                return Source(name, _split_files(SAMPLE), category, bundled_sample=True)
            raise DataError(f"--data {data}: {error}; give --data_dir, a folder with its train"
                            f"{' or train'.join(READERS)}") from None
    if data_dir is not None:
        raise DataError(f"--data_dir {data_dir}: only for a named data set ({', '.join(NAMED)}), found --data {data}")
    path = Path(data)
    if path.is_dir():
        return Source(data, _split_files(path))
    if path.is_file():
        return Source(data, {"train": path})
    raise DataError(f"--data {data}: no such file or folder, nor one of the named data sets ({', '.join(NAMED)})")


def _split_files(folder: Path) -> dict[str, Path]:
    """train.* and test.*; validation.* in the place of one that is not there; else the only data file as train."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = {}
    for split in ("train", "validation", "test"):
        paths = [folder / f"{split}{suffix}" for suffix in READERS if (folder / f"{split}{suffix}").is_file()]
        if len(paths) > 1:
            raise DataError(f"{folder}: both {paths[0].name} and {paths[1].name}; expected one {split} file")
        if paths:
            found[split] = paths[0]
    if validation := found.pop("validation", None):
        found.setdefault("test" if "train" in found else "train", validation)
    if found:
        return found
    files = sorted(path for path in folder.iterdir() if path.name.endswith(tuple(READERS)) and path.is_file())
    if len(files) == 1:
        return {"train": files[0]}
    raise DataError(f"{folder}: no train or test file, expected {' or '.join('train' + s for s in READERS)}"
                    + (f", found {len(files)} others" if files else ""))


# ---------------------------------------------------------------------------------------------------------------------
# How they become examples


@dataclass(frozen=True)
class DataSet:
    """Encoded examples, and how they came about. A split is None where it was not asked for, or is not there;
    `held_out` says how `test` was taken from the train file, None where it has a file of its own."""

    source: Source
    template: Renderer
    train: EncodedData | None
    test: EncodedData | None
    held_out: dict | None

    @property
    def bad_rows(self) -> list[str]:
        """The first bad rows of each file, and their number in `bad_row_count`."""
        return [line for part in self._files for line in part.bad]

    @property
    def bad_row_count(self) -> int:
        return sum(part.bad_rows for part in self._files)

    @property
    def _files(self) -> list[EncodedData]:
        return [part for part in (self.train, None if self.held_out else self.test) if part]


def load(settings: DataSettings, tokenizer: Tokenizer, use_hub: bool = True, splits=("train", "test")) -> DataSet:
    """Everything between the flags and encoded examples, of the `splits` asked for.

    Every process calls this and waits in no collective: the first on a machine encodes, the others find the cache.

    Raises DataError where there is no such data, and BadRows where rows cannot be used.
    """
    source = resolve(settings.data, settings.data_dir, use_hub)
    template = find_template(settings.template, source, tokenizer)

    def encoded(split: str) -> EncodedData | None:
        if split not in source.files:
            return None
        return encode_file(source.files[split], template, tokenizer, settings.max_length, settings.truncate_side,
                           source.category, settings.skip_bad_rows, quiet=not is_local_first())

    if "test" in source.files:
        if settings.test_fraction:
            raise DataError(f"--test_fraction {settings.test_fraction}: expected a data set without a test file, found "
                            f"{source.files['test']}")
        return DataSet(source, template, *(encoded(s) if s in splits else None for s in ("train", "test")), None)
    everything = encoded("train")
    fraction = HELD_OUT if settings.test_fraction is None else settings.test_fraction
    train, test = hold_out(len(everything), fraction)
    if not len(test):
        return DataSet(source, template, everything, None, None)
    held_out = {"fraction": fraction, "seed": HELD_OUT_SEED, "examples": len(test)}
    return DataSet(source, template, everything.subset(train), everything.subset(test), held_out)


def hold_out(examples: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which examples to train on and which to hold out: a random choice, in the order of the file."""
    order = np.random.default_rng(HELD_OUT_SEED).permutation(examples)
    count = min(max(1, round(examples * fraction)), examples - 1) if fraction else 0
    return np.sort(order[count:]), np.sort(order[:count])


def find_template(name: str | None, source: Source, tokenizer: Tokenizer) -> Renderer:
    """The template that was asked for, or that of a named data set, or the one that a file's fields belong to.

    Raises DataError when there is none, or more than one, or the file of one is not well formed.
    """
    if name is None:
        name = source.name if source.name in NAMED else _guess(next(iter(source.files.values())))
    if name == "chat":
        name = layout_of(tokenizer)
    if name in LAYOUTS:
        return Chat(name)
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        known = ", ".join([*TEMPLATES, "chat", *LAYOUTS])
        raise DataError(f"--template {name}: no such file, nor one of {known}")
    try:
        return Template(name, Path(name).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"--template {name}: byte {error.start} is not UTF-8") from None


def _guess(path: Path) -> str:
    first = DataError(f"{path}: no rows")
    for number, row in islice(read(path), 1000):
        if number == 1 or isinstance(row, dict):
            first = row
        if isinstance(row, dict):
            break
    if isinstance(first, DataError):
        raise first
    known = {name: template.fields for name, template in TEMPLATES.items()} | {"chat": Chat.fields}
    fitting = [name for name, fields in known.items() if fields <= first.keys()]
    if len(fitting) == 1:
        return fitting[0]
    what = f"fit {' and '.join(fitting)}" if fitting else "are those of no known template"
    raise DataError(f"{path}: the fields {described(first)} {what}; say which with --template, {', '.join(known)} or "
                    "a file of your own")


def run_name(data: str) -> str:
    """What a run's folder is called after."""
    return os.path.basename(os.path.realpath(data)).partition(".")[0].replace(":", "-") or "data"


# ---------------------------------------------------------------------------------------------------------------------
# Looking at them


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    script = "data.py"

    model: str = setting("tiny", "whose tokenizer: tiny, a Hugging Face folder, or a hub id")
    show: int = setting(0, "print so many examples")
    output: str | None = setting(None, "folder for lengths.png and labels.png; runs/DATA-shown")

    def checks(self):
        return [*super().checks(), ("show", "0 or more", self.show >= 0)]


def statistics(data: EncodedData) -> dict:
    """Counts (`truncated`: examples that lost tokens), and of the tokens per example mean, median, 95th percentile
    and greatest."""
    lengths = data.lengths
    return {
        "examples": len(data), "tokens": int(lengths.sum()), "labels": int(data.label_counts.sum()),
        "truncated": int(data.was_cut.sum()), "mean": float(lengths.mean()), "p50": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)), "max": int(lengths.max()),
    }


def shown(ids: np.ndarray, labelled: np.ndarray, tokenizer: Tokenizer, colour: bool) -> str:
    """One example as text, its labels marked and its control tokens spelled out."""
    marks = {True: ("\x1b[1;32m", "\x1b[0m") if colour else ("[[", "]]"), False: ("", "")}
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or labelled[end] != labelled[start]:
            before, after = marks[bool(labelled[start])]
            parts.append(before + _spelled(ids[start:end].tolist(), tokenizer, start == 0) + after)
            start = end
    return "".join(parts)


def _spelled(ids: list[int], tokenizer: Tokenizer, begins: bool) -> str:
    text, plain = "", []
    for id in [*ids, None]:
        name = tokenizer.control_name(id) if id is not None else ""
        if name is None:
            plain.append(id)
            continue
        decoded = tokenizer.decode(plain, continues=not begins)
        # What rows say must not steer the terminal.
        text += printable(decoded, keep="\n\t") + name
        plain, begins = [], id == tokenizer.bos_id
    return text


def draw(splits: dict[str, EncodedData], answers: tuple[str, ...], max_length: int, folder: Path, title: str) -> None:
    """lengths.png, how long the examples are, and labels.png, how many have each answer (or how many labels)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def plain(text: str) -> str:
        return printable(text).replace("$", r"\$")

    for name, xlabel in (("lengths", "tokens per example"), ("labels", "answer" if answers else "labels per example")):
        figure, axis = plt.subplots(figsize=(8, 4), dpi=120)
        for number, (split, data) in enumerate(splits.items()):
            label = f"{split}, {len(data)} examples"
            if name == "labels" and answers:
                places = np.arange(len(answers)) + 0.4 * (number - 0.5 * (len(splits) - 1))
                axis.bar(places, np.bincount(data.answers, minlength=len(answers)), 0.4, label=label)
                axis.set_xticks(range(len(answers)), [plain(answer.strip()) for answer in answers])
            else:
                axis.hist(data.lengths if name == "lengths" else data.label_counts, bins=50, alpha=0.6, label=label)
        if name == "lengths":
            axis.axvline(max_length, color="#d94801", linestyle="--", label=f"--max_length {max_length}")
        axis.set(xlabel=xlabel, ylabel="examples", title=plain(title))
        axis.legend()
        figure.tight_layout()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png")
        except OSError as error:
            raise UserError(f"--output {folder}: {error.strerror}, expected a folder for charts") from None
        finally:
            plt.close(figure)


def main() -> None:
    settings = parse(Settings, description=__doc__)
    tiny = settings.model == "tiny"
    tokenizer = load_tokenizer(TINY_TOKENIZER if tiny else find_model(settings.model))
    data = load(settings, tokenizer, use_hub=not (tiny and settings.data == "imdb"))
    if data.source.bundled_sample:
        print(BUNDLED_SAMPLE)
    print(f"template: {data.template.name}" + (f"; held out: {json.dumps(data.held_out)}" if data.held_out else ""))
    splits = {name: part for name, part in (("train", data.train), ("test", data.test)) if part}
    print(f"{'':8}{'examples':>10}{'tokens':>12}{'labels':>10}{'mean':>8}{'p50':>7}{'p95':>7}{'max':>7}{'cut':>8}")
    for name, part in splits.items():
        told = statistics(part)
        print(f"{name:8}{told['examples']:10}{told['tokens']:12}{told['labels']:10}{told['mean']:8.1f}{told['p50']:7.0f}"
              f"{told['p95']:7.0f}{told['max']:7}{told['truncated'] / len(part):8.1%}")
        counts = Counter(part.answers.tolist())
        for i, word in enumerate(data.template.answers):
            print(f"{'':10}{printable(word.strip())}: {counts[i]} ({counts[i] / len(part):.1%})")
    if data.bad_row_count:
        print(f"{data.bad_row_count} bad rows were left out:", *data.bad_rows, sep="\n  ")
    colour = sys.stdout and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    first = next(iter(splits.values()))
    for i in range(min(settings.show, len(first))):
        ids, labelled = first[i]
        print(f"--- example {i + 1}: row {first.rows[i]}, {len(ids)} tokens, {first.label_counts[i]} labels")
        print(shown(ids, labelled, tokenizer, colour))
    folder = Path(settings.output or f"runs/{run_name(settings.data)}-shown")
    draw(splits, data.template.answers, settings.max_length, folder, f"{data.source.name} as {data.template.name}")
    print(f"lengths.png and labels.png are in {folder}")


if __name__ == "__main__":
    run(main)
