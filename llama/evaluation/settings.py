"""The flags of evaluate.py."""

from dataclasses import dataclass

from llama.boundary.choices import QUANTIZED
from llama.boundary.records import setting
from llama.data.sources import DataSettings


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(DataSettings):
    """what to score, and how"""

    model: str = setting(help="a Hugging Face folder, a hub id, or the folder of a run: its model, or adapter and base")
    adapter: str | None = setting(
        None, "put this LoRA adapter on the model: a folder in PEFT's format, or the folder of a run"
    )
    quantize: str = setting(
        "none", "round the linears to 8 or 4 bits, as an adapter was trained over", choices=("none", *QUANTIZED)
    )
    split: str = setting(
        "test",
        "which part to score; a single file is scored whole unless --test_fraction is given",
        choices=("train", "test"),
    )
    limit: int = setting(0, "score a fixed random choice of this many examples; 0: all", at_least=0)
    metric: str | None = setting(
        None,
        "accuracy: of the answer word; loss: of the answers; perplexity: of every token of the rendered text; accuracy "
        "where there are answer words, else loss",
        choices=("accuracy", "loss", "perplexity"),
    )
    batch_size: int = setting(16, "examples per rank and forward", at_least=1)
    dtype: str | None = setting(
        None,
        "what to compute in; bfloat16 where the device has it, else float32",
        choices=("bfloat16", "float32"),
    )
    output: str | None = setting(None, "write the metrics to this JSON file")
    predictions: str | None = setting(
        None,
        "write one JSON line per example, in the order of the file: its row, prompt, most probable answer word and its "
        "probability among the answer words; rows may lack their label; only for templates with answer words",
    )

    def checks(self):
        asked = self.predictions
        return [
            *super().checks(),
            ("adapter", "a folder", self.adapter != ""),
            ("output", "the name of a file", self.output != ""),
            ("predictions", "the name of a file", self.predictions != ""),
            ("predictions", "another file than --output", not asked or asked != self.output),
            # Without answer words nothing is predicted, and the file would be empty.
            ("predictions", "--metric accuracy with it", not asked or self.metric in (None, "accuracy")),
        ]
