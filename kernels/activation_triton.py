"""The MLP's activations in Triton: swiglu7 reads interleaved columns once and writes half as many, gelu7 as many."""

import torch
import triton
import triton.language as tl

from .rows_triton import alignment, as_rows, empty_output, parts_of_output, row_scale, strides_in

SIGMOID_EXPONENT = tl.constexpr(-1.702 * 1.4426950408889634)  # sigmoid(1.702 x) = 1 / (1 + 2 ** (this * x))
BLOCK_COLUMNS = 2048  # of the output, where no scale of the whole row is asked for


@triton.jit(do_not_specialize_on_alignment=["out_batch", "out_token", "out_head"])
def activation_kernel(
    x, out, scale,
    x_batch, x_token, x_head, x_column,
    out_batch, out_token, out_head, out_column,
    tokens, heads,
    COLUMNS: tl.constexpr, OUT_COLUMNS: tl.constexpr, X_ALIGNMENT: tl.constexpr, OUT_ALIGNMENT: tl.constexpr,
    GATED: tl.constexpr, WORDS: tl.constexpr, QUANTISE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes BLOCK_COLUMNS columns of one row of out [batch, tokens, heads, OUT_COLUMNS].

    Past COLUMNS there are zeros. The strides but the last are in units of X_ALIGNMENT and OUT_ALIGNMENT elements: so
    many are read and written at once. GATED: swiglu7 of twice the columns, else gelu7. WORDS: a gate and what it gates
    are read as one word of 32 bits. QUANTISE: out is fp8; the block holds the whole row.
    """
    head = (tl.program_id(0) % heads).to(tl.int64)
    token = (tl.program_id(0) // heads).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)

    x_row = x + (batch * x_batch + token * x_token + head * x_head) * X_ALIGNMENT
    linear = 1.0
    if WORDS:
        words = tl.load(x_row.to(tl.pointer_type(tl.int32), bitcast=True) + column, mask=column < COLUMNS, other=0)
        gate = (words << 16).to(tl.float32, bitcast=True)
        linear = (words & -65536).to(tl.float32, bitcast=True)
    elif GATED:
        gate = tl.load(x_row + 2 * column * x_column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        linear = tl.load(x_row + (2 * column + 1) * x_column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    else:
        gate = tl.load(x_row + column * x_column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    if GATED:
        linear = tl.minimum(linear, 7.0, propagate_nan=tl.PropagateNan.ALL)
        linear = tl.maximum(linear, -7.0, propagate_nan=tl.PropagateNan.ALL) + 1.0
    gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
    root = tl.rsqrt(1.0 + tl.exp2(gate * SIGMOID_EXPONENT))  # its square is the sigmoid; cheaper than a division
    activated = gate * (root * root) * linear
    if QUANTISE:
        factor = row_scale(activated, axis=0)
        tl.store(scale + (batch * tokens + token) * heads + head, factor)
        activated *= 1.0 / factor
    out_row = out + (batch * out_batch + token * out_token + head * out_head) * OUT_ALIGNMENT
    tl.store(out_row + column * out_column, activated.to(out.dtype.element_ty), mask=column < OUT_COLUMNS)


def holds_words(x):
    """Tell whether every two columns of rows [batch, tokens, heads, columns] are a word of 32 bits that can be read."""
    return x.dtype == torch.bfloat16 and x.stride(-1) == 1 and alignment(x) % 2 == 0 and x.data_ptr() % 4 == 0


def launch(x, columns, gated, out_dtype, padded, out):
    """Run the kernel for `columns` results a row, return `out` (made where it is None)."""
    if out is None:
        out = empty_output((*x.shape[:-1], columns), out_dtype or x.dtype, x.device, padded)
    values, scale, quantise = parts_of_output(out)
    rows_in, rows_out = as_rows(x), as_rows(values)
    batch, tokens, heads, out_columns = rows_out.shape
    if values.numel() == 0:
        return out
    block = triton.next_power_of_2(out_columns) if quantise else BLOCK_COLUMNS
    words = gated and holds_words(rows_in)
    x_alignment, out_alignment = alignment(rows_in), alignment(rows_out)
    if words:  # a thread reads four, and what it would read more for the sake of its writing, it reads far apart
        out_alignment = min(4, out_alignment)
    with torch.cuda.device_of(x):
        activation_kernel[(tokens * heads, triton.cdiv(out_columns, block), batch)](
            rows_in, rows_out, scale,
            *strides_in(x_alignment, rows_in), *strides_in(out_alignment, rows_out),
            tokens, heads,
            COLUMNS=columns, OUT_COLUMNS=out_columns, X_ALIGNMENT=x_alignment, OUT_ALIGNMENT=out_alignment,
            GATED=gated, WORDS=words, QUANTISE=quantise, BLOCK_COLUMNS=block,
            num_warps=max(4, min(8, block // 256), block // 2048),
        )  # fmt: skip
    return out


def swiglu7(x, out_dtype=None, padded=False, out=None):
    """`reference.swiglu7` for up to four axes, any strides; `out` takes the result if given."""
    assert x.shape[-1] % 2 == 0
    return launch(x, x.shape[-1] // 2, True, out_dtype, padded, out)


def gelu7(x, out_dtype=None, padded=False, out=None):
    """`reference.gelu7` for up to four axes, any strides; `out` takes the result if given."""
    return launch(x, x.shape[-1], False, out_dtype, padded, out)
