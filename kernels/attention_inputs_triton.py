"""From the rows of the fused projection to q, k, v and gate in one pass, in Triton: norm, rotation, layout, sigmoid."""

import itertools
import math

import torch
import triton
import triton.language as tl

from .fp8 import FP8_MAX, KEY_MAX, QUERY_MAX
from .reference import empty_attention_inputs
from .rows_triton import alignment, row_scale, strides_in

BLOCK_TOKENS = 4
KEY_MAX = tl.constexpr(KEY_MAX)
TO_QUERY_MAX = tl.constexpr(FP8_MAX / QUERY_MAX)
HEADS_PER_PROGRAM = 8  # sines, cosines and weights are read once for so many heads


@triton.jit
def norm_and_rotate(
    rows, out, scale, weight, angles, inside, key_scale,
    out_head, out_column, scale_head, weight_column, rows_column, angles_column, first_head, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr, BLOCK_DIM: tl.constexpr, TOGETHER: tl.constexpr,
    QUERIES_TO_FP8: tl.constexpr, KEYS_TO_FP8: tl.constexpr,
):  # fmt: skip
    """Norm and rotate some heads of a block of tokens: columns c and c + HALF are a pair, the rest is no pair.

    rows, out, scale, weight and angles [BLOCK_TOKENS] point at each token's first head, where that goes and its scale,
    weights, sines and cosines. QUERIES_TO_FP8: every row is scaled for itself; KEYS_TO_FP8: all by `key_scale`.
    """
    column = tl.arange(0, BLOCK_DIM)
    partner = tl.where(column < HALF, column + HALF, tl.where(column < 2 * HALF, column - HALF, column))
    partner = tl.max_contiguous(tl.multiple_of(partner, TOGETHER), TOGETHER)
    angle = tl.where(column < HALF, column, tl.where(column < 2 * HALF, column - HALF, 0))
    angle = tl.max_contiguous(tl.multiple_of(angle, TOGETHER), TOGETHER)
    here = inside[:, None] & (column < HEAD_DIM)[None, :]
    paired = inside[:, None] & (column < 2 * HALF)[None, :]
    sine = tl.load(angles[:, None] + (angle * angles_column)[None, :], mask=paired, other=0.0)
    cosine = tl.load(angles[:, None] + ((angle + HALF) * angles_column)[None, :], mask=paired, other=1.0)
    own = tl.load(weight[:, None] + (column * weight_column)[None, :], mask=here, other=0.0).to(tl.float32) + 1.0
    other = tl.load(weight[:, None] + (partner * weight_column)[None, :], mask=here, other=0.0).to(tl.float32) + 1.0
    own *= cosine
    other *= tl.where((column < HALF)[None, :], -sine, sine)
    heads = tl.arange(0, HEADS_PER_PROGRAM)[None, :]
    scales = tl.zeros([BLOCK_TOKENS, HEADS_PER_PROGRAM], tl.float32)
    for number in tl.static_range(HEADS_PER_PROGRAM):
        head = first_head + number
        here_too = here & (head < HEADS)
        x = rows[:, None] + head * HEAD_DIM * rows_column
        values = tl.load(x + (column * rows_column)[None, :], mask=here_too, other=0.0).to(tl.float32)
        partners = tl.load(x + (partner * rows_column)[None, :], mask=here_too, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(values * values, axis=1) / HEAD_DIM + eps)
        turned = (values * own + partners * other) * inverse[:, None]
        if QUERIES_TO_FP8:
            factor = row_scale(turned, axis=1) * TO_QUERY_MAX
            scales = tl.where(heads == number, (factor * key_scale)[:, None], scales)
            turned *= (1.0 / factor)[:, None]
        if KEYS_TO_FP8:
            turned *= (1.0 / key_scale)[:, None]
        to = out[:, None] + head * out_head + (column * out_column)[None, :]
        tl.store(to, turned.to(out.dtype.element_ty), mask=here_too)
    if QUERIES_TO_FP8:  # those of all heads at once: a store of few numbers makes warps wait for each other
        heads += first_head
        tl.store(scale[:, None] + heads * scale_head, scales, mask=inside[:, None] & (heads < HEADS))


@triton.jit
def scale_of_keys(
    weight, weight_expert, weight_column,
    EXPERTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Return [BLOCK_TOKENS] times the scale that brings the largest number of any expert's normed keys to KEY_MAX.

    Once for every token, so that no warp waits for another one's share of the columns.
    """
    column = tl.arange(0, BLOCK_DIM)[None, :] + tl.zeros([BLOCK_TOKENS, 1], tl.int32)
    largest = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    for expert in tl.static_range(EXPERTS):
        at = weight + expert * weight_expert + column * weight_column
        largest = tl.maximum(largest, tl.abs(tl.load(at, mask=column < HEAD_DIM, other=-1.0).to(tl.float32) + 1.0))
    return tl.maximum(tl.max(largest, axis=1) * tl.sqrt(HEAD_DIM * 1.0), 1e-12) / KEY_MAX


@triton.jit
def attention_inputs_kernel(
    rows, q_weight, k_weight, sin_cos, q, q_scale, k, v, gate,
    rows_batch, rows_token, rows_column,
    q_weight_expert, q_weight_column, k_weight_expert, k_weight_column,
    sin_cos_token, sin_cos_column,
    q_batch, q_head, q_token, q_column,
    q_scale_batch, q_scale_head, q_scale_token,
    k_batch, k_head, k_token, k_column,
    v_batch, v_head, v_token, v_column,
    gate_batch, gate_token, gate_head,
    tokens, first_end, second_end,
    eps,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr, BLOCK_QUERY_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, TOGETHER: tl.constexpr, ROWS_ALIGNMENT: tl.constexpr,
    TO_FP8: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Each program serves BLOCK_TOKENS tokens of one clip and HEADS_PER_PROGRAM heads of q, k or v; v's first the gate.

    Tokens below first_end use the first row of both weights. Strides of rows but the last count ROWS_ALIGNMENT. TO_FP8:
    q and k are e4m3, with the scales of q's scores in q_scale; else that is not touched.
    """
    Q_PARTS: tl.constexpr = (QUERY_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    K_PARTS: tl.constexpr = (KEY_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    part = tl.program_id(0).to(tl.int64)
    inside = token < tokens
    row = rows + (batch * rows_batch + token * rows_token) * ROWS_ALIGNMENT
    if part < Q_PARTS + K_PARTS:
        expert = (token >= first_end).to(tl.int64) + (token >= second_end).to(tl.int64)
        angles = sin_cos + token * sin_cos_token
        scale = q_scale + batch * q_scale_batch + token * q_scale_token
        key_scale = 1.0
        if TO_FP8:
            key_scale = scale_of_keys(
                k_weight, k_weight_expert, k_weight_column, EXPERTS, HEAD_DIM, BLOCK_TOKENS, BLOCK_DIM
            )
        if part < Q_PARTS:
            norm_and_rotate(
                row, q + batch * q_batch + token * q_token, scale, q_weight + expert * q_weight_expert, angles, inside,
                key_scale, q_head, q_column, q_scale_head, q_weight_column, rows_column, sin_cos_column,
                part * HEADS_PER_PROGRAM, eps,
                QUERY_HEADS, HEAD_DIM, HALF, BLOCK_TOKENS, HEADS_PER_PROGRAM, BLOCK_DIM, TOGETHER, TO_FP8, False,
            )  # fmt: skip
        else:
            norm_and_rotate(
                row + QUERY_HEADS * HEAD_DIM * rows_column, k + batch * k_batch + token * k_token, scale,
                k_weight + expert * k_weight_expert, angles, inside, key_scale,
                k_head, k_column, q_scale_head, k_weight_column, rows_column, sin_cos_column,
                (part - Q_PARTS) * HEADS_PER_PROGRAM, eps,
                KEY_HEADS, HEAD_DIM, HALF, BLOCK_TOKENS, HEADS_PER_PROGRAM, BLOCK_DIM, TOGETHER, False, TO_FP8,
            )  # fmt: skip
    else:
        column = tl.arange(0, BLOCK_DIM)[None, :]
        v_row = (v + batch * v_batch + token * v_token)[:, None]
        x = (row + (QUERY_HEADS + KEY_HEADS) * HEAD_DIM * rows_column)[:, None]
        first_head = (part - Q_PARTS - K_PARTS) * HEADS_PER_PROGRAM
        for number in tl.static_range(HEADS_PER_PROGRAM):
            head = first_head + number
            here = inside[:, None] & (column < HEAD_DIM) & (head < KEY_HEADS)
            value = tl.load(x + head * HEAD_DIM * rows_column + column * rows_column, mask=here)
            tl.store(v_row + head * v_head + column * v_column, value, mask=here)
        if first_head == 0:
            query_head = tl.arange(0, BLOCK_QUERY_HEADS)[None, :]
            gate_inside = inside[:, None] & (query_head < QUERY_HEADS)
            logits = x + (KEY_HEADS * HEAD_DIM + query_head) * rows_column
            gates = tl.sigmoid(tl.load(logits, mask=gate_inside, other=0.0).to(tl.float32))
            gate_row = (gate + batch * gate_batch + token * gate_token)[:, None]
            tl.store(gate_row + query_head * gate_head, gates, mask=gate_inside)


def attention_inputs(rows, q_weight, k_weight, spans, sin_cos, heads, eps=1e-6, out=None, fp8=False):
    """`reference.attention_inputs` for up to three spans, any strides; `out` takes the four results if given."""
    (batch, tokens, width), head_dim, (query_heads, key_heads) = rows.shape, q_weight.shape[-1], heads
    assert width == (query_heads + 2 * key_heads) * head_dim + query_heads
    assert len(spans) == q_weight.shape[0] == k_weight.shape[0] <= 3 and sum(spans) == tokens == sin_cos.shape[0]
    if out is None:
        out = empty_attention_inputs(rows, rows.dtype, heads, head_dim, fp8)
    if rows.numel() == 0:
        return out
    half = sin_cos.shape[-1] // 2
    ends = [*itertools.accumulate(spans), tokens, tokens]
    q, k, v, gate = out
    q, q_scale = q if fp8 else (q, gate)  # the kernel does not touch a scale where nothing is quantised
    row_alignment = alignment(rows)
    parts = triton.cdiv(query_heads, HEADS_PER_PROGRAM) + 2 * triton.cdiv(key_heads, HEADS_PER_PROGRAM)
    with torch.cuda.device_of(rows):
        attention_inputs_kernel[(parts, triton.cdiv(tokens, BLOCK_TOKENS), batch)](
            rows, q_weight, k_weight, sin_cos, q, q_scale, k, v, gate,
            *strides_in(row_alignment, rows), *q_weight.stride(), *k_weight.stride(), *sin_cos.stride(),
            *q.stride(), *q_scale.stride()[:3], *k.stride(), *v.stride(), *gate.stride(),
            tokens, ends[0], ends[1],
            eps,
            QUERY_HEADS=query_heads, KEY_HEADS=key_heads, HEAD_DIM=head_dim, HALF=half,
            BLOCK_TOKENS=BLOCK_TOKENS, HEADS_PER_PROGRAM=HEADS_PER_PROGRAM,
            BLOCK_QUERY_HEADS=triton.next_power_of_2(query_heads), BLOCK_DIM=triton.next_power_of_2(head_dim),
            TOGETHER=math.gcd(half, 16), ROWS_ALIGNMENT=row_alignment, TO_FP8=fp8, EXPERTS=len(spans),
            num_warps=4,
        )  # fmt: skip
    return out
