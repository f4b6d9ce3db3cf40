"""What receives the tokens of an answer as they come."""

import time
from collections.abc import Sequence

from llama.generation.text import TextStream


class Listener:
    """Takes the ids of an answer, makes text of them, and knows when it is complete and how fast it came.

    stream:        makes the text; see TextStream.
    whole_answers: the ids of each answer word, if the template has answer words. An answer ends behind such a word,
                   because training teaches no end token there.
    at_once:       whether all ids come at the end, as those of beams do.
    """

    def __init__(self, stream: TextStream, whole_answers: Sequence[list[int]] = (), at_once: bool = False):
        self.stream = stream
        self.at_once = at_once
        self.whole_answers = whole_answers
        self.ids: list[int] = []
        self.began = time.perf_counter()
        self.first_at: float | None = None

    def __call__(self, id: int) -> bool:
        """Take the next id. True if the answer is complete."""
        if self.first_at is None:
            self.first_at = time.perf_counter()
        self.ids.append(id)
        return self.stream(id) or self.ids in self.whole_answers

    def reason(self, reason: str) -> str:
        """Why the answer has ended: the reason of its `Answer`, or "word" if it is one of the whole answers, uncut."""
        return "word" if self.ids in self.whole_answers and not self.stream.has_stopped else reason

    def speed(self, prompt: int, reason: str) -> str:
        """A sentence on the speed of an answer that has just ended. `prompt`: the tokens of its prompt."""
        now = time.perf_counter()
        count = len(self.ids)
        first_at = self.first_at or now
        if self.at_once:
            seconds = now - self.began
            spent = f"in {seconds:.2f} s, {count / seconds:.1f} tokens per second"
            return f"prompt: {prompt} tokens; answer: {count} tokens {spent} (ended by: {reason})"
        seconds = now - first_at
        rate = f", {(count - 1) / seconds:.1f} tokens per second" if count > 1 and seconds > 0 else ""
        read = f"prompt: {prompt} tokens in {first_at - self.began:.2f} s"
        return f"{read}; answer: {count} tokens in {seconds:.2f} s{rate} (ended by: {reason})"
