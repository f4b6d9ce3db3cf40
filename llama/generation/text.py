"""Ids become text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # stands for bytes that are no character, or not yet
LONGEST_CHARACTER = 4  # bytes in UTF-8, so as many tokens at most


class TextStream:
    """The text of an answer, piece by piece, and where a stop string ends it. It is a Request's `on_token`.

    decode_ids: the text of some ids that follow others, without control tokens. It must be the same in parts: the texts
                of two halves, joined, are the text of the whole, unless a character lies across the border.
    stops:      texts that end the answer. Of several, the one that is complete first counts, and of two that are
                complete at the same character the longer one.
    show:       called with each piece of the text as soon as its last character is whole, and it begins no stop string.

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
        """Show what was held back, because nothing follows, and return the whole text. The bytes of a character that
        never became whole are shown as the tokenizer decodes them, as U+FFFD."""
        self._add(self._decode(self._ids))
        self._ids = []
        self._release(len(self._held))
        return "".join(self._pieces)

    def _whole_characters(self) -> str:
        """The text of the ids that can no longer be a part of a later character. They are forgotten."""
        text = self._decode(self._ids)
        if not text.endswith(UNFINISHED):
            self._ids = []
            return text
        if len(self._ids) < LONGEST_CHARACTER:
            return ""
        # The last character may still become whole, but then it has begun in one of the last three tokens. A border in
        # the middle of a character would make more of U+FFFD.
        borders = [len(self._ids) - count for count in (3, 2, 1)]
        border = min(borders, key=self._unfinished_beside)
        done = self._decode(self._ids[:border])
        self._ids = self._ids[border:]
        return done

    def _unfinished_beside(self, border: int) -> int:
        """How many U+FFFD the ids before and behind this border decode to."""
        return (self._decode(self._ids[:border]) + self._decode(self._ids[border:])).count(UNFINISHED)

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
            for count in range(min(len(stop) - 1, len(self._held)), longest, -1):
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
