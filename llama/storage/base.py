"""What --model names: a shape, a tokenizer, and weights, which must fit each other."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama.boundary.errors import UserError
from llama.boundary.foreign import described_folder
from llama.boundary.hub import find_model
from llama.boundary.untrusted import read_json
from llama.data.sources import TINY_TOKENIZER
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama, ModelConfig
from llama.storage.config_json import config_from_json, config_to_json, unused_keys
from llama.storage.manifest import checkpoint_at, read_manifest, verify
from llama.storage.pretrained import (
    hugging_face_parameters,
    initialize_weights,
    load_trained,
    load_weights,
    superfluous_names,
)
from llama.storage.rounding import rounding_of_training
from llama.storage.slices import check_tensors, differ
from llama.storage.weight_files import unused_files, weight_files

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
    """The model that --model names. `folder` holds its weights; None: it starts from random weights.

    `dtype` is what most of its weights are stored in, and what exports keep. `notes` are sentences on what its files
    hold and is not used. `checkpoint` holds the weights that a run trained, in place of those of `folder`.
    """

    name: str
    folder: Path | None
    config_json: dict
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: torch.dtype
    notes: list[str]
    checkpoint: Path | None = None

    @classmethod
    def open(cls, name: str, max_length: int = 0, control_tokens: str | None = None) -> "Base":
        """The built-in "tiny", a Hugging Face folder, or a hub id, for texts of up to max_length tokens that may spell
        these control tokens."""
        if name == "tiny":
            return cls.tiny(max_length, control_tokens)
        return cls.of_folder(name, max_length, control_tokens)

    @classmethod
    def pretrained(cls, name: str, max_length: int = 0, control_tokens: str | None = None) -> "Base":
        """A trained model: a Hugging Face folder, a hub id, or a checkpoint of a run."""
        saved = checkpoint_at(name)
        if not saved:
            return cls.of_folder(name, max_length, control_tokens)
        if read_manifest(saved).origin(saved).lora:
            raise UserError(f"--model {saved}: holds an adapter, expected a model; give it as --adapter")
        return cls.of_checkpoint(saved, max_length, control_tokens)

    @classmethod
    def of_checkpoint(
        cls, saved: Path, max_length: int = 0, control_tokens: str | None = None, moved: str | None = None
    ) -> "Base":
        """What the run of a checkpoint began with (`moved`: where it is now), and the weights that it trained. Raises
        UserError where it is not to be found, or has other weights than in the run."""
        origin = read_manifest(saved).origin(saved)
        name = moved or origin.model
        if name != "tiny":
            try:
                find_model(name)
            except UserError as error:
                way_out = f"python checkpoints.py export {saved.parents[1]} OUT --step {saved.name} --model FOLDER"
                raise UserError(f"{saved}: the base of its run: {error}; if it has moved: {way_out}") from None
        base = cls.open(name, max_length, control_tokens)
        if base.folder and base.fingerprint != origin.base:
            changed = f"other weights or another config.json than those in {base.folder} now"
            raise UserError(f"{saved}: the run began with {changed}")
        return base if origin.lora else replace(base, checkpoint=saved)

    @classmethod
    def of_folder(cls, name: str, max_length: int = 0, control_tokens: str | None = None) -> "Base":
        """A Hugging Face folder or a hub id. Raises UserError when config.json, tokenizer, weights and max_length do
        not fit each other. Weights are compared by name and shape, before anything takes memory; only of a head beside
        a tied embedding the values are looked at."""
        folder = find_model(name)
        if not os.path.lexists(folder / "config.json"):
            expected = f"expected a Hugging Face model folder{described_folder(folder)}"
            raise UserError(f"{folder}: has no config.json, {expected}")
        config_json = read_json(folder, "config.json")
        tokenizer = load_tokenizer(folder, control_tokens)
        where = folder / "config.json"
        config = config_from_json(config_json, where)
        check_fit(config, tokenizer, max_length)
        notes = [*tokenizer.notes, *unused_keys(config_json, where), *unused_files(folder)]
        if config.tie_word_embeddings and differ(folder, "model.embed_tokens.weight", "lm_head.weight"):
            config = replace(config, tie_word_embeddings=False)
            both = "lm_head.weight is not the embedding, so both are loaded, as transformers 5 does"
            notes.append(f"{where}: tie_word_embeddings is true, but the file's {both}")
        with torch.device("meta"):
            parameters = hugging_face_parameters(Llama(config))
        dtypes = check_tensors(parameters, folder, "model", superfluous_names(config))
        sizes: Counter[torch.dtype] = Counter()
        for parameter_name, parameter in parameters.items():
            sizes[dtypes[parameter_name]] += parameter.numel()
        ((dtype, _),) = sizes.most_common(1)
        return cls(name, folder, config_json, config, tokenizer, dtype, notes)

    @classmethod
    def tiny(cls, max_length: int = 0, control_tokens: str | None = None) -> "Base":
        """The built-in preset, which is trained from random weights."""
        tokenizer = load_tokenizer(TINY_TOKENIZER, control_tokens)
        check_fit(TINY, tokenizer, max_length)
        special_tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        return cls("tiny", None, config_to_json(TINY) | special_tokens, TINY, tokenizer, torch.bfloat16, [])

    def load(self, model: Llama, seed: int = 0) -> None:
        """Fill a model that has memory: with the folder's weights, or with random ones drawn from `seed`, or with those
        of the checkpoint. Collective."""
        if self.checkpoint:
            self._load_checkpoint(model, self.checkpoint)
        elif self.folder:
            load_weights(model, self.folder)
        else:
            initialize_weights(model, seed)

    def _load_checkpoint(self, model: Llama, saved: Path) -> None:
        manifest = read_manifest(saved)
        origin = manifest.origin(saved)
        verify(saved, manifest, "model")
        are_all = origin.train_layers == "all"
        if not are_all:  # frozen weights are not in the checkpoint
            replace(self, checkpoint=None).load(model, origin.seed)
        load_trained(model, saved, are_all)

    def about_export(self, model: Llama, dtype: torch.dtype | None = None) -> str:
        """A sentence on a trained model's export in this dtype (None: the base's): what rounding loses. Collective."""
        dtype = dtype or self.dtype
        if not self.folder:
            return f"exported in {str(dtype).removeprefix('torch.')}"
        way_out = "`python checkpoints.py export RUN OUT --dtype float32` loses nothing"
        try:
            return rounding_of_training(model, self.folder, dtype).sentence(way_out)
        except UserError as error:
            return f"the export could not be compared with its base: {error}"

    @property
    def fingerprint(self) -> str | None:
        """Tells one set of weights from another under the same name: a hash of the config, and of the size and samples
        of each file that is read. None where there are no files."""
        if not self.folder:
            return None
        total = hashlib.sha256(repr(self.config).encode())
        names, _ = weight_files(self.folder)
        for name in names:
            path = self.folder / name
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
