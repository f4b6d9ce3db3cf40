"""The rows of a JSONL or Parquet file, one after the other, each with its number; what is wrong with a row is told
beside the row, so that one bad line never hides the next."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from llama.boundary.errors import UserError

# A longer line is a bad row and is never held in memory: a text of so many bytes takes some GB to tokenize.
LONGEST_LINE = 16 << 20


class DataError(UserError):
    """Rows, templates or files that cannot be used as they are."""


def read(path: Path, columns: set[str] | None = None) -> Iterator[tuple[int, dict | DataError]]:
    """(number from 1, row) of a .jsonl, .jsonl.gz or .parquet file; in place of a bad row, what is wrong with it.

    Of a Parquet file only `columns` are read, where any are given and there. An empty line is a bad row. Nothing but
    the row at hand is in memory (of Parquet: a few dozen rows), whatever the file's size. Raises DataError for a file
    that is damaged as a whole: nobody can tell how many rows it lacks.
    """
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader(path, columns) if reader is _read_parquet else reader(path)
    raise DataError(f"{path}: expected a name ending in {' or '.join(READERS)}")


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict | DataError]]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                size = len(line)
                if size > LONGEST_LINE:
                    while line and not line.endswith(b"\n"):
                        size += len(line := file.readline(LONGEST_LINE))
                    yield number, DataError(f"{path}:{number}: a line of {size} bytes, expected {LONGEST_LINE} at most")
                else:
                    yield number, _parse(line, number, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as gzip after row {number} ({error})") from None


def _parse(line: bytes, number: int, path: Path) -> dict | DataError:
    where = f"{path}:{number}"
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        return DataError(f"{where}: byte {error.start} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not valid JSON ({error})")
    return row if isinstance(row, dict) else DataError(f"{where}: found {type(row).__name__}, expected a JSON object")


def _without_repetition(pairs: list) -> dict:
    """json would silently keep the last of two values under one name."""
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a field comes twice")
    return fields


def _read_parquet(path: Path, columns: set[str] | None) -> Iterator[tuple[int, dict | DataError]]:
    import pyarrow
    import pyarrow.parquet as parquet

    errors = (pyarrow.ArrowException, OSError, ValueError, OverflowError, ImportError)  # the last: of some time types
    number = 0
    try:
        # Buffered, a column is decompressed page by page: a row group may be as large as the file.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path}: the column {twice!r:.40} comes twice")
            wanted = sorted(columns & set(names)) if columns else None
            for batch in file.iter_batches(batch_size=64, columns=wanted or None, use_threads=False):
                try:
                    rows = batch.to_pylist()
                except errors:  # one value of one row
                    rows = [_row(batch.slice(i, 1), f"{path}:{number + i + 1}", errors) for i in range(len(batch))]
                for row in rows:
                    number += 1
                    yield number, row
    except DataError:  # is a ValueError, too
        raise
    except errors as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number} ({_reason(error)})") from None


def _row(one, where: str, errors: tuple) -> dict | DataError:
    try:
        return one.to_pylist()[0]
    except errors as error:
        return DataError(f"{where}: cannot be read ({_reason(error)})")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl}
