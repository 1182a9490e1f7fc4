"""From the rows of the fused projection to q, k, v and gate in one pass, in Triton: norm, rotation, layout, sigmoid."""

import torch
import triton
import triton.language as tl


@triton.jit
def norm_and_rotate(
    row, column_step, out, out_head, out_column, weight, weight_column, sine, cosine, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Norm and rotate the HEADS heads at `row` of one token: columns c and c + HALF are a pair, the rest is no pair."""
    head = tl.arange(0, BLOCK_HEADS).to(tl.int64)[:, None]
    pair = tl.arange(0, BLOCK_HALF).to(tl.int64)[None, :]
    rest = tl.arange(0, BLOCK_REST).to(tl.int64)[None, :]
    pair_inside = (head < HEADS) & (pair < HALF)
    rest_inside = (head < HEADS) & (rest < HEAD_DIM - 2 * HALF)
    heads_in = row + head * HEAD_DIM * column_step
    first = tl.load(heads_in + pair * column_step, mask=pair_inside, other=0.0).to(tl.float32)
    second = tl.load(heads_in + (pair + HALF) * column_step, mask=pair_inside, other=0.0).to(tl.float32)
    third = tl.load(heads_in + (rest + 2 * HALF) * column_step, mask=rest_inside, other=0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1) + tl.sum(third * third, axis=1)
    inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    first *= inverse * (tl.load(weight + pair * weight_column, mask=pair < HALF, other=0.0).to(tl.float32) + 1.0)
    second *= inverse * (
        tl.load(weight + (pair + HALF) * weight_column, mask=pair < HALF, other=0.0).to(tl.float32) + 1.0
    )
    third *= inverse * (
        tl.load(weight + (rest + 2 * HALF) * weight_column, mask=rest < HEAD_DIM - 2 * HALF, other=0.0).to(tl.float32)
        + 1.0
    )
    heads_out = out + head * out_head
    dtype = out.dtype.element_ty
    turned = first * cosine - second * sine
    tl.store(heads_out + pair * out_column, turned.to(dtype), mask=pair_inside)
    turned = second * cosine + first * sine
    tl.store(heads_out + (pair + HALF) * out_column, turned.to(dtype), mask=pair_inside)
    tl.store(heads_out + (rest + 2 * HALF) * out_column, third.to(dtype), mask=rest_inside)


@triton.jit
def attention_inputs_kernel(
    rows, q_weight, k_weight, sin_cos, q, k, v, gate,
    rows_batch, rows_token, rows_column,
    q_weight_expert, q_weight_column, k_weight_expert, k_weight_column,
    sin_cos_token, sin_cos_column,
    q_batch, q_head, q_token, q_column,
    k_batch, k_head, k_token, k_column,
    v_batch, v_head, v_token, v_column,
    gate_batch, gate_token, gate_head,
    tokens, first_end, second_end,
    eps,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_QUERY_HEADS: tl.constexpr, BLOCK_KEY_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Each program serves one token, all heads; tokens below first_end use the first row of both weights."""
    token = tl.program_id(0).to(tl.int64) % tokens
    batch = tl.program_id(0).to(tl.int64) // tokens
    expert = (token >= first_end).to(tl.int64) + (token >= second_end).to(tl.int64)
    row = rows + batch * rows_batch + token * rows_token
    pair = tl.arange(0, BLOCK_HALF).to(tl.int64)[None, :]
    angles = sin_cos + token * sin_cos_token
    sine = tl.load(angles + pair * sin_cos_column, mask=pair < HALF, other=0.0)
    cosine = tl.load(angles + (pair + HALF) * sin_cos_column, mask=pair < HALF, other=0.0)
    norm_and_rotate(
        row, rows_column, q + batch * q_batch + token * q_token, q_head, q_column,
        q_weight + expert * q_weight_expert, q_weight_column, sine, cosine, eps,
        QUERY_HEADS, HEAD_DIM, HALF, BLOCK_QUERY_HEADS, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    row += QUERY_HEADS * HEAD_DIM * rows_column
    norm_and_rotate(
        row, rows_column, k + batch * k_batch + token * k_token, k_head, k_column,
        k_weight + expert * k_weight_expert, k_weight_column, sine, cosine, eps,
        KEY_HEADS, HEAD_DIM, HALF, BLOCK_KEY_HEADS, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    row += KEY_HEADS * HEAD_DIM * rows_column
    head = tl.arange(0, BLOCK_KEY_HEADS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_DIM).to(tl.int64)[None, :]
    inside = (head < KEY_HEADS) & (column < HEAD_DIM)
    value = tl.load(row + (head * HEAD_DIM + column) * rows_column, mask=inside)
    tl.store(v + batch * v_batch + token * v_token + head * v_head + column * v_column, value, mask=inside)
    row += KEY_HEADS * HEAD_DIM * rows_column
    query_head = tl.arange(0, BLOCK_QUERY_HEADS).to(tl.int64)
    logit = tl.load(row + query_head * rows_column, mask=query_head < QUERY_HEADS, other=0.0).to(tl.float32)
    gate_row = gate + batch * gate_batch + token * gate_token
    tl.store(gate_row + query_head * gate_head, tl.sigmoid(logit), mask=query_head < QUERY_HEADS)


def attention_inputs(rows, q_weight, k_weight, spans, sin_cos, heads, eps=1e-6, out=None):
    """`reference.attention_inputs` for up to three spans, any strides; `out` takes the four results if given."""
    (batch, tokens, width), head_dim, (query_heads, key_heads) = rows.shape, q_weight.shape[-1], heads
    assert width == (query_heads + 2 * key_heads) * head_dim + query_heads
    assert len(spans) == q_weight.shape[0] == k_weight.shape[0] <= 3 and sum(spans) == tokens == sin_cos.shape[0]
    if out is None:
        shapes = ((batch, count, tokens, head_dim) for count in (query_heads, key_heads, key_heads))
        out = tuple(torch.empty(shape, dtype=rows.dtype, device=rows.device) for shape in shapes)
        out += (torch.empty((batch, tokens, query_heads), dtype=torch.float32, device=rows.device),)
    if rows.numel() == 0:
        return out
    half = sin_cos.shape[-1] // 2
    ends = [*torch.tensor(spans).cumsum(0).tolist(), tokens, tokens]
    q, k, v, gate = out
    with torch.cuda.device_of(rows):
        attention_inputs_kernel[(batch * tokens,)](
            rows, q_weight, k_weight, sin_cos, q, k, v, gate,
            *rows.stride(), *q_weight.stride(), *k_weight.stride(), *sin_cos.stride(),
            *q.stride(), *k.stride(), *v.stride(), *gate.stride(),
            tokens, ends[0], ends[1],
            eps,
            QUERY_HEADS=query_heads, KEY_HEADS=key_heads, HEAD_DIM=head_dim, HALF=half,
            BLOCK_QUERY_HEADS=triton.next_power_of_2(query_heads), BLOCK_KEY_HEADS=triton.next_power_of_2(key_heads),
            BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(head_dim - 2 * half),
            num_warps=8 if query_heads * head_dim >= 4096 else 4,
        )  # fmt: skip
    return out
