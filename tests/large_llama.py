"""Llama-2-70B without its weights, and one process that takes the place of any rank among thousands."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from llama.model import ModelConfig
from llama.parallel.processes import Process

LLAMA_2_70B = ModelConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
)
# Of the index that Meta published: 68,976,648,192 weights in fp16, and the rotary frequencies of 80 layers in fp32.
TOTAL_SIZE = 137_953_316_864


def shapes_in_files(layers: int = 80) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in the published folder, written out here and not taken from our model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, 8192)}
    for layer in range(layers):
        of_layer = {
            "self_attn.q_proj.weight": (8192, 8192),
            "self_attn.k_proj.weight": (1024, 8192),
            "self_attn.v_proj.weight": (1024, 8192),
            "self_attn.o_proj.weight": (8192, 8192),
            "mlp.gate_proj.weight": (28672, 8192),
            "mlp.up_proj.weight": (28672, 8192),
            "mlp.down_proj.weight": (8192, 28672),
            "input_layernorm.weight": (8192,),
            "post_attention_layernorm.weight": (8192,),
            "self_attn.rotary_emb.inv_freq": (64,),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (8192,), "lm_head.weight": (32000, 8192)}


def write_folder_of_holes(folder: Path, largest: int = 10 * 10**9) -> None:
    """Llama-2-70B's 15 files and their index. Behind each header is a hole of the true size: no disk is used."""
    shares: list[dict[str, dict]] = [{}]
    end = 0
    for name, shape in shapes_in_files().items():
        dtype, width = ("F32", 4) if name.endswith("inv_freq") else ("F16", 2)
        size = math.prod(shape) * width
        if end + size > largest:
            shares.append({})
            end = 0
        shares[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    weight_map = {}
    total = 0
    for number, header in enumerate(shares, 1):
        file = f"model-{number:05d}-of-{len(shares):05d}.safetensors"
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        size = max(entry["data_offsets"][1] for entry in header.values())
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + size)
        weight_map |= dict.fromkeys(header, file)
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Collectives(TorchDispatchMode):
    """Notes what ranks say to each other, by the operation's name."""

    def __init__(self):
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_rank(rank: int, shape: tuple[int, int, int]) -> Iterator[Process]:
    """This process as one rank of a mesh (replicate, shard, tensor), with the meta device for its memory.

    The process group is torch's fake one: nobody else is there, and what a collective returns has no meaning.
    """
    world_size = math.prod(shape)
    _clear_sharding_prop_cache()  # it knows the mesh of the rank before this one, which has the same shape
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tensor"))
        yield Process(rank, world_size, torch.device("meta"), mesh)
    finally:
        dist.destroy_process_group()
