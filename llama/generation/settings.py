"""How a text is continued: the flags that generate.py, evaluate.py and the trainer share."""

from dataclasses import dataclass

from llama.boundary.records import Settings, setting

LONGEST_ANSWER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Settings):
    """how text is continued"""

    max_new_tokens: int = setting(256, "tokens to write at most", at_least=0, at_most=LONGEST_ANSWER)
    temperature: float = setting(
        0.0, "0: take the likeliest token; else draw one, of scores divided by this", at_least=0, at_most=1000
    )
    top_k: int = setting(0, "draw among this many of the likeliest tokens; 0: among all", at_least=0)
    top_p: float = setting(
        1.0, "draw among the fewest likely tokens that together have this probability", above=0, at_most=1
    )
    min_p: float = setting(
        0.0, "draw among tokens with at least this share of the likeliest one's probability", at_least=0, at_most=1
    )
    repetition_penalty: float = setting(
        1.0,
        "above 1: tokens that are in the prompt or the answer already become less likely; a positive score is divided "
        "by this, a negative one multiplied",
        at_least=0.01,
        at_most=100,
    )
    no_repeat_ngram_size: int = setting(
        0, "no n-gram of this many tokens occurs twice in prompt and answer; 0: any may", at_least=0
    )
    num_beams: int = setting(
        1, "texts that beam search continues side by side; the best is the answer; 1: none", at_least=1, at_most=1000
    )
    length_penalty: float = setting(
        1.0,
        "a beam's score, which is negative, is divided by (its length ** this): above 0 favours long texts",
        at_least=-5,
        at_most=5,
    )
    early_stopping: str = setting(
        "false",
        "when beam search ends: true, as soon as num_beams texts are complete; false, when the best unfinished text "
        "would not be better if it ended now; never, when it cannot become better",
        choices=("true", "false", "never"),
    )
    seed: int = setting(0, "of the draws: what is drawn for a prompt depends on the prompt and this alone", at_least=0)

    @property
    def draws(self) -> bool:
        """Whether each token is drawn at random; else the likeliest one is taken."""
        return self.temperature > 0

    def checks(self):
        filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        of_beams = {"length_penalty": 1.0, "early_stopping": "false"}
        return [
            *super().checks(),
            # Scores that are divided by a smaller number may become infinite in float32.
            ("temperature", "0, or 0.000001 or more", self.temperature == 0 or self.temperature >= 1e-6),
            *((name, "--temperature above 0 with it", self.draws or getattr(self, name) == off)
              for name, off in filters.items()),
            *((name, "--num_beams above 1 with it", self.num_beams > 1 or getattr(self, name) == off)
              for name, off in of_beams.items()),
        ]  # fmt: skip
