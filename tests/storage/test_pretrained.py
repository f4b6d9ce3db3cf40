"""Reading and writing Hugging Face folders, every rank its own slices. C and R numbers: the project's notes."""

import errno
import json
import os
import shutil
import struct
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from benchmarks.loading import PeakMemory
from llama.boundary.errors import UserError
from llama.boundary.untrusted import read_json
from llama.model import Llama, ModelConfig, PackedDocuments
from llama.storage import slices
from llama.storage.base import config_from_json, config_to_json
from llama.storage.companions import Companions
from llama.storage.pretrained import export_model, initialize_weights, load_weights
from llama.storage.slices import read_tensors, write_tensors


def slow(*values):
    """Parameters that repeat a rule which other parameters hold in the fast tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Odd sizes everywhere: no number of ranks divides the vocabulary, 4 does not divide the 6 rows of k_proj's heads.
CONFIG = ModelConfig(
    vocab_size=257,
    hidden_size=36,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=2,
)
CONFIGS = {
    "untied": CONFIG,
    "tied": replace(CONFIG, tie_word_embeddings=True),
    "with biases": replace(CONFIG, attention_bias=True, mlp_bias=True),
}


def sharded(config: ModelConfig, mesh=None) -> Llama:
    """A model that is sharded as training does it, its memory full of NaN."""
    with torch.device("meta"):
        model = Llama(config)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        local(parameter).fill_(torch.nan)
    return model


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def config_of(folder: Path) -> ModelConfig:
    return config_from_json(read_json(folder, "config.json"))


def folder_content(folder: Path) -> dict[str, torch.Tensor]:
    content = {}
    for path in sorted(folder.glob("*.safetensors")):
        content |= load_file(path)
    return content


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bitwise: -0.0 is not 0.0, and NaN is itself."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and ours[name].shape == theirs[name].shape
        and torch.equal(ours[name].view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8))
        for name in ours
    )


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    """hugging_face("tied", dtype) is a folder, in several files, that transformers wrote."""
    import transformers

    def make(kind: str, dtype: torch.dtype) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"hugging face {kind} {dtype}"
        if not folder.exists():
            torch.manual_seed(1)
            values = config_to_json(CONFIGS[kind]) | {"bos_token_id": 3, "eos_token_id": [5, 6]}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(dtype)
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "norm.weight")):  # transformers leaves these 0 and 1
                    torch.nn.init.normal_(parameter)
            model.save_pretrained(folder, max_shard_size="40KB")
        return folder

    return make


# Whole models


def load_and_export(source: Path, target: Path, dtype: torch.dtype, config: dict) -> dict:
    model = sharded(config_of(source))
    load_weights(model, source)
    export_model(model, target, config, Companions([source / "tokenizer.json"]), dtype)
    return {
        "not loaded": [name for name, p in model.named_parameters() if local(p).isnan().any()],
        "tied": model.lm_head.weight is model.embed_tokens.weight,
        "one storage": local(model.lm_head.weight).data_ptr() == local(model.embed_tokens.weight).data_ptr(),
    }


FAST = [(1, "untied", torch.float32), (2, "tied", torch.bfloat16), (4, "with biases", torch.float32)]


@pytest.mark.parametrize("size, kind, dtype", [
    case if case in FAST else slow(*case) for case in product([1, 2, 4], CONFIGS, [torch.float32, torch.bfloat16])
], ids=str)  # fmt: skip
def test_a_folder_from_transformers_comes_back_bitwise(ranks, hugging_face, tmp_path, kind, size, dtype):
    """C28, C31, C32, R24: nothing permuted, nothing left unfilled, tied weights one storage and stored once."""
    source, target = hugging_face(kind, dtype), tmp_path / "export"
    (source / "tokenizer.json").write_text("{}")
    for result in ranks(size, load_and_export, source, target, dtype, read_json(source, "config.json")):
        assert result == {"not loaded": [], "tied": kind == "tied", "one storage": kind == "tied"}
    assert same(folder_content(target), folder_content(source))
    assert ("lm_head.weight" in folder_content(target)) == (kind != "tied")
    with safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not target.with_name("export.tmp").exists()


@pytest.mark.parametrize("kind", ["tied", slow("untied"), slow("with biases")])
def test_transformers_opens_an_export_and_computes_the_same(ranks, hugging_face, tmp_path, kind):
    """C34: config, generation config, tokenizer and dtype are there, and the logits are equal."""
    import transformers

    source, target = hugging_face(kind, torch.float32), tmp_path / "export"
    (source / "tokenizer.json").write_text("{}")
    ranks(2, load_and_export, source, target, torch.float32, read_json(source, "config.json"))
    tokens = torch.arange(0, 257, 16)[None]
    theirs, ours = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (source, target))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert ours.dtype == torch.float32 and ours.config.architectures == ["LlamaForCausalLM"]
    assert ours.generation_config.eos_token_id == [5, 6] and ours.generation_config.bos_token_id == 3
    assert (target / "tokenizer.json").read_text() == "{}"


def test_the_export_has_the_dtype_that_was_asked_for(ranks, hugging_face, tmp_path):
    """C34: an fp32 model becomes bf16 by rounding each value once, and its config says so to transformers."""
    import transformers

    source = hugging_face("tied", torch.float32)
    (source / "tokenizer.json").write_text("{}")
    ranks(2, load_and_export, source, tmp_path / "export", torch.bfloat16, read_json(source, "config.json"))
    rounded = {name: t.bfloat16() for name, t in folder_content(source).items()}
    assert same(folder_content(tmp_path / "export"), rounded)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.dtype == torch.bfloat16


def test_an_export_is_in_bf16_unless_asked_otherwise(tmp_path):
    """C34: the dtype of published Llamas, in the file and in the config; fp32 would take twice the space."""
    model = Llama(CONFIG)
    initialize_weights(model, seed=3)
    export_model(model, tmp_path / "export", config_to_json(CONFIG))
    found = folder_content(tmp_path / "export")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    about = read_json(tmp_path / "export", "config.json")
    assert about["dtype"] == about["torch_dtype"] == "bfloat16"
    assert torch.equal(found["model.norm.weight"], model.norm.weight.detach().bfloat16())


def test_our_own_config_makes_a_folder_that_transformers_opens(tmp_path):
    """C34: without a process group, and from nothing but a ModelConfig."""
    import transformers

    model = Llama(CONFIGS["tied"])
    initialize_weights(model, seed=3)
    export_model(model, tmp_path / "export", config_to_json(CONFIGS["tied"]), dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert same(dict(theirs.model.state_dict()), {n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.slow
def test_a_pretrained_model_from_another_hand_loads(smollm2):
    """C28, C31: SmolLM2, bf16 weights into fp32 parameters, bitwise after conversion."""
    with torch.device("meta"):
        model = Llama(config_of(smollm2))
    model.to_empty(device="cpu")
    load_weights(model, smollm2)
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert len(list(model.parameters())) == len(file.keys()) == 272
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, file.get_tensor(f"model.{name}").float()), name


def test_keys_that_a_llama_can_do_without_are_passed_over_and_only_those(tmp_path):
    """C31: older files hold rotary frequencies; some repeat a tied matrix, which an untied model needs."""
    for kind in ("tied", "untied"):
        model = Llama(CONFIGS[kind])
        initialize_weights(model, 0)
        weights = {f"model.{n}".removeprefix("model.model."): p.detach() for n, p in model.named_parameters()}
        weights["lm_head.weight"] = weights.pop("model.lm_head.weight", torch.zeros(257, 36))
        weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(1)
        save_file(weights, tmp_path / "model.safetensors")
        fresh = Llama(CONFIGS[kind])
        load_weights(fresh, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
        assert (fresh.lm_head.weight is fresh.embed_tokens.weight) == (kind == "tied")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks 'lm_head.weight'"):
        load_weights(model, tmp_path)


def test_parameters_of_an_adapter_are_neither_loaded_nor_initialised_nor_exported(tmp_path):
    """A model that has an adapter already is loaded around it, and must be merged before it is exported."""
    model = Llama(CONFIG)
    initialize_weights(model, 0)
    export_model(model, tmp_path / "export", config_to_json(CONFIG))
    model.layers[0].mlp.up_proj.lora_A = torch.nn.Parameter(torch.full((4, 36), 7.0))
    load_weights(model, tmp_path / "export")
    initialize_weights(model, 1)
    assert torch.equal(model.layers[0].mlp.up_proj.lora_A, torch.full((4, 36), 7.0))
    with pytest.raises(ValueError, match="merge"):
        export_model(model, tmp_path / "merged", config_to_json(CONFIG))


def test_a_model_that_has_no_memory_yet_is_refused(tmp_path):
    """C32: filling a tensor on the meta device does nothing, and says nothing."""
    model = Llama(CONFIG)
    initialize_weights(model, 0)
    export_model(model, tmp_path / "export", config_to_json(CONFIG))
    with torch.device("meta"), pytest.raises(ValueError, match="to_empty"):
        load_weights(Llama(CONFIG), tmp_path / "export")


def load_with_a_broken_tie(folder: Path) -> None:
    with torch.device("meta"):
        model = Llama(CONFIGS["tied"])
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    fully_shard(model)
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match="are two tensors"):
        load_weights(model, folder)


def test_tied_weights_that_came_apart_are_one_again_or_refused(ranks, tmp_path):
    """C31: to_empty unties a plain model, tensor parallelism a sharded one, whose head would stay uninitialised."""
    original = Llama(CONFIGS["tied"])
    initialize_weights(original, 0)
    export_model(original, tmp_path / "export", config_to_json(CONFIGS["tied"]), dtype=torch.float32)
    with torch.device("meta"):
        model = Llama(CONFIGS["tied"])
    model.to_empty(device="cpu")
    load_weights(model, tmp_path / "export")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    ranks(2, load_with_a_broken_tie, tmp_path / "export")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(257, 36))
    with pytest.raises(ValueError, match="are two tensors"):
        export_model(model, tmp_path / "apart", config_to_json(CONFIGS["tied"]))


def export_after_a_forward(folder: Path) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Llama(CONFIG)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="cpu")
    initialize_weights(model, 0)
    documents = PackedDocuments([5, 3])
    with torch.no_grad():
        model(torch.arange(8), documents, torch.arange(8), torch.arange(8))
    export_model(model, folder / "export", config_to_json(CONFIG), dtype=torch.float32)
    with torch.no_grad():
        model(torch.arange(8), documents, torch.arange(8), torch.arange(8))
    initialize_weights(model, 1)
    load_weights(model, folder / "export")
    return {name: whole(p) for name, p in model.named_parameters()}


def test_an_evaluation_just_before_does_not_change_what_is_exported_or_loaded(ranks, tmp_path):
    """R24: FSDP leaves the gathered bf16 copies in place after a forward without a backward."""
    plain = Llama(CONFIG)
    initialize_weights(plain, 0)
    expected = {name: p.detach() for name, p in plain.named_parameters()}
    assert all(same(result, expected) for result in ranks(2, export_after_a_forward, tmp_path))


def initialized(kind: str, seed: int) -> dict[str, torch.Tensor]:
    model = sharded(CONFIGS[kind])
    initialize_weights(model, seed)
    return {name: whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["with biases", slow("tied"), slow("untied")])
def test_random_weights_do_not_depend_on_the_number_of_ranks(ranks, kind):
    """C32: nothing is left uninitialised, norms are 1, biases 0, and no two matrices are alike."""
    plain = Llama(CONFIGS[kind])
    initialize_weights(plain, 5)
    expected = {name: p.detach() for name, p in plain.named_parameters()}
    for size in (1, 2, 4):
        assert all(same(result, expected) for result in ranks(size, initialized, kind, 5))
    for name, values in expected.items():
        if "norm" in name or "bias" in name:
            assert torch.equal(values, torch.full_like(values, float("norm" in name)))
        else:
            five_sigma = 5 * 0.02 / values.numel() ** 0.5
            assert abs(values.mean()) < five_sigma and abs(values.std() - 0.02) < five_sigma
    first, second = (expected[f"layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    other = Llama(CONFIGS[kind])
    initialize_weights(other, 6)
    assert not torch.equal(first, other.layers[0].mlp.up_proj.weight)


# Tensors in any layout


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def layouts() -> dict[str, torch.Tensor]:
    """Tensors of awkward sizes in every placement on a 1-D and, with 4 ranks, a 2-D mesh; the same values on any."""
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    tensors = {
        "plain": numbers(5, 7),
        "plain scalar": torch.tensor(2.5),
        "plain integers": torch.arange(9),
        "plain nothing": torch.empty(0, 3),
        "transposed": numbers(6, 4).t(),
    }
    cases = [(line, [Replicate()], (3, 4)), (line, [Replicate()], ())]
    for shape in ((9,), (9, 5), (2, 3), (1, 8), (5, 4, 3)):
        cases += [(line, [Shard(dim)], shape) for dim in range(len(shape))]
    square = init_device_mesh("cpu", (2, 2)) if world == 4 else None
    for shape in ((7, 5), (2, 6), (3, 5, 7)):
        for one in (Replicate(), Shard(0), Shard(1)):
            for other in (Replicate(), Shard(0), Shard(1)):
                cases.append((square, [one, other], shape))
    for number, (mesh, placements, shape) in enumerate(cases):
        values = numbers(*shape) + number
        tensors[f"case {number}"] = distribute_tensor(values, mesh, placements) if mesh else values
    tensors["bytes"] = distribute_tensor(torch.arange(11, dtype=torch.uint8), line, [Shard(0)])
    tensors["flags"] = distribute_tensor(torch.tensor([True, False, True]), line, [Shard(0)])
    tensors["halves"] = distribute_tensor(numbers(5, 3).bfloat16(), line, [Shard(1)])
    return tensors


def write_layouts(folder: Path, **settings) -> dict[str, torch.Tensor]:
    tensors = layouts()
    write_tensors(tensors, folder, "stem", **settings)
    return {name: whole(tensor).contiguous() for name, tensor in tensors.items()}


def read_layouts(folder: Path) -> dict[str, torch.Tensor]:
    tensors = layouts()
    for tensor in tensors.values():
        local(tensor).fill_(0)
    read_tensors(tensors, folder, "stem")
    return {name: whole(tensor).contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("limit, sizes", [
    (100, (2, 4)), slow(100, (1, 3)), slow(10**9, (1, 2, 3, 4)), slow(1, (1, 2, 3, 4)),
])  # fmt: skip
def test_what_four_ranks_write_any_number_reads(ranks, tmp_path, limit, sizes):
    """R6, R24: every placement, uneven and empty shards, in one file or many, equals the whole tensor bitwise."""
    written = ranks(4, write_layouts, tmp_path, max_file_bytes=limit)[0]
    assert same(folder_content(tmp_path), written)
    files = sorted(path.name for path in tmp_path.iterdir())
    if limit == 10**9:
        assert files == ["stem.safetensors"]
    else:
        index = json.loads((tmp_path / "stem.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
        assert sorted(set(index["weight_map"].values())) == files[:-1]
        assert files[0] == f"stem-00001-of-{len(files) - 1:05d}.safetensors"
        for file in files[:-1]:
            content = load_file(tmp_path / file)
            assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= limit
    for size in sizes:
        assert all(same(result, written) for result in ranks(size, read_layouts, tmp_path))


def write_and_read_in_small_pieces(folder: Path, piece: int) -> bool:
    slices.COPIED_AT_ONCE = piece
    try:
        written = write_layouts(folder)
        return same(read_layouts(folder), written) and same(folder_content(folder), written)
    finally:
        slices.COPIED_AT_ONCE = 8 * 2**20


@pytest.mark.parametrize("piece", [24, slow(8), slow(64)])
def test_tensors_larger_than_a_piece_are_copied_piece_by_piece(ranks, tmp_path, piece):
    """C41: what a rank needs beyond its shard does not grow with the tensor."""
    assert ranks(4, write_and_read_in_small_pieces, tmp_path, piece) == [True] * 4


def bytes_written(folder: Path) -> tuple[int, int]:
    system, count = os.pwrite, 0

    def counting(file, data, position):
        nonlocal count
        count += len(data)
        return system(file, data, position)

    os.pwrite = counting
    try:
        return sum(t.nbytes for t in write_layouts(folder).values()), count
    finally:
        os.pwrite = system


@pytest.mark.parametrize("size", [4, slow(1), slow(3)])
def test_every_byte_is_written_once_however_many_ranks_hold_it(ranks, tmp_path, size):
    """C41: of a replicated tensor one rank writes the parts, of a plain one rank 0 all of it."""
    results = ranks(size, bytes_written, tmp_path)
    assert sum(count for _, count in results) == results[0][0]


def write_with_short_writes(folder: Path) -> bool:
    system = os.pwrite
    os.pwrite = lambda file, data, position: system(file, data[:3], position)
    try:
        return same(write_layouts(folder), folder_content(folder))
    finally:
        os.pwrite = system


def test_a_system_that_writes_a_few_bytes_at_a_time_is_asked_again(ranks, tmp_path):
    """R3: pwrite may take less than it is given."""
    assert all(ranks(2, write_with_short_writes, tmp_path))


def test_floats_are_converted_and_everything_else_is_left_as_it_is(ranks, tmp_path):
    """C34: dtype in the file is the dtype asked for; int8 codes and flags are not numbers to round."""
    written = ranks(2, write_layouts, tmp_path, dtype=torch.float16)[0]
    expected = {name: t.half() if t.is_floating_point() else t for name, t in written.items()}
    assert same(folder_content(tmp_path), expected)
    back = ranks(2, read_layouts, tmp_path)[0]
    assert same(back, {name: expected[name].to(t.dtype) for name, t in written.items()})


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path):
    """R24: other readers map the file and need aligned numbers, whatever order the tensors came in."""
    write_tensors({"a": torch.zeros(3, dtype=torch.uint8), "b": numbers(2), "c": numbers(1).bfloat16()}, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    assert (8 + size) % 8 == 0
    for name, width in (("a", 1), ("b", 4), ("c", 2)):
        assert header[name]["data_offsets"][0] % width == 0


def load_replicated(source: Path, target: Path) -> bool:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(config_of(source), mesh)
    load_weights(model, source)
    export_model(model, target, read_json(source, "config.json"), dtype=torch.float32)
    return not any(local(p).isnan().any() for p in model.parameters())


def test_with_hybrid_sharding_every_replica_is_filled_and_one_is_written(ranks, hugging_face, tmp_path):
    """C42: (Replicate, Shard(0))."""
    source = hugging_face("tied", torch.float32)
    assert ranks(4, load_replicated, source, tmp_path / "export") == [True] * 4
    assert same(folder_content(tmp_path / "export"), folder_content(source))


def peaks(folder: Path, target: Path) -> tuple[int, int, int]:
    model = sharded(config_of(folder))
    with PeakMemory() as loading:
        load_weights(model, folder)
    with PeakMemory() as exporting:
        export_model(model, target, read_json(folder, "config.json"))
    return loading.anonymous, exporting.anonymous, sum(local(p).nbytes for p in model.parameters())


@pytest.mark.slow
def test_no_rank_needs_more_memory_than_its_shard_and_a_few_pieces(ranks, tmp_path):
    """C41, C42: measured; a whole copy would take 135 MB, the largest matrix alone 67 MB."""
    config = replace(CONFIG, vocab_size=32768, hidden_size=512, tie_word_embeddings=False)
    model = Llama(config)
    initialize_weights(model, 0)
    export_model(model, tmp_path / "model", config_to_json(config), dtype=torch.float32)
    del model
    for loading, exporting, shard in ranks(2, peaks, tmp_path / "model", tmp_path / "export"):
        assert shard > 60e6
        assert loading < 20e6 and exporting < 40e6


# Folders that are not right


WEIGHTS = {"a": numbers(4, 3), "b": numbers(5) + 0.5, "c": torch.arange(3)}
FILE = "model-0000{}-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def good_folder(folder: Path) -> None:
    """WEIGHTS in two files and their index."""
    write_tensors(WEIGHTS, folder, max_file_bytes=60)
    assert sorted(path.name for path in folder.iterdir()) == [FILE.format(1), FILE.format(2), INDEX]


def edit_index(folder: Path, **changes) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def replace_with(path: Path, **changes) -> None:
    content = load_file(path) | changes
    path.unlink()
    save_file({name: t for name, t in content.items() if t is not None}, path)


def link_outside(folder: Path) -> None:
    shutil.move(folder / FILE.format(1), folder.parent / "elsewhere.safetensors")
    (folder / FILE.format(1)).symlink_to("../elsewhere.safetensors")


def damage(path: Path, keep: slice, add: bytes = b"") -> None:
    path.write_bytes(path.read_bytes()[keep] + add)


BAD = {
    "nothing there": (lambda f: [p.unlink() for p in f.iterdir()], "has neither model.safetensors nor"),
    "no such folder": (lambda f: shutil.rmtree(f), "has neither"),
    "a shard is missing": (lambda f: (f / FILE.format(1)).unlink(), "missing or not a file"),
    "a shard is a folder": (
        lambda f: [(f / FILE.format(1)).unlink(), (f / FILE.format(1)).mkdir()], "missing or not a file"
    ),
    "a shard is a pipe": (
        lambda f: [(f / FILE.format(1)).unlink(), os.mkfifo(f / FILE.format(1))], "missing or not a file"
    ),
    "a shard is cut short": (lambda f: damage(f / FILE.format(1), slice(-1)), "not a whole safetensors file"),
    "a shard is empty": (lambda f: damage(f / FILE.format(1), slice(0)), "not a whole safetensors file"),
    "a shard ends in its header": (lambda f: damage(f / FILE.format(1), slice(40)), "not a whole safetensors"),
    "a shard has more": (lambda f: damage(f / FILE.format(1), slice(None), b"x"), "not a whole safetensors"),
    "a header of 2^60 bytes": (
        lambda f: (f / FILE.format(1)).write_bytes(struct.pack("<Q", 2**60) + b"{}"), "not a whole safetensors"
    ),
    "a weight is missing": (lambda f: [replace_with(f / FILE.format(2), b=None)], "do not agree .*'b'"),
    "a weight is missing everywhere": (
        lambda f: [(f / INDEX).unlink(), save_file({"a": WEIGHTS["a"]}, f / "model.safetensors")],
        "lacks 'b', 'c'",
    ),
    "a weight too many": (
        lambda f: save_file(WEIGHTS | {"d": torch.ones(1)}, f / "model.safetensors"), "has 'd', which nothing"
    ),
    "a weight in two shards": (
        lambda f: replace_with(f / FILE.format(2), a=WEIGHTS["a"]), "'a', and so has another file"
    ),
    "a weight in another shard": (lambda f: edit_index(f, a=FILE.format(2)), "do not agree .*'a'"),
    "a weight only in the index": (lambda f: edit_index(f, d=FILE.format(1)), "do not agree .*'d'"),
    "another shape": (lambda f: replace_with(f / FILE.format(1), a=numbers(3, 4)), r"F32 \[3, 4\], exp.*\[4, 3\]"),
    "integers for floats": (
        lambda f: replace_with(f / FILE.format(1), a=torch.ones(4, 3).to(torch.int8)), "I8 .*, expected F32"
    ),
    "8-bit floats without a scale": (
        lambda f: replace_with(f / FILE.format(1), a=torch.ones(4, 3).to(torch.float8_e4m3fn)), "F8_E4M3 .*, exp"
    ),
    "names with line breaks": (
        lambda f: save_file({"x\ny" * 99: torch.ones(1)}, f / "model.safetensors"), "lacks 'a', 'b', 'c'; has"
    ),
    "an index of nothing": (lambda f: (f / INDEX).write_text(""), f"{INDEX}: Expecting value.* expected a JSON object"),
    "an index without a map": (
        lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: has no 'weight_map', expected an index"
    ),
    "an index that is a list": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: found list, expected a JSON object"),
    "an index of another encoding": (
        lambda f: (f / INDEX).write_bytes(b"\xff{}"), f"{INDEX}: 'utf-8' .* expected a JSON"
    ),
    "an index without end": (lambda f: (f / INDEX).write_text("[" * 99_999), f"{INDEX}: maximum recursion depth"),
    "an index with numbers": (lambda f: edit_index(f, a=1), f"{INDEX}: weight_map .*, expected an index"),
    "an index that says a thing twice": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        f"{INDEX}: a name comes twice",
    ),
    "an empty map": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "lacks 'a', 'b', 'c'"),
    "a path upwards": (lambda f: edit_index(f, a="../elsewhere.safetensors"), "expected a plain"),
    "an absolute path": (lambda f: edit_index(f, a=f"{f}/{FILE.format(1)}"), "expected a plain"),
    "a path into a folder": (lambda f: edit_index(f, a="x/y.safetensors"), "expected a plain"),
    "a path for Windows": (lambda f: edit_index(f, a="..\\y.safetensors"), "expected a plain"),
    "a name with NUL": (lambda f: edit_index(f, a="y\0.safetensors"), "expected a plain"),
    "a name with half a character": (lambda f: edit_index(f, a="\ud800.safetensors"), "expected a plain"),
    "a name of 5,000 letters": (lambda f: edit_index(f, a="y" * 5000 + ".safetensors"), "missing or not a file"),
    "another suffix": (lambda f: edit_index(f, a="pytorch_model.bin"), "expected a plain"),
    "no name": (lambda f: edit_index(f, a=""), "expected a plain"),
    "a link outside": (link_outside, "expected a file inside the folder"),
    "a link to itself": (
        lambda f: [(f / FILE.format(1)).unlink(), (f / FILE.format(1)).symlink_to(FILE.format(1))],
        "missing or not a file",
    ),
    "an index outside": (
        lambda f: [shutil.move(f / INDEX, f.parent), (f / INDEX).symlink_to(f.parent / INDEX)],
        "expected a file inside the folder",
    ),
}


def attempt(folder: Path) -> tuple[str | None, dict[str, torch.Tensor]]:
    """(the message of the UserError, if any; the tensors after) of reading WEIGHTS from the folder."""
    tensors = {name: torch.full_like(t, -7) for name, t in WEIGHTS.items()}
    try:
        read_tensors(tensors, folder)
    except UserError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 1000, "one line"
        assert all((t == -7).all() for t in tensors.values()), "nothing is written before all is checked"
        return message, tensors
    return None, tensors


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_folder_is_one_line_that_names_it_and_changes_nothing(tmp_path, fault):
    """R5, R12, R13."""
    folder = tmp_path / "model"
    folder.mkdir()
    good_folder(folder)
    assert attempt(folder)[0] is None
    spoil, expected = BAD[fault]
    spoil(folder)
    message, _ = attempt(folder)
    assert message is not None and str(folder) in message
    pytest.raises(UserError, read_tensors, dict(WEIGHTS), folder).match(expected)


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path):
    """R12: snapshots/REVISION/name -> ../../blobs/HASH, as huggingface_hub lays it out."""
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    good_folder(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, blobs / f"hash{number}")
        path.symlink_to(f"../../blobs/hash{number}")
    message, tensors = attempt(snapshot)
    assert message is None and same(tensors, WEIGHTS)
    (tmp_path / "link").symlink_to(snapshot)
    assert attempt(tmp_path / "link")[0] is None
    shutil.move(blobs / "hash0", tmp_path / "hash0")
    (blobs / "hash0").symlink_to("../../hash0")
    assert "inside the folder" in attempt(snapshot)[0]


with tempfile.TemporaryDirectory() as scratch:
    save_file(WEIGHTS, Path(scratch) / "x")
    GOOD_BYTES = (Path(scratch) / "x").read_bytes()
HEADER_SIZE = struct.unpack("<Q", GOOD_BYTES[:8])[0]

LEAF = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
BRANCH = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(st.text(max_size=5), LEAF, max_size=3)
JSON = BRANCH | st.lists(BRANCH, max_size=3) | st.dictionaries(st.text(max_size=5), BRANCH, max_size=3)
SMALL = st.integers(-1, 70) | st.sampled_from([2**31, 2**63, 2**64 - 1])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "BF16", "F4", "F6_E2M3", "F8_E8M0", "C64", "x"]),
        "shape": st.lists(SMALL, max_size=3),
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2),
    }
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "c", "d", "__metadata__"]), ENTRY | JSON, max_size=4)
EDITS = st.lists(st.tuples(st.integers(0, HEADER_SIZE + 7), st.integers(0, 255)), min_size=1, max_size=4)


def edited(edits: list[tuple[int, int]], cut: int | None) -> bytes:
    content = bytearray(GOOD_BYTES)
    for position, value in edits:
        content[position] = value
    return bytes(content[:cut])


def with_header(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@settings(max_examples=400, deadline=None)
@given(
    st.builds(edited, EDITS, st.none() | st.integers(0, len(GOOD_BYTES)))
    | st.builds(with_header, HEADERS, st.binary(max_size=100))
    | st.binary(max_size=64)
)
def test_no_header_whatever_gives_anything_but_weights_or_one_line(content):
    """R13: flipped and truncated headers, impossible dtypes, shapes and offsets, plain noise."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(content)
        attempt(Path(folder))


NAMES = st.sampled_from(
    ["one.safetensors", "two.safetensors", "link.safetensors", "../secret.safetensors", "sub/../one.safetensors",
     "./one.safetensors", "", ".", "..", ".safetensors", "sub", "/dev/zero", "one.safetensors\0", "one.SAFETENSORS"]
) | st.text(max_size=6) | st.text(max_size=6).map(lambda name: name + ".safetensors") | JSON  # fmt: skip
MAPS = st.dictionaries(st.sampled_from(["a", "b", "c"]) | st.text(max_size=3), NAMES, max_size=3)
GOOD_MAP = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}


@pytest.fixture(scope="module")
def folder_with_a_secret_beside_it(tmp_path_factory) -> Path:
    above = tmp_path_factory.mktemp("above")
    folder = above / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({name: torch.full_like(t, 99) for name, t in WEIGHTS.items()}, above / "secret.safetensors")
    save_file({"a": WEIGHTS["a"]}, folder / "one.safetensors")
    save_file({"b": WEIGHTS["b"], "c": WEIGHTS["c"]}, folder / "two.safetensors")
    (folder / "link.safetensors").symlink_to("../secret.safetensors")
    return folder


@settings(max_examples=300, deadline=None)
@given(MAPS.map(lambda changes: {"weight_map": GOOD_MAP | changes}) | MAPS.map(lambda m: {"weight_map": m}) | JSON)
@example({"weight_map": GOOD_MAP})
@example({"weight_map": dict.fromkeys("abc", "../secret.safetensors")})
@example({"weight_map": dict.fromkeys("abc", "link.safetensors")})
def test_no_index_whatever_reads_outside_the_folder(folder_with_a_secret_beside_it, index):
    """R12: either the folder's own weights, or one line."""
    folder = folder_with_a_secret_beside_it
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    message, tensors = attempt(folder)
    assert message is not None or same(tensors, WEIGHTS)
    assert message is None or index != {"weight_map": GOOD_MAP}


# Disks and folders that refuse


def fail_to_write(folder: Path, call: str, number: int) -> tuple[str, bool]:
    """Export with the system call failing on the last rank; what was raised, and what the model is afterwards."""
    model = sharded(CONFIG)
    initialize_weights(model, 0)
    system = getattr(os, call)

    def fail(*args):
        raise OSError(number, os.strerror(number))

    if dist.get_rank() == dist.get_world_size() - 1:
        setattr(os, call, fail)
    try:
        export_model(model, folder, config_to_json(CONFIG))
    except UserError as error:
        expected = Llama(CONFIG)
        initialize_weights(expected, 0)
        pairs = zip(model.parameters(), expected.parameters(), strict=True)
        return str(error), all(torch.equal(whole(p), e) for p, e in pairs)
    finally:
        setattr(os, call, system)
    return "", False


@pytest.mark.parametrize("size, call, number", [
    (2, "pwrite", errno.ENOSPC), (2, "fsync", errno.EIO), slow(1, "pwrite", errno.ENOSPC),
    slow(4, "pwrite", errno.ENOSPC), slow(1, "pwrite", errno.EIO), slow(2, "pwrite", errno.EIO),
    slow(4, "pwrite", errno.EIO), slow(1, "fsync", errno.EIO), slow(4, "fsync", errno.EIO),
])  # fmt: skip
def test_a_full_disk_under_one_rank_is_an_error_on_every_rank(ranks, tmp_path, size, call, number):
    """R3, C41: one line with path and bytes, nothing published, the model untouched, and no rank left waiting."""
    (tmp_path / "model").mkdir()
    for message, intact in ranks(size, fail_to_write, tmp_path / "model" / "export", call, number):
        assert str(tmp_path) in message and os.strerror(number) in message and intact
        assert call == "fsync" or "bytes at" in message
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["export.tmp"]
    assert ranks(size, export_quietly, tmp_path / "model" / "export") == [None] * size
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["export"]


def export_quietly(folder: Path, tokenizer_files: tuple = ()) -> str | None:
    model = sharded(CONFIG)
    initialize_weights(model, 0)
    try:
        export_model(model, folder, config_to_json(CONFIG), Companions(tokenizer_files))
    except UserError as error:
        return str(error)


def write_quietly(folder: Path) -> str | None:
    try:
        write_tensors({"a": numbers(2, 2)}, folder)
    except UserError as error:
        return str(error)


def test_what_only_rank_0_can_see_is_an_error_on_every_rank(ranks, tmp_path):
    """R2, R17: a name that is taken, a folder that is not there, a tokenizer file that is missing."""
    assert all("exists already" in message for message in ranks(2, export_quietly, tmp_path))
    assert all("missing.json" in m for m in ranks(2, export_quietly, tmp_path / "x", (tmp_path / "missing.json",)))
    assert all("No such file" in message for message in ranks(2, write_quietly, tmp_path / "absent"))
    assert ranks(2, write_quietly, tmp_path) == [None, None]
    assert all("File exists" in message for message in ranks(2, write_quietly, tmp_path))


@pytest.mark.parametrize("name, ours", [("model-00001-of-00002.safetensors", True), ("tokenizer.model", True),
                                        ("thesis.tex", False), ("model.safetensors/thesis.tex", False)])  # fmt: skip
def test_only_what_an_export_left_behind_is_ever_deleted(tmp_path, name, ours):
    """R17: the temporary folder of an export that died makes room, a folder with anything else in it does not."""
    stale = tmp_path / "export.tmp"
    (stale / name).parent.mkdir(parents=True)
    (stale / name).write_text("something")
    (stale / "config.json").write_text("{}")
    model = Llama(CONFIG)
    if ours:
        export_model(model, tmp_path / "export", config_to_json(CONFIG))
        assert not stale.exists()
    else:
        with pytest.raises(UserError, match="not from an attempt to write"):
            export_model(model, tmp_path / "export", config_to_json(CONFIG))
        assert (stale / name).read_text() == "something" and (stale / "config.json").exists()
