"""Linears with an fp8 weight and a scale for each of its rows, given to a network as its `operations`."""

import sys

import torch
from torch import nn

from ..kernels import FP8, Fp8Rows, fp8_linear, quantise_rows, quantise_weight
from ..kernels.fp8 import padded_columns

INPUT_DTYPE = FP8  # what a network's kernels are to hand these linears: Fp8Rows


class Fp8Linear(nn.Module):
    """A bias-free Linear: weight e4m3 [out, in], both rounded up to 16, times weight_scale [out, 1] fp32.

    Takes x [..., in] in a float dtype, or quantised rows as the kernels write them (`Fp8Rows`); returns bf16.
    """

    def __init__(self, in_features, out_features, device=None):
        super().__init__()
        self.out_features = out_features
        size = (padded_columns(out_features), padded_columns(in_features))
        self.weight = nn.Parameter(torch.zeros(size, dtype=FP8, device=device), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(size[0], 1, device=device), requires_grad=False)

    @torch.no_grad()
    def quantise(self, weight):
        """Take the values of `weight` [out, in]."""
        self.weight, self.weight_scale = (nn.Parameter(p, requires_grad=False) for p in quantise_weight(weight))

    def forward(self, x):
        """x [..., in] or Fp8Rows of it -> [..., out] bf16."""
        rows = x if isinstance(x, Fp8Rows) else quantise_rows(x)
        return fp8_linear(rows, Fp8Rows(self.weight, self.weight_scale), self.out_features)


def Linear(in_features, out_features, bias=True, dtype=None, device=None):  # noqa: N802, the name that networks ask for
    """Build an Fp8Linear, or torch's Linear for the fp32 islands (adapter and final linears)."""
    if dtype is torch.float32:
        return nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)
    assert not bias
    return Fp8Linear(in_features, out_features, device)


@torch.no_grad()
def with_fp8_linears(network):
    """Return a copy of a DiT whose linears are quantised; the fp32 islands and norms share the original's tensors."""
    narrow = type(network)(network.config, operations=sys.modules[__name__], dtype=torch.bfloat16, device="meta")
    for name, module in narrow.named_modules():
        if isinstance(module, Fp8Linear):
            module.quantise(network.get_submodule(name).weight)
    rest = {name: tensor for name, tensor in network.state_dict().items() if narrow.get_parameter(name).is_meta}
    narrow.load_state_dict({**narrow.state_dict(), **rest}, assign=True)
    return narrow.train(network.training)
