"""The loss of a model on labelled examples, and how often it prefers the right answer word."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llama.boundary.errors import UserError
from llama.boundary.progress import Progress
from llama.data.batches import Batch, deal, pack
from llama.data.chat import Renderer
from llama.data.examples import EncodedData
from llama.data.tokenizer import Tokenizer
from llama.model import Llama
from llama.parallel.processes import Process


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
    """A fixed random choice of `limit` examples (0: all). The first ones would not do: files are often sorted by label.
    """
    if not 0 < limit < examples:
        return np.arange(examples)
    return np.sort(np.random.default_rng(0).permutation(examples)[:limit])


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def evaluate(
    model: Llama, data: EncodedData, process: Process, batch_size: int, limit: int = 0, words: list[int] | None = None
) -> tuple[dict, dict[int, list[float]]]:
    """Metrics over all ranks, and this rank's predictions {example: probability of each answer word}, their sum is 1.

        loss       sum of the negative log-likelihoods of all labelled tokens / their number, in nats
        accuracy   how often the right one of the answer `words` (token ids) is the likeliest of them
        n          examples scored, each exactly once

    Neither batch size nor number of ranks changes them. An example without its answer word is predicted and not scored;
    without any other there are no metrics but n = 0. The model is left in eval mode. Collective.
    """
    model.eval()
    indices = sample_indices(len(data), limit)
    # Every rank runs the same number of forwards: inside each, FSDP gathers weights, which is collective.
    rounds = -(-len(indices) // (batch_size * process.world_size))
    batches = deal(indices.tolist(), data.lengths, rounds * process.world_size, batch_size)
    mine = batches[process.rank :: process.world_size]
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)  # loss, labels, right answers, examples
    predicted: dict[int, list[float]] = {}
    progress = Progress("evaluating", "batches", len(mine), silent=not process.is_rank_zero)
    for part in progress.over(mine):
        batch = pack(data, part, process.device)
        right = 0
        if words is None:
            loss = model(batch.tokens, batch.documents, batch.rows, batch.targets)
            labels, examples = len(batch.targets), len(batch.indices)
        else:
            answers = torch.tensor([int(data.answers[i]) for i in part], dtype=torch.int64, device=process.device)
            loss, labels, of_words = _predict(model, batch, words, answers >= 0)
            predicted |= dict(zip(part, of_words.tolist(), strict=True))
            right = int((of_words.argmax(-1) == answers).sum())
            examples = int((answers >= 0).sum())
        counts = torch.tensor([labels, right, examples], dtype=torch.float64)
        sums += torch.cat([loss.double().reshape(1), counts.to(process.device)])
    dist.all_reduce(sums)
    loss, labels, right, examples = sums.tolist()
    if not examples:
        return {"n": 0}, predicted
    if not np.isfinite(loss):
        raise UserError(f"the loss over {int(examples)} held-out examples is {loss}: the model's weights are unusable")
    accuracy = {} if words is None else {"accuracy": right / examples}
    return {"loss": loss / labels, **accuracy, "n": int(examples)}, predicted


def _predict(model: Llama, batch: Batch, words: list[int], known: Tensor) -> tuple[Tensor, int, Tensor]:
    """The loss of the examples whose answer is `known` (n), the number of their labels, and the probability of each
    answer word in each example (n, words)."""
    logits = model.logits(batch.tokens, batch.documents, batch.rows).float()
    # Not log_softmax: on a CPU it adds the numbers of a vocabulary one by one, which is 1e-5 nats off.
    losses = logits.logsumexp(-1) - logits.gather(1, batch.targets[:, None])[:, 0]
    labels_per_example = torch.tensor(batch.labels_per_example, dtype=torch.int64, device=known.device)
    is_counted = known.repeat_interleave(labels_per_example)
    first_labels = labels_per_example.cumsum(0) - labels_per_example
    of_words = logits[first_labels][:, words].double().softmax(-1)
    return losses[is_counted].sum(), int(is_counted.sum()), of_words
