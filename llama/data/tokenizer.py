"""One interface over the three kinds of tokenizer file that Llamas come with.

    tokenizer.model, SentencePiece    Llama 1 and 2, OpenLLaMA, stories260K
    tokenizer.model, tiktoken ranks   Llama 3 as Meta ships it
    tokenizer.json                    Llama 3 on the Hugging Face hub, SmolLM2, most newer checkpoints

A text is encoded as the beginning of a document (BOS by id, and SentencePiece's dummy space where the file
asks for one) or as a continuation (neither), so that segments encoded apart join as ids without a seam. Nothing
that a text says becomes a control token: those enter by id, through `bos_id`, `eos_id` and `control_id`.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llama.boundary.errors import UserError, WeightsError
from llama.boundary.untrusted import inside, read_json_text

LARGEST_FILE = 512 * 2**20  # bytes; Llama 3's is 17 MB
FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "chat_template.jinja", "generation_config.json")


class TokenizerError(UserError):
    """A tokenizer, text or id that cannot be used. One line: where, what was found, what was expected."""


class Tokenizer:
    """What the three kinds share; each brings `_codecs` (for beginnings, for continuations) and `_ids`.

    vocab_size: highest id + 1, control tokens included.
    bos_id:     the id at position 0 of every text, None where the tokenizer's own convention adds none.
    eos_id:     the id that ends a response.
    path:       the folder or file it was loaded from.
    files:      the tokenizer's files, which an export copies along with the weights.
    """

    def __init__(self, path: Path, file: Path, vocab: dict[str, int], control: dict[str, int],
                 bos_id: int | None, eos_id: int | None):
        """`vocab` and `control` map the file's tokens to ids; `bos_id` and `eos_id` are the file's own.

        The JSON files beside it may add control tokens, switch BOS on or off and name another end.
        """
        folder = file.parent
        settings = _read_json(folder / "tokenizer_config.json")
        self.path = path
        beside = [folder / name for name in FILES if (folder / name).is_file()]
        for neighbour in beside:  # they are copied into every export: a link must not carry other files out
            inside(folder, neighbour.name, "")
        self.files = tuple(dict.fromkeys([file, *beside]))
        added = [{"id": int(id), **token} for id, token in settings.get("added_tokens_decoder", {}).items()]
        more = _read_json(folder / "added_tokens.json")
        added += [{"id": id, "content": text} for text, id in more.items()]
        self._control = control | _control_tokens(added)

        named = [settings.get(key) for key in ("bos_token", "eos_token")]
        bos, eos = (token["content"] if isinstance(token, dict) else token for token in named)
        self._control |= {token: vocab[token] for token in (bos, eos) if token in vocab}
        begins = settings.get("add_bos_token", bos_id is not None)
        self.bos_id = (self._control.get(bos) if bos_id is None else bos_id) if begins else None
        if eos is not None:
            eos_id = self.control_id(eos)
        else:
            for name in ("config.json", "generation_config.json"):
                ids = _read_json(folder / name).get("eos_token_id")
                eos_id = eos_id if ids is None else ids[0] if isinstance(ids, list) else ids
        self.vocab_size = 1 + max([*vocab.values(), *self._control.values()])
        if eos_id is None or not 0 <= eos_id < self.vocab_size:
            raise TokenizerError(f"{file}: end token {eos_id}, expected eos_token in tokenizer_config.json or "
                                 f"an eos_token_id below {self.vocab_size} in config.json")
        self.eos_id = eos_id
        self._control_ids = {*self._control.values(), eos_id}

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of `text` as the beginning of a document or as what `continues` one: no BOS, no dummy space."""
        return self.encode_batch([text], continues)[0]

    def encode_batch(self, texts: list[str], continues: bool = False) -> list[list[int]]:
        """`encode` of every text, on the library's own threads."""
        for text in texts:
            if half := re.search("[\ud800-\udfff]", text):  # an escape in JSON can smuggle one in
                raise TokenizerError(f"text: lone surrogate at character {half.start()}, expected Unicode")
        batch = self._ids(texts, continues)
        return batch if continues or self.bos_id is None else [[self.bos_id, *ids] for ids in batch]

    def decode(self, ids: Sequence[int], continues: bool = False) -> str:
        """The text of `ids` without control tokens; a continuation keeps its leading space.

        Inverse of `encode` unless the file's own normalizer loses something: SentencePiece reads U+2581 as a
        space, and some models merge spaces, which is then so for beginnings, while a continuation keeps all.
        """
        plain = []
        for id in map(int, ids):
            if not 0 <= id < self.vocab_size:
                raise TokenizerError(f"{self.path}: token id {id}, expected 0 to {self.vocab_size - 1}")
            if id not in self._control_ids:
                plain.append(id)
        return self._codecs[continues].decode(plain) if plain else ""

    def has_control(self, token: str) -> bool:
        """Whether there is a control token of exactly this text."""
        return token in self._control

    def control_name(self, id: int) -> str | None:
        """The text of the control token with this id, None where it is none."""
        return next((token for token, known in self._control.items() if known == id), None)

    def control_id(self, token: str) -> int:
        """The id of a control token by its exact text, such as "<|im_end|>"."""
        if token not in self._control:
            known = ", ".join(list(self._control)[:8])
            raise TokenizerError(f"{self.path}: no control token {token!r}, expected one like {known}")
        return self._control[token]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, Kudo and Richardson 2018 (https://arxiv.org/abs/1808.06226)."""

    def __init__(self, path: Path, file: Path, model: bytes):
        model = _markers_as_control(file, model)
        # A protobuf message that comes twice is merged, so six bytes tell normalizer_spec (field 3) that its
        # add_dummy_prefix (3) and remove_extra_whitespaces (4) are false. Release 0.2.3 has no method for it.
        models = (model, model + b"\x1a\x04\x18\x00\x20\x00")
        self._codecs = tuple(SentencePieceProcessor(model_proto=model) for model in models)
        codec = self._codecs[0]
        vocab = {codec.id_to_piece(id): id for id in range(codec.vocab_size())}
        control = {piece: id for piece, id in vocab.items() if codec.is_control(id) or codec.is_unknown(id)}
        bos_id, eos_id = (id if id >= 0 else None for id in (codec.bos_id(), codec.eos_id()))
        super().__init__(path, file, vocab, control, bos_id, eos_id)

    def _ids(self, texts: list[str], continues: bool) -> list[list[int]]:
        return self._codecs[continues].encode(texts)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library (https://github.com/huggingface/tokenizers), BPE only.

    That library looks for added tokens in every text. Its switch `encode_special_tokens` exempts only those
    called special, and merges or `ignore_merges` may spell any, so control tokens are cut out of the file.
    """

    def __init__(self, path: Path, file: Path, document: dict[str, Any], eos_id: int | None = None):
        from tokenizers import Tokenizer as Codec

        model, added = document["model"], document.get("added_tokens") or []
        if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
            raise TokenizerError(f"{file}: a {model['type']} model, expected BPE without a subword prefix")
        vocab = model["vocab"] | {token["content"]: token["id"] for token in added}
        bos_id = _template_bos(document.get("post_processor"))
        super().__init__(path, file, vocab, _control_tokens(added), bos_id, eos_id)

        control = {token for token, id in vocab.items() if id in self._control_ids}
        hidden = control - {model.get("unk_token")}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        plain = document | {
            "model": model | {
                "vocab": {token: id for token, id in model["vocab"].items() if token not in hidden},
                "merges": [pair for pair in pairs if control.isdisjoint((*pair, "".join(pair)))],
            },
            "added_tokens": [token for token in added if token["content"] not in control],
            "post_processor": None, "truncation": None, "padding": None,
        }
        steps = [step for step in ("normalizer", "pre_tokenizer", "decoder") if plain.get(step)]
        continuation = plain | {step: _without_first_space(plain[step]) for step in steps}
        codec = Codec.from_str(json.dumps(plain))
        self._codecs = (codec, codec if continuation == plain else Codec.from_str(json.dumps(continuation)))

    def _ids(self, texts: list[str], continues: bool) -> list[list[int]]:
        batch = self._codecs[continues].encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]


class Llama3Tokenizer(JsonTokenizer):
    """Llama 3's tokenizer.model as Meta ships it: 128,000 lines of base64 token and rank, tiktoken's format.

    No file holds its split pattern and 256 control tokens, only models/llama3/tokenizer.py of
    https://github.com/meta-llama/llama-models.
    """

    RANKS = 128_000
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    CONTROL = ("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
               "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
               "python_tag", "image", *(f"reserved_special_token_{n}" for n in range(2, 246)))

    def __init__(self, path: Path, file: Path, data: bytes):
        # Byte-level vocabularies spell an unprintable byte as a character from U+0100 on, as GPT-2 did.
        spelling = {byte: chr(256 + n) for n, byte in enumerate([*range(33), *range(127, 161), 173])}
        lines = (line.split() for line in data.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if list(ranks.values()) != list(range(self.RANKS)):
            raise TokenizerError(f"{file}: {len(ranks)} ranks, expected Llama 3's {self.RANKS} in order")
        vocab = {token.decode("latin-1").translate(spelling): rank for token, rank in ranks.items()}

        # tiktoken joins any two neighbours that spell a token, lowest rank first. Listing every cut of a token
        # in two is the same, as only the two parts that BPE itself makes of it can ever be neighbours. A token
        # that BPE cannot build is found as a whole word, in tiktoken as with ignore_merges.
        merges = [[token[:cut], token[cut:]] for token in vocab for cut in range(1, len(token))
                  if token[:cut] in vocab and token[cut:] in vocab]
        control = {f"<|{name}|>": self.RANKS + n for n, name in enumerate(self.CONTROL)}
        begin = "<|begin_of_text|>"
        split = {"type": "Split", "pattern": {"Regex": self.PATTERN}, "behavior": "Isolated", "invert": False}
        spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        super().__init__(path, file, {
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True},
            "added_tokens": [{"content": token, "id": id} for token, id in control.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, spell]},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": begin}}],
                               "special_tokens": {begin: {"ids": [control[begin]]}}},
            "decoder": spell,
        }, eos_id=control["<|end_of_text|>"])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder (tokenizer.json, else tokenizer.model) or in a file.

    Which kind a .model is, its content tells. Raises TokenizerError when there is none or it is not whole.
    """
    path = Path(path)
    names = ("tokenizer.json", "tokenizer.model")
    file = next((path / name for name in names if (path / name).exists()), None) if path.is_dir() else path
    if file is None:
        raise TokenizerError(f"{path}: no tokenizer, expected {' or '.join(names)}")
    try:
        if path.is_dir():
            inside(path, file.name, "")
        if file.stat().st_size > LARGEST_FILE:
            raise TokenizerError(f"{file}: {file.stat().st_size:,} bytes, expected at most {LARGEST_FILE:,}")
        data = file.read_bytes()
        if file.suffix == ".json":
            return JsonTokenizer(path, file, json.loads(data))
        kind = Llama3Tokenizer if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data) else SentencePieceTokenizer
        return kind(path, file, data)
    except (TokenizerError, ImportError, MemoryError):
        raise
    except WeightsError as error:
        raise TokenizerError(str(error)) from None
    except OSError as error:
        raise TokenizerError(f"{file}: {error.strerror}, expected a tokenizer file") from None
    except Exception as error:  # the libraries raise bare ones, whatever is wrong with a file
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise TokenizerError(f"{file}: {reason}, expected a whole tokenizer") from None


def _is_marker(token: str) -> bool:
    """Whether an added token is markup though not declared special, as "<think>" often is: unless it is a single
    character or only spaces, yes."""
    return len(token.replace("▁", " ").strip()) > 1


def _control_tokens(tokens: Iterable[dict[str, Any]]) -> dict[str, int]:
    return {t["content"]: t["id"] for t in tokens if t.get("special") or _is_marker(t["content"])}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file."""
    try:
        if not path.exists():
            return {}
        content = json.loads(read_json_text(path.parent, path.name))
    except WeightsError as error:
        raise TokenizerError(str(error)) from None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: {error}, expected a JSON object") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: {type(content).__name__}, expected a JSON object")
    return content


def _markers_as_control(file: Path, model: bytes) -> bytes:
    """A serialised ModelProto in which user-defined markers (type 4, found in any text) are control (type 3).

    Also checks that the file is whole: cut between two pieces it would still parse, as a different tokenizer.
    """
    edited, position, fields = bytearray(model), 0, set()
    while position < len(model):
        field, size, shift, more = model[position] >> 3, 0, 0, True
        while more and (position := position + 1) < len(model):  # a varint: seven bits a byte, lowest first
            size |= (model[position] & 127) << shift
            shift, more = shift + 7, model[position] > 127
        start, position = position + 1, position + 1 + size
        fields.add(field)
        piece = model[start:position] if field == 1 else b""
        if piece.endswith(b"\x18\x04") and _is_marker(piece[2 : 2 + piece[1]].decode()):
            edited[position - 1] = 3
    if position != len(model) or not {1, 2, 3} <= fields:  # pieces, trainer_spec, normalizer_spec
        raise TokenizerError(f"{file}: {len(model)} bytes that begin with {model[:16]!r}, expected a whole "
                             "SentencePiece or tiktoken model")
    return bytes(edited)


def _template_bos(post_processor: dict[str, Any] | None) -> int | None:
    """The id that a TemplateProcessing, alone or in a Sequence, puts before every text."""
    for step in post_processor.get("processors", [post_processor]) if post_processor else []:
        if step["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise ValueError(f"{step['type']} as post-processor instead of TemplateProcessing")
        first = step.get("single", [{}])[0]
        if "SpecialToken" in first:
            return step["special_tokens"][first["SpecialToken"]["id"]]["ids"][0]
    return None


def _without_first_space(step: Any) -> Any:
    """A normalizer, pre-tokenizer, decoder or list of them without what adds or strips a first space."""
    if isinstance(step, list):
        return [kept for child in step if (kept := _without_first_space(child))]
    if step["type"] in ("Prepend", "Strip"):
        return None
    switches = {"add_prefix_space": False, "prepend_scheme": "never"}
    inner = ("normalizers", "pretokenizers", "decoders")
    return {key: switches.get(key, _without_first_space(value) if key in inner else value)
            for key, value in step.items()}
