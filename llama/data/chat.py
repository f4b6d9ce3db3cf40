"""Conversations as segments: the loss falls on what the assistant says and on the token that ends its turn.

A row is {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}. Four layouts:

    chatml     <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n ...          SmolLM2, Qwen
    llama3     <|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|> ...          Llama 3 Instruct
    llama2     <s>[INST] <<SYS>>\\n...\\n<</SYS>>\\n\\nHello [/INST] Hi </s><s>[INST] ...  Llama 2 Chat
    prompter   <|system|> Be brief. </s> <|prompter|> Hello </s> <|assistant|> Hi </s> ...  plain text and the end token

<|...|> are control tokens in the first two layouts and text in the last. Ids are built turn by turn, so no later turn
can change an earlier one, and what a message says never becomes a control token.
"""

from collections.abc import Callable, Iterator

from llama.data.rows import DataError
from llama.data.templates import END, Segment, check_text, described
from llama.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Turn = tuple[str, str]  # role, content


class Chat:
    """A chat layout, with the attributes and the `render` of a `templates.Template`."""

    fields, columns, answers = {"messages"}, {"messages"}, ()
    expected = "{messages: list of {role: str, content: str}}"

    def __init__(self, name: str):
        self.name = self.source = name

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        """The segments of one conversation; its answers are free text (-1).

        Raises DataError, beginning with `where`, when the row is not a conversation that the layout can express.
        """
        turns = _turns(row, where, self.expected)
        if self.name == "llama2":
            said = [role for role, _ in turns if role != "system"]
            if said != [ROLES[1 + i % 2] for i in range(len(said))]:
                raise DataError(f"{where}: roles {', '.join(said[:8])}; expected user and assistant in turn")
        return list(LAYOUTS[self.name](turns)), -1


def _turns(row: dict, where: str, expected: str) -> list[Turn]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: found fields {described(row)}, expected {expected}")
    turns = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        here = f"{where}: messages[{number}]"
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{here}: found fields {described(message)}, expected {{role: str, content: str}}")
        if role not in ROLES:
            raise DataError(f"{here}: role is {role!r:.40}, expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        if role == "system" and number:
            raise DataError(f"{here}: role is 'system', expected only of the first message")
        check_text(content, "content", here)
        if not content.strip():
            raise DataError(f"{here}: content is empty")
        turns.append((role, content))
    if "assistant" not in [role for role, _ in turns]:
        raise DataError(f"{where}: no message of the assistant among {len(turns)}, so there is nothing to learn")
    return turns


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
    """As in Meta's llama/generation.py: each exchange has its own BOS and end."""
    system = ""
    for role, content in turns:
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            yield Segment(f"[INST] {(system + content).strip()} [/INST]", begins=True)
            system = ""
        else:
            yield Segment(f" {content.strip()} ", answer=True, may_cut=True)
            yield Segment(END, answer=True, control=True)


def _prompter(turns: list[Turn]) -> Iterator[Segment]:
    """The recipe of the 70B chat assistant, which writes the end token between spaces."""
    names = {"system": "<|system|>", "user": "<|prompter|>", "assistant": "<|assistant|>"}
    for number, (role, content) in enumerate(turns):
        answer = role == "assistant"
        yield Segment(f"{' ' if number else ''}{names[role]}")
        yield Segment(f" {content} ", answer, may_cut=answer)
        yield Segment(END, answer, control=True)


LAYOUTS: dict[str, Callable[[list[Turn]], Iterator[Segment]]] = {
    "chatml": _chatml, "llama3": _llama3, "llama2": _llama2, "prompter": _prompter,
}
MARKS = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}


def layout_of(tokenizer: Tokenizer) -> str:
    """The layout for which a tokenizer has the control tokens; `llama2`, which needs none, where it has no such."""
    return next((name for name, marks in MARKS.items() if all(map(tokenizer.has_control, marks))), "llama2")
