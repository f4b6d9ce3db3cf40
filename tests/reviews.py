"""What tests of evaluation share: a tiny model, reviews on disk, and the metrics by their definition."""

import json
from pathlib import Path

import numpy as np
import torch

from llama.data.examples import EncodedData
from llama.data.templates import TEMPLATES
from llama.model import Llama, ModelConfig, PackedDocuments
from llama.storage import pretrained
from llama.storage.base import TINY_TOKENIZER

BUNDLED = TINY_TOKENIZER / "tokenizer.model"
CONFIG = ModelConfig(vocab_size=1280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, initializer_range=0.4)  # fmt: skip
IMDB = TEMPLATES["imdb"]


def write_reviews(path: Path, count: int) -> Path:
    """Reviews of very different lengths, sorted by label as IMDB's are."""
    words = "the film was slow and weak but I liked its quick bright strong plot".split()
    rows = [{"text": " ".join(words[(i + j * j) % len(words)] for j in range(1 + (11 * i) % 37)),
             "label": int(i >= count // 2)} for i in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_model(config: ModelConfig = CONFIG) -> Llama:
    model = Llama(config)
    pretrained.initialize_weights(model, seed=1)
    return model


@torch.no_grad()
def example_by_example(model: Llama, encoded: EncodedData, words: list[int], every_token: bool = False, indices=None):
    """(loss, accuracy, n, predictions) by the definition: one example at a time, softmax in float64. A prediction is
    the probability of each answer word among them."""
    nll, labels, right, predictions = 0.0, 0, 0, {}
    for i in range(len(encoded)) if indices is None else indices:
        ids, is_answer = (np.array(x) for x in encoded[i])
        logits = model.logits(torch.from_numpy(ids).long(), PackedDocuments([len(ids)])).double().numpy()
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        places = [j for j in range(1, len(ids)) if every_token or is_answer[j]]
        nll -= sum(np.log(p[j - 1, ids[j]]) for j in places)
        labels += len(places)
        of_words = p[np.flatnonzero(is_answer)[0] - 1, words]
        predictions[i] = (of_words / of_words.sum()).tolist()
        right += int(np.argmax(of_words)) == encoded.answers[i]
    return nll / labels, right / len(predictions), len(predictions), predictions
