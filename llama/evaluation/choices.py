"""Multiple choice: which option a model finds the likeliest answer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llama.boundary.errors import UserError
from llama.boundary.progress import Progress
from llama.data.encoding import encode_rows
from llama.data.options import OptionsTemplate, Question, rows_of
from llama.data.tokenizer import Tokenizer
from llama.evaluation.intervals import wilson
from llama.evaluation.losses import few_enough, in_memory, losses_of_examples
from llama.evaluation.outcome import Outcome
from llama.evaluation.score import own_batches
from llama.evaluation.shared_prefix import Packer
from llama.model import Llama
from llama.parallel.collectives import gather_dict
from llama.parallel.processes import Process

# What the log-likelihood of an option is divided by, for each metric.
LENGTHS = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}

PREDICTIONS = {"acc": "prediction", "acc_norm": "prediction_norm", "acc_bytes": "prediction_bytes"}  # in a line


@dataclass(frozen=True)
class AskedQuestion:
    """A question of a file: its row's number, and the ids and labels of its prompt with each option."""

    row: int
    question: Question
    examples: list[tuple[np.ndarray, np.ndarray]]
    was_cut: bool

    @property
    def prompt_ids(self) -> list[int]:
        ids, is_label = self.examples[0]
        return ids[~is_label].tolist()


def read_questions(
    paths: Sequence[Path],
    numbers: Collection[int],
    template: OptionsTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    side: str,
) -> list[AskedQuestion]:
    """The questions in the rows with these numbers. The functions of training make their ids, and cut the prompt in the
    same way before each option. Raises UserError for a row if one of its options does not fit."""
    asked = []
    for number, where, row in rows_of(paths, numbers):
        question = template.question(row, where)
        texts = [option.text for option in question.options]
        lengths = [len(ids) for ids in tokenizer.encode_batch(texts, starts_text=False)]
        segments = [[*question.prompt, option] for option in question.options]
        examples = []
        was_cut = False
        encoded_options = encode_rows(segments, tokenizer, max_length, side, answer_room=max(lengths))
        for encoded, length in zip(encoded_options, lengths, strict=True):
            if encoded is None or sum(encoded.is_answer) < length:  # the text's first token is never a label
                problem = f"an option does not fit into --max_length {max_length} tokens with one or more before it"
                raise UserError(f"{where}: {problem}")
            ids = np.array(encoded.ids, np.int32)
            examples.append((ids, np.array(encoded.is_answer)))
            was_cut = encoded.was_cut
        asked.append(AskedQuestion(number, question, examples, was_cut))
    return asked


class Choices:
    """The share of questions whose right option has the highest score, as lm-eval defines it:

        acc         log p(option | prompt), the sum over the option's tokens
        acc_norm    log p(option | prompt) / characters of the option
        acc_bytes   log p(option | prompt) / bytes of the option in UTF-8

    The text that a template puts around an option is scored with it, and does not count in its length. If two options
    have the same score, the first one is predicted. https://blog.eleuther.ai/multiple-choice-normalization/
    """

    generates = False

    def __init__(self, questions: Sequence[AskedQuestion], tokenizer: Tokenizer, batch_size: int):
        self.questions = questions
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.about = {"cut_prompts": sum(question.was_cut for question in questions)}

    def score(self, model: Llama, process: Process) -> Outcome:
        lines = []
        likelihoods = self.log_likelihoods(model, process)
        for asked, of_options in zip(self.questions, likelihoods, strict=True):
            texts = asked.question.texts
            line = {
                "row": asked.row,
                "prompt": self.tokenizer.decode(asked.prompt_ids),
                "choices": texts,
                "log_likelihoods": of_options,
                "answer": texts[asked.question.right],
            }
            for name, length in LENGTHS.items():
                scores = [found / length(text) for found, text in zip(of_options, texts, strict=True)]
                line[PREDICTIONS[name]] = texts[int(np.argmax(scores))]
            lines.append(line)
        n = len(lines)
        values: dict = {}
        intervals = {}
        for name in LENGTHS:
            right = sum(line[PREDICTIONS[name]] == line["answer"] for line in lines)
            values[name] = right / n
            intervals[name] = wilson(right, n)
        return Outcome(values | {"n": n}, intervals, lines)

    @torch.no_grad()
    def log_likelihoods(self, model: Llama, process: Process) -> list[list[float]]:
        """log p(option | prompt) of each option of each question, in nats."""
        model.eval()
        options = in_memory([example for asked in self.questions for example in asked.examples])
        most_labels = int(options.label_counts.max())
        together = few_enough(self.batch_size, most_labels, model.config.vocab_size)
        indices = range(len(options))
        packer = Packer(model, options, indices, process)
        mine = own_batches(indices, packer.data.lengths, process, together)
        own: dict[int, float] = {}
        progress = Progress("evaluating", "batches", len(mine), silent=not process.is_rank_zero)
        for part in progress.over(mine):
            losses = losses_of_examples(model, packer.pack(part))
            own |= zip(part, (-losses).tolist(), strict=True)
        found = gather_dict(own)
        if not np.isfinite(list(found.values())).all():
            raise UserError("the likelihood of an option is not finite: the model's weights are unusable")
        in_order = iter(found[i] for i in indices)
        return [[next(in_order) for _ in asked.examples] for asked in self.questions]
