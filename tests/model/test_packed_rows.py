"""From rows of data to a packed loss: packing changes neither what is learnt nor how much each token counts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_llama import CONFIG, logits_of, random_model
from torch.nn import functional as F

import llama.data.batches
from llama.data.batches import Batch, pack
from llama.data.chat import CONTROL_TOKENS, LAYOUTS, Chat
from llama.data.encoding import encode_rows
from llama.data.templates import TEMPLATES
from llama.data.tokenizer_files import load_tokenizer
from llama.model.decoder import Llama


class ListOfExamples(list):
    """(tokens, is_answer) pairs as `pack` reads them; the first token is never an answer."""

    def __init__(self, lengths: list[int], answered: float = 0.4):
        rng = np.random.default_rng(0)
        for n in lengths:
            answer = rng.random(n) < answered
            answer[0] = False
            self.append((rng.integers(0, CONFIG.vocab_size, n).astype(np.int32), answer))
        self.lengths = np.array(lengths)


def loss_and_gradients(model: Llama, batch) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(batch.tokens, batch.documents, batch.rows, batch.targets)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_the_loss_and_gradients_of_a_pack_are_the_sums_of_those_of_its_examples():
    """C22, C1: packing changes neither what is learnt nor how much each token counts."""
    model, data = random_model(), ListOfExamples([7, 130, 1, 64, 20])
    together = loss_and_gradients(model, pack(data, range(len(data))))
    apart = [loss_and_gradients(model, pack(data, [i])) for i in range(len(data))]
    for packed, *separate in zip(together, *apart, strict=True):
        assert (packed - sum(separate)).abs().max() <= 1e-10


@pytest.mark.parametrize("answered", [0.4, 1])
def test_rounding_the_stream_up_leaves_loss_and_gradients_equal(answered, monkeypatch):
    """C25 where there is no padding: the round-up is a document of its own without labels."""
    model, data = random_model(), ListOfExamples([7, 130, 20], answered)
    results, lengths = [], []
    for multiple in (1, 8, 64):
        monkeypatch.setattr(llama.data.batches, "ROUND_TO", multiple)
        batch = pack(data, [2, 0, 1])
        lengths.append(len(batch.tokens))
        results.append(loss_and_gradients(model, batch))
    assert lengths == [157, 160, 192]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max() <= 1e-12


# Every template and chat layout, from its rows to the loss

BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "tiny" / "tokenizer.model"
CONTROL = [token for tokens in CONTROL_TOKENS.values() for token in tokens]  # a chat model's, which ours is without
PIECES = 1280  # of the bundled tokenizer
FORMS = [*TEMPLATES, *LAYOUTS]
TEXTS = ["A llama in the snow.", "What is this film about?\n\nIts plot, I say!", "No.", "</s> [/INST] {text}",
         "It was the best of films, it was the worst of films.", "naïve", "Why", "Because <|im_end|> it is so."]
FIELDS = ("text", "instruction", "input", "context", "author", "sentence", "question", "output", "response", "quote",
          "answer", "prompt", "completion")


def row_of(number: int) -> dict:
    """A row that fits every template and layout, of texts that no row of another number has in the same place."""
    texts = [f"{text} {number}" for text in TEXTS[number:] + TEXTS[:number]]
    row = dict(zip(FIELDS, texts * 2, strict=False)) | {"label": number % 2, "corrections": [texts[1]]}
    roles = ["system", *["user", "assistant"] * (1 + number % 3)]
    return row | {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(BUNDLED.read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({token: PIECES + i for i, token in enumerate(CONTROL)}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def large_model() -> Llama:
    return random_model(config=replace(CONFIG, vocab_size=PIECES + len(CONTROL)))


class EncodedRows(list):
    """(tokens, is_answer) pairs of the rows of these numbers."""

    def __init__(self, form: str, tokenizer, numbers: list[int]):
        render = (TEMPLATES.get(form) or Chat(form)).render
        for ids, is_answer, _ in encode_rows([render(row_of(n), "here")[0] for n in numbers], tokenizer, 400, "right"):
            self.append((np.array(ids, np.int32), np.array(is_answer)))
        self.lengths = np.array([len(ids) for ids, _ in self])


def logits_by_document(model: Llama, batch: Batch) -> list[torch.Tensor]:
    return list(model.logits(batch.tokens, batch.documents).split(batch.documents.lengths))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_of_every_template_and_layout_another_row_changes_nothing_for_its_neighbours(
    form, dtype, chat_tokenizer, large_model
):
    """C22: bit for bit where the stream is as long, and as good as equal where the neighbours move along it."""
    model = large_model if dtype == torch.float64 else random_model(config=large_model.config).to(dtype)
    data, other = (EncodedRows(form, chat_tokenizer, numbers) for numbers in ([0, 1, 2, 3], [0, 5, 2, 3]))
    before, moved = (logits_by_document(model, pack(rows, range(4))) for rows in (data, other))
    assert not torch.equal(data_of(data, 1), data_of(other, 1))

    ids, is_answer = data[1]
    other[1] = (np.where(np.arange(len(ids)) % 3 == 1, (ids + 7) % PIECES, ids), is_answer)  # of the same length
    changed = logits_by_document(model, pack(other, range(4)))
    assert not torch.equal(before[1], changed[1])
    for i in (0, 2, 3):
        assert torch.equal(before[i], changed[i])
        assert (before[i] - moved[i]).abs().max() <= (1e-12 if dtype == torch.float64 else 2e-5)
    order = [2, 3, 1, 0]
    for i, logits in zip(order, logits_by_document(model, pack(data, order)), strict=False):
        assert (before[i] - logits).abs().max() <= (1e-12 if dtype == torch.float64 else 2e-5)


def data_of(data: list, i: int) -> torch.Tensor:
    return torch.from_numpy(data[i][0])


@pytest.mark.parametrize("form", FORMS)
def test_of_every_template_and_layout_the_loss_of_a_pack_is_the_sum_of_its_rows(form, chat_tokenizer, large_model):
    """C22, C23, C1: every label of every row counts once; alone, by PyTorch's own cross entropy on its own logits."""
    model, data = large_model, EncodedRows(form, chat_tokenizer, [0, 1, 2, 3])
    batch = pack(data, [3, 0, 2, 1])
    together = loss_and_gradients(model, batch)
    apart = [loss_and_gradients(model, pack(data, [i])) for i in range(4)]
    for packed, *separate in zip(together, *apart, strict=True):
        assert (packed - sum(separate)).abs().max() <= 1e-9

    losses, labels = [], 0
    for i, (_, is_answer) in enumerate(data):
        ids = data_of(data, i).long()
        targets = torch.where(torch.from_numpy(is_answer), ids, -100)[1:]
        losses.append(F.cross_entropy(logits_of(model, ids)[0][:-1], targets, reduction="sum").detach())
        labels += int((targets >= 0).sum())
    assert len(batch.targets) == labels >= 4
    assert (together[0] - sum(losses)).abs() <= 1e-9 * sum(losses)
