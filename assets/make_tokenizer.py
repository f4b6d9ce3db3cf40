"""Train the tokenizer of the `tiny` preset on the bundled sample, and write the three files of assets/tiny.

    python assets/make_tokenizer.py

tokenizer.model is SentencePiece's. tokenizer.json gives the same ids: the `tokenizers` library, transformers and this
project read it. tokenizer_config.json tells transformers to use it as it is, and which tokens begin and end a text.

SentencePiece with the settings of Llama's own tokenizer, only smaller: BPE, digits split, no normalisation,
unknown characters as bytes, <unk> <s> </s> = 0 1 2 and no padding token. One thread and a fixed order of the
corpus make the same bytes on every run.
"""

import json
import string
from pathlib import Path

import sentencepiece

ASSETS = Path(__file__).parent
FOLDER = ASSETS / "tiny"
MODEL = FOLDER / "tokenizer.model"
VOCABULARY = 1280  # enough for every word of the reviews to be one piece
# The prompt of --data imdb frames every example, so its words and both labels must be single pieces:
# repeated this often they win their merges before any word of the reviews.
PROMPT_REPEATS = 2000
PROMPT = """Given a movie review/comment by a user in following format:
#### Movie review:
<review>
#### Answer:
<answer>
Please rate the movie review as positive or negative from the perspective of the user's overall personal \
feelings to the movie. Answer it with only 'positive' or 'negative' without any explanation.
#### Answer: positive
#### Answer: negative"""


def corpus():
    """The lines to train on: the prompt with its labels, again and again, then every training review."""
    reviews = (ASSETS / "imdb_sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return PROMPT.splitlines() * PROMPT_REPEATS + [json.loads(row)["text"] for row in reviews]


def write_tokenizer(path=MODEL):
    """Train on the corpus and write the model file."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=file, model_type="bpe", vocab_size=VOCABULARY,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
            split_digits=True, byte_fallback=True, character_coverage=1.0,
            # Every ASCII character is a piece, so that any English text stays short and readable.
            required_chars=string.ascii_letters + string.digits + string.punctuation,
            allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            num_threads=1, minloglevel=2,
        )


def tokenizer_json(codec):
    """The same tokenizer as the document of a tokenizer.json."""
    pieces = {codec.id_to_piece(id): id for id in range(codec.vocab_size())}  # the sooner learned, the lower the id
    control = [piece for piece, id in pieces.items() if codec.is_control(id) or codec.is_unknown(id)]
    # SentencePiece joins two neighbours if together they are a piece, and first those whose piece was learned first.
    # So every way to split a piece into two pieces is a merge.
    merges = []
    for piece in pieces:
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [f"{left} {right}" for left, right in splits if left in pieces and right in pieces]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}  # add_dummy_prefix
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": pieces[piece], "content": piece, **flags} for piece in control],
        "normalizer": {"type": "Sequence", "normalizers": [prefix, space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [pieces["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": pieces,
            "merges": merges,
        },
    }


def write_json(folder=FOLDER):
    """Write the two JSON files beside the model file."""
    codec = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    for name, values in (("tokenizer.json", tokenizer_json(codec)), ("tokenizer_config.json", settings)):
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_tokenizer()
    write_json()
