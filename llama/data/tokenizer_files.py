"""The three kinds of tokenizer file that Llamas come with, each read into a `Tokenizer`.

    tokenizer.model, SentencePiece    Llama 1 and 2, OpenLLaMA, stories260K
    tokenizer.model, tiktoken ranks   Llama 3 as Meta publishes it
    tokenizer.json                    Llama 3 on the Hugging Face hub, SmolLM2, most newer checkpoints
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llama.boundary.errors import UserError, reason
from llama.boundary.foreign import refuse_foreign_content
from llama.boundary.untrusted import inside
from llama.data.added_tokens import AddedToken, Splitter, has_step
from llama.data.llama3_ranks import llama3_document
from llama.data.tokenizer import Tokenizer, TokenizerFacts
from llama.data.tokenizer_folder import read_folder, read_settings

USER_DEFINED = b"\x18\x04"  # the end of a serialised piece: field 3, its type, is 4
CONTROL_TYPE = 3
LARGEST_FILE = 512 * 2**20  # bytes; Llama 3's is 17 MB


def load_tokenizer(path: str | Path, control_tokens: str | None = None) -> Tokenizer:
    """The tokenizer in a folder (tokenizer.json, or else tokenizer.model), or in a file. The content of a .model file
    decides between SentencePiece and tiktoken. Raises UserError for a file that is missing or damaged.

    control_tokens: names with commas. Where a text spells one of these control tokens, it becomes that token.
    """
    tokenizer = _load(Path(path), control_tokens.split(",") if control_tokens else [])
    asked = read_settings(tokenizer.files[0].parent).get("add_prefix_space")
    start = 0 if tokenizer.bos_id is None else 1
    adds = tokenizer.encode("a")[start:] != tokenizer.encode("a", starts_text=False)
    if asked not in (None, adds):
        found = "gets a space" if adds else "gets no space"
        tokenizer.notes.append(f"{path}: a text {found} before it; add_prefix_space {asked} is not used")
    return tokenizer


def _load(path: Path, spelled: list[str]) -> Tokenizer:
    file = _find_file(path) if path.is_dir() else path
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{file}: {file.stat().st_size:,} bytes, expected at most {LARGEST_FILE:,}")
        data = file.read_bytes()
        refuse_foreign_content(file, data)
        if file.suffix == ".json":
            return JsonTokenizer(path, file, json.loads(data), spelled)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):  # a token in base64, and its rank
            document, eos_id = llama3_document(file, data)
            return JsonTokenizer(path, file, document, spelled, eos_id)
        return SentencePieceTokenizer(path, file, data, spelled)
    except (UserError, ImportError, MemoryError):
        raise
    except BaseException as error:  # for a damaged file, the libraries raise errors of any class
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # that of Rust's libraries
            raise
        raise UserError(f"{file}: {type(error).__name__} {reason(error)}, expected a whole tokenizer") from None


def _find_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if os.path.lexists(folder / name):
            inside(folder, name, "")
            return folder / name
    raise UserError(f"{folder}: no tokenizer, expected tokenizer.json or tokenizer.model")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, Kudo and Richardson 2018 (https://arxiv.org/abs/1808.06226).

    User-defined pieces and added tokens are found as transformers does it: in the raw text, and without a dummy space
    before or behind them.
    """

    def __init__(self, path: Path, file: Path, model: bytes, spelled: list[str]):
        user_defined = _user_defined(file, model)
        whole = SentencePieceProcessor(model_proto=model)
        vocab = {whole.id_to_piece(id): id for id in range(whole.vocab_size())}
        own = []
        for piece, id in vocab.items():
            special = whole.is_control(id) or whole.is_unknown(id)
            in_raw_text = piece in user_defined and "▁" not in piece  # ▁ stands for a space
            if special or in_raw_text:
                own.append(AddedToken(piece, id, special))
        bos_id, eos_id = (id if id >= 0 else None for id in (whole.bos_id(), whole.eos_id()))
        facts = read_folder(path, file, vocab, own, bos_id, eos_id, spelled)
        legacy = bool(read_settings(file.parent).get("legacy"))
        splitter = Splitter(facts.in_texts, None, legacy) if facts.in_texts else None
        super().__init__(facts, splitter)

        edited = bytearray(model)
        for piece in user_defined.keys() & facts.control.keys():
            edited[user_defined[piece]] = CONTROL_TYPE
        model = bytes(edited)
        codec = SentencePieceProcessor(model_proto=model)
        # Fields that come twice in a protobuf message are merged. So six more bytes say that in normalizer_spec (field
        # 3) add_dummy_prefix (3) and remove_extra_whitespaces (4) are false. Release 0.2.3 has no method for it.
        continuing = SentencePieceProcessor(model_proto=model + b"\x1a\x04\x18\x00\x20\x00")
        self._codecs = {True: codec, False: continuing}

    def _ids(self, texts: list[str], starts_text: bool) -> list[list[int]]:
        return self._codecs[starts_text].encode(texts)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library (https://github.com/huggingface/tokenizers), BPE only.

    That library looks for added tokens in every text. Its switch `encode_special_tokens` exempts only tokens that are
    called special, and merges or `ignore_merges` can spell any token. So this class removes all control tokens from
    the document before the library reads it, and a `Splitter` finds the other added tokens.
    """

    def __init__(self, path: Path, file: Path, document: dict, spelled: list[str], eos_id: int | None = None):
        from tokenizers import Tokenizer as Codec

        model = document["model"]
        own = [AddedToken.read(token, token["id"]) for token in document.get("added_tokens") or []]
        if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("dropout"):
            raise UserError(f"{file}: a {model['type']} model, expected BPE without a subword prefix and dropout")
        bos_id, behind = _template_ends(document.get("post_processor"))
        facts = read_folder(path, file, model["vocab"], own, bos_id, eos_id, spelled)
        if behind:
            what = f"{file}: its post-processor puts the tokens {behind[:8]} behind a text"
            facts.notes.append(f"{what}, which is not used: a template says where the end token comes")
        splitter = _splitter(document, facts, read_settings(file.parent)) if facts.in_texts else None
        super().__init__(facts, splitter)

        spellings = {token for token, id in model["vocab"].items() if id in self._names}
        hidden = facts.control.keys() | spellings
        starting = _without_tokens(document, hidden)
        continuing = dict(starting)
        for step in ("normalizer", "pre_tokenizer", "decoder"):
            if starting.get(step):
                continuing[step] = _without_first_space(starting[step])
        codec = Codec.from_str(json.dumps(starting))
        self._codecs = {True: codec, False: codec}
        if continuing != starting:
            self._codecs[False] = Codec.from_str(json.dumps(continuing))

    def _ids(self, texts: list[str], starts_text: bool) -> list[list[int]]:
        batch = self._codecs[starts_text].encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]


def _splitter(document: dict, facts: TokenizerFacts, settings: dict) -> Splitter:
    """Finds the added tokens as transformers' class for this tokenizer.json does. LlamaTokenizer has a normalizer and a
    pre-tokenizer of its own, unless the vocabulary is byte-level; the other classes have those of the file."""
    steps = document.get("pre_tokenizer")
    byte_level = has_step(steps, lambda step: step["type"] == "ByteLevel")
    class_name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if class_name == "LlamaTokenizer" and not byte_level:
        return Splitter(facts.in_texts, None, legacy=bool(settings.get("legacy")))

    def prefixes(step: dict) -> bool:
        if "prepend_scheme" in step:
            return step["prepend_scheme"] == "always"
        return step.get("add_prefix_space") is True

    return Splitter(facts.in_texts, document.get("normalizer"), prefixes=has_step(steps, prefixes))


def _user_defined(file: Path, model: bytes) -> dict[str, int]:
    """The user-defined pieces of a serialised ModelProto, each with the position of the byte that says its type. A file
    that was cut between two pieces would still parse, as a different tokenizer: it is refused here."""
    found = {}
    fields = set()
    position = 0
    while position < len(model):
        field = model[position] >> 3
        size, start = _read_varint(model, position + 1)
        position = start + size
        fields.add(field)
        piece = model[start:position] if field == 1 else b""
        if piece.endswith(USER_DEFINED):
            text = piece[2 : 2 + piece[1]]
            found[text.decode()] = position - 1
    if position != len(model) or not {1, 2, 3} <= fields:  # pieces, trainer_spec, normalizer_spec
        described = f"{len(model)} bytes that begin with {model[:16]!r}"
        raise UserError(f"{file}: {described}, expected a whole SentencePiece or tiktoken model")
    return found


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """protobuf's integer: seven bits a byte, the lowest first, until a byte below 128. And the position after it."""
    value = 0
    for n, byte in enumerate(data[position:]):
        value |= (byte & 127) << 7 * n
        if byte < 128:
            return value, position + n + 1
    return value, len(data) + 1  # cut short: a position that no whole file has


def _template_ends(post_processor: dict | None) -> tuple[int | None, list[int]]:
    """The id that a TemplateProcessing, alone or in a Sequence, puts before every text, and those that it puts behind.
    """
    before: list[int] = []
    behind: list[int] = []
    for step in post_processor.get("processors", [post_processor]) if post_processor else []:
        if step["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise ValueError(f"{step['type']} as post-processor instead of TemplateProcessing")
        ends = before
        for part in step.get("single", []):
            if "SpecialToken" in part:
                ends += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            else:
                ends = behind
    if len(before) > 1:
        raise ValueError(f"a post-processor that puts the tokens {before[:8]} before a text instead of one")
    return (before[0] if before else None), behind


def _without_tokens(document: dict, control: set[str]) -> dict:
    """A tokenizer.json without added tokens, whose vocabulary and merges do not have the control tokens."""
    model = document["model"]
    hidden = control - {model.get("unk_token")}  # the library itself needs the unknown token
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    plain_model = model | {
        "vocab": {token: id for token, id in model["vocab"].items() if token not in hidden},
        "merges": [pair for pair in pairs if control.isdisjoint((*pair, "".join(pair)))],
    }
    return document | {
        "model": plain_model,
        "added_tokens": [],
        **dict.fromkeys(("post_processor", "truncation", "padding")),
    }


def _without_first_space(step: Any) -> Any:
    """A normalizer, pre-tokenizer, decoder or list of them, without what adds or strips the space before a text."""
    if isinstance(step, list):
        kept = [_without_first_space(child) for child in step]
        return [child for child in kept if child]
    if step["type"] in ("Prepend", "Strip"):
        return None
    switches = {"add_prefix_space": False, "prepend_scheme": "never"}
    inner = ("normalizers", "pretokenizers", "decoders")
    changed = {key: _without_first_space(step[key]) for key in inner if key in step}
    switched = {key: switches[key] for key in switches if key in step}
    return step | changed | switched
