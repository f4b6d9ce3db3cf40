"""Conversations as segments: the loss falls on what the assistant says and on the token that ends its turn.

`conversation` reads the rows, `layouts` has the layouts.
"""

from llama.boundary.errors import UserError
from llama.data.conversation import EXPECTED, LISTS, SYSTEM, TOOLS, read_turns
from llama.data.layouts import CONTROL_TOKENS, LAYOUTS, STRIPPED
from llama.data.templates import Segment, Template
from llama.data.tokenizer import Tokenizer


class Chat:
    """A chat layout. It has the attributes and the `render` of a `templates.Template`."""

    fields = {LISTS[0]}
    spellings = tuple({name} for name in LISTS)  # rows with any of these fields are conversations
    columns = {*LISTS, *SYSTEM, *TOOLS}
    answers = ()
    expected = EXPECTED

    def __init__(self, name: str):
        self.name = name
        self.source = name

    def render(self, row: dict, where: str) -> tuple[list[Segment], int]:
        """The segments of one conversation, and -1, because its answers are free text.

        Raises UserError, beginning with `where`, for a row that is no conversation or that the layout cannot express.
        """
        turns = read_turns(row, where)
        if self.name in STRIPPED:
            turns = [turn._replace(content=turn.content.strip()) for turn in turns]
        if self.name == "llama2":
            roles = [turn.role for turn in turns if turn.role != "system"]
            alternating = ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]
            if roles != alternating:
                raise UserError(f"{where}: roles {', '.join(roles[:8])}; expected user and assistant in turn")
        return list(LAYOUTS[self.name](turns)), -1


Renderer = Template | Chat  # both turn a row into segments with `render`


def layout_of(tokenizer: Tokenizer) -> str:
    """The layout whose control tokens the tokenizer has, or else `llama2`, which needs none."""
    for name, tokens in CONTROL_TOKENS.items():
        if all(tokenizer.has_control(token) for token in tokens):
            return name
    return "llama2"
