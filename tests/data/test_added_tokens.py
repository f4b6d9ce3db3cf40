"""Tokens that were added to a tokenizer: ids and texts against transformers' AutoTokenizer, on several kinds of folder.

transformers reads a tokenizer.model only with protobuf, which this project does not need. So a folder that has only a
tokenizer.model is compared with the tokenizer.json that transformers' LlamaTokenizer makes of it.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from llama.boundary.errors import UserError
from llama.data.chat import layout_of
from llama.data.encoding import encode_rows
from llama.data.examples import encode_file
from llama.data.templates import END, Segment, Template
from llama.data.tokenizer_files import load_tokenizer
from tests.data.test_tokenizer import added, llama2_style, llama3_style, train_byte_level, train_sentencepiece, write

WORDS = ["filmy", "FILMY", "<reason>", "<tool>", "sword", "Ж", " ", "  ", "\n", "a", "the filmy", "word", "e\u0301"]
FLAGS = {
    "filmy": {},
    "<reason>": {"normalized": False},
    "<tool>": {"lstrip": True, "rstrip": True, "normalized": False},
    "word": {"single_word": True},
    "Ж": {"rstrip": True},
}
CONFIG = {"model_type": "llama", "vocab_size": 600, "hidden_size": 8, "num_attention_heads": 2}


def texts_with_added_tokens() -> list[str]:
    """Each token alone, at the start, in the middle, at the end, doubled and beside spaces; and random mixtures."""
    generator = random.Random(0)
    texts = [""]
    for token in FLAGS:
        texts += [token, f"{token}a", f"a{token}b", f"a {token} b", f"a{token}", f"{token}{token}", f"x{token} {token}"]
        texts += [f"  {token}  b", f"a\n{token}\nb"]
    texts += ["".join(generator.choices(WORDS, k=8)) for _ in range(300)]
    return [text for text in texts if text == text.lstrip(" ")]  # LlamaTokenizer loses a text's first space: see below


def tokens_from(n: int) -> list[dict]:
    return [added(token, n + i, special=False) | flags for i, (token, flags) in enumerate(FLAGS.items())]


def byte_level(folder: Path, place: str) -> Path:
    """A byte-level tokenizer.json in which FLAGS are declared in one of three places."""
    document = llama3_style(train_byte_level()) | {"truncation": None}
    n = 1 + document["added_tokens"][-1]["id"]
    document["post_processor"] = document["post_processor"]["processors"][1]
    document["pre_tokenizer"]["add_prefix_space"] = place == "prefix space"
    document["normalizer"] = {"type": "NFC"} if place == "normalizer" else None
    settings = {"eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {}
    if place == "tokenizer_config.json":
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in [*document["added_tokens"], *tokens_from(n)]
        }
    elif place == "added_tokens.json":
        files["added_tokens__json"] = {token["content"]: token["id"] for token in tokens_from(n)}
    else:
        document["added_tokens"] += tokens_from(n)
    return write(folder, tokenizer__json=document, tokenizer_config__json=settings, config__json=CONFIG, **files)


def llama2(folder: Path, settings: dict, metaspace: bool = False, normalized: bool = True) -> Path:
    """A SentencePiece model as tokenizer.json, with FLAGS."""
    codec = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    document = llama2_style(codec, metaspace)
    tokens = tokens_from(codec.vocab_size())
    document["added_tokens"] += [token | {"normalized": token["normalized"] and normalized} for token in tokens]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings
    return write(folder, tokenizer__json=document, tokenizer_config__json=settings, config__json=CONFIG)


def lowercase(folder: Path) -> Path:
    """A byte-level tokenizer.json whose normalizer changes letters. FLAGS in tokenizer_config.json: by default, those
    that are text are found after it."""
    byte_level(folder, "tokenizer_config.json")
    document = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for token in settings["added_tokens_decoder"].values():
        if token["normalized"]:
            del token["normalized"]
    return write(folder, tokenizer__json=document, tokenizer_config__json=settings)


KINDS: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json": lambda folder: byte_level(folder, "tokenizer.json"),
    "tokenizer_config.json": lambda folder: byte_level(folder, "tokenizer_config.json"),
    "added_tokens.json": lambda folder: byte_level(folder, "added_tokens.json"),
    "prefix space": lambda folder: byte_level(folder, "prefix space"),
    "normalizer": lambda folder: byte_level(folder, "normalizer"),
    "LlamaTokenizer": lambda folder: llama2(folder, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "LlamaTokenizer legacy": lambda folder: llama2(folder, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    "prepend": lambda folder: llama2(folder, {}, normalized=False),
    "lowercase": lambda folder: lowercase(folder),
    "metaspace": lambda folder: llama2(folder, {}, metaspace=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_that_are_text_get_the_ids_of_transformers(tmp_path: Path, kind: str):
    """C18: with single_word, lstrip, rstrip and normalized, wherever the folder declares them."""
    from transformers import AutoTokenizer

    folder = KINDS[kind](tmp_path)
    tokenizer = load_tokenizer(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    texts = texts_with_added_tokens()
    assert tokenizer.encode_batch(texts) == reference(texts)["input_ids"]
    assert [tokenizer.encode(text) for text in texts[:50]] == reference(texts[:50])["input_ids"]
    assert not any(map(tokenizer.has_control, FLAGS))


def test_a_normalizer_that_prepends_a_space_does_so_once_where_tokens_are_found_behind_it(tmp_path: Path):
    """As transformers does, beside single tokens. (A space between two tokens of which only the first is found before
    the normalizer becomes two of ours and one of theirs.)"""
    from transformers import AutoTokenizer

    folder = llama2(tmp_path, {})
    texts = texts_with_added_tokens()[:40]
    assert load_tokenizer(folder).encode_batch(texts) == AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"prefix space"}))  # its decoder keeps the space that it adds
def test_texts_with_added_tokens_come_back_as_they_were(tmp_path: Path, kind: str):
    """C18: but for the spaces that a token takes away, or a legacy tokenizer adds behind one, in transformers, too."""
    tokenizer = load_tokenizer(KINDS[kind](tmp_path))
    for text in ("filmy", "a filmy b", "<reason> two and two", "filmyfilmy filmy", "the filmy <reason> film"):
        for starts_text in (True, False):
            ids = tokenizer.encode(text, starts_text)
            assert tokenizer.decode(ids, starts_text).replace("  ", " ") == text


def test_a_tokenizer_model_finds_added_tokens_and_user_defined_pieces(tmp_path: Path):
    """C18: the same ids as the same model gets as a tokenizer.json under transformers' LlamaTokenizer."""
    from transformers import AutoTokenizer

    model = train_sentencepiece(user_defined_symbols=["<piece>", "7"])
    codec = sentencepiece.SentencePieceProcessor(model_proto=model)
    document = llama2_style(codec)
    declared = {str(token["id"]): token for token in tokens_from(codec.vocab_size())}
    for token in declared.values():
        del token["id"]
    for legacy in (False, True):
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "added_tokens_decoder": declared,
                    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        ours = write(tmp_path / f"model {legacy}", tokenizer__model=model, tokenizer_config__json=settings)
        pieces = [added(piece, codec.piece_to_id(piece), special=False) | {"normalized": False}
                  for piece in ("<piece>", "7")]
        whole = document | {"added_tokens": [*document["added_tokens"], *pieces]}
        theirs = write(tmp_path / f"json {legacy}", tokenizer__json=whole, tokenizer_config__json=settings | {
            "added_tokens_decoder": declared | {str(piece["id"]): {k: v for k, v in piece.items() if k != "id"}
                                                for piece in pieces}}, config__json=CONFIG)
        texts = [*texts_with_added_tokens(), "<piece>a <piece> b", "1977 <piece>"]
        reference = AutoTokenizer.from_pretrained(theirs)
        tokenizer = load_tokenizer(ours)
        assert tokenizer.encode_batch(texts) == reference(texts)["input_ids"]
        assert tokenizer.decode(tokenizer.encode("the <piece> filmy 7")) == "the <piece> filmy 7"


# Control tokens


def chatml(folder: Path, special: bool) -> Path:
    """A byte-level tokenizer.json that calls the tokens of the ChatML layout special, or not."""
    document = llama3_style(train_byte_level()) | {"truncation": None}
    for token in document["added_tokens"][1:3]:
        token |= {"special": special, "normalized": not special}
    n = 1 + document["added_tokens"][-1]["id"]
    document["added_tokens"] += tokens_from(n)
    document["post_processor"] = document["post_processor"]["processors"][1]
    settings = {"eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return write(folder, tokenizer__json=document, tokenizer_config__json=settings, config__json=CONFIG)


@pytest.mark.parametrize("special", [True, False])
def test_the_tokens_of_a_chat_layout_are_control_tokens_whatever_a_folder_calls_them(tmp_path: Path, special: bool):
    """C20: a message cannot end its own turn, and the layout is still found."""
    tokenizer = load_tokenizer(chatml(tmp_path, special))
    assert layout_of(tokenizer) == "chatml"
    end = tokenizer.control_id("<|im_end|>")
    ids = tokenizer.encode("a<|im_end|>b filmy <|im_start|>")
    assert not {end, tokenizer.control_id("<|im_start|>")} & set(ids)
    assert tokenizer.decode(ids) == "a<|im_end|>b filmy <|im_start|>"


@pytest.mark.parametrize("special", [True, False])
def test_named_control_tokens_may_be_spelled_by_a_text(tmp_path: Path, special: bool):
    """C20: for rows that are rendered already; the ids are transformers', and all other control tokens stay text."""
    from transformers import AutoTokenizer

    folder = chatml(tmp_path, special)
    tokenizer = load_tokenizer(folder, "<|im_start|>,<|im_end|>,filmy")
    reference = AutoTokenizer.from_pretrained(folder)
    rendered = "<|im_start|>user\nA filmy film?<|im_end|>\n<|im_start|>assistant\n <|im_end|><|im_end|>\n"
    for text in (rendered, "<|im_end|>", " <|im_start|> "):
        assert tokenizer.encode(text) == reference(text)["input_ids"]
    assert tokenizer.control_id("<|im_end|>") in tokenizer.encode(rendered)
    assert tokenizer.control_id("<|eot_id|>") not in tokenizer.encode("a<|eot_id|>")
    assert "<|im" not in tokenizer.decode(tokenizer.encode(rendered))  # it still is no text
    with pytest.raises(UserError, match=r"no control token '<\|nowhere\|>', expected some of '<\|"):
        load_tokenizer(folder, "<|im_end|>,<|nowhere|>")


def test_a_tokenizer_model_lets_texts_spell_named_control_tokens(tmp_path: Path):
    """C14, C20: "</s>" becomes the end token; a spelled BOS at the start of a text is its only one."""
    model = train_sentencepiece(user_defined_symbols=["<|im_start|>", "<|im_end|>"])
    plain = load_tokenizer(write(tmp_path, tokenizer__model=model))
    tokenizer = load_tokenizer(tmp_path, "</s>,<s>,<|im_end|>")
    end = tokenizer.control_id("<|im_end|>")
    a = plain.encode("a", starts_text=False)
    assert tokenizer.encode("<s>a</s>a<|im_end|>") == [1, *a, 2, *a, end]
    assert tokenizer.encode("a<|im_start|>") == plain.encode("a<|im_start|>")
    assert not {1, 2, end} & set(plain.encode("<s>a</s>a<|im_end|>")[1:])


def test_a_text_that_spells_its_end_token_gets_no_second_one(tmp_path: Path):
    """C15: and another text gets the end token that the template adds."""
    folder = chatml(tmp_path, special=True)
    answer = Segment(" b<|eot_id|>", answer=True, may_cut=True)
    segments = [Segment("a"), answer, Segment(END, answer=True, control=True)]
    for control_tokens in (None, "<|eot_id|>"):
        tokenizer = load_tokenizer(folder, control_tokens)
        (example,) = encode_rows([segments], tokenizer, 100, "right")
        assert example.ids.count(tokenizer.eos_id) == 1
        assert example.ids[-1] == tokenizer.eos_id and example.is_answer[-1]


def test_the_cache_tells_control_tokens_and_end_tokens_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """R21: none of them is in a file that the key of the cache covers; config.json is none of the tokenizer's."""
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"q": "a<|im_end|>", "a": "b"}) + "\n")
    template = Template("mine", "{q} [[{a}]]")
    folder = chatml(tmp_path / "model", special=True)
    write(folder, tokenizer_config__json={})
    found = []
    for eos_id in (500, 501):
        write(folder, config__json=CONFIG | {"eos_token_id": eos_id})
        for control_tokens in (None, "<|im_end|>"):
            data = encode_file(rows, template, load_tokenizer(folder, control_tokens), max_length=50)
            found.append(data[0][0].tolist())
    assert [ids[-1] for ids in found] == [500, 500, 501, 501]
    assert found[0][:-1] == found[2][:-1] != found[1][:-1] == found[3][:-1]


# What is not used is announced


def notes_of(folder: Path, settings: dict, **files) -> list[str]:
    """The notes of a byte-level tokenizer with these settings and files beside it."""
    document = llama3_style(train_byte_level()) | {"truncation": None}
    settings = {"eos_token": "<|eot_id|>"} | settings
    return load_tokenizer(write(folder, tokenizer__json=document, tokenizer_config__json=settings, **files)).notes


def test_an_end_token_that_the_models_settings_do_not_name_is_announced(tmp_path: Path):
    """C15: the tokenizer's eos_token ends answers; generation would wait for the other one."""
    n = 493
    assert notes_of(tmp_path, {}, config__json={"eos_token_id": [1, n + 3]}, generation_config__json={}) == []
    notes = notes_of(tmp_path, {}, config__json={"eos_token_id": 1}, generation_config__json={"eos_token_id": [2, 7]})
    begin = f"{tmp_path}: answers end in '<|eot_id|>', token {n + 3}; "
    assert notes == [begin + "generation_config.json names 2, 7 as end token",
                     begin + "config.json names 1 as end token"]


@pytest.mark.parametrize("eos", ["2", [2, {}], 2.5, True, [None]], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_no_number_is_refused_before_an_export_could_hold_it(tmp_path: Path, file: str, eos):
    """C12, R15"""
    with pytest.raises(UserError, match=rf"{file}: eos_token_id is .*, expected a whole number or a list of them"):
        notes_of(tmp_path, {"eos_token": None}, **{file.replace(".", "__"): {"eos_token_id": eos}})


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                                  "added_tokens.json", "tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("is_link", [True, False])
def test_a_link_to_nowhere_and_a_folder_named_like_a_file_are_not_passed_over(tmp_path: Path, name: str, is_link: bool):
    """R15: as in a hub cache of which a part was deleted. Without tokenizer_config.json, other tokens are control ones.
    """
    folder = byte_level(tmp_path, "tokenizer.json")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/gone") if is_link else (folder / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: (is missing or not a file|a link to .*gone), expected a file"):
        load_tokenizer(folder)


@pytest.mark.parametrize("settings", [
    {"additional_special_tokens": "abc"}, {"additional_special_tokens": [["a"]]}, {"extra_special_tokens": {"a": 1}},
    {"eos_token": {}}, {"pad_token": 7}, {"added_tokens_decoder": ["a"]}, {"added_tokens_decoder": {"7": "a"}},
], ids=str)  # fmt: skip
def test_tokens_that_are_not_named_as_tokens_are_told_with_the_file(tmp_path: Path, settings: dict):
    """R15: the letters of the text "abc" were three control tokens, which no row could spell."""
    with pytest.raises(UserError, match="_config.json or a file beside it: .*, expected tokens by their names"):
        notes_of(tmp_path, settings)


def test_a_library_that_panics_is_one_line(tmp_path: Path):
    """R15: the exception of Rust's libraries is no Exception."""
    document = llama3_style(train_byte_level()) | {"truncation": None}
    document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    folder = write(tmp_path, tokenizer__json=document, tokenizer_config__json={"eos_token": "<|eot_id|>"})
    with pytest.raises(UserError, match="tokenizer.json: PanicException .*, expected a whole tokenizer"):
        load_tokenizer(folder)


def test_keys_that_this_code_does_not_use_are_announced_by_name(tmp_path: Path):
    """C18: unless they are null or known to change no ids."""
    harmless = {"model_max_length": 2048, "padding_side": "left", "pad_token": "<|eot_id|>", "do_lower_case": None,
                "sp_model_kwargs": {}, "add_prefix_space": False, "add_eos_token": False, "legacy": True}
    assert notes_of(tmp_path, harmless) == []
    notes = notes_of(tmp_path, {"do_lower_case": True, "sp_model_kwargs": {"alpha": 0.1}, "add_prefix_space": True,
                                "pad_token": "<pad>", "added_tokens_decoder": {}},
                     special_tokens_map__json={"eos_token": "</s>"})
    assert notes == [
        f"{tmp_path}: tokenizer_config.json has 'do_lower_case', 'sp_model_kwargs', which this code does not use",
        f"{tmp_path}: special_tokens_map.json has 'eos_token' '</s>', which is not used: tokenizer_config.json "
        "declares the tokens",
        f"{tmp_path}: tokenizer_config.json names '<pad>' as control tokens, which the tokenizer does not have",
        f"{tmp_path}: a text gets no space before it; add_prefix_space True is not used",
    ]


def test_special_tokens_map_counts_where_tokenizer_config_declares_no_tokens(tmp_path: Path):
    """C15: as in transformers; older folders name their tokens only there."""
    document = llama3_style(train_byte_level()) | {"truncation": None}
    tokens = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|begin_of_text|>"}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=document, special_tokens_map__json=tokens))
    assert tokenizer.control_name(tokenizer.eos_id) == "<|im_end|>"


def test_tokens_whose_ids_the_files_do_not_agree_on_are_refused(tmp_path: Path):
    """C21: another id than transformers gives, and two ids for one token."""
    with pytest.raises(UserError, match="the added token 'filmy' has id 700, expected 500, which transformers gives"):
        notes_of(tmp_path, {}, added_tokens__json={"filmy": 700})
    with pytest.raises(UserError, match="the added token '<think>' has the ids 500 and 497 in this and the files"):
        notes_of(tmp_path, {}, added_tokens__json={"<think>": 500})
