"""What a run leaves, where a model or an adapter is asked for: its folder, its model/ or adapter/, or a checkpoint."""

import sys
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from llama.boundary.errors import UserError, as_user_error
from llama.boundary.hub import find_model
from llama.boundary.launch import is_local_rank_zero
from llama.boundary.records import check_values
from llama.boundary.untrusted import read_json
from llama.data.chat import LAYOUTS
from llama.data.sources import PUBLIC_DATASETS
from llama.storage.manifest import checkpoint_at, find, read_manifest

RUN, MODEL, ADAPTER = "run.json", "model", "adapter"
HOW_PROMPTS_LOOK = ("template", "system", "control_tokens", "max_length", "truncate_side")


class NamesModel(Protocol):
    """The settings of a script that uses a model, and perhaps an adapter on it."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def model(self) -> str: ...

    @property
    def adapter(self) -> str | None: ...

    @property
    def quantize(self) -> str: ...


OfScript = TypeVar("OfScript", bound=NamesModel)


@dataclass(frozen=True)
class Left:
    """What a path given to a flag leads to: a part of a run. `settings`: those of the run."""

    given: str
    path: Path
    is_adapter: bool
    settings: dict
    where: Path  # the file that holds them

    def setting(self, name: str) -> str:
        with as_user_error(self.where, "what a run writes"):
            value = self.settings[name]
            if not isinstance(value, str):
                raise TypeError(f"{name} is {value!r:.100}")
        return value


def from_runs(settings: OfScript) -> OfScript:
    """The settings `model`, `adapter` and `quantize` of a script, where the first two may name what a run has left.

    --model RUN is the model in the run's folder, or else its adapter on its base, or else, where the run has not ended,
    its newest checkpoint; --adapter RUN is the adapter alone. A checkpoint, model/ or adapter/ may be named as well. An
    adapter's base is rounded as it was in training. Rows become prompts as they did in training, where no flag says
    otherwise. Says what is used. Raises UserError where a run has left no such thing.
    """
    model, adapter = _left_at(settings.model, "model"), None
    if settings.adapter:
        adapter = _left_at(settings.adapter, "adapter")
        if adapter and not adapter.is_adapter:
            raise UserError(f"--adapter {settings.adapter}: holds a model, expected an adapter; give it as --model")
    of_prompts = adapter or model
    if of_prompts:
        settings = _with_prompts(settings, of_prompts)
    if model and model.is_adapter:
        if settings.adapter:
            problem = f"has an adapter of its own, expected a base for {settings.adapter}"
            raise UserError(f"--model {settings.model}: {problem}")
        base = model.setting("model")
        _say(f"--model {settings.model}: using its base, {base}")
        try:
            find_model(base)
        except UserError as error:
            way_out = f"if the base has moved, --model FOLDER --adapter {settings.model}"
            raise UserError(f"{error}; {way_out}") from None
        settings, adapter = replace(settings, model=base), model
    elif model:
        settings = _with_path(settings, "model", model)
    return _with_adapter(settings, adapter) if adapter else settings


def _left_at(given: str, flag: str) -> Left | None:
    """What a run has left at this path; None for a path that leads to no part of a run."""
    saved = checkpoint_at(given)
    if saved:
        return _left_in_checkpoint(given, saved)
    folder = Path(given)
    if _is_run(folder):
        return _left_in_run(given, folder, flag)
    if folder.name in (MODEL, ADAPTER) and folder.is_dir() and _is_run(folder.parent):
        return Left(given, folder, folder.name == ADAPTER, _settings_of(folder.parent), folder.parent / RUN)
    return None


def _is_run(folder: Path) -> bool:
    return (folder / RUN).is_file() and not (folder / "config.json").exists()


def _left_in_run(given: str, run: Path, flag: str) -> Left:
    """The model, or else the adapter, or else the newest checkpoint."""
    wanted = (ADAPTER,) if flag == "adapter" else (MODEL, ADAPTER)
    for name in wanted:
        if (run / name).is_dir():
            return Left(given, run / name, name == ADAPTER, _settings_of(run), run / RUN)
    neither = f"has neither {MODEL}/ nor {ADAPTER}/"
    if (run / MODEL).is_dir():
        raise UserError(f"--adapter {given}: has no {ADAPTER}/; it has left a model: give it to --model")
    newest = find(run / "checkpoints", "newest")
    if not newest:
        raise UserError(f"--{flag} {given}: {neither}, nor a checkpoint: the run has not come so far")
    _say(f"--{flag} {given}: {neither}, because the run has not ended; taking its newest checkpoint")
    return _left_in_checkpoint(given, newest)


def _left_in_checkpoint(given: str, saved: Path) -> Left:
    manifest = read_manifest(saved)
    origin = manifest.origin(saved)
    run, is_adapter = saved.parents[1], origin.lora is not None
    if (run / RUN).is_file():  # an identity does not tell what --system default has inserted
        settings = _settings_of(run) | {"model": origin.model, "quantize": origin.quantize}
        return Left(given, saved, is_adapter, settings, run / RUN)
    return Left(given, saved, is_adapter, manifest.identity, saved)


def _settings_of(run: Path) -> dict:
    with as_user_error(run / RUN, "what a run writes"):
        return {**read_json(run, RUN).get("settings", {})}


def _with_path(settings: OfScript, flag: str, left: Left, remark: str = "") -> OfScript:
    """With the part of the run in place of what was given."""
    if str(left.path) != left.given or remark:
        _say(f"--{flag} {left.given}: using {left.path}{remark}")
    return replace(settings, **{flag: str(left.path)})


def _with_adapter(settings: OfScript, adapter: Left) -> OfScript:
    """The adapter of a run, and its base rounded as in that run, unless --quantize asks for another rounding."""
    quantize = settings.quantize
    if quantize == "none":
        quantize = adapter.setting("quantize")
    rounded = "" if quantize == "none" else f", over linears in {quantize}"
    return replace(_with_path(settings, "adapter", adapter, rounded), quantize=quantize)


def _with_prompts(settings: OfScript, left: Left) -> OfScript:
    """The run's template and what else shapes its prompts; another public data set has a template of its own, a text
    file has none, and lm-eval's tasks have theirs."""
    if getattr(settings, "is_text", False) or getattr(settings, "harness", None) is not None:
        return settings
    defaults = {entry.name: entry.default for entry in fields(settings) if entry.name in HOW_PROMPTS_LOOK}
    data_set = str(getattr(settings, "data", "")).partition(":")[0]
    if data_set in PUBLIC_DATASETS and data_set != str(left.settings.get("data")).partition(":")[0]:
        return settings
    taken = {}
    for name, default in defaults.items():
        of_run = left.settings.get(name, default)  # an older run has fewer
        if getattr(settings, name) == default and of_run != default:
            taken[name] = of_run
    templates = {left.settings.get("template"), taken.get("template", getattr(settings, "template", None))}
    if getattr(settings, "system", "") is None and templates <= {"chat", *LAYOUTS}:
        taken.setdefault("system", "none")  # also where the chat template of an adapter's base inserts one
    check_values(type(settings), taken, left.where)
    if taken:
        run = left.where.parent if left.where.name == RUN else left.where
        _say(f"prompts as in {run}: " + ", ".join(f"--{name} {value}" for name, value in taken.items()))
    return replace(settings, **taken)


def _say(line: str) -> None:
    """On stderr: stdout may be a result that another program reads."""
    if is_local_rank_zero():
        print(line, file=sys.stderr)
