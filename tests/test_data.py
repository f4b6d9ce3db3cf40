"""From rows to encoded examples: prompts are prefixes, labels survive, bad rows are named, caches are whole."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import DataError, EncodedData, ImdbTemplate, Segment, encode_file, encode_rows, read, resolve
from llama.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(data.__file__).parent
SHARED = ROOT.parent / "shared"
BUNDLED = ROOT / "assets" / "tiny" / "tokenizer.model"
TEMPLATE = ImdbTemplate()

# The prompt of the IMDB recipe as its notebook (seed 000) prints it, with this text and this label.
GOLDEN = """Given a movie review/comment by a user in following format:
#### Movie review:
<review>
#### Answer:
<answer>
Please rate the movie review as positive or negative from the perspective of the user's overall personal feelings to \
the movie. Answer it with only 'positive' or 'negative' without any explanation.

#### Movie review:
I liked it.

#### Answer: positive"""
HOSTILE = ["</s>", "<s>", "<|im_end|>", "<|endoftext|>", "<unk>", "{text}", "{label}", "{0.__class__}", "%s",
           "%(text)s", "{{}}", "\x00", "#### Answer:", " negative", "<0x0A>"]  # fmt: skip
WORDS = "a film of great beauty and no plot I don't recommend 10/10 <br /><br /> naïve 映画 🎬 the worst ever".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return load_tokenizer(BUNDLED)


@pytest.fixture(scope="module", params=["bundled", "llama2", "smollm2"])
def tokenizer(request, bundled) -> Tokenizer:
    """Each kind of tokenizer: ours, and two real ones where they are at hand."""
    if request.param == "bundled":
        return bundled
    folder = {"llama2": "llama2-tokenizer", "smollm2": "smollm2-135m-instruct-q4"}[request.param]
    return load_tokenizer(request.getfixturevalue("assets") / folder)


class ByteTokenizer:
    """Bytes as ids, except that " positive" is one token where " negative" is nine."""

    bos_id = 300

    def encode_batch(self, texts: list[str], continues: bool = False) -> list[list[int]]:
        begin = [] if continues else [self.bos_id]
        return [begin + ([256] if text == " positive" else list(text.encode())) for text in texts]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Reviews with odd spaces, scripts, markup and whatever looks like a control token or a template."""
    generator = random.Random(seed)
    mixed = [*WORDS, *HOSTILE, " ", "  ", "\n", "\r\n", "\t"]
    pools = [[f"{word} " for word in WORDS], mixed, list(" \n\tae'."), HOSTILE]
    return ["".join(generator.choices(generator.choice(pools), k=generator.randrange(1, 20))) + "." * (i % 3 == 0)
            for i in range(count)]  # fmt: skip


def rendered(text: str, label: int = 1) -> list[Segment]:
    return TEMPLATE.render({"text": text, "label": label}, "here")[0]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(count: int) -> list[dict]:
    texts = [text if text.strip() else "empty" for text in random_texts(count)]
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


# The template


def test_the_imdb_prompt_is_the_recipes_word_for_word():
    """Seed 000's text, with the answer in a segment of its own that starts with its own space."""
    segments = rendered("I liked it.")
    assert "".join(s.text for s in segments) == GOLDEN
    assert [s.text for s in segments if s.answer] == [" positive"]
    assert [s.text for s in segments if s.may_cut] == ["I liked it."]


@pytest.mark.parametrize("label", [0, 1])
def test_the_imdb_prompt_equals_the_text_that_the_notebook_formats(label):
    """Its f-strings are read from the seed itself: part1.format(text) + part2.format(label)."""
    seeds = sorted((SHARED / "seeds").glob("000*.txt"))
    if not seeds:
        pytest.skip("the seeds are absent")
    found = re.findall(r"prompt_part([12]) = \\\nf'''(.*?)'''", seeds[0].read_text(), re.DOTALL)
    assert len(found) >= 2
    parts = {number: text.replace("{{", "{").replace("}}", "}") for number, text in found}  # what f''' makes of it
    for text in ("It was {text} or {label}.", *filter(str.strip, random_texts(50))):
        expected = parts["1"].format(text=text) + parts["2"].format(label=["negative", "positive"][label])
        assert "".join(s.text for s in rendered(text, label)) == expected


# Prompts, labels, control tokens: properties on 10,000 texts


@pytest.fixture(scope="module")
def encodings(tokenizer) -> tuple[Tokenizer, list[str], list[list[int]], list[list]]:
    """10,000 reviews: the ids of each prompt as inference has it, and of its two examples as training has them."""
    texts = [text for text in random_texts(10_000) if text.strip()]
    assert len(texts) > 9_000
    prompts = encode_rows([rendered(text)[:-1] for text in texts], tokenizer, 10_000, "right")
    trained = [encode_rows([rendered(text, label) for text in texts], tokenizer, 10_000, "right") for label in (0, 1)]
    return tokenizer, texts, [ids for ids, _, _ in prompts], list(zip(*trained, strict=True))


def test_the_prompt_at_inference_is_a_strict_prefix_of_what_was_trained_on(encodings):
    """C12, C13: for both answers, and exactly what follows it is labelled."""
    _, _, prompts, examples = encodings
    for prompt, both in zip(prompts, examples, strict=True):
        for ids, is_answer, was_cut in both:
            assert ids[: len(prompt)] == prompt and len(ids) > len(prompt) and not was_cut
            assert is_answer == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert both[0][0] != both[1][0]


def test_what_is_labelled_decodes_to_the_answer_and_the_rest_to_the_prompt(encodings):
    """C12, C18: nothing is lost or moved at the seams; half of a character would be U+FFFD."""
    tokenizer, texts, prompts, examples = encodings
    for text, prompt, both in list(zip(texts, prompts, examples, strict=True))[:2000]:
        assert [tokenizer.decode(ids[len(prompt) :], continues=True) for ids, _, _ in both] == list(TEMPLATE.answers)
        assert tokenizer.decode(prompt) == TEMPLATE.before + text + TEMPLATE.after


def test_there_is_one_beginning_of_text_and_no_other_control_token(encodings):
    """C14, C20: whatever the reviews say. The control ids are asked of the library itself."""
    tokenizer, _, prompts, examples = encodings
    control = control_ids(tokenizer)
    assert tokenizer.eos_id in control
    for prompt, both in zip(prompts, examples, strict=True):
        begins = [prompt[0]] if tokenizer.bos_id is not None else []
        assert begins == [tokenizer.bos_id][: len(begins)]
        assert control.isdisjoint(prompt[len(begins) :])
        assert all(control.isdisjoint(ids[len(begins) :]) for ids, _, _ in both)


def control_ids(tokenizer: Tokenizer) -> set[int]:
    file = tokenizer.files[0]
    if file.suffix == ".json":
        return {token["id"] for token in json.loads(file.read_text())["added_tokens"] if len(token["content"]) > 1}
    from sentencepiece import SentencePieceProcessor

    codec = SentencePieceProcessor(model_file=str(file))
    return {i for i in range(codec.vocab_size()) if codec.is_control(i) or codec.is_unknown(i)}


def test_with_llama_2_the_answers_are_one_token_each_and_no_lone_space_comes_before(assets):
    """C13: ids 8178 and 6374 as the notebook has them, and never 29871, the trailing space of its prompt."""
    tokenizer = load_tokenizer(assets / "llama2-tokenizer")
    for text in random_texts(300):
        text = text.strip() + "x"
        for label, answer in ((0, 8178), (1, 6374)):
            ((ids, is_answer, _),) = encode_rows([rendered(text, label)], tokenizer, 10_000, "right")
            assert ids[-1] == answer and sum(is_answer) == 1
            assert ids[-2] != 29871
    for fixed in (rendered("x")[0].text, rendered("x")[2].text):
        assert 29871 not in tokenizer.encode(fixed, continues=fixed == TEMPLATE.after)


@pytest.mark.parametrize("text", [*HOSTILE, "{text}{label}", "{", "}", "%", "\\x00", "${HOME}", "{text.__class__}"])
def test_what_a_review_says_is_never_evaluated(bundled, text):
    """C20, R16: neither as a template nor as a control token; it comes back letter for letter."""
    segments = rendered(text)
    assert [s.text for s in segments] == [TEMPLATE.before, text, TEMPLATE.after, " positive"]
    ((ids, _, _),) = encode_rows([segments], bundled, 1000, "right")
    assert bundled.decode(ids) == TEMPLATE.before + text + TEMPLATE.after + " positive"
    assert ids.count(bundled.bos_id) == 1 and bundled.eos_id not in ids


def test_examples_do_not_depend_on_what_they_are_encoded_with(bundled):
    """A batch, a file, or alone: the same ids."""
    rows = [rendered(text, i % 2) for i, text in enumerate(random_texts(400)) if text.strip()]
    together = encode_rows(rows, bundled, 120, "left")
    assert together == [encode_rows([row], bundled, 120, "left")[0] for row in rows]
    order = random.Random(1).sample(range(len(rows)), len(rows))
    assert encode_rows([rows[i] for i in order], bundled, 120, "left") == [together[i] for i in order]


# Truncation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [84, 90, 120, 500])
def test_truncation_takes_only_the_review_and_only_from_the_chosen_side(tokenizer, side, length):
    """C16, C17: what stays of the review is its beginning or its end, and every label is there."""
    fixed = [tokenizer.encode(TEMPLATE.before), tokenizer.encode(TEMPLATE.after, continues=True)]
    texts = [text for text in random_texts(100, seed=2) if text.strip()]
    for label in (0, 1):
        answer = tokenizer.encode(TEMPLATE.answers[label], continues=True)
        room = length - len(fixed[0]) - len(fixed[1]) - len(answer)
        rows = [rendered(text, label) for text in texts]
        for text, example in zip(texts, encode_rows(rows, tokenizer, length, side), strict=True):
            review = tokenizer.encode(text, continues=True)
            if room < 0:
                assert example is None
                continue
            kept = review[max(0, len(review) - room) :] if side == "left" else review[:room]
            ids, is_answer, was_cut = example
            assert ids == [*fixed[0], *kept, *fixed[1], *answer] and len(ids) <= length
            assert is_answer == [False] * (len(ids) - len(answer)) + [True] * len(answer)
            assert was_cut == (len(kept) < len(review))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_begins_the_document_is_cut_after_its_beginning_of_text(bundled, side):
    """C14, C17: as templates will have it whose first segment may be cut."""
    segments = [Segment("one two three four five", may_cut=True), Segment(" done", answer=True)]
    first, last = bundled.encode("one two three four five"), bundled.encode(" done", continues=True)
    ((ids, _, _),) = encode_rows([segments], bundled, len(last) + 4, side)
    assert ids == [bundled.bos_id, *(first[-3:] if side == "left" else first[1:4]), *last]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_cut_alike_whatever_its_answer_and_also_without_one(tmp_path, side):
    """C13: were the room for a short answer given to the review, the length of a prompt would tell the answer."""
    fake, room, text = ByteTokenizer(), len(" negative"), "0123456789" * 3
    fixed = len(TEMPLATE.before) + 1 + len(TEMPLATE.after)
    for length in range(fixed + room, fixed + room + len(text) + 2):
        rows = [rendered(text, 0), rendered(text, 1), rendered(text)[:-1]]
        negative, positive, none = encode_rows(rows, fake, length, side, answer_room=room)
        assert negative[0][:-9] == positive[0][:-1] == none[0] and len(negative[0]) <= length
        assert negative[2] == positive[2] == (length < fixed + room + len(text))
    assert encode_rows(rows, fake, fixed + room - 1, side, answer_room=room) == [None] * 3


def test_files_leave_the_room_of_the_longest_answer(tmp_path, own_cache):
    """C13: `encode_file` asks for it."""
    fake = ByteTokenizer()
    fake.files = (BUNDLED,)
    path = write_rows(tmp_path / "train.jsonl", [{"text": "0123456789", "label": label} for label in (0, 1)])
    encoded = encode_file(path, "imdb", fake, len(TEMPLATE.before + TEMPLATE.after) + 1 + 9 + 4, quiet=True)
    prompts = [ids[~is_answer].tolist() for ids, is_answer in (encoded[0], encoded[1])]
    assert prompts[0] == prompts[1] and bytes(prompts[0][1:]).decode().endswith("0123\n\n#### Answer:")
    assert encoded.label_counts.tolist() == [9, 1]


def test_truncated_examples_are_counted_and_those_that_fit_exactly_are_not(tmp_path, bundled):
    """C17: the count is of rows that lost something."""
    texts = ["I liked it.", "I liked it very much.", "I"]
    lengths = [len(encode_rows([rendered(text)], bundled, 1000, "right")[0][0]) for text in texts]
    path = write_rows(tmp_path / "train.jsonl", [{"text": text, "label": 1} for text in texts])
    assert [encode_file(path, "imdb", bundled, n, quiet=True).truncated for n in sorted(lengths)] == [2, 1, 0]


class TwoQuestions(ImdbTemplate):
    """Every third row has a long question, which may not be cut."""

    def render(self, row: dict, where: str):
        segments, label = super().render(row, where)
        return [Segment("Why? " * (30 if row["text"].startswith("long") else 1)), *segments[1:]], label


def test_rows_whose_fixed_part_is_too_long_are_left_out_and_counted_by_place(tmp_path, bundled, monkeypatch):
    """C3, C17: the first five are named; the others stay as they are."""
    monkeypatch.setitem(data.TEMPLATES, "two", TwoQuestions())
    rows = [{"text": f"{'long' if i % 3 == 0 else 'short'} {i}", "label": i % 2} for i in range(20)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    encoded = encode_file(path, "two", bundled, 60, quiet=True)
    assert encoded.rejected_count == 7 and len(encoded) == 13
    assert encoded.rejected == [1, 4, 7, 10, 13]
    assert encoded.answers.tolist() == [i % 2 for i in range(20) if i % 3]
    assert all(f"short {i}" in bundled.decode(encoded[n][0]) for n, i in enumerate(i for i in range(20) if i % 3))


# Reading


def test_jsonl_and_parquet_give_identical_examples(tmp_path, bundled):
    """Every array, byte for byte, with several row groups."""
    rows = reviews(500)
    jsonl = write_rows(tmp_path / "train.jsonl", rows)
    parquet = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet, row_group_size=77)
    assert [row for _, row in read(jsonl)] == [row for _, row in read(parquet)] == rows
    assert [where for where, _ in read(jsonl)][-1] == f"{jsonl}:500"
    assert [where for where, _ in read(parquet)][-1] == f"{parquet}:500"
    a, b = (encode_file(path, "imdb", bundled, 150, quiet=True) for path in (jsonl, parquet))
    for name in ("tokens", "is_answer", "offsets", "answers", "label_counts"):
        assert np.array_equal(getattr(a, name), getattr(b, name)) and len(getattr(a, name)), name


def test_encoded_data_gives_each_row_as_encoded_alone(tmp_path, bundled):
    """No batch effect: over an edge between two batches of rows, in the order of the file."""
    rows = reviews(2100)
    encoded = encode_file(write_rows(tmp_path / "train.jsonl", rows), "imdb", bundled, 110, "left", quiet=True)
    assert len(encoded) == len(rows) and encoded.answers.tolist() == [row["label"] for row in rows]
    for i in [*range(5), *range(1995, 2005), 2099]:
        ((ids, is_answer, _),) = encode_rows([rendered(**rows[i])], bundled, 110, "left", answer_room=1)
        assert encoded[i][0].tolist() == ids and encoded[i][1].tolist() == is_answer
        assert encoded.lengths[i] == len(ids) and encoded.label_counts[i] == sum(is_answer)


GOOD = '{"text": "fine", "label": 1}'
BAD_LINES = {
    "broken JSON": ('{"text": "fine", "label": 1', "not valid JSON"),
    "no JSON at all": ("text,label", "not valid JSON"),
    "two objects": (GOOD + GOOD, "not valid JSON"),
    "blank line": ("", "not valid JSON"),
    "raw NUL": ('{"text": "a\0b", "label": 1}', "not valid JSON"),
    "deep nesting": ("[" * 100_000, "not valid JSON"),
    "huge number": ('{"text": "fine", "label": ' + "1" * 5000 + "}", "not valid JSON"),
    "repeated field": ('{"text": "fine", "label": 1, "label": 0}', "comes twice"),
    "a list": ("[1, 2]", "found list, expected a JSON object"),
    "a string": ('"fine"', "found str, expected a JSON object"),
    "null": ("null", "found NoneType, expected a JSON object"),
    "missing field": ('{"label": 1}', "found fields {'label': int}, expected {text: str, label: int}"),
    "no fields": ("{}", "found fields {}, expected"),
    "misnamed field": ('{"review": "fine", "label": 1}', "{'review': str, 'label': int}"),
    "line breaks in a name": ('{"te\\nxt": "fine", "label": 1}', "te\\nxt"),
    "text not a string": ('{"text": 7, "label": 1}', "'text': int"),
    "null text": ('{"text": null, "label": 1}', "'text': NoneType"),
    "boolean label": ('{"text": "fine", "label": true}', "'label': bool"),
    "label as text": ('{"text": "fine", "label": "1"}', "'label': str"),
    "fraction as label": ('{"text": "fine", "label": 1.0}', "'label': float"),
    "label out of range": ('{"text": "fine", "label": 2}', "label is 2, expected 0 (negative) or 1 (positive)"),
    "negative label": ('{"text": "fine", "label": -1}', "label is -1, expected 0"),
    "empty text": ('{"text": "", "label": 1}', "text is empty"),
    "only spaces": ('{"text": " \\n\\t", "label": 1}', "text is empty"),
    "half a character": ('{"text": "a\\ud800", "label": 1}', "lone surrogate"),
    "Latin-1": (b'{"text": "caf\xe9", "label": 1}', "byte 13 is not UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), "byte 0 is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number_in_one_line(tmp_path, own_cache, bundled, case):
    """R15: what was found and what was expected; nothing is cached, and a second try says the same."""
    line, expected = BAD_LINES[case]
    path = tmp_path / "train.jsonl"
    good = GOOD.encode()
    path.write_bytes(b"\n".join([good, good, line if isinstance(line, bytes) else line.encode(), good, b""]))
    for _ in range(2):
        with pytest.raises(DataError) as error:
            encode_file(path, "imdb", bundled, 512, quiet=True)
        told = str(error.value)
        assert told.startswith(f"{path}:3: ") and expected in told
        assert "\n" not in told and len(told) < len(str(path)) + 250
    assert [p.suffix for p in own_cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + GOOD.encode() + b"\n" + GOOD.encode() + b"\n",
    GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n",
    GOOD.encode() + b"\n" + GOOD.encode(),
    b"  " + GOOD.encode() + b"  \n" + b'{"label": 1, "more": [1], "text": "fine"}\n',
], ids=["byte order mark", "CRLF", "no newline at the end", "spaces, order, more fields"])  # fmt: skip
def test_files_that_other_systems_write_are_read_alike(tmp_path, bundled, content):
    """R15: none of these is a mistake."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    encoded = encode_file(path, "imdb", bundled, 512, quiet=True)
    expected = encode_rows([rendered("fine")], bundled, 512, "right")[0][0]
    assert [encoded[i][0].tolist() for i in range(len(encoded))] == [expected] * 2


def test_a_line_of_ten_megabytes_is_read(tmp_path, bundled):
    """R15: cut like any other."""
    path = write_rows(tmp_path / "train.jsonl", [{"text": "ab " * 100_000, "label": 0, "more": "x" * 10**7}])
    assert encode_file(path, "imdb", bundled, 512, quiet=True).lengths.tolist() == [512]


def parquet_file(path: Path, *rows: dict) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path.read_bytes()


def test_a_bad_row_of_a_parquet_file_is_named_by_number(tmp_path, bundled):
    """R15: as in JSONL."""
    path = tmp_path / "train.parquet"
    good = {"text": "fine", "label": 1}
    for bad, expected in (({"text": "fine", "label": 5}, "label is 5"), ({"text": None, "label": 1}, "NoneType")):
        parquet_file(path, good, bad)
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:2: .*{expected}.*"):
            encode_file(path, "imdb", bundled, 512, quiet=True)
    parquet_file(path, {"review": "fine", "stars": 3.5})
    with pytest.raises(DataError, match="found fields {'review': str, 'stars': float}, expected {text: str"):
        encode_file(path, "imdb", bundled, 512, quiet=True)
    parquet_file(path, {"text": "fine", "label": True})
    with pytest.raises(DataError, match="'label': bool"):
        encode_file(path, "imdb", bundled, 512, quiet=True)


def test_a_parquet_file_cut_short_or_damaged_is_an_error_of_one_line(tmp_path, bundled):
    """R5, R15: at any length."""
    path = tmp_path / "train.parquet"
    whole = parquet_file(path, *reviews(300))
    for keep in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: cannot be read as Parquet [^\n]+\)$"):
            encode_file(path, "imdb", bundled, 512, quiet=True)


@pytest.mark.parametrize("name, content", [
    ("train.jsonl", b""),
    ("train.parquet", pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.int64())])),
])  # fmt: skip
def test_a_file_without_rows_is_refused(tmp_path, bundled, name, content):
    """R19: never a run of 0 steps."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pyarrow.parquet.write_table(content.empty_table(), path)
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: no rows$"):
        encode_file(path, "imdb", bundled, 512, quiet=True)


def test_a_length_that_leaves_no_room_for_any_row_is_refused(tmp_path, bundled):
    """R19: all rows left out is an error, and names the flag."""
    path = write_rows(tmp_path / "train.jsonl", reviews(7))
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:1: .*--max_length 20, as in all 7 rows$"):
        encode_file(path, "imdb", bundled, 20, quiet=True)


# Where the rows are


def test_files_and_folders_are_found(tmp_path, monkeypatch):
    """A path to a file, to a folder, and a named set in --data_dir, from the hub, or the bundled sample."""
    for name in ("train.jsonl", "test.parquet", "notes.txt"):
        (tmp_path / name).write_text("")
    both = {"train": tmp_path / "train.jsonl", "test": tmp_path / "test.parquet"}
    assert resolve(str(tmp_path), None).files == both
    assert resolve("imdb", str(tmp_path)).files == both
    assert resolve(str(tmp_path / "train.jsonl"), None).files == {"train": tmp_path / "train.jsonl"}
    assert not resolve("imdb", str(tmp_path)).bundled_sample

    monkeypatch.setattr(data, "download_dataset", lambda *_: {"train": tmp_path / "a", "test": tmp_path / "b"})
    assert resolve("imdb", None) == data.Source("imdb", {"train": tmp_path / "a", "test": tmp_path / "b"})
    for hub, allowed in ((None, True), ({"train": tmp_path}, False)):
        monkeypatch.setattr(data, "download_dataset", lambda *_, hub=hub: hub)
        source = resolve("imdb", None, use_hub=allowed)
        assert source.bundled_sample and set(source.files) == {"train", "test"}
        assert all(path.is_relative_to(ROOT / "assets") for path in source.files.values())


def test_what_cannot_be_found_is_named(tmp_path, bundled):
    """R15, R17: no such folder, nothing in it, two train files, a name of another kind."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("two/train.jsonl", "two/train.parquet", "train.csv"):
        (tmp_path / name).write_text("")
    for call, expected in (
        (lambda: resolve("imbd", None), r"--data imbd: no such file or folder, nor one of .*imdb"),
        (lambda: resolve("imdb", str(tmp_path / "nowhere")), "nowhere: no such folder"),
        (lambda: resolve("imdb", str(tmp_path / "empty")), "no train or test file, expected train.parquet or train.js"),
        (lambda: resolve(str(tmp_path / "empty"), None), "no train or test file"),
        (lambda: resolve(str(tmp_path / "two"), None), "both train.parquet and train.jsonl; expected one train file"),
        (lambda: encode_file(tmp_path / "train.csv", "imdb", bundled, 512), "expected a name ending in .parquet or "),
        (lambda: encode_file(tmp_path / "gone.jsonl", "imdb", bundled, 512), "gone.jsonl: No such file"),
    ):
        with pytest.raises(DataError, match=expected) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_cache_folder_that_cannot_be_made_is_an_error_that_says_what_to_set(tmp_path, monkeypatch):
    """R17: a file is where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="set LLAMA_CACHE"):
        data.cache_folder()
    monkeypatch.delenv("LLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_folder() == tmp_path / "xdg" / "llama-fine-tuning"


# The cache


@pytest.fixture
def encoded_batches(monkeypatch) -> list[int]:
    """The number of rows of each batch that was really encoded."""
    batches, real = [], data.encode_rows

    def counting(rows, *rest):
        batches.append(len(rows))
        return real(rows, *rest)

    monkeypatch.setattr(data, "encode_rows", counting)
    return batches


def tokenizer_in(folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    file = folder / "tokenizer.model"
    if not file.exists():
        file.write_bytes(BUNDLED.read_bytes())
    return load_tokenizer(folder)


def test_a_second_call_reads_what_the_first_one_encoded(tmp_path, own_cache, encoded_batches):
    """R21: also for another file of the same content; what it reads is mapped, not loaded."""
    rows, tokenizer = reviews(2500), tokenizer_in(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "train.jsonl", rows)
    first = encode_file(path, "imdb", tokenizer, 128, quiet=True)
    assert encoded_batches == [2000, 500]
    copy = write_rows(tmp_path / "copy.jsonl", rows)
    for again in (encode_file(p, "imdb", tokenizer, 128, quiet=True) for p in (path, copy)):
        assert isinstance(again.tokens, np.memmap) and isinstance(again.is_answer, np.memmap)
        assert np.array_equal(again.tokens, first.tokens) and np.array_equal(again.offsets, first.offsets)
        assert (again.truncated, again.rejected) == (first.truncated, first.rejected)
    assert encoded_batches == [2000, 500]
    assert sorted(p.suffix for p in own_cache.iterdir()) == ["", ".lock"]


def test_a_change_of_anything_that_matters_makes_a_new_cache(tmp_path, own_cache, encoded_batches):
    """R21: one byte of the data or of the tokenizer's files, the length, the side."""
    path = write_rows(tmp_path / "train.jsonl", reviews(10))
    folder = tmp_path / "tokenizer"
    encode_file(path, "imdb", tokenizer_in(folder), 128, quiet=True)

    def change_data() -> None:
        path.write_bytes(path.read_bytes().replace(b'"label": 1', b'"label": 0', 1))

    def change_tokenizer() -> None:
        file = folder / "tokenizer.model"
        file.write_bytes(file.read_bytes() + b"\x1a\x00")  # an empty message: the same tokenizer, other bytes

    def add_tokenizer_file() -> None:
        (folder / "tokenizer_config.json").write_text("{}")

    arguments = {"max_length": 128, "truncate_side": "right"}
    changes = (change_data, change_tokenizer, add_tokenizer_file, lambda: arguments.update(max_length=129),
               lambda: arguments.update(truncate_side="left"))  # fmt: skip
    for number, change in enumerate(changes, 2):
        change()
        for _ in range(2):
            encode_file(path, "imdb", tokenizer_in(folder), **arguments, quiet=True)
            assert len(encoded_batches) == number
    assert len([p for p in own_cache.iterdir() if p.is_dir()]) == 6


WORKER = """
import hashlib, sys, time
sys.path.insert(0, {root!r})
import data, fcntl
from llama.tokenizer import load_tokenizer
from pathlib import Path

real, batches = data.encode_rows, []

def watched(rows, *rest):
    batches.append(len(rows))
    print("encoding", len(batches), flush=True)
    if {stop_at} == len(batches):
        time.sleep(1000)
    return real(rows, *rest)

def no_locks(*_):
    raise OSError(37, "No locks available")

data.encode_rows = watched
if {without_locks}:
    fcntl.flock = no_locks
print("ready", flush=True)
sys.stdin.readline()
encoded = data.encode_file(Path({path!r}), "imdb", load_tokenizer({tokenizer!r}), 128, quiet=True)
print("done", len(batches), len(encoded), hashlib.sha256(encoded.tokens.tobytes()).hexdigest(), flush=True)
"""


def start_worker(path: Path, stop_at: int = 0, without_locks: bool = False) -> subprocess.Popen:
    """A process that encodes `path` once it is told to, and sleeps for ever in its batch `stop_at`."""
    code = WORKER.format(root=str(ROOT), path=str(path), tokenizer=str(BUNDLED), stop_at=stop_at,
                         without_locks=without_locks)  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


def go(worker: subprocess.Popen) -> None:
    assert worker.stdout.readline() == "ready\n"
    worker.stdin.write("\n")
    worker.stdin.flush()


def read_until(worker: subprocess.Popen, line: str) -> None:
    while (said := worker.stdout.readline()) != line:
        assert said, "the worker has ended"


def test_a_killed_encoder_publishes_nothing_and_whoever_waits_takes_over(tmp_path, own_cache, bundled, encoded_batches):
    """R21: kill -9 in the second of two batches; what it left behind is removed, and the lock is free."""
    path = write_rows(tmp_path / "train.jsonl", reviews(2100))
    worker = start_worker(path, stop_at=2)
    results = []
    waiting = threading.Thread(
        target=lambda: results.append(encode_file(path, "imdb", bundled, 128, quiet=True)), daemon=True)
    try:
        go(worker)
        read_until(worker, "encoding 2\n")
        (left_over,) = [p for p in own_cache.iterdir() if p.is_dir()]
        assert ".tmp" in left_over.name and (left_over / "tokens.raw").exists()
        waiting.start()
        time.sleep(0.3)
        assert not results and not encoded_batches  # another process is at it
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
    waiting.join(60)
    assert len(results) == 1 and len(results[0]) == 2100 and encoded_batches == [2000, 100]
    (published,) = [p for p in own_cache.iterdir() if p.is_dir()]
    assert published.name == left_over.name.split(".")[0]
    assert np.array_equal(results[0].tokens, EncodedData(published).tokens)


@pytest.mark.parametrize("without_locks", [False, True], ids=["with locks", "on a file system without locks"])
def test_two_processes_at_once_both_succeed_and_give_the_same(tmp_path, own_cache, bundled, without_locks):
    """R21, C43: with locks only one of them works; without, both do, and neither harms the other."""
    path = write_rows(tmp_path / "train.jsonl", reviews(4100))
    workers = [start_worker(path, without_locks=without_locks) for _ in range(2)]
    for worker in workers:
        go(worker)
    told = [worker.communicate(timeout=120)[0].splitlines()[-1].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    encoded = encode_file(path, "imdb", bundled, 128, quiet=True)
    digest = hashlib.sha256(encoded.tokens.tobytes()).hexdigest()
    assert [[rows, found] for _, _, rows, found in told] == [["4100", digest]] * 2
    if not without_locks:
        assert sorted(batches for _, batches, _, _ in told) == ["0", "3"]
    assert sorted(p.suffix for p in own_cache.iterdir()) == ["", ".lock"]


def test_a_damaged_cache_is_named(tmp_path, own_cache, bundled):
    """R5, R21: cut short by a full disk or a crash of the machine; never a traceback, never wrong tokens."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    encode_file(path, "imdb", bundled, 128, quiet=True)
    [folder] = [p for p in own_cache.iterdir() if p.is_dir()]
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"^{re.escape(str(folder))}: damaged, delete it"):
        encode_file(path, "imdb", bundled, 128, quiet=True)


def test_an_encoder_that_fails_leaves_nothing_behind(tmp_path, own_cache, bundled, monkeypatch):
    """R21, R3: nor does one that is interrupted."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    for error, seen in ((OSError(28, "No space left on device"), DataError),
                        (KeyboardInterrupt(), KeyboardInterrupt)):
        with monkeypatch.context() as patched:
            patched.setattr(np, "save", lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(seen):
                encode_file(path, "imdb", bundled, 128, quiet=True)
        assert [p.suffix for p in own_cache.iterdir()] == [".lock"]
    assert len(encode_file(path, "imdb", bundled, 128, quiet=True)) == 5


@settings(derandomize=True, database=None, max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=30), side=st.sampled_from(["left", "right"]), length=st.integers(80, 130))
def test_any_text_is_rendered_and_fits(text, side, length):
    """C17, R16: whatever Unicode it is made of; or it is refused for being empty."""
    tokenizer = load_tokenizer(BUNDLED)
    try:
        text.encode()
        assert text.strip()
    except (UnicodeEncodeError, AssertionError):
        with pytest.raises(DataError, match="^here: "):
            rendered(text)
        return
    (example,) = encode_rows([rendered(text, 0)], tokenizer, length, side)
    fixed = len(encode_rows([[s for s in rendered("x", 0) if not s.may_cut]], tokenizer, 1000, "right")[0][0])
    assert (example is None) == (fixed > length)
    if example:
        ids, is_answer, _ = example
        assert fixed <= len(ids) <= length and sum(is_answer) == 1 and is_answer[-1]
