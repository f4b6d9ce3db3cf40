"""The folder of one run: a new one for every run, and the same one for a run that is resumed."""

from pathlib import Path

from llama.boundary.errors import UserError, reason


def choose_folder(wanted: str | None, default: str, resume: bool) -> Path:
    """Make and name the folder of this run. An existing folder is only ever continued, and only when asked.

    Without `wanted`: `default`, or the first free name of default-2, default-3, ...; to resume, the newest of those.
    Raises UserError for a wanted folder that is taken, for --resume where there is no run, and for a folder that cannot
    be made.
    """
    if wanted is not None:
        return _wanted_folder(Path(wanted), resume)
    names = [default, *(f"{default}-{number}" for number in range(2, 10_000))]
    if not resume:
        return next(Path(name) for name in names if _make(Path(name), exist_ok=False))
    existing = [name for name in names if Path(name).exists()]
    if not Path(default).exists():
        raise UserError(f"--resume: there is no run to continue at {default}; start one without --resume")
    return _holding_a_run(Path(existing[-1]))


def _wanted_folder(folder: Path, resume: bool) -> Path:
    if resume:
        _holding_a_run(folder)
    elif folder.exists():
        # A run that was killed as it began can leave a file that had only its temporary name.
        taken = not folder.is_dir() or any(path.suffix != ".tmp" for path in folder.iterdir())
        if taken:
            raise UserError(f"--output {folder}: exists already; name another folder, or continue it with --resume")
    _make(folder, exist_ok=True)
    return folder


def _holding_a_run(folder: Path) -> Path:
    if not (folder / "run.json").is_file():
        raise UserError(f"--resume: {folder} holds no run (no run.json); start one without --resume")
    return folder


def _make(folder: Path, exist_ok: bool) -> bool:
    """False when the folder exists already: perhaps another run started at the same moment."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"--output {folder}: {reason(error)}") from None
    return True
