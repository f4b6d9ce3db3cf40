"""Conversations as segments: the loss falls on what the assistant says and on the token that ends its turn.

`conversation` reads the rows, `layouts` has the layouts, `chat_template` the template that a model's folder brings.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from llama.boundary.errors import UserError
from llama.data.chat_template import (
    NOTHING_INSERTED,
    ChatTemplate,
    Inserted,
    prompt_ids,
    prompt_text,
    read_chat_template,
)
from llama.data.conversation import EXPECTED, LISTS, PAIR, SYSTEM, TOOLS, Turn, read_turns
from llama.data.layouts import CONTROL_TOKENS, LAYOUTS, STRIPPED, chat_template_of, end_of_turn
from llama.data.rows import read
from llama.data.templates import Segment, Template
from llama.data.tokenizer import Tokenizer

COMPARED_ROWS = 20  # whose prompts are compared with those that the folder's chat template writes
COMPARED_CHARACTERS = 1 << 16  # of each of them, at most
SHOWN = 160  # characters of each prompt in a note
SERVE = "serve the model with the chat template that its export has"


class Chat:
    """A chat layout. It has the attributes and the `render` of a `templates.Template`.

    inserted: what --system puts into conversations; notes: what a user should know about the prompts.
    """

    fields = {LISTS[0]}
    spellings = tuple({name} for name in LISTS)  # rows with any of these fields are conversations
    columns = {*LISTS, *PAIR, *SYSTEM, *TOOLS}
    answers = ()
    expected = EXPECTED

    def __init__(self, name: str, inserted: Inserted = NOTHING_INSERTED, notes: Sequence[str] = ()):
        self.name = name
        self.inserted = inserted
        self.notes = notes
        self.source = f"{name} {list(inserted)}" if any(inserted) else name

    @property
    def system(self) -> str | None:
        """The system turn of a conversation that has none of its own."""
        return self.inserted.alone or None

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        """The segments of one conversation, and -1, because its answers are free text.

        Raises UserError, beginning with `where`, for a row that is no conversation or that the layout cannot express.
        """
        turns = self.prepared(read_turns(row, where))
        self.check_roles(turns, where)
        return list(LAYOUTS[self.name](turns)), -1

    def check_roles(self, turns: Sequence[Turn], where: str) -> None:
        """Raises UserError, beginning with `where`, for an order of roles that the layout cannot express."""
        roles = [turn.role for turn in turns if turn.role != "system"]
        alternating = ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]
        if self.name == "llama2" and roles != alternating:
            raise UserError(f"{where}: roles {', '.join(roles[:8])}; expected user and assistant in turn")

    def prepared(self, turns: list[Turn]) -> list[Turn]:
        """The turns as they are trained: stripped where the layout does so, with what --system inserts."""
        if self.name in STRIPPED:
            turns = [turn._replace(content=turn.content.strip()) for turn in turns]
        if turns[0].role == "system":
            first = turns[0]
            return [first._replace(content=self.inserted.before + first.content), *turns[1:]]
        return [Turn("system", self.inserted.alone), *turns] if self.inserted.alone else turns

    def chat_template(self, tokenizer: Tokenizer) -> str:
        """In Jinja, the chat template of exactly what was trained, for the tokenizer's folder of an export."""
        return chat_template_of(self.name, *self.inserted, tokenizer)

    def end_of_turn(self, tokenizer: Tokenizer) -> int:
        """The id that ends an answer, at which an exported model stops."""
        return end_of_turn(self.name, tokenizer)


Renderer = Template | Chat  # both turn a row into segments with `render`


def find_chat(layout: str, system: str | None, tokenizer: Tokenizer, files: Iterable[Path]) -> Chat:
    """The layout of this name, or for "chat" the one that the tokenizer's folder asks for, with --system's turn.

    The prompts of the first rows of `files` are compared with those of the folder's chat template: each difference
    becomes a note. Raises UserError where no layout fits, and where --system cannot be done.
    """
    notes = []
    template = read_chat_template(tokenizer)
    if layout == "chat":
        layout = layout_of(tokenizer, template)
        if not template and layout not in CONTROL_TOKENS:
            notes.append(
                f"PROMPT: {tokenizer.path} has no chat template, so conversations are written in the layout {layout}; "
                f"--template chooses one of {', '.join(LAYOUTS)}"
            )
    inserted = _inserted(system, layout, tokenizer, template)
    if template:
        notes += _differences(Chat(layout, inserted), system, template, files)
    return Chat(layout, inserted, notes)


def find_served_chat(layout: str, system: str | None, tokenizer: Tokenizer, files: Iterable[Path]) -> Chat:
    """`find_chat` for a model that is asked, and not trained: without --system it gets the system turn that the chat
    template of its folder inserts, as elsewhere. Where we cannot write that one, there is a note."""
    if system is not None or not read_chat_template(tokenizer):
        return find_chat(layout, system, tokenizer, files)
    paths = list(files)
    try:
        return find_chat(layout, "default", tokenizer, paths)
    except UserError as error:
        chat = find_chat(layout, None, tokenizer, paths)
        return Chat(chat.name, chat.inserted, [*chat.notes, f"no system turn is inserted; {error}"])


def layout_of(tokenizer: Tokenizer, template: ChatTemplate | None = None) -> str:
    """The layout that writes what the folder's chat template does; or else the one whose control tokens the tokenizer
    has; or else, without a chat template, `llama2`, which needs none.

    Raises UserError where there is a chat template and no layout for it.
    """
    possible = []
    for name in LAYOUTS:
        if all(tokenizer.has_control(token) for token in CONTROL_TOKENS.get(name, ())):
            possible.append(name)
    if template:
        for name in possible:
            if template.inserts(name) is not None:
                return name
    if possible[0] in CONTROL_TOKENS:
        return possible[0]
    if not template:
        return "llama2"
    found = template.problem or f"it writes {template.probes[0].text[:SHOWN]!r}"
    raise UserError(
        f"{tokenizer.path}: its chat template is none of our layouts ({found}); --template takes one of them all the "
        f"same: {', '.join(LAYOUTS)}"
    )


def _inserted(system: str | None, layout: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> Inserted:
    """What --system asks for: nothing, a text, or what the folder's chat template inserts."""
    if system in (None, "none"):
        return NOTHING_INSERTED
    if system != "default":
        if not system.strip():
            raise UserError(f"--system {system!r}: is empty, expected a text, default or none")
        return Inserted(system.strip() if layout in STRIPPED else system, "")
    if not template:
        raise UserError(f"--system default: {tokenizer.path} has no chat template to read; give the text itself")
    inserted = template.inserts(layout)
    if template.writes_date:
        raise UserError(
            f"--system default: the chat template of {tokenizer.path} writes today's date, which cannot be trained; "
            f"give a text itself, and {SERVE}"
        )
    if inserted is None:
        raise UserError(
            f"--system default: the chat template of {tokenizer.path} is not the layout {layout}, so its system "
            "message cannot be told from the rest; give the text itself"
        )
    return inserted


def _differences(chat: Chat, system: str | None, template: ChatTemplate, files: Iterable[Path]) -> list[str]:
    """A note, at most, on the first prompt that the folder's chat template writes in another way than we train it."""
    asked = list(islice(_first_prompts(chat, files), COMPARED_ROWS))
    problem = template.problem
    try:
        written = [] if problem else template.write([(turns, None) for _, turns in asked])
    except UserError as error:
        problem = str(error)
    if problem:
        return [f"PROMPT: the chat template of {template.tokenizer.path} cannot be compared: {problem}; {SERVE}"]
    differing = []
    for (where, turns), (theirs, refusal) in zip(asked, written, strict=True):
        trained = chat.prepared(list(turns))
        if refusal or prompt_ids(chat.name, trained, template.tokenizer) != template.ids(theirs):
            differing.append((where, prompt_text(chat.name, trained, template.tokenizer), theirs, refusal))
    if not differing:
        return []
    where, ours, theirs, refusal = differing[0]
    count = f"{len(differing)} of the first {len(asked)} prompts"
    note = f"PROMPT: {count} are not what the chat template of {template.tokenizer.path} writes. {where}: "
    if refusal:
        return [f"{note}trained as {_cut(ours, 0)}, but it refuses the conversation ({refusal}); {SERVE}"]
    if ours == theirs:
        why = "transformers encodes it as a whole, we each message apart, and a control token in a message stays text"
        return [f"{note}the text is the same, {_cut(ours, 0)}, but its ids are not: {why}"]
    same = next(i for i, (a, b) in enumerate(zip(ours + "\0", theirs + "\1", strict=False)) if a != b)
    return [f"{note}trained as {_cut(ours, same)}, served as {_cut(theirs, same)}; {_way_out(chat, system, template)}"]


def _way_out(chat: Chat, system: str | None, template: ChatTemplate) -> str:
    inserted = template.inserts(chat.name)
    if template.writes_date:
        return f"it writes today's date, which cannot be trained: {SERVE}"
    if system is None and inserted and any(inserted):
        return f"--system default trains with its system message; or {SERVE}"
    return SERVE


def _first_prompts(chat: Chat, files: Iterable[Path]) -> Iterator[tuple[str, list[Turn]]]:
    """(path:row, the turns before the last answer) of the rows that are conversations and not long."""
    for path in files:
        for number, row in islice(read(path, chat.columns), 10 * COMPARED_ROWS):
            where = f"{path}:{number}"
            try:
                if isinstance(row, UserError):
                    continue
                turns = read_turns(row, where, to_learn=False)
                asked = turns[:-1] if turns[-1].role == "assistant" else turns
                chat.check_roles([*asked, Turn("assistant", "x")], where)
            except UserError:  # told when the data is encoded
                continue
            if asked and sum(len(turn.content) for turn in turns) <= COMPARED_CHARACTERS:
                yield where, asked


def _cut(text: str, position: int) -> str:
    """The part of a text around a position, in quotes."""
    first = max(0, position - SHOWN // 4)
    part = text[first : first + SHOWN]
    return f"{'...' if first else ''}{part!r}{'...' if first + SHOWN < len(text) else ''}"
