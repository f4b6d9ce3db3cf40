"""Packed documents: no document sees another, and every way to compute that gives the same numbers."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_llama import logits_of, random_model, random_tokens
from torch.nn import functional as F

import llama.model.packed
from llama.model.packed import QUERY_ROWS, PackedDocuments, _cut, varlen, varlen_attn

LENGTHS = [[1], [2, 1, 1], [128], [129, 127], [5, 1, 130, 128, 127, 300, 64]]
HEADS = [(3, 3), (6, 2), (8, 1)]  # query and key/value heads: 1, 3 and 8 of the first for one of the second
PATHS = ["attend_blocks", "attend_sdpa"]  # on the CPU; the model takes the first there


def inputs(lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, head_dim: int = 16, device="cpu"):
    """q, k, v and a gradient of the output, all standard normal."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, d_out = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out


def oracle(q, k, v, d_out, lengths: list[int]) -> list[torch.Tensor]:
    """Softmax with an explicit (T, T) mask, head by head, in float64: the output and the gradients of q, k and v."""
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in (q, k, v))
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen = torch.from_numpy((document[:, None] == document) & np.tri(len(document), dtype=bool))
    outs = []
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = (q[:, head] @ k[:, shared].T / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        outs.append(scores.softmax(-1) @ v[:, shared])
    out = torch.stack(outs, dim=1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out.cpu().double())]


def computed(path: str, q, k, v, d_out, lengths: list[int]) -> list[torch.Tensor]:
    documents = PackedDocuments(lengths, q.device)
    if path == "varlen":
        out = varlen(q, k, v, documents.boundaries, max(lengths))
    else:
        out = getattr(documents, path)(q, k, v)
    assert out.dtype == q.dtype
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]


def test_a_key_that_many_blocks_see_gets_its_whole_gradient_in_bf16(monkeypatch):
    """Where all scores are equal, row i gives 1 / (i + 1) of its gradient to the first value. A sum in bf16 would stop
    to grow at two thirds of it."""
    monkeypatch.setattr(llama.model.packed, "QUERY_ROWS", 2)
    q, k, v = (torch.zeros(1024, 1, 2, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    PackedDocuments([1024]).attend_blocks(q, k, v).sum().backward()
    expected = sum(1 / (i + 1) for i in range(1024))
    assert v.grad[0].flatten().tolist() == pytest.approx([expected, expected], rel=0.01)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_a_softmax_with_an_explicit_mask(path, lengths, heads, dtype, tolerance):
    """C22, RELIABILITY 4.1: output and the gradients of q, k and v."""
    q, k, v, d_out = inputs(lengths, heads, dtype)
    pairs = zip(computed(path, q, k, v, d_out, lengths), oracle(q, k, v, d_out, lengths), strict=True)
    for what, (ours, exact) in zip(("out", "d_q", "d_k", "d_v"), pairs, strict=True):
        assert (ours - exact).abs().max() <= tolerance, what


def relative_errors(results, exact) -> list[float]:
    """Of output, d_q, d_k, d_v, each as the norm of the difference over the norm."""
    return [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]


def sdpa_of_everything(q, k, v, seen):
    return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), seen, enable_gqa=True)[0]


def eager_attention(q, k, v, seen):
    """What transformers calls eager: scores in bf16, their softmax in fp32, probabilities in bf16."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)) * q.shape[-1] ** -0.5
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return p @ v.transpose(0, 1)


@pytest.mark.parametrize("sharpness, bound, peer, factor", [
    (1, 0.008, sdpa_of_everything, 2),
    (4, 0.016, eager_attention, 1.2),
], ids=["plain scores beside SDPA", "sharp scores beside eager"])
@pytest.mark.parametrize("path, heads", [
    ("attend_blocks", (6, 2)),
    *(pytest.param(path, heads, marks=pytest.mark.slow) for path in PATHS for heads in HEADS
      if (path, heads) != ("attend_blocks", (6, 2))),
], ids=str)  # fmt: skip
def test_bf16_is_about_as_exact_as_other_attentions(path, heads, sharpness, bound, peer, factor):
    """RELIABILITY 4.1: relative errors against float64 on the same bf16 inputs, of the output and each gradient.

    Scores are rounded to bf16 before the softmax, as in transformers' eager attention; SDPA keeps them in fp32, so the
    larger they are the more exact it is: with these sharp ones by up to 4 times.
    """
    lengths = LENGTHS[-1]
    q, k, v, d_out = inputs(lengths, heads, torch.bfloat16, head_dim=64)
    q = (sharpness * q.detach()).requires_grad_()
    exact = oracle(q, k, v, d_out, lengths)
    document = torch.repeat_interleave(torch.tensor(lengths))
    out = peer(q, k, v, (document[:, None] == document).tril()).transpose(0, 1)
    theirs = relative_errors([out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)], exact)
    ours = relative_errors(computed(path, q, k, v, d_out, lengths), exact)
    assert max(ours) <= bound, ours
    assert all(a <= factor * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.skipif(varlen_attn is None or not torch.cuda.is_available(), reason="needs CUDA and varlen_attn")
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("path", ["varlen", "attend_sdpa"])
def test_on_cuda_bf16_is_within_2_percent(path, heads):
    """C22: the variable-length flash kernel, and what stands in for it."""
    lengths = LENGTHS[-1]
    q, k, v, d_out = inputs(lengths, heads, torch.bfloat16, head_dim=64, device="cuda")
    assert max(relative_errors(computed(path, q, k, v, d_out, lengths), oracle(q, k, v, d_out, lengths))) <= 0.02


def kernel(q, k, v, starts, keys_start, longest, most_keys, causal: bool, shares_heads: bool):
    """What `varlen_attn` computes, on any device: only causal attention is asked for, over one set of documents."""
    assert causal and (shares_heads or q.shape == k.shape)
    assert starts is keys_start and longest == most_keys == int(starts.diff().max())
    return PackedDocuments(starts.diff().tolist()).attend_sdpa(q, k, v)


def kernel_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    return kernel(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, False)


def kernel_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    return kernel(q, k, v, cu_q, cu_k, max_q, max_k, window_size == (-1, 0), False)


def kernel_2_12(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    return kernel(q, k, v, cu_q, cu_k, max_q, max_k, window_size == (-1, 0), enable_gqa)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("release", [kernel_2_10, kernel_2_11, kernel_2_12])
def test_varlen_asks_each_release_of_pytorch_for_the_same_thing(release, heads, monkeypatch):
    """Where there is no GPU, a stand-in for the kernel checks what it is asked for under each of its signatures."""
    monkeypatch.setattr(llama.model.packed, "varlen_attn", release)
    monkeypatch.setattr(llama.model.packed, "VARLEN_OPTIONS", inspect.signature(release).parameters)
    lengths = LENGTHS[-1]
    q, k, v, d_out = inputs(lengths, heads, torch.float64)
    pairs = zip(computed("varlen", q, k, v, d_out, lengths), oracle(q, k, v, d_out, lengths), strict=True)
    assert all((ours - exact).abs().max() <= 1e-12 for ours, exact in pairs)


@pytest.mark.parametrize("path", PATHS)
def test_the_gradients_are_those_of_the_output(path, monkeypatch):
    """torch.autograd.gradcheck by finite differences in float64, with blocks so short that documents span several."""
    monkeypatch.setattr(llama.model.packed, "QUERY_ROWS", 2)
    lengths = [3, 1, 1, 4]
    q, k, v, _ = inputs(lengths, (4, 2), torch.float64, head_dim=2)
    documents = PackedDocuments(lengths)
    assert torch.autograd.gradcheck(getattr(documents, path), (q, k, v))


def test_the_gradients_do_not_depend_on_how_the_inputs_lie_in_memory():
    """q, k, v and the incoming gradient may be views with any strides."""
    lengths = [3, 140, 2]
    q, k, v, d_out = inputs(lengths, (6, 2), torch.float64)
    expected = computed("attend_blocks", q, k, v, d_out, lengths)
    strided = [x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v, d_out)]
    assert not strided[0].is_contiguous()
    results = computed("attend_blocks", *(x.requires_grad_() for x in strided), lengths)
    for ours, exact in zip(results, expected, strict=True):
        assert (ours - exact).abs().max() <= 1e-12


@settings(max_examples=200, deadline=None)
@given(st.lists(
    st.integers(1, 3 * QUERY_ROWS) | st.integers(1, 20) | st.integers(QUERY_ROWS - 1, QUERY_ROWS + 1),
    min_size=1, max_size=30,
))
@example([QUERY_ROWS])
@example([QUERY_ROWS + 1, 1, QUERY_ROWS + 1])
@example([1] * (QUERY_ROWS + 1))
def test_blocks_cover_every_row_once_and_hold_all_the_keys_it_may_see(lengths):
    """C22: for any lengths. Long documents are cut, short ones are not, and a block never exceeds QUERY_ROWS rows."""
    starts = np.cumsum([0, *lengths[:-1]])
    first_key = np.repeat(starts, lengths)  # of the document that a row belongs to
    covered = 0
    for start, end, first in _cut(lengths):
        assert start == covered and 0 < end - start <= QUERY_ROWS
        assert first == first_key[start]
        covered = end
    assert covered == sum(lengths)


@pytest.mark.parametrize("before, after", [(1, 9), (40, 9), (127, 30), (128, 128), (300, 150)])
@torch.no_grad()
def test_a_document_packed_after_another_has_the_logits_it_has_alone(before, after):
    """C22: resetting positions alone would not do."""
    model = random_model()
    a, b = random_tokens(before, 1), random_tokens(after, 2)
    for packed, alone in zip(logits_of(model, a, b), (*logits_of(model, a), *logits_of(model, b)), strict=True):
        assert (packed - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_changing_a_document_changes_no_bit_of_another(dtype):
    """C22: masked keys have probability exactly 0, so even the sums' roundings stay the same."""
    model = random_model().to(dtype)
    a, other, b, c = (random_tokens(n, seed) for n, seed in ((50, 1), (50, 2), (30, 3), (200, 4)))
    before, changed = logits_of(model, b, a, c), logits_of(model, b, other, c)
    assert torch.equal(before[0], changed[0]) and torch.equal(before[2], changed[2])
    assert not torch.equal(before[1], changed[1])


def test_positions_restart_at_each_document():
    documents = PackedDocuments([3, 1, 2])
    assert documents.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert documents.boundaries.tolist() == [0, 3, 4, 6] and documents.boundaries.dtype == torch.int32
