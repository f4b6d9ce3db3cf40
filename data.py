"""From a file of rows to encoded examples: read -> render -> encode.

Reading yields one dict per row and says where it stood. A template renders a row as segments of text, some of which
are the answer. Each segment is encoded on its own and the ids are joined, so the prompt used at inference is by
construction a strict prefix of what was trained on. Encoded examples lie end to end in a memory-mapped cache that is
made once per content; `llama/batches.py` makes packed batches of them.
"""

import fcntl
import hashlib
import itertools
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

import llama.tokenizer
from llama.errors import UserError
from llama.hub import download_dataset
from llama.tokenizer import Tokenizer

SAMPLE = Path(__file__).parent / "assets" / "imdb_sample"
BUNDLED_SAMPLE = "DATA: the bundled sample of made-up reviews, NOT the real IMDB; give --data_dir for that"
HUB = {"imdb": ("stanfordnlp/imdb", "plain_text/{split}-00000-of-00001.parquet")}


class DataError(UserError):
    """Rows or files that cannot be used as they are."""


# ---------------------------------------------------------------------------------------------------------------------
# Where the rows are


@dataclass(frozen=True)
class Source:
    """The files a data set was resolved to, and whether they are the bundled stand-in for the real one."""

    name: str
    files: dict[str, Path]
    bundled_sample: bool = False


def resolve(name: str, data_dir: str | None, use_hub: bool = True) -> Source:
    """Find the train and test files of a named data set, or of a path. Raises DataError when there are none.

    A named set is looked for in `data_dir`, then on the hub; where neither has it, `imdb` falls back to the bundled
    synthetic sample, which the returned source says.
    """
    if name in HUB:
        if data_dir is not None:
            folder = Path(data_dir)
            return Source(name, _split_files(folder), bundled_sample=folder.resolve() == SAMPLE.resolve())
        files = download_dataset(*HUB[name]) if use_hub else None
        if files:
            return Source(name, files)
        return Source(name, _split_files(SAMPLE), bundled_sample=True)
    if data_dir is not None:
        raise DataError(f"--data_dir {data_dir}: only for a named data set ({', '.join(HUB)}), found --data {name}")
    path = Path(name)
    if path.is_dir():
        return Source(name, _split_files(path))
    if path.is_file():
        return Source(name, {"train": path})
    raise DataError(f"--data {name}: no such file or folder, nor one of the named data sets ({', '.join(HUB)})")


def _split_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = {}
    for split in ("train", "test"):
        paths = [folder / f"{split}{suffix}" for suffix in READERS if (folder / f"{split}{suffix}").is_file()]
        if len(paths) > 1:
            raise DataError(f"{folder}: both {paths[0].name} and {paths[1].name}; expected one {split} file")
        if paths:
            found[split] = paths[0]
    if not found:
        raise DataError(f"{folder}: no train or test file, expected {' or '.join('train' + s for s in READERS)}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading: a row is (where it stood, its fields)


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """One JSON object a line. Raises DataError with file:line for anything else."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text, object_pairs_hook=_without_repetition)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: byte {error.start} is not UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: found {type(row).__name__}, expected a JSON object")
            yield where, row


def _without_repetition(pairs: list) -> dict:
    """json would silently keep the last of two values under one name."""
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a field comes twice")
    return fields


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a Parquet file, one row group in memory at a time."""
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read as Parquet after row {number} ({reason})") from None


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl}


def read(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a .jsonl or .parquet file, with the place of each."""
    if path.suffix not in READERS:
        raise DataError(f"{path}: expected a name ending in {' or '.join(READERS)}")
    return READERS[path.suffix](path)


# ---------------------------------------------------------------------------------------------------------------------
# Rendering: a row becomes segments of text


@dataclass(frozen=True)
class Segment:
    """A piece of text that is encoded on its own. Loss falls on `answer` segments, truncation on `may_cut` ones."""

    text: str
    answer: bool = False
    may_cut: bool = False


class ImdbTemplate:
    """Sentiment as generation: the review between a question and its one-word answer (notebook prompt of the IMDB
    recipe, word for word). The answer starts with its own space, so the prompt needs none at its end."""

    name = "imdb"
    answers = (" negative", " positive")  # indexed by the row's `label`
    before = (
        "Given a movie review/comment by a user in following format:\n"
        "#### Movie review:\n<review>\n#### Answer:\n<answer>\n"
        "Please rate the movie review as positive or negative from the perspective of the user's overall personal "
        "feelings to the movie. Answer it with only 'positive' or 'negative' without any explanation.\n"
        "\n#### Movie review:\n"
    )
    after = "\n\n#### Answer:"

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        """Segments of one row and the index of its answer. Raises DataError when the fields do not fit."""
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or type(label) is not int:
            found = ", ".join(f"{key!r:.40}: {type(value).__name__}" for key, value in list(row.items())[:8])
            raise DataError(f"{where}: found fields {{{found}}}, expected {{text: str, label: int}}")
        if label not in (0, 1):
            raise DataError(f"{where}: label is {label}, expected 0 (negative) or 1 (positive)")
        if not text.strip():
            raise DataError(f"{where}: text is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an escape in JSON can smuggle half a character in
            raise DataError(f"{where}: character {error.start} of text is a lone surrogate, not Unicode") from None
        prompt = [Segment(self.before), Segment(text, may_cut=True), Segment(self.after)]
        return [*prompt, Segment(self.answers[label], answer=True)], label


TEMPLATES = {"imdb": ImdbTemplate()}

# ---------------------------------------------------------------------------------------------------------------------
# Encoding: segments become ids, once per content


def encode_rows(
    rows: list[list[Segment]], tokenizer: Tokenizer, max_length: int, truncate_side: str, answer_room: int = 0
) -> list[tuple[list[int], list[bool], bool] | None]:
    """Ids, for each whether it is part of the answer, and whether any were cut; None where the uncuttable parts alone
    exceed max_length.

    At least `answer_room` tokens are kept free for the answer: given the length of the longest one, a prompt is cut
    alike whatever its answer, and also without one, at inference.
    All texts of the rows go to the tokenizer in two batches (text beginnings and continuations), which it encodes
    on all cores.
    """
    texts = {False: [], True: []}
    for segments in rows:
        for i, segment in enumerate(segments):
            texts[i > 0].append(segment.text)
    ids = {
        continues: dict(zip(unique, tokenizer.encode_batch(unique, continues=continues), strict=True))
        for continues, unique in ((c, list(dict.fromkeys(t))) for c, t in texts.items())
    }
    encoded = []
    for segments in rows:
        pieces = [list(ids[i > 0][segment.text]) for i, segment in enumerate(segments)]
        answer = sum(len(piece) for piece, segment in zip(pieces, segments, strict=True) if segment.answer)
        excess = sum(map(len, pieces)) + max(0, answer_room - answer) - max_length
        was_cut = excess > 0
        for piece, segment in zip(pieces, segments, strict=True):
            if segment.may_cut and excess > 0:
                begin = int(piece is pieces[0] and tokenizer.bos_id is not None)  # the beginning of text stays
                cut = min(excess, len(piece) - begin)
                first = begin if truncate_side == "left" else len(piece) - cut
                del piece[first : first + cut]
                excess -= cut
        if excess > 0:
            encoded.append(None)
            continue
        is_answer = [s.answer for s, piece in zip(segments, pieces, strict=True) for _ in piece]
        encoded.append(([i for piece in pieces for i in piece], is_answer, was_cut))
    return encoded


class EncodedData:
    """Encoded examples, memory-mapped from a cache folder: nothing but the pages in use is in memory.

    tokens (all ids end to end) int32, is_answer bool beside them, offsets (n + 1) int64; for each of the n examples
    label_counts, and in answers the index of its label word. Rows whose fixed parts were too long are `rejected`.
    """

    def __init__(self, folder: Path):
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.is_answer = np.load(folder / "is_answer.npy", mmap_mode="r")
        self.offsets, self.answers = np.load(folder / "offsets.npy"), np.load(folder / "answers.npy")
        self.label_counts = np.load(folder / "label_counts.npy")
        about = json.loads((folder / "about.json").read_text())
        self.truncated: int = about["truncated"]
        self.rejected: list[int] = about["rejected"]  # the first five, by their number in the file
        self.rejected_count: int = about["rejected_count"]

    @cached_property
    def fingerprint(self) -> str:
        """Tells any two different sets of encoded examples apart."""
        return f"{zlib.crc32(self.offsets, zlib.crc32(self.is_answer, zlib.crc32(self.tokens))):08x}"

    def __len__(self) -> int:
        return len(self.answers)

    @cached_property  # asked for several times a step
    def lengths(self) -> np.ndarray:
        """Tokens in each example, (n) int64."""
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and is_answer of example i, each (length)."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.is_answer[part]


def encode_file(
    path: Path, template: str, tokenizer: Tokenizer, max_length: int, truncate_side: str = "right", quiet: bool = False
) -> EncodedData:
    """Encode every row of a file, or reuse the cache of an earlier time.

    The cache is keyed by content: of the data, of the tokenizer's files, of this code, and the settings. It appears by
    a rename, whole or not at all. Processes that want the same one wait for whoever is at it (on a file lock, which
    the system drops when its holder dies), never in a collective that could time out.
    """
    key = _digest([path, *tokenizer.files, Path(__file__), Path(llama.tokenizer.__file__)])
    key = hashlib.sha256(f"{key} {template} {max_length} {truncate_side}".encode()).hexdigest()[:32]
    folder = cache_folder() / key
    if not folder.exists():
        with _locked(folder.with_suffix(".lock")) as alone:
            if not folder.exists():
                ours = f".tmp-{platform.node()}-"  # a lock may hold on one machine only: leave what others may be at
                for left_over in folder.parent.glob(f"{key}{ours}*") if alone else []:  # of a process that died at it
                    shutil.rmtree(left_over, ignore_errors=True)
                made = folder.with_suffix(f"{ours}{os.getpid()}")
                made.mkdir()
                try:
                    try:
                        _encode_into(made, path, TEMPLATES[template], tokenizer, max_length, truncate_side, quiet)
                    except OSError as error:
                        reason = error.strerror or error
                        raise DataError(f"{made}: {reason}; free some space, or set LLAMA_CACHE") from None
                    try:
                        made.rename(folder)
                    except OSError as error:
                        if not folder.exists():  # else another machine has published the same content
                            raise DataError(f"{folder}: {error.strerror}, expected to put encoded data there") from None
                finally:
                    shutil.rmtree(made, ignore_errors=True)
    try:
        return EncodedData(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: damaged, delete it to have the data encoded again ({error})") from None


def cache_folder() -> Path:
    """$LLAMA_CACHE, else a folder of ours in the user's cache. Raises DataError when it cannot be made."""
    base = os.environ.get("LLAMA_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llama-fine-tuning"
    )
    try:
        os.makedirs(base, exist_ok=True)
        if not os.access(base, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise DataError(f"{base}: {error.strerror}; set LLAMA_CACHE to a folder for encoded data") from None
    return Path(base)


def is_local_first() -> bool:
    """Whether this is the one process of its machine that reports progress, known before processes have joined."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
    return total.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait until no other process of this machine is in this block; False where nothing can promise that."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:  # some network file systems have no locks: then two may do the same work, safely
            alone = False
        yield alone


def _encode_into(
    folder: Path, path: Path, template, tokenizer: Tokenizer, max_length: int, truncate_side: str, quiet: bool
) -> None:
    """Encode a file of any size in batches of rows; only the lengths are held in memory."""
    lengths, label_counts, answers, rejected, truncated, rejected_count = [], [], [], [], 0, 0
    rows = (template.render(row, where) + (where,) for where, row in read(path))
    answer_room = max(map(len, tokenizer.encode_batch(list(template.answers), continues=True)))
    with open(folder / "tokens.raw", "wb") as tokens, open(folder / "is_answer.raw", "wb") as is_answer, \
            tqdm(desc=f"encoding {path.name}", unit=" rows", disable=quiet, leave=False) as progress:
        while batch := list(itertools.islice(rows, 2000)):
            segments = [segments for segments, _, _ in batch]
            encoded = encode_rows(segments, tokenizer, max_length, truncate_side, answer_room)
            for (_, answer, where), example in zip(batch, encoded, strict=True):
                if example is None:
                    rejected_count += 1
                    rejected += [int(where.rpartition(":")[2])] * (len(rejected) < 5)
                    continue
                ids, mask, was_cut = example
                np.asarray(ids, np.int32).tofile(tokens)
                np.asarray(mask, np.bool_).tofile(is_answer)
                lengths.append(len(ids))
                label_counts.append(sum(mask))
                answers.append(answer)
                truncated += was_cut
            progress.update(len(batch))
    if not lengths:
        if rejected_count:
            raise DataError(f"{path}:{rejected[0]}: the prompt without its text is longer than --max_length "
                            f"{max_length}, as in all {rejected_count} rows")
        raise DataError(f"{path}: no rows")
    for name, dtype in (("tokens", np.int32), ("is_answer", np.bool_)):
        _as_npy(folder / f"{name}.raw", folder / f"{name}.npy", dtype, sum(lengths))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / "label_counts.npy", np.asarray(label_counts, np.int64))
    np.save(folder / "answers.npy", np.asarray(answers, np.int16))
    about = {"truncated": truncated, "rejected": rejected, "rejected_count": rejected_count}
    (folder / "about.json").write_text(json.dumps(about))


def _as_npy(raw: Path, out: Path, dtype: type, count: int) -> None:
    """Put the .npy header before raw values that were streamed to disk before their number was known."""
    with open(raw, "rb") as source, open(out, "wb") as target:
        np.lib.format.write_array_header_1_0(
            target, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count,)}
        )
        shutil.copyfileobj(source, target, 1 << 20)
    raw.unlink()
