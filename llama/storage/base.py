"""What --model names: a shape, a tokenizer, and weights, which must fit each other."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.boundary.errors import UserError
from llama.boundary.hub import find_model
from llama.boundary.untrusted import read_json
from llama.data.sources import TINY_TOKENIZER
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama, ModelConfig
from llama.storage.config_json import config_from_json, config_to_json
from llama.storage.pretrained import hugging_face_parameters, initialize_weights, load_weights, superfluous_names
from llama.storage.slices import check_tensors

# Small enough to learn the bundled reviews from random weights in two minutes on a laptop's processor. Its vocabulary
# is the bundled tokenizer's.
TINY = ModelConfig(
    vocab_size=1280,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    initializer_range=0.1,  # with the usual 0.02 so narrow a model learns nothing for a long time
)


@dataclass(frozen=True)
class Base:
    """The model that --model names. `folder` holds its weights; None: it starts from random weights."""

    name: str
    folder: Path | None
    config_json: dict
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, name: str, max_length: int = 0) -> "Base":
        """The built-in "tiny", a Hugging Face folder, or a hub id, for texts of up to max_length tokens."""
        return cls.tiny(max_length) if name == "tiny" else cls.pretrained(name, max_length)

    @classmethod
    def pretrained(cls, name: str, max_length: int = 0) -> "Base":
        """A Hugging Face folder or a hub id. Raises UserError when config.json, tokenizer, weights and max_length do
        not fit each other. Weights are compared by name and shape, before anything takes memory."""
        folder = find_model(name)
        if not os.path.lexists(folder / "config.json"):
            raise UserError(f"{folder}: has no config.json, expected a Hugging Face model folder")
        config_json = read_json(folder, "config.json")
        tokenizer = load_tokenizer(folder)
        config = config_from_json(config_json, folder / "config.json")
        check_fit(config, tokenizer, max_length)
        with torch.device("meta"):
            parameters = hugging_face_parameters(Llama(config))
        check_tensors(parameters, folder, "model", superfluous_names(config))
        return cls(name, folder, config_json, config, tokenizer)

    @classmethod
    def tiny(cls, max_length: int = 0) -> "Base":
        """The built-in preset, which is trained from random weights."""
        tokenizer = load_tokenizer(TINY_TOKENIZER)
        check_fit(TINY, tokenizer, max_length)
        special_tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        return cls("tiny", None, config_to_json(TINY) | special_tokens, TINY, tokenizer)

    def load(self, model: Llama, seed: int = 0) -> None:
        """Fill a model that has memory: with the folder's weights, or with random ones drawn from `seed`."""
        if self.folder:
            load_weights(model, self.folder)
        else:
            initialize_weights(model, seed)

    @property
    def fingerprint(self) -> str | None:
        """Tells one set of weights from another under the same name: a hash of each file's size and of samples of it.
        None where there are no files."""
        if not self.folder:
            return None
        total = hashlib.sha256()
        for path in sorted(self.folder.glob("model*.safetensors")):
            size = path.stat().st_size
            with open(path, "rb") as file:
                for i in range(64):
                    file.seek(i * size // 64)
                    total.update(file.read(4096))
            total.update(f"{path.name} {size}".encode())
        return total.hexdigest()[:16]


def check_fit(config: ModelConfig, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError when the model has no row for some token, or no position for texts of this length."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}"
        )
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"--max_length {max_length}: the model was made for at most {config.max_position_embeddings} tokens"
        )
