"""What a tokenizer is: text to ids and back. `tokenizer_files` has the three kinds of file that one is made from.

starts_text=True encodes a text as the start of an example: BOS comes first, and SentencePiece's dummy space if the file
asks for one. False adds neither, for a segment in the middle, so the ids of segments can simply be joined.

Added tokens that are no control tokens, such as a word of a domain, are found in texts. Text never becomes a control
token: code adds those by id, through `bos_id`, `eos_id` and `control_id`. Only `--control_tokens` makes an exception.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama.boundary.errors import UserError, first_few
from llama.data.added_tokens import AddedToken, Splitter


@dataclass(frozen=True)
class TokenizerFacts:
    """What all files of a tokenizer together say.

    path:       the folder or file that it was loaded from.
    files:      the tokenizer's files, which an export copies with the weights; the first is the tokenizer itself.
    vocab_size: the highest id + 1, control tokens included.
    control:    {text: id} of the control tokens.
    in_texts:   the added tokens that texts may spell.
    bos_id:     the id at position 0 of every text, None where the model was trained without one.
    eos_id:     the id that ends an answer.
    notes:      what a user should know: what the files hold that is not used.
    spelled:    the control tokens among `in_texts`, which --control_tokens names.
    """

    path: Path
    files: tuple[Path, ...]
    vocab_size: int
    control: dict[str, int]
    in_texts: list[AddedToken]
    bos_id: int | None
    eos_id: int
    notes: list[str]
    spelled: tuple[str, ...]


class Tokenizer(ABC):
    """What all kinds of tokenizer share. Each kind adds `_ids` and `_codecs`."""

    _codecs: dict  # {starts_text: the library's object that decodes}

    def __init__(self, facts: TokenizerFacts, splitter: Splitter | None):
        """`splitter` finds the added tokens that texts may spell; None where there are none."""
        self.path = facts.path
        self.files = facts.files
        self.vocab_size = facts.vocab_size
        self.bos_id = facts.bos_id
        self.eos_id = facts.eos_id
        self.notes = facts.notes
        self.spelled = facts.spelled
        self._control = facts.control
        self._names = {id: token for token, id in reversed(facts.control.items())}  # of two names the first stays
        self._in_texts = {token.id: token.content for token in facts.in_texts}
        self._splitter = splitter

    @abstractmethod
    def _ids(self, texts: list[str], starts_text: bool) -> list[list[int]]:
        """The ids of each text, without BOS. No text spells an added token."""

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
        if self._splitter:
            batch = self._ids_and_added(texts, starts_text, self._splitter)
        else:
            batch = self._ids(texts, starts_text)
        if starts_text and self.bos_id is not None:
            bos = [self.bos_id]
            return [ids if ids[:1] == bos else bos + ids for ids in batch]  # a text may spell BOS, if it is `spelled`
        return batch

    def _ids_and_added(self, texts: list[str], starts_text: bool, splitter: Splitter) -> list[list[int]]:
        """`_ids` of what lies between added tokens, and the ids of those."""
        between: dict[bool, list[str]] = {True: [], False: []}
        plans = []  # for each text, of each part: an id, or how its letters are encoded
        for parts in splitter.split(texts):
            plan: list[AddedToken | bool] = []
            for i, part in enumerate(parts):
                if isinstance(part, AddedToken):
                    plan.append(part)
                    continue
                before = parts[i - 1] if i else None
                anew = splitter.starts_anew(before, part) if isinstance(before, AddedToken) else starts_text
                between[anew].append(part)
                plan.append(anew)
            plans.append(plan)
        encoded = {anew: iter(self._ids(parts, anew)) for anew, parts in between.items()}
        batch = []
        for plan in plans:
            ids = []
            for planned in plan:
                ids += next(encoded[planned]) if isinstance(planned, bool) else [planned.id]
            batch.append(ids)
        return batch

    def decode(self, ids: Sequence[int], starts_text: bool = True) -> str:
        """The text of `ids` without control tokens. If the ids continue a text, their leading space is kept.

        This is the inverse of `encode`, unless the file's own rules lose something: SentencePiece reads U+2581 as a
        space, and some models merge spaces at the start of a text.

        Raises UserError for an id that is not in the vocabulary.
        """
        text = ""
        plain: list[int] = []
        for id in map(int, ids):
            if not 0 <= id < self.vocab_size:
                raise UserError(f"{self.path}: token id {id}, expected 0 to {self.vocab_size - 1}")
            if id in self._in_texts and id not in self._names:
                text += self._decode_plain(plain, starts_text and not text) + self._in_texts[id]
                plain = []
            elif id not in self._names:
                plain.append(id)
        return text + self._decode_plain(plain, starts_text and not text)

    def decode_new(self, ids: Sequence[int]) -> str:
        """The text of ids that a model has written behind others. It may have more ids than its tokenizer: those have
        no text."""
        return self.decode([id for id in ids if id < self.vocab_size], starts_text=False)

    def _decode_plain(self, ids: list[int], starts_text: bool) -> str:
        return self._codecs[starts_text].decode(ids) if ids else ""

    def has_control(self, token: str) -> bool:
        """Whether there is a control token of exactly this text."""
        return token in self._control

    @property
    def control_names(self) -> list[str]:
        """The texts of all control tokens."""
        return [*self._control]

    def control_name(self, id: int) -> str | None:
        """The text of the control token with this id. None where the id is no control token."""
        return self._names.get(id)

    def control_id(self, token: str) -> int:
        """The id of the control token of exactly this text, such as "<|im_end|>". Raises UserError for any other."""
        if token not in self._control:
            raise UserError(f"{self.path}: no control token {token!r}, expected one of {first_few([*self._control])}")
        return self._control[token]
