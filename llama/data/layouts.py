"""Layouts of a conversation, each written twice: as segments, to train on, and in Jinja, for whoever serves the model.

    chatml     <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n ...          SmolLM2, Qwen
    llama3     <|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|> ...          Llama 3 Instruct
    llama2     <s>[INST] <<SYS>>\\n...\\n<</SYS>>\\n\\nHello [/INST] Hi </s><s>[INST] ...  Llama 2 Chat
    zephyr     <|user|>\\nHello</s>\\n<|assistant|>\\nHi</s> ...                          Zephyr, TinyLlama Chat
    prompter   <|system|> Be brief. </s> <|prompter|> Hello </s> <|assistant|> Hi </s> ...  plain text and the end token

<|...|> are control tokens in the first two layouts and text in the last two. Each part of a turn is encoded on its own,
so a later turn changes no id of an earlier one, and the text of a message never becomes a control token.
"""

import json
from collections.abc import Callable, Iterator, Sequence

from llama.data.conversation import Turn
from llama.data.templates import END, Segment
from llama.data.tokenizer import Tokenizer


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

# The same in Jinja. `system` is the system turn, "" where there is none, and `turns` are the others.
_START = (
    "{%% if messages[0]['role'] == 'system' %%}{%% set system = messages[0]['content'] or '' %%}"
    "{%% set turns = messages[1:] %%}{%% else %%}{%% set system = '' %%}{%% set turns = messages %%}{%% endif %%}"
    "{%% if system | trim %%}{%% set system = %(before)s + system%(strip)s %%}"
    "{%% else %%}{%% set system = %(alone)s %%}{%% endif %%}"
)
_JINJA = {
    "chatml": (
        "{{ %(bos)s }}{%% if system %%}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{%% endif %%}"
        "{%% for turn in turns %%}{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}"
        "{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
    ),
    "llama3": (
        "{{ %(bos)s }}{%% if system %%}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}{%% endif %%}"
        "{%% for turn in turns %%}{{ '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ turn['content'] | trim + '<|eot_id|>' }}{%% endfor %%}"
        "{%% if add_generation_prompt %%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%% endif %%}"
    ),
    "llama2": (
        "{%% if system %%}{%% set system = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' %%}{%% endif %%}"
        "{%% for turn in turns %%}{%% if turn['role'] == 'user' %%}{%% set first = system if loop.first else '' %%}"
        "{{ %(bos)s + '[INST] ' + (first + turn['content']) | trim + ' [/INST]' }}"
        "{%% else %%}{{ ' ' + turn['content'] | trim + ' ' + %(end)s }}{%% endif %%}{%% endfor %%}"
    ),
    "zephyr": (
        "{{ %(bos)s }}{%% if system %%}{{ '<|system|>\\n' + system + %(end)s + '\\n' }}{%% endif %%}"
        "{%% for turn in turns %%}{{ '<|' + turn['role'] + '|>\\n' + turn['content'] + %(end)s + '\\n' }}"
        "{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|assistant|>\\n' }}{%% endif %%}"
    ),
    "prompter": (
        "{{ %(bos)s }}{%% if system %%}{{ '<|system|> ' + system + ' ' + %(end)s }}{%% endif %%}"
        "{%% for turn in turns %%}{{ '' if loop.first and not system else ' ' }}"
        "{{ '<|assistant|>' if turn['role'] == 'assistant' else '<|prompter|>' }}"
        "{{ ' ' + turn['content'] + ' ' + %(end)s }}{%% endfor %%}"
        "{%% if add_generation_prompt %%}{{ ' <|assistant|>' }}{%% endif %%}"
    ),
}


def chat_template_of(layout: str, alone: str, before: str, tokenizer: Tokenizer) -> str:
    """A Jinja chat template that writes the prompts that were trained, BOS included, for transformers, vLLM and
    llama.cpp: with `alone` as the system turn of a conversation that has none, and `before` at the start of others.

    Their tokenizers turn what looks like a control token in a message into one; ours never do.
    """
    values = {
        "alone": _quoted(alone),
        "before": _quoted(before),
        "strip": " | trim" if layout in STRIPPED else "",
        "bos": _name_of(tokenizer.bos_id, tokenizer, "bos_token"),
        "end": _name_of(tokenizer.eos_id, tokenizer, "eos_token"),
    }
    return (_START + _JINJA[layout]) % values


def end_of_turn(layout: str, tokenizer: Tokenizer) -> int:
    """The id of the control token that ends an answer, at which generation must stop."""
    tokens = CONTROL_TOKENS.get(layout)
    return tokenizer.control_id(tokens[-1]) if tokens else tokenizer.eos_id


def _name_of(id: int | None, tokenizer: Tokenizer, variable: str) -> str:
    """In Jinja, the name of a control token: as a string, or the variable that holds the name that we do not know."""
    if id is None:
        return "''"
    name = tokenizer.control_name(id)
    return _quoted(name) if name else variable


def _quoted(text: str) -> str:
    """A string of Jinja, which has JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
