"""The instruction with which all examples begin is computed once in an evaluation, not once for each example."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from llama.data.batches import Batch, pack
from llama.data.examples import EncodedData
from llama.generation.prefix import BehindPrefix, read_prefix
from llama.model import Llama
from llama.parallel.processes import Process

# Each block of attention copies the prefix's keys, which costs more than so few tokens save.
SHORTEST = 8
# Reading the prefix is one more forward. On a CPU it pays if about 100 tokens are saved.
LEAST_SAVED = 256


def shared_length(data: EncodedData, indices: Sequence[int]) -> int:
    """How many ids at their start the examples of these indices have in common.

    The token before an example's first label is not among them: its logits, which predict the label, are needed.
    """
    if not len(indices):
        return 0
    shared, _ = data[indices[0]]
    for i in indices:
        ids, is_label = data[i]
        labels = np.flatnonzero(is_label)
        most = min(len(shared), labels[0] - 1 if len(labels) else len(ids) - 1)
        differs = np.flatnonzero(ids[:most] != shared[:most])
        shared = shared[: differs[0] if len(differs) else most]
    return len(shared)


class Packer:
    """Packs examples for a model that scores them. The model reads the prefix that all of them share once, when this
    is made. The streams leave it out, and their attention context sees it.

    data: the examples without the shared prefix.
    """

    def __init__(self, model: Llama, data: EncodedData, indices: Sequence[int], process: Process):
        """Collective under FSDP: every rank has the same `indices`, and reads the same prefix or none."""
        self.device = process.device
        self.data = data
        self.cache = None
        shared = shared_length(data, indices)
        saved = shared * (len(indices) // process.data_ranks - 1)  # tokens of each rank
        if shared >= SHORTEST and saved >= LEAST_SAVED:
            ids = torch.from_numpy(data[indices[0]][0][:shared].astype(np.int64))
            self.cache = read_prefix(model, ids.to(self.device))
            self.data = replace(data, starts=data.starts + shared)

    def pack(self, indices: Sequence[int]) -> Batch:
        batch = pack(self.data, indices, self.device)
        if self.cache is None:
            return batch
        return replace(batch, documents=BehindPrefix(batch.documents.lengths, self.cache))
