"""Rows of text files: JSON lines, a JSON list, and tables of cells (CSV, TSV). Each may be compressed with gzip.

A bad row of a JSON file is reported, and the rows after it are read. Where a mistake makes it unclear where the next
row begins, as an open quote in a table does, the whole file is refused.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from llama.boundary.errors import UserError, first_few
from llama.boundary.untrusted import without_repetition

# Tokenizing a text of this many bytes takes some GB. A longer line is a bad row, and is never in memory as a whole.
LONGEST_LINE = 16 << 20
BEGINNING = 1 << 12  # bytes that show whether a JSON file is a list
NO_SPACE = re.compile(r"[^ \t\n\r]")
PIECE = 1 << 16  # bytes of a JSON list that are read at once
NumberedRows = Iterator[tuple[int, dict | UserError]]
TABLE_ERRORS = {
    "unexpected end of data": "a quote opens here and is never closed",
    "new-line character": "lines end in CR alone; in a spreadsheet, save as CSV UTF-8",
}
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def read_json_lines(path: Path, columns: set[str] | None) -> NumberedRows:
    """An object in each line. Blank lines are no rows, but they are counted: a row's number is its line's."""
    for number, line in _lines(path):
        if isinstance(line, UserError):
            yield number, line
        elif line.removeprefix(codecs.BOM_UTF8).strip():
            yield number, _parse_line(line, number, path)


def read_json(path: Path, columns: set[str] | None) -> NumberedRows:
    """A list of objects, also as the value of {"data": [...]}; or else an object in each line. A row's number is its
    place in the list."""
    with _open(path) as file:
        try:
            beginning = file.read(BEGINNING).decode("utf-8-sig", errors="ignore")
        except GZIP_ERRORS as error:
            raise UserError(f"{path}: cannot be read as gzip ({error})") from None
    opening = re.match(r'\s*(\{\s*"data"\s*:\s*)?\[', beginning)
    if opening:
        return _read_list(path, opening.end(), closing="]}" if opening[1] else "]")
    return read_json_lines(path, columns)


def read_table(path: Path, columns: set[str] | None) -> NumberedRows:
    """Rows of cells, of which the first names the columns. Each cell is text. A row's number is its line's."""
    separator = "\t" if ".tsv" in path.suffixes else ","
    csv.field_size_limit(LONGEST_LINE)
    cells_of_rows = csv.reader(_text_lines(path), delimiter=separator, strict=True)
    header: list[str] = []
    while True:
        number = cells_of_rows.line_num + 1
        try:
            cells = next(cells_of_rows, None)
        except csv.Error as error:
            why = next((why for cause, why in TABLE_ERRORS.items() if str(error).startswith(cause)), str(error))
            wanted = "quotes around a cell that holds a separator or a quote, and the quotes in it doubled"
            raise UserError(f"{path}:{number}: not a row of cells ({why}), expected {wanted}") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _column_names(cells, f"{path}:{number}", separator)
        elif len(cells) != len(header):
            wanted = f"{len(header)} as in the first row ({first_few(header)})"
            yield number, UserError(f"{path}:{number}: {len(cells)} cells, expected {wanted}")
        else:  # a spreadsheet may add columns without a name
            yield number, {name: cell for name, cell in zip(header, cells, strict=True) if name or cell}


def _column_names(cells: list[str], where: str, separator: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    other = re.search("[;\t|,]", names[0])
    if len(names) == 1 and other:
        wanted = "tabs" if separator == "\t" else "commas (or tabs in a .tsv file)"
        raise UserError(f"{where}: a single column {names[0]!r:.60}, expected columns separated by {wanted}")
    repeated = [name for name in names if name and names.count(name) > 1]
    if repeated:
        raise UserError(f"{where}: the column {repeated[0]!r:.40} comes twice")
    return names


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes | UserError]]:
    """(number from 1, line with its end) of a file. A line that is too long is read in pieces that are forgotten."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) <= LONGEST_LINE:
                    yield number, line
                    continue
                size = len(line)
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                    size += len(line)
                yield number, UserError(f"{path}:{number}: a line of {size} bytes, expected {LONGEST_LINE} at most")
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: cannot be read as gzip after row {number} ({error})") from None


def _encoding(number: int) -> str:
    return "utf-8-sig" if number == 1 else "utf-8"  # some programs begin a file with a byte order mark


def _text_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if isinstance(line, UserError):
            raise line
        try:
            yield line.decode(_encoding(number))
        except UnicodeDecodeError as error:
            wanted = "a file in UTF-8 (in a spreadsheet, save as CSV UTF-8)"
            raise UserError(f"{path}:{number}: byte {error.start} is not UTF-8, expected {wanted}") from None


def _parse_line(line: bytes, number: int, path: Path) -> dict | UserError:
    where = f"{path}:{number}"
    is_list = number == 1 and line.removeprefix(codecs.BOM_UTF8).startswith(b"[")
    way_out = "; a JSON list belongs into a file whose name ends in .json" if is_list else ""
    try:
        row = json.loads(line.decode(_encoding(number)), object_pairs_hook=without_repetition)
    except UnicodeDecodeError as error:
        return UserError(f"{where}: byte {error.start} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not valid JSON ({error}){way_out}")
    return row if isinstance(row, dict) else _no_object(row, where, way_out)


def _no_object(value: object, where: str, way_out: str = "") -> UserError:
    return UserError(f"{where}: found {type(value).__name__}, expected a JSON object{way_out}")


def _read_list(path: Path, start: int, closing: str) -> NumberedRows:
    """The elements of a JSON list whose first one begins at character `start`, until `closing` ends the file."""
    number = 0
    try:
        with _open(path) as file:
            window = _Window(file)
            window.skip(start)
            while window.next_character() != "]":
                if number and not window.takes(","):
                    raise ValueError(f"line {window.line}: found {window.next_character()!r}, expected ',' or ']'")
                value, repeats = window.value()
                number += 1
                where = f"{path}:{number}"
                if repeats:
                    yield number, UserError(f"{where}: a name comes twice in it, expected each once")
                elif isinstance(value, dict):
                    yield number, value
                else:
                    yield number, _no_object(value, where)
            if not all(window.takes(character) for character in closing) or window.next_character():
                found = window.next_character()
                raise ValueError(f"line {window.line}: found {found!r}, expected the file to end with {closing!r}")
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: cannot be read as gzip after row {number} ({error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 after row {number}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON list after row {number} ({error})") from None


class _Window:
    """A JSON text of any length, of which only the part that is being parsed is in memory."""

    def __init__(self, file: BufferedIOBase):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder(object_pairs_hook=self._noting_repetition)
        self._repeats = False
        self._text = ""
        self._at = 0
        self._lines_before = 0  # of the text that is forgotten
        self._has_ended = False

    @property
    def line(self) -> int:
        """The number of the line that is being parsed."""
        return self._lines_before + self._text.count("\n", 0, self._at) + 1

    def skip(self, count: int) -> None:
        """Go on by `count` characters."""
        while len(self._text) < self._at + count and not self._has_ended:
            self._grow()
        self._at += count

    def next_character(self) -> str:
        """The next character that is no space, without going past it; "" at the end of the file."""
        while True:
            following = NO_SPACE.search(self._text, self._at)
            self._at = following.start() if following else len(self._text)
            if self._at < len(self._text) or self._has_ended:
                return self._text[self._at : self._at + 1]
            self._grow()

    def takes(self, character: str) -> bool:
        """Go past the next character if it is this one."""
        fits = self.next_character() == character
        self._at += int(fits)
        return fits

    def _noting_repetition(self, pairs: list) -> dict:
        values = dict(pairs)
        self._repeats |= len(values) < len(pairs)
        return values

    def value(self) -> tuple[object, bool]:
        """The next value, and whether an object in it has a name twice. Raises ValueError where none is, or where it is
        longer than LONGEST_LINE characters."""
        self.next_character()
        while True:
            self._repeats = False
            try:
                value, end = self._parser.raw_decode(self._text, self._at)
                if end < len(self._text) or self._has_ended:  # or the rest of a number could follow
                    self._at = end
                    return value, self._repeats
            except json.JSONDecodeError as error:
                if self._has_ended:
                    raise ValueError(f"line {self._lines_before + error.lineno}: {error.msg}") from None
            if len(self._text) - self._at > LONGEST_LINE:
                line = self.line
                raise ValueError(f"line {line}: no end of a value in {LONGEST_LINE} characters")
            self._grow()

    def _grow(self) -> None:
        """Forget what is parsed, and read at least as much as is left, so that a long value is parsed a few times only.
        """
        self._lines_before += self._text.count("\n", 0, self._at)
        left = self._text[self._at :]
        piece = self._file.read(max(PIECE, len(left)))
        self._has_ended = not piece
        self._text = left + self._decoder.decode(piece, final=not piece)
        self._at = 0
