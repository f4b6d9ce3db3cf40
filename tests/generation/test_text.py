"""What is shown of an answer while it comes is what the tokenizer makes of all its ids, up to a stop string."""

import functools
import random
from pathlib import Path

import pytest

from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer
from llama.generation.text import TextStream

ROOT = Path(__file__).resolve().parents[2]
REAL = ("llama2-tokenizer", "llama3-tokenizer", "stories260K", "smollm2-135m-instruct-q4")
PARTS = ["the end", "The", " end", ".", "\n", "\n\n", "  ", " ", "User:", "</s>", "<|im_end|>", "naïve", "映画", "🎬", 
         "🏳️‍🌈", "👩‍👩‍👧", "ﬁ", "e\u0301", "\ufffd", "#", "####", "a", "aa", "ab", "aab", "\t", "१२",
         "\u200f"]  # fmt: skip


def text_of(draw: random.Random) -> str:
    return "".join(draw.choices(PARTS, k=draw.randrange(1, 15)))


def stop_strings_of(draw: random.Random, text: str) -> list[str]:
    """Some that occur in the text, some that only begin in it, and some that do not."""
    stops = []
    for _ in range(draw.randrange(0, 4)):
        start = draw.randrange(len(text))
        part = text[start : start + draw.randrange(1, 6)]
        stops.append(draw.choice([part, part + "x", draw.choice(PARTS)]))
    return stops


def cut_by_hand(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; of two at once, before the longer."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def tokenized(tokenizer: Tokenizer, text: str, draw: random.Random) -> list[int]:
    """The ids of a text that continues another: as the tokenizer cuts it, or cut by chance into pieces before."""
    if draw.random() < 0.5:
        return tokenizer.encode(text, starts_text=False)
    ids = []
    while text:
        count = draw.randrange(1, 8)
        ids += tokenizer.encode(text[:count], starts_text=False)
        text = text[count:]
    return ids


def streamed(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[list[str], str, int]:
    """The pieces that are shown, the whole text, and how many ids were taken."""
    pieces: list[str] = []
    stream = TextStream(lambda part: tokenizer.decode(part, starts_text=False), stops, pieces.append)
    count = next((i for i, id in enumerate(ids, 1) if stream(id)), len(ids))
    return pieces, stream.finish(), count


loaded = functools.cache(load_tokenizer)  # a large one takes seconds


@pytest.fixture(params=["bundled", *(pytest.param(name, marks=pytest.mark.slow) for name in REAL)])
def tokenizer(request) -> Tokenizer:
    if request.param == "bundled":
        return loaded(ROOT / "assets" / "tiny")
    return loaded(request.getfixturevalue("assets") / request.param)


def test_the_pieces_are_the_text_of_all_ids_up_to_the_first_stop_string(tokenizer):
    """C13: for random texts, tokenizations and stop strings, also over the borders of tokens."""
    draw = random.Random(0)
    stopped = 0
    for _ in range(400):
        text = text_of(draw)
        ids = tokenized(tokenizer, text, draw)
        whole = tokenizer.decode(ids, starts_text=False)
        stops = stop_strings_of(draw, whole)
        pieces, shown, count = streamed(tokenizer, ids, stops)
        expected = cut_by_hand(whole, stops)
        assert shown == "".join(pieces) == expected, (text, stops)
        if expected != whole:
            stopped += 1
            cut_before = tokenizer.decode(ids[: count - 1], starts_text=False)
            # The id that completes it is the last that is taken, unless a token ended in half a character.
            assert "\ufffd" in cut_before or not any(stop in cut_before for stop in stops)
        else:
            assert count == len(ids)
    assert 100 < stopped < 350


def test_no_piece_holds_a_half_character_and_each_comes_as_soon_as_it_is_whole(tokenizer):
    """An emoji of several tokens is shown with its last one, and a letter with its own."""
    for text in ("a 🎬 b🎬🎬 naïve 映画.", "🏳️‍🌈é"):
        ids = tokenizer.encode(text, starts_text=False)
        pieces: list[str] = []
        stream = TextStream(lambda part: tokenizer.decode(part, starts_text=False), (), pieces.append)
        for count, id in enumerate(ids, 1):
            stream(id)
            whole = tokenizer.decode(ids[:count], starts_text=False)
            if not whole.endswith("\ufffd"):
                assert "".join(pieces) == whole
        assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in REAL])
def test_bytes_that_are_no_text_are_shown_as_the_tokenizer_decodes_them(assets, name):
    """Random ids, and random bytes of characters: what can become a character is held, and nothing longer."""
    tokenizer = loaded(assets / name)
    draw = random.Random(1)
    scattered = tokenizer.encode("é映🎬👩‍👩‍👧a ﬁ\ufffd", starts_text=False)
    for trial in range(1000):
        ids = draw.choices(scattered if trial % 2 else range(tokenizer.vocab_size), k=12)
        assert streamed(tokenizer, ids, [])[1] == tokenizer.decode(ids, starts_text=False)


def test_spaces_are_those_of_the_text_and_control_tokens_are_no_text(tokenizer):
    """The leading space is the answer's; SentencePiece would drop it at the start of a text."""
    ids = tokenizer.encode(" yes  and\n no ", starts_text=False)
    shown = streamed(tokenizer, [*ids, tokenizer.eos_id, *ids], [])[1]
    assert shown == " yes  and\n no " * 2


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not_or_nothing_follows():
    pieces: list[str] = []
    stream = TextStream(lambda ids: "".join(map(chr, ids)), ["END.", "E!"], pieces.append)
    shown = []
    for letter in "aENxEEND":
        assert not stream(ord(letter))
        shown.append("".join(pieces))
    assert shown == ["a", "a", "a", "aENx", "aENx", "aENxE", "aENxE", "aENxE"]
    assert stream.finish() == "aENxEEND" == "".join(pieces)


def test_of_two_stop_strings_the_one_that_is_complete_first_counts_however_the_tokens_are_cut():
    for stops in (["bc", "abcd", "c"], ["abcd", "c", "bc"]):
        for sizes in ([4], [1] * 4, [2, 2], [3, 1]):
            text = iter("abcd")
            parts = ["".join(next(text) for _ in range(size)) for size in sizes]
            stream = TextStream(lambda ids, parts=parts: "".join(parts[id] for id in ids), stops)
            assert any(stream(i) for i in range(len(parts))) and stream.finish() == "a"


def test_nothing_is_shown_behind_a_stop_string_and_an_empty_one_is_refused():
    stream = TextStream(lambda ids: "".join(map(chr, ids)), ["b"])
    assert [stream(ord(letter)) for letter in "abc"] == [False, True, True] and stream.finish() == "a"
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(str, [""])


def test_the_work_for_a_token_does_not_grow_with_the_text(tokenizer):
    """Counted, not timed: how many ids are decoded in all. Bytes that never become a character do not pile up."""
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return tokenizer.decode(ids, starts_text=False)

    ids = tokenizer.encode("naïve 🎬 words " * 40, starts_text=False)
    broken = [id for id in ids if tokenizer.decode([id], starts_text=False) == "\ufffd"] or [tokenizer.eos_id]
    for text, most in ((ids, 5), (broken[:1] * 300, 18)):
        decoded.clear()
        stream = TextStream(decode, ["never so"])
        for id in text:
            stream(id)
        assert sum(decoded) <= most * len(text) and max(decoded) <= 4
