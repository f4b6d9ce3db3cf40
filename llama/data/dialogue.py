"""A conversation that goes on: its turns, and the prompt of the next answer."""

from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.chat_template import prompt_segments
from llama.data.conversation import Turn
from llama.data.prompting import Room, prompt_ids
from llama.data.templates import check_text
from llama.data.tokenizer import Tokenizer


class Dialogue:
    """What the user and the assistant have said, in turns: the user's, the assistant's, the user's, ..."""

    def __init__(self, chat: Chat, tokenizer: Tokenizer, room: Room):
        self.chat = chat
        self.tokenizer = tokenizer
        self.room = room
        self.turns: list[Turn] = []

    def ask(self, text: str) -> tuple[list[int], int]:
        """Add a user's turn. Returns the ids of the prompt, and how many of the oldest turns were forgotten because
        the model has no position for them.

        Raises UserError, and forgets the new turn, for a text that cannot be a turn or is too long by itself.
        """
        check_text(text, "your text", "chat")
        if not text.strip():
            raise UserError("chat: your text is empty")
        asked = [*self.turns, Turn("user", text)]
        forgotten = 0
        while True:
            try:
                segments = prompt_segments(self.chat.name, self.chat.prepared(asked))
                ids, _ = prompt_ids(segments, self.tokenizer, self.room)
                break
            except UserError:
                if len(asked) == 1:
                    raise
                del asked[:2]
                forgotten += 2
        self.turns = asked
        return ids, forgotten

    def answer(self, text: str) -> None:
        """Add the assistant's turn. If it is empty, the user's last turn is forgotten, because no layout has an empty
        turn."""
        if text.strip():
            self.turns.append(Turn("assistant", text))
        else:
            self.turns.pop()

    def command(self, name: str) -> str:
        """Do what a command of the user says. Returns a sentence on the result, or "" for an unknown command."""
        if name == "/reset":
            self.turns = []
            return "nothing was said yet"
        if name == "/undo":
            del self.turns[-2:]
            return f"{len(self.turns)} turns are left"
        return ""
