"""Llama 3's tokenizer.model as Meta publishes it: 128,000 lines of a token in base64 and its rank, tiktoken's format.

It becomes what a tokenizer.json would hold. No file has its split pattern and its 256 control tokens, only
models/llama3/tokenizer.py of https://github.com/meta-llama/llama-models.
"""

import base64
from pathlib import Path

from llama.boundary.errors import UserError

RANKS = 128_000
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = [
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"),
    *("python_tag", "image"),
    *(f"reserved_special_token_{n}" for n in range(2, 246)),
]


def llama3_document(file: Path, data: bytes) -> tuple[dict, int]:
    """The document of a tokenizer.json, and the id of the end token. Raises UserError for other ranks than Llama 3's.
    """
    vocab = _read_ranks(file, data)
    # tiktoken joins two neighbours if together they are a token, the lowest rank first. The same rule as BPE merges:
    # list every way to split a token into two tokens. (Splits that BPE never produces are listed, too, but never used.)
    # A token that no merge can build is found only as a complete word: by tiktoken, and here by ignore_merges.
    merges = []
    for token in vocab:
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in vocab and right in vocab:
                merges.append([left, right])
    control = {f"<|{name}|>": RANKS + n for n, name in enumerate(CONTROL)}
    bos = "<|begin_of_text|>"
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document = {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True},
        "added_tokens": [{"content": token, "id": id, "special": True} for token, id in control.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, spell]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos}}],
            "special_tokens": {bos: {"ids": [control[bos]]}},
        },
        "decoder": spell,
    }
    return document, control["<|end_of_text|>"]


def _read_ranks(file: Path, data: bytes) -> dict[str, int]:
    ranks = {}
    for line in data.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    if list(ranks.values()) != list(range(RANKS)):
        raise UserError(f"{file}: {len(ranks)} ranks, expected Llama 3's {RANKS} in order")
    # Byte-level vocabularies spell an unprintable byte as a character from U+0100 on, as GPT-2 did.
    unprintable = [*range(33), *range(127, 161), 173]
    spelling = {byte: chr(256 + n) for n, byte in enumerate(unprintable)}
    return {token.decode("latin-1").translate(spelling): rank for token, rank in ranks.items()}
