"""The loss of a model on labelled examples, and how often it prefers the right answer word."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama.boundary.errors import UserError
from llama.boundary.progress import Progress
from llama.data.batches import Batch, deal
from llama.data.chat import Renderer
from llama.data.examples import EncodedData
from llama.data.tokenizer import Tokenizer
from llama.evaluation.losses import few_enough, label_losses, losses_of_examples, sums_of_examples
from llama.evaluation.shared_prefix import Packer
from llama.model import Llama
from llama.parallel.processes import Process


class Scored(NamedTuple):
    """What one example got.

    loss:          the sum of the losses of its labels, in nats.
    labels:        how many labels these are; 0 if it lacks its answer word.
    probabilities: of each answer word; their sum is 1.
    is_right:      whether the right word is the likeliest.
    """

    loss: float
    labels: int
    probabilities: Sequence[float] = ()
    is_right: bool = False


def answer_ids(template: Renderer, tokenizer: Tokenizer) -> list[int]:
    """The first token of each answer word. Raises UserError when two words begin with the same token."""
    ids = []
    for word in template.answers:
        tokens = tokenizer.encode(word, starts_text=False)
        if not tokens:
            raise UserError(f"{tokenizer.path}: has no token for {word!r}")
        ids.append(tokens[0])
    if len(set(ids)) < len(ids):
        raise UserError(
            f"{tokenizer.path}: the answers {template.answers} begin with the same token, so one forward cannot tell "
            "them apart"
        )
    return ids


def sample_indices(examples: int, limit: int) -> np.ndarray:
    """A fixed random choice of `limit` examples (0: all). Not the first ones: many files are sorted by label."""
    if not 0 < limit < examples:
        return np.arange(examples)
    order = np.random.default_rng(0).permutation(examples)
    return np.sort(order[:limit])


def own_batches(indices: Sequence[int], lengths: np.ndarray, process: Process, batch_size: int) -> list[list[int]]:
    """This rank's batches of examples, with nearly equal work. Some may be empty, so that all ranks have as many.

    Every rank runs the same number of forwards, because FSDP gathers weights inside each, which is collective.
    """
    rounds = -(-len(indices) // (batch_size * process.data_ranks))
    batches = deal(indices, lengths, rounds * process.data_ranks, batch_size)
    return batches[process.data_rank :: process.data_ranks]


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def evaluate(
    model: Llama,
    data: EncodedData,
    process: Process,
    batch_size: int,
    limit: int = 0,
    words: list[int] | None = None,
    each: bool = False,
) -> tuple[dict, dict[int, Scored]]:
    """Metrics over all ranks, and what each of this rank's examples got, {example: Scored}. Without `words`, the latter
    is empty unless `each` asks for it.

        loss       sum of the negative log-likelihoods of all labelled tokens / their number, in nats
        accuracy   how often the right one of the answer `words` (token ids) is the likeliest of them
        n          examples scored, each exactly once

    Neither batch size nor number of ranks changes them. An example that lacks its answer word is predicted, and counts
    in no metric; if all lack it, n = 0 is the only metric. The model is left in eval mode. Collective.
    """
    model.eval()
    indices = sample_indices(len(data), limit)
    if each and words is None:
        most_labels = int(data.label_counts[indices].max())
        batch_size = few_enough(batch_size, most_labels, model.config.vocab_size)
    packer = Packer(model, data, indices.tolist(), process)
    mine = own_batches(indices.tolist(), packer.data.lengths, process, batch_size)
    found: dict[int, Scored] = {}
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)  # loss, labels, right answers, examples
    progress = Progress("evaluating", "batches", len(mine), silent=not process.is_rank_zero)
    for part in progress.over(mine):
        batch = packer.pack(part)
        if words is not None:
            found |= zip(part, _predict(model, batch, words, data.answers), strict=True)
        elif each:
            losses = losses_of_examples(model, batch).tolist()
            found |= zip(part, map(Scored, losses, batch.labels_per_example), strict=True)
        else:
            sums[0] += model(batch.tokens, batch.documents, batch.rows, batch.targets)
            sums[1] += len(batch.targets)
            sums[3] += len(part)
    sums += _sums_of(found.values(), words is not None).to(process.device)
    process.sum_over_data_ranks(sums)
    return _metrics(words is not None, *sums.tolist()), found


def _sums_of(found: Iterable[Scored], has_words: bool) -> Tensor:
    """(4): the loss, labels and right answers of the examples together, and their number. Those whose right word is not
    known do not count."""
    scored = [example for example in found if example.labels or not has_words]
    loss = sum(example.loss for example in scored)
    labels = sum(example.labels for example in scored)
    right = sum(example.is_right for example in scored)
    return torch.tensor([loss, labels, right, len(scored)], dtype=torch.float64)


def _metrics(has_words: bool, loss: float, labels: float, right: float, examples: float) -> dict:
    if not examples:
        return {"n": 0}
    if not np.isfinite(loss):
        raise UserError(f"the loss over {int(examples)} held-out examples is {loss}: the model's weights are unusable")
    accuracy = {"accuracy": right / examples} if has_words else {}
    return {"loss": loss / labels, **accuracy, "n": int(examples)}


def _predict(model: Llama, batch: Batch, words: list[int], answers: np.ndarray) -> list[Scored]:
    """What each example of the batch got. `answers`: the index of each example's right word, -1 if it is unknown."""
    logits = model.logits(batch.tokens, batch.documents, batch.rows).float()
    losses_of_labels = label_losses(logits, batch.targets)
    losses = sums_of_examples(losses_of_labels, batch).tolist()
    labels = torch.tensor(batch.labels_per_example, dtype=torch.int64, device=logits.device)
    first_labels = labels.cumsum(0) - labels
    logits_of_words = logits[first_labels][:, words]
    of_words = logits_of_words.double().softmax(-1)
    likeliest = of_words.argmax(-1).tolist()
    scored = []
    for place, probabilities in enumerate(of_words.tolist()):
        answer = answers[batch.indices[place]]
        if answer < 0:
            scored.append(Scored(0.0, 0, probabilities))
        else:
            is_right = bool(likeliest[place] == answer)
            scored.append(Scored(losses[place], batch.labels_per_example[place], probabilities, is_right))
    return scored
