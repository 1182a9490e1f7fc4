"""RMSNorm with one weight per contiguous span of tokens, alone or fused with a residual add: the kernels' pattern."""

import itertools

import torch
import triton
import triton.language as tl

from .rows_triton import as_rows, empty_output, parts_of_output, row_scale

ELEMENTS_PER_PROGRAM = 8192  # a row of the network (5120) at a time, or as many rows of heads (128) as fit


@triton.jit
def rms_norm_kernel(
    x, delta, total, weight, out, scale,
    x_batch, x_token, x_head, x_column,
    delta_batch, delta_token, delta_head, delta_column,
    total_batch, total_token, total_head, total_column,
    weight_expert, weight_column,
    out_batch, out_token, out_head, out_column,
    rows, tokens, heads, columns, out_columns,
    first_end, second_end,
    eps,
    ADD: tl.constexpr, QUANTISE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program norms BLOCK_ROWS rows of x [batch, tokens, heads, columns]; tokens below first_end use weight 0.

    ADD: norms total = x + delta, and stores it. QUANTISE: out is fp8, with the rows' scales in `scale`.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    row_inside, column_inside = row < rows, column < columns
    inside = row_inside[:, None] & column_inside[None, :]
    head = row % heads
    token = (row // heads) % tokens
    batch = row // heads // tokens
    expert = (token >= first_end).to(tl.int64) + (token >= second_end).to(tl.int64)

    x_row = x + batch * x_batch + token * x_token + head * x_head
    values = tl.load(x_row[:, None] + column[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        delta_row = delta + batch * delta_batch + token * delta_token + head * delta_head
        values += tl.load(delta_row[:, None] + column[None, :] * delta_column, mask=inside, other=0.0).to(tl.float32)
        total_row = total + batch * total_batch + token * total_token + head * total_head
        tl.store(total_row[:, None] + column[None, :] * total_column, values, mask=inside)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / columns + eps)
    gain = tl.load(
        weight + expert[:, None] * weight_expert + column[None, :] * weight_column, mask=inside, other=0.0
    ).to(tl.float32)
    normed = values * inverse[:, None] * (gain + 1.0)
    if QUANTISE:
        factor = row_scale(normed, axis=1)
        tl.store(scale + row, factor, mask=row_inside)
        normed *= (1.0 / factor)[:, None]
    out_row = out + batch * out_batch + token * out_token + head * out_head
    kept = row_inside[:, None] & (column < out_columns)[None, :]
    tl.store(out_row[:, None] + column[None, :] * out_column, normed.to(out.dtype.element_ty), mask=kept)


def launch(x, delta, total, weight, spans, eps, out):
    """Run the kernel; `delta` and `total` are None where nothing is added. Returns `out`."""
    assert len(spans) == weight.shape[0] <= 3 and sum(spans) == as_rows(x).shape[1]
    values, scale, quantise = parts_of_output(out)
    add = delta is not None
    rows_in, rows_out = as_rows(x), as_rows(values)
    rows_delta, rows_total = (as_rows(delta), as_rows(total)) if add else (rows_in, rows_in)
    batch, tokens, heads, columns = rows_in.shape
    rows = batch * tokens * heads
    if rows == 0:
        return out
    ends = [*itertools.accumulate(spans), tokens, tokens]
    block_columns = triton.next_power_of_2(rows_out.shape[-1])
    block_rows = max(1, min(ELEMENTS_PER_PROGRAM // block_columns, triton.next_power_of_2(rows)))
    with torch.cuda.device_of(x):
        rms_norm_kernel[(triton.cdiv(rows, block_rows),)](
            rows_in, rows_delta, rows_total, weight, rows_out, scale,
            *rows_in.stride(), *rows_delta.stride(), *rows_total.stride(), *weight.stride(), *rows_out.stride(),
            rows, tokens, heads, columns, rows_out.shape[-1],
            ends[0], ends[1],
            eps,
            ADD=add, QUANTISE=quantise, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
            num_warps=8 if block_rows * block_columns >= 4096 else 4,
        )  # fmt: skip
    return out


def rms_norm_spans(x, weight, spans, eps=1e-6, out_dtype=None, out=None):
    """`reference.rms_norm_spans` for up to four axes and three spans, any strides; `out` takes the result if given."""
    if out is None:
        out = empty_output(x.shape, out_dtype or x.dtype, x.device)
    return launch(x, None, None, weight, spans, eps, out)


def rms_norm(x, weight, eps=1e-6, out_dtype=None, out=None):
    """`reference.rms_norm` for up to four axes, any strides; `out` takes the result if given."""
    return rms_norm_spans(x, weight.unsqueeze(0), (as_rows(x).shape[1],), eps, out_dtype, out)


def add_rms_norm_spans(x, delta, weight, spans, eps=1e-6, out_dtype=None, total=None, out=None):
    """`reference.add_rms_norm_spans` for up to three spans, any strides; `out` takes the normed sum if given."""
    if total is None:
        total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if out is None:
        out = empty_output(x.shape, out_dtype or torch.float32, x.device)
    return total, launch(x, delta, total, weight, spans, eps, out)
