"""What differs from another run: from the one that --resume continues, or from the one that --config replays."""

import json
from pathlib import Path

from llama.boundary.untrusted import read_json
from llama.storage.manifest import differences
from llama.training.optim import learning_rate
from llama.training.plan import Plan
from llama.training.settings import FilledSettings

OF_THE_RATE = {"steps", "learning_rate", "lr_schedule", "warmup_ratio"}


def changes(plan: Plan) -> list[str]:
    """For run.json of a run that --allow_changed continues: after which steps which settings became others."""
    if not plan.manifest:
        return []
    before = read_json(plan.output, "run.json").get("changed") or []
    changed = differences(plan.manifest.identity, plan.identity)
    return [*before, *(f"after step {plan.first_step}: {text}" for text in changed.values())]


def said_of_replay(config: str | None, plan: Plan) -> list[str]:
    """Whether this is the same run as that of the run.json `config`: with other data, ranks or flags it may not be."""
    path = Path(config or "")
    replayed = read_json(path.parent, path.name) if config else {}
    identity = replayed.get("identity")
    if not isinstance(identity, dict):  # flags that somebody wrote by hand
        return []
    changed = [*differences(identity, json.loads(json.dumps(plan.identity))).values()]
    changed += [f"that one changed {text}" for text in replayed.get("changed") or []]
    return [f"{path}: this run differs: {'; '.join(changed)}" if changed else f"{path}: this is the same run again"]


def said_of_changes(plan: Plan, settings: FilledSettings, lines: list[dict]) -> list[str]:
    """What --allow_changed let through, and what it does to the learning rate, which is a function of the step.
    `lines`: of metrics.jsonl, before the first step that is taken now."""
    if not plan.manifest:
        return []
    changed = differences(plan.manifest.identity, plan.identity)
    said = [f"changed since then: {'; '.join(changed.values())}"] if changed else []
    first, steps = plan.first_step, plan.steps
    earlier = [line for line in lines if "learning_rate" in line]
    if earlier and first < steps and changed.keys() & OF_THE_RATE:
        rate = learning_rate(first, steps, settings.learning_rate, settings.lr_schedule, settings.warmup_ratio)
        said.append(
            f"the learning rate follows the schedule over all {steps} steps: it is {rate:.3g} in step {first + 1} and "
            f"was {earlier[-1]['learning_rate']:.3g} in step {earlier[-1]['step']}"
        )
    return said
