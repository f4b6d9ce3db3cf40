"""A small base model whose tokenizer is a tokenizer.json with control tokens for chats, and conversations for it."""

import json
from pathlib import Path

from llama.data.encoding import encode_rows
from llama.data.tokenizer import Tokenizer
from llama.model import Llama, ModelConfig
from llama.storage.base import config_to_json
from llama.storage.companions import Companions
from llama.storage.pretrained import export_model, initialize_weights

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1 and 2
CONFIG = ModelConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
                     initializer_range=0.1)  # fmt: skip
MESSAGES = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi there!"}]
OLD_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_tokenizer(folder: Path, **settings) -> Path:
    """tokenizer.json (bytes, and three control tokens) and a tokenizer_config.json of a base: it ends in END."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Codec

    vocab = {token: id for id, token in enumerate([END, TURN, TURN_END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    codec = Codec(models.BPE(vocab, merges=[]))
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = decoders.ByteLevel()
    codec.add_special_tokens([AddedToken(token, special=True) for token in (END, TURN, TURN_END)])
    folder.mkdir(parents=True, exist_ok=True)
    codec.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_base(folder: Path, **settings) -> Path:
    """The same with random weights, and a generation_config.json."""
    source = write_tokenizer(folder.with_name("source"), **settings)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.5}))
    model = Llama(CONFIG)
    initialize_weights(model, 0)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    export_model(model, folder, config_to_json(CONFIG) | {"eos_token_id": 0}, Companions(files))
    return folder


def trained_prompt(renderer, tokenizer: Tokenizer, messages: list[dict] = MESSAGES) -> list[int]:
    """The ids that come before the last answer, as an example of training has them."""
    segments, _ = renderer.render({"messages": messages}, "row")
    encoded = encode_rows([segments], tokenizer, 256, "right")[0]
    last = max(i for i, is_answer in enumerate(encoded.is_answer) if is_answer)
    while encoded.is_answer[last]:
        last -= 1
    return encoded.ids[: last + 1]
