"""Perplexity of a text file: brute force over tokens, transformers' documented recipe, whole-text token ids."""

import itertools
import json
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from reviews import CONFIG, plain_model
from sharded import build, this_process

from llama.boundary.errors import UserError
from llama.data import plain_text
from llama.data.tokenizer_files import load_tokenizer
from llama.evaluation.text_perplexity import TextPerplexity, Window, windows
from llama.model import PackedDocuments
from llama.storage import pretrained
from llama.storage.base import TINY_TOKENIZER

SLOW = pytest.mark.slow
STORY = "Once upon a time, there was a film.\n\n It was slow, 'bright' \u2014 caf\u00e9 \U0001f600!\r\n\tThe end ?\n"


@pytest.fixture
def story(tmp_path) -> Path:
    path = tmp_path / "story.txt"
    path.write_bytes((STORY * 4).encode())
    return path


@pytest.mark.parametrize("size, stride", [(2, 1), (5, 2), (5, 4), (8, 8 - 1), (100, 7)])
def test_every_token_but_the_first_is_scored_once_with_the_context_that_was_promised(size, stride):
    """C51: for any length of the text, the empty one and one that ends with a window."""
    for length in range(40):
        seen = []
        first = 0
        for k, (ids, scored) in enumerate(windows(range(length), size, stride)):
            assert ids == list(range(first, min(first + size, length))) and 0 < scored < len(ids)
            assert len(ids) - scored >= (1 if k == 0 else size - stride)
            seen += ids[-scored:]
            first += stride
        assert seen == list(range(1, length))


def test_the_labels_of_a_window_are_at_its_end():
    ids, is_label = Window([7, 8, 9, 4], 2).example()
    assert ids.tolist() == [7, 8, 9, 4] and is_label.tolist() == [False, False, True, True]


def token_by_token(ids: list[int], size: int, stride: int) -> list[float]:
    """The loss of each token but the first, each from a forward of its own, with the context that its window has."""
    model = plain_model()
    losses = []
    for place in range(1, len(ids)):
        window = 0 if place < size else -(-(place - size + 1) // stride)
        context = ids[window * stride : place]
        logits = model.logits(torch.tensor(context), PackedDocuments([len(context)]), torch.tensor([len(context) - 1]))
        losses.append(-float(logits.double().log_softmax(-1)[0, ids[place]]))
    return losses


def score_on_rank(path: Path, batch_size: int, window: int = 24, stride: int = 10, limit: int = 0):
    metric = TextPerplexity(path, load_tokenizer(TINY_TOKENIZER), window, stride, batch_size, limit)
    model = build(CONFIG, this_process())
    pretrained.initialize_weights(model, seed=1)
    outcome = metric.score(model, this_process())
    return outcome.as_json(), list(outcome.lines)


@torch.no_grad()
@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_perplexity_of_a_text_is_that_of_a_loop_over_its_tokens(ranks, story, size):
    """C51, C52, C54: for any batch size and number of ranks; and its lines give it again."""
    losses = token_by_token(load_tokenizer(TINY_TOKENIZER).encode(STORY * 4), 24, 10)
    mean = sum(losses) / len(losses)
    nats, raw = sum(losses), (STORY * 4).encode()
    for batch_size in (1, 4):
        for found, lines in ranks(size, score_on_rank, story, batch_size):
            assert found["loss"] == pytest.approx(mean, rel=1e-6)
            assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
            assert (found["tokens"], found["bytes"]) == (len(losses), len(raw))
            assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(raw), rel=1e-6)
            assert found["words"] == len(raw.decode().split())
            assert found["word_perplexity"] == pytest.approx(math.exp(nats / found["words"]), rel=1e-4)
            low, high = (found["intervals"]["perplexity"][end] for end in ("low", "high"))
            assert low < found["perplexity"] < high and "over windows" in found["intervals"]["loss"]["method"]
            assert [line["window"] for line in lines] == list(range(found["n"]))
            again = sum(line["loss"] for line in lines) / sum(line["tokens"] for line in lines)
            assert found["loss"] == pytest.approx(again, rel=1e-12)


def test_a_limit_takes_the_first_windows(ranks, story):
    (whole, lines), = ranks(1, score_on_rank, story, 2)
    for size in (1, 2):
        for found, of_limit in ranks(size, score_on_rank, story, 2, limit=3):
            assert found["n"] == 3 and found["tokens"] == 23 + 10 + 10 and "bits_per_byte" not in found
            assert [line["loss"] for line in of_limit] == pytest.approx([line["loss"] for line in lines[:3]], rel=1e-5)
    assert whole["n"] > 3


def recipe_of_transformers(model, ids: torch.Tensor, max_length: int, stride: int) -> float:
    """The loop of https://huggingface.co/docs/transformers/perplexity, with each window weighed by the number of tokens
    whose loss it is the mean of (the page takes one off, although only the first window lacks one)."""
    nll, count, previous_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        target_length = end - previous_end
        input_ids = ids[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, :-target_length] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids).loss
        labels = int((target_ids[:, 1:] != -100).sum())
        nll, count = nll + float(loss) * labels, count + labels
        previous_end = end
        if end == ids.shape[1]:
            break
    return math.exp(nll / count)


@SLOW
@pytest.mark.parametrize("max_length, stride", [(128, 64), (96, 95), (96, 17)])
def test_perplexity_of_wikitext_equals_transformers_recipe(assets, tmp_path, max_length, stride):
    """C52: a real model over the beginning of WikiText-2, at one and the same windows."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from llama.parallel.processes import Process
    from llama.storage.base import Base
    from lora import Changes, open_model

    text = (assets / "wikitext-2/test.txt").read_text()[:2000]
    path = tmp_path / "wiki.txt"
    path.write_text(text)
    base = Base.pretrained(str(assets / "stories260K"))
    ids = torch.tensor([base.tokenizer.encode(text)])
    peer = AutoModelForCausalLM.from_pretrained(assets / "stories260K", dtype=torch.float32)
    expected = recipe_of_transformers(peer, ids, max_length, stride)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        process = this_process()
        assert isinstance(process, Process)
        model = open_model(base, Changes(train_layers="none"), process, torch.float32)
        outcome = TextPerplexity(path, base.tokenizer, max_length, stride, 3, 0).score(model, process)
    finally:
        dist.destroy_process_group()
    assert outcome.values["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert outcome.values["tokens"] == ids.shape[1] - 1


HOSTILE = {
    "lines": STORY * 40,
    "paragraphs": "First words.\n\nSecond (one).\n\n\n\u00e9t\u00e9\n" * 200,
    "spaces before lines": "a \n  b\n \n\n c\t\n\td " * 200,
    "one line": "a word and another  , \u00e9t\u00e9 " * 300,
    "one word": "\u6f22\u5b57" * 2000,
    "only spaces": " \n" * 3000,
    "line ends": "one\r\ntwo\r\n\r\nthree\rfour\n" * 200,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_pieces_of_a_text_are_the_text(tmp_path, monkeypatch, text):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    for size in (1, 7, 500, 1 << 20):
        monkeypatch.setattr(plain_text, "PIECE", size)
        found = list(plain_text.pieces(path))
        assert "".join(found) == text and "" not in found
        assert size > 1000 or len(found) > 3


def tokenizers(assets: Path) -> dict[str, Path]:
    return {"tiny": TINY_TOKENIZER, "stories260K": assets / "stories260K"} | {
        name: assets / name for name in ("llama2-tokenizer", "llama3-tokenizer")}


@SLOW
def test_tokens_of_the_pieces_are_those_of_the_whole_text(assets, smollm2, tmp_path, monkeypatch):
    """C12: pieces end where no token of any of these tokenizers reaches across."""
    wiki = (assets / "wikitext-2/test.txt").read_text()[:20_000]
    texts = {name: text for name, text in HOSTILE.items() if name not in ("one word", "only spaces")} | {"wiki": wiki}
    for folder in (*tokenizers(assets).values(), smollm2):
        tokenizer = load_tokenizer(folder)
        for name, text in texts.items():
            path = tmp_path / "text.txt"
            path.write_bytes(text.encode())
            monkeypatch.setattr(plain_text, "PIECE", 997)
            found = list(itertools.chain.from_iterable(piece.ids for piece in plain_text.token_pieces(path, tokenizer)))
            assert found == tokenizer.encode(text), (folder, name)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Eight times the text takes no more memory to turn into windows."""
    monkeypatch.setattr(plain_text, "PIECE", 8192)
    tokenizer = load_tokenizer(TINY_TOKENIZER)
    peaks = []
    for count in (1_000, 8_000):
        path = tmp_path / f"{count}.txt"
        path.write_text("The quick brown film was slow .\n" * count)
        ids = (id for piece in plain_text.token_pieces(path, tokenizer) for id in piece.ids)
        tracemalloc.start()
        assert sum(window.scored for window in windows(ids, 512, 256)) > count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]




def test_what_is_no_text_is_one_line(tmp_path):
    path = tmp_path / "x.txt"

    def error(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            TextPerplexity(path, load_tokenizer(TINY_TOKENIZER), 16, 8, 1, 0)
            list(plain_text.pieces(path))
        return str(caught.value)

    assert error(b"") == f"{path}: fewer than two tokens, expected a text; its first token is not scored"
    assert error(("caf\u00e9 " * 20).encode("latin-1")) == f"{path}: byte 3 is not UTF-8, expected a text file in UTF-8"
    assert error(b"fine text \n" * 30_000 + b"\xff").startswith(f"{path}: byte 330000 is not UTF-8")
    before = plain_text.PIECE - 1
    assert error(b"x" * before + b"\xe2\x82").startswith(f"{path}: byte {before} is not UTF-8")
    assert "PK" not in error(b"PK\x03\x04rest") and "zip archive" in error(b"PK\x03\x04rest")


def test_a_text_without_spaces_has_no_perplexity_of_a_word(ranks, tmp_path):
    """e to the power of thousands is no float."""
    path = tmp_path / "x.txt"
    path.write_text("\u6f22\u5b57" * 100)
    ((found, _),) = ranks(1, score_on_rank, path, 4)
    assert (found["words"], found["word_perplexity"]) == (1, None) and np.isfinite(found["perplexity"])


def test_a_text_of_one_token_behind_bos_is_scored(ranks, tmp_path):
    """With BOS, the first token of the text is scored; without another window there is no interval."""
    path = tmp_path / "x.txt"
    path.write_text("a")
    (found, lines), = ranks(1, score_on_rank, path, 1)
    assert found["tokens"] == len(lines) == 1 and found["intervals"] == {"perplexity": None, "loss": None}
    assert np.isfinite(found["perplexity"]) and json.dumps(found)
    assert os.path.getsize(path) == found["bytes"] == 1
