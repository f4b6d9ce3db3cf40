"""The processed scores against transformers' logits processors."""

import pytest
import torch

from llama.generation.scores import process
from llama.generation.settings import GenerationSettings


def test_nan_logits_are_refused():
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        process(torch.tensor([[0.0, torch.nan]]), [[0]], GenerationSettings())
