"""What a Llama computes, in eleven files that import torch and each other, and nothing else of the project.

Read them in this order: config, norm, rope, attention, packed, mlp, embedding, loss, decoder; then, for adapters over a
base of few bits, quantize. `sums` is how the embedding, DoRA and the gradient's norm add many numbers.
"""

from llama.model.config import ModelConfig
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments

__all__ = ["Llama", "ModelConfig", "PackedDocuments"]
