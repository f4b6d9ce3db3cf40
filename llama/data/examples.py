"""Examples, encoded once: they lie end to end in memory-mapped files of a cache on disk.

The cache is found by content. It is checked when it is opened, so a damaged file is an error and never wrong tokens.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama.boundary.errors import UserError, as_user_error, printable
from llama.boundary.launch import is_local_rank_zero
from llama.boundary.progress import Progress
from llama.data.cache import cached, digest
from llama.data.chat import Renderer
from llama.data.encoding import Encoded, encode_rows
from llama.data.rendering import RenderedRows, Row
from llama.data.rows import suffix_of
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

    def __init__(self, path: Path | str, first_bad_rows: list[str], count: int, rows: int):
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
    were left out, and `first_bad_rows` says what is wrong with the first few. `unused`: fields of the file that no
    example uses.
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
    unused: list[str]
    with_prompts: bool = False

    @classmethod
    def open(cls, folder: Path, paths: Sequence[Path]) -> "EncodedData":
        """What a cache folder holds of the files at `paths`. Raises OSError, ValueError, LookupError or TypeError when
        the folder is damaged."""
        about = json.loads((folder / "about.json").read_text())
        arrays: dict = {}
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
            first_bad_rows=[f"{paths[file]}{line}" for file, line in about["first_bad_rows"]],
            unused=about["unused"],
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
        crc = zlib.crc32(np.ascontiguousarray(self.starts).data, self.crc + self.with_prompts)
        return f"{zlib.crc32(np.ascontiguousarray(self.stops).data, crc):08x}"

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
    files: Path | Sequence[Path],
    template: Renderer,
    tokenizer: Tokenizer,
    max_length: int,
    truncate_side: str = "right",
    category: str | None = None,
    skip_bad_rows: bool = False,
) -> EncodedData:
    """Encode the rows of one file or several, only those of a `category` if one is given, or reuse what was encoded.

    The cache's key is the content of the data, of the tokenizer's files and of this room's code, the versions of the
    libraries, and the settings. On each machine one process reports its progress.

    Raises BadRows for rows that cannot be used, unless skip_bad_rows, and UserError if no row of the file can be used.
    """
    paths = [files] if isinstance(files, Path) else files
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    code = sorted(Path(__file__).parent.glob("*.py"))
    before = [_identity(path) for path in paths]
    key: list[object] = [digest([*paths, *tokenizer.files, *code]), [suffix_of(path) for path in paths]]
    key += [template.name, template.source, max_length, truncate_side, category]
    key += [tokenizer.bos_id, tokenizer.eos_id, tokenizer.spelled]
    key += [version("sentencepiece"), version("tokenizers")]

    def make(folder: Path) -> None:
        rows = RenderedRows(paths, template, category)
        answers = tokenizer.encode_batch(list(template.answers), starts_text=False)
        limits = (max_length, truncate_side, max(map(len, answers), default=0))
        with Progress(f"encoding {Path(name).name}", "rows", silent=not is_local_rank_zero()) as progress:
            _write(folder, rows, (_encode(batch, tokenizer, limits, progress) for batch in _batches(rows)))
        if [_identity(path) for path in paths] != before:
            raise UserError(f"{name}: changed while it was read, expected it to stay as it is")

    folder = cached(json.dumps(key), make)
    try:
        data = EncodedData.open(folder, paths)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder}: damaged, delete it to have the data encoded again ({error})") from None
    _check_rows(data, name, skip_bad_rows)
    return data


def _check_rows(data: EncodedData, name: str, skip_bad_rows: bool) -> None:
    bad = data.bad_row_count
    if bad and not skip_bad_rows:
        raise BadRows(name, data.first_bad_rows, bad, len(data) + bad)
    if not len(data):
        found = f"none of {bad} rows can be used; {data.first_bad_rows[0]}" if bad else "no rows"
        raise UserError(f"{name}: {found}")


def _identity(path: Path) -> tuple[int, ...]:
    """Inode, size and time of change, to notice that a file is edited while it is read. Raises UserError if missing."""
    with as_user_error(path):
        found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
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
Errors = list[tuple[Row, str]]


def _encode(
    batch: list[Row], tokenizer: Tokenizer, limits: tuple[int, str, int], progress: Progress
) -> tuple[Examples, Errors]:
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
            errors.append((row, row.error or f"{row.place}: {too_long}"))
    progress.update(len(batch))
    return examples, errors


def _write(folder: Path, rows: RenderedRows, batches: Iterable[tuple[Examples, Errors]]) -> None:
    """Append examples to the files of `folder`. Only one batch is in memory, however large the data is."""
    about: dict = {"examples": 0, "tokens": 0, "bad_row_count": 0, "crc": dict.fromkeys(FILES, 0)}
    first_bad_rows: list[tuple[int, str]] = []
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in FILES}
        for examples, errors in batches:
            _append(files, examples, about)
            about["bad_row_count"] += len(errors)
            for row, error in errors[: SHOWN - len(first_bad_rows)]:
                # Without the path: the cache also serves a file of the same content under another path.
                text = error.removeprefix(str(rows.paths[row.file]))
                first_bad_rows.append((row.file, " ".join(text.splitlines())))
    (folder / "about.json").write_text(json.dumps(about | {"first_bad_rows": first_bad_rows, "unused": rows.unused}))


def _append(files: Mapping[str, BinaryIO], examples: Examples, about: dict) -> None:
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
        array: np.ndarray = np.fromiter(values[name], dtype)
        files[name].write(array.data)  # not array.tofile, which does not report a full disk
        about["crc"][name] = zlib.crc32(array.data, about["crc"][name])
    about["examples"] += len(examples)
    about["tokens"] += sum(lengths)
