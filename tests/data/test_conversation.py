"""Rows as people have them become turns: what a message says is used, or its row is refused by the key's name."""

import pytest

from llama.boundary.errors import UserError
from llama.data.chat import LAYOUTS, Chat
from llama.data.conversation import Turn, read_turns

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
TURNS = [Turn("user", "2+2?"), Turn("assistant", "4", learned=True)]


def learned_texts(layout: str, row: dict) -> list[str]:
    return [s.text.strip() for s in Chat(layout).render(row, "here")[0] if s.answer and not s.control]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unlearned", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}])
def test_a_turn_with_weight_0_or_train_false_is_read_but_not_learned(layout, unlearned):
    """C19: neither its text nor the end of its turn; the turns around it are as before."""
    wrong = {"role": "assistant", "content": "WRONG 5", **unlearned}
    row = {"messages": [USER, wrong, {"role": "user", "content": "Sure?"}, ANSWER | {"weight": 1, "train": True}]}
    segments, _ = Chat(layout).render(row, "here")
    assert learned_texts(layout, row) == ["4"]
    assert [s.text for s in segments if s.control and s.answer] == [segments[-1].text] or layout == "chatml"
    assert sum(s.answer for s in segments) == 2  # a text and its end
    row["messages"][1] = wrong | {"weight": 1, "train": None}
    everything, _ = Chat(layout).render(row, "here")
    assert [(s.text, s.control) for s in segments] == [(s.text, s.control) for s in everything]


def test_what_is_null_or_empty_is_as_absent():
    """Parquet files have every key of any row in all rows."""
    nothing = {"name": None, "tool_calls": [], "function_call": None, "weight": None, "refusal": "", "audio": {}}
    row = {"messages": [USER | nothing, ANSWER | nothing], "tools": "[]", "functions": None, "system": " "}
    row |= {"conversations": None, "conversation": []}
    assert read_turns(row, "here") == TURNS


def test_what_only_numbers_and_dates_a_message_is_left_out():
    row = {"messages": [USER | {"id": "m1", "timestamp": 17}, ANSWER | {"parent_id": "m1", "created_at": "2026"}]}
    assert read_turns(row, "here") == TURNS


@pytest.mark.parametrize("row", [
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    {"conversations": [{"from": "user", "value": "2+2?", "weight": 0}, {"from": "gpt", "value": "4", "weight": 1.0}]},
    {"conversations": [USER, ANSWER]}, {"conversation": [USER, ANSWER]},
    {"messages": [{"from": "human", "value": "2+2?"}, {"from": "chatgpt", "value": "4"}]},
], ids=str)
def test_sharegpt_rows_are_conversations(row):
    assert read_turns(row, "here") == TURNS


def test_the_text_parts_of_a_message_are_lines_of_one_text():
    parts = [{"type": "text", "text": "2+2?", "image_url": None}, {"type": "text", "text": "Be quick."}]
    turns = read_turns({"messages": [{"role": "user", "content": parts}, ANSWER]}, "here")
    assert turns[0].content == "2+2?\nBe quick."


@pytest.mark.parametrize("content", ["", " \n", None, []])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_system_turn_is_none(layout, content):
    row = {"messages": [{"role": "system", "content": content}, USER, ANSWER]}
    assert Chat(layout).render(row, "here") == Chat(layout).render({"messages": [USER, ANSWER]}, "here")


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_text_beside_the_messages_is_their_system_turn(column):
    row = {column: "In French.", "messages": [USER, ANSWER]}
    system = {"role": "system", "content": "In French."}
    assert read_turns(row, "here") == [Turn("system", "In French."), *TURNS]
    assert read_turns(row | {"messages": [system, USER, ANSWER]}, "here") == [Turn("system", "In French."), *TURNS]


CALL = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
REFUSED = {
    "tool calls": ({"messages": [USER, ANSWER | {"tool_calls": CALL}]}, "messages[1]: has 'tool_calls', which no"),
    "tool calls without text": ({"messages": [USER, ANSWER | {"content": None, "tool_calls": CALL}, ANSWER]},
                                "messages[1]: has 'tool_calls'"),
    **{key: ({"messages": [USER, ANSWER | {key: "x"}]}, f"messages[1]: has {key!r}, which no layout renders")
       for key in ("reasoning_content", "reasoning", "thinking", "refusal", "audio", "name", "function_call", "mood")},
    "a tool's turn": ({"messages": [USER, {"role": "tool", "content": "4", "tool_call_id": "1"}, ANSWER]},
                      "messages[1]: role is 'tool'"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
                 "messages[0]: content[0]: is of type 'image_url', expected only text"),
    "a text as a part": ({"messages": [{"role": "user", "content": ["x"]}, ANSWER]}, "content[0]: found 'x'"),
    "more in a part": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cited": 1}]}, ANSWER]},
                       "content[0]: has 'cited'"),
    "a weight between": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight is 0.5, expected 0 or 1"),
    "a weight as a word": ({"messages": [USER, ANSWER | {"weight": "0"}]}, "weight is '0', expected 0 or 1"),
    "a weight as a truth": ({"messages": [USER, ANSWER | {"weight": False}]}, "weight is False, expected 0 or 1"),
    "train as a number": ({"messages": [USER, ANSWER | {"train": 0}]}, "train is 0, expected true or false"),
    "a contradiction": ({"messages": [USER, ANSWER | {"train": True, "weight": 0}]}, "expected the same of both"),
    "a question to learn": ({"messages": [USER | {"train": True}, ANSWER]}, "messages[0]: is to be learned"),
    "nothing to learn": ({"messages": [USER, ANSWER | {"weight": 0}]}, "no message of the assistant is learned"),
    "two spellings": ({"messages": [USER | {"value": "3+3?"}, ANSWER]}, "has both content and value"),
    "two roles": ({"messages": [USER | {"from": "gpt"}, ANSWER]}, "has both role and from"),
    "two conversations": ({"messages": [USER, ANSWER], "conversations": [USER]}, "both messages and conversations"),
    "tools": ({"tools": CALL, "messages": [USER, ANSWER]}, "has tools, which no layout renders"),
    "functions": ({"functions": CALL, "messages": [USER, ANSWER]}, "has functions"),
    "another system": ({"system": "A", "messages": [{"role": "system", "content": "B"}, USER, ANSWER]},
                       "system is not the system message"),
    "a system that is no text": ({"system": 7, "messages": [USER, ANSWER]}, "system is of type int, expected text"),
    "half a character": ({"system": "\ud800", "messages": [USER, ANSWER]}, "character 0 of system is a lone surrogate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_layout_can_express_is_refused_by_name(case):
    row, expected = REFUSED[case]
    with pytest.raises(UserError) as error:
        read_turns(row, "rows.jsonl:7")
    told = str(error.value)
    assert told.startswith("rows.jsonl:7: ") and expected in told and "\n" not in told and len(told) < 300, told


def test_all_columns_that_are_read_are_asked_for():
    """A Parquet file's other columns are never read, so none of them could be refused."""
    lists = {"messages", "conversations", "conversation"}
    lists |= {"prompt", "completion"}  # both lists of messages
    assert Chat.columns == lists | {"system", "system_prompt", "tools", "functions"}
