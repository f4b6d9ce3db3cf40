"""Whatever a file holds, it is encoded or refused in words: no traceback, no hang, no row that silently disappears.

HOSTILE_EXAMPLES=25000 pytest tests/data/test_hostile_data.py runs the long form.
"""

import gzip
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import ROOT, loaded

from llama.boundary.errors import UserError
from llama.data import cache
from llama.data.chat import LAYOUTS, Chat
from llama.data.examples import SHOWN, BadRows, encode_file
from llama.data.rows import read
from llama.data.templates import TEMPLATES, Template

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", 120))
hostile = settings(derandomize=EXAMPLES < 1000, database=None, max_examples=EXAMPLES, deadline=None,
                   suppress_health_check=list(HealthCheck))  # fmt: skip
TOKENIZER = loaded(ROOT / "assets" / "tiny")
RENDERERS = [*TEMPLATES.values(), *(Chat(name) for name in ("llama2", "prompter"))]

texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["</s>", "{text}", "{{", "]]", "<|im_end|>", "\0", "\ud800", " ", "", "naïve 映画 🎬", "\x1b[31m"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
FIELDS = ["text", "label", "instruction", "input", "output", "context", "response", "quote", "author", "sentence",
          "corrections", "question", "answer", "messages", "category"]  # fmt: skip
messages = st.lists(
    st.one_of(values, st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]),
                                             "content": texts})), max_size=5)  # fmt: skip
typed = {"label": st.integers(-1, 2), "corrections": st.lists(texts, max_size=2), "messages": messages}
likely = st.fixed_dictionaries({}, optional={name: typed.get(name, texts) for name in FIELDS})
fitting = texts.map(lambda text: dict.fromkeys(FIELDS, f"a{text}") | {
    "label": len(text) % 2, "corrections": [f"b{text}"],
    "messages": [{"role": "user", "content": text + "q"}, {"role": "assistant", "content": f"r{text}"}]})  # fmt: skip
rows = st.one_of(fitting, likely, st.dictionaries(st.sampled_from(FIELDS), values, max_size=5), values)
lines = st.one_of(
    rows.map(lambda row: json.dumps(row).encode()),
    rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")),
    st.sampled_from([b"", b"{", b"[" * 3000, b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"\xff\xfe{\0}\0", b"NaN", b"\r"]),
)


@pytest.fixture(scope="module", autouse=True)
def folder():
    """A cache that is emptied after each example, in memory where the system has such a place."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as path, pytest.MonkeyPatch.context() as patched:
        patched.setenv("LLAMA_CACHE", f"{path}/cache")
        real, known = cache.digest, {}  # the code does not change meanwhile: hash it once
        patched.setattr("llama.data.examples.digest",
                        lambda paths: known.setdefault("code", real(paths[1:])) + real(paths[:1]))
        yield Path(path)


def encode(path: Path, renderer, skip: bool, max_length: int = 120):
    try:
        return encode_file(path, renderer, TOKENIZER, max_length, skip_bad_rows=skip)
    finally:
        shutil.rmtree(cache.cache_folder())


def check(path: Path, body: bytes, renderer) -> None:
    """Every line of it that is not blank is an example or a counted bad row, whether bad rows stop the run or not."""
    lines_of_file = io.BytesIO(body).readlines()
    count = sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in lines_of_file)
    try:
        encoded = encode(path, renderer, skip=True)
        good, bad = len(encoded), encoded.bad_row_count
        assert good > 0 and good + bad == count and len(encoded.first_bad_rows) == min(bad, SHOWN)
        assert len(set(encoded.rows.tolist())) == good
        assert 1 <= encoded.rows.min() <= encoded.rows.max() <= len(lines_of_file)
        assert (encoded.label_counts > 0).all() and encoded.lengths.max() <= 120
        told = encoded.first_bad_rows
        encoded[0]
    except UserError as error:  # not one row is good
        assert "no rows" in str(error) or "none of" in str(error), error
        assert ("no rows" in str(error)) == (count == 0)
        good, bad, told = 0, count, None
    try:
        again = encode(path, renderer, skip=False)
        assert len(again) == good and bad == 0 and count
    except BadRows as error:
        assert bad and f"{bad} of {count} rows" in error.lines[-1] and len(error.lines) == min(bad, SHOWN) + 1
        assert told is None or error.lines[:-1] == told
        assert all(line.startswith(f"{path}:") and len(line) < 2000 for line in error.lines)
        assert not any(character in line for line in error.lines for character in "\n\r")
    except UserError:
        assert count == 0


@hostile
@given(content=st.lists(lines, max_size=9), renderer=st.sampled_from(RENDERERS), end=st.sampled_from([b"\n", b"\r\n"]),
       last=st.booleans(), mark=st.booleans())
def test_every_line_of_any_jsonl_file_is_an_example_or_a_bad_row(folder, content, renderer, end, last, mark):
    """R15, R16, C3, C17: broken JSON, wrong types, odd bytes, BOM, CRLF, with and without a last newline."""
    body = end.join(content) + (end if last and content else b"")
    body = (b"\xef\xbb\xbf" if mark and body else b"") + body
    path = folder / "rows.jsonl"
    path.write_bytes(body)
    check(path, body, renderer)


@hostile
@given(content=st.lists(lines, min_size=1, max_size=5), renderer=st.sampled_from(RENDERERS), cut=st.integers(0, 400),
       place=st.integers(0, 400), change=st.integers(0, 255))
def test_a_damaged_gzip_is_refused_as_a_whole_or_read_as_a_whole(folder, content, renderer, cut, place, change):
    """R5, R15: cut short, or with one byte changed."""
    body = b"\n".join(content)
    packed = bytearray(gzip.compress(body))
    if place < len(packed):
        packed[place] ^= change
    path = folder / "rows.jsonl.gz"
    path.write_bytes(bytes(packed[: len(packed) - cut]) if cut < len(packed) else b"")
    try:
        unpacked = gzip.decompress(path.read_bytes())
    except Exception:
        with pytest.raises(UserError, match="cannot be read as gzip after row|no rows"):
            list(read(path))
            encode(path, renderer, skip=True)
        return
    check(path, unpacked, renderer)


def parquet_bytes() -> list[bytes]:
    tables = [
        [{"text": f"a fine film {i}", "label": i % 2} for i in range(300)],
        [{"instruction": "say", "input": None, "output": "x"}, {"instruction": "", "output": "y"}],
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    ]
    ways = ({}, {"compression": "zstd", "row_group_size": 70}, {"compression": "none", "use_dictionary": False})
    out = []
    for rows in tables:
        for options in ways:
            sink = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
            out.append(sink.getvalue())
    return out


PARQUETS = parquet_bytes()


@hostile
@given(whole=st.sampled_from(PARQUETS), cut=st.one_of(st.just(0), st.integers(0, 9000)),
       changes=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 255)), max_size=3),
       renderer=st.sampled_from(RENDERERS))  # fmt: skip
@pytest.mark.slow
def test_a_damaged_parquet_file_is_encoded_or_refused_in_words(folder, whole, cut, changes, renderer):
    """R5, R15: cut anywhere, some bytes changed."""
    content = bytearray(whole[: max(0, len(whole) - cut)])
    for place, change in changes:
        if content:
            content[place % len(content)] ^= change
    path = folder / "rows.parquet"
    path.write_bytes(bytes(content))
    try:
        encoded = encode(path, renderer, skip=True)
        assert len(encoded) and (encoded.label_counts > 0).all()
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in "".join(error.lines)


@hostile
@given(row=rows, renderer=st.sampled_from([*RENDERERS, *(Chat(name) for name in LAYOUTS)]))
def test_any_row_is_rendered_or_refused_in_one_line(row, renderer):
    """R15, R16: and what is rendered holds each text of the row as it is."""
    if not isinstance(row, dict):
        return
    try:
        segments, answer = renderer.render(row, "rows.jsonl:3")
    except UserError as error:
        assert str(error).startswith("rows.jsonl:3") and len(error.lines) == 1 and len(str(error)) < 2000
        return
    assert any(segment.answer for segment in segments) and -1 <= answer < max(1, len(renderer.answers))


PIECES = ["{", "}", "[[", "]]", "{{", "}}", "{a}", "{b...}", "{c.0}", "{d=x,y}", "=====\n", "\n", "text", "{a=}",
          "{.1}", "[", "]"]  # fmt: skip


@hostile
@given(source=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=9).map("".join)), row=rows)
def test_any_template_file_is_understood_or_refused_in_one_line(source, row):
    """R15, R16: and one that is understood renders or refuses any row."""
    try:
        template = Template("my.txt", source)
    except UserError as error:
        assert str(error).startswith("--template my.txt") and len(error.lines) == 1
        return
    if isinstance(row, dict):
        try:
            template.render(row | {"a": "A", "b": "B", "c": ["C"], "d": 1}, "here")
        except UserError as error:
            assert str(error).startswith("here")
