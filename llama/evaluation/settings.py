"""The flags of evaluate.py and generate.py: both use a model that is trained already."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from llama.boundary.choices import QUANTIZED
from llama.boundary.records import Settings, setting
from llama.data.rows import KINDS, READERS
from llama.data.sources import DataSettings, PromptSettings
from llama.generation.settings import GenerationSettings

GENERATING = ("rouge", "exact_match")  # metrics of what the model writes
METRICS = ("accuracy", "loss", "perplexity", "multiple_choice", *GENERATING)
OF_TASKS = ("control_tokens", "seed")  # and what lm-eval's tasks do not say
OF_TEXTS = ("data", "max_length", "control_tokens")  # the settings of data that mean something for a text file


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """which model"""

    model: str = setting(
        help="a Hugging Face folder, a hub id, a checkpoint, or the folder of a run: its model, or adapter and base"
    )
    adapter: str | None = setting(
        None, "put this LoRA adapter on the model: a folder in PEFT's format, a checkpoint, or the folder of a run"
    )
    quantize: str = setting(
        "none", "round the linears to 8 or 4 bits, as an adapter was trained over", choices=("none", *QUANTIZED)
    )
    dtype: str | None = setting(
        None,
        "what to compute in; bfloat16 where the device has it, else float32",
        choices=("bfloat16", "float32"),
    )

    def checks(self):
        return [
            *super().checks(),
            ("model", "a folder or a hub id", self.model != ""),
            ("adapter", "a folder", self.adapter != ""),
        ]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ModelSettings, DataSettings, GenerationSettings):
    """what to score, and how"""

    split: str = setting(
        "test",
        "which part to score; a single file is scored whole unless --test_fraction is given",
        choices=("train", "test"),
    )
    limit: int = setting(
        0, "score a fixed random choice of this many examples, or the first windows of a text; 0: all", at_least=0
    )
    metric: str | None = setting(
        None,
        "accuracy: of the answer word; loss: of the answers; perplexity: of every token of the rendered texts, or of a "
        "text file; multiple_choice: by the likelihood of each whole answer word, or of each text of the rows' own "
        'lists, as in {"question": "What is ice?", "choices": ["water", "iron"], "answer": 0}; rouge and exact_match: '
        "the model writes an answer, which is compared with the row's; without this flag accuracy where there are "
        "answer words, else loss",
        choices=METRICS,
    )
    stride: int | None = setting(
        None,
        "by how many tokens each window of a text file goes on; a window has --max_length tokens; half of it where "
        "nothing is said",
        at_least=1,
    )
    harness: str | None = setting(
        None,
        "score on tasks of EleutherAI's lm-eval instead of --data, as in hellaswag,gsm8k; they say what is asked, and "
        "how it is answered",
    )
    harness_path: str | None = setting(None, "also know the lm-eval tasks in this folder")
    batch_size: int = setting(16, "examples per rank and forward", at_least=1)
    output: str | None = setting(None, "write the metrics to this JSON file")
    predictions: str | None = setting(
        None,
        "write one JSON line per example, in the order of the file, from which the metric can be computed again: with "
        "accuracy its row, prompt, most probable answer word and its probability among the answer words; then rows may "
        "lack their label",
    )

    @property
    def tasks(self) -> list[str]:
        return [] if self.harness is None else self.harness.split(",")

    @property
    def is_text(self) -> bool:
        """Whether the data is a text file, not rows of examples: FILE.txt, or any other if perplexity is asked for."""
        path = Path(self.data)
        if path.name.endswith(tuple(READERS)) or not path.is_file():
            return False
        return self.metric == "perplexity" or (self.metric is None and path.suffix == ".txt")

    def checks(self):
        has_tasks = self.harness is not None
        generates = self.metric in GENERATING or has_tasks
        of_rows = differing(self, DataSettings) | differing(self, GenerationSettings)
        for name in ("metric", "stride", "predictions"):
            of_rows[name] = getattr(self, name) is not None
        names_text = self.data.endswith(".txt")
        return [
            *super().checks(),
            ("output", "the name of a file", self.output != ""),
            ("predictions", "the name of a file", self.predictions != ""),
            ("predictions", "another file than --output", not are_same_file(self.predictions, self.output)),
            ("predictions", "another file than --data", not are_same_file(self.predictions, self.data)),
            ("output", "another file than --data", not are_same_file(self.output, self.data)),
            ("metric", "perplexity for a text file", self.metric in (None, "perplexity") or not names_text),
            ("stride", "a text file with --metric perplexity", self.stride is None or self.is_text),
            ("split", "rows with it, and no text file", self.split == "test" or not self.is_text),
            ("stride", "less than --max_length", self.stride is None or self.stride < self.max_length),
            *((name, f"--metric {' or '.join(GENERATING)} with it", generates or not differs)
              for name, differs in differing(self, GenerationSettings).items()),
            *((name, "rows with it, and no text file", not (self.is_text and differs))
              for name, differs in differing(self, DataSettings).items() if name not in OF_TEXTS),
            ("harness", "names of tasks", "" not in self.tasks),
            ("harness_path", "--harness with it", has_tasks or self.harness_path is None),
            ("split", "no --harness with it", not has_tasks or self.split == "test"),
            *((name, "no --harness with it, whose tasks say it", not (has_tasks and differs))
              for name, differs in of_rows.items() if name not in OF_TASKS),
        ]  # fmt: skip


def are_same_file(path: str | None, other: str | None) -> bool:
    """Whether both are given and lead to the same file, perhaps by different ways."""
    if path is None or other is None:
        return False
    return os.path.realpath(path) == os.path.realpath(other)


def differing(settings: Settings, kind: type[Settings]) -> dict[str, bool]:
    """Whether each setting of that kind differs from its default."""
    return {entry.name: getattr(settings, entry.name) != entry.default for entry in fields(kind)}


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(ModelSettings, PromptSettings, GenerationSettings):
    """what to answer, and where to"""

    prompt: str | None = setting(None, "continue this text, and print it as it comes; -: the text is on stdin")
    prompts: str | None = setting(
        None,
        f"answer the prompt of each row of this file ({KINDS}): fields of a template, or as in "
        '{"prompt": "Hello"}; the rows may lack their answers',
    )
    chat: bool = setting(False, "have a conversation: each line that you type is a turn")
    output: str | None = setting(
        None,
        "write a JSON line for each row of --prompts to this new file, in the order of the rows; after an interruption "
        "the same command goes on where it was",
    )
    stop: tuple[str, ...] = setting((), "end an answer before this text; may be given several times")
    max_length: int | None = setting(
        None,
        "cut prompts, where the template allows it, so that prompt and answer have so many tokens together; else so "
        "many as the model has positions",
        at_least=2,
    )
    batch_size: int = setting(8, "texts per rank that are continued side by side", at_least=1)
    sharding: str = setting(
        "none",
        "none: each rank holds the whole model; full: the ranks hold it together, for a model that fits no device",
        choices=("none", "full"),
    )

    def checks(self):
        asked = [name for name in ("prompt", "prompts") if getattr(self, name) is not None]
        asked += ["chat"] if self.chat else []
        return [
            *super().checks(),
            (asked[0] if asked else "prompt", "one of --prompt, --prompts and --chat", len(asked) == 1),
            ("prompts", "the name of a file", self.prompts != ""),
            ("output", "the name of a file", self.output != ""),
            ("output", "--prompts with it", self.output is None or self.prompts is not None),
            ("stop", "texts that are not empty", "" not in self.stop),
        ]
