"""From rows, turns or a text to prompts: the ids that the model continues with its answer.

These are the ids that training has before the answer, because the same functions make them: a template or a layout
renders the segments, `encode_rows` encodes each on its own, and only what the template allows is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

from llama.boundary.errors import UserError
from llama.boundary.launch import is_local_rank_zero
from llama.boundary.progress import Progress
from llama.data.chat import LAYOUTS, Chat, Renderer
from llama.data.chat_template import prompt_segments
from llama.data.conversation import PAIR, Turn, read_turns
from llama.data.encoding import encode_rows
from llama.data.examples import SHOWN, BadRows
from llama.data.rendering import RenderedRows
from llama.data.templates import Segment, check_text
from llama.data.tokenizer import Tokenizer
from llama.data.unlabelled import UnlabelledTemplate

LONGEST = 1 << 60  # tokens: more than any prompt has


class Room(NamedTuple):
    """How many tokens a prompt may have.

    cut_to:  a longer prompt is cut to this many, if the template allows it.
    at_most: a prompt that cannot be cut to `cut_to` is cut to this many. If that is impossible, too, it is refused.
    side:    which end of a text is cut, "left" or "right".
    """

    cut_to: int
    at_most: int
    side: str = "right"


class Prompt(NamedTuple):
    """The prompt of one row.

    row:       the row's number in its file.
    ids:       the prompt as ids.
    text:      the prompt as the model reads it: control tokens have their names, and the BOS at the start is left out.
    reference: the row's own answer, None if it has none.
    was_cut:   whether the prompt was cut.
    """

    row: int
    ids: list[int]
    text: str
    reference: str | None
    was_cut: bool


@dataclass(frozen=True)
class Prompts:
    """The prompts of files, in order; how many rows are left out, and what is wrong with the first of these; and the
    names of fields that neither prompts nor answers use."""

    prompts: list[Prompt]
    bad_row_count: int
    first_bad_rows: list[str]
    unused: list[str]

    def notes(self) -> list[str]:
        """What a user should know about them."""
        lines = []
        if self.unused:
            lines.append(f"fields of the rows that are not used: {', '.join(f'{name!r:.40}' for name in self.unused)}")
        if self.bad_row_count:
            lines.append(f"{self.bad_row_count} bad rows were left out, the first: {self.first_bad_rows[0]}")
        cut = sum(prompt.was_cut for prompt in self.prompts)
        if cut:
            lines.append(f"{cut} of {len(self.prompts)} prompts were cut, where the template allows it")
        return lines


class AskedTemplate(UnlabelledTemplate):
    """A template for rows that may lack their answer. The segments of such a row end before the answer."""

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        segments, index = super().render(row, where)
        if not self.is_answered(row, where):
            segments = before_answer(segments)
        return segments, index


class AskedChat(Chat):
    """A chat layout for conversations that may lack their answer. The last turn is the answer if it is the assistant's;
    else the segments end before the answer."""

    def __init__(self, chat: Chat):
        super().__init__(chat.name, chat.inserted, chat.notes)

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        asks, answers = PAIR
        if isinstance(row.get(asks), list) and row.get(answers) is None:
            row = row | {answers: []}
        turns = self.prepared(read_turns(row, where, to_learn=False))
        if turns[-1].role != "assistant":
            self.check_roles([*turns, Turn("assistant", "x")], where)
            return prompt_segments(self.name, turns), -1
        self.check_roles(turns, where)
        asked = [turn._replace(learned=False) for turn in turns[:-1]]
        return list(LAYOUTS[self.name]([*asked, turns[-1]._replace(learned=True)])), -1


def asking(template: Renderer) -> Renderer:
    """The same template for rows that may lack their answer."""
    return AskedChat(template) if isinstance(template, Chat) else AskedTemplate(template)


def before_answer(segments: Sequence[Segment]) -> list[Segment]:
    """The prompt of a rendered row."""
    return list(takewhile(lambda segment: not segment.answer, segments))


def read_prompts(
    paths: Sequence[Path],
    template: Renderer,
    tokenizer: Tokenizer,
    room: Room,
    category: str | None = None,
    skip_bad_rows: bool = False,
) -> Prompts:
    """The prompt of each row of the files, or only of the rows of one `category`. Rows may lack their answer. An answer
    changes the prompt only if it decides which of a template's alternatives fits the row.

    Raises BadRows for rows that cannot be used, unless skip_bad_rows, and UserError if no row can be used.
    """
    rows = RenderedRows(paths, asking(template), category)
    prompts = []
    errors = []
    with Progress(f"reading {paths[0].name}", "rows", silent=not is_local_rank_zero()) as progress:
        for row in rows:
            try:
                if row.error:
                    raise UserError(row.error)
                segments = before_answer(row.segments)
                ids, was_cut = prompt_ids(segments, tokenizer, room, f"{paths[row.file]}{row.place}: ")
                reference = reference_of(row.segments)
                prompts.append(Prompt(row.number, ids, spelled(ids, tokenizer), reference, was_cut))
            except UserError as error:
                errors.append(str(error))
            progress.update()
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if errors and not skip_bad_rows:
        raise BadRows(name, errors[:SHOWN], len(errors), len(prompts) + len(errors))
    if not prompts:
        found = f"none of {len(errors)} rows can be used; {errors[0]}" if errors else "no rows"
        raise UserError(f"{name}: {found}")
    return Prompts(prompts, len(errors), errors[:SHOWN], rows.unused)


def prompt_ids(
    segments: Sequence[Segment], tokenizer: Tokenizer, room: Room, where: str = ""
) -> tuple[list[int], bool]:
    """The ids of a prompt's segments, with BOS if the tokenizer has one, and whether anything was cut.

    Raises UserError, beginning with `where`, for a prompt that has no ids or too many.
    """
    segments = segments or [Segment("")]
    for most in (room.cut_to, room.at_most, LONGEST):
        (encoded,) = encode_rows([segments], tokenizer, most, room.side)
        if encoded:
            break
    assert encoded is not None  # without an answer, only length is a reason for None
    if len(encoded.ids) > room.at_most:
        found = f"a prompt of {len(encoded.ids)} tokens"
        others = "--max_new_tokens takes the model's other positions"
        raise UserError(f"{where}{found}, expected {room.at_most} at most; {others}")
    if not encoded.ids:
        raise UserError(f"{where}an empty prompt, and this tokenizer has no BOS to begin with; expected some text")
    return encoded.ids, encoded.was_cut


def reference_of(segments: Sequence[Segment]) -> str | None:
    """The answer of a rendered row, without the spaces around it. None if it has no answer."""
    texts = [segment.text for segment in segments if segment.answer and not segment.control]
    return "".join(texts).strip() if texts else None


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids as the model reads them, with control tokens by name, except the BOS that begins it."""
    text = ""
    starts_text = True
    if list(ids[:1]) == [tokenizer.bos_id]:
        ids = ids[1:]
    for name, group in groupby(ids, key=tokenizer.control_name):
        part = list(group)
        if name is None:
            text += tokenizer.decode(part, starts_text)
            starts_text = False
        else:
            text += name * len(part)
            starts_text = part[-1] == tokenizer.bos_id
    return text


def row_of(template: Renderer, text: str) -> dict:
    """A row that holds this text: as the turn of a user, or in the only field that the template's prompt needs.

    Fields that may be absent do not count, unless there are no others. Raises UserError if not exactly one counts.
    """
    if isinstance(template, Chat):
        return {"messages": [{"role": "user", "content": text}]}
    asked = UnlabelledTemplate(template).asked
    needed = sorted(template.fields & asked.keys())
    if not needed:
        needed = sorted(asked)
    if len(needed) != 1:
        found = f"needs {' and '.join(needed)}" if needed else "has no field in its prompt"
        raise UserError(f"--template {template.name}: {found}, expected one field for --prompt; give rows to --prompts")
    (field,) = needed
    element = asked[field].element
    return {field: text if element is None else [text] * (element + 1)}


def one_prompt(template: Renderer | None, text: str, tokenizer: Tokenizer, room: Room) -> Prompt:
    """The prompt that a text becomes: rendered by a template, or without one the text itself.

    Raises UserError for a text that cannot be tokenized or does not fit.
    """
    where = "--prompt"
    if template is None:
        check_text(text, "the text", where)
        segments = [Segment(text)]
    else:
        rendered, _ = asking(template).render(row_of(template, text), where)
        segments = before_answer(rendered)
    ids, was_cut = prompt_ids(segments, tokenizer, room, f"{where}: ")
    return Prompt(1, ids, spelled(ids, tokenizer), None, was_cut)


def answers_of(template: Renderer | None, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each answer word of a template; [] if its answers are free text."""
    return tokenizer.encode_batch(list(template.answers), starts_text=False) if template else []


def room_of(positions: int, max_length: int | None, answer: int, side: str) -> Room:
    """The room that an answer of so many tokens leaves for its prompt among the model's positions.

    max_length: prompts are cut, where they can be, so that prompt and answer together have so many tokens. Ignored
                if the answer alone has as many: the answers of training with this max_length were shorter.

    Raises UserError if the answer takes all positions.
    """
    if answer >= positions:
        raise UserError(f"--max_new_tokens {answer}: the model has {positions} positions, expected fewer tokens")
    most = positions - answer
    wanted = most if max_length is None or max_length <= answer else max_length - answer
    return Room(wanted, most, side)
