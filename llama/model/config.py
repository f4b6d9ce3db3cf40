"""The shape of a Llama, read from a Hugging Face config.json under that file's own names.

Nothing is renamed, so config.json is the configuration. Only what would silently change the numbers is
checked by value: an unknown model type, activation or RoPE scaling is refused by name.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from llama.boundary.errors import UserError, WeightsError
from llama.boundary.untrusted import read_json_text


class ConfigError(UserError):
    """A configuration this code cannot run faithfully. One line: where, what was found, what was expected."""


# What each kind of scaling cannot do without; a key that is missing here would silently become a default.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


# Far beyond any Llama: a larger number is a mistake or an attack, and would only end the memory.
LARGEST_SIZE, LARGEST_DEPTH = 2**24, 2**10


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained on.

    `default` leaves them alone, `linear` divides every frequency by `factor`
    (Chen et al. 2023, https://arxiv.org/abs/2306.15595), `llama3` divides only the slow ones and blends in between
    (Llama 3.1, https://arxiv.org/abs/2407.21783). The three last fields matter to `llama3` alone.
    """

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if not isinstance(self.rope_type, str) or self.rope_type not in ROPE_TYPES:
            raise ConfigError(f"config: rope_type is {self.rope_type!r}, expected one of {', '.join(ROPE_TYPES)}")
        for name in ROPE_TYPES[self.rope_type]:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ConfigError(f"config: {name} is {value!r}, expected a positive number")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(f"config: low_freq_factor is {self.low_freq_factor!r}, expected less than "
                              f"high_freq_factor, {self.high_freq_factor!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Every number that determines a Llama's weights and arithmetic.

    Raises ConfigError when the numbers contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):
                number = isinstance(value, int | field.type) and not isinstance(value, bool)
                if not number or not 0 < value < float("inf"):
                    raise ConfigError(f"config: {field.name} is {value!r}, expected a positive {field.type.__name__}")
            elif field.type is bool and not isinstance(value, bool):
                raise ConfigError(f"config: {field.name} is {value!r}, expected true or false")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
            if getattr(self, name) > LARGEST_SIZE:
                raise ConfigError(f"config: {name} is {getattr(self, name)}, expected at most {LARGEST_SIZE}")
        if self.num_hidden_layers > LARGEST_DEPTH:
            raise ConfigError(f"config: num_hidden_layers is {self.num_hidden_layers}, expected at most "
                              f"{LARGEST_DEPTH}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config: {self.num_attention_heads} attention heads do not divide evenly over "
                f"{self.num_key_value_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config: head_dim is {self.head_dim}, rotary embeddings need an even one")

    @classmethod
    def from_dict(cls, values: dict, where: str = "config.json") -> "ModelConfig":
        """Read the content of a config.json. Raises ConfigError for anything a Llama here cannot honour."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: found {type(values).__name__}, expected a JSON object")
        model_type = values.get("model_type")
        if model_type != "llama":
            raise ConfigError(f"{where}: model_type is {model_type!r}, expected 'llama'")
        activation = values.get("hidden_act", "silu")
        if activation != "silu":
            raise ConfigError(f"{where}: hidden_act is {activation!r}, expected 'silu'")

        known = {field.name for field in fields(cls)} - {"rope_scaling", "rope_theta"}
        chosen = {name: values[name] for name in known if values.get(name) is not None}
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in required if name not in chosen]
        if missing:
            raise ConfigError(f"{where}: missing {', '.join(missing)}")
        heads, hidden_size = chosen["num_attention_heads"], chosen["hidden_size"]
        if not all(type(n) is int and n > 0 for n in (heads, hidden_size)):
            raise ConfigError(f"{where}: num_attention_heads is {heads!r} and hidden_size {hidden_size!r}, "
                              "expected positive integers")
        if "head_dim" not in chosen and hidden_size % heads:
            raise ConfigError(f"{where}: hidden_size {hidden_size} does not divide over {heads} heads; state head_dim")
        chosen.setdefault("num_key_value_heads", heads)
        chosen.setdefault("head_dim", hidden_size // heads)
        try:
            return cls(**chosen, **_read_rope(values))
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix('config: ')}") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder/config.json`. Raises ConfigError, also when the file is missing or is not JSON."""
        return cls.from_dict(read_config(folder), where=str(Path(folder) / "config.json"))

    def to_dict(self) -> dict:
        """The content of a config.json that transformers reads as this same model."""
        values = asdict(self)
        scaling = values.pop("rope_scaling")
        kept = {name: scaling[name] for name in ("rope_type", *ROPE_TYPES[self.rope_scaling.rope_type])}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **values,
            "rope_scaling": None if kept["rope_type"] == "default" else kept,
        }


def read_config(folder: str | Path) -> dict:
    """The JSON object in `folder/config.json`. Raises ConfigError when there is none."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(read_json_text(Path(folder), path.name))
    except WeightsError as error:
        missing = f"{path}: no such file; expected a Hugging Face model folder"
        raise ConfigError(str(error) if path.exists() else missing) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {type(values).__name__}, expected a JSON object")
    return values


def _read_rope(values: dict) -> dict:
    """rope_theta and rope_scaling from either spelling: `rope_scaling`, or transformers 5's `rope_parameters`."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"config: rope_scaling is {scaling!r}, expected an object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    needed = ROPE_TYPES.get(rope_type, ()) if isinstance(rope_type, str) else ()
    missing = [name for name in needed if name not in scaling]
    if missing:
        raise ConfigError(f"config: rope_type {rope_type!r} lacks {', '.join(missing)}")
    for partial in (values.get("partial_rotary_factor"), scaling.get("partial_rotary_factor")):
        if partial not in (None, 1.0):
            raise ConfigError(f"config: partial_rotary_factor is {partial!r}, a Llama rotates all of each head")
    rope = {"rope_scaling": RopeScaling(rope_type, **{name: scaling[name] for name in needed})}
    theta = scaling.get("rope_theta", values.get("rope_theta"))
    return rope if theta is None else rope | {"rope_theta": theta}


# Small enough to learn the bundled reviews from random weights in two minutes on a laptop's processor. Its
# vocabulary is the bundled tokenizer's.
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
    initializer_range=0.1,  # so narrow a model learns nothing for long from the usual 0.02
)
