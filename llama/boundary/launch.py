"""How this process was started: by torchrun, as one of several; alone; or by mistake as one of several copies."""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llama.boundary.errors import UserError

# torchrun sets all of these. Some of them alone are left over from another launcher, or from an earlier session.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How many copies of a command srun, mpirun and MPICH's mpiexec have started. A script of sbatch is one process, also
# where SLURM_NTASKS is 8: only SLURM's count for this step, which srun sets, counts copies.
COPIES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
NUMBER_ON_ITS_MACHINE = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


@dataclass(frozen=True)
class Launch:
    """What torchrun says of this process; without torchrun, what holds for a process that is alone."""

    by_torchrun: bool = False
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    ignored: tuple[str, ...] = ()  # variables of torchrun's that are set although torchrun has not started this


def launch() -> Launch:
    """Read torchrun's variables. Anything but a complete set of them with possible values means one process."""
    rank, size, local, port = map(_number, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    alone = Launch(ignored=tuple(name for name in TORCHRUN if name in os.environ))
    if rank is None or size is None or local is None or port is None or not os.environ.get("MASTER_ADDR"):
        return alone
    if not local <= rank < size or not 0 < port < 1 << 16:
        return alone
    return Launch(True, size, local, _number("LOCAL_WORLD_SIZE") or local + 1)


def is_local_rank_zero() -> bool:
    """Whether this is the one process of its machine that reports; known before the processes have joined."""
    return launch().local_rank == 0


def tell_torchrun(problem: str) -> None:
    """Put the line where torchrun looks for what went wrong: its report then ends with it.

    The file's format: https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if launch().by_torchrun and path:
        about = {"message": {"message": problem, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(about))


def refuse_copies(script: str) -> None:
    """Raises UserError where a launcher other than torchrun has started several processes: each would do all the work,
    and all would write to the same folder. One copy of each machine raises it, the others end with status 2."""
    if launch().by_torchrun:
        return
    counts = {name: _number(name) or 1 for name in COPIES}
    if _number("SLURM_PROCID"):  # above 0: not the script of sbatch
        counts["SLURM_NTASKS"] = _number("SLURM_NTASKS") or 1
    for name, count in counts.items():
        if count > 1:
            if any(_number(other) for other in NUMBER_ON_ITS_MACHINE):
                raise SystemExit(2)
            raise UserError(
                f"{script}: {count} copies of it were started ({name} is {count}), and each would do all the work; "
                f"start one torchrun on each machine instead: torchrun --nproc_per_node N {script} ..., or one copy"
            )


def _number(name: str) -> int | None:
    """The whole number in a variable; None where there is none."""
    text = os.environ.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
