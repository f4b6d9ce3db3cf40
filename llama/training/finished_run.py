"""A run's folder where a model or an adapter is asked for: what the run has left in it."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from llama.boundary.errors import UserError, as_user_error
from llama.boundary.launch import is_local_rank_zero
from llama.boundary.records import check_values
from llama.boundary.untrusted import read_json
from llama.data.sources import PUBLIC_DATASETS, DataSettings
from llama.evaluation.settings import EvaluationSettings
from llama.storage.settings import MergeSettings

RUN, MODEL, ADAPTER = "run.json", "model", "adapter"
HOW_PROMPTS_LOOK = ("template", "system", "control_tokens", "max_length", "truncate_side")
OfScript = TypeVar("OfScript", EvaluationSettings, MergeSettings)
WithData = TypeVar("WithData", bound=DataSettings)


def from_runs(settings: OfScript) -> OfScript:
    """The settings `model`, `adapter` and `quantize` of a script, where the first two may name a run's folder.

    --model RUN is the model that the run has left, or else its adapter on its base; --adapter RUN is the adapter alone.
    An adapter's base is rounded as it was in training. Rows become prompts as they did in training, where no flag says
    otherwise. Says what is used. Raises UserError where a run has left no such thing.
    """
    run = next((Path(name) for name in (settings.adapter, settings.model) if name and _is_run(name)), None)
    if run and isinstance(settings, DataSettings):
        settings = _with_prompts(settings, run)
    if _is_run(settings.model):
        settings = _model_of_run(settings, Path(settings.model))
    if settings.adapter and _is_run(settings.adapter):
        folder = Path(settings.adapter)
        if not (folder / ADAPTER).is_dir():
            other = "it has left a model: give it to --model" if (folder / MODEL).is_dir() else _nothing_left(folder)
            raise UserError(f"--adapter {folder}: has no {ADAPTER}/; {other}")
        settings = _with_adapter(settings, folder)
    return settings


def _is_run(path: str) -> bool:
    return (Path(path) / RUN).is_file() and not (Path(path) / "config.json").exists()


def _nothing_left(folder: Path) -> str:
    return f"a run that has not ended has checkpoints: python checkpoints.py export {folder} OUT"


def _model_of_run(settings: OfScript, folder: Path) -> OfScript:
    if (folder / MODEL).is_dir():
        _say(f"--model {folder}: using {folder / MODEL}")
        return replace(settings, model=str(folder / MODEL))
    if not (folder / ADAPTER).is_dir():
        raise UserError(f"--model {folder}: has neither {MODEL}/ nor {ADAPTER}/; {_nothing_left(folder)}")
    if settings.adapter:
        raise UserError(f"--model {folder}: has an adapter of its own, expected a base for {settings.adapter}")
    base = _setting_of_run(folder, "model")
    _say(f"--model {folder}: using its base, {base}")
    return _with_adapter(replace(settings, model=base), folder)


def _with_adapter(settings: OfScript, folder: Path) -> OfScript:
    """The adapter of a run, and its base rounded as in that run, unless --quantize asks for another rounding."""
    settings = replace(settings, adapter=str(folder / ADAPTER))
    quantize = settings.quantize
    if quantize == "none":
        quantize = _setting_of_run(folder, "quantize")
    rounded = "" if quantize == "none" else f", over linears in {quantize}"
    _say(f"--adapter {folder}: using {folder / ADAPTER}{rounded}")
    return replace(settings, quantize=quantize)


def _with_prompts(settings: WithData, folder: Path) -> WithData:
    """The run's template and what else shapes its prompts; another public data set has a template of its own."""
    with as_user_error(folder / RUN, "what a run writes"):
        of_run = read_json(folder, RUN).get("settings", {})  # an older run has fewer
        if settings.data in PUBLIC_DATASETS and settings.data != of_run.get("data"):
            return settings
        taken = {}
        for name in HOW_PROMPTS_LOOK:
            default = getattr(DataSettings, name)
            if getattr(settings, name) == default and of_run.get(name, default) != default:
                taken[name] = of_run[name]
        check_values(DataSettings, taken, folder / RUN)
    if taken:
        _say(f"prompts as in {folder}: " + ", ".join(f"--{name} {value}" for name, value in taken.items()))
    return replace(settings, **taken)


def _setting_of_run(folder: Path, name: str) -> str:
    with as_user_error(folder / RUN, "what a run writes"):
        value = read_json(folder, RUN)["settings"][name]
        if not isinstance(value, str):
            raise TypeError(f"{name} is {value!r:.100}")
    return value


def _say(line: str) -> None:
    """On stderr: stdout may be a result that another program reads."""
    if is_local_rank_zero():
        print(line, file=sys.stderr)
