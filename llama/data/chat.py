"""Conversations as segments: the loss falls on what the assistant says and on the token that ends its turn.

A row is {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}. Four layouts:

    chatml     <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n ...          SmolLM2, Qwen
    llama3     <|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|> ...          Llama 3 Instruct
    llama2     <s>[INST] <<SYS>>\\n...\\n<</SYS>>\\n\\nHello [/INST] Hi </s><s>[INST] ...  Llama 2 Chat
    prompter   <|system|> Be brief. </s> <|prompter|> Hello </s> <|assistant|> Hi </s> ...  plain text and the end token

<|...|> are control tokens in the first two layouts and text in the last. Each part of a turn is encoded on its own, so
a later turn changes no id of an earlier one, and the text of a message never becomes a control token.
"""

from collections.abc import Callable, Iterator

from llama.boundary.errors import UserError
from llama.data.templates import END, Segment, Template, check_text, described
from llama.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Turn = tuple[str, str]  # role and content


class Chat:
    """A chat layout. It has the attributes and the `render` of a `templates.Template`."""

    fields = {"messages"}
    columns = {"messages"}
    answers = ()
    expected = "{messages: list of {role: str, content: str}}"

    def __init__(self, name: str):
        self.name = name
        self.source = name

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        """The segments of one conversation, and -1, because its answers are free text.

        Raises UserError, beginning with `where`, for a row that is no conversation or that the layout cannot express.
        """
        turns = _read_turns(row, where, self.expected)
        if self.name == "llama2":
            roles = [role for role, _ in turns if role != "system"]
            alternating = ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]
            if roles != alternating:
                raise UserError(f"{where}: roles {', '.join(roles[:8])}; expected user and assistant in turn")
        return list(LAYOUTS[self.name](turns)), -1


Renderer = Template | Chat  # both turn a row into segments with `render`


def _read_turns(row: dict, where: str, expected: str) -> list[Turn]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: found fields {described(row)}, expected {expected}")
    turns = [_read_turn(message, number, f"{where}: messages[{number}]") for number, message in enumerate(messages)]
    if "assistant" not in [role for role, _ in turns]:
        raise UserError(f"{where}: no message of the assistant among {len(turns)}, so there is nothing to learn")
    return turns


def _read_turn(message: dict, number: int, where: str) -> Turn:
    role = message.get("role")
    content = message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where}: found fields {described(message)}, expected {{role: str, content: str}}")
    if role not in ROLES:
        raise UserError(f"{where}: role is {role!r:.40}, expected system, user or assistant")
    if role == "system" and number > 0:
        raise UserError(f"{where}: role is 'system', expected only of the first message")
    check_text(content, "content", where)
    if not content.strip():
        raise UserError(f"{where}: content is empty")
    return role, content


def _chatml(turns: list[Turn]) -> Iterator[Segment]:
    for role, content in turns:
        answer = role == "assistant"
        yield Segment("<|im_start|>", control=True)
        yield Segment(f"{role}\n")
        yield Segment(content, answer, may_cut=answer)
        yield Segment("<|im_end|>", answer, control=True)
        yield Segment("\n")


def _llama3(turns: list[Turn]) -> Iterator[Segment]:
    for role, content in turns:
        answer = role == "assistant"
        yield Segment("<|start_header_id|>", control=True)
        yield Segment(role)
        yield Segment("<|end_header_id|>", control=True)
        yield Segment("\n\n")
        yield Segment(content.strip(), answer, may_cut=answer)
        yield Segment("<|eot_id|>", answer, control=True)


def _llama2(turns: list[Turn]) -> Iterator[Segment]:
    """As in Meta's llama/generation.py: each question with its answer has its own BOS and end token."""
    system = ""
    for role, content in turns:
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            yield Segment(f"[INST] {(system + content).strip()} [/INST]", starts_text=True)
            system = ""
        else:
            yield Segment(f" {content.strip()} ", answer=True, may_cut=True)
            yield Segment(END, answer=True, control=True)


def _prompter(turns: list[Turn]) -> Iterator[Segment]:
    """The recipe of the 70B chat assistant, which writes the end token between spaces."""
    names = {"system": "<|system|>", "user": "<|prompter|>", "assistant": "<|assistant|>"}
    for number, (role, content) in enumerate(turns):
        answer = role == "assistant"
        space = " " if number > 0 else ""
        yield Segment(f"{space}{names[role]}")
        yield Segment(f" {content} ", answer, may_cut=answer)
        yield Segment(END, answer, control=True)


LAYOUTS: dict[str, Callable[[list[Turn]], Iterator[Segment]]] = {
    "chatml": _chatml,
    "llama3": _llama3,
    "llama2": _llama2,
    "prompter": _prompter,
}
CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def layout_of(tokenizer: Tokenizer) -> str:
    """The layout whose control tokens the tokenizer has, or else `llama2`, which needs none."""
    for name, tokens in CONTROL_TOKENS.items():
        if all(tokenizer.has_control(token) for token in tokens):
            return name
    return "llama2"
