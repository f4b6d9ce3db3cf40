"""A text file of any length, as one stream of tokens. Memory holds a piece of it."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama.boundary.errors import UserError, as_user_error
from llama.boundary.foreign import refuse_foreign_file
from llama.data.tokenizer import Tokenizer

PIECE = 1 << 17  # characters that are tokenized at once
# Places that no token reaches across: behind the line break that ends a run of spaces, and before the space of a word.
BETWEEN_LINES = re.compile(r"(?<=\n)(?=\S)")
BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)")


def pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces, without a byte order mark; line ends stay as they are.

    A piece ends between two lines, or between two words where it is one line, or anywhere where it is one word. In this
    last case, tokens at that place may differ from those of the whole text.

    Raises UserError for what is no text in UTF-8.
    """
    refuse_foreign_file(path)
    text = ""
    for decoded in _decoded(path):
        text += decoded
        if len(text) >= PIECE:
            end = _last_border(text)
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    before = 0  # bytes that are decoded
    with as_user_error(path):
        file = open(path, "rb")
    with file:
        while True:
            with as_user_error(path):
                data = file.read(PIECE)
            waiting = len(decoder.getstate()[0])  # bytes of a character that is not whole yet
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = before - waiting + error.start
                raise UserError(f"{path}: byte {place} is not UTF-8, expected a text file in UTF-8") from None
            before += len(data)
            if not data:
                return


def _last_border(text: str) -> int:
    """Where to cut a text: as far behind as possible, but not at its very end, where a token may go on."""
    for pattern in (BETWEEN_LINES, BETWEEN_WORDS):
        found = max((match.start() for match in pattern.finditer(text)), default=0)
        if found:
            return found
    return len(text)


class TokenPiece(NamedTuple):
    """A piece of a text: its ids, its size in UTF-8, and how many words it has that spaces separate."""

    ids: list[int]
    bytes: int
    words: int


def token_pieces(path: Path, tokenizer: Tokenizer) -> Iterator[TokenPiece]:
    """The pieces of a file. BOS comes before the first one, where the tokenizer has it."""
    is_first = True
    for text in pieces(path):
        ids = tokenizer.encode(text, starts_text=is_first)
        yield TokenPiece(ids, len(text.encode()), len(text.split()))
        is_first = False
