"""From a row to the turns of a conversation. A row is spelled in one of these ways:

    {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}    OpenAI, Hugging Face
    {"conversations": [{"from": "system" | "human" | "gpt", "value": text}, ...]}      ShareGPT
    {"prompt": [message, ...], "completion": [message, ...]}          TRL, where only the completion is learned

`content` may also be a list of {"type": "text", "text": text}. A turn of the assistant with `weight: 0` or
`train: false` is not learned. `system` or `system_prompt` beside the messages is a system turn; an empty one is none.

Nothing that a message says is dropped: a key that is not read here and is not empty makes its row a bad row. Only the
keys of BOOKKEEPING are left out, because they say nothing to a model.
"""

from typing import Any, NamedTuple

from llama.boundary.errors import UserError
from llama.data.templates import check_text, described

LISTS = ("messages", "conversations", "conversation")  # the columns that may hold a conversation
PAIR = ("prompt", "completion")  # the columns that together may hold one
SYSTEM = ("system", "system_prompt")  # columns beside it that may hold its system turn
TOOLS = ("tools", "functions")  # columns beside it that no layout renders
ROLES = {
    **{name: name for name in ("system", "user", "assistant")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant"},  # ShareGPT's names
}
READ = {"role", "from", "content", "value", "weight", "train"}
BOOKKEEPING = {"id", "message_id", "parent_id", "uuid", "timestamp", "created_at"}
NOTHING: tuple[object, ...] = (None, "", "[]", [], {})  # what counts as absent
EXPECTED = "{messages: list of {role: str, content: str}}"


class Turn(NamedTuple):
    """What one side says, and whether the model learns it."""

    role: str
    content: str
    learned: bool = False


def read_turns(row: dict, where: str, to_learn: bool = True) -> list[Turn]:
    """The turns of a row. Raises UserError, beginning with `where`, for a row that is no conversation, says what no
    layout can express, or has nothing to learn, unless it need not have (`to_learn`)."""
    name = _only(row, LISTS, where) or LISTS[0]
    messages = row.get(name)
    pair = _joined_pair(row)
    if pair is not None and messages not in NOTHING:
        raise UserError(f"{where}: has both {name} and {PAIR[0]}, expected one of them")
    messages = messages if pair is None else pair
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: found fields {described(row)}, expected {EXPECTED}")
    turns = [_read_turn(message, number, f"{where}: {name}[{number}]") for number, message in enumerate(messages)]
    turns = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    said = [turn for turn in turns if turn.role == "assistant"]
    if not turns and not to_learn:
        raise UserError(f"{where}: {name} is empty, expected messages")
    if to_learn and not said:
        raise UserError(f"{where}: no message of the assistant among {len(turns)}, so there is nothing to learn")
    if to_learn and not any(turn.learned for turn in said):
        raise UserError(f"{where}: no message of the assistant is learned, all have weight 0 or train false")
    return _with_system_column(row, turns, where)


def _joined_pair(row: dict) -> list | None:
    """The messages of a prompt, not learned, and of its completion. None where the row has no such lists."""
    prompt, completion = (row.get(name) for name in PAIR)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        return None
    not_learned = {"weight": 0, "train": None}
    return [message | not_learned if isinstance(message, dict) else message for message in prompt] + completion


def _read_turn(message: dict, number: int, where: str) -> Turn:
    told = _only(message, ("role", "from"), where)
    role = message.get(told)
    text = message.get(_only(message, ("content", "value"), where) or "content")
    if not isinstance(role, str):
        raise UserError(f"{where}: found fields {described(message)}, expected {{role: str, content: str}}")
    if role not in ROLES:
        raise UserError(f"{where}: role is {role!r:.40}, expected system, user or assistant")
    role = ROLES[role]
    _refuse_unread(message, READ | BOOKKEEPING, where, "role and content, or also weight or train")
    if isinstance(text, list):
        text = _join_parts(text, where)
    if text is None and role == "system":
        text = ""
    if not isinstance(text, str):
        raise UserError(f"{where}: found fields {described(message)}, expected {{role: str, content: str}}")
    check_text(text, "content", where)
    if not text.strip() and role != "system":
        raise UserError(f"{where}: content is empty")
    if text.strip() and role == "system" and number > 0:
        raise UserError(f"{where}: role is 'system', expected only of the first message")
    return Turn(role, text, _is_learned(message, role, where))


def _join_parts(parts: list, where: str) -> str:
    """The text of a list of parts, a line each, as vLLM and llama.cpp join them."""
    texts = []
    for number, part in enumerate(parts):
        place = f"{where}: content[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise UserError(f"{place}: found {part!r:.40}, expected {{type: 'text', text: str}}")
        if part["type"] != "text":
            raise UserError(f"{place}: is of type {part['type']!r:.40}, expected only text")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{place}: found fields {described(part)}, expected {{type: 'text', text: str}}")
        _refuse_unread(part, {"type", "text"}, place, "type and text")
        texts.append(part["text"])
    return "\n".join(texts)


def _is_learned(message: dict, role: str, where: str) -> bool:
    weight = message.get("weight")
    train = message.get("train")
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        raise UserError(f"{where}: weight is {weight!r:.40}, expected 0 or 1")
    if not isinstance(train, bool | None):
        raise UserError(f"{where}: train is {train!r:.40}, expected true or false")
    wishes = {bool(wish) for wish in (weight, train) if wish is not None}
    if len(wishes) > 1:
        raise UserError(f"{where}: weight is {weight} and train is {train}, expected the same of both")
    if role != "assistant" and True in wishes:
        raise UserError(f"{where}: is to be learned (weight or train), expected only of the assistant's messages")
    return role == "assistant" and False not in wishes


def _with_system_column(row: dict, turns: list[Turn], where: str) -> list[Turn]:
    """The turns, behind the system turn that stands beside them in the row."""
    for name in TOOLS:
        if row.get(name) not in NOTHING:
            raise UserError(f"{where}: has {name}, which no layout renders; remove it, or write it into a system turn")
    column = _only(row, SYSTEM, where)
    if column is None:
        return turns
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{where}: {column} is of type {type(text).__name__}, expected text")
    check_text(text, column, where)
    if not text.strip() or text == turns[0].content:
        return turns
    if turns[0].role == "system":
        raise UserError(f"{where}: {column} is not the system message of the conversation, expected one of them")
    return [Turn("system", text), *turns]


def _only(values: dict, names: tuple[str, ...], where: str) -> str | None:
    """Which of these names has a value. Raises UserError where two have."""
    found = [name for name in names if values.get(name) not in NOTHING]
    if len(found) > 1:
        raise UserError(f"{where}: has both {found[0]} and {found[1]}, expected one of them")
    return found[0] if found else None


def _refuse_unread(values: dict[str, Any], known: set[str], where: str, expected: str) -> None:
    for key, value in values.items():
        if key not in known and value not in NOTHING:
            raise UserError(
                f"{where}: has {key!r:.40}, which no layout renders, expected {expected}; remove it, or write it into "
                "content"
            )
