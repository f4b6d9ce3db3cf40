"""Rows of a file, one after the other: what is wrong with one is told beside it, and never hides the next."""

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama.data.text_rows
from llama.boundary.errors import UserError
from llama.data.rows import READERS, read

GOOD = '{"text": "fine", "label": 1}'
ROW = {"text": "fine", "label": 1}


def reviews(count: int) -> list[dict]:
    """Rows of very different lengths, with scripts, breaks and quotes that JSON must escape."""
    generator = random.Random(0)
    words = ["a film", "\n", "\r\n", "\t", "naïve", "映画", "🎬", '"', "\\", "</s>", "\u2028", " "]
    return [{"text": "".join(generator.choices(words, k=1 + i % 40)), "label": i % 2} for i in range(count)]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_parquet(path: Path, rows: list[dict], **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


# The three kinds of file


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    """R15: JSONL, compressed JSONL, Parquet of many row groups and of a single one, in order and with their numbers."""
    rows = reviews(700)
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(rows)))
    write_parquet(tmp_path / "many.parquet", rows, row_group_size=77)
    write_parquet(tmp_path / "single.parquet", rows)
    assert pyarrow.parquet.ParquetFile(tmp_path / "many.parquet").num_row_groups == 10
    assert pyarrow.parquet.ParquetFile(tmp_path / "single.parquet").num_row_groups == 1
    for path in tmp_path.iterdir():
        assert list(read(path)) == list(enumerate(rows, 1)), path


def test_gzip_files_that_were_joined_are_read_to_the_end(tmp_path):
    """R15: `cat a.gz b.gz` is a gzip file; a line may even go over the joint."""
    content = jsonl(reviews(40))
    path = tmp_path / "joined.jsonl.gz"
    path.write_bytes(gzip.compress(content[:1001]) + gzip.compress(content[1001:]))
    assert list(read(path)) == list(enumerate(reviews(40), 1))


def test_a_file_of_another_kind_is_refused_and_the_kinds_are_named(tmp_path):
    """R15: nothing is guessed from the content."""
    for name in ("train.xlsx", "train.txt", "train.gz", "train.parquet.gz", "jsonl"):
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}: expected a name ending in ") as told:
            read(tmp_path / name)
        assert all(kind.removesuffix(".gz") in str(told.value) for kind in READERS)


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + GOOD.encode() + b"\n" + GOOD.encode() + b"\n",
    GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n",
    GOOD.encode() + b"\n" + GOOD.encode(),
    b"  " + GOOD.encode() + b"  \n" + b'{"label": 1, "text": "fine"}\n',
], ids=["byte order mark", "CRLF", "no newline at the end", "spaces and order"])  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_files_that_other_systems_write_are_read_alike(tmp_path, content, compressed):
    """R15: none of these is a mistake."""
    path = tmp_path / ("train.jsonl.gz" if compressed else "train.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert list(read(path)) == [(1, ROW), (2, ROW)]


@settings(derandomize=True, database=None, max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), max_size=6))
def test_any_text_comes_back_letter_for_letter(tmp_path_factory, rows):
    """R15: a line ends at a newline only, not at one of the other characters that Unicode calls a line break."""
    rows = [row for row in rows if all(not re.search("[\ud800-\udfff]", text) for pair in row.items() for text in pair)]
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(jsonl(rows))
    assert list(read(path)) == list(enumerate(rows, 1))


# Bad rows

BAD_LINES = {
    "broken JSON": ('{"text": "fine", "label": 1', "not valid JSON"),
    "no JSON at all": ("text,label", "not valid JSON"),
    "two objects": (GOOD + GOOD, "not valid JSON"),
    "raw NUL": ('{"text": "a\0b", "label": 1}', "not valid JSON"),
    "deep nesting": ("[" * 100_000, "not valid JSON"),
    "huge number": ('{"text": "fine", "label": ' + "1" * 5000 + "}", "not valid JSON"),
    "repeated field": ('{"text": "fine", "label": 1, "label": 0}', "comes twice"),
    "repeated field inside": ('{"messages": [{"role": "user", "role": "user"}]}', "comes twice"),
    "a list": ("[1, 2]", "found list, expected a JSON object"),
    "a string": ('"fine"', "found str, expected a JSON object"),
    "null": ("null", "found NoneType, expected a JSON object"),
    "Latin-1": (b'{"text": "caf\xe9", "label": 1}', "byte 13 is not UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), "byte 0 is not UTF-8"),
    "byte order mark of another file": (b"\xef\xbb\xbf" + GOOD.encode(), "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number_and_the_next_ones_are_read(tmp_path, case):
    """R15: what was found and what was expected, in one line; every line keeps its number."""
    line, expected = BAD_LINES[case]
    path = tmp_path / "train.jsonl"
    line, good = line if isinstance(line, bytes) else line.encode(), GOOD.encode()
    path.write_bytes(b"\n".join([good, line, good, b""]))
    first, (number, error), last = read(path)
    assert (first, number, last) == ((1, ROW), 2, (3, ROW)) and isinstance(error, UserError)
    (told,) = error.lines
    assert told.startswith(f"{path}:2: ") and expected in told and len(told) < len(str(path)) + 250


def test_a_line_of_ten_megabytes_is_read(tmp_path):
    """R15: long is not wrong, up to what fits in memory many times over."""
    path = tmp_path / "train.jsonl"
    row = {"text": "ab " * 100_000, "label": 0, "more": "x" * 10**7}
    path.write_bytes(jsonl([row, ROW]))
    assert list(read(path)) == [(1, row), (2, ROW)]


def holed(path: Path, megabytes: int, end: bytes) -> int:
    """A good line, one of so many MB that is mostly a hole in the file, then `end`. Returns the long one's size."""
    with open(path, "wb") as file:
        file.write(GOOD.encode() + b"\n")
        start = file.tell()
        file.write(b'{"text": "')
        file.seek(megabytes << 20, 1)
        file.write(b'"}\n')
        size = file.tell() - start
        file.write(end)
    return size


def test_a_line_that_is_too_long_is_a_bad_row_told_with_its_size_and_never_held(tmp_path, monkeypatch):
    """R15: the lines after it are read, and a line four times as long takes no more memory."""
    longest = 1 << 20
    monkeypatch.setattr(llama.data.text_rows, "LONGEST_LINE", longest)
    path, peaks = tmp_path / "train.jsonl", []
    for megabytes in (4, 16):
        size = holed(path, megabytes, GOOD.encode() + b"\n" + b"{\n")
        tracemalloc.start()
        try:
            first, (number, error), third, (last, broken) = read(path)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert (first, number, third, last) == ((1, ROW), 2, (3, ROW), 4)
        assert str(error) == f"{path}:2: a line of {size} bytes, expected {longest} at most"
        assert str(broken).startswith(f"{path}:4: not valid JSON")
    assert peaks[0] < 4 * longest and peaks[1] < peaks[0] + (1 << 16)


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["file ends in it", "newline"])
@pytest.mark.parametrize("longer", [-1, 0, 1, 64, 65, 129])
def test_the_longest_line_is_exactly_as_long_as_said(tmp_path, monkeypatch, longer, end):
    """R15: a byte more is a bad row, wherever the pieces that it is read in end."""
    monkeypatch.setattr(llama.data.text_rows, "LONGEST_LINE", 64)
    path = tmp_path / "train.jsonl"
    line = b'{"text": "' + b"x" * (64 + longer - 12 - len(end)) + b'"}' + end
    path.write_bytes(line + (GOOD.encode() if end else b""))
    (number, row), *rest = read(path)
    assert number == 1 and rest == ([(2, ROW)] if end else [])
    if longer <= 0:
        assert row == json.loads(line)
    else:
        assert str(row) == f"{path}:1: a line of {64 + longer} bytes, expected 64 at most"


def test_a_parquet_file_is_read_page_by_page_though_it_is_a_single_row_group(tmp_path):
    """R15: neither its rows nor its bytes are in memory at once, which a file of many GB needs."""
    rows = [{"text": f"{i} " * 80, "label": i % 2} for i in range(1 << 16)]
    path = write_parquet(tmp_path / "train.parquet", rows, compression="none", use_dictionary=False)
    assert path.stat().st_size > 24 << 20 and pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    pool = pyarrow.default_memory_pool()
    before, most, right = pool.bytes_allocated(), 0, 0
    for number, row in read(path):
        right += row == rows[number - 1]
        most = max(most, pool.bytes_allocated() - before)
    assert right == len(rows) and 0 < most < 8 << 20


# Damaged files


def test_a_gzip_file_cut_short_says_how_many_rows_were_read(tmp_path):
    """R5, R15: at any length; the rows before the cut come first, then one line for the whole file."""
    path, rows = tmp_path / "train.jsonl.gz", reviews(3000)
    whole = gzip.compress(jsonl(rows))
    counts = []
    for keep in (5, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:keep])
        found = []
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: cannot be read as gzip after row ") as error:
            for row in read(path):
                found.append(row)
        assert found == list(enumerate(rows, 1))[: len(found)]
        assert f"after row {len(found)} (" in str(error.value) and len(error.value.lines) == 1
        counts.append(len(found))
    assert counts == sorted(counts) and counts[0] == 0 < counts[1] < counts[2] < counts[3]


def test_a_gzip_file_that_is_damaged_or_none_at_all_is_an_error_of_one_line(tmp_path):
    """R5: a changed byte, a wrong checksum, and plain text under that name."""
    path, whole = tmp_path / "train.jsonl.gz", gzip.compress(jsonl(reviews(3000)))
    middle = len(whole) // 2
    for content in (whole[:middle] + bytes(50) + whole[middle + 50 :], whole[:-8] + b"\0\0\0\0" + whole[-4:],
                    jsonl(reviews(3))):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: cannot be read as gzip after row \d+ \(") as e:
            list(read(path))
        assert len(e.value.lines) == 1


def test_a_parquet_file_cut_short_or_damaged_is_an_error_of_one_line(tmp_path):
    """R5, R15: at any length, and with rubbish in the middle of its pages."""
    path = write_parquet(tmp_path / "train.parquet", reviews(3000))
    whole = path.read_bytes()
    damaged = [whole[:keep] for keep in (0, 1, 8, len(whole) // 2, len(whole) - 1)]
    for content in [*damaged, whole[:40] + b"\xff" * 400 + whole[440:]]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: cannot be read as Parquet after row \d+") as e:
            list(read(path))
        assert len(e.value.lines) == 1 and len(str(e.value)) < len(str(path)) + 300


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    """R15: as in JSON, where the last of two values would silently win."""
    path = tmp_path / "train.parquet"
    columns = [pyarrow.array(["first"]), pyarrow.array(["second"]), pyarrow.array([1])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "text", "label"]), path)
    with pytest.raises(UserError, match="twice"):
        list(read(path))
