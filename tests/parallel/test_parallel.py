"""One training step, however it is cut into ranks and micro-batches, against a plain model in float64."""

from collections import Counter
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sharded import build, this_process, whole
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_train import train_step
from llama.boundary.errors import UserError
from llama.data.batches import deal, pack
from llama.model import Llama, ModelConfig, PackedDocuments
from llama.model.norm import RMSNorm
from llama.model.packed import _BlockedAttention
from llama.parallel.shards import all_finite
from llama.storage.pretrained import initialize_weights
from llama.training.optim import build_adamw
from llama.training.settings import TrainingSettings


def slow(*values, **how):
    """Parameters that repeat a rule which other parameters hold in the fast tests, or that compile."""
    return pytest.param(*values, marks=pytest.mark.slow, **how)


# No size divides by 2 or 4 ranks everywhere: 97 rows and 3 heads do not; large weights make all terms count.
UNTIED = ModelConfig(vocab_size=97, hidden_size=30, intermediate_size=42, num_hidden_layers=2, num_attention_heads=3,
                     num_key_value_heads=1, head_dim=10, attention_bias=True, initializer_range=0.2)
TIED = replace(UNTIED, tie_word_embeddings=True)
EXAMPLES = [(9, 1), (40, 25), (5, 0), (12, 3), (64, 50), (7, 2), (3, 0), (20, 9)]  # tokens, labels: very unequal
BATCH = list(range(8))
STEPS = [BATCH, [6, 1, 3], [4, 0, 2, 5, 7]]  # optimizer steps of a run, the last ones smaller
LIMIT = 0.5  # of the gradient's norm: below that of every step here, so all of them are clipped
RATE, DECAY = 2e-4, 0.1  # AdamW divides by the gradient: the rate says how much of its rounding shows


class Data:
    """What `train_step` asks of EncodedData."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.lengths, self.label_counts = np.array(EXAMPLES).T
        self.examples = []
        for length, labels in EXAMPLES:
            is_answer = np.zeros(length, bool)
            is_answer[length - labels :] = True
            self.examples.append((rng.integers(0, UNTIED.vocab_size, length).astype(np.int32), is_answer))

    def __getitem__(self, i: int):
        return self.examples[i]


def step_on(settings: TrainingSettings, model, indices: list[int]) -> tuple[float, float, dict]:
    """`train_step` on these examples, dealt to micro-batches as the schedule does."""
    process, examples = this_process(settings.sharding or "full", settings.tensor_parallel), Data()
    parts = settings.gradient_accumulation_steps * process.data_ranks
    micro_batches = deal(indices, examples.lengths, parts, settings.batch_size)
    schedule = SimpleNamespace(micro_batches=lambda step: micro_batches)
    run = SimpleNamespace(settings=settings, process=process, model=model, task=SimpleNamespace(examples=examples),
                          plan=SimpleNamespace(schedule=schedule))
    return train_step(run, 0)


def built(config: ModelConfig = TIED, dtype: torch.dtype = torch.float32, tensor_parallel=1, **options) -> Llama:
    process = this_process(options.get("sharding", "full"), tensor_parallel)
    model = build(config, process, dtype, **options)
    initialize_weights(model, seed=0)
    return model


def trained(config: ModelConfig, settings: dict, steps: list, dtype: torch.dtype = torch.float32, **options):
    """On each rank: (loss, norm, gradients) of every optimizer step, and the weights in the end."""
    model = built(config, dtype, **options)
    optimizer = build_adamw(model, RATE, DECAY)
    results = []
    for indices in steps:
        loss, norm, _ = step_on(TrainingSettings(**settings), model, indices)
        results.append((loss, norm, {name: whole(p.grad) for name, p in model.named_parameters()}))
        optimizer.step()
        optimizer.zero_grad()
    return results, {name: whole(p) for name, p in model.named_parameters()}


@cache
def expected(config: ModelConfig, limit: float):
    """The same from a plain float64 model: the examples of a step one by one, all logits, torch's own tools."""
    model, data = Llama(config), Data()
    initialize_weights(model, seed=0)
    model.double()
    optimizer = torch.optim.AdamW([
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ], lr=RATE)
    results = []
    for indices in STEPS:
        labels, total = sum(EXAMPLES[i][1] for i in indices), torch.zeros((), dtype=torch.float64)
        for i in indices:
            tokens, is_answer = (torch.from_numpy(x) for x in data[i])
            documents = PackedDocuments([len(tokens)])
            logits = model.logits(tokens.long(), documents)
            total += F.cross_entropy(logits[:-1][is_answer[1:]], tokens[1:][is_answer[1:]].long(), reduction="sum")
        (total / labels).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or torch.inf)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((float(total.detach()) / labels, float(norm), gradients))
        optimizer.step()
        optimizer.zero_grad()
    return results, {name: p.detach() for name, p in model.named_parameters()}


def assert_equal_to_expected(result, config: ModelConfig, limit: float, tolerance: float = 1e-6) -> None:
    (steps, weights), (expected_steps, expected_weights) = result, expected(config, limit)
    for (loss, norm, gradients), (their_loss, their_norm, their_gradients) in zip(steps, expected_steps, strict=False):
        assert loss == pytest.approx(their_loss, rel=tolerance)
        assert norm == pytest.approx(their_norm, rel=tolerance) and their_norm > 2 * LIMIT
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            assert (gradient - their_gradients[name]).abs().max() <= tolerance, name
    if len(steps) == len(expected_steps):
        for name, weight in weights.items():
            assert (weight - expected_weights[name]).abs().max() <= tolerance, name


def assert_bitwise_equal(a, b) -> None:
    (steps, weights), (other_steps, other_weights) = a, b
    for (loss, norm, gradients), (other_loss, other_norm, other_gradients) in zip(steps, other_steps, strict=True):
        assert (loss, norm) == (other_loss, other_norm)
        assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


# --- one loss, one gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches, batch_size", [(1, 8), (8, 1), slow(2, 4)])
def test_gradients_do_not_depend_on_how_a_batch_is_cut_into_micro_batches(ranks, micro_batches, batch_size):
    """C1: tokens weigh the same in 8x1, 4x2 and 1x8 with very unequal label counts; unclipped."""
    settings = {"batch_size": batch_size, "gradient_accumulation_steps": micro_batches, "max_grad_norm": 0.0}
    (result,) = ranks(1, trained, UNTIED, settings, [BATCH])
    assert_equal_to_expected(result, UNTIED, 0.0)


CONFIGS = {"untied": UNTIED, "tied": TIED}
FAST = [(2, 1, "tied"), (4, 2, "untied")]
CASES = [(world, micro_batches, kind) for world, micro_batches in [(1, 1), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]
         for kind in CONFIGS]  # fmt: skip


@pytest.mark.parametrize("world, micro_batches, kind", [case if case in FAST else slow(*case) for case in CASES])
def test_a_run_does_not_depend_on_the_number_of_ranks(ranks, world, micro_batches, kind):
    """C2, C5, C31: loss, norm, clipped gradients of three steps and the weights after them; every rank says the same.

    The second step has 3 examples: with 4 ranks or more parts some are empty (C3), and still join every collective.
    """
    settings = {"batch_size": 8 // (world * micro_batches), "gradient_accumulation_steps": micro_batches,
                "max_grad_norm": LIMIT}
    config = CONFIGS[kind]
    results = ranks(world, trained, config, settings, STEPS)
    assert_equal_to_expected(results[0], config, LIMIT)
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


def loss_of(parts: list[list[int]]) -> tuple[float, dict]:
    """Each rank its own examples, summed; the gradients come back averaged over the ranks."""
    model, batch = built(), pack(Data(), parts[dist.get_rank()])
    loss = model(batch.tokens, batch.documents, batch.rows, batch.targets)
    loss.backward()
    return float(loss.detach()), {name: whole(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("nothing", [[], slow([2]), [2, 6]], ids=["no example", "no label", "two without label"])
def test_a_rank_without_labels_contributes_exactly_nothing(ranks, nothing):
    """C3: its loss is 0 and its gradients are 0, not NaN."""
    (_, alone), = ranks(1, loss_of, [[1, 4]])
    (loss, gradients), (other_loss, _) = ranks(2, loss_of, [[1, 4], nothing])
    assert other_loss == 0.0 and loss > 0
    for name, gradient in gradients.items():
        assert (2 * gradient - alone[name]).abs().max() <= 1e-6 * alone[name].abs().max()


def step_without_labels() -> str:
    try:
        step_on(TrainingSettings(batch_size=1), built(), [6, 2])
    except UserError as error:
        return str(error)


def test_a_global_step_without_labels_is_refused_naming_its_rows(ranks):
    """C3: on every rank alike, before any collective."""
    for message in ranks(2, step_without_labels):
        assert "[2, 6]" in message and "label" in message and "\n" not in message


def poisoned_step() -> tuple:
    model = built()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        if dist.get_rank() == 1:
            weights["layers.1.mlp.up_proj.weight"].to_local()[0, 0] = torch.nan
    before = {name: p.to_local().clone() for name, p in weights.items()}
    loss, norm, _ = step_on(TrainingSettings(batch_size=4), model, BATCH)
    unchanged = all(torch.equal(p.to_local(), before[name]) or name == "layers.1.mlp.up_proj.weight"
                    for name, p in weights.items())
    return loss, norm, unchanged


def test_one_nan_on_one_rank_shows_in_the_loss_and_norm_of_all_before_weights_change(ranks):
    """C4: every rank sees it and stops; that the loop then does is tested with the loop."""
    for loss, norm, unchanged in ranks(2, poisoned_step):
        assert loss != loss and norm != norm and unchanged


# --- ways to compute the same ------------------------------------------------------------------------------

SETTINGS = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": LIMIT}


def plainly_trained(config: ModelConfig, settings: dict, steps: list):
    """`trained` with a model that FSDP never touched."""
    model = Llama(config)
    initialize_weights(model, seed=0)
    optimizer = build_adamw(model, RATE, DECAY)
    results = []
    for indices in steps:
        loss, norm, _ = step_on(TrainingSettings(**settings), model, indices)
        results.append((loss, norm, {name: p.grad.clone() for name, p in model.named_parameters()}))
        optimizer.step()
        optimizer.zero_grad()
    return results, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_fsdp_on_one_rank_is_bitwise_the_plain_model(ranks, config):
    """One code path for any number of ranks: alone, it changes no bit."""
    settings = SETTINGS | {"batch_size": 4}
    (sharded,) = ranks(1, trained, config, settings, STEPS)
    (plain,) = ranks(1, plainly_trained, config, settings, STEPS)
    assert_bitwise_equal(sharded, plain)


@pytest.mark.parametrize("options, dtype", [
    ({"activation_checkpointing": "selective"}, torch.float32), slow({"cpu_offload": True}, torch.bfloat16),
    slow({"activation_checkpointing": "full"}, torch.float32), slow({"cpu_offload": True}, torch.float32),
    slow({"activation_checkpointing": "full"}, torch.bfloat16), slow({"sharding": "grad"}, torch.float32),
    slow({"activation_checkpointing": "selective"}, torch.bfloat16), slow({"sharding": "grad"}, torch.bfloat16),
], ids=str)  # fmt: skip
def test_what_saves_or_spends_memory_changes_no_bit(ranks, options, dtype):
    """C36: activation checkpointing, offload, and keeping gathered weights until the backward, on two ranks."""
    plain = ranks(2, trained, TIED, SETTINGS, STEPS, dtype)
    assert_bitwise_equal(ranks(2, trained, TIED, SETTINGS, STEPS, dtype, **options)[0], plain[0])


def norms_computed(**options) -> int:
    """Calls of RMSNorm.forward in one forward and backward."""
    model, batch, calls = built(**options), pack(Data(), [0, 1]), []
    forward = RMSNorm.forward
    RMSNorm.forward = lambda self, x: calls.append(1) or forward(self, x)
    try:
        model(batch.tokens, batch.documents, batch.rows, batch.targets).backward()
    finally:
        RMSNorm.forward = forward
    return len(calls)


def test_activation_checkpointing_computes_each_layer_twice(ranks):
    """Or it would save nothing: two norms a layer, and the last norm once."""
    assert ranks(1, norms_computed) == [5]
    assert ranks(1, norms_computed, activation_checkpointing="full") == [9]


class Collectives(TorchDispatchMode):
    """Counts what is sent between ranks, by the operation's name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def collectives(settings: dict, **options) -> tuple[Counter, tuple]:
    """How often one step called what, and its loss, norm and gradients."""
    model = built(**options)
    with Collectives() as mode:
        loss, norm, _ = step_on(TrainingSettings(**settings), model, BATCH)
    return mode.counts, (loss, norm, {name: whole(p.grad) for name, p in model.named_parameters()})


def test_deferring_the_gradient_sync_reduces_once_a_step_to_the_same_gradients(ranks):
    """C11: without it each of the two micro-batches reduces both layers and the rest; with it only the last does."""
    counts, result = ranks(2, collectives, SETTINGS)[0]
    deferred_counts, deferred = ranks(2, collectives, SETTINGS | {"defer_gradient_sync": True})[0]
    assert counts["_reduce_scatter_base_"] == 2 * 3
    assert deferred_counts["_reduce_scatter_base_"] == 3
    assert deferred_counts - Counter(_reduce_scatter_base_=3) == counts - Counter(_reduce_scatter_base_=6)
    for step in (result, deferred):
        assert_equal_to_expected(([step], {}), TIED, LIMIT)


def test_without_resharding_weights_are_gathered_only_once_a_micro_batch(ranks):
    """Settings "full" (ZeRO-3) gathers a unit for the forward and again for the backward, "grad" (ZeRO-2) once."""
    counts, _ = ranks(2, collectives, SETTINGS)[0]
    kept, _ = ranks(2, collectives, SETTINGS, sharding="grad")[0]
    assert kept["_allgather_base_"] == 2 * 3 and counts["_allgather_base_"] == 2 * 2 * 3
    assert kept["_reduce_scatter_base_"] == counts["_reduce_scatter_base_"]


def gathers_by_layer(**options) -> list[int]:
    """How many units had been asked for when each attention began: of the forward, then of the backward."""
    model, batch, seen = built(replace(TIED, num_hidden_layers=4), **options), pack(Data(), [0, 1]), []
    forward, backward = _BlockedAttention.forward, _BlockedAttention.backward
    with Collectives() as mode, pytest.MonkeyPatch.context() as patched:

        def noting(compute):
            return staticmethod(lambda *args: seen.append(mode.counts["_allgather_base_"]) or compute(*args))

        patched.setattr(_BlockedAttention, "forward", noting(forward))
        patched.setattr(_BlockedAttention, "backward", noting(backward))
        model(batch.tokens, batch.documents, batch.rows, batch.targets).backward()
    return seen


def test_while_a_layer_computes_the_weights_of_the_next_one_are_gathered(ranks):
    """Forward: the root and layers 0 and 1 when layer 0 computes, all 5 units at the last two. Backward: again the
    root, which computes the loss, and layers 3 and 2 when layer 3 computes."""
    forward, backward = [3, 4, 5, 5], [8, 9, 10, 10]
    assert ranks(2, gathers_by_layer) == 2 * [forward + backward]
    assert ranks(2, gathers_by_layer, sharding="grad") == 2 * [forward + [5, 5, 5, 5]]


# --- what lives in which dtype, under which name -----------------------------------------------------------


def dtypes() -> dict:
    model, seen = built(dtype=torch.bfloat16), set()
    model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    optimizer = build_adamw(model, 1e-5, 0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().copy_(torch.where(p.to_local() < 0, -1.0, 1.0))
    loss, norm, _ = step_on(TrainingSettings(batch_size=4), model, BATCH)
    optimizer.step()
    moved = [p.to_local()[p.grad.to_local() != 0].abs() != 1 for p in model.parameters()]
    return {
        "computed": seen,
        "weights": {p.dtype for p in model.parameters()},
        "gradients": {p.grad.dtype for p in model.parameters()},
        "moments": {s[moment].dtype for s in optimizer.state.values() for moment in ("exp_avg", "exp_avg_sq")},
        "moved": all(m.all() for m in moved) and sum(m.numel() for m in moved) > 1000,
        "finite": np.isfinite([loss, norm]).all(),
    }


def test_bf16_is_computed_in_and_fp32_is_kept_so_that_small_updates_survive(ranks):
    """C7, C8: every weight of size 1 that has a gradient moves at a rate of 1e-5."""
    for found in ranks(2, dtypes):
        assert found["computed"] == {torch.bfloat16}
        assert found["weights"] == found["gradients"] == found["moments"] == {torch.float32}
        assert found["moved"] and found["finite"]


@pytest.mark.parametrize("world", [1, slow(4)])
def test_bf16_training_stays_near_float64(ranks, world):
    """RELIABILITY 4.1: loss and norm to 1 %, gradients to 5 % of their norm, for any number of ranks."""
    settings = {"batch_size": 8 // world, "max_grad_norm": 0.0}
    (loss, norm, gradients), = ranks(world, trained, TIED, settings, [BATCH], torch.bfloat16)[0][0]
    their_loss, their_norm, their_gradients = expected(TIED, 0.0)[0][0]
    assert loss == pytest.approx(their_loss, rel=0.01) and norm == pytest.approx(their_norm, rel=0.01)
    difference = sum((g - their_gradients[name]).pow(2).sum() for name, g in gradients.items()).sqrt()
    assert difference <= 0.05 * their_norm


def identity(config: ModelConfig) -> list:
    """Whether head and embedding are one parameter: as built, after a step, after a state_dict."""
    model = built(config)
    tied = [model.lm_head.weight is model.embed_tokens.weight]
    step_on(TrainingSettings(batch_size=4), model, BATCH)
    build_adamw(model, RATE, DECAY).step()
    tied += [model.lm_head.weight is model.embed_tokens.weight]
    state = model.state_dict()
    tied += [torch.equal(whole(state["lm_head.weight"]), whole(state["embed_tokens.weight"]))]
    return [tied, [name for name, _ in model.named_parameters() if name.startswith("lm_head")]]


def test_tied_stays_tied_when_sharded_and_untied_stays_apart(ranks):
    """C31: FSDP must not untie what the config ties; that gradients add both uses is in the runs above."""
    assert ranks(2, identity, TIED) == 2 * [[[True, True, True], []]]
    assert ranks(2, identity, UNTIED) == 2 * [[[False, False, False], ["lm_head.weight"]]]


def names(**options) -> tuple[list, list]:
    model = build(TIED, this_process(), torch.bfloat16, **options)
    return [name for name, _ in model.named_parameters()], list(model.state_dict())


@pytest.mark.parametrize("options", [
    {"activation_checkpointing": "selective"}, slow({}), slow({"sharding": "grad"}), slow({"compile": True}),
    slow({"activation_checkpointing": "full"}),
    slow({"compile": True, "activation_checkpointing": "full"}),
], ids=str)
def test_names_are_those_of_the_plain_model_whatever_is_applied_to_it(ranks, options):
    """C33: no `_orig_mod.`, no wrapper in what is saved."""
    plain = Llama(TIED)
    expected = [name for name, _ in plain.named_parameters()], list(plain.state_dict())
    assert ranks(2, names, **options) == [expected, expected]


def bytes_held() -> tuple[int, int]:
    model = built(UNTIED)
    return sum(p.to_local().numel() for p in model.parameters()), sum(p.numel() for p in model.parameters())


def test_each_rank_holds_its_share_of_the_weights(ranks):
    """Sharded means sharded: all shares together are the model, and no rank has much more than a quarter."""
    shares, (whole, *_) = zip(*ranks(4, bytes_held), strict=True)
    assert sum(shares) == whole and max(shares) < 0.3 * whole


# --- compiled ----------------------------------------------------------------------------------------------


def compiled_losses(lengths: list[int]) -> list[tuple]:
    """(loss, compiled loss, graphs so far) for one stream of each length, through 12 layers."""
    torch._inductor.config.compile_threads = 1  # no pool of compilers that would outlive the test
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = replace(TIED, num_hidden_layers=12)
    models = built(config), built(config, compile=True)
    results = []
    for length in lengths:
        tokens = torch.randint(97, (length,), generator=torch.Generator().manual_seed(length))
        documents = PackedDocuments([length // 3, length - length // 3])
        losses = [m(tokens, documents, torch.arange(length), tokens) for m in models]
        for loss in losses:
            loss.backward()
        results.append((*map(float, losses), torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    return results


def test_weights_are_finite_in_the_dtype_that_they_will_be_written_in():
    """A float16 ends at 65,504."""
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.constant_(model.weight, 1e5)
    assert all_finite(model) and all_finite(model, torch.bfloat16) and not all_finite(model, torch.float16)


@pytest.mark.slow
def test_one_compilation_serves_every_layer_and_every_stream_length(ranks):
    """C27: four graphs (attention itself is not compiled and splits the layer), made for the first stream."""
    (results,) = ranks(1, compiled_losses, [64, 128, 192, 100, 320, 448], timeout=600)
    for loss, compiled, graphs in results:
        assert compiled == pytest.approx(loss, rel=1e-5)
        assert graphs <= 4
