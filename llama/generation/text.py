"""Ids become text while they come: only whole characters, and no part of a stop string."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # stands for bytes that are no character, or not yet
LONGEST_CHARACTER = 4  # bytes in UTF-8, so as many tokens at most


class TextStream:
    """The text of an answer, piece by piece, and where a stop string ends it. It is a Request's `on_token`.

    decode_ids: ids that follow others -> their text, without control tokens. Ids that are decoded in two parts must
                give the same text, unless a character lies across the border.
    stops:      texts that end the answer. The one that is complete first counts; if two are complete at the same
                character, the longer one.
    show:       called with each piece of the text as soon as its characters are whole and cannot begin a stop string.

    The joined pieces are the text of all ids, up to the stop string. The work for a token does not depend on how many
    came before it.
    """

    def __init__(
        self,
        decode_ids: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        show: Callable[[str], object] | None = None,
    ):
        if "" in stops:
            raise ValueError("a stop string is empty, and would end every answer before its first token")
        self.has_stopped = False
        self._decode = decode_ids
        self._stops = stops
        self._show = show
        self._ids: list[int] = []  # of a character that is not whole yet
        self._held = ""  # whole characters that may be the beginning of a stop string
        self._pieces: list[str] = []

    def __call__(self, id: int) -> bool:
        """Take the next id. True if a stop string is complete: then the answer ends."""
        self._ids.append(id)
        self._add(self._whole_characters())
        return self.has_stopped

    def finish(self) -> str:
        """Nothing follows: show what was held back, and return the whole text. The bytes of a character that never
        became whole are shown as the tokenizer decodes them, as U+FFFD."""
        self._add(self._decode(self._ids))
        self._ids = []
        self._release(len(self._held))
        return "".join(self._pieces)

    def _whole_characters(self) -> str:
        """Take those ids that belong to no character that is still unfinished, and return their text."""
        text = self._decode(self._ids)
        if not text.endswith(UNFINISHED):
            self._ids = []
            return text
        if len(self._ids) < LONGEST_CHARACTER:
            return ""
        # The last character may still become whole. Then it began in one of the last three tokens. The right border is
        # the one with the fewest U+FFFD, because a border in the middle of a character adds some.
        borders = [len(self._ids) - count for count in (3, 2, 1)]
        border = min(borders, key=self._unfinished_beside)
        done = self._decode(self._ids[:border])
        self._ids = self._ids[border:]
        return done

    def _unfinished_beside(self, border: int) -> int:
        """How many U+FFFD there are in the text of the ids before this border and in that of the ids behind it."""
        before = self._decode(self._ids[:border])
        behind = self._decode(self._ids[border:])
        return before.count(UNFINISHED) + behind.count(UNFINISHED)

    def _add(self, text: str) -> None:
        if self.has_stopped or not text:
            return
        self._held += text
        ends = []
        for stop in self._stops:
            start = self._held.find(stop)
            if start >= 0:
                ends.append((start + len(stop), start))
        if ends:
            _, start = min(ends)
            self._release(start)
            self._held = ""
            self.has_stopped = True
        else:
            self._release(len(self._held) - self._possible_beginning())

    def _possible_beginning(self) -> int:
        """How many characters at the end of what is held may be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            most = min(len(stop) - 1, len(self._held))
            for count in range(most, longest, -1):
                if self._held.endswith(stop[:count]):
                    longest = count
                    break
        return longest

    def _release(self, count: int) -> None:
        piece = self._held[:count]
        self._held = self._held[count:]
        if piece:
            self._pieces.append(piece)
            if self._show:
                self._show(piece)
