"""The loss of each example of a batch, where one sum over the batch would not do."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llama.data.batches import Batch
from llama.data.examples import EncodedData
from llama.model import Llama

MOST_LOGITS = 1 << 27  # that exist at the same time: 512 MB in fp32


def few_enough(batch_size: int, most_labels: int, vocab_size: int) -> int:
    """How many examples of up to `most_labels` labels `losses_of_examples` may get at once: batch_size at most."""
    examples = MOST_LOGITS // (vocab_size * max(1, most_labels))
    return max(1, min(batch_size, examples))


def losses_of_examples(model: Llama, batch: Batch) -> Tensor:
    """The summed losses of each example's labels (n), fp64, in nats. Under FSDP every rank calls it as often."""
    examples = len(batch.indices)
    if examples <= 1:  # the model's own loss never holds all logits, which are many for a long example
        loss = model(batch.tokens, batch.documents, batch.rows, batch.targets)
        return loss.double().reshape(1)[:examples]
    logits = model.logits(batch.tokens, batch.documents, batch.rows)
    return sums_of_examples(label_losses(logits.float(), batch.targets), batch)


def label_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row: (R, V), (R) -> (R)."""
    # Not log_softmax: on a CPU it adds the numbers of a vocabulary one by one, which is 1e-5 nats off.
    return logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]


def sums_of_examples(losses: Tensor, batch: Batch) -> Tensor:
    """Losses of labels (R) added up for each example of the batch (n), fp64."""
    labels = torch.tensor(batch.labels_per_example, dtype=torch.int64)
    examples = torch.arange(len(labels)).repeat_interleave(labels)
    sums = losses.new_zeros(len(labels), dtype=torch.float64)
    return sums.index_add_(0, examples.to(losses.device), losses.double())


def in_memory(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> EncodedData:
    """Examples (ids, which of them are labels) that are in no file, as `pack` takes them."""
    lengths = np.array([len(ids) for ids, _ in examples], np.int64)
    stops = lengths.cumsum()
    nothing = np.zeros(len(examples), np.int64)
    return EncodedData(
        tokens=np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in examples)]),
        is_answer=np.concatenate([np.zeros(0, np.bool_), *(is_label for _, is_label in examples)]),
        starts=stops - lengths,
        stops=stops,
        label_counts=np.array([is_label.sum() for _, is_label in examples], np.int64),
        answers=nothing - 1,
        rows=nothing,
        was_cut=nothing > 0,
        crc=0,
        bad_row_count=0,
        first_bad_rows=[],
        unused=[],
    )
