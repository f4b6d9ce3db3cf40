"""From a row to segments of text: what the model is asked, and what it is to answer.

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

[[ ]] around the answer: its tokens are the labels, and after it comes the end-of-text token, a label too.
{field...} may be shortened when an example is too long; else only the end of the answer is.
{field=bad,good} is one of a few words: the field holds its index from 0, or the word. No end token follows it.
{field.0} is the first element of a list. {{ and }} are braces.
===== on a line of its own separates alternatives, the one that asks for least last: a row gets the first one of which
it fills every field.

Fields are put in as they are: braces, brackets and control tokens in a row's own text are text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llama.data.rows import LONGEST_LINE, DataError

LONGEST_TEMPLATE, MOST_WORDS = 1 << 20, 1000
END = ""  # as the text of a control segment: the tokenizer's own end token


@dataclass(frozen=True)
class Segment:
    """A piece of text that is encoded on its own, so that its borders are token borders whatever it says.

    Loss falls on an `answer`. `may_cut`: of a prompt any part, of an answer its end. A `control` segment is the one
    token of that name. The first, and one that `begins`, is encoded as the beginning of a document, BOS included.
    """

    text: str
    answer: bool = False
    may_cut: bool = False
    control: bool = False
    begins: bool = False


class Field(NamedTuple):
    name: str
    element: int | None
    may_cut: bool
    words: tuple[str, ...]

    @property
    def type(self) -> str:
        return "int or word" if self.words else "str" if self.element is None else "list of str"


@dataclass
class Span:
    """What becomes one segment: literal text and fields, side by side."""

    answer: bool
    may_cut: bool
    pieces: list[str | Field]


class Template:
    """A text template. Raises DataError, with the line, where it is not well formed."""

    def __init__(self, name: str, source: str):
        self.name, self.source = name, source
        self.alternatives = []
        line = 1
        for text in re.split(r"^=====[ \t]*\n", source, flags=re.MULTILINE):
            # The newline before a separator, or at the end of a file, is the file's and not the prompt's.
            self.alternatives.append(_parse(name, line, text.removesuffix("\n")))
            line += text.count("\n") + 1
        words = {_answers(spans) for spans in self.alternatives}
        if len(words) > 1:
            raise DataError(f"--template {name}: its alternatives have different answers, expected the same words")
        (self.answers,) = words
        self.fields = {field.name for field in _fields(self.alternatives[-1])}
        self.columns = {field.name for spans in self.alternatives for field in _fields(spans)}
        wanted = {field.name: field.type for spans in self.alternatives for field in _fields(spans)}
        optional = {name: "" if name in self.fields else " or nothing" for name in wanted}
        self.expected = "{" + ", ".join(f"{name}: {kind}{optional[name]}" for name, kind in wanted.items()) + "}"

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        """The segments of one row, and the index of its answer among `answers` (-1: free text).

        Raises DataError, beginning with `where`, when the row's fields do not fit.
        """
        for spans in self.alternatives:
            values = {field: self._value(row, field, where) for field in _fields(spans)}
            if None not in values.values():
                break
        else:
            raise next(self._misfit(row, where, field) for field, value in values.items() if value is None)
        segments, answer = [], -1
        for span in spans:
            text = ""
            for piece in span.pieces:
                value = values.get(piece, piece)
                if isinstance(value, int):
                    answer, value = value, piece.words[value]
                text += value
            segments.append(Segment(text, span.answer, span.may_cut))
        return [*segments, *([] if self.answers else [Segment(END, answer=True, control=True)])], answer

    def _value(self, row: dict, field: Field, where: str) -> str | int | None:
        """A field's text, or the index of its word; None where the row has nothing there."""
        value = row.get(field.name)
        if field.words:
            if value in field.words:  # the word itself
                return field.words.index(value)
            if value is None:
                return None
            if type(value) not in (int, str):
                raise self._misfit(row, where)
            if str(value) in field.words:  # 1 may mean the word "1" or the second word
                raise DataError(f"{where}: {field.name} is the number {value!r:.40}, which is also a word of the "
                                "template; expected the word as text")
            if isinstance(value, str) or not 0 <= value < len(field.words):
                known = " or ".join(f"{number} ({word})" for number, word in enumerate(field.words))
                raise DataError(f"{where}: {field.name} is {value!r:.40}, expected {known}")
            return value
        if field.element is not None and value is not None:
            if not isinstance(value, list):
                raise self._misfit(row, where)
            value = value[field.element] if field.element < len(value) else None
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._misfit(row, where)
        check_text(value, field.name, where)
        return value if value.strip() else None

    def _misfit(self, row: dict, where: str, empty: Field | None = None) -> DataError:
        if empty and row.get(empty.name) is not None:
            at = "" if empty.element is None else f".{empty.element}"
            return DataError(f"{where}: {empty.name}{at} is empty")
        return DataError(f"{where}: found fields {described(row)}, expected {self.expected}")


def check_text(text: str, name: str, where: str) -> None:
    """Refuse what no file of text holds on purpose. Raises DataError."""
    if half := re.search("[\ud800-\udfff]", text):  # an escape in JSON can smuggle half a character in
        raise DataError(f"{where}: character {half.start()} of {name} is a lone surrogate, not Unicode")
    if (at := text.find("\0")) >= 0:
        raise DataError(f"{where}: character {at} of {name} is NUL, expected text")
    if len(text) > LONGEST_LINE:
        raise DataError(f"{where}: {name} has {len(text)} characters, expected {LONGEST_LINE} at most")


def described(row: dict) -> str:
    """The fields of a row and their types, for an error message."""
    more = ", ..." if len(row) > 8 else ""
    return "{" + ", ".join(f"{key!r:.40}: {type(value).__name__}" for key, value in list(row.items())[:8]) + more + "}"


def _parse(name: str, first_line: int, text: str) -> list[Span]:
    """One alternative of a template as the spans it is made of."""
    spans, line = [Span(False, False, [])], first_line
    ended = False
    if len(text) > LONGEST_TEMPLATE:
        raise DataError(f"--template {name}: {len(text)} characters, expected {LONGEST_TEMPLATE} at most")
    for match in re.finditer(r"\{\{|\}\}|\[\[|\]\]|\{([^{}]*)\}|[{}]|[^{}\[\]]+|[\[\]]", text):
        token, inside = match[0], match[1]
        where, span = f"--template {name}:{line}", spans[-1]
        line += token.count("\n")
        if ended:
            raise DataError(f"{where}: found {token[:20]!r} after the answer, expected the answer to end the template")
        if token == "[[" and not span.answer:
            spans.append(Span(True, True, []))
        elif token == "]]" and span.answer:
            ended = True
        elif token in ("{", "}", "[[", "]]"):
            raise DataError(f"{where}: {token} without its other half ({{{{ and }}}} stand for braces)")
        elif inside is None:
            span.pieces.append({"{{": "{", "}}": "}"}.get(token, token))
        else:
            field = _parse_field(inside, where)
            if span.answer and field.may_cut or not span.answer and field.words:
                raise DataError(f"{where}: {token} {'inside' if span.answer else 'outside'} the answer")
            span.may_cut &= not field.words
            if field.may_cut:  # stands apart, as what is around it stays whole
                spans += [Span(False, True, [field]), Span(False, False, [])]
            else:
                span.pieces.append(field)
    answer = spans[-1]
    where = f"--template {name}:{line}"
    fields = [piece for piece in answer.pieces if isinstance(piece, Field)]
    if not ended or not fields:
        raise DataError(f"{where}: no [[answer]] with a {{field}} in it at its end")
    if len(fields) > 1 and any(field.words for field in fields):
        raise DataError(f"{where}: an answer that is one of a few words has no other field")
    return [span for span in spans if span.pieces]


def _parse_field(text: str, where: str) -> Field:
    name = r"([^\s=.](?:[^\n=.]*[^\s=.])?)"
    match = re.fullmatch(rf"{name}(?:\.(\d{{1,4}}))?(\.\.\.)?|{name}=(.+)", text)
    words = tuple(match[5].split(",")) if match and match[5] else ()
    if not match or len(words) == 1 or len(words) > MOST_WORDS or "" in words or len(set(words)) < len(words):
        raise DataError(f"{where}: found {{{text[:40]}}}, expected {{name}}, {{name...}}, {{name.0}} or {{name=a,b}}")
    return Field(match[1] or match[4], int(match[2]) if match[2] else None, bool(match[3]), words)


def _fields(spans: list[Span]) -> Iterator[Field]:
    return (piece for span in spans for piece in span.pieces if isinstance(piece, Field))


def _answers(spans: list[Span]) -> tuple[str, ...]:
    """The texts that the answer is one of, as they stand after the prompt; () where it is free."""
    choice = next((field for field in _fields(spans) if field.words), None)
    if choice is None:
        return ()
    return tuple("".join(word if piece is choice else piece for piece in spans[-1].pieces) for word in choice.words)


# The prompts of the recipes, word for word. IMDB: the notebook's, though its answer brings its own space along instead
# of the prompt ending in one, which would be a token never seen in training. Dolly: as in neuronx-distributed's
# fine-tuning. Grammar: llama-recipes'.
TEMPLATES = {name: Template(name, source) for name, source in {
    "imdb": """\
Given a movie review/comment by a user in following format:
#### Movie review:
<review>
#### Answer:
<answer>
Please rate the movie review as positive or negative from the perspective of the user's overall personal feelings to \
the movie. Answer it with only 'positive' or 'negative' without any explanation.

#### Movie review:
{text...}

#### Answer:[[ {label=negative,positive}]]
""",
    "alpaca": """\
Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input...}

### Response:
[[{output}]]
=====
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
[[{output}]]
""",
    "dolly": """\
### Instruction
{instruction}

### Context
{context...}

### Answer
[[{response}]]
=====
### Instruction
{instruction}

### Answer
[[{response}]]
""",
    "quotes": """\
A quote by {author}:
[[{quote}]]
=====
A quote:
[[{quote}]]
""",
    "grammar": """\
Correct this to standard English: {sentence}
---
Corrected:[[ {corrections.0}]]
""",
    "gsm8k": """\
Question: {question}
Answer:[[ {answer}]]
""",
}.items()}
