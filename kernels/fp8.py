"""Rows of fp8 values with one scale each: what the kernels write for an fp8 matmul, and what it reads."""

from typing import NamedTuple

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Queries and keys of 128 columns up to these have scores of at most 50,176, which fp16 holds (65,504). Both are 448 by
# a power of two: e4m3 rounds numbers as it would up to 448, but for those below a 448th of the largest.
QUERY_MAX, KEY_MAX = 14.0, 28.0
COLUMN_MULTIPLE = 16  # torch._scaled_mm wants rows of whole 16-byte blocks


class Fp8Rows(NamedTuple):
    """A tensor [..., C] as values [..., C rounded up to 16] e4m3 (zeros past C) times scale [..., 1] fp32."""

    values: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self):
        """The values' shape."""
        return self.values.shape

    def flatten(self, first, last):
        """Join axes, not the last one, as torch's flatten does."""
        return Fp8Rows(self.values.flatten(first, last), self.scale.flatten(first, last))

    def split(self, lengths, dim):
        """Split along an axis that is not the last, as torch's split does."""
        values, scales = self.values.split(lengths, dim), self.scale.split(lengths, dim)
        return tuple(Fp8Rows(*parts) for parts in zip(values, scales, strict=True))


def padded_columns(columns):
    """Return the width of `Fp8Rows.values` for `columns` values a row."""
    return -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def quantise_rows(x):
    """Scale every row of x [..., C] so that its largest magnitude is 448, the largest e4m3 number; return Fp8Rows."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    values = torch.nn.functional.pad(wide / scale, (0, padded_columns(x.shape[-1]) - x.shape[-1])).to(FP8)
    return Fp8Rows(values, scale)


def fp8_scores(q, k, largest_key):
    """Bring queries and keys into e4m3 for their products: q [..., d] to Fp8Rows, k [..., d] to a tensor.

    A query has a scale of its own, by which its largest number is QUERY_MAX; all keys share one, by which `largest_key`
    [] is KEY_MAX, and no number of theirs may be larger. q's scales are those of its scores: the keys' is taken in.
    """
    key_scale = largest_key.clamp(min=1e-12) / KEY_MAX
    scale = q.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / QUERY_MAX
    return Fp8Rows((q.float() / scale).to(FP8), scale * key_scale), (k.float() / key_scale).to(FP8)


def dequantise_rows(rows, columns):
    """Return the first `columns` columns of Fp8Rows in fp32."""
    return rows.values[..., :columns].float() * rows.scale


def weight_scale(weight):
    """Return scales [O, 1] for the rows of weight [O, I] fp32: of four within an octave those that round them least.

    A row's error depends on where its numbers lie between powers of two. Rounding costs nano's rows of 160 a tenth
    less than with the largest magnitude at 448, long rows of normally distributed numbers hardly less. Of those a
    thousand numbers choose, for speed.
    """
    first = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    scales = torch.stack([first * 2 ** (step / 4) for step in range(4)])
    some = weight[..., :: max(1, weight.shape[-1] // 1024)].contiguous()
    errors = [((some / scale).to(FP8).float() * scale - some).square().sum(-1, keepdim=True) for scale in scales]
    return scales.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def quantise_weight(weight):
    """Quantise the rows of a Linear's weight [O, I]; rows are padded to a multiple of 16 too, with zeros."""
    missing = padded_columns(weight.shape[0]) - weight.shape[0]
    wide = torch.nn.functional.pad(weight.float(), (0, padded_columns(weight.shape[1]) - weight.shape[1], 0, missing))
    scale = weight_scale(wide)
    return Fp8Rows((wide / scale).to(FP8), scale)


def aligned(scale):
    """Return scales at an address that cuBLAS takes, a multiple of 16 bytes: a slice of them may start anywhere."""
    return scale if scale.data_ptr() % 16 == 0 else scale.clone()


def multiplied(x, weight, x_scale, weight_scale):
    """Multiply the values of Fp8Rows x and weight, times these scales: bf16 [all rows of x, rows of weight]."""
    return torch._scaled_mm(
        x.values.flatten(0, -2),
        weight.values.t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        out_dtype=torch.bfloat16,  # the only one with a scale for each row
        use_fast_accum=True,
    )
