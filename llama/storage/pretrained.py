"""Load and export Hugging Face folders. Each rank reads and writes only its slices; random ones: a tensor at a time."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama.boundary.durable import write_durably
from llama.boundary.errors import UserError
from llama.model import Llama, ModelConfig
from llama.model.quantize import QuantizedLinear
from llama.parallel.collectives import fail_together, is_rank_zero
from llama.parallel.shards import draw, local_slice, sharded_parameters, whole_shape
from llama.storage.atomic import atomic_folder
from llama.storage.companions import NO_COMPANIONS, Companions
from llama.storage.slices import Sink, read_tensors, tensor_names, write_tensors

# The names of files that an export writes, beside its companions.
EXPORTED = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def load_weights(model: Llama, folder: str | Path) -> None:
    """Fill the model from a Hugging Face folder, converting to each parameter's dtype. No communication.

    Parameters must have memory (`to_empty`), sharded or not. An adapter's parameters stay as they are. Quantised
    linears are packed row by row, so the model is never whole in any wider form. Raises UserError, before anything is
    written, if any weight is missing, unexpected or of another shape.
    """
    read_tensors(_targets(model), Path(folder), "model", superfluous_names(model.config))


def load_trained(model: Llama, saved: Path, are_all: bool) -> None:
    """The same from a checkpoint, which has the weights under names without prefix; unless `are_all` only those that
    were trained: the others stay as they are."""
    targets = {name.removeprefix("model."): target for name, target in _targets(model).items()}
    trained = targets if are_all else {name: targets[name] for name in targets.keys() & tensor_names(saved)}
    read_tensors(trained, saved, "model")


def _targets(model: Llama) -> dict[str, Tensor | Sink]:
    """Where each weight of a Hugging Face file goes."""
    tie(model)
    targets: dict[str, Tensor | Sink] = dict(hugging_face_parameters(model))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            targets[f"model.{name}.weight"] = _packing_sink(module)
    return targets


def superfluous_names(config: ModelConfig) -> Callable[[str], object]:
    """Which names a file may hold beside the parameters: older files hold rotary frequencies, some a tied matrix twice.
    """
    pattern = r".*rotary_emb\.inv_freq"
    if config.tie_word_embeddings:
        pattern += r"|lm_head\.weight"
    return re.compile(pattern).fullmatch


def _packing_sink(linear: QuantizedLinear) -> Sink:
    """Takes the rows of a quantised linear, and packs each as it comes. A scale is that of a whole row, so a rank that
    keeps some columns reads whole rows, too."""
    packed = {name: local_slice(tensor) for name, tensor in linear.packed_weight().items()}
    weight, (first_row, _) = packed["weight"]

    def put(first: int, rows: Tensor) -> None:
        for name, values in linear.quantize_rows(rows.to(weight.device)).items():
            local, (_, left) = packed[name]
            local[first : first + len(rows)] = values[:, left : left + local.shape[1]]

    out_features, width = whole_shape(linear.weight)
    in_features = linear.in_features * width // linear.weight.shape[1]  # of the whole; nf4 packs two into a byte
    return Sink((out_features, in_features), torch.float32, (first_row, 0), (len(weight), in_features), put)


def initialize_weights(model: Llama, seed: int) -> None:
    """Random weights: normal(0, initializer_range), norms 1, biases 0; the same for any number of ranks."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError("--quantize: only weights from files are rounded, and the frozen ones of this model are random")
    tie(model)
    deviation = model.config.initializer_range
    for name, parameter in hugging_face_parameters(model).items():
        local, _ = local_slice(parameter)
        if name.endswith(".bias"):
            local.fill_(0.0)
        elif name.endswith("norm.weight"):
            local.fill_(1.0)
        else:
            draw(parameter, name, seed, lambda whole, generator: whole.normal_(0.0, deviation, generator=generator))


def export_model(
    model: Llama,
    folder: Path,
    config_json: dict,
    beside: Companions = NO_COMPANIONS,
    dtype: torch.dtype = torch.bfloat16,
    replace: bool = False,
) -> None:
    """Write a folder that transformers opens: weights, config.json, and what is `beside` them. Collective.

    It appears under its name once all of it is on disk. Raises UserError, on every rank, if the name is taken or any
    rank cannot write; ValueError if an adapter has not been merged first.
    """
    weights = hugging_face_parameters(model)
    if len(weights) != len(list(model.parameters())):
        raise ValueError("export_model: the model has more parameters than a Llama: merge its adapter, do not quantise")
    dtype_name = str(dtype).removeprefix("torch.")
    config_json = config_json | beside.special_tokens | {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": dtype_name,  # transformers 4 reads this one,
        "dtype": dtype_name,  # and transformers 5 this one
    }
    special_tokens = {name: config_json[name] for name in ("bos_token_id", "eos_token_id") if name in config_json}

    def is_ours(name: str) -> bool:
        return beside.owns(name) or bool(EXPORTED.fullmatch(name))

    with atomic_folder(folder, is_ours, replace=replace) as unfinished:
        with fail_together(unfinished):
            if is_rank_zero():
                beside.write(unfinished, special_tokens)
                write_durably(unfinished / "config.json", json.dumps(config_json, indent=2) + "\n")
        write_tensors(weights, unfinished, dtype=dtype)


def tie(model: Llama) -> None:
    """Make both ends of a tied weight one tensor again: without sharding, `to_empty` gives each end its own memory."""
    if model.config.tie_word_embeddings and not isinstance(model.embed_tokens.weight, DTensor):
        model.lm_head.weight = model.embed_tokens.weight


def hugging_face_parameters(model: Llama) -> dict[str, nn.Parameter]:
    """A Llama's own parameters by their names in a Hugging Face file; a tied one once. Those of adapters and packed
    linears are left out."""
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.embed_tokens.weight:
        raise ValueError("lm_head and embed_tokens are two tensors, the config says that they are tied")
    packed = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            packed |= {f"{name}.{key}" for key in module.packed_weight()}
    parameters = {}
    for name, parameter in sharded_parameters(model).items():
        if ".lora_" not in name and name not in packed:
            parameters[name if name.startswith("lm_head.") else f"model.{name}"] = parameter
    return parameters
