"""Attention's output times the heads' gates, laid side by side, in Triton: layout change and product in one pass."""

import torch
import triton
import triton.language as tl

from .rows_triton import empty_output, parts_of_output, row_scale


@triton.jit
def gate_heads_kernel(
    x, gate, out, scale,
    x_batch, x_head, x_token, x_column,
    gate_batch, gate_token, gate_head,
    out_batch, out_token, out_column,
    tokens, columns, out_columns,
    HEAD_DIM: tl.constexpr, QUANTISE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program writes one row of out [batch, tokens, columns = heads * HEAD_DIM]; QUANTISE: out is fp8."""
    row = tl.program_id(0).to(tl.int64)
    token = row % tokens
    batch = row // tokens
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    head = column // HEAD_DIM
    inside = column < columns
    x_row = x + batch * x_batch + token * x_token
    values = tl.load(x_row + head * x_head + (column % HEAD_DIM) * x_column, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + batch * gate_batch + token * gate_token + head * gate_head, mask=inside, other=0.0)
    gated = values * gates.to(tl.float32)
    if QUANTISE:
        factor = row_scale(gated, axis=0)
        tl.store(scale + row, factor)
        gated = gated / factor
    out_row = out + batch * out_batch + token * out_token
    tl.store(out_row + column * out_column, gated.to(out.dtype.element_ty), mask=column < out_columns)


def gate_heads(x, gate, out_dtype=None, out=None):
    """`reference.gate_heads` for any strides; `out` takes the result if given."""
    batch, heads, tokens, head_dim = x.shape
    if out is None:
        out = empty_output((batch, tokens, heads * head_dim), out_dtype or x.dtype, x.device)
    values, scale, quantise = parts_of_output(out)
    if values.numel() == 0:
        return out
    block = triton.next_power_of_2(values.shape[-1])
    with torch.cuda.device_of(x):
        gate_heads_kernel[(batch * tokens,)](
            x, gate, values, scale,
            *x.stride(), *gate.stride(), *values.stride(),
            tokens, heads * head_dim, values.shape[-1],
            HEAD_DIM=head_dim, QUANTISE=quantise, BLOCK_COLUMNS=block,
            num_warps=8 if block >= 4096 else 4,
        )  # fmt: skip
    return out
