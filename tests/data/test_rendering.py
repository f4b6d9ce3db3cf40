"""What of a row becomes an example, and that nothing else of it is left out in silence."""

import json
import subprocess
import sys

import numpy as np
import pytest
from samples import ROOT, loaded, same, write_lines, write_parquet, write_rows

from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.examples import BadRows, encode_file
from llama.data.formats import Seen, suggestion
from llama.data.sources import TINY_TOKENIZER
from llama.data.templates import TEMPLATES, Template

ALPACA = {"instruction": "And its capital?", "input": "", "output": "Oslo"}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def encode(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    tokenizer = loaded(TINY_TOKENIZER)
    return lambda files, template, **flags: encode_file(files, template, tokenizer, 300, **flags)


def test_every_token_of_a_plain_text_is_learned_and_its_end_too(tmp_path, encode):
    """A4: as in pretraining; the first token has nothing before it to predict it from."""
    tokenizer = loaded(TINY_TOKENIZER)
    data = encode(write_rows(tmp_path / "rows.jsonl", [{"text": "Call me Ishmael."}]), TEMPLATES["text"])
    ids, is_label = data[0]
    assert ids.tolist() == [*tokenizer.encode("Call me Ishmael."), tokenizer.eos_id]
    assert is_label.tolist() == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("name", ["system", "history", "tools", "context"])
@pytest.mark.parametrize("write", [write_rows, write_parquet])
def test_a_field_that_belongs_to_the_prompt_is_refused_by_name_unless_it_is_empty(tmp_path, encode, name, write):
    """D20: LLaMA-Factory's rows have `system` and `history`: without them, we would train another prompt."""
    kind = "parquet" if write is write_parquet else "jsonl"
    said = [["a", "b"]] if name == "history" else "One word."
    rows = [ALPACA | {name: None}, ALPACA | {name: type(said)()}, ALPACA | {name: said}]
    path = write(tmp_path / f"rows.{kind}", rows)
    with pytest.raises(BadRows) as error:
        encode(path, TEMPLATES["alpaca"])
    assert error.value.lines[0].startswith(f"{path}:3: has {name}, which alpaca does not use; ")
    assert len(encode(path, TEMPLATES["alpaca"], skip_bad_rows=True)) == 2
    own = Template(str(tmp_path / "own.txt"), "{instruction}[[{output}]]")  # its author has chosen the fields
    assert len(encode(path, own)) == 3 and name in encode(path, own).unused


def test_other_fields_are_noted_by_name_wherever_in_the_file_they_are(tmp_path, encode):
    """D20: null and empty ones are as absent, 0 and false are not. The names come from the cache, too, and their number
    is bounded."""
    said = {"line\nbreak": "x", "score": 0.5, "votes": 0, "kept": False}
    rows = [ALPACA | {"id": 7, "note": None, "tags": []}, ALPACA, ALPACA | said]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        assert set(encode(path, TEMPLATES["alpaca"]).unused) == {"id", *said}
    many = write_rows(tmp_path / "many.jsonl", [ALPACA | {f"field {i}": i} for i in range(200)])
    assert len(encode(many, TEMPLATES["alpaca"]).unused) == 50
    talk = write_rows(tmp_path / "talk.jsonl", [{"messages": TALK, "prompt": "Hi", "source": "x"}])
    assert set(encode(talk, Chat("llama2")).unused) == {"prompt", "source"}


def test_several_files_are_one_split_whose_errors_name_the_file_at_hand(tmp_path, encode):
    """D27: the same examples as of one file, in order; each row has a number of its own."""
    rows = [ALPACA | {"output": str(i)} for i in range(9)]
    whole = encode(write_rows(tmp_path / "whole.jsonl", rows), TEMPLATES["alpaca"])
    parts = [write_rows(tmp_path / f"{i}.jsonl", rows[3 * i : 3 * i + 3]) for i in range(3)]
    assert same(encode(parts, TEMPLATES["alpaca"]), whole)
    assert not np.array_equal(encode(parts[::-1], TEMPLATES["alpaca"]).tokens, whole.tokens)
    write_lines(parts[1], [json.dumps(rows[3]), "{"])
    with pytest.raises(BadRows) as error:
        encode(parts, TEMPLATES["alpaca"])
    told, total = error.value.lines
    assert told.startswith(f"{parts[1]}:2: not valid JSON")
    assert total.startswith(f"{parts[0]} and 2 more: 1 of 8 rows cannot be used")


def test_blank_lines_are_no_rows_but_are_counted_as_lines(tmp_path, encode):
    """D27: at the end, at the beginning and between rows."""
    path = write_lines(tmp_path / "rows.jsonl", ["", json.dumps(ALPACA), "  \t", "\r", json.dumps(ALPACA), "", ""])
    data = encode(path, TEMPLATES["alpaca"])
    assert data.rows.tolist() == [2, 5] and data.bad_row_count == 0


@pytest.mark.parametrize("layout", ["llama2", "prompter"])
def test_of_a_prompt_and_a_completion_of_messages_only_the_completion_is_learned(tmp_path, encode, layout):
    """A4: TRL's conversational form. The ids are those of the whole conversation."""
    more = [{"role": "user", "content": "And you?"}, {"role": "assistant", "content": "Fine"}]
    pair = write_rows(tmp_path / "pair.jsonl", [{"prompt": [*TALK, more[0]], "completion": more[1:]}])
    whole = write_rows(tmp_path / "whole.jsonl", [{"messages": [*TALK, *more]}])
    ids, is_label = encode(pair, Chat(layout))[0]
    expected, all_labels = encode(whole, Chat(layout))[0]
    assert np.array_equal(ids, expected)
    tokenizer = loaded(TINY_TOKENIZER)
    assert "Fine" in tokenizer.decode(ids[is_label]) and "Hello" not in tokenizer.decode(ids[is_label])
    assert is_label.sum() < all_labels.sum() and not (is_label & ~all_labels).any()


def test_a_conversation_beside_a_pair_of_lists_is_refused(tmp_path, encode):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK, "prompt": TALK[:1], "completion": TALK[1:]}])
    with pytest.raises(BadRows, match=":1: has both messages and prompt, expected one of them"):
        encode(path, Chat("llama2"))


SUGGESTED = {
    "a class as a number": ([{"text": "WIN", "label": 1}, {"text": "hi", "label": 0}],
                            "label:[[ {label=label 0,label 1}]]"),
    "a class as a number in a table": ([{"text": "WIN", "spam": "1"}, {"text": "hi", "spam": "0"}] * 2,
                                       "spam:[[ {spam=spam 0,"),
    "a class as a word": ([{"review": "a", "kind": "ham"}, {"review": "b", "kind": "spam"}] * 5,
                          "kind:[[ {kind=ham,spam}]]"),
    "stars": ([{"review": "a", "stars": 5}], "stars:[[ {stars=stars 0,stars 1,stars 2,stars 3,stars 4,stars 5}]]"),
    "a text": ([{"title": "a", "body": "long", "summary": "b"}],
               "title:\n{title}\n\nbody:\n{body...}\n\nsummary:\n[[{summary}]]"),
    "an optional text": ([{"q": "a", "hint": "b", "answer": "c"}, {"q": "a", "answer": "c"}],
                         "\n=====\nq:\n{q...}\n\nanswer:"),
    "long answers of which each comes twice": ([{"q": "a", "answer": "x" * 60}, {"q": "b", "answer": "y" * 60}] * 2,
                                               "answer:\n[[{answer}]]"),
    "only one text": ([{"story": "a", "n": 1.5}], "[[{story}]]"),
    "names that no template can hold": ([{"a.b": "x", "{c}": "y", "d": "z"}], "[[{d}]]"),
}  # fmt: skip


@pytest.mark.parametrize("case", SUGGESTED)
def test_a_suggested_template_renders_the_rows_that_it_was_made_from(case):
    """A4: ready to save."""
    rows, expected = SUGGESTED[case]
    seen = {}
    for row in rows:
        for name, value in row.items():
            seen.setdefault(name, Seen()).add(value)
    source = suggestion(seen)
    assert expected in source
    template = Template("my.txt", source + "\n")
    for row in rows:
        assert any(segment.answer for segment in template.render(row, "here")[0])


def test_nothing_is_suggested_of_fields_that_are_no_text():
    assert suggestion({}) is None
    numbers = Seen()
    numbers.add(1.5)
    assert suggestion({"x": numbers}) is None


def test_the_data_script_starts_without_the_libraries_that_it_does_not_need():
    """B12: torch alone takes seconds. Reading Parquet and drawing import theirs when they are called."""
    code = "import sys; sys.path.insert(0, '.'); import data; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "pyarrow", "pandas", "matplotlib", "huggingface_hub", "datasets"}
    assert not heavy & set(done.stdout.split())


def test_an_unknown_suffix_is_refused_before_anything_is_encoded(tmp_path, encode):
    path = write_rows(tmp_path / "rows.txt", [ALPACA])
    with pytest.raises(UserError, match="rows.txt: expected a name ending in .parquet, .jsonl, .json, .csv or .tsv"):
        encode(path, TEMPLATES["alpaca"])
