"""config.json, read and written.

ModelConfig's fields have the names of config.json (transformers 5's `rope_parameters` is read, too). A value that this
code cannot compute, such as another activation or RoPE scaling, raises a UserError that names the field. A key that
nothing here reads is announced by name, unless it is known to change nothing.
"""

from dataclasses import MISSING, asdict, fields
from pathlib import Path

from llama.boundary.errors import UserError, first_few
from llama.boundary.records import check_values, read_record
from llama.model import ModelConfig
from llama.model.config import ROPE_TYPES, RopeScaling

# Keys that change nothing here, whatever their value: where a file comes from, how its numbers are stored (the files of
# weights say it themselves), token ids (the tokenizer's files have them), classifiers, caches, and how work is split.
HARMLESS = {
    "_name_or_path", "transformers_version", "transformers.js_config", "unsloth_version", "unsloth_fixed",
    "is_llama_config", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
    "num_labels", "problem_type", "use_cache", "pretraining_tp", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward",
}  # fmt: skip
# Keys that change nothing as long as they have this value.
HARMLESS_IF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_dropout": 0,  # transformers applies it in training
    "is_encoder_decoder": False,
    "rope_interleaved": False,
}
# Keys that say that the weights are something else, and what is expected instead.
PLAIN_WEIGHTS = "plain weights, which --quantize can pack to 8 or 4 bits here (if they are plain, remove the key)"
REFUSED = {
    "quantization_config": PLAIN_WEIGHTS,
    "compression_config": PLAIN_WEIGHTS,
    "per_layer_config": "the same numbers in all layers",
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def config_from_json(values: dict, where: str | Path = "config.json") -> ModelConfig:
    """The configuration in a config.json. Raises UserError for a value that this code does not implement."""
    for name, expected in (("model_type", "llama"), ("hidden_act", "silu")):
        found = values.get(name, "silu" if name == "hidden_act" else None)
        if found != expected:
            raise UserError(f"{where}: {name} is {found!r:.100}, expected {expected!r}")
    for name, expected in REFUSED.items():
        found = values.get(name)
        if found:
            method = found.get("quant_method", found) if isinstance(found, dict) else found
            raise UserError(f"{where}: {name} is {method!r:.100}, expected {expected}")
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


def unused_keys(values: dict, where: str | Path = "config.json") -> list[str]:
    """Sentences on what a config.json holds and `config_from_json`, which has accepted it, does not use."""
    known = {entry.name for entry in fields(ModelConfig)} | {"rope_parameters", "partial_rotary_factor"} | HARMLESS
    unused = []
    for name, value in values.items():
        is_harmless = name in known or (name in HARMLESS_IF and value == HARMLESS_IF[name])
        if value is not None and not is_harmless:
            unused.append(name)
    key, scaling = _chosen_rope(values)
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    used = ROPE_KEYS | {*ROPE_TYPES[rope_type]}
    unused += [f"{key}.{name}" for name, value in scaling.items() if value is not None and name not in used]
    if scaling.get("type") not in (None, rope_type):
        unused.append(f"{key}.type")
    theta = values.get("rope_theta")
    if theta is not None and scaling.get("rope_theta") not in (None, theta):
        unused.append("rope_theta")
    notes = [f"{where}: not used: {first_few(unused, 12)}"] if unused else []
    other = values.get("rope_parameters")
    if key == "rope_scaling" and other:
        notes.append(f"{where}: rope_scaling is used and rope_parameters is not, as in transformers 5")
    return notes


def _chosen_rope(values: dict) -> tuple[str, dict]:
    """The key whose object says how positions are rotated, and the object. If both are there, transformers 5 takes all
    of rope_scaling and nothing of rope_parameters."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    return key, values.get(key) or {}


def _read_rope(values: dict, where: str | Path) -> dict:
    """rope_theta and rope_scaling from either spelling: `rope_scaling`, or transformers 5's `rope_parameters`."""
    key, scaling = _chosen_rope(values)
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: {key} is {scaling!r:.100}, expected an object")
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
    theta = scaling.get("rope_theta")
    if theta is None:
        theta = values.get("rope_theta")
    if theta is not None:
        rope["rope_theta"] = theta
    _refuse_two_thetas(values, key, rope.get("rope_theta", ModelConfig.rope_theta), where)
    return rope


def _refuse_two_thetas(values: dict, key: str, used: float, where: str | Path) -> None:
    """Beside rope_scaling, transformers 5 forgets the rope_theta of rope_parameters: nobody can mean that."""
    other = values.get("rope_parameters")
    if key != "rope_scaling" or not isinstance(other, dict) or other.get("rope_theta") in (None, used):
        return
    raise UserError(
        f"{where}: rope_theta is {other['rope_theta']!r:.60} in rope_parameters, but beside rope_scaling transformers "
        f"5 takes {used!r:.60}; expected the right rope_theta in rope_scaling, and no rope_parameters"
    )


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
