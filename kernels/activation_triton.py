"""The MLP's activations in Triton: swiglu7 reads interleaved columns once and writes half as many, gelu7 as many."""

import torch
import triton
import triton.language as tl

from .rows_triton import as_rows, empty_output, parts_of_output, row_scale

BLOCK_COLUMNS = 1024  # of the output, where no scale of the whole row is asked for


@triton.jit
def activation_kernel(
    x, out, scale,
    x_batch, x_token, x_head, x_column,
    out_batch, out_token, out_head, out_column,
    tokens, heads, columns, out_columns,
    GATED: tl.constexpr, QUANTISE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes BLOCK_COLUMNS columns of one row of out [batch, tokens, heads, columns].

    GATED: swiglu7 of twice the columns, else gelu7. QUANTISE: out is fp8; the block holds the whole row.
    """
    row = tl.program_id(0).to(tl.int64)
    head = row % heads
    token = (row // heads) % tokens
    batch = row // heads // tokens
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)

    x_row = x + batch * x_batch + token * x_token + head * x_head
    if GATED:
        column_in = tl.program_id(1).to(tl.int64) * (2 * BLOCK_COLUMNS) + tl.arange(0, 2 * BLOCK_COLUMNS)
        pairs = tl.load(x_row + column_in * x_column, mask=column_in < 2 * columns, other=0.0).to(tl.float32)
        gate, linear = tl.split(tl.reshape(pairs, (BLOCK_COLUMNS, 2)))
        linear = tl.minimum(linear, 7.0, propagate_nan=tl.PropagateNan.ALL)
        linear = tl.maximum(linear, -7.0, propagate_nan=tl.PropagateNan.ALL) + 1.0
    else:
        gate = tl.load(x_row + column * x_column, mask=column < columns, other=0.0).to(tl.float32)
        linear = 1.0
    gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
    activated = gate * tl.sigmoid(1.702 * gate) * linear
    if QUANTISE:
        factor = row_scale(activated, axis=0)
        tl.store(scale + row, factor)
        activated = activated / factor
    out_row = out + batch * out_batch + token * out_token + head * out_head
    tl.store(out_row + column * out_column, activated.to(out.dtype.element_ty), mask=column < out_columns)


def launch(x, columns, gated, out_dtype, out):
    """Run the kernel for `columns` results a row, return `out` (made where it is None)."""
    if out is None:
        out = empty_output((*x.shape[:-1], columns), out_dtype or x.dtype, x.device)
    values, scale, quantise = parts_of_output(out)
    rows_in, rows_out = as_rows(x), as_rows(values)
    batch, tokens, heads, out_columns = rows_out.shape
    if values.numel() == 0:
        return out
    block = triton.next_power_of_2(out_columns) if quantise else BLOCK_COLUMNS
    with torch.cuda.device_of(x):
        activation_kernel[(batch * tokens * heads, triton.cdiv(out_columns, block))](
            rows_in, rows_out, scale,
            *rows_in.stride(), *rows_out.stride(),
            tokens, heads, columns, out_columns,
            GATED=gated, QUANTISE=quantise, BLOCK_COLUMNS=block,
            num_warps=max(4, min(16, block // 512)) if quantise else 4,
        )  # fmt: skip
    return out


def swiglu7(x, out_dtype=None, out=None):
    """`reference.swiglu7` for up to four axes, any strides; `out` takes the result if given."""
    assert x.shape[-1] % 2 == 0
    return launch(x, x.shape[-1] // 2, True, out_dtype, out)


def gelu7(x, out_dtype=None, out=None):
    """`reference.gelu7` for up to four axes, any strides; `out` takes the result if given."""
    return launch(x, x.shape[-1], False, out_dtype, out)
