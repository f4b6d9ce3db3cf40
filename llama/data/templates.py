"""From a row to segments of text: the prompt, and the answer that the model learns.

A template is a text with fields in braces:

    ### Instruction:
    {instruction}

    ### Input:
    {input...}

    ### Response:
    [[{output}]]
    =====
    ### Instruction:
    {instruction}

    ### Response:
    [[{output}]]

[[ ]] are around the answer. Its tokens are the labels; the end-of-text token follows it and is a label, too.
{field...} may be shortened when an example is too long. Apart from these fields, only the end of an answer is cut.
{field=bad,good} is a choice of words: the row holds the word, or its index from 0. No end token follows it.
{field.0} is the first element of a list. {{ and }} are braces.
===== on a line of its own separates alternatives. A row gets the first alternative for which it has every field, so
the one with the fewest fields comes last.

Fields are put in as they are: braces, brackets and control tokens in a row's own text stay text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama.boundary.errors import UserError
from llama.data.text_rows import LONGEST_LINE

PROMPTS = Path(__file__).parent / "prompts"
LONGEST_TEMPLATE = 1 << 20
MOST_WORDS = 1000
END = ""  # the text of the control segment that stands for the tokenizer's own end token


@dataclass(frozen=True)
class Segment:
    """A piece of text that is encoded on its own: a token never reaches over its borders.

    text:        what to encode; for a `control` segment, the name of one control token.
    answer:      its tokens are labels.
    may_cut:     it may be shortened: a prompt's segment at either end, an answer only at its end.
    starts_text: it starts a new text, BOS included, as the first segment of an example always does.
    """

    text: str
    answer: bool = False
    may_cut: bool = False
    control: bool = False
    starts_text: bool = False


class Field(NamedTuple):
    """A field in braces: {name}, {name.element}, {name...} or {name=words}."""

    name: str
    element: int | None
    may_cut: bool
    words: tuple[str, ...]

    @property
    def type(self) -> str:
        if self.words:
            return "int or word"
        return "str" if self.element is None else "list of str"


@dataclass
class Span:
    """What becomes one segment: literal text and fields side by side."""

    answer: bool
    may_cut: bool
    pieces: list[str | Field]


class Template:
    """A text template.

    name:    for messages; source: its text, which decides everything that it renders.
    fields:  the fields that every row needs; columns: all fields that it may look at.
    answers: the words that an answer is one of, with the text around them; () where an answer is free text.

    Raises UserError, with the line, for a text that is not well formed.
    """

    notes = ()  # only a chat.Chat has these two
    system = None

    def __init__(self, name: str, source: str):
        self.name = name
        self.source = source
        self.alternatives: list[list[Span]] = []
        line = 1
        for text in re.split(r"^=====[ \t]*\n", source, flags=re.MULTILINE):
            # The newline before a separator, or at the end of a file, belongs to the file and not to the prompt.
            self.alternatives.append(_parse(name, line, text.removesuffix("\n")))
            line += text.count("\n") + 1
        answers = {_answers(spans) for spans in self.alternatives}
        if len(answers) > 1:
            raise UserError(f"--template {name}: its alternatives have different answers, expected the same words")
        self.answers = answers.pop()
        types = {field.name: field.type for spans in self.alternatives for field in _fields(spans)}
        self.fields = {field.name for field in _fields(self.alternatives[-1])}
        self.columns = set(types)
        for optional in self.columns - self.fields:
            types[optional] += " or nothing"
        self.expected = "{" + ", ".join(f"{field}: {kind}" for field, kind in types.items()) + "}"

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        """The segments of one row, and the index of its answer in `answers`, or -1 for free text.

        Raises UserError, beginning with `where`, for a row whose fields do not fit.
        """
        for spans in self.alternatives:
            found = [(field, self._value(row, field, where)) for field in _fields(spans)]
            missing = [field for field, value in found if value is None]
            if not missing:
                return self._fill(spans, {field: value for field, value in found if value is not None})
        raise self._misfit(row, where, missing[0])

    def _fill(self, spans: list[Span], values: dict[Field, str | int]) -> tuple[list[Segment], int]:
        answer = -1
        segments = []
        for span in spans:
            text = ""
            for piece in span.pieces:
                if isinstance(piece, str):
                    text += piece
                    continue
                value = values[piece]
                if isinstance(value, int):
                    answer = value
                    text += piece.words[value]
                else:
                    text += value
            segments.append(Segment(text, span.answer, span.may_cut))
        if not self.answers:
            segments.append(Segment(END, answer=True, control=True))
        return segments, answer

    def _value(self, row: dict, field: Field, where: str) -> str | int | None:
        """A field's text, or the index of its word. None where the row has nothing for it."""
        value = row.get(field.name)
        if value is None:
            return None
        if field.words:
            return self._word_index(row, field, where)
        if field.element is not None:
            if not isinstance(value, list):
                raise self._misfit(row, where)
            value = value[field.element] if field.element < len(value) else None
            if value is None:
                return None
        if not isinstance(value, str):
            raise self._misfit(row, where)
        check_text(value, field.name, where)
        return value if value.strip() else None

    def _word_index(self, row: dict, field: Field, where: str) -> int:
        value = row[field.name]
        if value in field.words:
            return field.words.index(value)
        if type(value) not in (int, str):
            raise self._misfit(row, where)
        if isinstance(value, str) and re.fullmatch("[0-9]{1,4}", value):
            value = int(value)  # all cells of a table are text
        if str(value) in field.words:  # 1 may mean the word "1" or the second word
            raise UserError(
                f"{where}: {field.name} is the number {value!r:.40}, which is also a word of the template; "
                "expected the word as text"
            )
        if isinstance(value, str) or not 0 <= value < len(field.words):
            known = " or ".join(f"{number} ({word})" for number, word in enumerate(field.words))
            raise UserError(f"{where}: {field.name} is {value!r:.40}, expected {known}")
        return value

    def _misfit(self, row: dict, where: str, empty: Field | None = None) -> UserError:
        if empty and row.get(empty.name) is not None:
            element = "" if empty.element is None else f".{empty.element}"
            return UserError(f"{where}: {empty.name}{element} is empty")
        return UserError(f"{where}: found fields {described(row)}, expected {self.expected}")


def check_text(text: str, name: str, where: str) -> None:
    """Raise UserError for a text that can only be a mistake: with NUL, half a character, or too long to tokenize."""
    surrogate = re.search("[\ud800-\udfff]", text)  # an escape sequence in JSON can stand for half a character
    if surrogate:
        raise UserError(f"{where}: character {surrogate.start()} of {name} is a lone surrogate, not Unicode")
    if "\0" in text:
        place = text.index("\0")
        raise UserError(f"{where}: character {place} of {name} is NUL, expected text")
    if len(text) > LONGEST_LINE:
        raise UserError(f"{where}: {name} has {len(text)} characters, expected {LONGEST_LINE} at most")


def described(row: dict) -> str:
    """The fields of a row and their types, for an error message."""
    fields = [f"{key!r:.40}: {type(value).__name__}" for key, value in list(row.items())[:8]]
    if len(row) > 8:
        fields.append("...")
    return "{" + ", ".join(fields) + "}"


# A brace that stays in the text; where the answer begins or ends; a field; half of a pair of braces; text.
TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{([^{}]*)\}|[{}]|[^{}\[\]]+|[\[\]]")
BRACES = {"{{": "{", "}}": "}"}


def _parse(name: str, first_line: int, text: str) -> list[Span]:
    """The spans of one alternative of a template, whose text begins in this line of the file."""
    if len(text) > LONGEST_TEMPLATE:
        raise UserError(f"--template {name}: {len(text)} characters, expected {LONGEST_TEMPLATE} at most")
    spans = [Span(answer=False, may_cut=False, pieces=[])]
    line = first_line
    ended = False
    for match in TOKEN.finditer(text):
        token, inside_braces = match[0], match[1]
        span = spans[-1]
        where = f"--template {name}:{line}"
        line += token.count("\n")
        if ended:
            raise UserError(f"{where}: found {token[:20]!r} after the answer, expected the answer to end the template")
        if token == "[[" and not span.answer:
            spans.append(Span(answer=True, may_cut=True, pieces=[]))
        elif token == "]]" and span.answer:
            ended = True
        elif token in ("{", "}", "[[", "]]"):
            raise UserError(f"{where}: {token} without its other half ({{{{ and }}}} stand for braces)")
        elif inside_braces is None:
            span.pieces.append(BRACES.get(token, token))
        else:
            _add_field(spans, _parse_field(inside_braces, where), token, where)
    _check_answer(spans[-1], ended, f"--template {name}:{line}")
    return [span for span in spans if span.pieces]


def _add_field(spans: list[Span], field: Field, token: str, where: str) -> None:
    span = spans[-1]
    if span.answer and field.may_cut:
        raise UserError(f"{where}: {token} inside the answer")
    if field.words and not span.answer:
        raise UserError(f"{where}: {token} outside the answer")
    if field.may_cut:  # a span of its own, because the text around it is never cut
        spans.append(Span(answer=False, may_cut=True, pieces=[field]))
        spans.append(Span(answer=False, may_cut=False, pieces=[]))
        return
    span.pieces.append(field)
    if field.words:
        span.may_cut = False  # a part of a word would not be one of the answers


def _parse_field(text: str, where: str) -> Field:
    name = r"([^\s=.](?:[^\n=.]*[^\s=.])?)"
    match = re.fullmatch(rf"{name}(?:\.(\d{{1,4}}))?(\.\.\.)?|{name}=(.+)", text)
    words = tuple(match[5].split(",")) if match and match[5] else ()
    repeated = len(set(words)) < len(words)
    if not match or len(words) == 1 or len(words) > MOST_WORDS or "" in words or repeated:
        raise UserError(f"{where}: found {{{text[:40]}}}, expected {{name}}, {{name...}}, {{name.0}} or {{name=a,b}}")
    element = int(match[2]) if match[2] else None
    return Field(match[1] or match[4], element, bool(match[3]), words)


def _check_answer(last: Span, ended: bool, where: str) -> None:
    fields = list(_fields([last]))
    if not ended or not fields:
        raise UserError(f"{where}: no [[answer]] with a {{field}} in it at its end")
    if len(fields) > 1 and any(field.words for field in fields):
        raise UserError(f"{where}: an answer that is one of a few words has no other field")


def _fields(spans: list[Span]) -> Iterator[Field]:
    return (piece for span in spans for piece in span.pieces if isinstance(piece, Field))


def _answers(spans: list[Span]) -> tuple[str, ...]:
    """The texts that the answer is one of, as they follow the prompt; () where the answer is free text."""
    answer = spans[-1].pieces
    words = [word for field in _fields(spans) for word in field.words]  # at most one field has words
    return tuple("".join(word if isinstance(piece, Field) else piece for piece in answer) for word in words)


# The prompts of the recipes, word for word: copy a file of `prompts/` to write your own.
# imdb: the notebook's, but its answer begins with the space that the notebook's prompt ends in. A prompt that ends in a
# space would end in a token that training never saw there. dolly: as in neuronx-distributed's fine-tuning.
# grammar: llama-recipes'. prompt_completion: as TRL joins them. text: all of it is learned, as in pretraining.
NAMES = ("imdb", "alpaca", "dolly", "quotes", "grammar", "gsm8k", "prompt_completion", "input_output", "text")
SOURCES = {name: (PROMPTS / f"{name}.txt").read_text(encoding="utf-8") for name in NAMES}
TEMPLATES = {name: Template(name, source) for name, source in SOURCES.items()}
