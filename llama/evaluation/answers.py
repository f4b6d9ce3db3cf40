"""Metrics of one forward per example: accuracy of the answer word, loss of the answers, perplexity of whole texts."""

import math

from llama.boundary.command_line import announce
from llama.data.chat import Renderer
from llama.data.examples import EncodedData
from llama.data.tokenizer import Tokenizer
from llama.evaluation.intervals import Interval, bootstrap, wilson
from llama.evaluation.outcome import Outcome
from llama.evaluation.score import Scored, answer_ids, evaluate, sample_indices
from llama.model import Llama
from llama.parallel.collectives import gather
from llama.parallel.processes import Process


class Answers:
    """accuracy     right answers / examples: the right word is likelier than each of the others
    loss         nats of all labels / labels
    perplexity   exp(loss), where every token but each example's first is a label

    `metric`: accuracy, loss or perplexity. Only with accuracy may examples lack their answer word; they are predicted.
    """

    generates = False

    def __init__(
        self, metric: str, data: EncodedData, template: Renderer, tokenizer: Tokenizer, batch_size: int, limit: int
    ):
        self.metric = metric
        self.data = data.labelling_prompts() if metric == "perplexity" else data
        self.words = answer_ids(template, tokenizer) if metric == "accuracy" else None
        self.names = [answer.strip() for answer in template.answers]
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.limit = limit
        chosen = sample_indices(len(data), limit)
        self.about = {"cut_examples": int(data.was_cut[chosen].sum())}

    def score(self, model: Llama, process: Process) -> Outcome:
        values, own = evaluate(model, self.data, process, self.batch_size, self.limit, self.words, each=True)
        found = {i: scored for part in gather(own) for i, scored in part.items()}
        scored = {i: found[i] for i in sorted(found)}
        labelled = [example for example in scored.values() if example.labels or self.words is None]
        intervals: dict[str, Interval | None] = {}
        if values["n"]:
            if self.words:
                intervals["accuracy"] = wilson(sum(example.is_right for example in labelled), len(labelled))
            intervals["loss"] = bootstrap([e.loss for e in labelled], [e.labels for e in labelled])
        if self.metric == "perplexity":
            values["perplexity"] = math.exp(values["loss"])
            intervals = {"perplexity": exponential(intervals["loss"])} | intervals
        if self.words:
            values["without_label"] = len(scored) - values["n"]
        lines = (self.word_line(i, scored[i]) if self.words else self.loss_line(i, scored[i]) for i in scored)
        return Outcome(values, intervals, lines)

    def word_line(self, i: int, scored: Scored) -> dict:
        """The row in the file, the prompt as the model read it, the likeliest answer word, the probability of each, and
        the right one where the row has it."""
        ids, is_answer = self.data[i]
        of_words = dict(zip(self.names, scored.probabilities, strict=True))
        prediction = max(of_words, key=lambda word: of_words[word])
        line = {
            "row": int(self.data.rows[i]),
            "prompt": self.tokenizer.decode(ids[~is_answer]),
            "prediction": prediction,
            "probability": of_words[prediction],
            "probabilities": of_words,
        }
        if self.data.answers[i] >= 0:
            line["answer"] = self.names[self.data.answers[i]]
        return line

    def loss_line(self, i: int, scored: Scored) -> dict:
        """The row in the file, and the loss of its labels, summed, in nats: the metric is sum(loss) / sum(tokens)."""
        return {"row": int(self.data.rows[i]), "loss": scored.loss, "tokens": scored.labels}


def exponential(interval: Interval | None) -> Interval | None:
    """The interval of exp(x), from that of x."""
    return interval and Interval(math.exp(interval.low), math.exp(interval.high), interval.method)


def note_missing_labels(labelled: int, unlabelled: int) -> None:
    if unlabelled:
        scored = f"loss and accuracy are of the other {labelled}" if labelled else "nothing is scored"
        announce([f"rows without a label: {unlabelled}; they are predicted, and {scored}"])
