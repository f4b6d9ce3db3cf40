"""Metrics of one forward per example: accuracy of the answer word, loss of the answers, perplexity of whole texts."""

from collections.abc import Iterator

from llama.data.chat import Renderer
from llama.data.examples import EncodedData
from llama.data.tokenizer import Tokenizer
from llama.evaluation.intervals import Interval, bootstrap, exponential, wilson
from llama.evaluation.outcome import Outcome
from llama.evaluation.score import Scored, answer_ids, evaluate, sample_indices
from llama.model import Llama
from llama.parallel.collectives import gather_dict
from llama.parallel.processes import Process


class Answers:
    """accuracy     right answers / examples: the right word is likelier than each of the others
    loss         nats of all labels / labels
    perplexity   exp(loss), where every token but each example's first is a label

    `metric`: accuracy, loss or perplexity. Only with accuracy may an example lack its answer word; then its word is
    predicted, and it counts in no metric.
    """

    generates = False

    def __init__(
        self,
        metric: str,
        data: EncodedData,
        template: Renderer,
        tokenizer: Tokenizer,
        batch_size: int,
        limit: int,
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
        found = gather_dict(own)
        in_order = {i: found[i] for i in sorted(found)}
        notes = []
        if self.metric == "accuracy":
            unlabelled = len(found) - values["n"]
            values["without_label"] = unlabelled
            if unlabelled:
                scored = f"loss and accuracy are of the other {values['n']}" if values["n"] else "nothing is scored"
                notes = [f"rows without a label: {unlabelled}; they are predicted, and {scored}"]
        if self.metric == "perplexity":
            values["perplexity"] = exponential(values["loss"])
        return Outcome(values, self.intervals(list(in_order.values())), self.lines(in_order), notes)

    def intervals(self, scored: list[Scored]) -> dict[str, Interval | None]:
        """The interval of the metric first, then that of the loss."""
        if self.metric == "accuracy":
            scored = [example for example in scored if example.labels]
        if not scored:
            return {}
        losses = [example.loss for example in scored]
        labels = [example.labels for example in scored]
        of_loss = bootstrap(losses, labels)
        if self.metric == "accuracy":
            right = sum(example.is_right for example in scored)
            return {"accuracy": wilson(right, len(scored)), "loss": of_loss}
        if self.metric == "perplexity":
            return {"perplexity": of_loss.exp() if of_loss else None, "loss": of_loss}
        return {"loss": of_loss}

    def lines(self, scored: dict[int, Scored]) -> Iterator[dict]:
        """For each example: its row in the file, and its scores."""
        for i, example in scored.items():
            row = {"row": int(self.data.rows[i])}
            if self.metric == "accuracy":
                yield row | self.prediction(i, example)
            else:  # the loss is sum(loss) / sum(tokens), in nats
                yield row | {"loss": example.loss, "tokens": example.labels}

    def prediction(self, i: int, scored: Scored) -> dict:
        """The prompt as the model read it, the likeliest answer word, the probability of each; and where the row has
        the right one, this word, and the summed loss of its tokens."""
        ids, is_answer = self.data[i]
        of_words = dict(zip(self.names, scored.probabilities, strict=True))
        prediction = max(of_words, key=lambda word: of_words[word])
        found = {
            "prompt": self.tokenizer.decode(ids[~is_answer]),
            "prediction": prediction,
            "probability": of_words[prediction],
            "probabilities": of_words,
        }
        right = self.data.answers[i]
        if right >= 0:
            found |= {"answer": self.names[right], "loss": scored.loss, "tokens": scored.labels}
        return found
