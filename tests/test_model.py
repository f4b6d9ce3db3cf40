"""The decoder against independent ones: transformers, a NumPy decoder in this file, two pretrained models."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import llama.model.attention
import llama.model.decoder
from llama.model.config import ConfigError, ModelConfig
from llama.model.decoder import Llama
from llama.model.embedding import Embedding
from llama.model.norm import RMSNorm
from llama.model.packed import PackedDocuments
from llama.model.rope import rope_frequencies, rope_table
from llama.storage import pretrained

LENGTHS = [5, 1, 40, 17]  # of the documents of every batch here
BASE = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}


def llama3(factor: float) -> dict:
    """With 64 original positions the six frequencies of BASE are fast, blended and slow ones."""
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64}}


VARIANTS = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 48},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied, biases, multi-query": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
                                  "num_key_value_heads": 1},
    "odd vocabulary": {"vocab_size": 331},
    "wide heads": {"head_dim": 20},
    "narrow heads": {"head_dim": 6},
    "llama3 x 8": llama3(8.0),
    "llama3 x 32": llama3(32.0) | {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_theta 500000": {"rope_theta": 500000.0},
    "one layer": {"num_hidden_layers": 1},
    "large epsilon": {"rms_norm_eps": 0.1},
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near 1, norms and biases that are not trivial: all terms count in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim == 2:
                values /= p.shape[1] ** (0.0 if "embed" in name and not model.config.tie_word_embeddings else 0.5)
            p.copy_(1 + values / 4 if name.endswith("norm.weight") else values)


def random_tokens(vocab_size: int, lengths: list[int] = LENGTHS, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def our_copy(theirs: LlamaForCausalLM, raw: dict, dtype: torch.dtype) -> Llama:
    ours = Llama(ModelConfig.from_dict(raw)).to(dtype)
    ours.load_state_dict({name.removeprefix("model."): w for name, w in theirs.state_dict().items()})
    return ours


def their_model(raw: dict, dtype: torch.dtype) -> LlamaForCausalLM:
    theirs = LlamaForCausalLM._from_config(LlamaConfig(**raw), attn_implementation="sdpa").to(dtype)
    randomize(theirs)
    return theirs


def norm_in_own_dtype(self, x):
    """transformers' RMSNorm without its detour through fp32."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_transformers(variant, dtype, tolerance, monkeypatch):
    """RELIABILITY 4.2: the documents go through transformers one by one, through ours packed into one stream (C22)."""
    if dtype == torch.float64:
        monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_own_dtype)
    raw = BASE | VARIANTS[variant]
    theirs = their_model(raw, dtype)
    ours = our_copy(theirs, raw, dtype)
    if dtype == torch.float64 and "llama3" in variant:  # fp32 numbers whose last bit C30's test allows to differ
        theirs.model.rotary_emb.inv_freq = rope_frequencies(ours.config)
    tokens = random_tokens(raw["vocab_size"])
    documents = PackedDocuments(LENGTHS)
    labelled = documents.positions > 0  # each token but a document's first is a target of the one before it
    rows, targets = labelled.nonzero()[:, 0] - 1, tokens[labelled]

    expected = torch.cat([theirs(document[None]).logits[0] for document in tokens.split(LENGTHS)])
    expected_loss = F.cross_entropy(expected[rows], targets)
    expected_loss.backward()
    logits = ours(tokens, documents.positions, documents)
    loss = ours(tokens, documents.positions, documents, rows, targets) / len(rows)
    loss.backward()

    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() <= tolerance
    assert abs(loss - expected_loss) <= tolerance
    expected_gradients = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() <= tolerance, name
        assert gradient.abs().max() > 1e-4, f"{name}: a gradient this small proves nothing"


def numpy_logits(config: ModelConfig, weights: dict, tokens: np.ndarray) -> np.ndarray:
    """One document through a Llama in float64, written from the papers: complex rotations, a loop over heads."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    scaling = config.rope_scaling
    if scaling.rope_type == "llama3":
        wavelength, length = 2 * np.pi / frequencies, scaling.original_max_position_embeddings
        for i in range(half):
            if wavelength[i] > length / scaling.low_freq_factor:
                frequencies[i] /= scaling.factor
            elif wavelength[i] > length / scaling.high_freq_factor:
                smooth = (length / wavelength[i] - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor)
                frequencies[i] = (1 - smooth) * frequencies[i] / scaling.factor + smooth * frequencies[i]
    turn = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies))

    def norm(x, name):
        return weights[f"{name}.weight"] * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def rotated(x):
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    x = weights["embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        block = f"layers.{i}"
        h = norm(x, f"{block}.input_layernorm")
        q, k, v = (linear(h, f"{block}.self_attn.{p}_proj") for p in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            shared = head * config.num_key_value_heads // config.num_attention_heads
            own, its = (slice(n * config.head_dim, (n + 1) * config.head_dim) for n in (head, shared))
            scores = rotated(q[:, own]) @ rotated(k[:, its]).T / math.sqrt(config.head_dim)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(p / p.sum(axis=1, keepdims=True) @ v[:, its])
        x = x + linear(np.concatenate(heads, axis=1), f"{block}.self_attn.o_proj")
        h = norm(x, f"{block}.post_attention_layernorm")
        gate = linear(h, f"{block}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{block}.mlp.up_proj"), f"{block}.mlp.down_proj")
    return norm(x, "norm") @ weights["lm_head.weight"].T


def exact_rope_table(config: ModelConfig, positions: torch.Tensor):
    angles = positions.double()[:, None, None] * exact_frequencies(config)
    return angles.cos(), angles.sin()


def exact_frequencies(config: ModelConfig) -> torch.Tensor:
    """rope_frequencies in float64 for llama3 scaling or none."""
    half = config.head_dim // 2
    plain = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    if config.rope_scaling.rope_type == "default":
        return plain
    s = config.rope_scaling
    turns = s.original_max_position_embeddings * plain / (2 * math.pi)
    slow = ((s.high_freq_factor - turns) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return plain * (1 - slow + slow / s.factor)


@pytest.mark.parametrize("variant", [{}, llama3(8.0), {"tie_word_embeddings": True, "num_key_value_heads": 1}])
def test_the_decoder_equals_a_numpy_decoder_in_float64(variant, monkeypatch):
    """RELIABILITY 4.1: to 1e-12 with float64 rotary tables, and to 1e-6 with the fp32 tables of real runs (C29)."""
    config = ModelConfig.from_dict(BASE | {"attention_bias": True, "mlp_bias": True, "head_dim": 20} | variant)
    model = Llama(config).double()
    randomize(model)
    tokens = random_tokens(config.vocab_size)
    documents = PackedDocuments(LENGTHS)
    weights = {name: w.numpy() for name, w in model.state_dict().items()}
    expected = np.concatenate([numpy_logits(config, weights, d.numpy()) for d in tokens.split(LENGTHS)])
    with torch.no_grad():
        assert np.abs(model(tokens, documents.positions, documents).numpy() - expected).max() <= 1e-6
        monkeypatch.setattr(llama.model.decoder, "rope_table", exact_rope_table)
        assert np.abs(model(tokens, documents.positions, documents).numpy() - expected).max() <= 1e-12


def test_bf16_is_as_near_to_float64_as_transformers_is():
    """RELIABILITY 4.1: relative error in bf16 below 3 %, and at most 1.2 times that of transformers in bf16."""
    raw = BASE | {"num_hidden_layers": 4}
    theirs = their_model(raw, torch.bfloat16)
    ours = our_copy(theirs, raw, torch.bfloat16)
    tokens = random_tokens(raw["vocab_size"])
    documents = PackedDocuments(LENGTHS)
    with torch.no_grad():
        logits = ours(tokens, documents.positions, documents)
        their_logits = torch.cat([theirs(document[None]).logits[0] for document in tokens.split(LENGTHS)])
        exact = ours.double()(tokens, documents.positions, documents)
    error, their_error = ((x.double() - exact).norm() / exact.norm() for x in (logits, their_logits))
    assert error < 0.03
    assert error <= 1.2 * their_error


def test_a_bf16_norm_takes_its_mean_in_fp32():
    """RMSNorm of bf16 input differs from the float64 value by the rounding of the result alone."""
    norm = RMSNorm(4096, 1e-5).bfloat16()
    x = (3 * torch.randn(8, 4096) + 1).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert ((norm(x).double() - exact).abs() <= 2**-8 * exact.abs()).all()


def test_a_token_that_comes_often_gets_its_whole_gradient_in_bf16():
    """A sum of ones in bf16 would stop at 256; equal to torch's own embedding in fp32, unseen rows included."""
    embedding = Embedding(7, 4)
    tokens = torch.tensor([3] * 3000 + [5, 0, 5])
    expected = F.embedding(tokens, embedding.weight)
    (exact,) = torch.autograd.grad(expected.sum(), embedding.weight)
    out = embedding.bfloat16()(tokens)
    assert torch.equal(out, expected.bfloat16())
    (gradient,) = torch.autograd.grad(out.sum(), embedding.weight)
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, exact.bfloat16())


def test_rows_choose_which_logits_are_computed_and_targets_turn_them_into_a_loss():
    """C10: logits of chosen rows are those rows of all logits; the loss is their summed cross-entropy, 0 for none."""
    model = Llama(ModelConfig.from_dict(BASE)).double()
    randomize(model)
    tokens, documents = random_tokens(BASE["vocab_size"]), PackedDocuments(LENGTHS)
    rows, targets = torch.tensor([60, 0, 3, 3]), torch.tensor([1, 2, 95, 0])
    none = torch.tensor([], dtype=torch.int64)
    with torch.no_grad():
        everything = model(tokens, documents.positions, documents)
        torch.testing.assert_close(model(tokens, documents.positions, documents, rows), everything[rows])
        loss = model(tokens, documents.positions, documents, rows, targets)
        torch.testing.assert_close(loss, F.cross_entropy(everything[rows], targets, reduction="sum"))
        assert model(tokens, documents.positions, documents, none, none) == 0


def interleaved_rotate(x, cos, sin):
    """Meta's layout: each pair (x[2i], x[2i + 1]) is one complex number."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(z).flatten(-2)


def test_metas_interleaved_weights_permuted_as_hugging_face_does_give_the_same_logits(monkeypatch):
    """C28: the half-split layout, checked against the original rotation on the original weights."""
    config = ModelConfig.from_dict(BASE)
    model = Llama(config).double()
    randomize(model)
    tokens, documents = random_tokens(config.vocab_size), PackedDocuments(LENGTHS)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(llama.model.attention, "rotate", interleaved_rotate)
            expected = model(tokens, documents.positions, documents)
        unpermuted = model(tokens, documents.positions, documents)
        for layer in model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                w = projection.weight  # transformers' convert_llama_weights_to_hf.permute
                w.copy_(w.view(-1, config.head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape))
        logits = model(tokens, documents.positions, documents)
    assert (logits - expected).abs().max() <= 1e-12
    assert (unpermuted - expected).abs().max() > 0.1, "the layouts must differ for this test to say anything"


@pytest.mark.parametrize("variant", [{}, {"rope_theta": 500000.0}, llama3(8.0), llama3(32.0)])
def test_rotary_tables_are_fp32_and_right_to_1e_3_at_position_8191(variant):
    """C29: whatever the dtype of the model or of the process."""
    config = ModelConfig.from_dict(BASE | variant | {"head_dim": 128})
    positions = torch.tensor([0, 1, 255, 257, 4095, 8191])
    torch.set_default_dtype(torch.bfloat16)
    try:
        tables = rope_table(config, positions)
    finally:
        torch.set_default_dtype(torch.float32)
    for table, exact in zip(tables, exact_rope_table(config, positions), strict=True):
        assert table.dtype == torch.float32
        assert (table - exact).abs().max() <= 1e-3


def test_a_bf16_model_tells_far_positions_apart():
    """C29: rotation is relative, so a document may start anywhere; with bf16 positions 7680 to 7719 would be equal."""
    model = Llama(ModelConfig.from_dict(BASE)).bfloat16()
    randomize(model)
    tokens, documents = random_tokens(BASE["vocab_size"], [40]), PackedDocuments([40])
    with torch.no_grad():
        near = model(tokens, documents.positions, documents).double()
        far = model(tokens, documents.positions + 7680, documents).double()
        aliased = model(tokens, torch.full_like(tokens, 7680), documents).double()
    assert (far - near).norm() / near.norm() < 0.02
    assert (aliased - near).norm() / near.norm() > 0.1


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_equal_transformers(factor):
    """C30: inv_freq equals the formula of transformers, for the settings of Llama 3.1 (x 8) and 3.2 (x 32)."""
    raw = BASE | {"head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 131072} | llama3(factor)
    raw["rope_scaling"]["original_max_position_embeddings"] = 8192
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**raw), device="cpu")
    frequencies = rope_frequencies(ModelConfig.from_dict(raw))
    assert attention_factor == 1.0 and frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("spelling", [
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5},
])
def test_every_spelling_of_rope_scaling_is_read(spelling):
    """C30: `rope_type` and the older `type`, `rope_scaling` and transformers 5's `rope_parameters`."""
    raw = {name: value for name, value in BASE.items() if name != "rope_theta"} | spelling
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](LlamaConfig(**raw), device="cpu")
    assert torch.equal(rope_frequencies(ModelConfig.from_dict(raw)), expected)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope_type", ["yarn", "dynamic", "longrope", "su", None, 3, ["linear"]])
def test_an_unknown_rope_scaling_is_refused_by_name(key, rope_type):
    """C30: ignoring it would look fine on short prompts."""
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(BASE | {key: {"rope_type": rope_type, "factor": 4.0}})
    assert repr(rope_type) in str(error.value) and "\n" not in str(error.value)


def test_a_tied_matrix_is_one_parameter_whose_gradient_adds_both_uses():
    """C31: one storage, one name; its gradient is the sum of the two that untied copies of it would get."""
    config = ModelConfig.from_dict(BASE | {"tie_word_embeddings": True})
    tied, untied = Llama(config).double(), Llama(ModelConfig.from_dict(BASE)).double()
    randomize(tied)
    untied.load_state_dict(tied.state_dict())
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    tokens, documents = random_tokens(config.vocab_size), PackedDocuments(LENGTHS)
    for model in (tied, untied):
        model(tokens, documents.positions, documents, torch.arange(len(tokens)), tokens).backward()
    torch.testing.assert_close(tied.embed_tokens.weight.grad, untied.embed_tokens.weight.grad
                               + untied.lm_head.weight.grad, rtol=1e-12, atol=1e-12)


def test_no_buffer_waits_to_be_initialised():
    """C32: what is built on the meta device consists of parameters alone, which `load` and `initialize` all fill."""
    with torch.device("meta"):
        model = Llama(ModelConfig.from_dict(BASE | llama3(8.0)))
    assert not list(model.buffers())
    assert all(p.is_meta for p in model.parameters())


# --- pretrained models -------------------------------------------------------------------------------------


def allocated(folder) -> Llama:
    with torch.device("meta"):
        model = Llama(ModelConfig.from_folder(folder))
    model.to_empty(device="cpu")
    return model


@torch.no_grad()
def logits_of(model: Llama, ids: list[int], rows: torch.Tensor | None = None) -> torch.Tensor:
    documents = PackedDocuments([len(ids)])
    return model(torch.tensor(ids), documents.positions, documents, rows)


def greedy(model: Llama, ids: list[int], count: int) -> list[int]:
    """Reads everything again for each new token: slow, and nothing to get wrong."""
    for _ in range(count):
        ids = [*ids, int(logits_of(model, ids, torch.tensor([len(ids) - 1])).argmax())]
    return ids


def test_stories260k_gives_the_reference_logits_and_the_reference_story(assets):
    """RELIABILITY 4.2, C32: built on meta, then loaded: all logits, each token's loss, llama2.c's 200 greedy tokens."""
    folder = assets / "stories260K"
    reference = load_file(folder / "reference.safetensors")
    facts = json.loads((folder / "reference.json").read_text())
    model = allocated(folder)
    pretrained.load(model, folder)
    assert model.lm_head.weight is model.embed_tokens.weight  # C31: without sharding, to_empty unties them
    ids = facts["input_ids"]
    logits = logits_of(model, ids)
    assert (logits - reference["logits"]).abs().max() <= 5e-5  # they reach 20: some last bits
    nll = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    assert (nll - reference["nll"]).abs().max() <= 2e-5
    assert abs(nll.mean() - facts["mean_nll"]) <= 2e-6
    assert greedy(model, [1], 200) == facts["greedy_from_bos_ids"]


def test_smollm2_gives_the_reference_losses_and_names_paris(assets):
    """RELIABILITY 4.2 on a real chat model: each token's loss, last logits, top 5, and a greedy reply."""
    folder, script = assets / "smollm2-135m-instruct-q4", assets.parent / "tools" / "expand_smollm2.py"
    reference, facts = load_file(folder / "reference.safetensors"), json.loads((folder / "reference.json").read_text())
    spec = importlib.util.spec_from_file_location("expand_smollm2", script)
    expand_smollm2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(expand_smollm2)
    model, weights = allocated(folder), {}
    model.lm_head.weight = model.embed_tokens.weight  # as `load` does
    for file in sorted(folder.glob("model.q4-*.safetensors")):
        weights |= expand_smollm2.expand(load_file(file))
    with torch.no_grad():  # in fp32 as the reference: the folder of the `smollm2` fixture is rounded to bf16
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(f"model.{name}"))
    assert not weights

    ids = facts["input_ids"]
    logits = logits_of(model, ids)
    nll = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    assert (nll - reference["nll"]).abs().max() <= 2e-4
    assert (logits[-1] - reference["last_logits"]).abs().max() <= 1e-3
    top = logits.topk(5)
    assert torch.equal(top.indices, reference["top5_indices"])
    assert (top.values - reference["top5_values"]).abs().max() <= 1e-3
    prompt, reply = facts["chat_prompt_ids"], facts["greedy_reply_ids"]
    assert greedy(model, prompt, len(reply)) == prompt + reply
