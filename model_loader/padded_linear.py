"""Linears that take rows padded with zeros, given to a network as its `operations`.

cuBLAS takes 3.5 times as long for rows that are not whole blocks of 16 bytes, such as the MLP's 13,652 columns of bf16.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.fp8 import padded_columns

TAKES_PADDED_ROWS = True  # for `dit_layers.takes_padded_rows`


@torch.no_grad()
def padded_weight(weight):
    """Return weight [O, I] with columns of zeros up to a multiple of 16, in a tensor of its own."""
    return F.pad(weight, (0, padded_columns(weight.shape[1]) - weight.shape[1]))


@torch.no_grad()
def keep_padded(weight):
    """Return `padded_weight` of a Parameter, whose rows stay in that memory: the next call copies nothing."""
    rows, columns = weight.shape[0], padded_columns(weight.shape[1])
    if weight.stride(0) != columns or weight.untyped_storage().nbytes() != rows * columns * weight.element_size():
        weight.data = padded_weight(weight)[:, : weight.shape[1]]
    return weight.data.as_strided((rows, columns), (columns, 1), 0)


class Linear(nn.Linear):
    """torch's Linear, for x [..., in] or [..., in rounded up to a multiple of 16], zeros there."""

    def forward(self, x):
        """x [..., in] -> [..., out]."""
        weight = self.weight if x.shape[-1] == self.in_features else keep_padded(self.weight)
        return F.linear(x, weight, self.bias)
