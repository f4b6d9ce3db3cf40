"""The flags of lora.py, which merges an adapter into its base, and of checkpoints.py."""

from argparse import Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

from llama.boundary.choices import QUANTIZED
from llama.boundary.command_line import Parser
from llama.boundary.records import Settings, setting

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class MergeSettings(Settings):
    """what to merge"""

    model: str = setting(help="the base: a Hugging Face folder, or a hub id")
    adapter: str = setting(
        help="folder with adapter_config.json and adapter_model.safetensors, a checkpoint, or the folder of a run"
    )
    output: str = setting(help="the Hugging Face folder to write")
    quantize: str = setting("none", "what the adapter's base was rounded to in training", choices=("none", *QUANTIZED))
    dtype: str | None = setting(None, "of the weights; default: the base's", choices=WEIGHT_DTYPES)


EXAMPLES = {
    "list": "python checkpoints.py list runs/imdb-tiny",
    "verify": "python checkpoints.py verify runs/imdb-tiny --step step-000100",
    "export": "python checkpoints.py export runs/imdb-tiny best-model --step best",
}


def parse_command(description: str) -> Namespace:
    """What is asked of checkpoints.py. Raises UserError for a mistake."""
    parser = Parser(description=description, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, help_text in (
        ("list", "what is there"),
        ("verify", "is it whole: reads every byte"),
        ("export", "write what the run would have left, had it ended there"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text, epilog=f"example: {EXAMPLES[name]}")
        command.add_argument("run", type=Path, help="the run's folder")
        if name == "export":
            command.add_argument("out", type=Path, help="the folder to make")
            command.add_argument("--model", help="folder of the base model, if it has moved since the run")
            help_text = "of a model's weights (default: the base's)"
            command.add_argument("--dtype", choices=WEIGHT_DTYPES, help=help_text)
        if name != "list":
            command.add_argument("--step", help="step-N, newest or best (default: newest; verify: all)")
    return parser.parse_args()
