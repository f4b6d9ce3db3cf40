"""Files that are not what their names say, and folders of other formats: what they are, and the way out."""

import re
from pathlib import Path

from llama.boundary.errors import UserError

HEAD = 1024  # bytes that are looked at
# How the content of a file begins, and what it then is.
BEGINNINGS = {
    rb"version https://git-lfs": "a git-lfs pointer, expected the file itself: run `git lfs pull` where it was cloned",
    rb"(?i)\s*<(!doctype|html|head|body|\?xml)": "a web page, expected the file itself: download it again",
    rb"GGUF": "a GGUF file of llama.cpp, expected the Hugging Face folder that it was made from",
    rb"PK\x03\x04": "a zip archive, perhaps a pickle of torch.save, expected the format of its name",
}
# What a folder may have in place of weights that can be read, as {pattern of file names: what it is, and what to do}.
PICKLE = "a pickle, which can run code when it is opened"
CONVERT = "convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
OTHER_FORMATS = {
    "{stem}-*-of-*.safetensors": "a shard without {stem}.safetensors.index.json, download that file, too",
    "pytorch_model*.bin": f"{PICKLE}; {CONVERT}",
    "adapter_model*.bin": f"{PICKLE}; where you trust it, load it with PEFT and save it again",
    "consolidated*.pth": "weights in Meta's format, take the model's Hugging Face folder, or convert it with "
    "transformers' convert_llama_weights_to_hf.py",
    "*.gguf": "a file of llama.cpp, take the Hugging Face folder that it was made from",
}
OF_RUNS = {
    "step-*": "a checkpoint of a run, which evaluate.py and generate.py take as --model or --adapter",
    "run.json": "the record of a run, give its model/ as --model, or its adapter/ as --adapter beside its base",
    "manifest.json": "a checkpoint's, write a model or adapter from it: python checkpoints.py export RUN OUT "
    "--step step-N",
}
ADAPTER = {"adapter_config.json": "an adapter, give its base's folder as --model and this one as --adapter"}


def refuse_foreign_file(path: Path, is_binary: bool = False) -> None:
    """Raises UserError if the content of the file is known to be something else; `is_binary`: also if it is text.

    A file that cannot be read passes: whoever reads it next says why.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return
    refuse_foreign_content(path, head)
    text = head.decode("latin-1").strip()
    if is_binary and text.isascii() and "".join(text.split()).isprintable() and text:
        raise UserError(f"{path}: is text that begins {text[:60]!r}, expected the file itself: download it again")


def refuse_foreign_content(where: str | Path, content: bytes) -> None:
    """Raises UserError if a file with this content is known to be something else than was asked for."""
    for beginning, description in BEGINNINGS.items():
        if re.match(beginning, content[:HEAD]):
            raise UserError(f"{where}: is {description}")


def described_folder(folder: Path, stem: str = "model") -> str:
    """What a folder has in place of `stem`.safetensors, and the way out, as the rest of a sentence; "" if nothing."""
    formats = OTHER_FORMATS | OF_RUNS | (ADAPTER if stem == "model" else {})
    for pattern, description in formats.items():
        found = sorted(folder.glob(pattern.format(stem=stem)))
        if found:
            return f"; it has {found[0].name!r:.100}, {description.format(stem=stem)}"
    return ""
