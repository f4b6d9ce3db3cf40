"""What activation checkpointing keeps and computes again: the operations are counted as they run."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from sharded import this_process, whole
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama.model import Llama, ModelConfig, PackedDocuments
from llama.model.quantize import quantize
from llama.parallel import recompute
from llama.parallel.distribute import distribute, keep_frozen_in, on_meta
from llama.storage.pretrained import initialize_weights
from lora import Adapter, apply_adapter

CONFIG = ModelConfig(vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=32, initializer_range=0.2)
LENGTHS = [7, 150, 20, 23]
TOKENS = sum(LENGTHS)  # 200: no weight has so many rows
LINEARS = 7  # of a layer
slow = pytest.mark.slow


class Operations(TorchDispatchMode):
    """Counts what is computed, by the operation's name. What was kept is not computed again, and not seen here."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def loss_of(model: Llama) -> Tensor:
    tokens = torch.randint(0, CONFIG.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return model(tokens, PackedDocuments(LENGTHS), torch.arange(TOKENS), tokens)


def checkpointed(kind: str, config: ModelConfig = CONFIG, adapter: Adapter | None = None, packed: str | None = None):
    """A model with weights; those of packed linears are random bytes."""
    model = Llama(config)
    initialize_weights(model, seed=0)
    if packed:
        quantize(model, packed)
    if adapter:
        apply_adapter(model, adapter)
    keep_frozen_in(torch.float32, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.view(torch.float32).fill_(1e-3)
            elif not parameter.is_floating_point():
                parameter.random_(0, 100, generator=generator)
            elif "lora" in name:
                parameter.uniform_(-0.1, 0.1, generator=generator)
    for layer in model.layers:
        recompute.recompute_activations(layer, kind)
    return model


def counted(kind: str, config: ModelConfig = CONFIG) -> Counter:
    with Operations() as operations:
        loss_of(checkpointed(kind, config)).backward()
    return operations.counts


@pytest.mark.parametrize("biases", [pytest.param(False, marks=slow), True])
def test_selective_computes_norms_again_but_no_product_and_no_attention(biases):
    """C36: full computes each linear of both layers twice but the last one, whose output the backward does not need."""
    config = replace(CONFIG, attention_bias=biases, mlp_bias=biases)
    product = "addmm" if biases else "mm"
    none, full, selective = (counted(kind, config) for kind in ("none", "full", "selective"))
    assert full[product] - none[product] == 2 * LINEARS - 2
    assert selective[product] == none[product]
    assert selective["attend_blocks"] == CONFIG.num_hidden_layers
    assert selective["silu"] == full["silu"] == 2 * none["silu"]
    assert selective["rsqrt"] == full["rsqrt"] > none["rsqrt"]


ADAPTERS = {"lora": Adapter(4, 8.0, dropout=0.2), "dora": Adapter(4, 8.0, variant="dora")}


@pytest.mark.parametrize("adapter, packed", [
    ("dora", "nf4"),
    *(pytest.param(*case, marks=slow) for case in [(None, None), ("dora", "int8"), ("lora", "nf4"), ("lora", None)]),
])  # fmt: skip
def test_selective_keeps_rows_of_tokens_and_never_a_weight_made_whole(monkeypatch, adapter, packed):
    """C36, C40: of each linear one product, and attention, also under adapters and over a packed base; gradients are
    bitwise those without checkpointing, dropout included."""
    kept = []
    policy = recompute.what_to_keep

    def watched(context, operation, *args, **kwargs):
        decision = policy(context, operation, *args, **kwargs)
        if decision == recompute.CheckpointPolicy.MUST_SAVE:
            kept.append((operation, context.op_output))
        return decision

    monkeypatch.setattr(recompute, "what_to_keep", watched)
    gradients = {}
    for kind in ("none", "selective"):
        torch.manual_seed(0)
        model = checkpointed(kind, CONFIG, ADAPTERS.get(adapter), packed)
        loss_of(model).backward()
        gradients[kind] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["none"].keys() == gradients["selective"].keys() and gradients["none"]
    assert all(torch.equal(gradient, gradients["selective"][name]) for name, gradient in gradients["none"].items())
    assert {len(output) for _, output in kept} == {TOKENS}
    names = Counter(operation.overloadpacket.__name__ for operation, _ in kept)
    with_adapter = LINEARS if adapter else 0  # also the narrow product with lora_A
    assert names == {"mm": 2 * (LINEARS + with_adapter), "attend_blocks": 2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_selective_keeps_the_attention_that_runs_there(dtype):
    """C36: the kernel has another name for each device and dtype."""
    gradients, counts = {}, {}
    for kind in ("none", "full", "selective"):
        model = checkpointed(kind).to("cuda", dtype)
        tokens = torch.arange(TOKENS, device="cuda") % CONFIG.vocab_size
        with Operations() as operations:
            model(tokens, PackedDocuments(LENGTHS, "cuda"), torch.arange(TOKENS, device="cuda"), tokens).backward()
        gradients[kind] = [p.grad for p in model.parameters()]
        counts[kind] = operations.counts
    names = {operation.overloadpacket.__name__ for operation in recompute.ATTENTION}
    forwards = {kind: sum(counts[kind][name] for name in names) for kind in counts}
    if dtype == torch.bfloat16:  # in fp32 shared key/value heads have no kernel of their own: products, a softmax
        assert forwards["full"] == 2 * forwards["none"] > 0 and forwards["selective"] == forwards["none"], counts
    for kind in ("full", "selective"):
        for expected, gradient in zip(gradients["none"], gradients[kind], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)


def gradients_in_a_tensor_group(kind: str, compile: bool = False) -> dict[str, Tensor]:
    torch._inductor.config.compile_threads = 1  # no pool of compilers that would outlive the test
    model = on_meta(CONFIG)
    distribute(model, this_process("full", tensor_parallel=2), torch.float32, "full", kind, compile)
    initialize_weights(model, seed=0)
    loss_of(model).backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks_, kind", [(2, "selective"), pytest.param(2, "full", marks=slow),
                                          pytest.param(4, "selective", marks=slow)])  # fmt: skip
def test_ranks_of_a_tensor_group_that_compute_again_send_again_and_get_the_same_gradients(ranks, ranks_, kind):
    """C36: the collectives inside a layer run a second time, in the same order on all ranks; nobody waits forever."""
    expected = ranks(ranks_, gradients_in_a_tensor_group, "none")
    found = ranks(ranks_, gradients_in_a_tensor_group, kind)
    for theirs, mine in zip(expected, found, strict=True):
        assert all(torch.equal(mine[name], gradient) for name, gradient in theirs.items())


@slow
def test_compiled_layers_of_a_tensor_group_that_compute_again_get_the_same_gradients(ranks):
    """C27, C36: compiled, checkpointed, sharded over two ranks and split over two."""
    expected = ranks(4, gradients_in_a_tensor_group, "none")[0]
    found = ranks(4, gradients_in_a_tensor_group, "selective", compile=True, timeout=900)[0]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
