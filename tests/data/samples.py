"""Rows, texts and tokenizers that several test modules of this folder use."""

import functools
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from llama.data.examples import EncodedData
from llama.data.templates import TEMPLATES, Segment
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "assets" / "tiny" / "tokenizer.model"
REAL = {"llama2": "llama2-tokenizer", "smollm2": "smollm2-135m-instruct-q4", "llama3": "llama3-tokenizer"}
IMDB = TEMPLATES["imdb"]
ARRAYS = ("tokens", "is_answer", "starts", "stops", "label_counts", "answers", "rows", "was_cut")

HOSTILE = ["</s>", "<s>", "<|im_end|>", "<|endoftext|>", "<unk>", "{text}", "{label}", "{0.__class__}", "%s",
           "%(text)s", "{{}}", "[[", "]]", "=====", "#### Answer:", " negative", "<0x0A>"]  # fmt: skip
WORDS = "a film of great beauty and no plot I don't recommend 10/10 <br /><br /> naïve 映画 🎬 the worst ever".split()

loaded = functools.cache(load_tokenizer)  # a large one takes seconds


def bundled_with(folder: Path, *control: str) -> Tokenizer:
    """Ours with more control tokens, as a chat model's folder has them."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(BUNDLED.read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({token: 1280 + i for i, token in enumerate(control)}))
    return load_tokenizer(folder)


class ByteTokenizer:
    """Bytes as ids, except that " positive" is one token where " negative" is nine."""

    bos_id, eos_id, files, spelled = 300, 301, (BUNDLED,), ()

    def encode_batch(self, texts: list[str], starts_text: bool = True) -> list[list[int]]:
        begin = [self.bos_id] if starts_text else []
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_lines(path: Path, lines: list[str | bytes]) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
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


GOOD = '{"text": "fine", "label": 1}'
BAD_ROWS = {
    "broken JSON": ('{"text": "fine", "label": 1', "not valid JSON"),
    "Latin-1": (b'{"text": "caf\xe9", "label": 1}', "byte 13 is not UTF-8"),
    "a list": ("[1, 2]", "found list, expected a JSON object"),
    "missing field": ('{"label": 1}', "found fields {'label': int}, expected {text: str, label: int or word}"),
    "no fields": ("{}", "found fields {}, expected"),
    "misnamed field": ('{"review": "fine", "label": 1}', "{'review': str, 'label': int}"),
    "line breaks in a name": ('{"te\\nxt": "fine", "label": 1}', "te\\nxt"),
    "text not a string": ('{"text": 7, "label": 1}', "'text': int"),
    "null text": ('{"text": null, "label": 1}', "'text': NoneType"),
    "null label": ('{"text": "fine", "label": null}', "'label': NoneType"),
    "boolean label": ('{"text": "fine", "label": true}', "'label': bool"),
    "label as text": ('{"text": "fine", "label": "one"}', "label is 'one', expected 0 (negative) or 1 (positive)"),
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


def spoiled(count: int) -> tuple[list[str | bytes], list[int]]:
    """`count` lines of which every seventh is bad, in one way after the other; and the numbers of those."""
    lines: list[str | bytes] = [json.dumps(row) for row in reviews(count)]
    ways = [line for line, _ in BAD_ROWS.values()]
    bad = list(range(3, count + 1, 7))
    for n, number in enumerate(bad):
        lines[number - 1] = ways[n % len(ways)]
    return lines, bad
