"""The chunked loss against torch's own cross-entropy of all the logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llama.model.loss import summed_cross_entropy

V, D = 131, 24


def inputs(rows: int, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_loss_and_gradients_equal_plain_cross_entropy(rows, chunk, dtype, tolerance):
    """C10: for chunks that divide the rows, that do not, and that are longer; relative to the largest value."""
    hidden, weight, targets = inputs(rows, dtype)
    ours = summed_cross_entropy(hidden, weight, targets, chunk)
    assert ours.dtype == dtype and ours.shape == ()
    exact = plain(hidden, weight, targets)
    results = [ours, *torch.autograd.grad(3 * ours, (hidden, weight))]
    expected = [exact, *torch.autograd.grad(3 * exact, (hidden, weight))]
    for a, b in zip(results, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_a_tied_matrix_gets_the_gradient_of_both_its_uses(chunk):
    """C10, C31: hidden states come from the same matrix that makes the logits."""
    _, weight, targets = inputs(40)
    tokens = targets.roll(1)
    tied = summed_cross_entropy(torch.tanh(F.embedding(tokens, weight)), weight, targets, chunk)
    exact = plain(torch.tanh(F.embedding(tokens, weight)), weight, targets)
    (ours,), (expected,) = torch.autograd.grad(tied, weight), torch.autograd.grad(exact, weight)
    assert (ours - expected).abs().max() <= 1e-12


def test_no_rows_give_zero_and_zero_gradients():
    """C3, C10: 0 and not 0/0, so a micro-batch without labels contributes exactly nothing."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        hidden, weight, targets = inputs(0, dtype)
        loss = summed_cross_entropy(hidden, weight, targets)
        loss.backward()
        assert loss == 0
        assert hidden.grad.shape == (0, D) and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_bf16_inputs_are_only_rounded_in_their_matrix_products(chunk):
    """C10: softmax and sum are fp32, so the loss is off by the logits' rounding (8 bits), never by its own."""
    hidden, weight, targets = inputs(400, torch.bfloat16, scale=0.5)
    loss = summed_cross_entropy(hidden, weight, targets, chunk)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, (hidden, weight))
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = plain(*exact_inputs, targets)
    rounded = F.cross_entropy((hidden @ weight.T).double(), targets, reduction="sum")
    assert abs(loss - rounded) <= 1e-6 * rounded
    assert abs(loss - exact) <= 1e-3 * exact
    for ours, expected in zip(gradients, torch.autograd.grad(exact, exact_inputs), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - expected).norm() <= 0.01 * expected.norm()


def test_huge_logits_do_not_overflow():
    """log-softmax, not log of softmax."""
    hidden, weight, targets = inputs(8, torch.float32, scale=1e4)
    loss = summed_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(loss, plain(hidden, weight, targets))


@pytest.mark.parametrize("scale", [1.0, 0.8, 0.5])
def test_probabilities_of_a_large_vocabulary_add_up_to_one(scale):
    """C10: one likely token among 128,255 unlikely ones. Added one by one in fp32, as torch.log_softmax adds on a CPU,
    their sum and the loss are off by 1e-5."""
    weight = torch.randn(128_256, 1, generator=torch.Generator().manual_seed(0))
    weight[7] = 20.0
    hidden, targets = torch.tensor([[scale]]), torch.tensor([7])
    loss = summed_cross_entropy(hidden, weight.requires_grad_(), targets)
    loss.backward()
    d_logits = weight.grad.double() / scale  # probabilities, and at the target 1 less
    assert abs(d_logits.sum()) <= 1e-6
    exact = -(weight.detach().double() * scale).log_softmax(0)[7]
    assert abs(loss - exact) <= 1e-6 * max(1, exact)


@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_either_input_may_be_frozen(needs):
    """A frozen lm_head gets no gradient, as under LoRA; nor do hidden states when only the head is trained."""
    hidden, weight, targets = inputs(20)
    wanted = {"hidden": hidden, "weight": weight}
    (expected,) = torch.autograd.grad(plain(hidden, weight, targets), wanted[needs])
    for name, tensor in wanted.items():
        tensor.requires_grad_(name == needs)
    summed_cross_entropy(hidden, weight, targets, 7).backward()
    assert (wanted.pop(needs).grad - expected).abs().max() <= 1e-12
    assert wanted.popitem()[1].grad is None


class TensorSizes(TorchDispatchMode):
    """Counts the elements of the largest result of any operation, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


@pytest.mark.parametrize("rows", [200, 2000])
def test_no_tensor_grows_with_rows_times_vocabulary(rows):
    """C10: the largest tensor is a chunk of logits, the weight's gradient or the hidden states', however many rows."""
    hidden, weight, targets = inputs(rows, torch.float32)
    with TensorSizes() as sizes:
        summed_cross_entropy(hidden, weight, targets, 10).backward()
    assert sizes.largest == max(10 * V, V * D, rows * D)
    with TensorSizes() as sizes:
        plain(hidden, weight, targets).backward()
    assert sizes.largest == rows * V, "the measure must see what it is there to see"


def test_without_gradients_only_the_logits_are_computed():
    """Evaluation under no_grad does one matrix product a chunk, not three, and allocates no gradient of the weight."""
    hidden, weight, targets = inputs(40, torch.float32)
    with torch.no_grad(), TensorSizes() as sizes:
        loss = summed_cross_entropy(hidden, weight, targets, 10)
    assert not loss.requires_grad
    assert sizes.products == 4
    assert sizes.largest == max(10 * V, V * D)  # a view of the weight
