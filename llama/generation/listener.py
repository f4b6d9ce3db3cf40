"""Who hears the tokens of an answer as they come."""

import time
from collections.abc import Sequence

from llama.generation.text import TextStream


class Listener:
    """Takes the ids of an answer: makes text of them, and knows when it is complete and when its first token came.

    stream:        the text; see TextStream.
    whole_answers: ids that are complete answers. Training teaches no end token behind the words of a template.
    at_once:       all ids come at the end, as those of beams do.
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
        self.first_at = self.first_at or time.perf_counter()
        self.ids.append(id)
        return self.stream(id) or self.ids in self.whole_answers

    def reason(self, reason: str) -> str:
        """Why the answer has ended: as `Answer` has it, or "word" where it is a whole answer."""
        return "word" if self.ids in self.whole_answers else reason

    def speed(self, prompt: int, reason: str) -> str:
        """A sentence on an answer that has just ended, to a prompt of so many tokens."""
        now = time.perf_counter()
        count = len(self.ids)
        first_at = self.first_at or now
        if self.at_once:
            spent = f"in {now - self.began:.2f} s, {count / (now - self.began):.1f} tokens per second"
            return f"prompt: {prompt} tokens; answer: {count} tokens {spent} (ended by: {reason})"
        seconds = now - first_at
        rate = f", {(count - 1) / seconds:.1f} tokens per second" if count > 1 and seconds > 0 else ""
        read = f"prompt: {prompt} tokens in {first_at - self.began:.2f} s"
        return f"{read}; answer: {count} tokens in {seconds:.2f} s{rate} (ended by: {reason})"
