"""Train the tokenizer of the `tiny` preset on the bundled sample: assets/tiny/tokenizer.model.

    python assets/make_tokenizer.py

SentencePiece with the settings of Llama's own tokenizer, only smaller: BPE, digits split, no normalisation,
unknown characters as bytes, <unk> <s> </s> = 0 1 2 and no padding token. One thread and a fixed order of the
corpus make the same bytes on every run.
"""

import json
import string
from pathlib import Path

import sentencepiece

ASSETS = Path(__file__).parent
MODEL = ASSETS / "tiny" / "tokenizer.model"
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


if __name__ == "__main__":
    write_tokenizer()
