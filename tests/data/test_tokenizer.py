"""Every tokenizer against the library that owns its format, on 10,000 texts and more each.

Small tokenizers of all three formats are trained here, so the file proves the same without the real ones in
shared/assets; with them, Llama 2, Llama 3, SmolLM2 and stories260K are tested too.
"""

import base64
import functools
import importlib.util
import io
import json
import multiprocessing
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import regex
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import llama.data.tokenizer_files
from llama.boundary.errors import UserError
from llama.data import llama3_ranks
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "assets"
BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "tiny" / "tokenizer.model"
MARKERS = ["</s>", "<s>", "<unk>", "<0x0A>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|begin_of_text|>",
           "<think>", "[INST]", "<|end_of_text|>"]
WORDS = ("the film was a great story about nothing and it's not what you'd call good but I'll see it again in "
         "1999 because its actors were never better than here, said (he) \"one\" for 20 dollars; while they had no "
         "time to write #include <stdio.h> if x == 42: return x + 1 and/or naïve café über ça où 日本 語の映画 привет "
         "мир 😀 👍").split()
FRAGMENTS = [*WORDS, *MARKERS, " ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\x00", "\x85", "\u00a0", "\u3000",
             "\u2028", "'", "'S", "ſ", "é", "e\u0301", "ß", "İ", "👩‍👩‍👧", "🇩🇪", "𝔘", "\U0010ffff", "0", "12345678",
             "!?...", "<|", "|>", "<", ">", "/s", "_", "ñ", "qxqzq", " qxqzq"]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=10).map("".join)
thorough = settings(derandomize=True, max_examples=200, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.filter_too_much])


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Prose, runs of spaces and scripts, in which markers and odd characters turn up anywhere."""
    generator = random.Random(seed)

    def text() -> str:
        pool = generator.choice([WORDS, FRAGMENTS, MARKERS, list(" \n\tab"), [w + " " for w in WORDS]])
        return "".join(generator.choice(pool) for _ in range(generator.randrange(12)))

    return [text() for _ in range(count)]


def bpe(parts: list[str], rank: Callable[[str], float | None]) -> list[str]:
    """Byte-pair encoding by its definition: join the leftmost pair of lowest rank until no pair has one."""
    while True:
        ranks = [rank(a + b) for a, b in zip(parts, parts[1:], strict=False)]
        if all(r is None for r in ranks):
            return parts
        i = min((r, i) for i, r in enumerate(ranks) if r is not None)[1]
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def sentencepiece_by_definition(codec: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """What a SentencePiece BPE model makes of `text` when nothing is added, removed or merged beforehand."""
    score = {codec.id_to_piece(i): (-codec.get_score(i), i) for i in range(codec.vocab_size())
             if not (codec.is_control(i) or codec.is_unknown(i) or codec.is_byte(i))}
    pieces = bpe(list(text.replace(" ", "▁")), lambda piece: score[piece][0] if piece in score else None)
    spelled = [[score[p][1]] if p in score else [codec.piece_to_id(f"<0x{b:02X}>") for b in p.encode()]
               for p in pieces]
    return sum(spelled, [])


def llama3_by_definition(ranks: dict[bytes, int], text: str) -> list[int]:
    """What tiktoken makes of `text`: the split pattern, then whole words, then byte-pair encoding by rank."""
    ids = []
    for word in regex.findall(llama3_ranks.PATTERN, text):
        word = word.encode()
        parts = [word] if word in ranks else bpe([bytes([b]) for b in word], ranks.get)
        ids += [ranks[part] for part in parts]
    return ids


# Small tokenizers of every format


def train_sentencepiece(**options) -> bytes:
    generator, model = random.Random(1), io.BytesIO()
    sentences = [" ".join(generator.choices(WORDS, k=12)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", split_digits=True, minloglevel=2,
        **{"vocab_size": 450, "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True} | options,
    )
    return model.getvalue()


def train_byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE without any added token: what text should become whatever is added later."""
    generator = random.Random(2)
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    codec.train_from_iterator((" ".join(generator.choices(WORDS, k=12)) for _ in range(300)), trainer)
    return codec


def write(folder: Path, **files) -> Path:
    """A folder with these files: name__extension=content, a dict being written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def added(content: str, id: int, special: bool = True) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": id, "content": content, "special": special, **flags}


def template(token: str, id: int) -> dict:
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [id], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def llama3_style(codec: tokenizers.Tokenizer) -> dict:
    """`codec` as a tokenizer.json in the manner of Llama 3, with all that could let text reach an added token."""
    document, n = json.loads(codec.to_str()), codec.get_vocab_size()
    special = ["<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    document["added_tokens"] = [added(token, n + i) for i, token in enumerate(special)]
    document["added_tokens"] += [added("<think>", n + 4), added("</s>", n + 5), added("eotword", n + 6)]
    document["model"]["vocab"] |= {token["content"]: token["id"] for token in document["added_tokens"]}
    document["model"]["ignore_merges"] = True
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    begin = template("<|begin_of_text|>", n)
    document["post_processor"] = {"type": "Sequence", "processors": [byte_level, begin]}
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return document


def llama2_style(codec: sentencepiece.SentencePieceProcessor, metaspace: bool = False) -> dict:
    """A SentencePiece BPE model as a tokenizer.json, in the older (Prepend) or newer (Metaspace) manner."""
    pieces = {codec.id_to_piece(i): i for i in range(codec.vocab_size())}
    control = [piece for piece, i in pieces.items() if codec.is_control(i) or codec.is_unknown(i)]
    ranked = sorted((p for p, i in pieces.items() if not codec.is_byte(i)), key=lambda p: -codec.get_score(pieces[p]))
    merges = [[p[:k], p[k:]] for p in ranked for k in range(1, len(p)) if p[:k] in pieces and p[k:] in pieces]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": pieces,
             "merges": [" ".join(pair) for pair in merges]}
    return {"version": "1.0", "truncation": None, "padding": None, "model": model,
            "added_tokens": [added(piece, pieces[piece]) for piece in control],
            "normalizer": None if metaspace else normalizer, "pre_tokenizer": pre if metaspace else None,
            "post_processor": template("<s>", pieces["<s>"]),
            "decoder": {"type": "Sequence", "decoders": decoders}}


def tiktoken_file(codec: tokenizers.Tokenizer) -> bytes:
    """The tokens of a byte-level BPE in tiktoken's format: 256 bytes, every merge in order, a word that none build."""
    byte = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    byte |= {chr(256 + n): b for n, b in enumerate([*range(33), *range(127, 161), 173])}
    vocab = sorted(codec.get_vocab(), key=codec.token_to_id)
    lines = [f"{base64.b64encode(bytes(byte[c] for c in token)).decode()} {i}" for i, token in enumerate(vocab)]
    lines.append(f"{base64.b64encode(b'qxqzq').decode()} {len(vocab)}")
    return ("\n".join(lines) + "\n").encode()


@dataclass
class Family:
    """A tokenizer and its oracles: ids of plain text as a beginning (after BOS) and as a continuation."""

    tokenizer: Tokenizer
    beginnings: Callable[[list[str]], list[list[int]]]
    continuations: Callable[[list[str]], list[list[int]]]
    slow: bool = False  # the oracle for continuations is a definition in Python
    merges_spaces: bool = False
    loses_first_space: bool = False
    expressible: Callable[[str], bool] = lambda text: True

    def inverts(self, text: str, starts_text: bool) -> bool:
        """Whether the format can give `text` back at all."""
        lost = self.merges_spaces and ("  " in text or text != text.strip(" "))
        lost |= self.loses_first_space and text.startswith(" ")
        return self.expressible(text) and (not starts_text or not lost)


def sentencepiece_family(path: Path) -> Family:
    codec = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model" if path.is_dir() else path))
    merges_spaces = codec.encode("a  b") == codec.encode("a b")  # then nothing else encodes a continuation

    def behind_a_newline(texts: list[str]) -> list[list[int]]:
        """A newline joins with nothing, so what follows one is encoded as a continuation."""
        newline = codec.encode("\n")
        ids = codec.encode(["\n" + text for text in texts])
        assert len(newline) == 2 and all(i[:2] == newline for i in ids)
        return [i[2:] for i in ids]

    def defined(texts: list[str]) -> list[list[int]]:
        return [sentencepiece_by_definition(codec, text) for text in texts]

    return Family(load_tokenizer(path), codec.encode, defined if merges_spaces else behind_a_newline,
                  slow=merges_spaces, merges_spaces=merges_spaces,
                  expressible=lambda text: "▁" not in text)


def asset(name: str) -> Path:
    if not (ASSETS / name).is_dir():
        pytest.skip(f"{ASSETS / name} is absent")
    return ASSETS / name


@functools.cache
def load_asset(name: str) -> Tokenizer:
    return load_tokenizer(asset(name))


@functools.cache
def real_texts() -> list[str]:
    """Reviews and answers as people and models wrote them."""
    pyarrow = pytest.importorskip("pyarrow.parquet")
    reviews = pyarrow.read_table(asset("imdb") / "test.parquet", columns=["text"])["text"].to_pylist()[::125]
    answers = [json.loads(line)["output"] for line in (asset("alpaca") / "alpaca_first5000.jsonl").open()]
    return reviews + answers[::25]


def build_family(name: str, folder: Path) -> Family:
    if name == "sentencepiece":
        return sentencepiece_family(write(folder, tokenizer__model=train_sentencepiece()))
    if name == "sentencepiece merging spaces":
        return sentencepiece_family(
            write(folder, tokenizer__model=train_sentencepiece(remove_extra_whitespaces=True)))
    if name == "bundled":
        return sentencepiece_family(BUNDLED) if BUNDLED.is_file() else pytest.skip(f"{BUNDLED} is absent")
    if name == "bundled json":  # the oracle is the tokenizer.model of which it was made
        family = sentencepiece_family(BUNDLED)
        family.tokenizer = load_tokenizer(BUNDLED.parent)
        return family
    if name in ("llama2", "stories260K"):
        return sentencepiece_family(asset({"llama2": "llama2-tokenizer"}.get(name, name)))
    if name.startswith("llama2 json"):
        codec = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
        document = llama2_style(codec, metaspace="metaspace" in name)
        family = sentencepiece_family(write(folder / "model", tokenizer__model=codec.serialized_model_proto()))
        write(folder, tokenizer__json=document, tokenizer_config__json={"eos_token": "</s>"})
        family.tokenizer = load_tokenizer(folder)
        if "metaspace" in name:  # adds no dummy space where a text begins with one, so that space is lost
            plain = tokenizers.Tokenizer.from_str(json.dumps(document | {"added_tokens": [], "post_processor": None}))
            family.beginnings = lambda texts: [encoding.ids for encoding in plain.encode_batch(texts)]
            family.loses_first_space = True
        return family
    if name == "llama3 json":
        codec = train_byte_level()
        write(folder, tokenizer__json=llama3_style(codec), tokenizer_config__json={"eos_token": "<|eot_id|>"})

        def plain(texts: list[str]) -> list[list[int]]:
            return [encoding.ids for encoding in codec.encode_batch(texts)]

        return Family(load_tokenizer(folder), plain, plain)
    if name == "smollm2":
        # Not AutoTokenizer: since transformers 5 it builds a GPT2Tokenizer here, which leaves out the file's
        # digit splitting and so encodes spaces before a digit differently (transformers#45920).
        from transformers import PreTrainedTokenizerFast

        folder = asset("smollm2-135m-instruct-q4")
        reference = PreTrainedTokenizerFast.from_pretrained(folder, split_special_tokens=True)
        bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        known = set(reference.get_vocab())

        def expressible(text: str) -> bool:
            """The vocabulary lacks 21 bytes, and `tokenizers` drops them without a word."""
            return all(c in known for part, _ in bytes_.pre_tokenize_str(text) for c in part)

        def plain(texts: list[str]) -> list[list[int]]:
            return reference(texts)["input_ids"] if texts else []

        return Family(load_tokenizer(folder), plain, plain, expressible=expressible)
    if name == "tiktoken":
        data = tiktoken_file(train_byte_level())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama3_ranks, "RANKS", len(data.splitlines()))
            tokenizer = load_tokenizer(write(folder, tokenizer__model=data))
    else:
        tokenizer = load_asset("llama3-tokenizer")
    lines = (line.split() for line in (tokenizer.path / "tokenizer.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}

    def defined(texts: list[str]) -> list[list[int]]:
        return [llama3_by_definition(ranks, text) for text in texts]

    return Family(tokenizer, defined, defined, slow=True)


FAMILIES = ["bundled", "llama3 json", "tiktoken"]  # of each format one
MORE = ["bundled json", "sentencepiece", "sentencepiece merging spaces", "llama2", "stories260K", "llama2 json",
        "llama2 json metaspace", "smollm2", "llama3"]  # fmt: skip
FAMILIES += [pytest.param(name, marks=pytest.mark.slow) for name in MORE]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(request.param, tmp_path_factory.mktemp("tokenizer"))


# Ids


def test_every_text_gets_the_ids_of_the_library_that_owns_the_format(family: Family):
    """C12, C14, C18: a beginning is BOS and the library's ids; a continuation is neither BOS nor dummy space."""
    tokenizer, many, few = family.tokenizer, random_texts(10_000), random_texts(2_000, seed=1)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert tokenizer.encode_batch(many) == [bos + ids for ids in family.beginnings(many)]
    assert tokenizer.encode_batch(few, starts_text=False) == family.continuations(few)


def test_one_text_and_a_batch_give_the_same_ids(family: Family):
    """C12: training encodes batches, generation and the server single texts."""
    many = random_texts(500, seed=3)
    for starts_text in (True, False):
        one_by_one = [family.tokenizer.encode(text, starts_text) for text in many]
        assert family.tokenizer.encode_batch(many, starts_text) == one_by_one
    assert family.tokenizer.encode_batch([]) == []


@pytest.mark.slow
def test_real_texts_get_the_ids_of_the_library_and_come_back(family: Family):
    """C18: 400 reviews and answers."""
    real = [text for text in real_texts() if family.expressible(text)]
    tokenizer = family.tokenizer
    beginnings, continuations = tokenizer.encode_batch(real), tokenizer.encode_batch(real, starts_text=False)
    assert [ids[tokenizer.bos_id is not None :] for ids in beginnings] == family.beginnings(real)
    if not family.slow:
        assert continuations == family.continuations(real)
    assert [tokenizer.decode(ids, starts_text=False) for ids in continuations] == real
    for text, ids in zip(real, beginnings, strict=True):
        assert tokenizer.decode(ids) == text or not family.inverts(text, starts_text=True)


@pytest.mark.slow
def test_ten_thousand_texts_come_back_as_they_were(family: Family):
    """C18: decode(encode(x)) == x, with spaces at either end, newlines, emoji and bytes outside the vocabulary."""
    many, tokenizer = random_texts(10_000, seed=2), family.tokenizer
    for starts_text in (True, False):
        for text, ids in zip(many, tokenizer.encode_batch(many, starts_text), strict=True):
            assert tokenizer.decode(ids, starts_text) == text or not family.inverts(text, starts_text)


@thorough
@given(text=texts)
def test_any_text_comes_back_as_it_was(family: Family, text: str):
    """C18: as above, for what hypothesis comes up with."""
    for starts_text in (True, False):
        assume(family.inverts(text, starts_text))
        assert family.tokenizer.decode(family.tokenizer.encode(text, starts_text), starts_text) == text


@thorough
@given(first=texts, second=texts)
def test_segments_join_without_a_seam(family: Family, first: str, second: str):
    """C12, C13: the ids of a prompt are a strict prefix of prompt + response, whose text is just the two texts."""
    assume(first and second and family.inverts(first, True) and family.inverts(second, False))
    tokenizer = family.tokenizer
    prompt, response = tokenizer.encode(first), tokenizer.encode(second, starts_text=False)
    assert response
    assert tokenizer.decode(prompt + response) == first + second
    assert tokenizer.decode(response, starts_text=False) == second


# BOS, EOS and other control tokens


def test_there_is_exactly_one_bos_at_position_zero(family: Family):
    """C14: of every beginning, the empty one too, where the tokenizer has a BOS; of no continuation."""
    tokenizer = family.tokenizer
    for text in ["", " ", "a", *MARKERS, *random_texts(300)]:
        begins = [i for i, id in enumerate(tokenizer.encode(text)) if id == tokenizer.bos_id]
        assert begins == ([] if tokenizer.bos_id is None else [0])
        assert tokenizer.bos_id not in tokenizer.encode(text, starts_text=False)
    assert tokenizer.encode("", starts_text=False) == []


def test_text_never_becomes_a_control_token(family: Family):
    """C20, R16: not by its exact spelling, not next to other text, not joined from two parts."""
    tokenizer = family.tokenizer
    control = set(tokenizer._control.values())
    spellings = [*tokenizer._control, *MARKERS]
    hostile = [f"{before}{marker}{after}" for marker in spellings for before in ("", " ", "a", "\n")
               for after in ("", " ", "b")] + [a + b for a in spellings[:20] for b in spellings[:20]]
    assert len(control) >= 3
    for starts_text in (True, False):
        for text, ids in zip(hostile, tokenizer.encode_batch(hostile, starts_text), strict=True):
            body = ids[starts_text and tokenizer.bos_id is not None :]
            assert control.isdisjoint(body)
            if family.inverts(text, starts_text):
                assert tokenizer.decode(ids, starts_text) == text


def test_the_libraries_alone_would_let_text_become_control_tokens(tmp_path: Path):
    """C20: why control tokens are cut out of the file: `encode_special_tokens` does not do it."""
    document = llama3_style(train_byte_level())
    document["added_tokens"][4]["special"] = False
    codec = tokenizers.Tokenizer.from_str(json.dumps(document | {"truncation": None}))
    codec.encode_special_tokens = True
    n = document["added_tokens"][0]["id"]
    assert codec.encode("<think>", add_special_tokens=False).ids == [n + 4]  # not special, so still looked for
    assert codec.encode("<|eot_id|>", add_special_tokens=False).ids != [n + 3]
    codec = tokenizers.Tokenizer.from_str(json.dumps(document | {"truncation": None, "added_tokens": []}))
    assert codec.encode("eotword", add_special_tokens=False).ids == [n + 6]  # a whole word, by ignore_merges

    trained = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    document = llama2_style(trained)  # as some converters did, with merges that spell control tokens
    document["model"]["vocab"] |= {"s>": 450, "/s>": 451}
    document["model"]["merges"][:0] = ["s >", "/ s>", "< /s>"]
    codec = tokenizers.Tokenizer.from_str(json.dumps(document | {"added_tokens": []}))
    assert 2 in codec.encode("a</s>", add_special_tokens=False).ids
    write(tmp_path / "merges", tokenizer__json=document, tokenizer_config__json={"eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path / "merges")
    assert 2 not in tokenizer.encode("a</s>") and tokenizer.decode(tokenizer.encode("a</s>")) == "a</s>"

    model = train_sentencepiece(user_defined_symbols=["<|im_end|>", "▁▁▁", "7"])
    codec = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert codec.piece_to_id("<|im_end|>") in codec.encode("a<|im_end|>b")
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__model=model))
    assert tokenizer.control_id("<|im_end|>") == codec.piece_to_id("<|im_end|>")
    assert tokenizer.control_id("<|im_end|>") not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "a<|im_end|>b"
    for text in ("x   y", "1977", "a b"):  # spaces and single characters are text
        assert tokenizer.encode(text)[1:] == codec.encode(text)


def test_added_tokens_that_are_spaces_or_single_characters_stay_text(tmp_path: Path):
    """C18: NeoX-style runs of spaces and added letters keep the ids that the model was trained with."""
    codec = train_byte_level()
    codec.add_tokens([tokenizers.AddedToken("     ", normalized=False), tokenizers.AddedToken("の", normalized=False)])
    n = codec.get_vocab_size()
    codec.add_special_tokens(["<|end|>"])
    document = json.loads(codec.to_str())
    folder = write(tmp_path, tokenizer__json=document, tokenizer_config__json={"eos_token": "<|end|>"})
    tokenizer = load_tokenizer(folder)
    for text in ("a     b", "語の映画", "     "):
        assert tokenizer.encode(text) == codec.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert {n - 1, n - 2} & set(tokenizer.encode(text))
    assert tokenizer.control_id("<|end|>") == n


def test_only_what_a_vocabulary_cannot_spell_is_unknown(tmp_path: Path):
    """C20: a model without byte fallback has one control token that text reaches, but not by its spelling."""
    codec = tokenizers.Tokenizer(tokenizers.models.BPE(
        {"<unk>": 0, "<": 1, "u": 2, ">": 3, "<u": 4, "<end>": 5}, [("<", "u")], unk_token="<unk>"))
    codec.add_special_tokens(["<unk>", "<end>"])
    folder = write(tmp_path, tokenizer__json=json.loads(codec.to_str()), tokenizer_config__json={"eos_token": "<end>"})
    assert load_tokenizer(folder).encode("<u>é") == [4, 3, 0]
    assert load_tokenizer(folder).encode("<unk>") == [4, 0, 0, 3]


def test_decoding_skips_control_tokens_and_keeps_a_continuations_space(family: Family):
    """C18: what generation prints; nothing of BOS or EOS, and the space that belongs to the response."""
    tokenizer = family.tokenizer
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    answer = tokenizer.encode(" the film", starts_text=False)
    assert tokenizer.decode(answer + [tokenizer.eos_id], starts_text=False) == " the film"
    assert tokenizer.decode([*bos, *answer, tokenizer.eos_id], starts_text=False) == " the film"
    assert tokenizer.decode(tokenizer.encode("the film") + [tokenizer.eos_id]) == "the film"
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.eos_id]) == ""
    for wrong in (-100, -1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"token id {wrong}, expected 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([wrong])


def test_control_ids_are_found_by_their_text_alone(family: Family):
    """C21: a template's markers must exist in the tokenizer; the error is one line that names what there is."""
    tokenizer = family.tokenizer
    for token, id in tokenizer._control.items():
        assert tokenizer.control_id(token) == id < tokenizer.vocab_size
    for ordinary in ("the", "<nonsense>", ""):
        with pytest.raises(UserError, match="no control token") as caught:
            tokenizer.control_id(ordinary)
        assert str(tokenizer.path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", [True, False, None, "absent"])
@pytest.mark.parametrize("where", ["alone", "sequence", "nowhere"])
def test_bos_is_where_transformers_puts_it(tmp_path: Path, where: str, flag: bool | str | None):
    """C14: where the post-processor of a tokenizer.json puts it; add_bos_token is announced if it says otherwise."""
    from transformers import AutoTokenizer

    document = llama3_style(train_byte_level()) | {"truncation": None}
    sequence = document["post_processor"]
    document["post_processor"] = {"alone": sequence["processors"][1], "sequence": sequence, "nowhere": None}[where]
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if flag != "absent":
        config["add_bos_token"] = flag
    folder = write(tmp_path, tokenizer__json=document, tokenizer_config__json=config,
                   config__json={"model_type": "llama"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a film") == AutoTokenizer.from_pretrained(folder)("a film")["input_ids"]
    assert (tokenizer.bos_id is None) == (where == "nowhere")
    contradicts = isinstance(flag, bool) and flag == (where == "nowhere")
    assert len(tokenizer.notes) == contradicts
    assert not contradicts or f"add_bos_token {flag} is not used" in tokenizer.notes[0]


def test_tokens_that_a_post_processor_puts_behind_a_text_are_announced_and_two_before_it_refused(tmp_path: Path):
    """C14, C15: a template says where the end token comes, and an example begins with one BOS."""
    document = llama3_style(train_byte_level()) | {"truncation": None}
    n = document["added_tokens"][0]["id"]
    single = document["post_processor"]["processors"][1]["single"]
    single.append({"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}})
    settings = {"eos_token": "<|im_end|>", "add_eos_token": True}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=document, tokenizer_config__json=settings))
    assert tokenizer.encode("")  == [n]
    assert len(tokenizer.notes) == 2
    assert "add_eos_token is not used" in tokenizer.notes[0] and f"[{n}] behind a text" in tokenizer.notes[1]
    single.insert(0, single[0])
    refused(write(tmp_path, tokenizer__json=document), tmp_path / "tokenizer.json")


def test_the_end_token_is_the_one_the_folder_names(tmp_path: Path):
    """C15, R18: tokenizer_config.json first, then generation_config.json, config.json, the file itself, else none."""
    document = llama3_style(train_byte_level())
    n = document["added_tokens"][0]["id"]
    folder = write(tmp_path / "json", tokenizer__json=document)
    with pytest.raises(UserError, match="end token None"):
        load_tokenizer(folder)
    write(folder, config__json={"eos_token_id": n + 1})
    assert load_tokenizer(folder).eos_id == n + 1
    write(folder, generation_config__json={"eos_token_id": [n + 3, n + 1]})
    assert load_tokenizer(folder).eos_id == n + 3
    write(folder, tokenizer_config__json={"eos_token": {"content": "<|im_end|>"}})
    assert load_tokenizer(folder).eos_id == n + 2
    write(folder, tokenizer_config__json={"eos_token": "<|nowhere|>"})
    with pytest.raises(UserError, match="<|nowhere|>"):
        load_tokenizer(folder)
    write(folder, tokenizer_config__json={}, generation_config__json={"eos_token_id": n + 7})
    with pytest.raises(UserError, match=f"end token {n + 7}"):
        load_tokenizer(folder)

    folder = write(tmp_path / "model", tokenizer__model=train_sentencepiece())
    plain = load_tokenizer(folder)
    assert (plain.bos_id, plain.eos_id, plain.vocab_size) == (1, 2, 450)
    write(folder, added_tokens__json={"<|im_end|>": 450}, tokenizer_config__json={
        "eos_token": "<|im_end|>", "add_bos_token": False,
        "added_tokens_decoder": {"0": added("<unk>", 0), "451": {"content": "<|im_start|>", "special": True}},
    })
    chat = load_tokenizer(folder)
    assert (chat.bos_id, chat.eos_id, chat.vocab_size) == (None, 450, 452)
    assert chat.control_id("<|im_start|>") == 451 and chat.decode([450, 451]) == ""
    with pytest.raises(UserError, match="end token None"):
        load_tokenizer(write(tmp_path / "none", tokenizer__model=train_sentencepiece(eos_id=-1)))


# The formats


@pytest.mark.slow
def test_a_continuation_is_encoded_as_the_middle_of_a_llama2_text():
    """C13, C18: " negative" is the one token that the model was trained with, and "\\n" has no space before it."""
    tokenizer = load_asset("llama2-tokenizer")
    assert tokenizer.encode(" negative", starts_text=False) == [8178]
    assert tokenizer.encode(" positive", starts_text=False) == [6374]
    assert tokenizer.encode("### Response:\n") + tokenizer.encode("Hello", starts_text=False) == tokenizer.encode(
        "### Response:\nHello"
    )
    assert 29871 not in tokenizer.encode("\nHello", starts_text=False)


@pytest.mark.slow
def test_llama3_ids_are_those_of_tiktoken():
    """C18: recorded from tiktoken 0.14 with the split pattern of Meta's reference; 329,000 texts were compared."""
    tokenizer = load_asset("llama3-tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (128000, 128001, 128256)
    assert tokenizer.control_id("<|eot_id|>") == 128009
    assert tokenizer.control_id("<|reserved_special_token_245|>") == 128255
    for text, ids in {
        "Hello, world! 1234567 it's IT'S": [9906, 11, 1917, 0, 220, 4513, 10961, 22, 433, 596, 8871, 13575],
        "  two  spaces\n\n\ttab \r\n end  ": [220, 1403, 220, 12908, 271, 59249, 2591, 842, 256],
        "naïve 日本語テキスト 😀👩‍👩‍👧 <|eot_id|></s>": [
            3458, 38672, 588, 105180, 102158, 57933, 62903, 71634, 91416, 9468, 239, 102, 102470, 9468, 239, 102,
            102470, 9468, 239, 100, 83739, 68, 354, 851, 91, 1500, 82, 29],
        "\u00a0\u3000\u2028x\x00\x7f ſ'ſ 'LL": [
            4194, 23249, 378, 101, 87, 188, 221, 27006, 123, 6, 129, 123, 364, 4178],
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!???...": [70540, 70540, 70540, 29558, 64, 33970, 34115, 1131],
        "def f(x):\n    return x ** 2  # é": [755, 282, 2120, 997, 262, 471, 865, 3146, 220, 17, 220, 674, 4046],
    }.items():
        assert tokenizer.encode(text, starts_text=False) == ids


def test_the_kind_of_a_model_file_is_told_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """R18: SentencePiece and tiktoken share the name tokenizer.model; either may have another, or be a link."""
    ranks = tiktoken_file(train_byte_level())
    monkeypatch.setattr(llama3_ranks, "RANKS", len(ranks.splitlines()))
    write(tmp_path, one=train_sentencepiece(), two=ranks)
    assert type(load_tokenizer(tmp_path / "one")).__name__ == "SentencePieceTokenizer"
    assert load_tokenizer(tmp_path / "two").control_name(len(ranks.splitlines())) == "<|begin_of_text|>"
    snapshot = tmp_path / "snapshots/1"
    snapshot.mkdir(parents=True)
    write(tmp_path / "blobs", one=train_sentencepiece())
    (snapshot / "tokenizer.model").symlink_to("../../blobs/one")  # as the hub's cache does
    tokenizer = load_tokenizer(str(snapshot))
    assert tokenizer.path == snapshot
    assert tokenizer.files == (snapshot / "tokenizer.model",)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "generation_config.json",
                                  "chat_template.jinja", "additional_chat_templates/rag.jinja",
                                  "additional_chat_templates"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str):
    """R12: also for files that are only copied into exports; a file given by its own name may be a link."""
    write(tmp_path / "elsewhere", secret=b"{}", secret__jinja=b"", model=train_sentencepiece())
    write(tmp_path / "folder", tokenizer__model=train_sentencepiece())
    link = tmp_path / "folder" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "elsewhere" / ("secret" if "." in name else ""))
    with pytest.raises(UserError, match="expected a file inside the folder"):
        load_tokenizer(tmp_path / "folder")
    (tmp_path / "link.model").symlink_to(tmp_path / "elsewhere/model")
    assert load_tokenizer(tmp_path / "link.model").vocab_size


def test_an_export_is_told_every_file_of_the_tokenizer(tmp_path: Path):
    """R24: what transformers needs to load the exported folder, and nothing else that lies there."""
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "vocab.json",
             "merges.txt", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"]
    (tmp_path / "additional_chat_templates").mkdir()
    document = llama3_style(train_byte_level()) | {"truncation": None}
    for name in [*names, "config.json", "model.safetensors", "additional_chat_templates/notes.txt"]:
        (tmp_path / name).write_text("{}")
    write(tmp_path, tokenizer__json=document, tokenizer_config__json={"eos_token": "<|im_end|>"})
    files = load_tokenizer(tmp_path).files
    assert {file.relative_to(tmp_path).as_posix() for file in files} == set(names) and len(files) == len(names)
    write(tmp_path / "alone", small__model=train_sentencepiece())
    assert load_tokenizer(tmp_path / "alone" / "small.model").files == (tmp_path / "alone" / "small.model",)


def ids_of(path: Path, text: str) -> list[list[int]]:
    return load_tokenizer(path).encode_batch([text, text], starts_text=False)


def test_a_pickled_tokenizer_is_the_same(family: Family):
    """C43: worker processes may get one by pickle."""
    texts = random_texts(100)
    again = pickle.loads(pickle.dumps(family.tokenizer))
    for starts_text in (True, False):
        assert again.encode_batch(texts, starts_text) == family.tokenizer.encode_batch(texts, starts_text)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_tokenize_alike(tmp_path: Path, method: str):
    """C43: loaded again by path, also in a child forked after the libraries used their threads."""
    document = llama3_style(train_byte_level())
    folders = [write(tmp_path / "json", tokenizer__json=document, tokenizer_config__json={"eos_token": "</s>"}),
               write(tmp_path / "model", tokenizer__model=train_sentencepiece())]
    text = " the  film 日本 <|im_end|>"
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        tokenizer.encode_batch([text] * 1000)
        expected = tokenizer.encode_batch([text, text], starts_text=False)
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply_async(ids_of, (tokenizer.path, text)).get(timeout=60) == expected


def test_the_core_runs_without_the_tokenizers_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`tokenizers` is imported only for the formats that need it."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    spec = importlib.util.spec_from_file_location("read_again", llama.data.tokenizer_files.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.load_tokenizer(write(tmp_path, tokenizer__model=train_sentencepiece())).decode([1, 5, 2]) != ""


# What cannot be read


def refused(path: Path, named: Path | None = None) -> str:
    """The error that loading `path` gives: one line that begins with the name of the file at fault."""
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert message.startswith(f"{named or path}: ") and ", expected " in message and message.isprintable()
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ or not caught.value.__context__
    return message


def test_a_truncated_sentencepiece_model_is_refused_wherever_it_was_cut(tmp_path: Path):
    """R5, R18: also between two pieces, where the rest would still parse as a different tokenizer."""
    model = train_sentencepiece()
    file = write(tmp_path, tokenizer__model=model) / "tokenizer.model"
    pieces = [0]
    while model[pieces[-1]] == 0x0A:  # the field of a piece; none of them is longer than 127 bytes
        pieces.append(pieces[-1] + 2 + model[pieces[-1] + 1])
    normalizer = model.index(b"\x0a\x08identity") - 2
    for length in [*range(0, len(model), 17), *pieces[::10], pieces[-1], normalizer]:
        file.write_bytes(model[:length])
        refused(tmp_path, file)
    file.write_bytes(model)
    load_tokenizer(tmp_path)


def test_a_truncated_or_shuffled_rank_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """R5, R18: every rank must be there, once, in order; another model's ranks are not Llama 3's."""
    data = tiktoken_file(train_byte_level())
    lines = data.splitlines(keepends=True)
    monkeypatch.setattr(llama3_ranks, "RANKS", len(lines))
    file = write(tmp_path, tokenizer__model=data) / "tokenizer.model"
    load_tokenizer(tmp_path)
    cuts = [data[:n] for n in range(1, len(data) - 1, 61)]
    for broken in [*cuts, b"".join(lines[::-1]), b"".join(lines[:-1]), data + f"YWFhYQ== {len(lines)}\n".encode(),
                   data.replace(b" 7\n", b" 8\n"), data.replace(b" 7\n", b"\n"),
                   data.replace(lines[7], b"IQ== 7\n"), data.replace(lines[7], b"I*== 7\n")]:
        file.write_bytes(broken)
        refused(tmp_path, file)


def test_a_broken_tokenizer_json_is_refused(tmp_path: Path):
    """R5, R18: cut, empty, of another kind, or with parts of the wrong type."""
    document = llama3_style(train_byte_level())
    text = json.dumps(document).encode()
    folder = write(tmp_path, tokenizer__json=document, tokenizer_config__json={"eos_token": "</s>"})
    file = folder / "tokenizer.json"
    broken = [text[:n] for n in range(0, len(text), 997)] + [b"\x00\xff", b"[]", b"5", b"{}", b"[" * 100_000]
    for part in ("model", "added_tokens", "pre_tokenizer", "decoder", "normalizer", "post_processor"):
        wrongs = ("x", [7], {"type": "Nonsense"})
        broken += [json.dumps(document | {part: wrong}).encode() for wrong in wrongs]
    for part, wrong in [("type", "Unigram"), ("merges", [["q q", "zz"]]), ("vocab", {"a": -1}),
                        ("continuing_subword_prefix", "##"), ("dropout", 0.1)]:
        broken.append(json.dumps(document | {"model": document["model"] | {part: wrong}}).encode())
    for content in broken:
        file.write_bytes(content)
        refused(folder, file)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path):
    """R17, R18: no tokenizer at all, Git LFS's placeholder for one, a folder in its place."""
    assert "tokenizer.json or tokenizer.model" in refused(tmp_path)
    refused(tmp_path / "absent")
    refused(tmp_path / "absent.json")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 499723\n"
    assert "git lfs pull" in refused(write(tmp_path, tokenizer__model=lfs), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").mkdir()
    refused(tmp_path, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b""])
def test_a_broken_file_beside_the_tokenizer_is_refused_by_its_own_name(tmp_path: Path, content: bytes):
    """R18: the settings decide about BOS and EOS, so they are never skipped."""
    for name in ("tokenizer_config.json", "added_tokens.json", "generation_config.json"):
        folder = write(tmp_path / name, tokenizer__model=train_sentencepiece())
        (folder / name).write_bytes(content)
        refused(folder, folder / name)


def test_half_a_surrogate_pair_is_refused_by_its_place(family: Family):
    """R15: JSON can smuggle one into a text, and the libraries answer with errors that do not say what is wrong."""
    for text in ("film \ud83d", "film \ude00\ud83d"):
        with pytest.raises(UserError, match="lone surrogate at character 5, expected Unicode"):
            family.tokenizer.encode(text)
        with pytest.raises(UserError):
            family.tokenizer.encode_batch(["fine", text], starts_text=False)
