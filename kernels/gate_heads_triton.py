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
    tokens,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, OUT_COLUMNS: tl.constexpr, QUANTISE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Each program writes one row of out [batch, tokens, HEADS * HEAD_DIM]; QUANTISE: out is fp8."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS).to(tl.int64)
    column = tl.arange(0, BLOCK_DIM)
    inside = (head < HEADS)[:, None] & (column < HEAD_DIM)[None, :]
    x_row = x + batch * x_batch + token * x_token
    values = tl.load(x_row + head[:, None] * x_head + column[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
    gate_row = gate + batch * gate_batch + token * gate_token
    gates = tl.load(gate_row + head * gate_head, mask=head < HEADS, other=0.0).to(tl.float32)
    gated = values * gates[:, None]
    out_row = out + batch * out_batch + token * out_token
    if QUANTISE:
        factor = row_scale(tl.max(tl.abs(gated), axis=1), axis=0)
        tl.store(scale + batch * tokens + token, factor)
        gated *= 1.0 / factor
        past = HEADS * HEAD_DIM + tl.arange(0, 16)
        tl.store(out_row + past * out_column, tl.zeros([16], out.dtype.element_ty), mask=past < OUT_COLUMNS)
    place = head[:, None] * HEAD_DIM + column[None, :]
    tl.store(out_row + place * out_column, gated.to(out.dtype.element_ty), mask=inside)


def gate_heads(x, gate, out_dtype=None, out=None):
    """`reference.gate_heads` for any strides; `out` takes the result if given."""
    batch, heads, tokens, head_dim = x.shape
    if out is None:
        out = empty_output((batch, tokens, heads * head_dim), out_dtype or x.dtype, x.device)
    values, scale, quantise = parts_of_output(out)
    if values.numel() == 0:
        return out
    block_heads, block_dim = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    with torch.cuda.device_of(x):
        gate_heads_kernel[(tokens, batch)](
            x, gate, values, scale,
            *x.stride(), *gate.stride(), *values.stride(),
            tokens,
            HEADS=heads, HEAD_DIM=head_dim, OUT_COLUMNS=values.shape[-1], QUANTISE=quantise,
            BLOCK_HEADS=block_heads, BLOCK_DIM=block_dim,
            num_warps=8 if block_heads * block_dim >= 4096 else 4,
        )  # fmt: skip
    return out
