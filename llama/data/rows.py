"""The rows of a file of any kind, one after the other. A bad row is reported, and the rows after it are read."""

from pathlib import Path

from llama.boundary.errors import UserError, one_line
from llama.boundary.foreign import refuse_foreign_file
from llama.data.text_rows import NumberedRows, read_json, read_json_lines, read_table


def read(path: Path, columns: set[str] | None = None) -> NumberedRows:
    """Yield (number, row) for each row of a file. A bad row is yielded as the UserError that describes it. The number
    is that of the line in files of lines, and else counts the rows from 1.

    `columns`: the fields that are needed. A Parquet file's other columns are not read, unless it has none of these.
    Memory holds one row, or a few dozen rows of a Parquet file, however large the file is.

    Raises UserError for a file that is damaged as a whole, because then nobody can tell how many rows are lost.
    """
    suffix = suffix_of(path)
    refuse_foreign_file(path)
    return READERS[suffix](path, columns)


def suffix_of(path: Path) -> str:
    """Which of READERS reads this file. Raises UserError where none does."""
    for suffix in READERS:
        if path.name.endswith(suffix):
            return suffix
    raise UserError(f"{path}: expected a name ending in {KINDS}")


def column_names(path: Path) -> list[str]:
    """The columns that a Parquet file names. [] for other files, where each row has its own names."""
    if suffix_of(path) != ".parquet":
        return []
    import pyarrow.parquet as parquet

    try:
        return parquet.read_schema(path).names
    except _parquet_errors() as error:
        raise _damaged(path, 0, error) from None


def _parquet_errors() -> tuple:
    import pyarrow

    # ImportError: times with a time zone need a package that may be missing.
    return (pyarrow.ArrowException, OSError, ValueError, OverflowError, ImportError)


def _damaged(path: Path, rows: int, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as Parquet after row {rows} ({one_line(error)})")


def _read_parquet(path: Path, columns: set[str] | None) -> NumberedRows:
    import pyarrow.parquet as parquet

    errors = _parquet_errors()
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
        raise _damaged(path, number, error) from None


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


TEXT_READERS = {".jsonl": read_json_lines, ".json": read_json, ".csv": read_table, ".tsv": read_table}
COMPRESSED_READERS = {f"{suffix}.gz": reader for suffix, reader in TEXT_READERS.items()}
READERS = {".parquet": _read_parquet} | TEXT_READERS | COMPRESSED_READERS
KINDS = ".parquet, .jsonl, .json, .csv or .tsv (all but .parquet also with .gz)"
