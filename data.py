"""The data sets: rows from files, rendered by a template and encoded as examples. This script shows them.

    python data.py --data imdb --show 3                                          the bundled sample, as tiny sees it
    python data.py --data rows.jsonl --model DIR --template my.txt --show 3      your own rows and template
    python data.py --data dolly:open_qa --data_dir DIR --model DIR               only counts, lengths and charts

Labels are shown in colour, or [[between brackets]] where there is no colour.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from llama.boundary.command_line import parse, run
from llama.boundary.errors import UserError, as_user_error, printable
from llama.boundary.hub import find_model
from llama.boundary.records import setting
from llama.data.charts import Splits, draw
from llama.data.chat import Renderer
from llama.data.examples import EncodedData, encode_file
from llama.data.formats import find_template
from llama.data.sources import HELD_OUT, TINY_TOKENIZER, DataSettings, Source, resolve
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer

TABLE_ROW = "{name:8}{examples:10}{tokens:12}{labels:10}{mean:8.1f}{p50:7.0f}{p95:7.0f}{max:7}{cut:8.1%}"
HELD_OUT_SEED = 0  # not the run's seed: runs with different seeds are tested on the same examples


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """what to show"""

    model: str = setting("tiny", "whose tokenizer: tiny, a Hugging Face folder, or a hub id")
    show: int = setting(0, "print so many examples", at_least=0)
    output: str | None = setting(None, "folder for lengths.png and labels.png; default: runs/DATA-shown")


def main() -> None:
    settings = parse(Settings, description=__doc__)
    tiny = settings.model == "tiny"
    tokenizer = load_tokenizer(TINY_TOKENIZER if tiny else find_model(settings.model), settings.control_tokens)
    data = load_data(settings, tokenizer, use_hub=not (tiny and settings.data == "imdb"))
    parts = {"train": data.train, "test": data.test}
    splits = {name: part for name, part in parts.items() if part}
    for note in tokenizer.notes:
        print(printable(note))
    print_summary(data, splits)
    first = next(iter(splits.values()))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for i in range(min(settings.show, len(first))):
        ids, is_label = first[i]
        print(f"--- example {i + 1}: row {first.rows[i]}, {len(ids)} tokens, {first.label_counts[i]} labels")
        print(shown(ids, is_label, tokenizer, colour))
    folder = Path(settings.output or f"runs/{run_name(settings.data)}-shown")
    with as_user_error(f"--output {folder}", "a folder for charts"):
        folder.mkdir(parents=True, exist_ok=True)
    title = f"{data.source.name} as {data.template.name}"
    draw(splits, data.template.answers, settings.max_length, folder, title)
    print(f"lengths.png and labels.png are in {folder}")


@dataclass(frozen=True)
class DataSet:
    """Encoded examples, and where they are from. A split is None where it was not asked for or does not exist.
    `held_out`: how `test` was taken from the train file; None where `test` has a file of its own."""

    source: Source
    template: Renderer
    train: EncodedData | None
    test: EncodedData | None
    held_out: dict | None

    @property
    def first_bad_rows(self) -> list[str]:
        """What is wrong with the first few bad rows of each file."""
        return [line for part in self._files for line in part.first_bad_rows]

    @property
    def bad_row_count(self) -> int:
        """How many rows of all files were left out."""
        return sum(part.bad_row_count for part in self._files)

    def identity(self) -> dict:
        """What a resumed run must share with its checkpoint, apart from the examples themselves."""
        shown = {"template": self.template.name, "system": self.template.system}
        return shown | {"bundled_sample": self.source.bundled_sample}

    def counts(self) -> dict:
        """For the records of a run."""
        assert self.train is not None  # a run has examples to train on
        return {
            "train": len(self.train),
            "test": len(self.test) if self.test else 0,
            "truncated": int(self.train.was_cut.sum()),
            "bad_rows": self.bad_row_count,
            "held_out": self.held_out,
        }

    def notes(self) -> list[str]:
        """What a user should know about the data before a run."""
        lines = self.warnings()
        if self.bad_row_count:
            lines.append(f"{self.bad_row_count} bad rows were left out, the first: {self.first_bad_rows[0]}")
        assert self.train is not None
        tokens, cut = self.train.lengths.mean(), self.train.was_cut.mean()
        size = f"{len(self.train)} examples of {tokens:.0f} tokens, {cut:.1%} of them cut"
        return [*lines, f"{size}, by the template {self.template.name}"]

    def warnings(self) -> list[str]:
        """What may not be as the user thinks: where rows are from, how they are written, what of them is not used."""
        lines = [*self.source.notes(), *self.template.notes]
        names = sorted({name for part in self._files for name in part.unused})
        if names:
            lines.append(f"fields of the rows that are not used: {', '.join(f'{name!r:.40}' for name in names)}")
        return lines

    @property
    def _files(self) -> list[EncodedData]:
        parts = [self.train] if self.held_out else [self.train, self.test]
        return [part for part in parts if part]


def load_data(
    settings: DataSettings,
    tokenizer: Tokenizer,
    use_hub: bool = True,
    splits=("train", "test"),
    adapt: Callable[[Renderer], Renderer] = lambda template: template,
) -> DataSet:
    """Encode the `splits` of the data set that the settings name. `adapt` may change how the template reads a row.

    Every process calls this, and no process waits in a collective: the first on a machine encodes, the others wait for
    its cache. Raises UserError where there is no such data, and BadRows where rows cannot be used.
    """
    source = resolve(settings.data, settings.data_dir, use_hub)
    template = adapt(find_template(settings.template, source, tokenizer, settings.system))
    limits = (settings.max_length, settings.truncate_side, source.category, settings.skip_bad_rows)
    fraction = settings.test_fraction
    if "test" in source.files:
        if fraction:
            found = f"expected a data set without a test file, found {source.files['test'][0]}"
            raise UserError(f"--test_fraction {fraction}: {found}")
        wanted = [split for split in splits if split in source.files]
        encoded = {split: encode_file(source.files[split], template, tokenizer, *limits) for split in wanted}
        return DataSet(source, template, encoded.get("train"), encoded.get("test"), held_out=None)
    everything = encode_file(source.files["train"], template, tokenizer, *limits)
    fraction = HELD_OUT if fraction is None else fraction
    train, test = hold_out(len(everything), fraction)
    if not len(test):
        return DataSet(source, template, everything, test=None, held_out=None)
    held_out = {"fraction": fraction, "seed": HELD_OUT_SEED, "examples": len(test)}
    return DataSet(source, template, everything.subset(train), everything.subset(test), held_out)


def hold_out(examples: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which examples to train on and which to hold out: a random choice, each in the order of the file."""
    order = np.random.default_rng(HELD_OUT_SEED).permutation(examples)
    count = min(max(1, round(examples * fraction)), examples - 1) if fraction else 0
    return np.sort(order[count:]), np.sort(order[:count])


def run_name(data: str) -> str:
    """The name of a run's folder, from its --data."""
    stem = os.path.basename(os.path.realpath(data)).partition(".")[0]
    return stem.replace(":", "-") or "data"


def print_summary(data: DataSet, splits: Splits) -> None:
    """The template, counts and lengths of each split, how often each answer comes, and what was left out."""
    for line in data.warnings():
        print(printable(line))
    held_out = f"; held out: {json.dumps(data.held_out)}" if data.held_out else ""
    print(f"template: {data.template.name}{held_out}")
    print("          examples      tokens    labels    mean    p50    p95    max     cut")
    for name, part in splits.items():
        found = statistics(part)
        print(TABLE_ROW.format(name=name, cut=found["truncated"] / len(part), **found))
        counts = Counter(part.answers.tolist())
        for i, word in enumerate(data.template.answers):
            print(f"{'':10}{printable(word.strip())}: {counts[i]} ({counts[i] / len(part):.1%})")
    if data.bad_row_count:
        bad_rows = map(printable, data.first_bad_rows)
        print(f"{data.bad_row_count} bad rows were left out:", *bad_rows, sep="\n  ")


def statistics(data: EncodedData) -> dict:
    """Counts (`truncated`: examples that lost tokens), and mean, median, 95th percentile and maximum of the lengths."""
    lengths = data.lengths
    return {
        "examples": len(data),
        "tokens": int(lengths.sum()),
        "labels": int(data.label_counts.sum()),
        "truncated": int(data.was_cut.sum()),
        "mean": float(lengths.mean()),
        "p50": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
    }


def shown(ids: np.ndarray, is_label: np.ndarray, tokenizer: Tokenizer, colour: bool) -> str:
    """One example as text, with its labels marked and its control tokens by name."""
    before, after = ("\x1b[1;32m", "\x1b[0m") if colour else ("[[", "]]")
    text = ""
    starts_text = True
    pairs = zip(ids.tolist(), is_label.tolist(), strict=True)
    for labelled, group in groupby(pairs, key=lambda pair: pair[1]):
        spelled = _spell([id for id, _ in group], tokenizer, starts_text)
        text += before + spelled + after if labelled else spelled
        starts_text = False
    return text


def _spell(ids: list[int], tokenizer: Tokenizer, starts_text: bool) -> str:
    text = ""
    for name, group in groupby(ids, key=tokenizer.control_name):
        if name is None:
            plain = tokenizer.decode(list(group), starts_text)
            text += printable(plain, keep="\n\t")  # a row's text cannot control the terminal
            starts_text = False
        else:
            text += name * len(list(group))
            starts_text = tokenizer.control_id(name) == tokenizer.bos_id
    return text


if __name__ == "__main__":
    run(main)
