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
    logits_each = vocab_size * max(1, most_labels)
    examples = MOST_LOGITS // logits_each
    return max(1, min(batch_size, examples))


def losses_of_examples(model: Llama, batch: Batch) -> Tensor:
    """The sum of the losses of each example's labels (n), fp64, in nats. Collective under FSDP."""
    examples = len(batch.indices)
    if examples <= 1:  # the model's own loss never holds all logits at once; a long example has many
        loss = model(batch.tokens, batch.documents, batch.rows, batch.targets)
        return loss.double().reshape(1)[:examples]
    logits = model.logits(batch.tokens, batch.documents, batch.rows)
    losses = label_losses(logits.float(), batch.targets)
    return sums_of_examples(losses, batch)


def label_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row: (R, V), (R) -> (R)."""
    # Not log_softmax: on a CPU it adds the numbers of a vocabulary one by one, which is 1e-5 nats off.
    of_targets = logits.gather(1, targets[:, None])
    return logits.logsumexp(-1) - of_targets[:, 0]


def sums_of_examples(losses: Tensor, batch: Batch) -> Tensor:
    """The losses of labels (R), summed for each example of the batch (n), fp64."""
    labels = torch.tensor(batch.labels_per_example, dtype=torch.int64)
    examples = torch.arange(len(labels)).repeat_interleave(labels)
    sums = losses.new_zeros(len(labels), dtype=torch.float64)
    return sums.index_add_(0, examples.to(losses.device), losses.double())


def in_memory(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> EncodedData:
    """Examples (ids, which of them are labels) that are in no file, as `pack` takes them."""
    all_ids = [np.zeros(0, np.int32)]
    all_labels = [np.zeros(0, np.bool_)]
    for ids, is_label in examples:
        all_ids.append(ids)
        all_labels.append(is_label)
    lengths = np.array([len(ids) for ids, _ in examples], np.int64)
    stops = lengths.cumsum()
    label_counts = [is_label.sum() for _, is_label in examples]
    nothing = np.zeros(len(examples), np.int64)
    return EncodedData(
        tokens=np.concatenate(all_ids),
        is_answer=np.concatenate(all_labels),
        starts=stops - lengths,
        stops=stops,
        label_counts=np.array(label_counts, np.int64),
        answers=nothing - 1,
        rows=nothing,
        was_cut=nothing > 0,
        crc=0,
        bad_row_count=0,
        first_bad_rows=[],
        unused=[],
    )
