"""What a tokenizer is: text to ids and back. `tokenizer_files` has the three kinds of file that one is made from.

starts_text=True encodes a text as the start of an example: BOS comes first, and SentencePiece's dummy space if the file
asks for one. False adds neither, for a segment in the middle, so the ids of segments can simply be joined. Text never
becomes a control token: code adds those by id, through `bos_id`, `eos_id` and `control_id`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from llama.boundary.errors import UserError, first_few


class Tokenizer(ABC):
    """What all kinds of tokenizer share. Each kind adds `_ids` and `_codecs`.

    vocab_size: the highest id + 1, control tokens included.
    bos_id:     the id at position 0 of every text, None where the model was trained without one.
    eos_id:     the id that ends an answer.
    path:       the folder or file that it was loaded from.
    files:      the tokenizer's files, which an export copies with the weights.
    """

    _codecs: dict  # {starts_text: the library's object that decodes}

    def __init__(
        self, path: Path, files: tuple, vocab_size: int, control: dict[str, int], bos_id: int | None, eos_id: int
    ):
        """`control`: {text: id} of the control tokens."""
        self.path = path
        self.files = files
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._control = control
        self._control_ids = {*control.values(), eos_id}

    @abstractmethod
    def _ids(self, texts: list[str], starts_text: bool) -> list[list[int]]:
        """The ids of each text, without BOS."""

    def encode(self, text: str, starts_text: bool = True) -> list[int]:
        """The ids of `text`, with BOS and the dummy space if it starts a text, with neither if it continues one.

        Raises UserError for a text that is not Unicode.
        """
        return self.encode_batch([text], starts_text)[0]

    def encode_batch(self, texts: list[str], starts_text: bool = True) -> list[list[int]]:
        """`encode` of every text, on the threads of the library."""
        for text in texts:
            surrogate = re.search("[\ud800-\udfff]", text)  # an escape sequence in JSON can stand for half a character
            if surrogate:
                raise UserError(f"text: lone surrogate at character {surrogate.start()}, expected Unicode")
        batch = self._ids(texts, starts_text)
        if starts_text and self.bos_id is not None:
            return [[self.bos_id, *ids] for ids in batch]
        return batch

    def decode(self, ids: Sequence[int], starts_text: bool = True) -> str:
        """The text of `ids` without control tokens. If the ids continue a text, their leading space is kept.

        This is the inverse of `encode`, unless the file's own rules lose something: SentencePiece reads U+2581 as a
        space, and some models merge spaces at the start of a text.

        Raises UserError for an id that is not in the vocabulary.
        """
        plain = []
        for id in map(int, ids):
            if not 0 <= id < self.vocab_size:
                raise UserError(f"{self.path}: token id {id}, expected 0 to {self.vocab_size - 1}")
            if id not in self._control_ids:
                plain.append(id)
        return self._codecs[starts_text].decode(plain) if plain else ""

    def has_control(self, token: str) -> bool:
        """Whether there is a control token of exactly this text."""
        return token in self._control

    @property
    def control_names(self) -> list[str]:
        """The texts of all control tokens."""
        return [*self._control]

    def control_name(self, id: int) -> str | None:
        """The text of the control token with this id. None where the id is no control token."""
        return next((token for token, known in self._control.items() if known == id), None)

    def control_id(self, token: str) -> int:
        """The id of the control token of exactly this text, such as "<|im_end|>". Raises UserError for any other."""
        if token not in self._control:
            raise UserError(f"{self.path}: no control token {token!r}, expected one of {first_few([*self._control])}")
        return self._control[token]
