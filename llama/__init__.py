"""A Llama, and what is needed to train and run one, in eight rooms. A room imports only rooms above it in this list:

    model        what a Llama computes; imports torch and nothing else of this project
    boundary     how what comes from outside is checked (flags, JSON files, folders, downloads); how a script starts
                 and stops, and what it prints
    data         from a row in a file to a packed stream of tokens and labels
    parallel     several processes, and what each holds of a model
    generation   from a prompt to text
    storage      files of weights: pretrained folders, adapters, checkpoints, and what lies beside them
    evaluation   how good a model is
    training     one run: its flags and their ranges (settings.py), plan, optimizer, report, pictures, tracking

The scripts above the rooms tell one story each. fsdp_train.py trains, generate.py answers, evaluate.py scores,
checkpoints.py lists and exports what a run has saved. lora.py is LoRA, and merges an adapter; data.py is the data sets,
and shows one.

The life of one review, `python fsdp_train.py --data imdb`, from a row in a file to a checkpoint:

    1  row         {"text": "A dull film.", "label": 0} is read from train.jsonl        data/rows.py, text_rows.py
    2  segments    the prompt around the text; apart from it, the answer " negative"    data/templates.py, rendering.py
    3  ids         each segment is encoded alone; the ids of the answer are the labels  data/encoding.py
    4  example     ids and labels of all rows lie end to end in a file, encoded once    data/examples.py
    5  batch       (seed, step) choose the examples; they are packed into one stream    data/batches.py
    6  loss        a sum over labels, divided once by the labels of all ranks           fsdp_train.py, model/loss.py
    7  update      gradients are summed over ranks, clipped; AdamW changes each shard   training/optim.py
    8  checkpoint  each rank writes its slices; a rename makes the folder appear whole  storage/slices.py, atomic.py

A conversation takes another way from 1 to 3: its turns are read by data/conversation.py, and data/layouts.py writes
them as segments; data/chat_template.py compares the prompts with those of the model's own chat template.

The life of one prompt, `python generate.py --model runs/imdb-tiny --prompts mine.jsonl`, from a row to its answer:

    1  prompt      the segments before the answer, encoded as in 2 and 3 above          data/prompting.py
    2  prefill     unequal prompts are one packed stream; keys and values are kept      generation/kv_cache.py
    3  choice      scores of the last token: penalties, filters; the best, or a draw    generation/scores.py, beams.py
    4  step        one token of each living text; a text that ends leaves at once       generation/decode.py, step.py
    5  text        ids become whole characters, up to a stop text; a line of JSON       generation/text.py, generate.py

What to read in an hour, in this order: model/ (config, norm, rope, attention, packed, mlp, embedding, loss, decoder),
data/batches.py, parallel/distribute.py, lora.py, training/optim.py, and fsdp_train.py from top to bottom. The other
files check input, read and write files, and report; you can understand training without reading them.

One legend of shapes holds everywhere:

    T  tokens in the stream          D  hidden_size             H  head_dim
    R  tokens before a label         F  intermediate_size       N  query heads
    S  keys a block may see          V  vocab_size              K  key/value heads
    G  query heads that share one key/value head: N / K
"""

__version__ = "0.1.0"
