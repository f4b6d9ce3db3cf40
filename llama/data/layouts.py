"""Layouts of a conversation: its turns as segments.

    chatml     <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n ...          SmolLM2, Qwen
    llama3     <|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|> ...          Llama 3 Instruct
    llama2     <s>[INST] <<SYS>>\\n...\\n<</SYS>>\\n\\nHello [/INST] Hi </s><s>[INST] ...  Llama 2 Chat
    zephyr     <|user|>\\nHello</s>\\n<|assistant|>\\nHi</s> ...                          Zephyr, TinyLlama Chat
    prompter   <|system|> Be brief. </s> <|prompter|> Hello </s> <|assistant|> Hi </s> ...  plain text and the end token

<|...|> are control tokens in the first two layouts and text in the last two. Each part of a turn is encoded on its own,
so a later turn changes no id of an earlier one, and the text of a message never becomes a control token.
"""

from collections.abc import Callable, Iterator, Sequence

from llama.data.conversation import Turn
from llama.data.templates import END, Segment


def _chatml(turns: Sequence[Turn]) -> Iterator[Segment]:
    for role, content, learned in turns:
        yield Segment("<|im_start|>", control=True)
        yield Segment(f"{role}\n")
        yield Segment(content, learned, may_cut=learned)
        yield Segment("<|im_end|>", learned, control=True)
        yield Segment("\n")


def _llama3(turns: Sequence[Turn]) -> Iterator[Segment]:
    for role, content, learned in turns:
        yield Segment("<|start_header_id|>", control=True)
        yield Segment(role)
        yield Segment("<|end_header_id|>", control=True)
        yield Segment("\n\n")
        yield Segment(content, learned, may_cut=learned)
        yield Segment("<|eot_id|>", learned, control=True)


def _llama2(turns: Sequence[Turn]) -> Iterator[Segment]:
    """As in Meta's llama/generation.py: each question with its answer has its own BOS and end token."""
    system = ""
    for role, content, learned in turns:
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            yield Segment(f"[INST] {(system + content).strip()} [/INST]", starts_text=True)
            system = ""
        else:
            yield Segment(f" {content.strip()} ", learned, may_cut=learned)
            yield Segment(END, learned, control=True)


def _zephyr(turns: Sequence[Turn]) -> Iterator[Segment]:
    for number, (role, content, learned) in enumerate(turns):
        newline = "\n" if number > 0 else ""
        yield Segment(f"{newline}<|{role}|>\n")
        yield Segment(content, learned, may_cut=learned)
        yield Segment(END, learned, control=True)


def _prompter(turns: Sequence[Turn]) -> Iterator[Segment]:
    """The recipe of the 70B chat assistant, which writes the end token between spaces."""
    names = {"system": "<|system|>", "user": "<|prompter|>", "assistant": "<|assistant|>"}
    for number, (role, content, learned) in enumerate(turns):
        space = " " if number > 0 else ""
        yield Segment(f"{space}{names[role]}")
        yield Segment(f" {content} ", learned, may_cut=learned)
        yield Segment(END, learned, control=True)


LAYOUTS: dict[str, Callable[[Sequence[Turn]], Iterator[Segment]]] = {
    "chatml": _chatml,
    "llama3": _llama3,
    "llama2": _llama2,
    "zephyr": _zephyr,
    "prompter": _prompter,
}
CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
STRIPPED = {"llama3"}  # layouts that strip each message on its own
