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
# Places that no token crosses: before the single space of a word, and behind a single line break. (How GPT-2's pattern
# splits several spaces depends on what follows them.)
BORDER = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


def pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces, without a byte order mark; line ends stay as they are.

    A piece ends between two words or lines, so that its tokens are those of the whole text. If it has no such place, it
    may end anywhere.

    Raises UserError for a file that is no text in UTF-8.
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
    """Where to cut a text: at its last border, or behind its end if it has none."""
    places = [match.start() for match in BORDER.finditer(text)]
    return places[-1] if places else len(text)


class TokenPiece(NamedTuple):
    """A piece of a text: its ids, its bytes in UTF-8, and its words, which spaces separate."""

    ids: list[int]
    bytes: int
    words: int


def token_pieces(path: Path, tokenizer: Tokenizer) -> Iterator[TokenPiece]:
    """The pieces of a file, which together have the ids of the whole text. The first begins with BOS if the tokenizer
    has one.

    Some SentencePiece files treat the spaces at the start of a text in another way than later ones. So each later piece
    is encoded behind a line break, and the ids of the line break are left out.
    """
    before = ""
    for text in pieces(path):
        ids = tokenizer.encode(before + text)
        extra = len(tokenizer.encode(before)) if before else 0
        size = len(text.encode())
        words = len(text.split())
        yield TokenPiece(ids[extra:], size, words)
        before = "\n"
