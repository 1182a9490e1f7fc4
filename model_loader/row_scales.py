"""int8 and fp8 matrices with scales: made, multiplied out, and freed of the rotation that ComfyUI's tools may give."""

import torch

from ..kernels import FP8
from ..kernels.fp8 import FP8_MAX, weight_scale

LARGEST = {torch.int8: 127, FP8: FP8_MAX}
PIECE = 2**22  # elements that are wide at a time


def multiplied_out(tensor, scale):
    """Return tensor times its scale [] or [O, 1] in fp32, or the tensor itself where scale is None."""
    if scale is None:
        return tensor
    wide = tensor.float()
    return wide * scale if wide is tensor else wide.mul_(scale)


def quantised(dtype, tensor, scale=None):
    """Return tensor [..., I], times its `scale` if it has one, as (values in `dtype`, scale [..., 1] fp32).

    dtype: int8, where a row's largest magnitude becomes 127, or float8_e4m3fn, see `weight_scale`. A few rows are wide
    at a time. Rounding costs a row of normally distributed numbers 0.9 % of its RMS in int8, 2.6 % in fp8.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    values = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    scales = torch.empty(len(rows), 1, device=rows.device)
    count = max(PIECE // max(rows.shape[1], 1), 1)
    of_rows = None if scale is None else scale.expand(len(rows), 1)
    for first in range(0, len(rows), count):
        part = slice(first, first + count)
        wide = multiplied_out(rows[part], None if scale is None else of_rows[part]).float()
        if dtype == FP8:
            scales[part] = weight_scale(wide)
            values[part] = wide / scales[part]
        else:
            scales[part] = wide.abs().amax(1, keepdim=True).clamp_(min=1e-12) / LARGEST[dtype]
            values[part] = (wide / scales[part]).round_()
    return values.view(tensor.shape), scales.view(*tensor.shape[:-1], 1)


def rotated_back(weight, group):
    """Undo ConvRot's rotation of weight [O, I] in fp32: columns in groups of `group`, a power of four dividing I.

    The rotation is the Kronecker power of a symmetric 4 x 4 Hadamard matrix, so it is its own inverse.
    """
    kernel = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    rotation = torch.ones(1, 1)
    while len(rotation) < group:
        rotation = torch.kron(rotation, kernel)
    return (weight.unflatten(-1, (-1, group)) @ (rotation / group**0.5)).flatten(-2)
