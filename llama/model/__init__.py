"""What a Llama computes. These files import torch and each other, and nothing else."""

from llama.model.config import ModelConfig
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments

__all__ = ["Llama", "ModelConfig", "PackedDocuments"]
