"""Hugging Face folder <-> model, without any rank ever holding more than its own slices."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llama.boundary.errors import UserError
from llama.data.tokenizer import Tokenizer, load_tokenizer
from llama.model.config import ModelConfig, read_config
from llama.model.decoder import Llama
from llama.model.quantize import QuantizedLinear
from llama.parallel.collectives import first_rank, together
from llama.storage.atomic import appearing, sync, write_durably
from llama.storage.slices import (
    Rows,
    check_tensors,
    local_slice,
    read_tensors,
    region,
    sharded_parameters,
    write_tensors,
)

# What an export writes: a left-over folder with anything else in it is not ours to delete.
EXPORTED = re.compile(r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer.*")


def open_folder(folder: str | Path, max_length: int = 0) -> tuple[dict, ModelConfig, Tokenizer]:
    """A folder's config.json, its configuration and its tokenizer, which must fit each other, the texts, and the
    weights: what is missing among them, or of another shape, is found before anything takes memory."""
    config_json, tokenizer = read_config(folder), load_tokenizer(folder)
    config = ModelConfig.from_dict(config_json, where=f"{folder}/config.json")
    check_fit(config, tokenizer, max_length)
    with torch.device("meta"):
        check_tensors(_hugging_face_parameters(Llama(config)), Path(folder), "model", _superfluous(config))
    return config_json, config, tokenizer


def check_fit(config: ModelConfig, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError when the model lacks a row for some token, or positions for texts so long."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{tokenizer.path}: the tokenizer has {tokenizer.vocab_size} ids, the model only "
                        f"{config.vocab_size}")
    if max_length > config.max_position_embeddings:
        raise UserError(f"--max_length {max_length}: the model was made for at most {config.max_position_embeddings} "
                        "tokens")


def load(model: Llama, folder: str | Path) -> None:
    """Fill the model from a Hugging Face folder, converting to each parameter's dtype. No communication.

    Parameters must have memory (`to_empty`), sharded or not. What an adapter added to the model is left alone;
    quantised linears are packed row by row, so that the model is never whole in any wider form.
    Raises WeightsError, before anything is written, if any weight is missing, unexpected or of another shape.
    """
    _tie(model)

    packed = {f"model.{name}.weight": _rows_of(module) for name, module in model.named_modules()
              if isinstance(module, QuantizedLinear)}
    read_tensors(_hugging_face_parameters(model) | packed, Path(folder), "model", _superfluous(model.config))


def _superfluous(config: ModelConfig) -> Callable[[str], object]:
    """Which names may be in a file besides: older ones hold the rotary frequencies, and some a tied matrix twice."""
    return re.compile(r".*rotary_emb\.inv_freq" + r"|lm_head\.weight" * config.tie_word_embeddings).fullmatch


def fingerprint(folder: Path) -> str:
    """Tells one set of weights from another under the same name: a hash of each file's size and of samples of it."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).glob("model*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(i * size // 64)
                total.update(file.read(4096))
        total.update(f"{path.name} {size}".encode())
    return total.hexdigest()[:16]


def _rows_of(linear: QuantizedLinear) -> Rows:
    """Where to put the rows of a quantised linear: each is packed as it comes."""
    local = {name: local_slice(tensor) for name, tensor in linear.packed_weight().items()}
    weight, (start, _) = local["weight"]

    def put(first: int, rows: torch.Tensor) -> None:
        for name, values in linear.quantize_rows(rows.to(weight.device)).items():
            local[name][0][first : first + len(rows)] = values

    return Rows((linear.out_features, linear.in_features), start, len(weight), put)


def initialize(model: Llama, seed: int) -> None:
    """Random weights: normal(0, initializer_range), norms 1, biases 0; the same for any number of ranks.

    Each matrix comes from a generator of its own, seeded by `seed` and its name: every rank draws it whole, in
    fp32, and keeps its slice.
    """
    _tie(model)
    for name, parameter in _hugging_face_parameters(model).items():
        local, start = local_slice(parameter)
        if name.endswith(("norm.weight", ".bias")):
            local.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        whole.normal_(0.0, model.config.initializer_range, generator=seeded_generator(seed, name))
        local.copy_(whole[region(start, local)])


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for everything that is drawn at random under a name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def export(
    model: Llama,
    folder: Path,
    config: dict,
    tokenizer_files: Sequence[Path] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a folder that transformers opens: weights, `config` as config.json, copies of the tokenizer. Collective.

    It appears under its name once all of it is on disk. Raises WeightsError, on every rank, if the name is taken
    or any rank cannot write; ValueError if an adapter has not been merged first.
    """
    weights = _hugging_face_parameters(model)
    if len(weights) != len(list(model.parameters())):
        raise ValueError("export: the model has parameters that a Llama has not: an adapter to merge first, or a "
                         "packed base")
    dtype_name = str(dtype).removeprefix("torch.")
    config = config | {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": dtype_name,  # read by transformers 4; the next by 5
        "dtype": dtype_name,
    }
    special_tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    copies = {Path(path).name: path for path in tokenizer_files}
    with appearing(folder, lambda name: name in copies or EXPORTED.fullmatch(name)) as unfinished:
        with together(unfinished):
            if first_rank():
                for name, path in copies.items():
                    shutil.copyfile(path, unfinished / name)
                    sync(unfinished / name)
                write_durably(unfinished / "config.json", json.dumps(config, indent=2) + "\n")
                if "generation_config.json" not in copies:
                    write_durably(unfinished / "generation_config.json", json.dumps(special_tokens, indent=2) + "\n")
        write_tensors(weights, unfinished, dtype=dtype)


def _tie(model: Llama) -> None:
    """Without sharding, `to_empty` gives both ends of a tied weight memory of their own: make them one again."""
    if model.config.tie_word_embeddings and not isinstance(model.embed_tokens.weight, DTensor):
        model.lm_head.weight = model.embed_tokens.weight


def _hugging_face_parameters(model: Llama) -> dict[str, nn.Parameter]:
    """The parameters that a Llama of this config has, by their names in a Hugging Face file; a tied one once."""
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.embed_tokens.weight:
        raise ValueError("lm_head and embed_tokens have come apart, the config says they are tied")
    with torch.device("meta"):
        ours = {name for name, _ in Llama(model.config).named_parameters()}
    parameters = {name: p for name, p in sharded_parameters(model).items() if name in ours}
    return {name if name.startswith("lm_head.") else f"model.{name}": p for name, p in parameters.items()}
