"""slurm/: the flags that each job gives to the trainer, and what every job tells SLURM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

from llama.boundary.command_line import parse
from llama.data.templates import Template
from llama.training.settings import FilledSettings, TrainingSettings

JOBS = ["llama2-70b", "llama2-7b-tp8-zero1"]
# Without these a job is not started again, loses its log, or hears of the end of its time too late.
NEEDED = ["--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=B:USR1@"]


def flags(job: str, *more: str) -> FilledSettings:
    """What the job would call train.sbatch with, if `more` stood behind its name on sbatch's command line."""
    instead = 'source() { shift; printf "%s\\0" "$@"; exit; }; . "$0"'
    words = subprocess.run(["bash", "-c", instead, f"slurm/{job}.sbatch", *more], cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout.split("\0")[:-1]  # fmt: skip
    return parse(TrainingSettings, words).with_recipe(16)


@pytest.mark.parametrize("job", ["train", *JOBS])
def test_what_every_job_tells_slurm(job):
    path = ROOT / f"slurm/{job}.sbatch"
    lines = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH ")]
    for needed in NEEDED:
        assert any(line.startswith(f"#SBATCH {needed}") for line in lines), needed
    subprocess.run(["bash", "-n", path], check=True)


def test_70b_trains_as_in_the_article_about_fsdp():
    """https://huggingface.co/blog/ram-efficient-pytorch-fsdp: the command that it ends with."""
    chosen = flags("llama2-70b")
    assert (chosen.model, chosen.sharding, chosen.activation_checkpointing, chosen.dtype) == (
        "meta-llama/Llama-2-70b-chat-hf", "full", "full", "bfloat16")  # fmt: skip
    assert (chosen.max_length, chosen.batch_tokens, chosen.gradient_accumulation_steps) == (2048, 2048, 1)
    assert (chosen.max_steps, chosen.eval_every, chosen.save_every, chosen.seed) == (500, 100, 250, 100)
    assert (chosen.learning_rate, chosen.lr_schedule, chosen.warmup_ratio) == (5e-5, "cosine", 0.03)
    assert (chosen.weight_decay, chosen.max_grad_norm) == (0.01, 1.0)



def test_70b_learns_the_whole_content_of_a_row():
    template = Template("content.txt", (ROOT / "slurm/content.txt").read_text())
    segments, _ = template.render({"content": "Hello"}, "row 1")
    assert "".join(segment.text for segment in segments if segment.answer) == "Hello"


def test_7b_shares_each_layer_among_8_and_the_update_among_the_others():
    chosen = flags("llama2-7b-tp8-zero1")
    assert (chosen.sharding, chosen.tensor_parallel, chosen.data) == ("zero1", 8, "dolly:open_qa")


@pytest.mark.parametrize("job", JOBS)
def test_a_flag_behind_the_jobs_name_counts_more(job):
    assert flags(job, "--seed", "7").seed == 7 != flags(job).seed


# What the script does after the end of a step. In place of SLURM: a step that the end of the time finds running.
SRUN = """#!/bin/bash
trap 'mkdir -p "$SAVED"; exit 1' USR1
kill -USR1 "$PPID"
while :; do sleep 0.1; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo n1 || echo "$@"
"""


def after_the_time(tmp_path: Path, saved: str, srun: str = SRUN) -> tuple[int, str, str]:
    """Exit status of the job's script, stdout and stderr; meanwhile the run saves this folder."""
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    output = tmp_path / "out"
    (output / "checkpoints/step-000003").mkdir(parents=True)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": sys.prefix, "SLURM_JOB_ID": "7",
                                "SLURM_JOB_NODELIST": "n1", "SAVED": str(output / "checkpoints" / saved)}
    if not (Path(sys.prefix) / "bin/activate").is_file():
        pytest.skip(f"{sys.prefix} is no virtual environment")
    done = subprocess.run(["bash", "slurm/train.sbatch", "--output", output], cwd=ROOT, env=environment, text=True,
                          capture_output=True)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_job_whose_time_is_over_goes_back_into_the_queue_only_with_a_new_checkpoint(tmp_path_factory):
    status, told, _ = after_the_time(tmp_path_factory.mktemp("saves"), "step-000005")
    assert status == 0 and told.endswith("checkpoints/step-000005\nrequeue 7\n")
    for nothing_new in ("step-000003", "step-000005.tmp"):
        status, told, complaint = after_the_time(tmp_path_factory.mktemp("stuck"), nothing_new)
        assert status != 0 and "requeue" not in told
        assert complaint.splitlines()[-1].startswith("train.sbatch: no checkpoint was saved before the end of the time")


@pytest.mark.slow
def test_a_job_that_failed_or_finished_does_not_go_back_into_the_queue(tmp_path_factory):
    for expected in (0, 1):
        step = f"#!/bin/bash\nexit {expected}\n"
        status, told, _ = after_the_time(tmp_path_factory.mktemp("ended"), "step-000005", step)
        assert status == expected and "requeue" not in told
