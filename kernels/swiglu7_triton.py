"""The gated activation of the network's MLP in Triton: reads interleaved columns once, writes half as many."""

import torch
import triton
import triton.language as tl

from .rms_norm_triton import as_rows

BLOCK_COLUMNS = 1024  # of the output; each program reads twice as many


@triton.jit
def swiglu7_kernel(
    x, out,
    x_batch, x_token, x_head, x_column,
    out_batch, out_token, out_head, out_column,
    tokens, heads, columns,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes BLOCK_COLUMNS columns of one row of out [batch, tokens, heads, columns]."""
    row = tl.program_id(0).to(tl.int64)
    head = row % heads
    token = (row // heads) % tokens
    batch = row // heads // tokens
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_in = tl.program_id(1).to(tl.int64) * (2 * BLOCK_COLUMNS) + tl.arange(0, 2 * BLOCK_COLUMNS)

    x_row = x + batch * x_batch + token * x_token + head * x_head
    pairs = tl.load(x_row + column_in * x_column, mask=column_in < 2 * columns, other=0.0).to(tl.float32)
    gate, linear = tl.split(tl.reshape(pairs, (BLOCK_COLUMNS, 2)))
    gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
    linear = tl.minimum(linear, 7.0, propagate_nan=tl.PropagateNan.ALL)
    linear = tl.maximum(linear, -7.0, propagate_nan=tl.PropagateNan.ALL)
    activated = gate * tl.sigmoid(1.702 * gate) * (linear + 1.0)
    out_row = out + batch * out_batch + token * out_token + head * out_head
    tl.store(out_row + column * out_column, activated.to(out.dtype.element_ty), mask=column < columns)


def swiglu7(x, out_dtype=None, out=None):
    """`reference.swiglu7` for up to four axes, any strides; `out` takes the result if given."""
    assert x.shape[-1] % 2 == 0
    columns = x.shape[-1] // 2
    if out is None:
        out = torch.empty((*x.shape[:-1], columns), dtype=out_dtype or x.dtype, device=x.device)
    rows_in, rows_out = as_rows(x), as_rows(out)
    batch, tokens, heads, _ = rows_in.shape
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        swiglu7_kernel[(batch * tokens * heads, triton.cdiv(columns, BLOCK_COLUMNS))](
            rows_in, rows_out,
            *rows_in.stride(), *rows_out.stride(),
            tokens, heads, columns,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=4,
        )  # fmt: skip
    return out
