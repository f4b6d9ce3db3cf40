"""Rows that have no answer yet, because the model gives it."""

from llama.boundary.errors import UserError
from llama.data.templates import Field, Segment, Span, Template


class Filled(dict):
    """A row with something in place of its answer. `own`: the row as its file has it, which errors are about."""

    def __init__(self, own: dict, placeholders: dict):
        super().__init__(own | placeholders)
        self.own = own


class UnlabelledTemplate(Template):
    """A template for rows in which the answer may be absent or null.

    In the segments of such a row a placeholder stands for the answer: the first answer word, if there are such words.
    Its index is -1, so its labels are not counted. The tokens before it are those of a row that has its answer.
    """

    def __init__(self, template: Template):
        super().__init__(template.name, template.source)
        self.source += "\n(the answer may be absent)"  # what is encoded depends on it
        self.asked: dict[str, Field] = {}  # the fields of prompts
        self.answer_fields: list[Field] = []
        for spans in self.alternatives:
            *of_prompt, of_answer = spans
            for span in of_prompt:
                for field in _fields_of(span):
                    self.asked[field.name] = field
            self.answer_fields += _fields_of(of_answer)
        self.answer_fields = [field for field in self.answer_fields if field.name not in self.asked]
        self.placeholders: dict[str, str | list[str]] = {}
        for field in self.answer_fields:
            word = field.words[0] if field.words else "x"
            self.placeholders[field.name] = word
            if field.element is not None:
                self.placeholders[field.name] = [word] * (field.element + 1)

    def is_answered(self, row: dict, where: str) -> bool:
        """Whether the row has some field of an answer. Raises UserError, beginning with `where`, for a wrong one."""
        return any(self._value(row, field, where) is not None for field in self.answer_fields)

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        if self.is_answered(row, where):
            return super().render(row, where)
        segments, _ = super().render(Filled(row, self.placeholders), where)
        return segments, -1

    def _misfit(self, row: dict, where: str, empty: Field | None = None) -> UserError:
        return super()._misfit(row.own if isinstance(row, Filled) else row, where, empty)


def _fields_of(span: Span) -> list[Field]:
    return [piece for piece in span.pieces if isinstance(piece, Field)]
