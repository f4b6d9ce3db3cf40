"""The code in a model card: Python that loads what was exported and asks it something, and this project's commands."""

import json
import shlex

from llama.data.templates import TEMPLATES

LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)  # its eos_token_id ends an answer
"""
CHAT = """\
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""
TEXT = """\
prompt = {prompt}
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
"""
WRITE = """\
output = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
CHOOSE = """\
answers = {answers}  # and the first token of each
logits = model(**inputs).logits[0, -1]
print(max(answers, key=lambda answer: logits[answers[answer]]))
"""


def python_code(prompt: dict, base_of_adapter: str | None) -> str:
    """Python that loads what was exported, and asks it something."""
    parts = [LOAD_MODEL]
    if base_of_adapter is not None:
        parts = [LOAD_ADAPTER.format(base=json.dumps(base_of_adapter))]
    parts.append("\n")
    if prompt["prompt"] is None:
        parts += [CHAT, WRITE]
    else:
        text = json.dumps(prompt["prompt"], ensure_ascii=False)
        parts.append(TEXT.format(prompt=text))
        if prompt["answers"]:
            answers = json.dumps(prompt["answers"])
            parts.append(CHOOSE.format(answers=answers))
        else:
            parts.append(WRITE)
    return "".join(parts)


def commands(prompt: dict, identity: dict) -> str:
    """Commands that ask the exported model something, with the prompts that it was trained on."""
    model = "--model FOLDER"
    if identity["lora"] is not None:
        rounded = "" if identity["quantize"] == "none" else f" --quantize {identity['quantize']}"
        model = f"--model {shlex.quote(identity['model'])} --adapter FOLDER{rounded}"
    if prompt["prompt"] is None:
        return f"python generate.py {model} --chat"
    name = identity["template"]
    template = f"--template {name if name in TEMPLATES else 'template.txt'}"
    example = dict.fromkeys(prompt.get("fields", []), "...")
    row = json.dumps(example, ensure_ascii=False)
    lines = [f"echo {shlex.quote(row)} > rows.jsonl"]
    if name not in TEMPLATES:
        lines.insert(0, "# template.txt holds the text under Prompts")
    if prompt["answers"]:
        lines.append(f"python evaluate.py {model} {template} --data rows.jsonl --predictions answers.jsonl")
    else:
        lines.append(f"python generate.py {model} {template} --prompts rows.jsonl")
    return "\n".join(lines)
