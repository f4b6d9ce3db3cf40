"""Examples, encoded once: they lie end to end in memory-mapped files of a cache on disk.

The cache is found by content. It is checked when it is opened, so a damaged file is an error and never wrong tokens.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from llama.boundary.errors import UserError, as_user_error, printable
from llama.boundary.launch import is_local_rank_zero
from llama.boundary.progress import Progress
from llama.data.cache import cached, digest
from llama.data.chat import Renderer
from llama.data.encoding import Encoded, encode_rows
from llama.data.rows import read
from llama.data.templates import Segment, described
from llama.data.tokenizer import Tokenizer

# Rows are tokenized in batches of at most this many rows and, unless a single row is longer, this many characters.
# A million characters take some 100 MB while they are tokenized.
BATCH_ROWS = 2000
BATCH_CHARACTERS = 1 << 20
SHOWN = 5  # how many bad rows a message shows; all are counted

# The files of a cache folder: some have an entry for each token, the others for each example.
TOKENS = {"tokens": np.int32, "is_answer": np.bool_}
EXAMPLES = {
    "stops": np.int64,
    "label_counts": np.int64,
    "answers": np.int16,
    "rows": np.int64,
    "was_cut": np.bool_,
}
FILES = TOKENS | EXAMPLES


class BadRows(UserError):
    """The first few rows that cannot be used, a line each, and how many there are."""

    def __init__(self, path: Path, first_bad_rows: list[str], count: int, rows: int):
        total = f"{path}: {count} of {rows} rows cannot be used; fix them, or leave them out with --skip_bad_rows"
        self._lines = [*first_bad_rows, total]
        super().__init__("; ".join(self._lines))

    @property
    def lines(self) -> list[str]:
        return [printable(line) for line in self._lines]


@dataclass(frozen=True)
class EncodedData:
    """n encoded examples. The tokens are memory-mapped: only the pages in use are in memory.

    starts, stops (n) int64: where each example lies in tokens. label_counts (n). answers (n): the index of its answer
    word, or -1. rows (n): its number in the file. was_cut (n): whether it lost tokens. `bad_row_count` rows of the file
    were left out, and `first_bad_rows` says what is wrong with the first few.
    """

    tokens: np.ndarray  # int32
    is_answer: np.ndarray  # bool
    starts: np.ndarray
    stops: np.ndarray
    label_counts: np.ndarray
    answers: np.ndarray
    rows: np.ndarray
    was_cut: np.ndarray
    crc: int  # of all tokens and labels
    bad_row_count: int
    first_bad_rows: list[str]
    with_prompts: bool = False

    @classmethod
    def open(cls, folder: Path, path: Path) -> "EncodedData":
        """What a cache folder holds of the file at `path`. Raises OSError, ValueError, KeyError or TypeError when the
        folder is damaged."""
        about = json.loads((folder / "about.json").read_text())
        arrays = {}
        for name, dtype in FILES.items():
            count = about["tokens" if name in TOKENS else "examples"]
            expected = (count * np.dtype(dtype).itemsize, about["crc"][name])
            if _size_and_crc(folder / name) != expected:
                raise ValueError(f"{name} is not as it was written")
            arrays[name] = np.empty(0, dtype)
            if count:  # an empty file cannot be mapped
                arrays[name] = np.memmap(folder / name, dtype, "r")
        stops = arrays.pop("stops")
        return cls(
            **arrays,
            starts=np.concatenate([[0], stops])[:-1],
            stops=stops,
            crc=about["crc"]["tokens"] ^ about["crc"]["is_answer"],
            bad_row_count=about["bad_row_count"],
            first_bad_rows=[f"{path}{line}" for line in about["first_bad_rows"]],
        )

    def subset(self, chosen: np.ndarray) -> "EncodedData":
        """The examples of these indices, in this order."""
        names = ("starts", "stops", "label_counts", "answers", "rows", "was_cut")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def labelling_prompts(self) -> "EncodedData":
        """The same examples, with every token as a label except each example's first."""
        return replace(self, label_counts=self.lengths - 1, with_prompts=True)

    @cached_property
    def fingerprint(self) -> str:
        """CRC-32 of the tokens, of which tokens are labels, and of the order of the examples."""
        crc = zlib.crc32(np.ascontiguousarray(self.starts), self.crc + self.with_prompts)
        return f"{zlib.crc32(np.ascontiguousarray(self.stops), crc):08x}"

    @cached_property  # a step asks for it several times
    def lengths(self) -> np.ndarray:
        """Tokens in each example, (n) int64."""
        return np.asarray(self.stops) - self.starts

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of example i, and which of them are labels, each (length)."""
        part = slice(self.starts[i], self.stops[i])
        if self.with_prompts:
            return self.tokens[part], np.arange(self.lengths[i]) > 0
        return self.tokens[part], self.is_answer[part]


def _size_and_crc(path: Path) -> tuple[int, int]:
    crc = 0
    with open(path, "rb") as file:  # not memory-mapped: all pages of a map would count as memory in use
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
        return file.tell(), crc


def encode_file(
    path: Path,
    template: Renderer,
    tokenizer: Tokenizer,
    max_length: int,
    truncate_side: str = "right",
    category: str | None = None,
    skip_bad_rows: bool = False,
) -> EncodedData:
    """Encode the rows of a file (only those of a `category`, if one is given), or reuse what was encoded earlier.

    The cache's key is the content of the data, of the tokenizer's files and of this room's code, the versions of the
    libraries, and the settings. On each machine one process reports its progress.

    Raises BadRows for rows that cannot be used, unless skip_bad_rows, and UserError if no row of the file can be used.
    """
    code = sorted(Path(__file__).parent.glob("*.py"))
    before = _identity(path)
    key = [digest([path, *tokenizer.files, *code]), path.suffix, template.name, template.source]
    key += [max_length, truncate_side, category, tokenizer.bos_id, tokenizer.eos_id, tokenizer.spelled]
    key += [version("sentencepiece"), version("tokenizers")]

    def make(folder: Path) -> None:
        batches = _batches(_render(path, template, category))
        answers = tokenizer.encode_batch(list(template.answers), starts_text=False)
        limits = (max_length, truncate_side, max(map(len, answers), default=0))
        with Progress(f"encoding {path.name}", "rows", silent=not is_local_rank_zero()) as progress:
            _write(folder, path, (_encode(batch, tokenizer, limits, progress) for batch in batches))
        if _identity(path) != before:
            raise UserError(f"{path}: changed while it was read, expected it to stay as it is")

    folder = cached(json.dumps(key), make)
    try:
        data = EncodedData.open(folder, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged, delete it to have the data encoded again ({error})") from None
    bad = data.bad_row_count
    if bad and not skip_bad_rows:
        raise BadRows(path, data.first_bad_rows, bad, len(data) + bad)
    if not len(data):
        found = f"none of {bad} rows can be used; {data.first_bad_rows[0]}" if bad else "no rows"
        raise UserError(f"{path}: {found}")
    return data


def _identity(path: Path) -> tuple[int, ...]:
    """Inode, size and time of change, to notice that a file is edited while it is read. Raises UserError if missing."""
    with as_user_error(path):
        found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


class Row(NamedTuple):
    """A row of a file: its segments and the index of its answer, or what is wrong with it."""

    where: str  # path:number
    number: int
    segments: list[Segment]
    answer: int
    error: str = ""


def _render(path: Path, template: Renderer, category: str | None) -> Iterator[Row]:
    """The rows of a file, only of one category where one is given. Raises UserError when no row is of it."""
    others = Counter()
    found = False
    columns = template.columns | ({"category"} if category else set())
    for number, row in read(path, columns):
        where = f"{path}:{number}"
        try:
            if isinstance(row, UserError):
                raise row
            if category is not None and not isinstance(row.get("category"), str):
                raise UserError(f"{where}: found fields {described(row)}, expected {{category: str}}")
            if category is not None and row["category"] != category:
                others[row["category"]] += 1
                continue
            found = True
            segments, answer = template.render(row, where)
            yield Row(where, number, segments, answer)
        except UserError as error:
            yield Row(where, number, [], -1, str(error))
    if others and not found:
        known = ", ".join(f"{name!r:.40}" for name, _ in others.most_common(12))
        raise UserError(f"{path}: no row of category {category!r}, only of {known}")


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(segment.text) for segment in row.segments)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


Examples = list[tuple[Row, Encoded]]


def _encode(
    batch: list[Row], tokenizer: Tokenizer, limits: tuple[int, str, int], progress: Progress
) -> tuple[Examples, list[str]]:
    """The examples of a batch of rows, and what is wrong with the others. `limits`: see `encode_rows`."""
    segments = [row.segments for row in batch if not row.error]
    encoded = iter(encode_rows(segments, tokenizer, *limits))
    examples = []
    errors = []
    for row in batch:
        example = None if row.error else next(encoded)
        if example:
            examples.append((row, example))
        else:
            too_long = f"no label is left within --max_length {limits[0]} tokens, expected a shorter row"
            errors.append(row.error or f"{row.where}: {too_long}")
    progress.update(len(batch))
    return examples, errors


def _write(folder: Path, path: Path, batches: Iterable[tuple[Examples, list[str]]]) -> None:
    """Append examples to the files of `folder`. Only one batch is in memory, however large the data is."""
    about = {"examples": 0, "tokens": 0, "bad_row_count": 0, "crc": dict.fromkeys(FILES, 0)}
    first_bad_rows = []
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in FILES}
        for examples, errors in batches:
            _append(files, examples, about)
            about["bad_row_count"] += len(errors)
            for error in errors[: SHOWN - len(first_bad_rows)]:
                # Without the path: the cache also serves a file of the same content under another path.
                first_bad_rows.append(" ".join(error.removeprefix(str(path)).splitlines()))
    (folder / "about.json").write_text(json.dumps(about | {"first_bad_rows": first_bad_rows}))


def _append(files: dict[str, BinaryIO], examples: Examples, about: dict) -> None:
    lengths = [len(example.ids) for _, example in examples]
    values = {
        "tokens": chain.from_iterable(example.ids for _, example in examples),
        "is_answer": chain.from_iterable(example.is_answer for _, example in examples),
        "stops": about["tokens"] + np.cumsum(lengths, dtype=np.int64),
        "label_counts": (sum(example.is_answer) for _, example in examples),
        "answers": (row.answer for row, _ in examples),
        "rows": (row.number for row, _ in examples),
        "was_cut": (example.was_cut for _, example in examples),
    }
    for name, dtype in FILES.items():
        array = np.fromiter(values[name], dtype)
        files[name].write(array.data)  # not array.tofile, which does not report a full disk
        about["crc"][name] = zlib.crc32(array, about["crc"][name])
    about["examples"] += len(examples)
    about["tokens"] += sum(lengths)
