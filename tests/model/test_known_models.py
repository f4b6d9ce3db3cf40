"""Two pretrained models against what transformers and llama2.c once computed with them."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from llama.boundary.untrusted import read_json
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments
from llama.storage.base import config_from_json
from llama.storage.pretrained import load_weights


def allocated(folder) -> Llama:
    with torch.device("meta"):
        model = Llama(config_from_json(read_json(folder, "config.json"), folder))
    model.to_empty(device="cpu")
    return model


@torch.no_grad()
def logits_of(model: Llama, ids: list[int], rows: torch.Tensor | None = None) -> torch.Tensor:
    documents = PackedDocuments([len(ids)])
    return model.logits(torch.tensor(ids), documents, rows)


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
    load_weights(model, folder)
    assert model.lm_head.weight is model.embed_tokens.weight  # C31: without sharding, to_empty unties them
    ids = facts["input_ids"]
    logits = logits_of(model, ids)
    assert (logits - reference["logits"]).abs().max() <= 5e-5  # they reach 20: some last bits
    nll = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    assert (nll - reference["nll"]).abs().max() <= 2e-5
    assert abs(nll.mean() - facts["mean_nll"]) <= 2e-6
    assert greedy(model, [1], 200) == facts["greedy_from_bos_ids"]


@pytest.mark.slow
def test_smollm2_gives_the_reference_losses_and_names_paris(assets):
    """RELIABILITY 4.2 on a real chat model: each token's loss, last logits, top 5, and a greedy reply."""
    folder, script = assets / "smollm2-135m-instruct-q4", assets.parent / "tools" / "expand_smollm2.py"
    reference, facts = load_file(folder / "reference.safetensors"), json.loads((folder / "reference.json").read_text())
    spec = importlib.util.spec_from_file_location("expand_smollm2", script)
    expand_smollm2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(expand_smollm2)
    model, weights = allocated(folder), {}
    model.lm_head.weight = model.embed_tokens.weight  # as `load_weights` does
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
