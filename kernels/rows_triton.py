"""What the Triton kernels share: views of tensors as rows, outputs in a float dtype or as fp8 rows with their scale."""

import math

import torch
import triton
import triton.language as tl

from .fp8 import FP8, Fp8Rows, padded_columns


def as_rows(x):
    """View x [..., D] of one to four axes as [batch, tokens, heads, D]; the strides stay what they are."""
    while x.ndim < 3:
        x = x.unsqueeze(0)
    return x.unsqueeze(2) if x.ndim == 3 else x


def empty_output(shape, out_dtype, device, padded=False):
    """Return an uninitialised result of `shape`: a tensor, its rows `padded` or not, or Fp8Rows for FP8."""
    columns = padded_columns(shape[-1]) if padded or out_dtype == FP8 else shape[-1]
    if out_dtype != FP8:
        return torch.empty((*shape[:-1], columns), dtype=out_dtype, device=device)
    values = torch.empty((*shape[:-1], columns), dtype=FP8, device=device)
    return Fp8Rows(values, torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device))


def parts_of_output(out):
    """Return (values, scale, whether `out` is Fp8Rows); a kernel that does not quantise ignores the scale pointer."""
    if not isinstance(out, Fp8Rows):
        return out, out, False
    assert out.scale.is_contiguous()
    return out.values, out.scale, True


def alignment(x):
    """Return how many elements, up to 16, every row of x starts at a multiple of: so many can be read at once."""
    return math.gcd(16, *x.stride()[:-1])


def strides_in(unit, x):
    """Return the strides of x, all but the last in units of so many elements: Triton sees it where they multiply."""
    return *(stride // unit for stride in x.stride()[:-1]), x.stride(-1)


@triton.jit
def row_scale(values, axis: tl.constexpr):
    """Return the scale that brings the largest magnitude along `axis` to 448, the largest e4m3 number."""
    return tl.maximum(tl.max(tl.abs(values), axis=axis), 1e-12) / 448.0
