"""What tests of packed documents share: a small Llama in float64, random documents, and their logits in one stream."""

import torch

from llama.model.config import ModelConfig
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments

CONFIG = ModelConfig(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=8)


def random_model(seed: int = 0, config: ModelConfig = CONFIG) -> Llama:
    model = Llama(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) / 4)
    return model


def random_tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Llama, *documents: torch.Tensor) -> list[torch.Tensor]:
    """Of each of the documents, packed into one stream."""
    packed = PackedDocuments([len(d) for d in documents])
    return list(model.logits(torch.cat(documents), packed).split(packed.lengths))
