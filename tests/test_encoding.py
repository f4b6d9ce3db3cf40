"""From segments to cached examples: labels survive, bad rows are told and counted, caches are whole."""

import builtins
import gzip
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

import llama.data.encoding
import llama.data.templates
from llama.data.cache import cache_folder
from llama.data.chat import Chat
from llama.data.encoding import EXAMPLES, TOKENS, BadRows, EncodedData, encode_file, encode_rows
from llama.data.rows import DataError
from llama.data.templates import END, TEMPLATES, Segment, Template
from llama.data.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "assets" / "tiny" / "tokenizer.model"
IMDB = TEMPLATES["imdb"]
ARRAYS = ("tokens", "is_answer", "starts", "stops", "label_counts", "answers", "rows", "was_cut")

HOSTILE = ["</s>", "<s>", "<|im_end|>", "<|endoftext|>", "<unk>", "{text}", "{label}", "{0.__class__}", "%s",
           "%(text)s", "{{}}", "[[", "]]", "=====", "#### Answer:", " negative", "<0x0A>"]  # fmt: skip
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

    bos_id, eos_id, files = 300, 301, (BUNDLED,)

    def encode_batch(self, texts: list[str], continues: bool = False) -> list[list[int]]:
        begin = [] if continues else [self.bos_id]
        return [begin + ([256] if text == " positive" else list(text.encode())) for text in texts]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts with odd spaces, scripts, markup and whatever looks like a control token or a template."""
    generator = random.Random(seed)
    mixed = [*WORDS, *HOSTILE, " ", "  ", "\n", "\r\n", "\t"]
    pools = [[f"{word} " for word in WORDS], mixed, list(" \n\tae'."), HOSTILE]
    return ["".join(generator.choices(generator.choice(pools), k=generator.randrange(1, 20))) + "." * (i % 3 == 0)
            for i in range(count)]


def rendered(text: str, label: int = 1) -> list[Segment]:
    return IMDB.render({"text": text, "label": label}, "here")[0]


BEFORE, AFTER = rendered("x")[0].text, rendered("x")[2].text


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict], **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def reviews(count: int) -> list[dict]:
    texts = [text if text.strip() else "empty" for text in random_texts(count)]
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


def questions(count: int) -> list[dict]:
    """Rows whose answers are free text, every third without an input."""
    texts = [text if text.strip() else "empty" for text in random_texts(3 * count, seed=3)]
    return [{"instruction": texts[i], "input": "" if i % 3 == 0 else texts[count + i], "output": texts[2 * count + i]}
            for i in range(count)]


def same(a: EncodedData, b: EncodedData, *names: str) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) and len(getattr(a, name)) for name in names or ARRAYS)


def examples_of(encoded: EncodedData) -> list[tuple[list[int], list[bool]]]:
    return [(ids.tolist(), labelled.tolist()) for ids, labelled in (encoded[i] for i in range(len(encoded)))]


# Segments become ids


def test_with_llama_2_the_answers_are_one_token_each_and_no_lone_space_comes_before(assets):
    """C13: ids 8178 and 6374 as the notebook has them, and never 29871, the trailing space of its prompt."""
    tokenizer = load_tokenizer(assets / "llama2-tokenizer")
    for text in random_texts(300):
        text = text.strip() + "x"
        for label, answer in ((0, 8178), (1, 6374)):
            ((ids, is_answer, _),) = encode_rows([rendered(text, label)], tokenizer, 10_000, "right")
            assert ids[-1] == answer and sum(is_answer) == 1
            assert ids[-2] != 29871
    for fixed in (BEFORE, AFTER):
        assert 29871 not in tokenizer.encode(fixed, continues=fixed == AFTER)


def test_examples_do_not_depend_on_what_they_are_encoded_with(bundled):
    """A batch, a file, or alone: the same ids."""
    rows = [rendered(text, i % 2) for i, text in enumerate(random_texts(400)) if text.strip()]
    together = encode_rows(rows, bundled, 120, "left")
    assert together == [encode_rows([row], bundled, 120, "left")[0] for row in rows]
    order = random.Random(1).sample(range(len(rows)), len(rows))
    assert encode_rows([rows[i] for i in order], bundled, 120, "left") == [together[i] for i in order]


def test_control_segments_are_one_token_by_name_and_the_end_is_the_tokenizers_own(tokenizer):
    """C15, C18: the same name as text is spelled out instead; a control segment that comes first follows BOS."""
    name = next(token for token in ("</s>", "<|im_end|>") if tokenizer.has_control(token))
    control, text, end = Segment(name, answer=True, control=True), Segment(name), Segment(END, True, control=True)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    spelled = tokenizer.encode(name, continues=True)
    ((ids, labelled, _),) = encode_rows([[control, text, end]], tokenizer, 100, "right")
    assert ids == [*begin, tokenizer.control_id(name), *spelled, tokenizer.eos_id] and len(spelled) > 1
    assert labelled == [False] * len(begin) + [bool(begin)] + [False] * len(spelled) + [True]


def test_a_segment_that_begins_is_encoded_as_a_document_of_its_own(tokenizer):
    """C14: a BOS for each document, where the tokenizer has one, and for nothing else."""
    segments = [Segment("One", begins=True), Segment(" two", answer=True), Segment("One", begins=True),
                Segment("One", answer=True)]  # fmt: skip
    ((ids, _, _),) = encode_rows([segments], tokenizer, 100, "right")
    one, two, joined = tokenizer.encode("One"), *tokenizer.encode_batch([" two", "One"], continues=True)
    assert ids == [*one, *two, *one, *joined]
    assert tokenizer.bos_id is None or ids.count(tokenizer.bos_id) == 2


@pytest.mark.parametrize("source", ["[[{text}]]", "{text...}[[{text}]]", "[[{text=a,b}]]"])
def test_the_first_token_of_an_example_is_never_a_label(tokenizer, source):
    """C3: nothing comes before it that could predict it, also where the answer is the whole text."""
    template = Template("whole", source)
    for length in (2, 3, 5, 50):
        for text in ["a", "b"] if "=" in source else random_texts(20):
            segments = template.render({"text": text if text.strip() else "empty"}, "here")[0]
            (example,) = encode_rows([segments], tokenizer, length, "left")
            if example is None:  # a single token without BOS: then nothing is left to learn
                assert tokenizer.bos_id is None and not template.answers == ()
            else:
                assert not example.is_answer[0] and any(example.is_answer)
                assert len(example.ids) == len(example.is_answer) <= length


# Truncation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [84, 90, 120, 500])
def test_truncation_takes_only_the_review_and_only_from_the_chosen_side(tokenizer, side, length):
    """C16, C17: what stays of the review is its beginning or its end, and every label is there."""
    fixed = [tokenizer.encode(BEFORE), tokenizer.encode(AFTER, continues=True)]
    texts = [text for text in random_texts(100, seed=2) if text.strip()]
    for label in (0, 1):
        answer = tokenizer.encode(IMDB.answers[label], continues=True)
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
def test_a_prompt_is_cut_before_a_free_answer_and_a_cut_answer_has_no_end(tokenizer, side):
    """C15, C16, C17: at every length, from all of it down to no label at all, which is no example."""
    row = {"instruction": "Say what you saw.", "input": "A quick film, naïve 映画 of great beauty",
           "output": "no plot and the worst I ever saw"}  # fmt: skip
    segments, answer = TEMPLATES["alpaca"].render(row, "here")
    before, after = tokenizer.encode(segments[0].text), tokenizer.encode("\n\n### Response:\n", continues=True)
    given, wanted = tokenizer.encode_batch([row["input"], row["output"]], continues=True)
    full = len(before) + len(given) + len(after) + len(wanted) + 1
    assert answer == -1
    for length in range(2, full + 2):
        (example,) = encode_rows([segments], tokenizer, length, side)
        room = length - len(before) - len(after) - len(wanted) - 1  # for the input
        kept = given if room >= len(given) else [] if room <= 0 else given[-room:] if side == "left" else given[:room]
        spoken = [*wanted, tokenizer.eos_id][: max(0, length - len(before) - len(after) - len(kept))]
        if not spoken:
            assert example is None
            continue
        assert example.ids == [*before, *kept, *after, *spoken] and len(example.ids) <= length
        assert example.is_answer == [False] * (len(example.ids) - len(spoken)) + [True] * len(spoken)
        assert example.was_cut == (length < full)
        assert (tokenizer.eos_id in example.ids) == (len(spoken) == len(wanted) + 1)


def test_a_conversation_is_cut_at_its_end_and_a_cut_turn_carries_no_end(tokenizer):
    """C15, C16: what is left ends with a label, and whole turns before keep the token that ends them."""
    turns = [("user", "Which film was it?"), ("assistant", "The worst ever."), ("user", "Why so?"),
             ("assistant", "No plot, no beauty.")]  # fmt: skip
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    for layout in ("llama2", "prompter"):
        segments, _ = Chat(layout).render(row, "here")
        ((ids, labelled, was_cut),) = encode_rows([segments], tokenizer, 1000, "right")
        assert not was_cut and ids.count(tokenizer.eos_id) == (4 if layout == "prompter" else 2)
        for length in range(2, len(ids)):
            (example,) = encode_rows([segments], tokenizer, length, "right")
            learned = [i for i in range(length) if labelled[i]]
            if not learned:
                assert example is None
            else:
                stop = learned[-1] + 1
                assert example == (ids[:stop], labelled[:stop], True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_begins_the_document_is_cut_after_its_beginning_of_text(bundled, side):
    """C14, C17: as in templates whose first segment may be cut."""
    segments = [Segment("one two three four five", may_cut=True), Segment(" done", answer=True)]
    first, last = bundled.encode("one two three four five"), bundled.encode(" done", continues=True)
    ((ids, _, _),) = encode_rows([segments], bundled, len(last) + 4, side)
    assert ids == [bundled.bos_id, *(first[-3:] if side == "left" else first[1:4]), *last]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_cut_alike_whatever_its_answer_and_also_without_one(side):
    """C13: were the room for a short answer given to the review, the length of a prompt would tell the answer."""
    fake, room, text = ByteTokenizer(), len(" negative"), "0123456789" * 3
    fixed = len(BEFORE) + 1 + len(AFTER)
    for length in range(fixed + room, fixed + room + len(text) + 2):
        rows = [rendered(text, 0), rendered(text, 1), rendered(text)[:-1]]
        negative, positive, none = encode_rows(rows, fake, length, side, answer_room=room)
        assert negative[0][:-9] == positive[0][:-1] == none[0] and len(negative[0]) <= length
        assert negative[2] == positive[2] == (length < fixed + room + len(text))
    assert encode_rows(rows, fake, fixed + room - 1, side, answer_room=room) == [None] * 3


def test_files_leave_the_room_of_the_longest_answer(tmp_path):
    """C13: `encode_file` asks for it."""
    path = write_rows(tmp_path / "train.jsonl", [{"text": "0123456789", "label": label} for label in (0, 1)])
    encoded = encode_file(path, IMDB, ByteTokenizer(), len(BEFORE + AFTER) + 1 + 9 + 4, quiet=True)
    prompts = [ids[~is_answer].tolist() for ids, is_answer in (encoded[0], encoded[1])]
    assert prompts[0] == prompts[1] and bytes(prompts[0][1:]).decode().endswith("0123\n\n#### Answer:")
    assert encoded.label_counts.tolist() == [9, 1]


def test_truncated_examples_are_counted_and_those_that_fit_exactly_are_not(tmp_path, bundled):
    """C17: the count is of rows that lost something."""
    texts = ["I liked it.", "I liked it very much.", "I"]
    lengths = [len(encode_rows([rendered(text)], bundled, 1000, "right")[0][0]) for text in texts]
    path = write_rows(tmp_path / "train.jsonl", [{"text": text, "label": 1} for text in texts])
    cut = {n: encode_file(path, IMDB, bundled, n, quiet=True).was_cut.tolist() for n in lengths}
    assert cut == {n: [length > n for length in lengths] for n in lengths}
    assert sorted(map(sum, cut.values())) == [0, 1, 2]


@settings(derandomize=True, database=None, max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=30), side=st.sampled_from(["left", "right"]), length=st.integers(80, 130))
def test_any_text_is_rendered_and_fits(text, side, length):
    """C17, R16: whatever Unicode it is made of; or it is refused for being empty or no text."""
    tokenizer = load_tokenizer(BUNDLED)
    if not text.strip() or re.search("[\0\ud800-\udfff]", text):
        with pytest.raises(DataError, match="^here: "):
            rendered(text)
        return
    (example,) = encode_rows([rendered(text, 0)], tokenizer, length, side)
    fixed = len(encode_rows([[s for s in rendered("x", 0) if not s.may_cut]], tokenizer, 1000, "right")[0][0])
    assert (example is None) == (fixed > length)
    if example:
        ids, is_answer, _ = example
        assert fixed <= len(ids) <= length and sum(is_answer) == 1 and is_answer[-1]


# Files become examples


@pytest.mark.parametrize("template, rows", [("imdb", reviews), ("alpaca", questions)])
def test_jsonl_gzip_and_parquet_give_identical_examples(tmp_path, bundled, template, rows):
    """Every array, byte for byte: with many row groups, and with a single one."""
    rows = rows(500)
    jsonl = write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    paths = [tmp_path / "train.jsonl.gz", write_parquet(tmp_path / "many.parquet", rows, row_group_size=77),
             write_parquet(tmp_path / "single.parquet", rows)]  # fmt: skip
    expected = encode_file(jsonl, TEMPLATES[template], bundled, 150, skip_bad_rows=True, quiet=True)
    assert 300 < len(expected) == 500 - expected.bad_rows and 0 < expected.was_cut.sum() < len(expected)
    for path in paths:
        found = encode_file(path, TEMPLATES[template], bundled, 150, skip_bad_rows=True, quiet=True)
        assert same(found, expected) and found.fingerprint == expected.fingerprint, path
        assert found.bad == [line.replace(str(jsonl), str(path)) for line in expected.bad]


def test_encoded_data_gives_each_row_as_encoded_alone(tmp_path, bundled):
    """No batch effect: over an edge between two batches of rows, in the order of the file."""
    rows = reviews(2100)
    encoded = encode_file(write_rows(tmp_path / "train.jsonl", rows), IMDB, bundled, 110, "left", quiet=True)
    assert len(encoded) == len(rows) and encoded.answers.tolist() == [row["label"] for row in rows]
    for i in [*range(5), *range(1995, 2005), 2099]:
        ((ids, is_answer, was_cut),) = encode_rows([rendered(**rows[i])], bundled, 110, "left", answer_room=1)
        assert encoded[i][0].tolist() == ids and encoded[i][1].tolist() == is_answer
        assert encoded.lengths[i] == len(ids) and encoded.label_counts[i] == sum(is_answer)
        assert encoded.was_cut[i] == was_cut and encoded.rows[i] == i + 1


def test_free_answers_are_encoded_row_by_row_and_have_no_answer_word(tmp_path, bundled):
    """C12, C15: the prompt is a prefix, then the answer and its end."""
    rows = questions(60)
    encoded = encode_file(write_rows(tmp_path / "train.jsonl", rows), TEMPLATES["alpaca"], bundled, 4000, quiet=True)
    assert set(encoded.answers.tolist()) == {-1} and not encoded.was_cut.any()
    for row, (ids, labelled) in zip(rows, examples_of(encoded), strict=True):
        answer = [*bundled.encode(row["output"], continues=True), bundled.eos_id]
        assert ids[-len(answer) :] == answer and labelled == [False] * (len(ids) - len(answer)) + [True] * len(answer)
        assert ("### Input:" in bundled.decode(ids)) == bool(row["input"])


def test_a_subset_keeps_the_order_that_was_asked_for(tmp_path, bundled):
    """Everything about an example goes along with it; a subset has subsets, and none knows the whole's lengths."""
    encoded = encode_file(write_rows(tmp_path / "a.jsonl", reviews(30)), IMDB, bundled, 90, quiet=True)
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
    encoded = encode_file(write_rows(tmp_path / "a.jsonl", reviews(9)), IMDB, bundled, 90, quiet=True)
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
    encoded = encode_file(write_rows(tmp_path / "a.jsonl", rows), IMDB, bundled, 90, quiet=True)
    again = encode_file(write_parquet(tmp_path / "b.parquet", rows), IMDB, bundled, 90, quiet=True)
    assert encoded.fingerprint == again.fingerprint == encoded.subset(np.arange(12)).fingerprint
    flipped = [rows[0] | {"label": 1 - rows[0]["label"]}, *rows[1:]]
    different = [
        encoded, encoded.labelling_prompts(), encoded.subset(np.arange(11)), encoded.subset(np.arange(1, 12)),
        encoded.subset(np.arange(12)[::-1]), encoded.subset(np.arange(6)), encoded.subset(np.arange(6, 12)),
        encoded.subset(np.arange(6)).labelling_prompts(),
        encode_file(write_rows(tmp_path / "c.jsonl", flipped), IMDB, bundled, 90, quiet=True),
    ]  # fmt: skip
    assert len({part.fingerprint for part in different}) == len(different)


# Bad rows

GOOD = '{"text": "fine", "label": 1}'
BAD_ROWS = {
    "broken JSON": ('{"text": "fine", "label": 1', "not valid JSON"),
    "Latin-1": (b'{"text": "caf\xe9", "label": 1}', "byte 13 is not UTF-8"),
    "blank line": ("", "not valid JSON"),
    "a list": ("[1, 2]", "found list, expected a JSON object"),
    "missing field": ('{"label": 1}', "found fields {'label': int}, expected {text: str, label: int or word}"),
    "no fields": ("{}", "found fields {}, expected"),
    "misnamed field": ('{"review": "fine", "label": 1}', "{'review': str, 'label': int}"),
    "line breaks in a name": ('{"te\\nxt": "fine", "label": 1}', "te\\nxt"),
    "text not a string": ('{"text": 7, "label": 1}', "'text': int"),
    "null text": ('{"text": null, "label": 1}', "'text': NoneType"),
    "null label": ('{"text": "fine", "label": null}', "'label': NoneType"),
    "boolean label": ('{"text": "fine", "label": true}', "'label': bool"),
    "label as text": ('{"text": "fine", "label": "1"}', "label is '1', expected 0 (negative) or 1 (positive)"),
    "line breaks in a label": ('{"text": "fine", "label": "1\\n2\\u2028"}', "label is '1\\n2\\u2028'"),
    "fraction as label": ('{"text": "fine", "label": 1.0}', "'label': float"),
    "list as label": ('{"text": "fine", "label": [1]}', "'label': list"),
    "label out of range": ('{"text": "fine", "label": 2}', "label is 2, expected 0 (negative) or 1 (positive)"),
    "negative label": ('{"text": "fine", "label": -1}', "label is -1, expected 0"),
    "empty text": ('{"text": "", "label": 1}', "text is empty"),
    "only spaces": ('{"text": " \\n\\t", "label": 1}', "text is empty"),
    "half a character": ('{"text": "a\\ud800", "label": 1}', "character 1 of text is a lone surrogate"),
    "NUL": ('{"text": "ab\\u0000", "label": 1}', "character 2 of text is NUL"),
}


def write_lines(path: Path, lines: list[str | bytes]) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_number_in_one_line(tmp_path, bundled, case):
    """R15: what was found and what was expected; a second try says the same."""
    line, expected = BAD_ROWS[case]
    path = write_lines(tmp_path / "train.jsonl", [GOOD, GOOD, line, GOOD])
    for _ in range(2):
        with pytest.raises(BadRows) as error:
            encode_file(path, IMDB, bundled, 512, quiet=True)
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
    clean = encode_file(write_lines(tmp_path / "clean.jsonl", [GOOD] * 3), IMDB, bundled, 512, quiet=True)
    assert (clean.bad_rows, clean.bad) == (0, [])
    for _ in range(2):
        encoded = encode_file(path, IMDB, bundled, 512, skip_bad_rows=True, quiet=True)
        assert same(encoded, clean, *set(ARRAYS) - {"rows"}) and encoded.rows.tolist() == [1, 3, 4]
        assert encoded.bad_rows == 1 and len(encoded.bad) == 1
        assert encoded.bad[0].startswith(f"{path}:2: ") and expected in encoded.bad[0]


def spoiled(count: int) -> tuple[list[str | bytes], list[int]]:
    """`count` lines of which every seventh is bad, in one way after the other; and the numbers of those."""
    lines: list[str | bytes] = [json.dumps(row) for row in reviews(count)]
    ways = [line for line, _ in BAD_ROWS.values()]
    bad = list(range(3, count + 1, 7))
    for n, number in enumerate(bad):
        lines[number - 1] = ways[n % len(ways)]
    return lines, bad


@pytest.mark.parametrize("batch", [10, 2000])
def test_the_first_five_bad_rows_are_told_and_all_are_counted(tmp_path, bundled, monkeypatch, batch):
    """R15: whether or not they lie in one batch."""
    monkeypatch.setattr(llama.data.encoding, "BATCH_ROWS", batch)
    lines, bad = spoiled(200)
    path = write_lines(tmp_path / "train.jsonl", lines)
    with pytest.raises(BadRows) as error:
        encode_file(path, IMDB, bundled, 512, quiet=True)
    *told, total = error.value.lines
    assert [line.split(": ")[0] for line in told] == [f"{path}:{number}" for number in bad[:5]]
    assert total.startswith(f"{path}: {len(bad)} of 200 rows cannot be used; ")


@pytest.mark.parametrize("batch", [10, 2000])
def test_what_is_left_of_a_file_with_bad_rows_is_exactly_a_clean_file(tmp_path, bundled, monkeypatch, batch):
    """R15: --skip_bad_rows changes nothing about the other rows, and each knows its number in the file."""
    monkeypatch.setattr(llama.data.encoding, "BATCH_ROWS", batch)
    lines, bad = spoiled(200)
    good = [number for number in range(1, 201) if number not in bad]
    clean = write_lines(tmp_path / "clean.jsonl", [lines[number - 1] for number in good])
    expected = encode_file(clean, IMDB, bundled, 120, quiet=True)
    found = encode_file(write_lines(tmp_path / "a.jsonl", lines), IMDB, bundled, 120, skip_bad_rows=True, quiet=True)
    assert same(found, expected, *set(ARRAYS) - {"rows"}) and found.fingerprint == expected.fingerprint
    assert found.rows.tolist() == good and found.bad_rows == len(bad)
    assert [line.split(": ")[0] for line in found.bad] == [f"{tmp_path / 'a.jsonl'}:{number}" for number in bad[:5]]


def test_bad_rows_of_a_parquet_file_are_named_by_number(tmp_path, bundled):
    """R15: as in JSONL."""
    path, good = tmp_path / "train.parquet", {"text": "fine", "label": 1}
    cases = [({"text": "fine", "label": 5}, "label is 5"), ({"text": None, "label": 1}, "NoneType"),
             ({"text": "a\0b", "label": 1}, "character 1 of text is NUL")]  # fmt: skip
    write_parquet(path, [good, *(bad for bad, _ in cases), good], row_group_size=2)
    with pytest.raises(BadRows) as error:
        encode_file(path, IMDB, bundled, 512, quiet=True)
    assert len(error.value.lines) == 4
    for number, (line, (_, expected)) in enumerate(zip(error.value.lines, cases, strict=False), 2):
        assert line.startswith(f"{path}:{number}: ") and expected in line
    assert encode_file(path, IMDB, bundled, 512, skip_bad_rows=True, quiet=True).rows.tolist() == [1, 5]
    write_parquet(path, [{"review": "fine", "stars": 3.5}])
    with pytest.raises(BadRows, match="found fields {'review': str, 'stars': float}, expected {text: str"):
        encode_file(path, IMDB, bundled, 512, quiet=True)
    write_parquet(path, [{"text": "fine", "label": True}])
    with pytest.raises(BadRows, match="'label': bool"):
        encode_file(path, IMDB, bundled, 512, quiet=True)


def test_a_text_too_long_to_tokenize_is_a_bad_row_also_in_parquet(tmp_path, bundled, monkeypatch):
    """R15: no line of a JSONL file may be so long, and no field of any file."""
    monkeypatch.setattr(llama.data.templates, "LONGEST_LINE", 100)
    rows = [{"text": "x" * n, "label": 1} for n in (100, 101, 1)]
    path = write_parquet(tmp_path / "train.parquet", rows)
    found = encode_file(path, IMDB, bundled, 512, skip_bad_rows=True, quiet=True)
    assert found.rows.tolist() == [1, 3] and found.bad == [f"{path}:2: text has 101 characters, expected 100 at most"]


QUESTION = Template("question", "{question}[[ {label=negative,positive}]]")


def test_rows_that_leave_no_label_are_bad_rows(tmp_path, bundled):
    """C3, C17: every third row has a question too long, which may not be cut; the others stay as they are."""
    rows = [{"question": f"{'Why? ' * 60 if i % 3 == 0 else 'short'} {i}", "label": i % 2} for i in range(20)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(BadRows) as error:
        encode_file(path, QUESTION, bundled, 60, quiet=True)
    *told, total = error.value.lines
    assert [line.split(": ")[0] for line in told] == [f"{path}:{number}" for number in (1, 4, 7, 10, 13)]
    assert all("--max_length 60" in line for line in told) and total.startswith(f"{path}: 7 of 20 rows ")
    encoded = encode_file(path, QUESTION, bundled, 60, skip_bad_rows=True, quiet=True)
    assert encoded.bad_rows == 7 and encoded.bad == told
    kept = [i for i in range(20) if i % 3]
    assert encoded.answers.tolist() == [i % 2 for i in kept] and encoded.rows.tolist() == [i + 1 for i in kept]
    assert all(f"short {i}" in bundled.decode(encoded[n][0]) for n, i in enumerate(kept))


@pytest.mark.parametrize("batch", [2, 2000])
def test_bad_rows_of_every_kind_are_counted_together(tmp_path, bundled, monkeypatch, batch):
    """R15, C3: who mends all that were counted is done: those that leave no label are told along with broken ones."""
    monkeypatch.setattr(llama.data.encoding, "BATCH_ROWS", batch)
    good, long = {"question": "short", "label": 1}, {"question": "Why? " * 60, "label": 1}
    lines = [json.dumps(good), "{", json.dumps(long), json.dumps(good), json.dumps(long), "[]"]
    path = write_lines(tmp_path / "train.jsonl", lines)
    skipped = encode_file(path, QUESTION, bundled, 60, skip_bad_rows=True, quiet=True)
    assert skipped.bad_rows == 4 and skipped.rows.tolist() == [1, 4]
    with pytest.raises(BadRows) as error:
        encode_file(path, QUESTION, bundled, 60, quiet=True)
    *told, total = error.value.lines
    assert [line.split(": ")[0] for line in told] == [f"{path}:{number}" for number in (2, 3, 5, 6)]
    assert told == skipped.bad
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
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: no rows$"):
        encode_file(path, IMDB, bundled, 512, skip_bad_rows=skip, quiet=True)


def test_a_file_all_of_whose_rows_are_bad_is_refused_even_when_skipping(tmp_path, bundled):
    """R19: broken, or without room for a label: with the number of rows, in one line."""
    broken = write_lines(tmp_path / "broken.jsonl", ["{", "[]", '{"text": ""}'])
    long = write_rows(tmp_path / "long.jsonl", reviews(7))
    for path, length, count, reason in ((broken, 512, 3, "not valid JSON"), (long, 20, 7, "--max_length 20")):
        with pytest.raises(DataError) as error:
            encode_file(path, IMDB, bundled, length, skip_bad_rows=True, quiet=True)
        (told,) = error.value.lines
        assert told.startswith(f"{path}: none of {count} rows can be used")
        with pytest.raises(BadRows) as error:
            encode_file(path, IMDB, bundled, length, quiet=True)
        assert reason in error.value.lines[0] and f"{count} of {count} rows cannot be used" in error.value.lines[-1]


def test_files_damaged_as_a_whole_are_refused_even_when_skipping(tmp_path, own_cache, bundled):
    """R5, R15: how many rows are lost, nobody can tell."""
    content = write_rows(tmp_path / "a.jsonl", reviews(3000)).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content)[:-20])
    write_parquet(tmp_path / "c.parquet", reviews(300))
    (tmp_path / "c.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-9])
    for name, kind in (("b.jsonl.gz", "gzip"), ("c.parquet", "Parquet")):
        for skip in (False, True):
            with pytest.raises(DataError, match=rf"{name}: cannot be read as {kind} after row \d+ \(") as error:
                encode_file(tmp_path / name, IMDB, bundled, 512, skip_bad_rows=skip, quiet=True)
            assert len(error.value.lines) == 1
    assert {p.suffix for p in own_cache.iterdir()} == {".lock"}


def test_files_that_cannot_be_opened_are_named(tmp_path, bundled):
    """R15: one that is not there, a folder, a name of another kind."""
    (tmp_path / "train.csv").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for name, expected in (("train.csv", "expected a name ending in .parquet or .jsonl"),
                           ("gone.jsonl", "gone.jsonl: No such file"), ("folder.jsonl", "Is a directory")):
        with pytest.raises(DataError, match=expected) as error:
            encode_file(tmp_path / name, IMDB, bundled, 512, quiet=True)
        assert len(error.value.lines) == 1


# Rows of one category


def test_a_category_is_its_rows_and_no_others(tmp_path, bundled):
    """The same examples as of a file that has only those; rows keep their numbers."""
    rows = [row | {"category": ["open_qa", "summarization", "open"][i % 3]} for i, row in enumerate(reviews(60))]
    path = write_rows(tmp_path / "all.jsonl", rows)
    only = write_rows(tmp_path / "only.jsonl", rows[2::3])
    found, expected = encode_file(path, IMDB, bundled, 512, category="open", quiet=True), \
        encode_file(only, IMDB, bundled, 512, quiet=True)
    assert same(found, expected, *set(ARRAYS) - {"rows"}) and found.rows.tolist() == list(range(3, 61, 3))
    assert len(encode_file(path, IMDB, bundled, 512, quiet=True)) == 60


def test_an_unknown_category_names_those_that_are_there(tmp_path, own_cache, bundled):
    """R15: as the file spells them, the most frequent first."""
    rows = [row | {"category": "open_qa" if i % 3 else "brainstorming"} for i, row in enumerate(reviews(9))]
    path = write_rows(tmp_path / "all.jsonl", rows)
    for skip in (False, True):
        with pytest.raises(DataError) as error:
            encode_file(path, IMDB, bundled, 512, category="Open_QA", skip_bad_rows=skip, quiet=True)
        assert error.value.lines == [f"{path}: no row of category 'Open_QA', only of 'open_qa', 'brainstorming'"]
    assert {p.suffix for p in own_cache.iterdir()} == {".lock"}


def test_rows_without_a_category_are_bad_where_one_is_asked_for(tmp_path, bundled):
    """R15: they might have belonged to it; bad rows of other categories are nobody's concern."""
    rows = [{"text": "fine", "label": 1, "category": "a"}, {"text": "fine", "label": 1},
            {"text": "fine", "label": 1, "category": None}, {"text": "", "label": 1, "category": "b"},
            {"text": "fine", "label": 1, "category": ["a"]}, {"text": "", "label": 1, "category": "a"}]  # fmt: skip
    path = write_rows(tmp_path / "all.jsonl", rows)
    with pytest.raises(BadRows) as error:
        encode_file(path, IMDB, bundled, 512, category="a", quiet=True)
    *told, total = error.value.lines
    assert [line.split(": ")[0] for line in told] == [f"{path}:{number}" for number in (2, 3, 5, 6)]
    assert all("expected {category: str}" in line for line in told[:3]) and "text is empty" in told[3]
    assert total.startswith(f"{path}: 4 of ")
    found = encode_file(path, IMDB, bundled, 512, category="a", skip_bad_rows=True, quiet=True)
    assert found.rows.tolist() == [1] and found.bad_rows == 4


# The cache


@pytest.fixture
def encoded_batches(monkeypatch) -> list[int]:
    """The number of rows of each batch that was really encoded."""
    batches, real = [], llama.data.encoding.encode_rows

    def counting(rows, *rest):
        batches.append(len(rows))
        return real(rows, *rest)

    monkeypatch.setattr(llama.data.encoding, "encode_rows", counting)
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
    first = encode_file(path, IMDB, tokenizer, 128, quiet=True)
    assert encoded_batches == [2000, 500]
    copy = write_rows(tmp_path / "copy.jsonl", rows)
    for again in (encode_file(p, IMDB, tokenizer, 128, quiet=True) for p in (path, copy)):
        assert isinstance(again.tokens, np.memmap) and isinstance(again.is_answer, np.memmap)
        assert same(again, first) and (again.bad_rows, again.bad) == (first.bad_rows, first.bad)
    assert encoded_batches == [2000, 500]
    assert sorted(p.suffix for p in own_cache.iterdir()) == ["", ".lock"]


def test_bad_rows_are_told_from_the_cache_by_the_name_of_the_file_at_hand(tmp_path, bundled, encoded_batches):
    """R15, R21: a refused file, its copy, and then leaving its bad rows out, cost one encoding."""
    lines, bad = spoiled(30)
    for name in ("train.jsonl", "copy.jsonl", "train.jsonl"):
        path = write_lines(tmp_path / name, lines)
        with pytest.raises(BadRows) as error:
            encode_file(path, IMDB, bundled, 512, quiet=True)
        assert [line.split(": ")[0] for line in error.value.lines[:-1]] == [f"{path}:{number}" for number in bad[:5]]
        assert encode_file(path, IMDB, bundled, 512, skip_bad_rows=True, quiet=True).bad == error.value.lines[:-1]
    assert encoded_batches == [30 - len(bad)]


def test_a_change_of_anything_that_matters_makes_a_new_cache(tmp_path, own_cache, encoded_batches):
    """R21: a byte of the data or of the tokenizer's files, the length, the side, the template, the category."""
    path = write_rows(tmp_path / "train.jsonl", [row | {"category": "a"} for row in reviews(10)])
    folder = tmp_path / "tokenizer"
    encode_file(path, IMDB, tokenizer_in(folder), 128, quiet=True)

    def change_data() -> None:
        path.write_bytes(path.read_bytes().replace(b'"label": 1', b'"label": 0', 1))

    def change_tokenizer() -> None:
        file = folder / "tokenizer.model"
        file.write_bytes(file.read_bytes() + b"\x1a\x00")  # an empty message: the same tokenizer, other bytes

    def add_tokenizer_file() -> None:
        (folder / "tokenizer_config.json").write_text("{}")

    arguments = {"template": IMDB, "max_length": 128, "truncate_side": "right"}
    changes = [change_data, change_tokenizer, add_tokenizer_file, *(
        lambda change=change: arguments.update(change) for change in (
            {"max_length": 129}, {"truncate_side": "left"}, {"category": "a"},
            {"template": Template("imdb", IMDB.source.replace("rate", "judge"))},
            {"template": Template("imdb", IMDB.source)}))]  # fmt: skip
    for number, change in enumerate(changes, 2):
        change()
        for _ in range(2):
            encode_file(path, tokenizer=tokenizer_in(folder), **arguments, quiet=True)
            assert len(encoded_batches) == min(number, 8)  # the last change takes the one before it back
    assert len([p for p in own_cache.iterdir() if p.is_dir()]) == 8


def test_a_chat_layout_has_a_cache_of_its_own(tmp_path, bundled):
    """R21: layouts of one module, told apart by name."""
    row = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    path = write_rows(tmp_path / "train.jsonl", [row])
    llama2, prompter = (encode_file(path, Chat(name), bundled, 128, quiet=True) for name in ("llama2", "prompter"))
    assert bundled.decode(llama2[0][0]) == "[INST] Why? [/INST] So. "
    assert bundled.decode(prompter[0][0]) == "<|prompter|> Why?  <|assistant|> So. "


WORKER = """
import hashlib, sys, time
sys.path.insert(0, {root!r})
import fcntl
import llama.data.encoding
from llama.data.templates import TEMPLATES
from llama.data.tokenizer import load_tokenizer
from pathlib import Path

real, batches = llama.data.encoding.encode_rows, []

def watched(rows, *rest):
    batches.append(len(rows))
    print("encoding", len(batches), flush=True)
    if {stop_at} == len(batches):
        time.sleep(1000)
    return real(rows, *rest)

def no_locks(*_):
    raise OSError(37, "No locks available")

llama.data.encoding.encode_rows = watched
if {without_locks}:
    fcntl.flock = no_locks
print("ready", flush=True)
sys.stdin.readline()
tokenizer = load_tokenizer({tokenizer!r})
encoded = llama.data.encoding.encode_file(Path({path!r}), TEMPLATES["imdb"], tokenizer, 128, quiet=True)
print("done", len(batches), len(encoded), hashlib.sha256(encoded.tokens.tobytes()).hexdigest(), flush=True)
"""


def start_worker(path: Path, stop_at: int = 0, without_locks: bool = False) -> subprocess.Popen:
    """A process that encodes `path` once it is told to, and sleeps for ever in its batch `stop_at`."""
    code = WORKER.format(root=str(ROOT), path=str(path), tokenizer=str(BUNDLED), stop_at=stop_at,
                         without_locks=without_locks)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


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
        target=lambda: results.append(encode_file(path, IMDB, bundled, 128, quiet=True)), daemon=True)
    try:
        go(worker)
        read_until(worker, "encoding 2\n")
        (left_over,) = [p for p in own_cache.iterdir() if p.is_dir()]
        assert ".tmp" in left_over.name and (left_over / "tokens").exists()
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
    assert same(results[0], EncodedData.open(published, path))


@pytest.mark.parametrize("without_locks", [False, True], ids=["with locks", "on a file system without locks"])
def test_two_processes_at_once_both_succeed_and_give_the_same(tmp_path, own_cache, bundled, without_locks):
    """R21, C43: with locks only one of them works; without, both do, and neither harms the other."""
    path = write_rows(tmp_path / "train.jsonl", reviews(4100))
    workers = [start_worker(path, without_locks=without_locks) for _ in range(2)]
    for worker in workers:
        go(worker)
    told = [worker.communicate(timeout=120)[0].splitlines()[-1].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    encoded = encode_file(path, IMDB, bundled, 128, quiet=True)
    digest = hashlib.sha256(encoded.tokens.tobytes()).hexdigest()
    assert [[rows, found] for _, _, rows, found in told] == [["4100", digest]] * 2
    if not without_locks:
        assert sorted(batches for _, batches, _, _ in told) == ["0", "3"]
    assert sorted(p.suffix for p in own_cache.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("name", [*TOKENS, *EXAMPLES, "about.json"])
@pytest.mark.parametrize("cut", [1, 10**6], ids=["a byte short", "empty"])
def test_a_damaged_cache_is_named(tmp_path, own_cache, bundled, name, cut):
    """R5, R21: cut short by a full disk or a crash of the machine; never a traceback, never wrong tokens."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    encode_file(path, IMDB, bundled, 128, quiet=True)
    [folder] = [p for p in own_cache.iterdir() if p.is_dir()]
    (folder / name).write_bytes((folder / name).read_bytes()[:-cut])
    with pytest.raises(DataError, match=rf"^{re.escape(str(folder))}: damaged, delete it") as error:
        encode_file(path, IMDB, bundled, 128, quiet=True)
    assert len(error.value.lines) == 1


@pytest.mark.parametrize("rows", [5, 100, 2100], ids=["a few bytes", "many", "in a second batch"])
def test_a_full_disk_is_told_and_nothing_is_published(tmp_path, own_cache, bundled, monkeypatch, rows):
    """R3, R21: whether the system refuses at once or only when the file is closed; later all is well."""
    path = write_rows(tmp_path / "train.jsonl", reviews(rows))
    for full in ("tokens", "was_cut"):
        with monkeypatch.context() as patched:
            patched.setattr(llama.data.encoding, "open", lambda path, mode, full=full: builtins.open(
                "/dev/full" if path.name == full else path, mode), raising=False)
            with pytest.raises(DataError, match="free some space, or set LLAMA_CACHE") as error:
                encode_file(path, IMDB, bundled, 128, quiet=True)
            assert len(error.value.lines) == 1
        assert [p.suffix for p in own_cache.iterdir()] == [".lock"]
    assert len(encode_file(path, IMDB, bundled, 128, quiet=True)) == rows


def test_an_interrupted_encoder_leaves_nothing_behind(tmp_path, own_cache, bundled, monkeypatch):
    """R21: after it has begun to write."""
    path = write_rows(tmp_path / "train.jsonl", reviews(15))
    monkeypatch.setattr(llama.data.encoding, "BATCH_ROWS", 10)
    real, calls = llama.data.encoding.encode_rows, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(llama.data.encoding, "encode_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_file(path, IMDB, bundled, 128, quiet=True)
    assert [p.suffix for p in own_cache.iterdir()] == [".lock"]
    assert len(encode_file(path, IMDB, bundled, 128, quiet=True)) == 15


def test_a_cache_folder_that_cannot_be_made_is_an_error_that_says_what_to_set(tmp_path, monkeypatch):
    """R17: a file is where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="set LLAMA_CACHE"):
        cache_folder()
    monkeypatch.delenv("LLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "llama-fine-tuning"


# Memory

PEAK = """
import re, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import pyarrow.parquet
from llama.data.encoding import encode_file
from llama.data.templates import TEMPLATES

class Words:
    bos_id, eos_id, files = 1, 2, ()

    def encode_batch(self, texts, continues=False):
        return [[len(word) for word in text.split()] for text in texts]

for path in sys.argv[1:]:
    encode_file(Path(path), TEMPLATES["imdb"], Words(), 256, quiet=True)
    # Of this program alone: ru_maxrss begins with that of the process which started it.
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_file(tmp_path):
    """R15: 20 MB take what 2 MB did, but for some slack: as JSONL, and as Parquet of a single row group.

    Of Parquet, whose reader keeps some MB of buffers, tests/test_rows.py counts the bytes exactly.
    """
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=80)) for _ in range(500)]

    def rows(megabytes: int) -> list[dict]:
        return [{"text": f"{generator.choice(texts)} {i}", "label": i % 2} for i in range(megabytes << 11)]

    plain = dict(compression="none", use_dictionary=False)
    for megabytes in (2, 20):
        write_rows(tmp_path / f"{megabytes}.jsonl", rows(megabytes))
        write_parquet(tmp_path / f"{megabytes}.parquet", rows(megabytes), **plain)
    assert pyarrow.parquet.ParquetFile(tmp_path / "20.parquet").num_row_groups == 1
    files = [tmp_path / f"{megabytes}.{kind}" for megabytes in (2, 20) for kind in ("jsonl", "parquet")]
    assert all(large.stat().st_size > small.stat().st_size + (14 << 20)
               for small, large in zip(files[:2], files[2:], strict=True))
    done = subprocess.run([sys.executable, "-c", PEAK.format(root=str(ROOT)), *files], capture_output=True, text=True,
                          check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, after_small, after_jsonl, after_all = (int(line) / 1024 for line in done.stdout.split())
    assert after_jsonl < after_small + 8 and after_all < after_jsonl + 18, done.stdout


@pytest.mark.parametrize("name", ["tokens", "is_answer", "stops", "label_counts", "rows", "was_cut", "answers"])
def test_a_cache_whose_bytes_have_changed_is_refused(tmp_path, own_cache, bundled, name):
    """R5: of the right size, or longer: never wrong tokens, never a fingerprint of other ones."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    encode_file(path, IMDB, bundled, 128, quiet=True)
    [folder] = [p for p in own_cache.iterdir() if p.is_dir()]
    content = bytearray((folder / name).read_bytes())
    for damaged in (bytes([content[0] ^ 1]) + content[1:], content + b"\0\0"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(DataError, match=rf"^{re.escape(str(folder))}: damaged, delete it .*{name}"):
            encode_file(path, IMDB, bundled, 128, quiet=True)
    (folder / name).write_bytes(content)
    assert len(encode_file(path, IMDB, bundled, 128, quiet=True)) == 5


def test_a_file_that_changes_while_it_is_read_is_never_cached_under_its_old_content(tmp_path, own_cache, bundled,
                                                                                   monkeypatch):
    """R21: its name in the cache is that of what it was."""
    path = write_rows(tmp_path / "train.jsonl", reviews(5))
    real = llama.data.encoding.digest

    def then_change(paths):
        key = real(paths)
        write_rows(path, reviews(7))
        return key

    with monkeypatch.context() as patched:
        patched.setattr(llama.data.encoding, "digest", then_change)
        with pytest.raises(DataError, match="train.jsonl: changed while it was read"):
            encode_file(path, IMDB, bundled, 128, quiet=True)
    assert len(encode_file(path, IMDB, bundled, 128, quiet=True)) == 7


def test_columns_that_no_template_asks_for_cannot_spoil_a_parquet_file(tmp_path, bundled):
    """R15: a time in nanoseconds, large blobs: neither read nor held in memory."""
    rows = reviews(6)
    odd = {"when": pyarrow.array([1] * 6, pyarrow.timestamp("ns", "No/Where")),
           "blob": pyarrow.array([b"x" * 10**5] * 6)}
    table = pyarrow.Table.from_pylist(rows)
    for name, column in odd.items():
        table = table.append_column(name, column)
    pyarrow.parquet.write_table(table, tmp_path / "odd.parquet")
    encoded = encode_file(tmp_path / "odd.parquet", IMDB, bundled, 128, quiet=True)
    plain = encode_file(write_rows(tmp_path / "plain.jsonl", rows), IMDB, bundled, 128, quiet=True)
    assert encoded.fingerprint == plain.fingerprint


def test_one_value_of_a_parquet_file_that_cannot_be_read_is_one_bad_row(tmp_path, bundled):
    """R15: its neighbours are kept with --skip_bad_rows."""
    texts = pyarrow.array([b"fine", b"caf\xe9", b"good"]).cast(pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": texts, "label": [0, 1, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadRows) as error:
        encode_file(tmp_path / "a.parquet", IMDB, bundled, 128, quiet=True)
    assert error.value.lines[0].startswith(f"{tmp_path}/a.parquet:2: cannot be read (") and len(error.value.lines) == 2
    assert len(encode_file(tmp_path / "a.parquet", IMDB, bundled, 128, skip_bad_rows=True, quiet=True)) == 2
