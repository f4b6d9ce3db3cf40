"""From rows, turns or a text to prompts: the ids behind which the model answers.

The ids are those that training has before the answer (C12, C13), because the same functions make them: a template or
layout renders the segments, `encode_rows` encodes each on its own, and only what the template allows is cut.
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

    cut_to:  a longer prompt is cut to this many, where the template allows it.
    at_most: a prompt that cannot be cut so far is cut to this many, and refused if not even that can be done.
    side:    which end of a text is cut, "left" or "right".
    """

    cut_to: int
    at_most: int
    side: str = "right"


class Prompt(NamedTuple):
    """A row's number in its file; the ids of its prompt; the prompt as the model reads it, with control tokens by name
    except the BOS that begins it; the row's own answer, None where it has none; and whether the prompt was cut."""

    row: int
    ids: list[int]
    text: str
    reference: str | None
    was_cut: bool


@dataclass(frozen=True)
class Prompts:
    """The prompts of files, in order, and what is left out: how many rows, what is wrong with the first few of them,
    and the names of fields that no prompt or answer uses."""

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
    """A template whose segments end before the answer where a row has none."""

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        segments, index = super().render(row, where)
        return (segments if self.is_answered(row, where) else before_answer(segments)), index


class AskedChat(Chat):
    """A chat layout in which only the last turn is an answer, and only if it is the assistant's. Where it is not, the
    segments end before the answer that the model is to give."""

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
    """The prompt of each row of the files, only of one `category` if one is given. Rows may lack their answer; if they
    have it, it changes nothing about their prompt but the choice among a template's alternatives.

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
    """The ids of a prompt's segments, with BOS where the tokenizer has one, and whether any was cut.

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
    """The answer of a rendered row, without the spaces around it. None where it has none."""
    texts = [segment.text for segment in segments if segment.answer and not segment.control]
    return "".join(texts).strip() if texts else None


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids as the model reads them, with control tokens by name, except the BOS that begins it."""
    names = {tokenizer.control_id(name): name for name in tokenizer.control_names}
    text = ""
    starts_text = True
    if list(ids[:1]) == [tokenizer.bos_id]:
        ids = ids[1:]
    for is_control, group in groupby(ids, key=names.__contains__):
        part = list(group)
        if is_control:
            text += "".join(names[id] for id in part)
            starts_text = part[-1] == tokenizer.bos_id
        else:
            text += tokenizer.decode(part, starts_text)
            starts_text = False
    return text


def row_of(template: Renderer, text: str) -> dict:
    """A row that asks this text: the turn of a user, or the only field that the template's prompt needs.

    Fields that may be absent do not count, unless there are no others. Raises UserError where several do, or none.
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
    """The prompt that a text becomes: rendered by a template, or else, for the model to continue it, the text itself.

    Raises UserError for a text that cannot be tokenized or does not fit.
    """
    where = "--prompt"
    if template is None:
        check_text(text, "the text", where)
        segments = [Segment(text)]
    else:
        segments = before_answer(asking(template).render(row_of(template, text), where)[0])
    ids, was_cut = prompt_ids(segments, tokenizer, room, f"{where}: ")
    return Prompt(1, ids, spelled(ids, tokenizer), None, was_cut)


def answers_of(template: Renderer | None, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of the answers that a template has a choice of; [] where answers are free text."""
    return tokenizer.encode_batch(list(template.answers), starts_text=False) if template else []


def room_of(positions: int, max_length: int | None, answer: int, side: str) -> Room:
    """The room for prompts behind which an answer of so many tokens has its place among the model's positions.

    max_length: where prompts can be cut, prompt and answer have so many tokens. It counts only where the answer leaves
    some of them to the prompt: the answers that training has seen with it were shorter. Raises UserError where the
    answer takes all positions.
    """
    if answer >= positions:
        raise UserError(f"--max_new_tokens {answer}: the model has {positions} positions, expected fewer tokens")
    most = positions - answer
    wanted = most if max_length is None or max_length <= answer else max_length - answer
    return Room(wanted, most, side)
