"""Everything that is published under a final name is on disk first, and so is the name before older ones are given up.

R1: a system writes to disk in any order it likes, unless it is told to wait. tests/disk.py says what is watched.
"""

from pathlib import Path

import torch
from disk import Disk
from sharded import this_process
from small_checkpoints import SETTINGS, TOTALS, small_state
from torch.distributed.tensor import Shard, distribute_tensor

from llama.data.cache import cached
from llama.model import Llama, ModelConfig
from llama.storage.atomic import atomic_folder
from llama.storage.base import config_to_json
from llama.storage.checkpoint import Saver, set_aside
from llama.storage.companions import Companions
from llama.storage.peft import Adapter, save_adapter
from llama.storage.pretrained import export_model, initialize_weights
from llama.storage.slices import write_tensors
from llama.training.journal import Journal
from lora import apply_adapter, initialize_adapter

SMALL = ModelConfig(vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=4)  # fmt: skip


def small_llama() -> Llama:
    model = Llama(SMALL)
    initialize_weights(model, seed=0)
    return model


def test_a_model_is_exported_with_all_its_files_on_disk(tmp_path):
    """Weights, config.json, generation_config.json and copies of the tokenizer's files; the second time in place of the
    first."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}" * 10_000)
    for attempt in range(2):
        with Disk() as disk:
            config, beside = config_to_json(SMALL) | {"eos_token_id": 2}, Companions([tokenizer])
            export_model(small_llama(), tmp_path / "model", config, beside, replace=True)
        assert disk.renamed == [tmp_path / "model"] and disk.at_risk() == [], attempt
    found = {path.name for path in (tmp_path / "model").iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_an_adapter_is_saved_with_both_its_files_on_disk(tmp_path):
    adapter = Adapter(2, 4.0)
    model = small_llama()
    apply_adapter(model, adapter)
    initialize_adapter(model, 0)
    with Disk() as disk:
        save_adapter(model, tmp_path / "adapter", adapter, "base")
    assert disk.renamed == [tmp_path / "adapter"] and disk.at_risk() == []


TENSORS = {f"{i}": torch.full((50, 4), float(i)) for i in range(3)}


def test_several_files_of_weights_and_their_index_are_on_disk(tmp_path):
    with Disk() as disk:
        with atomic_folder(tmp_path / "model", lambda name: True) as unfinished:
            write_tensors(TENSORS, unfinished, max_file_bytes=1000)
    assert disk.renamed == [tmp_path / "model"] and disk.at_risk() == []
    assert len(list((tmp_path / "model").iterdir())) == 3 + 1


def forced_to_disk(folder: Path) -> list[str]:
    mesh = this_process().mesh["shard"]
    sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in TENSORS.items()}
    with Disk() as disk:
        write_tensors(sharded, folder, max_file_bytes=1000)
    return sorted(path.name for path in disk.synced if path.suffix == ".safetensors")


def test_each_rank_forces_to_disk_what_it_has_written(ranks, tmp_path):
    """R1, R6: rank 0 alone could not do it for a file on a shared disk, of which another machine wrote a part."""
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert ranks(2, forced_to_disk, tmp_path) == [files, files]


def test_a_checkpoint_has_its_name_on_disk_before_an_older_one_is_deleted(tmp_path):
    """R6: else a power cut could leave neither."""
    saver = Saver(tmp_path, keep=1)
    with Disk() as disk:
        for step in (1, 2):
            saver.save(step, small_state(), SETTINGS, TOTALS, {})
    assert disk.renamed == [tmp_path / "step-000001", tmp_path / "step-000002"] and disk.at_risk() == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_encoded_data_are_on_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """The name itself may be lost: then the data are encoded again."""
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path))
    with Disk() as disk:
        folder = cached("key", lambda folder: (folder / "tokens").write_text("1 2 3"))
    assert disk.renamed == [folder] and disk.problems == []


def test_checkpoints_that_are_set_aside_do_not_come_back(tmp_path):
    """R6: one of a run that was given up would be the newest, and the run would go on from it."""
    saver = Saver(tmp_path, keep=-1)
    for step in (1, 2, 3):
        saver.save(step, small_state(), SETTINGS, TOTALS, {})
    with Disk() as disk:
        moved = set_aside(tmp_path, 1)
    assert disk.renamed == moved and len(moved) == 2
    assert sorted(disk.synced[tmp_path]) == ["step-000001", *(path.name for path in moved)]


def test_the_lines_of_a_resumed_run_are_replaced_as_a_whole(tmp_path):
    """R1: as it begins, it drops the lines of steps that it will take again."""
    journal = Journal(tmp_path)
    for step in (1, 2):
        journal.write(step=step, loss=1.0)
    journal.close()
    with Disk() as disk:
        Journal(tmp_path, resumed_step=1).close()
    assert disk.renamed == [tmp_path / "metrics.jsonl"] and disk.at_risk() == []
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
