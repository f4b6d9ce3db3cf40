"""What one step depends on that no weight shows: the mode, the random numbers of dropout, the dtype of sums."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sharded import build, this_process
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fsdp_train
from llama.data.batches import deal
from llama.model import ModelConfig
from llama.storage.pretrained import initialize_weights
from llama.training.settings import TrainingSettings

SMALL = ModelConfig(vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=4, initializer_range=0.2)  # fmt: skip


class Data:
    """As many examples of 6 tokens as asked for; the last 2 of each are labels."""

    def __init__(self, count: int):
        self.lengths, self.label_counts = np.full(count, 6), np.full(count, 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int):
        return (np.arange(6) + i).astype(np.int32) % SMALL.vocab_size, np.arange(6) >= 4


class Probe(nn.Module):
    """In place of a model: its loss is always 0.1, and it notes a random number and the modes of each call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))
        self.drawn, self.modes = [], []

    def forward(self, tokens, documents, rows, targets):
        self.drawn.append(int(torch.randint(2**62, ())))
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.weight * 1


def current(model: nn.Module, data: Data, micro_batches: int = 1, **chosen) -> SimpleNamespace:
    """What `train_step` asks of a Run: one example for each of `micro_batches` of each rank."""
    process = this_process()
    parts = process.world_size * micro_batches
    schedule = SimpleNamespace(micro_batches=lambda step: deal(list(range(parts)), data.lengths, parts, 1))
    task = SimpleNamespace(examples=data, data=SimpleNamespace(test=data), words=None)
    settings = TrainingSettings(batch_size=1, **chosen)
    return SimpleNamespace(settings=settings, process=process, model=model, task=task,
                           plan=SimpleNamespace(schedule=schedule))


# The random numbers of dropout


def drawn_in(steps: list[int], micro_batches: int, seed: int) -> list[list[int]]:
    """The random number that each micro-batch of each step meets."""
    probe = Probe()
    run = current(probe, Data(4 * micro_batches), micro_batches, seed=seed)
    for step in steps:
        fsdp_train.train_step(run, step)
    return np.array(probe.drawn).reshape(len(steps), micro_batches).tolist()


def test_dropout_is_another_in_each_step_rank_micro_batch_and_seed(ranks):
    """C48: the same masks in all steps or on all ranks would drop the same parts of an adapter's input again."""
    seeds = [ranks(2, drawn_in, [0, 1, 2], 2, seed) for seed in (0, 1)]
    assert len(np.unique(seeds)) == np.size(seeds) == 2 * 2 * 3 * 2


def test_a_step_meets_the_same_random_numbers_whatever_was_before_it(ranks):
    """C48, R25: so a checkpoint need not hold the state of the generators."""
    for whole, resumed in zip(ranks(2, drawn_in, [0, 1, 2], 2, 5), ranks(2, drawn_in, [2], 2, 5), strict=True):
        assert whole[2:] == resumed


# The mode


def modes_around_an_evaluation() -> tuple[list, bool]:
    probe = Probe()
    run = current(probe, Data(3))
    fsdp_train.train_step(run, 0)
    metrics = fsdp_train.evaluate_held_out(run)
    fsdp_train.train_step(run, 1)
    return probe.modes, metrics["n"] == 3


def test_an_evaluation_is_in_eval_mode_without_gradients_and_training_goes_on_in_training_mode(ranks):
    """C39: else dropout would be on in an evaluation, or off from the first evaluation on."""
    training, evaluating = (True, True), (False, False)
    assert ranks(1, modes_around_an_evaluation) == [([training, *3 * [evaluating], training], True)]


# The dtype of sums


def loss_of_many_micro_batches(count: int) -> float:
    loss, _, _ = fsdp_train.train_step(current(Probe(), Data(count), count), 0)
    return loss


def test_the_losses_of_many_micro_batches_are_summed_exactly(ranks):
    """C1: 1,000 times 0.1, added one by one in fp32, is 1e-6 off."""
    (loss,) = ranks(1, loss_of_many_micro_batches, 1000)
    assert loss == pytest.approx(float(torch.tensor(0.1)) / 2, rel=1e-9)


class Sent(TorchDispatchMode):
    """Notes the dtype of what is sent between ranks, by the operation's name."""

    def __init__(self):
        super().__init__()
        self.dtypes: dict[str, set] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name, tensor = func.overloadpacket.__name__, args[0]
            while isinstance(tensor, list | tuple):
                tensor = tensor[0]
            self.dtypes.setdefault(name, set()).add(tensor.dtype)
        return func(*args, **(kwargs or {}))


def dtypes_sent(micro_batches: int, **chosen) -> dict[str, set]:
    model = build(SMALL, this_process(), torch.bfloat16)
    initialize_weights(model, seed=0)
    run = current(model, Data(2 * micro_batches), micro_batches, **chosen)
    with Sent() as sent:
        fsdp_train.train_step(run, 0)
    return sent.dtypes


@pytest.mark.parametrize("deferred", [False, True])
def test_weights_travel_in_bf16_and_gradients_are_summed_over_ranks_in_fp32(ranks, deferred):
    """C8: a sum of many bf16 numbers would lose the small ones. The sums of losses and squares are fp64."""
    for sent in ranks(2, dtypes_sent, 2, defer_gradient_sync=deferred):
        assert sent["_reduce_scatter_base_"] == {torch.float32}
        assert sent["_allgather_base_"] == {torch.bfloat16}
        assert sent["allreduce_"] == {torch.float64}
