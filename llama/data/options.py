"""Rows of multiple-choice questions: the options from which a model chooses."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llama.boundary.errors import UserError
from llama.data.chat import Renderer
from llama.data.rows import read
from llama.data.templates import Field, Segment, Template

CHOICES = "choices"


class Question(NamedTuple):
    """The segments of the prompt, the segment of each option, each option's own text, and the right option's index."""

    prompt: list[Segment]
    options: list[Segment]
    texts: list[str]
    right: int


class OptionsTemplate(Template):
    """A template that renders a question with its options.

    If the template has answer words, these are the options. Else its answer is one field, and a row has one more field
    than the template: a list `choices` of two or more different texts. The answer's field names the right one, by its
    text or by its index from 0:

        {"question": "What is frozen water?", "choices": ["ice", "steam"], "answer": 0}

    As a template, it renders the prompt and the longest option: a row can be used if these fit.
    """

    def __init__(self, template: Renderer):
        if not isinstance(template, Template):
            found = f"found the conversations of {template.name}"
            raise UserError(f"--metric multiple_choice: expected a text template, {found}")
        super().__init__(template.name, template.source)
        self.source += "\n(the row lists its options)"  # what is encoded depends on it
        fields = {piece for spans in self.alternatives for piece in spans[-1].pieces if isinstance(piece, Field)}
        self.field = fields.pop()
        if fields or self.field.element is not None:
            found = f"found the template {template.name}"
            raise UserError(f"--metric multiple_choice: expected a template whose answer is one field, {found}")
        if not self.field.words:
            self.columns.add(CHOICES)
            self.expected = self.expected.removesuffix("}") + f", {CHOICES}: list of str" + "}"

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        question = self.question(row, where)
        longest = max(question.options, key=lambda option: len(option.text))
        return [*question.prompt, longest], question.right

    def question(self, row: dict, where: str) -> Question:
        """Raises UserError, beginning with `where`, for a row whose fields do not fit."""
        if self.field.words:
            texts = list(self.field.words)
            _, right = super().render(row, where)
        else:
            texts, right = self._choices(row, where)
        prompt: list[Segment] = []
        options = []
        for text in texts:
            segments, _ = super().render(row | {self.field.name: text}, where)
            prompt = [segment for segment in segments if not segment.answer]
            # As in lm-eval, without the end token that training puts behind an answer. An option is never cut.
            (option,) = [segment for segment in segments if segment.answer and not segment.control]
            options.append(Segment(option.text, answer=True))
        return Question(prompt, options, texts, right)

    def _choices(self, row: dict, where: str) -> tuple[list[str], int]:
        texts = row.get(CHOICES)
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: {CHOICES} is {texts!r:.60}, expected a list of two or more texts")
        for i, text in enumerate(texts):
            if not text.strip():
                raise UserError(f"{where}: {CHOICES}.{i} is empty")
            if text in texts[:i]:
                raise UserError(f"{where}: {CHOICES}.{texts.index(text)} and {CHOICES}.{i} are the same text")
        answer = row.get(self.field.name)
        if type(answer) is int and 0 <= answer < len(texts):
            return texts, answer
        if isinstance(answer, str) and answer in texts:
            return texts, texts.index(answer)
        expected = f"one of its {CHOICES}, or an index from 0 to {len(texts) - 1}"
        raise UserError(f"{where}: {self.field.name} is {answer!r:.60}, expected {expected}")


def rows_of(paths: Sequence[Path], numbers: Collection[int]) -> Iterator[tuple[int, str, dict]]:
    """(number, place for messages, row) of the rows with these numbers, which count through all files."""
    last = 0
    for path in paths:
        before = last
        for number, row in read(path):
            last = before + number
            if last in numbers and isinstance(row, dict):
                yield last, f"{path}:{number}", row
