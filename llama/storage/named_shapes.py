"""The shape of a model without its weights: one of a few known names, or what a folder's config.json says."""

from pathlib import Path

from llama.boundary.errors import UserError
from llama.boundary.foreign import described_folder
from llama.boundary.untrusted import read_json
from llama.model import ModelConfig
from llama.storage.base import TINY
from llama.storage.config_json import config_from_json


def _shape(*sizes: int, tied: bool = False) -> ModelConfig:
    """hidden, intermediate, layers, heads, key/value heads, vocabulary, positions."""
    hidden, intermediate, layers, heads, key_value_heads, vocabulary, positions = sizes
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
    )


# Their config.json on the Hugging Face hub: meta-llama/Llama-3.2-1B, Llama-2-7b-hf, Llama-3.1-8B, Llama-2-13b-hf,
# Llama-2-70b-hf, Llama-3.1-70B.
NAMED_SHAPES = {
    "tiny": TINY,
    "1b": _shape(2048, 8192, 16, 32, 8, 128256, 131072, tied=True),
    "7b": _shape(4096, 11008, 32, 32, 32, 32000, 4096),
    "8b": _shape(4096, 14336, 32, 32, 8, 128256, 131072),
    "13b": _shape(5120, 13824, 40, 40, 40, 32000, 4096),
    "70b": _shape(8192, 28672, 80, 64, 8, 32000, 4096),
    "llama3-70b": _shape(8192, 28672, 80, 64, 8, 128256, 131072),
}


def shape_of(name: str) -> ModelConfig:
    """The shape that this name or folder has. Raises UserError for neither."""
    if name in NAMED_SHAPES:
        return NAMED_SHAPES[name]
    folder = Path(name)
    if not (folder / "config.json").is_file():
        found = f"has no config.json{described_folder(folder)}" if folder.is_dir() else "no such folder"
        raise UserError(f"--model {name}: {found}, expected a folder with one, or one of {', '.join(NAMED_SHAPES)}")
    return config_from_json(read_json(folder, "config.json"), folder / "config.json")
