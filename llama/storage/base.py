"""What --model names: a shape, a tokenizer, and weights, which must fit each other. And config.json, read and written.

ModelConfig's fields have the names of config.json (transformers 5's `rope_parameters` is read, too). A value that this
code cannot compute, such as another activation or RoPE scaling, raises a UserError that names the field.
"""

import hashlib
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch

from llama.boundary.errors import UserError
from llama.boundary.hub import find_model
from llama.boundary.records import check_values, read_record
from llama.boundary.untrusted import read_json
from llama.data.sources import TINY_TOKENIZER
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer
from llama.model import Llama, ModelConfig
from llama.model.config import ROPE_TYPES, RopeScaling
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


def config_from_json(values: dict, where: str | Path = "config.json") -> ModelConfig:
    """The configuration in a config.json. Raises UserError for a value that this code does not implement."""
    for name, expected in (("model_type", "llama"), ("hidden_act", "silu")):
        found = values.get(name, "silu" if name == "hidden_act" else None)
        if found != expected:
            raise UserError(f"{where}: {name} is {found!r:.100}, expected {expected!r}")
    shape_fields = [entry for entry in fields(ModelConfig) if entry.name not in ("rope_scaling", "rope_theta")]
    shape = {entry.name: values[entry.name] for entry in shape_fields if values.get(entry.name) is not None}
    needed = [entry.name for entry in shape_fields if entry.default is MISSING]
    missing = [name for name in needed if name not in shape and name not in ("num_key_value_heads", "head_dim")]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    check_values(ModelConfig, shape, where)
    heads, hidden_size = shape["num_attention_heads"], shape["hidden_size"]
    shape.setdefault("num_key_value_heads", heads)
    if "head_dim" not in shape and hidden_size % heads:
        raise UserError(f"{where}: hidden_size {hidden_size} does not divide over {heads} heads; state head_dim")
    shape.setdefault("head_dim", hidden_size // heads)
    return read_record(ModelConfig, shape | _read_rope(values, where), where)


def _read_rope(values: dict, where: str | Path) -> dict:
    """rope_theta and rope_scaling from either spelling: `rope_scaling`, or transformers 5's `rope_parameters`."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: rope_scaling is {scaling!r:.100}, expected an object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(rope_type, str):
        raise UserError(f"{where}: rope_type is {rope_type!r:.100}, expected one of {', '.join(ROPE_TYPES)}")
    needed = ROPE_TYPES.get(rope_type, ())
    missing = [name for name in needed if scaling.get(name) is None]
    if missing:
        raise UserError(f"{where}: rope_type {rope_type!r} lacks {', '.join(missing)}")
    for partial in (values.get("partial_rotary_factor"), scaling.get("partial_rotary_factor")):
        if partial not in (None, 1.0):
            raise UserError(f"{where}: partial_rotary_factor is {partial!r:.100}, a Llama rotates all of each head")
    chosen = {"rope_type": rope_type} | {name: scaling[name] for name in needed}
    rope = {"rope_scaling": read_record(RopeScaling, chosen, where)}
    theta = scaling.get("rope_theta", values.get("rope_theta"))
    return rope if theta is None else rope | {"rope_theta": theta}


def config_to_json(config: ModelConfig) -> dict:
    """The content of a config.json that transformers reads as this same model."""
    values = asdict(config)
    scaling = values.pop("rope_scaling")
    kept = {name: scaling[name] for name in ("rope_type", *ROPE_TYPES[config.rope_scaling.rope_type])}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **values,
        "rope_scaling": None if kept["rope_type"] == "default" else kept,
    }
