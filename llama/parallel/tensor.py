"""Tensor parallelism: the ranks of a tensor group compute one layer together, each with its part of every matrix.

One layer on two ranks; what lies on the left is computed by rank 0, on the right by rank 1:

    stream         rows of the first tokens      rows of the last tokens
    norm                       |                             |
                               +-------- all-gather ---------+
    q, k, v              heads 0 and 1                 heads 2 and 3          rows of the weights
    attention            heads 0 and 1                 heads 2 and 3
    o_proj               a partial sum                 a partial sum          columns of the weight
                               +------ reduce-scatter -------+
    stream + norm              |                             |
                               +-------- all-gather ---------+
    gate, up             first features                last features          rows of the weights
    down_proj            a partial sum                 a partial sum          columns of the weight
                               +------ reduce-scatter -------+
    stream         rows of the first tokens      rows of the last tokens

Between a cut by rows and one by columns nothing has to be sent: a head, or a feature, needs no other one. Where a
weight is whole on each rank (norms), tokens are split instead, so nothing is computed twice.
Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053; Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198

Each module changes its class instead of being wrapped (FSDP does the same): parameter names stay.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from llama.boundary.errors import UserError
from llama.model import Llama
from llama.model.attention import Attention, AttentionContext
from llama.model.decoder import DecoderLayer
from llama.model.mlp import MLP
from llama.model.quantize import WEIGHTS_PER_SCALE, NF4Linear
from llama.parallel.processes import Process
from llama.parallel.shards import TensorCut, tensor_cut
from llama.parallel.split_stream import gather_rows, sum_rows
from llama.parallel.vocabulary import SplitEmbedding, SplitHead, SplitLlama


class GatheringAttention(Attention):
    """Attention by this rank's heads, over all tokens: x has this rank's rows of the stream."""

    tensor_group: dist.ProcessGroup

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        x = gather_rows(x, self.tensor_group, len(cos))
        return super().forward(x, cos, sin, context)


class GatheringMLP(MLP):
    """This rank's features of all tokens: x has this rank's rows of the stream."""

    tensor_group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        x = gather_rows(x, self.tensor_group)  # with padding: no row of an MLP reads another row
        return super().forward(x)


class LastLayer(DecoderLayer):
    """The last layer's output is the whole stream, because the model chooses rows of it."""

    tensor_group: dist.ProcessGroup

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        x = super().forward(x, cos, sin, context)
        return gather_rows(x, self.tensor_group, len(cos))


class SummingLinear(nn.Linear):
    """A linear that has some columns of its weight: x (T, own columns) -> this rank's rows of the stream (.., out)."""

    tensor_group: dist.ProcessGroup
    own: range  # the columns of this rank
    whole_size: int  # how many columns the whole weight has
    dropout: float  # of its adapter

    def forward(self, x: Tensor) -> Tensor:
        partial = super().forward(x)
        if self.bias is not None and self.tensor_group.rank() > 0:
            partial = partial - self.bias  # a bias is added once, not by each rank
        return sum_rows(partial, self.tensor_group)

    def drop(self, x: Tensor) -> Tensor:
        """An adapter's dropout. All ranks draw the mask of all columns, so that their random numbers stay the same."""
        mask = F.dropout(x.new_ones(len(x), self.whole_size), self.dropout, self.training)
        return x * mask[:, self.own.start : self.own.stop]

    @torch.compiler.disable
    def lengths(self, rows: Tensor) -> Tensor:
        """What DoRA asks an adapter's linear for: the length of each whole row (out), from this rank's columns."""
        squares = rows.square().sum(dim=1)
        dist.all_reduce(squares, group=self.tensor_group)
        return squares.sqrt()


# The dimension in which a parameter is cut. What is not cut, every rank of the group has whole.
ROWS = 0
COLUMNS = 1
WHOLE = None


@dataclass(frozen=True)
class Rule:
    """What is done to every module with this name. A key/value head is one unit with the query heads that read it."""

    module: str
    dim: int | None  # the dimension in which the weight is cut
    unit: str  # what stays whole: of n units, rank i gets those from i * n // ranks up to the first of rank i + 1
    becomes: type[nn.Module] | None = None  # the module's new class, which also sends what the last column says


RULES = (
    #    module           weight   unit                  new class             what it sends
    Rule("embed_tokens",  ROWS,    "token ids",          SplitEmbedding),      # reduce-scatter at its end
    Rule("self_attn",     WHOLE,   "",                   GatheringAttention),  # all-gather at its start
    Rule("q_proj",        ROWS,    "key/value heads"),
    Rule("k_proj",        ROWS,    "key/value heads"),
    Rule("v_proj",        ROWS,    "key/value heads"),
    Rule("o_proj",        COLUMNS, "key/value heads",    SummingLinear),       # reduce-scatter at its end
    Rule("mlp",           WHOLE,   "",                   GatheringMLP),        # all-gather at its start
    Rule("gate_proj",     ROWS,    "features"),
    Rule("up_proj",       ROWS,    "features"),
    Rule("down_proj",     COLUMNS, "features",           SummingLinear),       # reduce-scatter at its end
    Rule("lm_head",       ROWS,    "token ids",          SplitHead),           # all-gather, if a caller wants logits
)  # fmt: skip

# How the parameters of a linear are cut.
PARAMETERS = {
    #                              weight cut by rows   by columns
    "weight":                       (ROWS,              COLUMNS),
    "bias":                         (ROWS,              WHOLE),
    "weight_absmax":                (ROWS,              COLUMNS),  # of 64 weights of a row, in nf4
    "weight_scale":                 (ROWS,              WHOLE),    # of a row, in int8 and nf4
    "lora_A.weight":                (WHOLE,             COLUMNS),  # y = B A x: A has the columns of the weight
    "lora_B.weight":                (ROWS,              WHOLE),    # and B its rows
    "lora_magnitude_vector.weight": (ROWS,              WHOLE),
}  # fmt: skip


def dimension_of_cut(name: str) -> int | None:
    """In which dimension the parameter of that name is cut."""
    for rule in RULES:
        _, found, key = name.partition(f"{rule.module}.")
        if found and rule.dim is not WHOLE:
            return PARAMETERS[key][rule.dim]
    return WHOLE


def cut(model: Llama, process: Process) -> None:
    """Leave to this rank its part of a model on the meta device, in place. A tensor group of one rank has all of it.

    Call it after `quantize`, adapters and freezing, and before compiling, activation checkpointing and FSDP. Raises
    UserError for a model that so many ranks cannot share.
    """
    group = process.mesh["tensor"].get_group()
    if group.size() == 1:
        return
    counts = unit_counts(model, group.size())
    for name, module in list(model.named_modules()):
        for rule in RULES:
            if rule.module == name.rpartition(".")[2]:
                follow(rule, module, counts.get(rule.unit, 1), group)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # each was cut by its rule; it is one parameter again
    become(model.layers[-1], LastLayer, tensor_group=group)
    whole = TensorCut(WHOLE, 0, 0, group.rank(), group.size())
    cuts = {name: tensor_cut(parameter) or whole for name, parameter in model.named_parameters()}
    heads = own_range(model.config.num_key_value_heads, counts["key/value heads"], group)
    become(model, SplitLlama, tensor_group=group, tensor_cuts=cuts, key_value_heads=len(heads))


def unit_counts(model: Llama, ranks: int) -> dict[str, int]:
    """How many units there are to share. Raises UserError for a model that so many ranks cannot share."""
    config = model.config
    is_packed = any(isinstance(module, NF4Linear) for module in model.modules())
    block = WEIGHTS_PER_SCALE if is_packed else 1  # columns that nf4 packs together
    columns = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    if ranks > 1 and columns % block:
        problem = f"o_proj has {columns} columns for each key/value head, expected a multiple of {block}"
        raise UserError(f"--tensor_parallel {ranks} --quantize nf4: {problem}; use --quantize int8")
    counts = {
        "key/value heads": config.num_key_value_heads,
        "features": config.intermediate_size // block,
        "token ids": config.vocab_size,
    }
    for unit, count in counts.items():
        if count < ranks:
            what = f"blocks of {block} features" if is_packed and unit == "features" else unit
            expected = f"expected at least {ranks}, one for each rank"
            raise UserError(f"--tensor_parallel {ranks}: the model has {count} {what}, {expected}")
    return counts


def own_range(whole_size: int, count: int, group: dist.ProcessGroup) -> range:
    """This rank's indices in a dimension of `whole_size` rows or columns, which are `count` units of the same size."""
    unit = whole_size // count
    first = group.rank() * count // group.size()
    end = (group.rank() + 1) * count // group.size()
    return range(first * unit, end * unit)


def follow(rule: Rule, module: nn.Module, count: int, group: dist.ProcessGroup) -> None:
    """Do to one module what a rule says. `count`: how many of the rule's units the whole module has."""
    about: dict = {"tensor_group": group}
    if rule.dim is not WHOLE:
        cut_parameters(module, rule.dim, count, group)
        # The module's own name for the size of that dimension.
        size = "num_embeddings" if isinstance(module, nn.Embedding) else ("out_features", "in_features")[rule.dim]
        about["whole_size"] = getattr(module, size)
        about["own"] = own_range(about["whole_size"], count, group)
        about[size] = len(about["own"])
    become(module, rule.becomes, **about)


def cut_parameters(module: nn.Module, weight_dim: int, count: int, group: dist.ProcessGroup) -> None:
    """Replace the parameters of a module, and of its adapter, by this rank's parts of them."""
    for key, parameter in list(module.named_parameters()):
        dim = PARAMETERS[key][weight_dim]
        if dim is WHOLE:
            continue
        whole = parameter.shape[dim]
        own = own_range(whole, count, group)
        values = torch.empty_like(parameter.narrow(dim, own.start, len(own)))
        part = nn.Parameter(values, requires_grad=parameter.requires_grad)
        part.tensor_cut = TensorCut(dim, own.start, whole, group.rank(), group.size())  # type: ignore[attr-defined]
        path, _, last = key.rpartition(".")
        setattr(module.get_submodule(path), last, part)


def become(module: nn.Module, kind: type[nn.Module] | None, **attributes) -> None:
    """Give a module the behaviour of `kind` on top of its own, and these attributes."""
    if kind:
        base = type(module)
        if not issubclass(kind, base):  # a linear with an adapter, or with packed weights: both behaviours
            kind = type(f"{kind.__name__}{base.__name__}", (kind, base), {})
        module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)


def mark(model: Llama) -> None:
    """Say on each parameter which part it is, after FSDP and `to_empty`, which both make new parameters."""
    if isinstance(model, SplitLlama):
        for name, parameter in model.named_parameters():
            parameter.tensor_cut = model.tensor_cuts.get(name)  # type: ignore[attr-defined]
