"""A Llama, and what is needed to train and run one. Read the files in this order; each is one idea.

    errors      mistakes told in one line
    folder      reading what a stranger may have made: only a folder's own files, only so much of them
    config      the shape of a model, from config.json
    norm        RMSNorm                                                  x -> x of unit size
    rope        rotary positions                                         angles, and turning q and k by them
    attention   grouped-query attention                                  q, k, v and back
    packed      which token may look at which; attention over documents laid end to end
    mlp         SwiGLU
    embedding   a token's vector, with an exact gradient
    loss        cross-entropy without all the logits
    model       the decoder: all of the above in a residual stream
    tokenizer   text <-> ids, for three kinds of file
    rows        JSONL and Parquet, one row after the other; what is wrong with one is told beside it
    templates   a row as segments of text: prompt and answer, from a text with {fields}
    chat        a conversation as segments: four layouts
    together    ranks that fail together
    durable     files and folders that appear whole or not at all
    cache       folders that are made once per content
    encoding    segments -> ids and labels, kept in memory-mapped files
    batches     which examples when, on which rank, packed how
    slices      safetensors files in which each rank reads and writes only its own part
    quantize    frozen linears in 8 or 4 bits a weight
    pretrained  Hugging Face folder <-> model, through slices
    adamw8bit   AdamW with moments of a byte each
    optim       AdamW's groups, the learning rate, the gradient's norm
    parallel    processes, devices, FSDP2, compile, recomputed activations: applied from outside
    hub, cli    downloads; settings as flags
    checkpoint  saved states that exist whole or not at all, proved by digests; the command that lists them
    interruption   being asked to stop: SIGTERM, SIGUSR1
    journal     the folder of a run: metrics, loss curve
    plan        what the ranks agree on before anything is built

then `data.py` (the data sets by name, and a look at them), `lora.py` (adapters), `evaluate.py`, and `fsdp_train.py`,
which tells the story with all of them. One legend of shapes holds for the package:

    T  tokens in the stream          D  hidden_size             H  head_dim
    R  rows with a label             F  intermediate_size       N  query heads
    S  keys a block may see          V  vocab_size              K  key/value heads
"""

from llama.data.tokenizer import load_tokenizer
from llama.model.config import ModelConfig
from llama.model.decoder import Llama
from llama.model.packed import PackedDocuments

__all__ = ["Llama", "ModelConfig", "PackedDocuments", "load_tokenizer"]
