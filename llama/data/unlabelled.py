"""Rows that have no answer yet, because the model is to give it."""

from llama.data.templates import Field, Segment, Template


class UnlabelledTemplate(Template):
    """A template for rows in which the answer may be absent or null.

    In the segments of such a row something else stands for it, the first word where there are words, and its index is
    -1: no label of it may be counted. The tokens before it are those of a row that has its answer.
    """

    def __init__(self, template: Template):
        super().__init__(template.name, template.source)
        self.source += "\n(the answer may be absent)"  # what is encoded depends on it
        answers = [_fields_of(spans[-1].pieces) for spans in self.alternatives]
        asked = [_fields_of(span.pieces) for spans in self.alternatives for span in spans[:-1]]
        self.asked = {field.name for fields in asked for field in fields}
        self.answer_fields = [field for fields in answers for field in fields if field.name not in self.asked]
        self.placeholders = {field.name: _placeholder(field) for field in self.answer_fields}

    def is_answered(self, row: dict, where: str) -> bool:
        """Whether the row has some field of an answer. Raises UserError, beginning with `where`, for a wrong one."""
        return any(self._value(row, field, where) is not None for field in self.answer_fields)

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        if self.is_answered(row, where):
            return super().render(row, where)
        segments, _ = super().render(row | self.placeholders, where)
        return segments, -1


def _fields_of(pieces: list[str | Field]) -> list[Field]:
    return [piece for piece in pieces if isinstance(piece, Field)]


def _placeholder(field: Field) -> str | list[str]:
    if field.words:
        return field.words[0]
    return "x" if field.element is None else ["x"] * (field.element + 1)
