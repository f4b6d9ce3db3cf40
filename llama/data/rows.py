"""The rows of a JSONL or Parquet file, one after the other. A bad row is reported, and the rows after it are read."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from llama.boundary.errors import UserError, one_line
from llama.boundary.foreign import refuse_foreign_file
from llama.boundary.untrusted import without_repetition

# Tokenizing a text of this many bytes takes some GB. A longer line is a bad row, and is never in memory as a whole.
LONGEST_LINE = 16 << 20
NumberedRows = Iterator[tuple[int, dict | UserError]]


def read(path: Path, columns: set[str] | None = None) -> NumberedRows:
    """Yield (number from 1, row) for each row of a .jsonl, .jsonl.gz or .parquet file. A bad row is yielded as the
    UserError that describes it; an empty line is a bad row.

    `columns`: the fields that are needed. A Parquet file's other columns are not read, unless it has none of these.
    Memory holds one line, or a few dozen rows of a Parquet file, however large the file is.

    Raises UserError for a file that is damaged as a whole, because then nobody can tell how many rows are lost.
    """
    refuse_foreign_file(path)
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader(path, columns)
    raise UserError(f"{path}: expected a name ending in {' or '.join(READERS)}")


def _read_jsonl(path: Path, columns: set[str] | None) -> NumberedRows:
    open_file = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(path, "rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) <= LONGEST_LINE:
                    yield number, _parse_line(line, number, path)
                    continue
                size = len(line)
                while line and not line.endswith(b"\n"):  # read the rest in pieces, and forget them
                    line = file.readline(LONGEST_LINE)
                    size += len(line)
                yield number, UserError(f"{path}:{number}: a line of {size} bytes, expected {LONGEST_LINE} at most")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as gzip after row {number} ({error})") from None


def _parse_line(line: bytes, number: int, path: Path) -> dict | UserError:
    where = f"{path}:{number}"
    encoding = "utf-8-sig" if number == 1 else "utf-8"  # some editors begin a file with a byte order mark
    try:
        row = json.loads(line.decode(encoding), object_pairs_hook=without_repetition)
    except UnicodeDecodeError as error:
        return UserError(f"{where}: byte {error.start} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not valid JSON ({error})")
    return row if isinstance(row, dict) else UserError(f"{where}: found {type(row).__name__}, expected a JSON object")


def _read_parquet(path: Path, columns: set[str] | None) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet as parquet

    # ImportError: times with a time zone need a package that may be missing.
    errors = (pyarrow.ArrowException, OSError, ValueError, OverflowError, ImportError)
    number = 0
    try:
        # With a buffer, a column is decompressed page by page. Without one, a whole row group would be in memory,
        # and a row group may be as large as the file.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            repeated = [name for name in names if names.count(name) > 1]
            if repeated:
                raise UserError(f"{path}: the column {repeated[0]!r:.40} comes twice")
            wanted = sorted((columns or set()) & set(names))
            for batch in file.iter_batches(batch_size=64, columns=wanted or None, use_threads=False):
                for row in _rows_of_batch(batch, path, number, errors):
                    number += 1
                    yield number, row
    except errors as error:
        raise UserError(f"{path}: cannot be read as Parquet after row {number} ({one_line(error)})") from None


def _rows_of_batch(batch, path: Path, rows_before: int, errors: tuple) -> list[dict | UserError]:
    try:
        return batch.to_pylist()
    except errors:  # a value that cannot be read: find out in which rows
        rows = []
        for i in range(len(batch)):
            try:
                rows += batch.slice(i, 1).to_pylist()
            except errors as error:
                rows.append(UserError(f"{path}:{rows_before + i + 1}: cannot be read ({one_line(error)})"))
        return rows


READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl}
