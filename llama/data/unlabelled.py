"""Rows that have no answer word yet, because the model is to choose it."""

from llama.data.templates import Field, Segment, Template


class UnlabelledTemplate(Template):
    """A template with answer words, for rows in which the word may be absent or null.

    In the segments of such a row the first word stands for it, and its index is -1: no label of it may be counted. The
    tokens before it are those of a row that has its word.
    """

    def __init__(self, template: Template):
        super().__init__(template.name, template.source)
        self.source += "\n(the word may be absent)"  # what is encoded depends on it
        self.placeholders = {}
        for spans in self.alternatives:
            for piece in spans[-1].pieces:
                if isinstance(piece, Field) and piece.words:
                    self.placeholders[piece.name] = piece.words[0]

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        if any(row.get(name) is not None for name in self.placeholders):
            return super().render(row, where)
        segments, _ = super().render(row | self.placeholders, where)
        return segments, -1
