"""From files to encoded examples: every row is an example or a bad row that is named and counted."""

import gzip
import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from samples import (
    AFTER,
    ARRAYS,
    BAD_ROWS,
    BEFORE,
    GOOD,
    IMDB,
    ByteTokenizer,
    examples_of,
    questions,
    rendered,
    reviews,
    same,
    spoiled,
    write_lines,
    write_parquet,
    write_rows,
)

import llama.data.examples
import llama.data.templates
from llama.boundary.errors import UserError
from llama.data.encoding import encode_rows
from llama.data.examples import BadRows, encode_file
from llama.data.templates import TEMPLATES, Template

pytestmark = pytest.mark.usefixtures("own_cache")

# Files become examples


@pytest.mark.parametrize("template, rows", [("imdb", reviews), ("alpaca", questions)])
def test_jsonl_gzip_and_parquet_give_identical_examples(tmp_path, bundled, template, rows):
    """Every array, byte for byte: with many row groups, and with a single one."""
    rows = rows(500)
    jsonl = write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    paths = [tmp_path / "train.jsonl.gz", write_parquet(tmp_path / "many.parquet", rows, row_group_size=77),
             write_parquet(tmp_path / "single.parquet", rows)]  # fmt: skip
    expected = encode_file(jsonl, TEMPLATES[template], bundled, 150, skip_bad_rows=True)
    assert 300 < len(expected) == 500 - expected.bad_row_count and 0 < expected.was_cut.sum() < len(expected)
    for path in paths:
        found = encode_file(path, TEMPLATES[template], bundled, 150, skip_bad_rows=True)
        assert same(found, expected) and found.fingerprint == expected.fingerprint, path
        assert found.first_bad_rows == [line.replace(str(jsonl), str(path)) for line in expected.first_bad_rows]


def test_encoded_data_gives_each_row_as_encoded_alone(tmp_path, bundled):
    """No batch effect: over an edge between two batches of rows, in the order of the file."""
    rows = reviews(2100)
    encoded = encode_file(write_rows(tmp_path / "train.jsonl", rows), IMDB, bundled, 110, "left")
    assert len(encoded) == len(rows) and encoded.answers.tolist() == [row["label"] for row in rows]
    for i in [*range(5), *range(1995, 2005), 2099]:
        ((ids, is_answer, was_cut),) = encode_rows([rendered(**rows[i])], bundled, 110, "left", answer_room=1)
        assert encoded[i][0].tolist() == ids and encoded[i][1].tolist() == is_answer
        assert encoded.lengths[i] == len(ids) and encoded.label_counts[i] == sum(is_answer)
        assert encoded.was_cut[i] == was_cut and encoded.rows[i] == i + 1


def test_files_leave_the_room_of_the_longest_answer(tmp_path):
    """C13: `encode_file` asks for it."""
    path = write_rows(tmp_path / "train.jsonl", [{"text": "0123456789", "label": label} for label in (0, 1)])
    encoded = encode_file(path, IMDB, ByteTokenizer(), len(BEFORE + AFTER) + 1 + 9 + 4)
    prompts = [ids[~is_answer].tolist() for ids, is_answer in (encoded[0], encoded[1])]
    assert prompts[0] == prompts[1] and bytes(prompts[0][1:]).decode().endswith("0123\n\n#### Answer:")
    assert encoded.label_counts.tolist() == [9, 1]


def test_truncated_examples_are_counted_and_those_that_fit_exactly_are_not(tmp_path, bundled):
    """C17: the count is of rows that lost something."""
    texts = ["I liked it.", "I liked it very much.", "I"]
    lengths = [len(encode_rows([rendered(text)], bundled, 1000, "right")[0][0]) for text in texts]
    path = write_rows(tmp_path / "train.jsonl", [{"text": text, "label": 1} for text in texts])
    cut = {n: encode_file(path, IMDB, bundled, n).was_cut.tolist() for n in lengths}
    assert cut == {n: [length > n for length in lengths] for n in lengths}
    assert sorted(map(sum, cut.values())) == [0, 1, 2]


def test_free_answers_are_encoded_row_by_row_and_have_no_answer_word(tmp_path, bundled):
    """C12, C15: the prompt is a prefix, then the answer and its end."""
    rows = questions(60)
    encoded = encode_file(write_rows(tmp_path / "train.jsonl", rows), TEMPLATES["alpaca"], bundled, 4000)
    assert set(encoded.answers.tolist()) == {-1} and not encoded.was_cut.any()
    for row, (ids, labelled) in zip(rows, examples_of(encoded), strict=True):
        answer = [*bundled.encode(row["output"], starts_text=False), bundled.eos_id]
        assert ids[-len(answer) :] == answer and labelled == [False] * (len(ids) - len(answer)) + [True] * len(answer)
        assert ("### Input:" in bundled.decode(ids)) == bool(row["input"])


def test_a_subset_keeps_the_order_that_was_asked_for(tmp_path, bundled):
    """Everything about an example goes along with it; a subset has subsets, and none knows the whole's lengths."""
    encoded = encode_file(write_rows(tmp_path / "a.jsonl", reviews(30)), IMDB, bundled, 90)
    assert len(encoded.lengths) == 30  # asked for before, and kept
    chosen = np.array([17, 3, 29, 4])
    part = encoded.subset(chosen)
    assert examples_of(part) == [examples_of(encoded)[i] for i in chosen]
    assert part.rows.tolist() == [18, 4, 30, 5] and part.lengths.tolist() == encoded.lengths[chosen].tolist()
    for name in ("label_counts", "answers", "was_cut"):
        assert getattr(part, name).tolist() == getattr(encoded, name)[chosen].tolist()
    assert examples_of(part.subset(np.array([2, 0]))) == [examples_of(encoded)[i] for i in (29, 17)]
    assert len(encoded.subset(np.array([], int))) == 0


def test_labelling_prompts_labels_every_token_but_the_first(tmp_path, bundled):
    """C52: the ids stay; the counts are of what a loss would see, also of a subset before or after."""
    encoded = encode_file(write_rows(tmp_path / "a.jsonl", reviews(9)), IMDB, bundled, 90)
    everything = encoded.labelling_prompts()
    expected = [[False] + [True] * (n - 1) for n in encoded.lengths]
    assert [labelled for _, labelled in examples_of(everything)] == expected
    assert [ids for ids, _ in examples_of(everything)] == [ids for ids, _ in examples_of(encoded)]
    assert everything.label_counts.tolist() == [sum(labelled) for _, labelled in examples_of(everything)]
    chosen = np.array([5, 1])
    for part in (everything.subset(chosen), encoded.subset(chosen).labelling_prompts()):
        assert examples_of(part) == [examples_of(everything)[i] for i in chosen]
        assert part.label_counts.tolist() == [encoded.lengths[i] - 1 for i in chosen]
    assert examples_of(encoded)[0][1].count(True) == 1  # the original is as it was


def test_the_fingerprint_tells_any_two_sets_of_examples_apart(tmp_path, bundled):
    """R7: a subset, its order, prompts as labels, other tokens; and nothing else."""
    rows = reviews(12)
    encoded = encode_file(write_rows(tmp_path / "a.jsonl", rows), IMDB, bundled, 90)
    again = encode_file(write_parquet(tmp_path / "b.parquet", rows), IMDB, bundled, 90)
    assert encoded.fingerprint == again.fingerprint == encoded.subset(np.arange(12)).fingerprint
    flipped = [rows[0] | {"label": 1 - rows[0]["label"]}, *rows[1:]]
    different = [
        encoded, encoded.labelling_prompts(), encoded.subset(np.arange(11)), encoded.subset(np.arange(1, 12)),
        encoded.subset(np.arange(12)[::-1]), encoded.subset(np.arange(6)), encoded.subset(np.arange(6, 12)),
        encoded.subset(np.arange(6)).labelling_prompts(),
        encode_file(write_rows(tmp_path / "c.jsonl", flipped), IMDB, bundled, 90),
    ]  # fmt: skip
    assert len({part.fingerprint for part in different}) == len(different)


# Bad rows

@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_number_in_one_line(tmp_path, bundled, case):
    """R15: what was found and what was expected; a second try says the same."""
    line, expected = BAD_ROWS[case]
    path = write_lines(tmp_path / "train.jsonl", [GOOD, GOOD, line, GOOD])
    for _ in range(2):
        with pytest.raises(BadRows) as error:
            encode_file(path, IMDB, bundled, 512)
        told, total = error.value.lines
        assert told.startswith(f"{path}:3: ") and expected in told
        assert len(told.splitlines()) == 1 and len(told) < len(str(path)) + 250
        assert total.startswith(f"{path}: 1 of 4 rows cannot be used; ") and "--skip_bad_rows" in total
        assert str(error.value) == f"{told}; {total}"


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_can_be_left_out_and_is_counted(tmp_path, bundled, case):
    """R15: only when asked; the rest is encoded as if it were not there, and told again when read from the cache."""
    line, expected = BAD_ROWS[case]
    path = write_lines(tmp_path / "train.jsonl", [GOOD, line, GOOD, GOOD])
    clean = encode_file(write_lines(tmp_path / "clean.jsonl", [GOOD] * 3), IMDB, bundled, 512)
    assert (clean.bad_row_count, clean.first_bad_rows) == (0, [])
    for _ in range(2):
        encoded = encode_file(path, IMDB, bundled, 512, skip_bad_rows=True)
        assert same(encoded, clean, *set(ARRAYS) - {"rows"}) and encoded.rows.tolist() == [1, 3, 4]
        assert encoded.bad_row_count == 1 and len(encoded.first_bad_rows) == 1
        assert encoded.first_bad_rows[0].startswith(f"{path}:2: ") and expected in encoded.first_bad_rows[0]


@pytest.mark.parametrize("batch", [10, 2000])
def test_the_first_five_bad_rows_are_told_and_all_are_counted(tmp_path, bundled, monkeypatch, batch):
    """R15: whether or not they lie in one batch."""
    monkeypatch.setattr(llama.data.examples, "BATCH_ROWS", batch)
    lines, bad = spoiled(200)
    path = write_lines(tmp_path / "train.jsonl", lines)
    with pytest.raises(BadRows) as error:
        encode_file(path, IMDB, bundled, 512)
    *told, total = error.value.lines
    assert [line.split(": ")[0] for line in told] == [f"{path}:{number}" for number in bad[:5]]
    assert total.startswith(f"{path}: {len(bad)} of 200 rows cannot be used; ")


@pytest.mark.parametrize("batch", [10, 2000])
def test_what_is_left_of_a_file_with_bad_rows_is_exactly_a_clean_file(tmp_path, bundled, monkeypatch, batch):
    """R15: --skip_bad_rows changes nothing about the other rows, and each knows its number in the file."""
    monkeypatch.setattr(llama.data.examples, "BATCH_ROWS", batch)
    lines, bad = spoiled(200)
    good = [number for number in range(1, 201) if number not in bad]
    clean = write_lines(tmp_path / "clean.jsonl", [lines[number - 1] for number in good])
    expected = encode_file(clean, IMDB, bundled, 120)
    found = encode_file(write_lines(tmp_path / "a.jsonl", lines), IMDB, bundled, 120, skip_bad_rows=True)
    assert same(found, expected, *set(ARRAYS) - {"rows"}) and found.fingerprint == expected.fingerprint
    assert found.rows.tolist() == good and found.bad_row_count == len(bad)
    places = [line.split(": ")[0] for line in found.first_bad_rows]
    assert places == [f"{tmp_path / 'a.jsonl'}:{number}" for number in bad[:5]]


def test_bad_rows_of_a_parquet_file_are_named_by_number(tmp_path, bundled):
    """R15: as in JSONL."""
    path, good = tmp_path / "train.parquet", {"text": "fine", "label": 1}
    cases = [({"text": "fine", "label": 5}, "label is 5"), ({"text": None, "label": 1}, "NoneType"),
             ({"text": "a\0b", "label": 1}, "character 1 of text is NUL")]  # fmt: skip
    write_parquet(path, [good, *(bad for bad, _ in cases), good], row_group_size=2)
    with pytest.raises(BadRows) as error:
        encode_file(path, IMDB, bundled, 512)
    assert len(error.value.lines) == 4
    for number, (line, (_, expected)) in enumerate(zip(error.value.lines, cases, strict=False), 2):
        assert line.startswith(f"{path}:{number}: ") and expected in line
    assert encode_file(path, IMDB, bundled, 512, skip_bad_rows=True).rows.tolist() == [1, 5]
    write_parquet(path, [{"review": "fine", "stars": 3.5}])
    with pytest.raises(BadRows, match="found fields {'review': str, 'stars': float}, expected {text: str"):
        encode_file(path, IMDB, bundled, 512)
    write_parquet(path, [{"text": "fine", "label": True}])
    with pytest.raises(BadRows, match="'label': bool"):
        encode_file(path, IMDB, bundled, 512)


def test_a_text_too_long_to_tokenize_is_a_bad_row_also_in_parquet(tmp_path, bundled, monkeypatch):
    """R15: no line of a JSONL file may be so long, and no field of any file."""
    monkeypatch.setattr(llama.data.templates, "LONGEST_LINE", 100)
    rows = [{"text": "x" * n, "label": 1} for n in (100, 101, 1)]
    path = write_parquet(tmp_path / "train.parquet", rows)
    found = encode_file(path, IMDB, bundled, 512, skip_bad_rows=True)
    assert found.rows.tolist() == [1, 3]
    assert found.first_bad_rows == [f"{path}:2: text has 101 characters, expected 100 at most"]


QUESTION = Template("question", "{question}[[ {label=negative,positive}]]")


def test_rows_that_leave_no_label_are_bad_rows(tmp_path, bundled):
    """C3, C17: every third row has a question too long, which may not be cut; the others stay as they are."""
    rows = [{"question": f"{'Why? ' * 60 if i % 3 == 0 else 'short'} {i}", "label": i % 2} for i in range(20)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(BadRows) as error:
        encode_file(path, QUESTION, bundled, 60)
    *told, total = error.value.lines
    assert [line.split(": ")[0] for line in told] == [f"{path}:{number}" for number in (1, 4, 7, 10, 13)]
    assert all("--max_length 60" in line for line in told) and total.startswith(f"{path}: 7 of 20 rows ")
    encoded = encode_file(path, QUESTION, bundled, 60, skip_bad_rows=True)
    assert encoded.bad_row_count == 7 and encoded.first_bad_rows == told
    kept = [i for i in range(20) if i % 3]
    assert encoded.answers.tolist() == [i % 2 for i in kept] and encoded.rows.tolist() == [i + 1 for i in kept]
    assert all(f"short {i}" in bundled.decode(encoded[n][0]) for n, i in enumerate(kept))


@pytest.mark.parametrize("batch", [2, 2000])
def test_bad_rows_of_every_kind_are_counted_together(tmp_path, bundled, monkeypatch, batch):
    """R15, C3: who mends all that were counted is done: those that leave no label are told along with broken ones."""
    monkeypatch.setattr(llama.data.examples, "BATCH_ROWS", batch)
    good, long = {"question": "short", "label": 1}, {"question": "Why? " * 60, "label": 1}
    lines = [json.dumps(good), "{", json.dumps(long), json.dumps(good), json.dumps(long), "[]"]
    path = write_lines(tmp_path / "train.jsonl", lines)
    skipped = encode_file(path, QUESTION, bundled, 60, skip_bad_rows=True)
    assert skipped.bad_row_count == 4 and skipped.rows.tolist() == [1, 4]
    with pytest.raises(BadRows) as error:
        encode_file(path, QUESTION, bundled, 60)
    *told, total = error.value.lines
    assert [line.split(": ")[0] for line in told] == [f"{path}:{number}" for number in (2, 3, 5, 6)]
    assert told == skipped.first_bad_rows
    assert total.startswith(f"{path}: 4 of 6 rows cannot be used; ")


@pytest.mark.parametrize("content", [b"", pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.int64())])],
                         ids=["jsonl", "parquet"])  # fmt: skip
@pytest.mark.parametrize("skip", [False, True])
def test_a_file_without_rows_is_refused(tmp_path, bundled, content, skip):
    """R19: never a run of 0 steps."""
    path = tmp_path / ("train.jsonl" if content == b"" else "train.parquet")
    if content == b"":
        path.write_bytes(content)
    else:
        pyarrow.parquet.write_table(content.empty_table(), path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: no rows$"):
        encode_file(path, IMDB, bundled, 512, skip_bad_rows=skip)


def test_a_file_all_of_whose_rows_are_bad_is_refused_even_when_skipping(tmp_path, bundled):
    """R19: broken, or without room for a label: with the number of rows, in one line."""
    broken = write_lines(tmp_path / "broken.jsonl", ["{", "[]", '{"text": ""}'])
    long = write_rows(tmp_path / "long.jsonl", reviews(7))
    for path, length, count, reason in ((broken, 512, 3, "not valid JSON"), (long, 20, 7, "--max_length 20")):
        with pytest.raises(UserError) as error:
            encode_file(path, IMDB, bundled, length, skip_bad_rows=True)
        (told,) = error.value.lines
        assert told.startswith(f"{path}: none of {count} rows can be used")
        with pytest.raises(BadRows) as error:
            encode_file(path, IMDB, bundled, length)
        assert reason in error.value.lines[0] and f"{count} of {count} rows cannot be used" in error.value.lines[-1]


def test_files_damaged_as_a_whole_are_refused_even_when_skipping(tmp_path, own_cache, bundled):
    """R5, R15: how many rows are lost, nobody can tell."""
    content = write_rows(tmp_path / "a.jsonl", reviews(3000)).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content)[:-20])
    write_parquet(tmp_path / "c.parquet", reviews(300))
    (tmp_path / "c.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-9])
    for name, kind in (("b.jsonl.gz", "gzip"), ("c.parquet", "Parquet")):
        for skip in (False, True):
            with pytest.raises(UserError, match=rf"{name}: cannot be read as {kind} after row \d+ \(") as error:
                encode_file(tmp_path / name, IMDB, bundled, 512, skip_bad_rows=skip)
            assert len(error.value.lines) == 1
    assert {p.suffix for p in own_cache.iterdir()} == {".lock"}


def test_files_that_cannot_be_opened_are_named(tmp_path, bundled):
    """R15: one that is not there, a folder, a name of another kind."""
    (tmp_path / "train.xlsx").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for name, expected in (("train.xlsx", "expected a name ending in .parquet, .jsonl"),
                           ("gone.jsonl", "gone.jsonl: No such file"), ("folder.jsonl", "Is a directory")):
        with pytest.raises(UserError, match=expected) as error:
            encode_file(tmp_path / name, IMDB, bundled, 512)
        assert len(error.value.lines) == 1


# Rows of one category


def test_a_category_is_its_rows_and_no_others(tmp_path, bundled):
    """The same examples as of a file that has only those; rows keep their numbers."""
    rows = [row | {"category": ["open_qa", "summarization", "open"][i % 3]} for i, row in enumerate(reviews(60))]
    path = write_rows(tmp_path / "all.jsonl", rows)
    only = write_rows(tmp_path / "only.jsonl", rows[2::3])
    found, expected = encode_file(path, IMDB, bundled, 512, category="open"), \
        encode_file(only, IMDB, bundled, 512)
    assert same(found, expected, *set(ARRAYS) - {"rows"}) and found.rows.tolist() == list(range(3, 61, 3))
    assert len(encode_file(path, IMDB, bundled, 512)) == 60


def test_an_unknown_category_names_those_that_are_there(tmp_path, own_cache, bundled):
    """R15: as the file spells them, the most frequent first."""
    rows = [row | {"category": "open_qa" if i % 3 else "brainstorming"} for i, row in enumerate(reviews(9))]
    path = write_rows(tmp_path / "all.jsonl", rows)
    for skip in (False, True):
        with pytest.raises(UserError) as error:
            encode_file(path, IMDB, bundled, 512, category="Open_QA", skip_bad_rows=skip)
        assert error.value.lines == [f"{path}: no row of category 'Open_QA', only of 'open_qa', 'brainstorming'"]
    assert {p.suffix for p in own_cache.iterdir()} == {".lock"}


def test_rows_without_a_category_are_bad_where_one_is_asked_for(tmp_path, bundled):
    """R15: they might have belonged to it; bad rows of other categories are nobody's concern."""
    rows = [{"text": "fine", "label": 1, "category": "a"}, {"text": "fine", "label": 1},
            {"text": "fine", "label": 1, "category": None}, {"text": "", "label": 1, "category": "b"},
            {"text": "fine", "label": 1, "category": ["a"]}, {"text": "", "label": 1, "category": "a"}]  # fmt: skip
    path = write_rows(tmp_path / "all.jsonl", rows)
    with pytest.raises(BadRows) as error:
        encode_file(path, IMDB, bundled, 512, category="a")
    *told, total = error.value.lines
    assert [line.split(": ")[0] for line in told] == [f"{path}:{number}" for number in (2, 3, 5, 6)]
    assert all("expected {category: str}" in line for line in told[:3]) and "text is empty" in told[3]
    assert total.startswith(f"{path}: 4 of ")
    found = encode_file(path, IMDB, bundled, 512, category="a", skip_bad_rows=True)
    assert found.rows.tolist() == [1] and found.bad_row_count == 4


def test_columns_that_no_template_asks_for_cannot_spoil_a_parquet_file(tmp_path, bundled):
    """R15: a time in nanoseconds, large blobs: neither read nor held in memory."""
    rows = reviews(6)
    odd = {"when": pyarrow.array([1] * 6, pyarrow.timestamp("ns", "No/Where")),
           "blob": pyarrow.array([b"x" * 10**5] * 6)}
    table = pyarrow.Table.from_pylist(rows)
    for name, column in odd.items():
        table = table.append_column(name, column)
    pyarrow.parquet.write_table(table, tmp_path / "odd.parquet")
    encoded = encode_file(tmp_path / "odd.parquet", IMDB, bundled, 128)
    plain = encode_file(write_rows(tmp_path / "plain.jsonl", rows), IMDB, bundled, 128)
    assert encoded.fingerprint == plain.fingerprint


def test_one_value_of_a_parquet_file_that_cannot_be_read_is_one_bad_row(tmp_path, bundled):
    """R15: its neighbours are kept with --skip_bad_rows."""
    texts = pyarrow.array([b"fine", b"caf\xe9", b"good"]).cast(pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": texts, "label": [0, 1, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadRows) as error:
        encode_file(tmp_path / "a.parquet", IMDB, bundled, 128)
    assert error.value.lines[0].startswith(f"{tmp_path}/a.parquet:2: cannot be read (") and len(error.value.lines) == 2
    assert len(encode_file(tmp_path / "a.parquet", IMDB, bundled, 128, skip_bad_rows=True)) == 2
