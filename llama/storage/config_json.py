"""config.json, read and written.

ModelConfig's fields have the names of config.json (transformers 5's `rope_parameters` is read, too). A value that this
code cannot compute, such as another activation or RoPE scaling, raises a UserError that names the field.
"""

from dataclasses import MISSING, asdict, fields
from pathlib import Path

from llama.boundary.errors import UserError
from llama.boundary.records import check_values, read_record
from llama.model import ModelConfig
from llama.model.config import ROPE_TYPES, RopeScaling


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
