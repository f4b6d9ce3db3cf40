"""Which settings a resumed run may change: each is part of its identity, or free for a reason that is stated here."""

import re
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_checkpoints import small_state

from llama.boundary.errors import UserError
from llama.storage.checkpoint import Saver
from llama.training.plan import COUNTS, Plan, make_plan
from llama.training.settings import IDENTITY, TrainingSettings

# Another value of each setting that is part of the identity by its own name.
OTHER = {
    "model": "elsewhere", "max_length": 100, "truncate_side": "left", "epochs": 3.0, "learning_rate": 1e-4,
    "lr_schedule": "linear", "warmup_ratio": 0.1, "beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 0.5, "seed": 1,
    "batch_tokens": 600, "group_by_length": True, "optimizer": "adamw8bit", "quantize": "int8",
    "train_layers": "last:1", "train_on_prompt": True, "adapter": "folder", "data": "alpaca", "eval_limit": 10,
    "control_tokens": "<|im_end|>",
}  # fmt: skip
WITH = {"quantize": {"lora_rank": 4}}  # what another value needs

# {setting: the entry of the identity that changes with it}
UNDER_ANOTHER_NAME = {
    "lora_rank": "lora", "lora_alpha": "lora", "lora_dropout": "lora", "lora_targets": "lora", "lora_variant": "lora",
    "max_steps": "steps",
    "batch_size": "global_batch", "gradient_accumulation_steps": "global_batch",
    "dtype": "dtype",  # of any device that has a default of its own
    "template": "template",  # and what it makes of each row, as ids, is in "fingerprint"
    "system": "system",
    "data_dir": "fingerprint", "skip_bad_rows": "fingerprint", "test_fraction": "fingerprint",  # of encoded examples
}  # fmt: skip

SAME_NUMBERS = "how the same numbers are computed"
RECORDS = "what is written beside the weights, and when; no number of the run depends on it"
FREE = {
    "sharding": SAME_NUMBERS, "tensor_parallel": SAME_NUMBERS, "cpu_offload": SAME_NUMBERS,
    "defer_gradient_sync": SAME_NUMBERS,
    "activation_checkpointing": SAME_NUMBERS, "compile": SAME_NUMBERS,
    "output": RECORDS, "eval_every": RECORDS, "save_every": RECORDS, "async_save": RECORDS, "keep_checkpoints": RECORDS,
    "log_every": RECORDS, "sample_prompts": RECORDS, "save_minutes": RECORDS, "track": RECORDS,
    "config": "the flags that it stands for are compared themselves",
    "resume": "says that a run is resumed", "allow_changed": "says what may differ",
}  # fmt: skip


def test_each_setting_is_part_of_the_identity_or_free_for_a_reason():
    """C48: a new setting is put into one of the three lists above, after some thought."""
    listed = [*IDENTITY, *UNDER_ANOTHER_NAME, *FREE]
    assert sorted(listed) == sorted(entry.name for entry in fields(TrainingSettings))
    assert OTHER.keys() == set(IDENTITY)


def settings(output: Path, **changes) -> TrainingSettings:
    base = dict(model="folder", data="imdb", output=str(output), batch_size=2, dtype="float32")
    return TrainingSettings(**(base | changes)).with_recipe(1)


def planned(chosen: TrainingSettings, world_size: int = 1, **about_data) -> Plan:
    process = SimpleNamespace(data_ranks=world_size, device=SimpleNamespace(type="cpu"), store=None)
    examples = type("Examples", (), {"lengths": np.arange(10, 50), "__len__": lambda self: 40})()
    adapter = None if chosen.adapter else chosen.asked_adapter()
    data = {"template": "imdb", "fingerprint": "1", "bundled_sample": False} | about_data
    with ExitStack() as locks:
        return make_plan(chosen, examples, chosen.identity("base", adapter, data), process, "default", locks)


def differing(tmp_path: Path, changes: dict, together: dict) -> set[str]:
    """The entries of the identity that these changes change, where `together` is set in both."""
    one = planned(settings(tmp_path / "one", **together)).identity
    other = planned(settings(tmp_path / "other", **together | changes)).identity
    return {name for name in one | other if one[name] != other[name]}


@pytest.mark.parametrize("name", IDENTITY)
def test_a_resume_with_another_value_is_refused_and_names_the_setting(tmp_path, name):
    """C48: warm-up, seed, schedule and whatever else would silently make another run of it."""
    first = settings(tmp_path / "run", **WITH.get(name, {}))
    plan = planned(first)
    (tmp_path / "run" / "run.json").write_text("{}")
    saver = Saver(tmp_path / "run" / "checkpoints", keep=1)
    saver.save(1, small_state(), plan.identity, dict.fromkeys(COUNTS, 1), {})
    assert planned(replace(first, resume="newest")).first_step == 1
    with pytest.raises(UserError, match=rf"made with other settings: (.*; )?{name} was "):
        planned(replace(first, resume="newest", **{name: OTHER[name]}))


@pytest.mark.parametrize("changes, together", [
    ({"lora_rank": 4}, {}), ({"lora_alpha": 3.0}, {"lora_rank": 4}), ({"lora_dropout": 0.1}, {"lora_rank": 4}),
    ({"lora_targets": "q_proj"}, {"lora_rank": 4}), ({"lora_variant": "dora"}, {"lora_rank": 4}),
    ({"max_steps": 3}, {}), ({"batch_size": 4}, {"max_steps": 3}),
    ({"gradient_accumulation_steps": 2}, {"max_steps": 3}), ({"dtype": "bfloat16"}, {}),
], ids=str)  # fmt: skip
def test_settings_that_act_through_others_change_the_identity_too(tmp_path, changes, together):
    """C48: an adapter's, the number of steps, the global batch, the dtype that is computed in. (The rate is given:
    its default is another with an adapter.)"""
    (name,) = changes
    assert differing(tmp_path, changes, {"learning_rate": 1e-4} | together) == {UNDER_ANOTHER_NAME[name]}


@pytest.mark.parametrize("changes, world_size", [
    ({"batch_size": 2}, 2), ({"batch_size": 2, "gradient_accumulation_steps": 2}, 1),
    ({"gradient_accumulation_steps": 4}, 1), ({"gradient_accumulation_steps": 2}, 2),
], ids=str)  # fmt: skip
def test_ranks_and_micro_batches_may_change_if_the_global_batch_does_not(tmp_path, changes, world_size):
    """R25: one rank with 4 examples a step, or others that together have 4."""
    one = planned(settings(tmp_path / "one", batch_size=4)).identity
    assert planned(settings(tmp_path / "other", **{"batch_size": 1} | changes), world_size).identity == one


@pytest.mark.parametrize("name, value", [
    ("sharding", "grad"), ("tensor_parallel", 2), ("cpu_offload", True),
    ("defer_gradient_sync", True), ("activation_checkpointing", "full"),
    ("compile", True), ("eval_every", 5), ("save_every", 5), ("async_save", True), ("keep_checkpoints", -1),
    ("log_every", 5), ("sample_prompts", 0),
])  # fmt: skip
def test_what_is_free_changes_nothing_that_a_resume_compares(tmp_path, name, value):
    assert differing(tmp_path, {name: value}, {}) == set()


@pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate", "beta2"])
def test_what_is_filled_in_for_each_kind_of_model_is_what_help_says(name):
    """`--help` is the only place where a user reads these numbers before a run."""
    said = {entry.name: entry.metadata["help"] for entry in fields(TrainingSettings)}[name].rpartition(";")[2]
    kinds = ({"model": "base"}, {"model": "base", "lora_rank": 8}, {"model": "tiny"})
    filled = {getattr(TrainingSettings(data="rows", **kind).with_recipe(1), name) for kind in kinds}
    assert {float(number) for number in re.findall(r"\d[\d.]*(?:e-\d+)?", said)} == filled


@pytest.mark.parametrize("ranks, accumulated", [(1, 1), (2, 1), (1, 4), (2, 4), (8, 2)])
def test_tiny_takes_64_examples_a_step_however_they_are_cut(ranks, accumulated):
    chosen = TrainingSettings(data="imdb", gradient_accumulation_steps=accumulated).with_recipe(ranks)
    assert ranks * accumulated * chosen.batch_size == 64
