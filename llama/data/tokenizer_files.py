"""The three kinds of tokenizer file that Llamas come with, each read into a `Tokenizer`.

    tokenizer.model, SentencePiece    Llama 1 and 2, OpenLLaMA, stories260K
    tokenizer.model, tiktoken ranks   Llama 3 as Meta publishes it
    tokenizer.json                    Llama 3 on the Hugging Face hub, SmolLM2, most newer checkpoints
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llama.boundary.errors import UserError, first_few, reason
from llama.boundary.foreign import refuse_foreign_content
from llama.boundary.untrusted import inside, read_json
from llama.data.llama3_ranks import llama3_document
from llama.data.tokenizer import Tokenizer

LARGEST_FILE = 512 * 2**20  # bytes; Llama 3's is 17 MB
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder (tokenizer.json, or else tokenizer.model), or in a file. The content of a .model file
    decides between SentencePiece and tiktoken. Raises UserError for a file that is missing or damaged."""
    path = Path(path)
    file = _find_file(path) if path.is_dir() else path
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{file}: {file.stat().st_size:,} bytes, expected at most {LARGEST_FILE:,}")
        data = file.read_bytes()
        refuse_foreign_content(file, data)
        if file.suffix == ".json":
            return JsonTokenizer(path, file, json.loads(data))
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):  # a token in base64, and its rank
            document, eos_id = llama3_document(file, data)
            return JsonTokenizer(path, file, document, eos_id)
        return SentencePieceTokenizer(path, file, data)
    except (UserError, ImportError, MemoryError):
        raise
    except Exception as error:  # for a damaged file, the libraries raise errors of any class
        raise UserError(f"{file}: {type(error).__name__} {reason(error)}, expected a whole tokenizer") from None


def _find_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            inside(folder, name, "")
            return folder / name
    raise UserError(f"{folder}: no tokenizer, expected tokenizer.json or tokenizer.model")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, Kudo and Richardson 2018 (https://arxiv.org/abs/1808.06226)."""

    def __init__(self, path: Path, file: Path, model: bytes):
        model = _markers_as_control(file, model)
        codec = SentencePieceProcessor(model_proto=model)
        # Fields that come twice in a protobuf message are merged. So six more bytes say that in normalizer_spec (field
        # 3) add_dummy_prefix (3) and remove_extra_whitespaces (4) are false. Release 0.2.3 has no method for it.
        continuing = SentencePieceProcessor(model_proto=model + b"\x1a\x04\x18\x00\x20\x00")
        self._codecs = {True: codec, False: continuing}
        vocab = {codec.id_to_piece(id): id for id in range(codec.vocab_size())}
        control = {}
        for piece, id in vocab.items():
            if codec.is_control(id) or codec.is_unknown(id):
                control[piece] = id
        bos_id = codec.bos_id() if codec.bos_id() >= 0 else None
        eos_id = codec.eos_id() if codec.eos_id() >= 0 else None
        super().__init__(path, *_with_neighbours(file, vocab, control, bos_id, eos_id))

    def _ids(self, texts: list[str], starts_text: bool) -> list[list[int]]:
        return self._codecs[starts_text].encode(texts)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library (https://github.com/huggingface/tokenizers), BPE only.

    That library looks for added tokens in every text. Its switch `encode_special_tokens` exempts only tokens that are
    called special, and merges or `ignore_merges` can spell any token. So this class removes all control tokens from
    the document before the library reads it.
    """

    def __init__(self, path: Path, file: Path, document: dict, eos_id: int | None = None):
        from tokenizers import Tokenizer as Codec

        model = document["model"]
        added = document.get("added_tokens") or []
        if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
            raise UserError(f"{file}: a {model['type']} model, expected BPE without a subword prefix")
        vocab = model["vocab"] | {token["content"]: token["id"] for token in added}
        bos_id = _template_bos(document.get("post_processor"))
        super().__init__(path, *_with_neighbours(file, vocab, _control_tokens(added), bos_id, eos_id))

        control = {token for token, id in vocab.items() if id in self._control_ids}
        starting = _without_tokens(document, control)
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


def _with_neighbours(
    file: Path, vocab: dict[str, int], control: dict[str, int], bos_id: int | None, eos_id: int | None
) -> tuple:
    """(files, vocab_size, control, bos_id, eos_id) of a tokenizer: what its file says, changed by the JSON files beside
    it. Those may add control tokens, switch BOS on or off, and name another end token."""
    folder = file.parent
    neighbours = [folder / name for name in FILES if (folder / name).is_file()]
    for neighbour in neighbours:
        inside(folder, neighbour.name, "")  # every export copies them: a link could make it copy any other file
    files = tuple(dict.fromkeys([file, *neighbours]))

    settings = _read_if_there(folder, "tokenizer_config.json")
    declared = settings.get("added_tokens_decoder", {})
    added = [{"id": int(id), **token} for id, token in declared.items()]
    more = _read_if_there(folder, "added_tokens.json")
    added += [{"id": id, "content": text} for text, id in more.items()]
    bos = _text_of(settings.get("bos_token"))
    eos = _text_of(settings.get("eos_token"))
    named = {token: vocab[token] for token in (bos, eos) if token in vocab}
    control = control | _control_tokens(added) | named

    if not settings.get("add_bos_token", bos_id is not None):
        bos_id = None
    elif bos_id is None:
        bos_id = control.get(bos)

    if eos is None:
        eos_id = _configured_eos(folder, eos_id)
    elif eos in control:
        eos_id = control[eos]
    else:
        raise UserError(f"{file}: eos_token {eos!r:.100}, expected a control token like {first_few([*control])}")
    vocab_size = 1 + max([*vocab.values(), *control.values()])
    if eos_id is None or not 0 <= eos_id < vocab_size:
        wanted = f"eos_token in tokenizer_config.json or an eos_token_id below {vocab_size} in config.json"
        raise UserError(f"{file}: end token {eos_id}, expected {wanted}")
    return files, vocab_size, control, bos_id, eos_id


def _configured_eos(folder: Path, eos_id: int | None) -> int | None:
    """The end token that the model's settings name, or else the tokenizer file's own. Generation's settings win."""
    for name in ("config.json", "generation_config.json"):
        ids = _read_if_there(folder, name).get("eos_token_id")
        if isinstance(ids, list):
            eos_id = ids[0]
        elif ids is not None:
            eos_id = ids
    return eos_id


def _text_of(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _read_if_there(folder: Path, name: str) -> dict:
    return read_json(folder, name) if (folder / name).exists() else {}


def _is_marker(token: str) -> bool:
    """Whether an added token counts as a control token though the file does not call it special, such as "<think>".
    It does if it is more than a single character or spaces."""
    return len(token.replace("▁", " ").strip()) > 1


def _control_tokens(tokens: Iterable[dict]) -> dict[str, int]:
    control = [token for token in tokens if token.get("special") or _is_marker(token["content"])]
    return {token["content"]: token["id"] for token in control}


def _markers_as_control(file: Path, model: bytes) -> bytes:
    """A serialised ModelProto in which user-defined markers (type 4, found in any text) are control tokens (type 3).
    A file that was cut between two pieces would still parse, as a different tokenizer: it is refused here."""
    edited = bytearray(model)
    fields = set()
    position = 0
    while position < len(model):
        field = model[position] >> 3
        size, start = _read_varint(model, position + 1)
        position = start + size
        fields.add(field)
        piece = model[start:position] if field == 1 else b""
        if piece.endswith(b"\x18\x04"):
            text = piece[2 : 2 + piece[1]]
            if _is_marker(text.decode()):
                edited[position - 1] = 3
    if position != len(model) or not {1, 2, 3} <= fields:  # pieces, trainer_spec, normalizer_spec
        found = f"{len(model)} bytes that begin with {model[:16]!r}"
        raise UserError(f"{file}: {found}, expected a whole SentencePiece or tiktoken model")
    return bytes(edited)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """protobuf's integer: seven bits a byte, the lowest first, until a byte below 128. And the position after it."""
    value = 0
    for n, byte in enumerate(data[position:]):
        value |= (byte & 127) << 7 * n
        if byte < 128:
            return value, position + n + 1
    return value, len(data) + 1  # cut short: a position that no whole file has


def _template_bos(post_processor: dict | None) -> int | None:
    """The id that a TemplateProcessing, alone or in a Sequence, puts before every text."""
    if not post_processor:
        return None
    for step in post_processor.get("processors", [post_processor]):
        if step["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise ValueError(f"{step['type']} as post-processor instead of TemplateProcessing")
        first = step.get("single", [{}])[0]
        if "SpecialToken" in first:
            return step["special_tokens"][first["SpecialToken"]["id"]]["ids"][0]
    return None


def _without_tokens(document: dict, control: set[str]) -> dict:
    """A tokenizer.json whose vocabulary, merges and added tokens do not have these tokens."""
    model = document["model"]
    hidden = control - {model.get("unk_token")}  # the library itself needs the unknown token
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    plain_model = model | {
        "vocab": {token: id for token, id in model["vocab"].items() if token not in hidden},
        "merges": [pair for pair in pairs if control.isdisjoint((*pair, "".join(pair)))],
    }
    return document | {
        "model": plain_model,
        "added_tokens": [token for token in document.get("added_tokens") or [] if token["content"] not in control],
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
