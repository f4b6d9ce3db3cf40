"""Rows of tables (CSV, TSV) and of JSON lists, as spreadsheets, pandas and other programs write them."""

import csv
import gzip
import io
import json
import random
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama.data.text_rows
from llama.boundary.errors import UserError
from llama.data.rows import read

ROWS = [{"text": "fine", "label": "1"}, {"text": 'a "b", c\r\nd', "label": ""}]
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def written(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        list(read(path))
    (line,) = error.value.lines
    assert line.startswith(str(path)) and len(line) < len(str(path)) + 300
    return line.removeprefix(str(path))


# Tables


@pytest.mark.parametrize("name, content", [
    ("excel.csv", '\ufefftext,label\r\nfine,1\r\n"a ""b"", c\r\nd",\r\n'),
    ("blank.csv", '\n"text", label \n\nfine,1\n,\n"a ""b"", c\r\nd",\n,\n\n'.replace('"text", ', '"text",')),
    ("unnamed.csv", 'text,label,,\nfine,1,,\n"a ""b"", c\r\nd",,,\n'),
    ("tabs.tsv", 'text\tlabel\nfine\t1\n"a ""b"", c\r\nd"\t'),
    ("packed.csv.gz", 'text,label\nfine,1\n"a ""b"", c\r\nd",\n'),
    ("packed.tsv.gz", 'label\ttext\n1\tfine\n\t"a ""b"", c\r\nd"\n'),
])  # fmt: skip
def test_tables_that_spreadsheets_write_give_the_same_rows(tmp_path, name, content):
    """A4: a byte order mark, CRLF, quotes, rows and columns that are empty; every cell is text, as it stands there."""
    assert [row for _, row in read(written(tmp_path / name, content))] == ROWS


@settings(derandomize=True, database=None, max_examples=60, deadline=None)
@given(table=st.lists(st.tuples(cells, cells), max_size=6), dialect=st.sampled_from(["excel", "excel-tab", "unix"]))
def test_whatever_the_standard_library_writes_comes_back(tmp_path_factory, table, dialect):
    """A4: letter for letter, and each row under the number of the line that it begins in."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, dialect)
    writer.writerow(["text", "label"])
    expected = []
    for pair in table:
        number = text.getvalue().count("\n") + 1
        writer.writerow(pair)
        if any(cell.strip() for cell in pair):
            expected.append((number, dict(zip(("text", "label"), pair, strict=True))))
    name = "any.tsv" if dialect == "excel-tab" else "any.csv"
    path = written(tmp_path_factory.getbasetemp() / name, text.getvalue())
    found = list(read(path))
    assert [row for _, row in found] == [row for _, row in expected]
    if not any("\r" in cell for pair in table for cell in pair):  # which csv counts as the end of a line
        assert found == expected


@pytest.mark.parametrize("content, told", [
    ("text;label\nfine;1\n", ":1: a single column 'text;label', expected columns separated by commas (or tabs"),
    ("text|label\n", ":1: a single column 'text|label', expected"),
    ("text\tlabel\n", ":1: a single column 'text\\tlabel', expected"),
    ("text,label,text\n", ":1: the column 'text' comes twice"),
    ("text,label\ncafé,1\n".encode("latin-1"), ":2: byte 3 is not UTF-8, expected a file in UTF-8 (in a spreadsheet"),
    ("text,label\nfine,1\n".encode("utf-16"), ":1: byte 0 is not UTF-8"),
    ("text,label\rfine,1\r", ":1: not a row of cells (lines end in CR alone; in a spreadsheet, save as CSV UTF-8)"),
    ('text,label\nfine,1\n"a\nb,1\nc,0\n', ":3: not a row of cells (a quote opens here and is never closed)"),
    ('text,label\nfine,1\n"a "b" c",1\n', ":3: not a row of cells (',' expected after '\"'), expected quotes around"),
], ids=str)  # fmt: skip
def test_a_table_whose_rows_cannot_be_told_apart_is_refused_and_the_way_out_is_told(tmp_path, content, told):
    """A4: to go on with the next line would take the middle of a text for a row."""
    assert refused(written(tmp_path / "rows.csv", content)).startswith(told)


def test_a_row_of_too_few_or_too_many_cells_is_a_bad_row(tmp_path):
    """A4: most often, a text with a comma and without quotes. The next rows are read."""
    path = written(tmp_path / "rows.csv", "text,label\nwell, well,1\nalone\nfine,1\n")
    (two, many), (three, few), last = read(path)
    assert (two, three, last) == (2, 3, (4, ROWS[0]))
    assert str(many) == f"{path}:2: 3 cells, expected 2 as in the first row ('text', 'label')"
    assert str(few).startswith(f"{path}:3: 1 cells, expected 2")


# Lists


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_a_json_list_gives_its_objects(tmp_path, monkeypatch, indent, wrapped, name, piece):
    """A4: on one line or on many, as {"data": [...]} too, wherever the pieces end that it is read in."""
    monkeypatch.setattr(llama.data.text_rows, "PIECE", piece)
    rows = [{"text": "naïve 映画 \u2028 ]},[", "more": [1, {"a": None}]}, {}, {"text": "x" * 50}]
    value = {"data": rows} if wrapped else rows
    content = json.dumps(value, indent=indent, ensure_ascii=False)
    for text in (content, f"\ufeff \n{content}\n"):
        assert list(read(written(tmp_path / name, text))) == list(enumerate(rows, 1))
    assert list(read(written(tmp_path / name, "[ ]"))) == []


def test_a_json_file_may_also_have_an_object_in_each_line(tmp_path):
    """A4: as many programs name such a file."""
    path = written(tmp_path / "rows.json", '\n{"data": 1}\n\n{"text": "b"}\n')
    assert list(read(path)) == [(2, {"data": 1}), (4, {"text": "b"})]


@pytest.mark.parametrize("piece", [1, 1 << 16])
def test_what_is_no_object_in_a_list_is_a_bad_row(tmp_path, monkeypatch, piece):
    """Also a number that goes on in the next piece that is read."""
    monkeypatch.setattr(llama.data.text_rows, "PIECE", piece)
    path = written(tmp_path / "rows.json", '[{"a": 1}, [2], 34, "b", null]')
    first, *others = read(path)
    assert first == (1, {"a": 1})
    assert [str(error) for _, error in others] == [
        f"{path}:{number}: found {kind}, expected a JSON object"
        for number, kind in ((2, "list"), (3, "int"), (4, "str"), (5, "NoneType"))
    ]


@pytest.mark.parametrize("content, told", [
    ('[{"a": 1},\n{"a": 2', "after row 1 (line 2: "),
    ('[{"a": 1}', "after row 1 (line 1: found '', expected ',' or ']'"),
    ('[{"a": 1}\n{"a": 2}]', "after row 1 (line 2: found '{', expected ',' or ']'"),
    ('[{"a": 1},]', "after row 1 (line 1: "),
    ('[{"a": 1}]\n[]', "after row 1 (line 2: found '[', expected the file to end with ']'"),
    ('{"data": [{"a": 1}], "version": 2}', "after row 1 (line 1: found ',', expected the file to end with ']}'"),
    ('[{"a": ' + "[" * 100_000, "after row 0 ("),
], ids=lambda text: text[:30])  # fmt: skip
def test_a_damaged_list_is_refused_as_a_whole(tmp_path, content, told):
    """A4, R15: the rows before the damage come first, and then one line that says where it is."""
    assert refused(written(tmp_path / "rows.json", content)).startswith(f": not a JSON list {told}")


def test_an_object_of_a_list_in_which_a_name_comes_twice_is_one_bad_row(tmp_path):
    """R5: as in a file of lines, the rows after it are read; also where the name is deeper, and in the next piece."""
    rows = ['{"a": 1}', '{"a": 1, "a": 2}', '{"b": "%s"}' % ("x" * 70_000), '{"b": [{"a": 1, "a": 2}]}', '{"a": 3}']
    found = list(read(written(tmp_path / "rows.json", "[" + ", ".join(rows) + "]")))
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]
    bad = [f"{tmp_path / 'rows.json'}:{number}: a name comes twice in it, expected each once" for number in (2, 4)]
    assert [str(row) for _, row in found if isinstance(row, UserError)] == bad


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}]', '\ufeff[\n{"a": 1},\n{"a": 2}\n]'])
def test_a_list_in_a_file_of_lines_is_told_its_right_name(tmp_path, content):
    """R15"""
    (_, error), *_ = read(written(tmp_path / "rows.jsonl", content))
    assert str(error).endswith("; a JSON list belongs into a file whose name ends in .json")


def test_a_list_that_is_cut_short_or_not_utf8_is_refused(tmp_path):
    """R5, R15: compressed and plain."""
    content = json.dumps([{"text": f"row {i} é"} for i in range(9000)], ensure_ascii=False).encode()
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(content)[:-20])
    assert re.match(r": cannot be read as gzip after row \d{3,} \(", refused(path))
    latin = written(tmp_path / "rows.json", content[:-50].replace("é".encode(), b"\xe9"))
    assert refused(latin).startswith(": not UTF-8 after row 0")


def test_a_list_is_read_row_by_row_and_a_value_without_an_end_is_refused(tmp_path, monkeypatch):
    """R15: memory holds a few rows, however long the list is."""
    row = json.dumps({"text": " ".join(map(str, random.Random(0).choices(range(1000), k=300)))})
    path = written(tmp_path / "rows.json", f"[{','.join([row] * 6000)}]")
    assert path.stat().st_size > 6 << 20
    tracemalloc.start()
    try:
        assert sum(1 for _ in read(path)) == 6000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
    monkeypatch.setattr(llama.data.text_rows, "LONGEST_LINE", 1 << 17)
    endless = written(tmp_path / "endless.json", '[{"a": "' + "x" * (1 << 20))
    assert refused(endless) == ": not a JSON list after row 0 (line 1: no end of a value in 131072 characters)"
