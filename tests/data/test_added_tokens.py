"""Tokens that were added to a tokenizer: ids and texts against transformers' AutoTokenizer, on several kinds of folder.

transformers reads a tokenizer.model only with protobuf, which this project does not need. So a folder that has only a
tokenizer.model is compared with the tokenizer.json that transformers' LlamaTokenizer makes of it.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from llama.data.tokenizer_files import load_tokenizer
from tests.data.test_tokenizer import added, llama2_style, llama3_style, train_byte_level, train_sentencepiece, write

WORDS = ["filmy", "<reason>", "<tool>", "sword", "Ж", " ", "  ", "\n", "a", "the filmy", "word"]
FLAGS = {
    "filmy": {},
    "<reason>": {"normalized": False},
    "<tool>": {"lstrip": True, "rstrip": True, "normalized": False},
    "word": {"single_word": True},
    "Ж": {"rstrip": True},
}
CONFIG = {"model_type": "llama", "vocab_size": 600, "hidden_size": 8, "num_attention_heads": 2}


def texts_with_added_tokens() -> list[str]:
    """Each token alone, at the start, in the middle, at the end, doubled and beside spaces; and random mixtures."""
    generator = random.Random(0)
    texts = []
    for token in FLAGS:
        texts += [token, f"{token}a", f"a{token}b", f"a {token} b", f"a{token}", f"{token}{token}", f"x{token} {token}"]
        texts += [f"  {token}  b", f"a\n{token}\nb"]
    texts += ["".join(generator.choices(WORDS, k=8)) for _ in range(300)]
    return [text for text in texts if text == text.lstrip(" ")]  # LlamaTokenizer loses a text's first space: see below


def tokens_from(n: int) -> list[dict]:
    return [added(token, n + i, special=False) | flags for i, (token, flags) in enumerate(FLAGS.items())]


def byte_level(folder: Path, place: str) -> Path:
    """A byte-level tokenizer.json in which FLAGS are declared in one of three places."""
    document = llama3_style(train_byte_level()) | {"truncation": None}
    n = 1 + document["added_tokens"][-1]["id"]
    document["post_processor"] = document["post_processor"]["processors"][1]
    document["pre_tokenizer"]["add_prefix_space"] = place == "prefix space"
    settings = {"eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {}
    if place == "tokenizer_config.json":
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in [*document["added_tokens"], *tokens_from(n)]
        }
    elif place == "added_tokens.json":
        files["added_tokens__json"] = {token["content"]: token["id"] for token in tokens_from(n)}
    else:
        document["added_tokens"] += tokens_from(n)
    return write(folder, tokenizer__json=document, tokenizer_config__json=settings, config__json=CONFIG, **files)


def llama2(folder: Path, settings: dict, metaspace: bool = False, normalized: bool = True) -> Path:
    """A SentencePiece model as tokenizer.json, with FLAGS."""
    codec = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    document = llama2_style(codec, metaspace)
    tokens = tokens_from(codec.vocab_size())
    document["added_tokens"] += [token | {"normalized": token["normalized"] and normalized} for token in tokens]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings
    return write(folder, tokenizer__json=document, tokenizer_config__json=settings, config__json=CONFIG)


KINDS: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json": lambda folder: byte_level(folder, "tokenizer.json"),
    "tokenizer_config.json": lambda folder: byte_level(folder, "tokenizer_config.json"),
    "added_tokens.json": lambda folder: byte_level(folder, "added_tokens.json"),
    "prefix space": lambda folder: byte_level(folder, "prefix space"),
    "LlamaTokenizer": lambda folder: llama2(folder, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "LlamaTokenizer legacy": lambda folder: llama2(folder, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    "prepend": lambda folder: llama2(folder, {}, normalized=False),
    "metaspace": lambda folder: llama2(folder, {}, metaspace=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_that_are_text_get_the_ids_of_transformers(tmp_path: Path, kind: str):
    """C18: with single_word, lstrip, rstrip and normalized, wherever the folder declares them."""
    from transformers import AutoTokenizer

    folder = KINDS[kind](tmp_path)
    tokenizer = load_tokenizer(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    texts = texts_with_added_tokens()
    assert tokenizer.encode_batch(texts) == reference(texts)["input_ids"]
    assert [tokenizer.encode(text) for text in texts[:50]] == reference(texts[:50])["input_ids"]
    assert not any(map(tokenizer.has_control, FLAGS))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"prefix space"}))  # its decoder keeps the space that it adds
def test_texts_with_added_tokens_come_back_as_they_were(tmp_path: Path, kind: str):
    """C18: but for the spaces that a token takes away, or a legacy tokenizer adds behind one, in transformers, too."""
    tokenizer = load_tokenizer(KINDS[kind](tmp_path))
    for text in ("filmy", "a filmy b", "<reason> two and two", "filmyfilmy filmy", "the filmy <reason> film"):
        for starts_text in (True, False):
            ids = tokenizer.encode(text, starts_text)
            assert tokenizer.decode(ids, starts_text).replace("  ", " ") == text


def test_a_tokenizer_model_finds_added_tokens_and_user_defined_pieces(tmp_path: Path):
    """C18: the same ids as the same model gets as a tokenizer.json under transformers' LlamaTokenizer."""
    from transformers import AutoTokenizer

    model = train_sentencepiece(user_defined_symbols=["<piece>", "7"])
    codec = sentencepiece.SentencePieceProcessor(model_proto=model)
    document = llama2_style(codec)
    declared = {str(token["id"]): token for token in tokens_from(codec.vocab_size())}
    for token in declared.values():
        del token["id"]
    for legacy in (False, True):
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "added_tokens_decoder": declared,
                    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        ours = write(tmp_path / f"model {legacy}", tokenizer__model=model, tokenizer_config__json=settings)
        pieces = [added(piece, codec.piece_to_id(piece), special=False) | {"normalized": False}
                  for piece in ("<piece>", "7")]
        whole = document | {"added_tokens": [*document["added_tokens"], *pieces]}
        theirs = write(tmp_path / f"json {legacy}", tokenizer__json=whole, tokenizer_config__json=settings | {
            "added_tokens_decoder": declared | {str(piece["id"]): {k: v for k, v in piece.items() if k != "id"}
                                                for piece in pieces}}, config__json=CONFIG)
        texts = [*texts_with_added_tokens(), "<piece>a <piece> b", "1977 <piece>"]
        reference = AutoTokenizer.from_pretrained(theirs)
        tokenizer = load_tokenizer(ours)
        assert tokenizer.encode_batch(texts) == reference(texts)["input_ids"]
        assert tokenizer.decode(tokenizer.encode("the <piece> filmy 7")) == "the <piece> filmy 7"
