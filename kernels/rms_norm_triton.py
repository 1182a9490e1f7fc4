"""RMSNorm with one weight per contiguous span of tokens, in Triton: the pattern that every kernel here follows."""

import torch
import triton
import triton.language as tl

ELEMENTS_PER_PROGRAM = 8192  # a row of the network (5120) at a time, or as many rows of heads (128) as fit


@triton.jit
def rms_norm_kernel(
    x, weight, out,
    x_batch, x_token, x_head, x_column,
    weight_expert, weight_column,
    out_batch, out_token, out_head, out_column,
    rows, tokens, heads, columns,
    first_end, second_end,
    eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program norms BLOCK_ROWS rows of x [batch, tokens, heads, columns]; tokens below first_end use weight 0."""
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
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / columns + eps)
    scale = tl.load(
        weight + expert[:, None] * weight_expert + column[None, :] * weight_column, mask=inside, other=0.0
    ).to(tl.float32)
    normed = values * inverse[:, None] * (scale + 1.0)
    out_row = out + batch * out_batch + token * out_token + head * out_head
    tl.store(out_row[:, None] + column[None, :] * out_column, normed.to(out.dtype.element_ty), mask=inside)


def as_rows(x):
    """View x [..., D] of one to four axes as [batch, tokens, heads, D]; the strides stay what they are."""
    while x.ndim < 3:
        x = x.unsqueeze(0)
    return x.unsqueeze(2) if x.ndim == 3 else x


def rms_norm_spans(x, weight, spans, eps=1e-6, out_dtype=None, out=None):
    """`reference.rms_norm_spans` for up to four axes and three spans, any strides; `out` takes the result if given."""
    assert len(spans) == weight.shape[0] <= 3 and sum(spans) == as_rows(x).shape[1]
    if out is None:
        out = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    rows_in, rows_out = as_rows(x), as_rows(out)
    batch, tokens, heads, columns = rows_in.shape
    rows = batch * tokens * heads
    if rows == 0:
        return out
    ends = [*torch.tensor(spans).cumsum(0).tolist(), tokens, tokens]
    block_columns = triton.next_power_of_2(columns)
    block_rows = max(1, min(ELEMENTS_PER_PROGRAM // block_columns, triton.next_power_of_2(rows)))
    with torch.cuda.device_of(x):
        rms_norm_kernel[(triton.cdiv(rows, block_rows),)](
            rows_in, weight, rows_out,
            *rows_in.stride(), *weight.stride(), *rows_out.stride(),
            rows, tokens, heads, columns,
            ends[0], ends[1],
            eps,
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
            num_warps=8 if block_rows * block_columns >= 4096 else 4,
        )  # fmt: skip
    return out


def rms_norm(x, weight, eps=1e-6, out_dtype=None, out=None):
    """`reference.rms_norm` for up to four axes, any strides; `out` takes the result if given."""
    return rms_norm_spans(x, weight.unsqueeze(0), (as_rows(x).shape[1],), eps, out_dtype, out)
