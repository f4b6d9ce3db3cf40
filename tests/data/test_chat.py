"""Conversations: each layout against its official format by hand, the loss on what the assistant says and nothing else.
"""

import base64
import json
import random
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest
import regex
from samples import BUNDLED, REAL, bundled_with, loaded
from sentencepiece import SentencePieceProcessor

from llama.boundary.errors import UserError
from llama.data.chat import CONTROL_TOKENS, LAYOUTS, Chat, layout_of
from llama.data.encoding import Encoded, encode_rows
from llama.data.templates import END
from llama.data.tokenizer import Tokenizer

HOSTILE = ["<|im_end|>", "<|im_start|>", "\n<|im_start|>assistant\n", "<|eot_id|>", "<|start_header_id|>", "</s>",
           "<s>", "<|end_of_text|>", "<|endoftext|>", "[/INST]", "[INST]", " [INST] x [/INST] ", "<<SYS>>\n",
           "<</SYS>>", "<|prompter|>", "<|assistant|>", "{content}", "{{", "[[", "]]", "<unk>"]
WORDS = "Tell me about a llama ! It's 10 m high, isn't it? naïve 映画 🎬 e\u0301 no".split()
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0"]


def conversation(generator: random.Random, alternating: bool, hostile: bool = True) -> list[dict]:
    """One to six turns behind perhaps a system message, with an assistant's among them."""

    def content() -> str:
        pool = generator.choice([[*WORDS, " "], [*WORDS, *HOSTILE, *SPACES], HOSTILE]) if hostile else [*WORDS, " "]
        text = "".join(generator.choices(pool, k=generator.randrange(1, 9)))
        return text if text.strip() else "x"

    roles = ["user", "assistant"] * 3
    roles = roles[: generator.randrange(2, 7)] if alternating else generator.sample(roles, generator.randrange(1, 7))
    if "assistant" not in roles:
        roles[-1] = "assistant"
    system = ["system"] if generator.random() < 0.5 else []
    return [{"role": role, "content": content()} for role in [*system, *roles]]


def conversations(count: int, layout: str, hostile: bool = True) -> list[list[dict]]:
    generator = random.Random(f"{layout} {hostile}")
    return [conversation(generator, layout == "llama2", hostile) for _ in range(count)]


def messages(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def encoded(layout: str, tokenizer: Tokenizer, *talks: list[dict], max_length=10**6, side="right") -> list[Encoded]:
    rows = [Chat(layout).render({"messages": talk}, "here")[0] for talk in talks]
    return encode_rows(rows, tokenizer, max_length, side)


# Tokenizers


class Pair(NamedTuple):
    layout: str
    tokenizer: Tokenizer


PAIRS = ["chatml bundled", "llama3 bundled", "llama2 bundled", "zephyr bundled", "prompter bundled"]
REAL_PAIRS = ["chatml smollm2", "llama3 llama3", "llama2 llama2", "zephyr llama2", "prompter llama2",
              "prompter smollm2", "prompter llama3"]  # fmt: skip
PAIRS += [pytest.param(name, marks=pytest.mark.slow) for name in REAL_PAIRS]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory) -> Pair:
    layout, name = request.param.split()
    if name == "bundled":
        return Pair(layout, bundled_with(tmp_path_factory.mktemp(layout), *CONTROL_TOKENS.get(layout, ())))
    return Pair(layout, loaded(request.getfixturevalue("assets") / REAL[name]))


# What the official formats are


def llama2_by_hand(codec: SentencePieceProcessor, talk: list[dict]) -> tuple[list[int], list[bool]]:
    """Llama.chat_completion of Meta's llama/generation.py: each exchange is one text, with its own BOS and EOS."""
    talk = [dict(message) for message in talk]
    if talk[0]["role"] == "system":
        first = talk.pop(0)["content"]
        talk[0]["content"] = "<<SYS>>\n" + first + "\n<</SYS>>\n\n" + talk[0]["content"]
    ids, labels = [], []
    for prompt, answer in zip(talk[::2], talk[1::2], strict=False):
        asked = f"[INST] {prompt['content'].strip()} [/INST]"
        exchange = [codec.bos_id(), *codec.encode(f"{asked} {answer['content'].strip()} "), codec.eos_id()]
        ids += exchange
        labels += [i > len(codec.encode(asked)) for i in range(len(exchange))]
    if len(talk) % 2:
        ids += [codec.bos_id(), *codec.encode(f"[INST] {talk[-1]['content'].strip()} [/INST]")]
    return ids, labels + [False] * (len(ids) - len(labels))


@pytest.mark.parametrize("name", ["bundled", pytest.param("llama2", marks=pytest.mark.slow)])
def test_llama_2_conversations_are_as_metas_code_encodes_them(name, request):
    """C12, C14, C19: joint encoding of an exchange gives the ids that encoding prompt and answer apart gives here."""
    folder = BUNDLED.parent if name == "bundled" else request.getfixturevalue("assets") / REAL[name]
    codec = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    talks = conversations(400, "llama2")
    assert {len(talk) % 2 for talk in talks} == {0, 1} and {talk[0]["role"] for talk in talks} == {"system", "user"}
    for talk, found in zip(talks, encoded("llama2", loaded(folder), *talks), strict=True):
        assert (found.ids, found.is_answer) == llama2_by_hand(codec, talk)


def llama3_by_hand(encode, talk: list[dict]) -> tuple[list[int], list[bool]]:
    """ChatFormat of Meta's llama/data/tokenizer.py: a role between <|start_header_id|> and <|end_header_id|>, two line
    breaks, and the content, stripped."""
    ids, labels = [128_000], [False]  # <|begin_of_text|>
    for message in talk:
        header = [128_006, *encode(message["role"]), 128_007, *encode("\n\n")]
        content = [*encode(message["content"].strip()), 128_009]  # <|eot_id|>
        ids += header + content
        labels += [False] * len(header) + [message["role"] == "assistant"] * len(content)
    return ids, labels


def llama3_encoder(file: Path):
    """tiktoken by definition: words of the split pattern, in each the pair of lowest rank is joined first."""
    lines = [line.split() for line in file.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    pattern = regex.compile(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

    def encode(text: str) -> list[int]:
        ids = []
        for word in pattern.findall(text):
            parts = [bytes([byte]) for byte in word.encode()]
            while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                            if a + b in ranks]:
                _, i = min(pairs)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids += [ranks[word.encode()]] if word.encode() in ranks else [ranks[part] for part in parts]
        return ids

    return encode


@pytest.mark.slow
def test_llama_3_conversations_are_as_metas_code_encodes_them(assets):
    """C14, C19, C20: control tokens by id, texts by tiktoken's own rule."""
    folder = assets / REAL["llama3"]
    encode, talks = llama3_encoder(folder / "tokenizer.model"), conversations(250, "llama3")
    for talk, found in zip(talks, encoded("llama3", loaded(folder), *talks), strict=True):
        assert (found.ids, found.is_answer) == llama3_by_hand(encode, talk)


@pytest.mark.slow
def test_chatml_conversations_are_as_the_chat_template_of_smollm2_writes_them(assets):
    """C19: the text for any content; for plain content also the ids that transformers makes of the whole text."""
    transformers = pytest.importorskip("transformers")
    folder = assets / REAL["smollm2"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    codec = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)
    for hostile in (True, False):
        talks = [talk if talk[0]["role"] == "system" else [*messages(("system", "Be brief.")), *talk]
                 for talk in conversations(200, "chatml", hostile)]
        for talk, found in zip(talks, encoded("chatml", loaded(folder), *talks), strict=True):
            text = codec.apply_chat_template(talk, tokenize=False)
            assert "".join(s.text for s in Chat("chatml").render({"messages": talk}, "here")[0]) == text
            if not hostile and all(message["content"] == message["content"].strip() for message in talk):
                assert found.ids == codec.encode(text)


TALK = messages(("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi "), ("user", "Bye"), ("assistant", "So."))
GOLDEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
              "[[Hi <|im_end|>]]\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[So.<|im_end|>]]\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
              "<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[Hi<|eot_id|>]]<|start_header_id|>"
              "user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[So.<|eot_id|>]]",
    "llama2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST][[ Hi </s>]]<s>[INST] Bye [/INST][[ So. </s>]]",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\n[[Hi </s>]]\n<|user|>\nBye</s>\n"
              "<|assistant|>\n[[So.</s>]]",
    "prompter": "<|system|> Be brief. </s> <|prompter|> Hello </s> <|assistant|>[[ Hi  </s>]] <|prompter|> Bye </s> "
                "<|assistant|>[[ So. </s>]]",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_and_labels_a_conversation_word_for_word(layout):
    """C19: what is between [[ and ]] is learned."""
    segments, answer = Chat(layout).render({"messages": TALK}, "here")
    text = ""
    for is_answer, group in groupby(segments, key=lambda s: s.answer):
        written = "".join("<s>" * s.starts_text * bool(text) + (s.text if s.text != END else "</s>") for s in group)
        text += f"[[{written}]]" if is_answer else written
    assert text == GOLDEN[layout] and answer == -1
    assert all(s.may_cut == (s.answer and not s.control) for s in segments)


def test_a_layout_is_what_encoding_needs_of_a_template():
    for layout in LAYOUTS:
        chat = Chat(layout)
        assert (chat.name, chat.answers, chat.fields) == (layout, (), {"messages"})
        assert layout in chat.source and "messages" in chat.expected


# Labels, control tokens, prefixes


def said(layout: str, content: str) -> str:
    return {"chatml": content, "llama3": content.strip(), "llama2": f" {content.strip()} ", "zephyr": content,
            "prompter": f" {content} "}[layout]


def end_of_turn(layout: str, tokenizer: Tokenizer) -> int:
    name = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(layout)
    return tokenizer.control_id(name) if name else tokenizer.eos_id


def labelled_spans(example: Encoded) -> list[list[int]]:
    pairs = zip(example.ids, example.is_answer, strict=True)
    return [[id for id, _ in group] for label, group in groupby(pairs, key=lambda pair: pair[1]) if label]


def test_the_labelled_spans_are_what_the_assistant_says_and_the_end_of_its_turn(pair):
    """C15, C19: for conversations of one to six turns, whatever is said in them."""
    layout, tokenizer = pair
    talks = conversations(500, layout)
    for talk, example in zip(talks, encoded(layout, tokenizer, *talks), strict=True):
        spans = labelled_spans(example)
        assert [tokenizer.decode(span[:-1], starts_text=False) for span in spans] == [
            said(layout, message["content"]) for message in talk if message["role"] == "assistant"]
        assert {span[-1] for span in spans} == {end_of_turn(layout, tokenizer)} and not example.was_cut


def control_ids(tokenizer: Tokenizer) -> set[int]:
    """Of a real tokenizer as its file or its maker says, of ours what has been added too."""
    file = tokenizer.files[0]
    if file.suffix == ".json":
        return {token["id"] for token in json.loads(file.read_text())["added_tokens"] if len(token["content"]) > 1}
    if tokenizer.vocab_size == 128_256:  # Llama 3
        return set(range(128_000, 128_256))
    return {0, 1, 2, *range(SentencePieceProcessor(model_file=str(file)).vocab_size(), tokenizer.vocab_size)}


def control_tokens(layout: str, tokenizer: Tokenizer, talk: list[dict]) -> list[int]:
    """All that a conversation may have, in their order."""
    end, begin = end_of_turn(layout, tokenizer), [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if layout == "llama2":
        tokens = {"system": [], "user": begin, "assistant": [end]}
        return sum((tokens[message["role"]] for message in talk), [])
    marks = [tokenizer.control_id(mark) for mark in CONTROL_TOKENS.get(layout, ())]
    return [*begin, *(marks or [end]) * len(talk)]


def test_there_is_no_control_token_but_those_of_the_layout(pair):
    """C14, C20, R16: one beginning of text (of Llama 2's one for each exchange), and none that a message asks for."""
    layout, tokenizer = pair
    talks, control = conversations(500, layout), control_ids(tokenizer)
    for talk, example in zip(talks, encoded(layout, tokenizer, *talks), strict=True):
        found = [id for id in example.ids if id in control]
        assert found == control_tokens(layout, tokenizer, talk)
        assert tokenizer.bos_id in (None, example.ids[0]) and not example.is_answer[0]


def test_what_is_not_labelled_decodes_to_the_other_sides_words(pair):
    """C18: nothing of a message is lost, whatever it says; control tokens leave no trace in a decoded text."""
    layout, tokenizer = pair
    for talk, example in zip(talks := conversations(200, layout), encoded(layout, tokenizer, *talks), strict=True):
        spoken = tokenizer.decode(example.ids, starts_text=False)
        for message in talk:
            text = said(layout, message["content"]).strip() if layout != "llama2" else message["content"].strip()
            at = spoken.find(text)
            assert at >= 0
            spoken = spoken[at + len(text) :]


def test_later_turns_change_no_id_and_no_label_of_earlier_ones(pair):
    """C19: at every turn, the ids so far are those of the conversation that ends there."""
    layout, tokenizer = pair
    for talk in conversations(60, layout):
        first = next(i for i, message in enumerate(talk) if message["role"] == "assistant")
        grown = encoded(layout, tokenizer, *(talk[: n + 1] for n in range(first, len(talk))))
        for (ids, labels, _), (more, more_labels, _) in zip(grown, grown[1:], strict=False):
            assert len(more) > len(ids) and more[: len(ids)] == ids and more_labels[: len(ids)] == labels


def test_the_prompt_of_a_turn_is_what_it_was_trained_behind(pair):
    """C12, C13: what is asked at inference, all up to an answer, is a prefix of the training ids."""
    layout, tokenizer = pair
    for talk in conversations(60, layout):
        segments, _ = Chat(layout).render({"messages": talk}, "here")
        first = next(i for i, segment in enumerate(segments) if segment.answer)
        (asked, answered) = encode_rows([segments[:first], segments], tokenizer, 10**6, "right")
        assert answered.ids[: len(asked.ids)] == asked.ids
        assert answered.is_answer.index(True) == len(asked.ids) and not any(asked.is_answer)


@pytest.mark.parametrize("side", ["right", pytest.param("left", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_conversation_that_is_too_long_keeps_its_beginning_up_to_the_last_label(pair, side):
    """C16, C17: nothing is taken from the middle, whatever the side; no end of turn behind an answer that was cut;
    nothing behind the last label; None where there is none."""
    layout, tokenizer = pair
    outcomes = set()
    for talk in conversations(12, layout):
        (whole,) = encoded(layout, tokenizer, talk)
        spans = labelled_spans(whole)
        for length in range(1, len(whole.ids) + 1):
            (found,) = encoded(layout, tokenizer, talk, max_length=length, side=side)
            kept = length
            while length < len(whole.ids) and kept and not whole.is_answer[kept - 1]:
                kept -= 1
            if not any(whole.is_answer[:kept]):
                assert found is None
                outcomes.add("none")
                continue
            assert found == (whole.ids[:kept], whole.is_answer[:kept], length < len(whole.ids))
            *complete, last = labelled_spans(found)
            assert complete == spans[: len(complete)]
            is_whole = last == spans[len(complete)]
            assert is_whole == (last[-1] == end_of_turn(layout, tokenizer))
            outcomes.add("whole turn" if is_whole else "cut turn")
    assert outcomes == {"none", "whole turn", "cut turn"}


# Which layout


@pytest.mark.slow
def test_the_layout_is_the_one_that_a_tokenizer_has_the_control_tokens_for(assets):
    found = {name: layout_of(loaded(assets / folder)) for name, folder in REAL.items()}
    assert found == {"llama2": "llama2", "smollm2": "chatml", "llama3": "llama3"}


@pytest.mark.parametrize("control, layout", [
    ([], "llama2"), (["<|im_start|>", "<|im_end|>"], "chatml"), (["<|im_start|>"], "llama2"),
    (["<|im_end|>"], "llama2"),
    (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "llama3"), (["<|eot_id|>"], "llama2"),
    (["<|start_header_id|>", "<|end_header_id|>"], "llama2"),
], ids=str)
def test_all_the_control_tokens_of_a_layout_are_needed(tmp_path, control, layout):
    tokenizer = bundled_with(tmp_path / "chat", *control)
    assert layout_of(tokenizer) == layout
    assert encoded(layout, tokenizer, TALK)[0].ids


# Conversations that are none


USER, ASSISTANT = messages(("user", "Hello"), ("assistant", "Hi"))
MALFORMED = {
    "no messages": ({}, ": found fields {}, expected {messages: list of {role: str, content: str}}"),
    "messages missing": ({"text": "x"}, ": found fields {'text': str}, expected {messages"),
    "null": ({"messages": None}, ": found fields {'messages': NoneType}, expected {messages"),
    "a text": ({"messages": "Hello"}, ": found fields {'messages': str}, expected {messages"),
    "a dict": ({"messages": USER}, ": found fields {'messages': dict}, expected {messages"),
    "texts": ({"messages": ["Hello", "Hi"]}, ": found fields {'messages': list}, expected {messages"),
    "a text among them": ({"messages": [USER, ASSISTANT, "Bye"]}, ": found fields {'messages': list}, expected"),
    "an empty list": ({"messages": []}, ": no message of the assistant among 0"),
    "no role": ({"messages": [{"content": "x"}, ASSISTANT]},
                ": messages[0]: found fields {'content': str}, expected {role: str, content: str}"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, ": messages[1]: found fields {'role': str}, expected"),
    "null content": ({"messages": [USER, {"role": "assistant", "content": None}]},
                     ": messages[1]: found fields {'role': str, 'content': NoneType}, expected"),
    "parts as content": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]},
                         ": messages[0]: content[0]: found fields {'type': str}, expected {type: 'text', text: str}"),
    "a number as role": ({"messages": [{"role": 1, "content": "x"}, ASSISTANT]}, "{'role': int, 'content': str}"),
    "an unknown role": ({"messages": [USER, {"role": "bot", "content": "x"}, ASSISTANT]},
                        ": messages[1]: role is 'bot', expected system, user or assistant"),
    "a role with line breaks": ({"messages": [{"role": "a\nb" * 99, "content": "x"}]}, "role is 'a\\nba\\nb"),
    "a capital role": ({"messages": [{"role": "User", "content": "x"}, ASSISTANT]}, ": messages[0]: role is 'User'"),
    "a late system message": ({"messages": [USER, ASSISTANT, {"role": "system", "content": "x"}, ASSISTANT]},
                              ": messages[2]: role is 'system', expected only of the first message"),
    "empty content": ({"messages": [USER, {"role": "assistant", "content": ""}]}, ": messages[1]: content is empty"),
    "blank content": ({"messages": [{"role": "user", "content": " \n\t\u00a0"}, ASSISTANT]},
                      ": messages[0]: content is empty"),
    "NUL": ({"messages": [USER, {"role": "assistant", "content": "a\0"}]},
            ": messages[1]: character 1 of content is NUL"),
    "half a character": ({"messages": [{"role": "user", "content": "ab\ud800"}, ASSISTANT]},
                         ": messages[0]: character 2 of content is a lone surrogate"),
    "no assistant": ({"messages": [{"role": "system", "content": "x"}, USER]}, ": no message of the assistant among 2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MALFORMED)
def test_a_row_that_is_no_conversation_is_told_in_one_line_that_begins_with_its_place(case, layout):
    """R15: in every layout the same; the message by its number, what was found and what was expected."""
    row, expected = MALFORMED[case]
    with pytest.raises(UserError) as error:
        Chat(layout).render(row, "data.jsonl:7")
    told = str(error.value)
    assert told.startswith("data.jsonl:7: ") and expected in told, told
    assert "\n" not in told and len(told) < 300


@pytest.mark.parametrize("roles", ["assistant", "assistant user", "user user assistant", "user assistant assistant",
                                   "system assistant", "system assistant user", "user assistant user user"])
def test_roles_that_llama_2s_layout_cannot_express_are_refused_and_others_take_them(roles):
    """R15: its users and assistants take turns, and the user begins."""
    row = {"messages": [{"role": role, "content": "x"} for role in roles.split()]}
    with pytest.raises(UserError) as error:
        Chat("llama2").render(row, "data.jsonl:7")
    told = str(error.value)
    assert told.startswith("data.jsonl:7: roles ") and told.endswith("expected user and assistant in turn")
    assert ", ".join(role for role in roles.split() if role != "system") in told and "\n" not in told
    for layout in LAYOUTS.keys() - {"llama2"}:
        assert len(Chat(layout).render(row, "here")[0]) >= 3 * len(row["messages"])


def test_hundreds_of_wrong_turns_are_told_shortly():
    """R15: the first few roles only."""
    with pytest.raises(UserError) as error:
        Chat("llama2").render({"messages": [USER] * 500 + [ASSISTANT]}, "data.jsonl:7")
    assert len(str(error.value)) < 200
