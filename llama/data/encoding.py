"""Segments become ids, once per content: encoded examples lie end to end in a memory-mapped cache on disk.

Why apart: a tokenizer merges letters across any border. Encoded together, the end of a prompt may fuse with the start
of its answer into a token that the prompt alone, at inference, never ends in. So each segment is encoded on its own
and the ids are joined: the prompt at inference is by construction a strict prefix of what was trained on. The price is
that ids may differ from those of the whole string. `llama/data/batches.py` makes packed batches of the examples.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

import llama.data.chat
import llama.data.rows
import llama.data.templates
import llama.data.tokenizer
from llama.boundary.errors import printable
from llama.data.cache import cached, digest
from llama.data.rows import DataError, read
from llama.data.templates import END, Segment, described
from llama.data.tokenizer import Tokenizer

# Rows are tokenized in batches of at most so many, and (but for a single long row) so many characters.
# A million characters take some 100 MB while they are tokenized.
BATCH_ROWS, BATCH_CHARACTERS = 2000, 1 << 20
# How many bad rows are shown; all are counted.
SHOWN = 5


class Renderer(Protocol):
    """What encoding needs of a template, be it a `templates.Template` or a `chat.Chat` layout."""

    name: str
    source: str  # all that decides what it renders
    columns: set[str]  # all fields it may look at
    answers: tuple[str, ...]  # the words that an answer is one of; () where it is free text

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]: ...


class BadRows(DataError):
    """The first few rows that cannot be used, a line each, and how many there are."""

    def __init__(self, path: Path, shown: list[str], count: int, rows: int):
        total = f"{path}: {count} of {rows} rows cannot be used; mend them, or leave them out with --skip_bad_rows"
        super().__init__("; ".join([*shown, total]))
        self._lines = [printable(line) for line in (*shown, total)]

    @property
    def lines(self) -> list[str]:
        return self._lines


class Encoded(NamedTuple):
    """One example: its ids, for each whether it is to be learned as part of an answer, whether any id was cut."""

    ids: list[int]
    is_answer: list[bool]
    was_cut: bool


def encode_rows(
    rows: Sequence[Sequence[Segment]], tokenizer: Tokenizer, max_length: int, truncate_side: str, answer_room: int = 0
) -> list[Encoded | None]:
    """Examples of at most max_length tokens; None where they have an answer, but no label of it fits.

    A prompt's segments that may be cut are cut first, at truncate_side; then, if any answer may be cut, the end of the
    whole, back to the last label: an answer that was cut has no end token behind it. At least `answer_room` tokens are
    kept free for the answer: given the length of the longest one, a prompt is cut alike whatever its answer, and also
    without one, at inference. All texts go to the tokenizer in two batches, which it encodes on all cores.
    """
    texts: dict[bool, dict[str, None]] = {False: {}, True: {}}  # by whether they continue a document; each once
    for segments in rows:
        for i, segment in enumerate(segments):
            if not segment.control:
                texts[i > 0 and not segment.begins][segment.text] = None
    ids = {continues: dict(zip(unique, tokenizer.encode_batch(list(unique), continues=continues), strict=True))
           for continues, unique in texts.items()}
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def encoded(segment: Segment, begins: bool) -> list[int]:
        if not segment.control:
            return ids[not begins][segment.text]
        control = tokenizer.eos_id if segment.text == END else tokenizer.control_id(segment.text)
        return [*(begin if begins else []), control]

    return [
        _joined(segments, [encoded(s, i == 0 or s.begins) for i, s in enumerate(segments)], len(begin), max_length,
                truncate_side, answer_room)
        for segments in rows
    ]


def _joined(
    segments: Sequence[Segment], pieces: list[list[int]], begin: int, max_length: int, side: str, answer_room: int
) -> Encoded | None:
    """The ids of one example's segments, cut to max_length. `begin`: how many of the first are BOS, never cut."""
    answer = sum(len(piece) for piece, segment in zip(pieces, segments, strict=True) if segment.answer)
    excess = sum(map(len, pieces)) + max(0, answer_room - answer) - max_length
    was_cut = excess > 0
    for i, segment in enumerate(segments):
        if excess <= 0:
            break
        if segment.may_cut and not segment.answer:
            head = begin if i == 0 else 0
            cut = min(excess, len(pieces[i]) - head)
            first = head if side == "left" else len(pieces[i]) - cut
            pieces[i] = pieces[i][:first] + pieces[i][first + cut :]
            excess -= cut
    ids, is_answer = [], []
    for piece, segment in zip(pieces, segments, strict=True):
        ids += piece
        is_answer += [segment.answer] * len(piece)
    answers = [segment for segment in segments if segment.answer]
    if excess > 0:
        if not any(segment.may_cut for segment in answers):
            return None
        length = max((i + 1 for i, labelled in enumerate(is_answer[:max_length]) if labelled), default=0)
        del ids[length:], is_answer[length:]
    if is_answer and is_answer[0]:
        is_answer[0] = False  # nothing comes before it that could predict it
    return Encoded(ids, is_answer, was_cut) if True in is_answer or not answers else None


# The files of a cache folder: an entry a token, and an entry an example.
TOKENS = {"tokens": np.int32, "is_answer": np.bool_}
EXAMPLES = {"stops": np.int64, "label_counts": np.int64, "answers": np.int16, "rows": np.int64, "was_cut": np.bool_}


@dataclass(frozen=True)
class EncodedData:
    """Encoded examples: views of the memory-mapped tokens of a cache folder; only pages in use are in memory.

    Of n examples: starts, stops (n) int64, where each lies in tokens; label_counts (n); answers (n), the index of its
    answer word or -1; rows (n), its number in the file; was_cut (n), whether it lost tokens. `bad_rows` of the file
    were left out, and the first few are told in `bad`.
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
    bad_rows: int
    bad: list[str]
    with_prompts: bool = False

    @classmethod
    def open(cls, folder: Path, path: Path) -> "EncodedData":
        """What a cache folder holds of the file at `path`. Raises OSError, ValueError, KeyError or TypeError when it is
        damaged."""
        about = json.loads((folder / "about.json").read_text())
        arrays = {}
        for name, dtype in (TOKENS | EXAMPLES).items():
            with open(folder / name, "rb") as file:  # not through the map, whose pages would count as memory in use
                crc = 0
                while piece := file.read(1 << 20):
                    crc = zlib.crc32(piece, crc)
                size = file.tell()
            if (size, crc) != (about["tokens" if name in TOKENS else "examples"] * np.dtype(dtype).itemsize,
                               about["crc"][name]):
                raise ValueError(f"{name} is not as it was written")
            # An empty file cannot be mapped.
            arrays[name] = np.memmap(folder / name, dtype, "r") if size else np.empty(0, dtype)
        stops = arrays.pop("stops")
        starts = np.concatenate([[0], stops])[:-1]
        return cls(starts=starts, stops=stops, **arrays, crc=about["crc"]["tokens"] ^ about["crc"]["is_answer"],
                   bad_rows=about["bad_rows"], bad=[f"{path}{line}" for line in about["bad"]])

    def subset(self, chosen: np.ndarray) -> "EncodedData":
        """The examples of these indices, in this order."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in
                                ("starts", "stops", "label_counts", "answers", "rows", "was_cut")})

    def labelling_prompts(self) -> "EncodedData":
        """The same examples with every token but each one's first as a label."""
        return replace(self, label_counts=self.lengths - 1, with_prompts=True)

    @cached_property
    def fingerprint(self) -> str:
        """CRC-32 of the tokens, which of them are labels, and the order of the examples."""
        crc = zlib.crc32(np.ascontiguousarray(self.starts), self.crc + self.with_prompts)
        return f"{zlib.crc32(np.ascontiguousarray(self.stops), crc):08x}"

    @cached_property  # asked for several times a step
    def lengths(self) -> np.ndarray:
        """Tokens in each example, (n) int64."""
        return np.asarray(self.stops) - self.starts

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """ids of example i, and which of them are labels, each (length)."""
        part = slice(self.starts[i], self.stops[i])
        if not self.with_prompts:
            return self.tokens[part], self.is_answer[part]
        return self.tokens[part], np.arange(self.lengths[i]) > 0


def encode_file(
    path: Path, template: Renderer, tokenizer: Tokenizer, max_length: int, truncate_side: str = "right",
    category: str | None = None, skip_bad_rows: bool = False, quiet: bool = False,
) -> EncodedData:
    """Encode the rows of a file (of one `category`, where given), or reuse the cache of an earlier time.

    The cache is keyed by content: of the data, of the tokenizer's files, of this code and its libraries, the settings.
    Raises BadRows when rows cannot be used, unless they are to be skipped, and DataError when the whole file cannot.
    """
    modules = (llama.data.chat, llama.data.rows, llama.data.templates, llama.data.tokenizer)
    code = [Path(module.__file__) for module in modules]
    before = _identity(path)
    key = [digest([path, *tokenizer.files, Path(__file__), *code]), path.suffix, template.name, template.source,
           max_length, truncate_side, category, version("sentencepiece"), version("tokenizers")]

    def make(folder: Path) -> None:
        with tqdm(desc=f"encoding {path.name}", unit=" rows", disable=quiet, leave=False) as progress:
            _encode_into(folder, path, _rendered(path, template, category), template.answers, tokenizer, max_length,
                         truncate_side, progress)
        if _identity(path) != before:
            raise DataError(f"{path}: changed while it was read, expected it to stay as it is")

    folder = cached(json.dumps(key), make)
    try:
        data = EncodedData.open(folder, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: damaged, delete it to have the data encoded again ({error})") from None
    if data.bad_rows and not skip_bad_rows:
        raise BadRows(path, data.bad, data.bad_rows, len(data) + data.bad_rows)
    if not len(data):
        raise DataError(f"{path}: none of {data.bad_rows} rows can be used; {data.bad[0]}" if data.bad_rows else
                        f"{path}: no rows")
    return data


def _identity(path: Path) -> tuple[int, ...]:
    """What is sure to change with a file's content, unless on purpose. Raises DataError for one that is not there."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


class Rendered(NamedTuple):
    """One row of a file: its segments and the index of its answer, or what is wrong with it."""

    number: int
    segments: list[Segment]
    answer: int
    error: DataError | None


def _rendered(path: Path, template: Renderer, category: str | None) -> Iterator[Rendered]:
    """The rows of a file, of one category where one is given. Raises DataError when no row has it."""
    others, found = Counter(), False
    for number, row in read(path, template.columns | ({"category"} if category else set())):
        try:
            if isinstance(row, DataError):
                raise row
            if category is not None:
                if not isinstance(row.get("category"), str):
                    raise DataError(f"{path}:{number}: found fields {described(row)}, expected {{category: str}}")
                if row["category"] != category:
                    others[row["category"]] += 1
                    continue
            found = True
            yield Rendered(number, *template.render(row, f"{path}:{number}"), None)
        except DataError as error:
            yield Rendered(number, [], -1, error)
    if others and not found:
        known = ", ".join(f"{name!r:.40}" for name, _ in others.most_common(12))
        raise DataError(f"{path}: no row of category {category!r}, only of {known}")


def _batches(rows: Iterator[Rendered]) -> Iterator[list[Rendered]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += sum(len(segment.text) for segment in row.segments)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_into(
    folder: Path, path: Path, rows: Iterator[Rendered], answers: tuple[str, ...], tokenizer: Tokenizer,
    max_length: int, truncate_side: str, progress: tqdm,
) -> None:
    """Append what rows become to the files of `folder`; nothing of the size of the data is kept in memory."""
    answer_room = max(map(len, tokenizer.encode_batch(list(answers), continues=True)), default=0)
    bad, about = [], {"examples": 0, "tokens": 0, "bad_rows": 0, "crc": dict.fromkeys(TOKENS | EXAMPLES, 0)}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in TOKENS | EXAMPLES}
        for batch in _batches(rows):
            errors = {row.number: str(row.error) for row in batch if row.error}
            good = [row for row in batch if not row.error]
            encoded = encode_rows([row.segments for row in good], tokenizer, max_length, truncate_side, answer_room)
            pairs = list(zip(good, encoded, strict=True))
            errors |= {row.number: f"{path}:{row.number}: no label is left within --max_length {max_length} tokens, "
                                   "expected a shorter row" for row, example in pairs if not example}
            _append(files, [(row, example) for row, example in pairs if example], about)
            about["bad_rows"] += len(errors)
            # Without the path: the cache may serve the same content under another one.
            bad += [" ".join(errors[number].removeprefix(str(path)).splitlines())
                    for number in sorted(errors)[: SHOWN - len(bad)]]
            progress.update(len(batch))
    (folder / "about.json").write_text(json.dumps(about | {"bad": bad}))


def _append(files: dict[str, BinaryIO], pairs: list[tuple[Rendered, Encoded]], about: dict) -> None:
    examples = [example for _, example in pairs]
    lengths = [len(example.ids) for example in examples]
    values = {
        "tokens": chain.from_iterable(example.ids for example in examples),
        "is_answer": chain.from_iterable(example.is_answer for example in examples),
        "stops": about["tokens"] + np.cumsum(lengths, dtype=np.int64),
        "label_counts": (sum(example.is_answer) for example in examples),
        "answers": (row.answer for row, _ in pairs),
        "rows": (row.number for row, _ in pairs),
        "was_cut": (example.was_cut for example in examples),
    }
    for name, dtype in (TOKENS | EXAMPLES).items():
        array = np.fromiter(values[name], dtype)
        files[name].write(array.data)  # tofile would not tell of a full disk
        about["crc"][name] = zlib.crc32(array, about["crc"][name])
    about["examples"] += len(pairs)
    about["tokens"] += sum(lengths)
