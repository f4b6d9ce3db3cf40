"""Tokens that were added to a vocabulary. Where a text spells one, it is that token and not the letters.

Some are text, such as a word of a domain or "<think>". Others are control tokens, such as "</s>": a text's own spelling
of one stays letters, unless `--control_tokens` names it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama.boundary.errors import UserError


class AddedToken(NamedTuple):
    """A token and how a text spells it, with the names of a tokenizer.json.

    special:        it is a control token.
    single_word:    only between characters that belong to no word.
    lstrip, rstrip: it takes the spaces before or behind it, too.
    normalized:     it is looked for after the normalizer has changed the text.
    """

    content: str
    id: int
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @classmethod
    def read(cls, values: dict, id: int) -> "AddedToken":
        """A token as a JSON file declares it. `normalized` has transformers' default."""
        given: dict = {"normalized": not values.get("special")}
        given |= {name: values[name] for name in cls._fields if name != "id" and values.get(name) is not None}
        return cls(id=id, **given)


def check_ids(where: Path, vocab: dict[str, int], tokens: Iterable[AddedToken]) -> None:
    """Raises UserError unless the tokens have the ids that the `tokenizers` library gives them, whatever files declare:
    a token of the vocabulary keeps its id, the others follow the vocabulary one after another."""
    following = len(vocab)
    for token in sorted(tokens, key=lambda token: token.id):
        expected = vocab.get(token.content, following)
        if token.id != expected:
            found = f"the added token {token.content!r:.100} has id {token.id!r:.20}"
            raise UserError(f"{where}: {found}, expected {expected}, which transformers gives it")
        following = max(following, expected + 1)


class Splitter:
    """Finds added tokens in texts as the `tokenizers` library does: that library itself looks for them."""

    def __init__(
        self,
        tokens: Sequence[AddedToken],
        normalizer: dict | None,
        legacy: bool | None = None,
        prefixes: bool = False,
    ):
        """`normalizer`: that of a tokenizer.json. `legacy` and `prefixes`: see `starts_anew`."""
        from tokenizers import AddedToken as Added
        from tokenizers import Tokenizer as Codec

        self._legacy = legacy
        self._prefixes = prefixes
        self._prepends = has_step(normalizer, lambda step: step.get("type") == "Prepend")
        # A model that knows no word: what lies between two added tokens is one unknown word, with id 0.
        model = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
        empty = dict.fromkeys(("truncation", "padding", "pre_tokenizer", "post_processor", "decoder"))
        known: dict = {"version": "1.0", "added_tokens": [], "model": model, "normalizer": normalizer}
        self._codec = Codec.from_str(json.dumps(known | empty))
        added = []
        for token in tokens:
            values = token._asdict()
            del values["id"]
            added.append(Added(**values))
        self._codec.add_tokens(added)
        self._tokens = {self._codec.token_to_id(token.content): token for token in tokens}

    def split(self, texts: list[str]) -> list[list[str | AddedToken]]:
        """The parts of each text, in order: added tokens, and what lies between them."""
        split = []
        for text, encoding in zip(texts, self._codec.encode_batch(texts), strict=True):
            starts = [start for start, _ in encoding.offsets]
            # Not the library's own ends: where a normalizer makes one character of two, they leave out the second.
            end = max([len(text.rstrip()), *(stop for _, stop in encoding.offsets)])
            stops = [*starts, end][1:]
            parts = []
            for id, start, stop in zip(encoding.ids, starts, stops, strict=True):
                parts.append(self._tokens[id] if id else text[start:stop])
            split.append(parts)
        return split

    def starts_anew(self, token: AddedToken, text: str) -> bool:
        """Whether `text`, which follows an added token, gets a dummy space like the start of a text.

        SentencePiece models, as transformers' LlamaTokenizer reads them: if `legacy` in tokenizer_config.json is true.
        Others (legacy=None): if the pre-tokenizer does it (`prefixes`), or the normalizer, which only sees where tokens
        that are not `normalized` were found.
        """
        if self._legacy is not None:
            return self._legacy and not text.startswith(" ")
        return self._prefixes or (self._prepends and not token.normalized)


def has_step(step: Any, is_it: Callable[[dict], bool]) -> bool:
    """Whether a normalizer or pre-tokenizer of a tokenizer.json, or any step inside it, is the one that is sought."""
    if isinstance(step, list):
        return any(has_step(child, is_it) for child in step)
    if not step:
        return False
    inner = [step[key] for key in ("normalizers", "pretokenizers") if key in step]
    return is_it(step) or has_step(inner, is_it)
