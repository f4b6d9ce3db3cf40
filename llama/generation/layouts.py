"""How the matrices of a model lie in memory while it generates.

A step of generation multiplies one token of each text by every weight, so it takes as long as reading the weights. A
matrix product made for many rows reads them at a third of the memory's speed when there is one row. The layouts below
compute y = x W^T + b for W (O, D), and each reads its memory in the order in which it lies there.

    Rows     (O, D)        as in a linear: the fastest for GPUs, and for CPUs without the kernels below
    Columns  (D, O)        one row of x by a wide W in fp32
    Panels   (P, D, O/P)   one row of x: P narrow strips of columns, each with its own running sums in registers
    Packed   (private)     several rows of x: the order that oneDNN, PyTorch's library for CPUs, chooses itself

All give the same numbers up to the order of sums, for any count of rows. Measured in benchmarks/generate.py.
"""

from abc import ABC, abstractmethod
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

WIDE = 8192  # outputs from which one plain product of a row by (D, O) reads as fast as panels do, in fp32
FAST_DTYPES = (torch.float32, torch.bfloat16)  # for which a CPU has the kernels of the layouts below
PANEL_BYTES = 128  # of one row of a panel: two cache lines
MANY_ROWS = 64  # from here on it pays to write panels out as (D, O) before they are multiplied


class Layout(ABC):
    """W (O, D) and b (O), or no b."""

    has_rows = True  # whether `rows` works

    def __init__(self, weight: Tensor, bias: Tensor | None, shared: dict):
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.shared = shared
        self.arrange(weight)

    @abstractmethod
    def arrange(self, weight: Tensor) -> None:
        """Keep W (O, D) in the layout's order."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x (T, D) -> x W^T + b (T, O)."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """W[ids] (T, D): a head that is tied to the embedding is the embedding as well."""

    def plus_bias(self, y: Tensor) -> Tensor:
        """y + b, in place."""
        return y if self.bias is None else y.add_(self.bias)


class Rows(Layout):
    """(O, D)."""

    def arrange(self, weight):
        self.weight = weight

    def __call__(self, x):
        return linear(x, self.weight, self.bias)

    def rows(self, ids):
        return self.weight[ids]


class Columns(Layout):
    """(D, O): y = sum_d x_d W[:, d]. A row of this memory is as long as y, and is read from end to end."""

    def arrange(self, weight):
        self.weight = weight.t().contiguous()

    def __call__(self, x):
        return self.plus_bias(torch.mm(x, self.weight))

    def rows(self, ids):
        return self.weight[:, ids].t()


class Panels(Layout):
    """(P, D, width): panel p holds the outputs p * width to (p + 1) * width, and zeros behind the last output.

    embedding_bag computes sum_i w_i E[i] over rows i of a table, one bag after the other. With the panels below each
    other as the table, the D rows of a panel as a bag, and x as the weights w, that is the product: one kernel, which
    sums in fp32 in registers and asks for memory ahead of time. (FBGEMM, https://arxiv.org/abs/2101.05615)
    """

    def arrange(self, weight):
        self.width = PANEL_BYTES // weight.itemsize
        padded = pad(weight, (0, 0, 0, -self.out_features % self.width))
        self.weight = padded.unflatten(0, (-1, self.width)).transpose(1, 2).contiguous()
        self.table = self.weight.flatten(0, 1)  # (P * D, width)
        shape = self.weight.shape[:2]
        if shape not in self.shared:
            row_numbers = torch.arange(len(self.table), dtype=torch.int32)
            bag_starts = row_numbers[:: self.in_features].contiguous()
            self.shared[shape] = (row_numbers, bag_starts, weight.new_empty(shape))
        self.row_numbers, self.bag_starts, self.copies_of_x = self.shared[shape]

    def __call__(self, x):
        if len(x) == 1:
            weights = self.copies_of_x.copy_(x).view(-1)
            y = torch.embedding_bag(self.table, self.row_numbers, self.bag_starts, False, 0, False, weights)[0]
            y = y.view(1, -1)
        elif len(x) < MANY_ROWS:
            y = torch.matmul(x, self.weight).transpose(0, 1).flatten(1)
        else:
            y = torch.mm(x, self.weight.transpose(0, 1).flatten(1))
        if y.shape[1] > self.out_features:
            y = y[:, : self.out_features]
        return self.plus_bias(y)

    def rows(self, ids):
        return self.weight[ids // self.width, :, ids % self.width]

    @staticmethod
    def available() -> bool:
        """Whether embedding_bag has its fast kernel on this processor."""
        vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        return vectors and "fbgemm" in torch.backends.quantized.supported_engines


class Packed(Layout):
    """oneDNN's order. The operators are private: PyTorch has no public ones for weights that are packed beforehand."""

    has_rows = False
    ROWS = 8  # of x, for which oneDNN chooses; other counts work as well

    def arrange(self, weight):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, self.ROWS)

    def __call__(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def rows(self, ids):
        raise TypeError("oneDNN's order is its own: expected a look-up in the unpacked weight")

    @staticmethod
    @cache
    def available(dtype: torch.dtype) -> bool:
        """Whether this PyTorch has the private operators and this processor runs them: they are tried."""
        one = torch.ones(1, 1, dtype=dtype)
        try:
            return torch.backends.mkldnn.is_available() and bool(Packed(one, None, {})(one) == 1)
        except (AttributeError, RuntimeError):
            return False


def choose(weight: Tensor, rows: int) -> type[Layout]:
    """The layout in which products of about `rows` rows by `weight` (O, D) are fastest."""
    dtype = weight.dtype
    if weight.device.type != "cpu" or dtype not in FAST_DTYPES:
        return Rows
    if rows > 1:
        return Packed if Packed.available(dtype) else Rows
    if not Panels.available():
        return Rows
    return Columns if dtype == torch.float32 and len(weight) >= WIDE else Panels
