"""Who has started this process: torchrun, nobody, or another launcher that has started several copies."""

import json

import pytest

from llama.boundary import launch as module
from llama.boundary.command_line import run
from llama.boundary.errors import UserError
from llama.boundary.launch import Launch, is_local_rank_zero, launch, refuse_copies

WHOLE = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
KNOWN = (*module.TORCHRUN, *module.COPIES, *module.NUMBER_ON_ITS_MACHINE, "LOCAL_WORLD_SIZE", "SLURM_NTASKS",
         "SLURM_PROCID")  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """environment(NAME=value) sets these of the variables that launchers set, and no others."""

    def only(values: dict[str, str]) -> None:
        for name in KNOWN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return only


def test_all_of_torchruns_variables_mean_one_process_of_several(environment):
    environment(WHOLE | {"LOCAL_WORLD_SIZE": "8"})
    assert launch() == Launch(True, world_size=16, local_rank=1, local_world_size=8) and not is_local_rank_zero()
    environment(WHOLE)
    assert launch() == Launch(True, world_size=16, local_rank=1, local_world_size=2)
    environment({})
    assert launch() == Launch(False, world_size=1, local_rank=0, local_world_size=1) and is_local_rank_zero()


@pytest.mark.parametrize("name", WHOLE)
def test_anything_but_a_whole_set_means_one_process_and_what_is_left_over_is_named(environment, name):
    """It neither silences errors nor changes the batch size of a recipe."""
    environment({name: WHOLE[name]})
    assert launch() == Launch(ignored=(name,)) and is_local_rank_zero()
    environment({other: value for other, value in WHOLE.items() if other != name})
    assert launch() == Launch(ignored=tuple(other for other in module.TORCHRUN if other != name))
    environment(WHOLE | {name: ""})
    assert launch() == Launch(ignored=module.TORCHRUN)


@pytest.mark.parametrize("wrong", [
    {"RANK": "16"}, {"RANK": "-1"}, {"RANK": "one"}, {"RANK": " 1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "1e1"},
    {"LOCAL_RANK": "10"}, {"LOCAL_RANK": "1.0"}, {"MASTER_PORT": "0"}, {"MASTER_PORT": "65536"},
    {"WORLD_SIZE": "9" * 400},
], ids=str)  # fmt: skip
def test_numbers_that_torchrun_would_never_set_are_not_its(environment, wrong):
    environment(WHOLE | wrong)
    assert launch() == Launch(ignored=module.TORCHRUN)


@pytest.mark.parametrize("found", [
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, {"PMI_SIZE": "2", "PMI_RANK": "0"},
], ids=["srun", "second of srun", "mpirun", "mpiexec"])  # fmt: skip
def test_several_copies_are_refused_and_one_of_each_machine_says_why(environment, found):
    """`srun -n 2 python fsdp_train.py`: two runs, each of one process, that write to the same folder."""
    environment(found)
    with pytest.raises(UserError, match=r"^train.py: 2 copies of it were started .* torchrun --nproc_per_node N train"):
        refuse_copies("train.py")
    for name in module.NUMBER_ON_ITS_MACHINE:
        environment(found | {name: "1"})
        with pytest.raises(SystemExit) as stopped:
            refuse_copies("train.py")
        assert stopped.value.code == 2
    environment(found | WHOLE)  # srun starts torchrun, which starts this
    refuse_copies("train.py")


@pytest.mark.parametrize("found", [
    {}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"},
    {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {"PMI_SIZE": ""},
], ids=["nobody", "srun -n 1", "mpirun -n 1", "a script of sbatch -n 8", "empty"])  # fmt: skip
def test_one_process_is_no_copy(environment, found):
    environment(found)
    refuse_copies("train.py")


def test_torchruns_report_of_a_failure_ends_with_the_line_that_was_printed(environment, tmp_path, monkeypatch, capsys):
    def main():
        raise UserError("rows.jsonl:3: is no row")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    environment(WHOLE | {"RANK": "8", "LOCAL_RANK": "0"})
    with pytest.raises(SystemExit):
        run(main)
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert told == "rows.jsonl:3: is no row" and capsys.readouterr().err == f"{told}\n"
