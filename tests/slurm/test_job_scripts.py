"""slurm/: the flags that each job gives to the trainer, and what every job tells SLURM."""

import subprocess

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
