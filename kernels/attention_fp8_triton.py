"""Attention in Triton with both products in fp8, full or within windows of frames, and what turns q, k, v into fp8."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .fp8 import FP8

LOG2_E = 1.4426950408889634
SHIFT = 8.0  # the largest weight of a row is 2**8: weights down to 2**-17 of it are e4m3 numbers above zero
BLOCK_QUERIES, BLOCK_KEYS = 64, 128
KEY_MULTIPLE = 32  # keys change places in groups of so many, see `values_kernel`


@triton.jit
def largest_kernel(
    k, v, key_largest, value_largest,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, tokens,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Raise key_largest [batch, heads] and value_largest [batch, heads, HEAD_DIM], 0 before, to the largest magnitudes.

    k and v [batch, heads, tokens, HEAD_DIM]; of k's a head's, of v's a column's. Each program sees BLOCK_TOKENS tokens.
    """
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    column = tl.arange(0, HEAD_DIM)
    inside = (token < tokens)[:, None]
    k_at = tl.multiple_of(batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head + token * k_token, 8)
    v_at = tl.multiple_of(batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head + token * v_token, 8)
    keys = tl.abs(tl.load(k + k_at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32))
    values = tl.abs(tl.load(v + v_at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32))
    tl.atomic_max(key_largest + tl.program_id(1), tl.max(tl.max(keys, axis=1), axis=0), sem="relaxed")
    tl.atomic_max(value_largest + tl.program_id(1) * HEAD_DIM + column, tl.max(values, axis=0), sem="relaxed")


@triton.jit
def rows_kernel(
    x, key_largest, out, scale,
    x_batch, x_head, x_token,
    heads, group, tokens, rows,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Quantise rows of x [batch, heads, tokens, HEAD_DIM], keys with one scale a head: `key_largest` / 448.

    QUERIES: every row has a scale of its own, and what goes into `scale` is that times the scale of its keys.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, head, batch = row % tokens, (row // tokens) % heads, row // tokens // heads
    column = tl.arange(0, HEAD_DIM)
    inside = row < rows
    at = tl.multiple_of(batch * x_batch + head * x_head + token * x_token, 8)
    values = tl.load(x + at[:, None] + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    largest = tl.load(key_largest + batch * (heads // group) + head // group, mask=inside, other=1.0).to(tl.float32)
    factor = tl.maximum(largest, 1e-12) / 448.0
    if QUERIES:
        own = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-12) / 448.0
        tl.store(scale + row, own * factor, mask=inside)
        factor = own
    quantised = (values / factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * HEAD_DIM)[:, None] + column[None, :], quantised, mask=inside[:, None])


@triton.jit
def values_kernel(
    x, largest, out, scale,
    x_batch, x_head, x_token, out_row,
    heads, tokens,
    HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Quantise values [batch, heads, tokens, HEAD_DIM] with a scale a column, transposed: out [.., HEAD_DIM, tokens].

    Of 32 keys the one at 16b + 8c + 2t + e goes to 16b + 4t + 2c + e: a thread of an fp8 product holds those weights.
    """
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    place = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    key = place // 16 * 16 + (place // 2) % 2 * 8 + (place // 4) % 4 * 2 + place % 2
    column = tl.arange(0, HEAD_DIM)
    at = tl.multiple_of(batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head + key.to(tl.int64) * x_token, 8)
    values = tl.load(x + at[:, None] + column[None, :], mask=(key < tokens)[:, None], other=0.0).to(tl.float32)
    factor = tl.maximum(tl.load(largest + tl.program_id(1) * HEAD_DIM + column).to(tl.float32), 1e-12) / 448.0
    if tl.program_id(0) == 0:
        tl.store(scale + tl.program_id(1) * HEAD_DIM + column, factor)
    quantised = tl.trans((values / factor[None, :]).to(out.dtype.element_ty))
    out_at = (tl.program_id(1) * HEAD_DIM + column).to(tl.int64) * out_row
    tl.store(out + out_at[:, None] + place[None, :], quantised, mask=(place < out_row)[None, :])


@triton.jit
def attend_to(
    keys, values, queries, query_scale, row_of_keys, row_of_values, first, last, largest, total, out,
    SHIFT: tl.constexpr, BLOCK_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Go on with the running softmax over keys `first` to `last`, maybe none; blocks start at multiples of 32."""
    BLOCK_QUERIES: tl.constexpr = queries.shape[0]
    start = tl.where(first < last, first // 32 * 32, last)
    for key in tl.range(start, last, BLOCK_KEYS):
        scores = tl.dot(queries, keys.load([row_of_keys + key, 0]).T)
        if (key < first) | (key + BLOCK_KEYS > last):
            at = key + tl.arange(0, BLOCK_KEYS)
            scores = tl.where(((at >= first) & (at < last))[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * query_scale)
        weights = tl.exp2(scores * query_scale[:, None] - (new_largest - SHIFT)[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.reshape([BLOCK_QUERIES, BLOCK_KEYS // 32, 2, 2, 4, 2]).permute((0, 1, 2, 4, 3, 5))
        weights = weights.reshape([BLOCK_QUERIES, BLOCK_KEYS]).to(values.dtype)
        product = tl.dot(weights, values.load([row_of_values, key]).T)
        out = out * shrink[:, None] + product
        largest = new_largest
    return largest, total, out


@triton.jit
def attention_kernel(
    q, query_scale, keys, values, value_scale, out,
    out_batch, out_head, out_token,
    query_heads, group, tokens, frame, frames, radius, scale,
    SHIFT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Each program serves BLOCK_QUERIES queries of one head.

    The first `frames` * `frame` queries see the frames within `radius` of their own and all tokens after the frames;
    the other queries see all tokens.
    """
    video = frames * frame
    blocks_of_rest = tl.cdiv(tokens - video, BLOCK_QUERIES)  # the longest work comes first
    block = tl.program_id(0) - blocks_of_rest
    first_query = video + (block + blocks_of_rest) * BLOCK_QUERIES
    end_query = tokens
    near, near_end, far = 0, tokens, tokens
    if block >= 0:
        blocks_of_frame = tl.cdiv(frame, BLOCK_QUERIES)
        at = block // blocks_of_frame
        first_query = at * frame + (block % blocks_of_frame) * BLOCK_QUERIES
        end_query = (at + 1) * frame
        near = tl.maximum(at - radius, 0) * frame
        near_end = tl.minimum(at + radius + 1, frames) * frame
        far = video
    head = tl.program_id(1) % query_heads
    batch = tl.program_id(1) // query_heads
    key_head = batch * (query_heads // group) + head // group

    query = first_query + tl.arange(0, BLOCK_QUERIES)
    column = tl.arange(0, HEAD_DIM)
    inside = query < end_query
    row = tl.program_id(1).to(tl.int64) * tokens + query
    queries = tl.load(q + (row * HEAD_DIM)[:, None] + column[None, :], mask=inside[:, None], other=0.0)
    factor = tl.load(query_scale + row, mask=inside, other=1.0) * scale
    largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    result = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    largest, total, result = attend_to(
        keys, values, queries, factor, key_head * tokens, key_head * HEAD_DIM, near, near_end,
        largest, total, result, SHIFT, BLOCK_KEYS, HEAD_DIM,
    )  # fmt: skip
    largest, total, result = attend_to(
        keys, values, queries, factor, key_head * tokens, key_head * HEAD_DIM, far, tokens,
        largest, total, result, SHIFT, BLOCK_KEYS, HEAD_DIM,
    )  # fmt: skip
    result = result / total[:, None] * tl.load(value_scale + key_head * HEAD_DIM + column)[None, :]
    out_row = out + batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head + query.to(tl.int64) * out_token
    tl.store(out_row[:, None] + column[None, :], result.to(out.dtype.element_ty), mask=inside[:, None])


def quantised(q, k, v):
    """Return q [B,Hq,N,d] as fp8 with scales [B,Hq,N], k as fp8, v as fp8 [B,Hkv,d,N rounded up] with scales [B,Hkv,d].

    The scales of q are those of the scores: the scale of k is taken in.
    """
    (batch, heads, tokens, head_dim), key_heads = q.shape, k.shape[1]
    with torch.cuda.device_of(q):
        largest = torch.zeros(batch * key_heads * (1 + head_dim), dtype=torch.float32, device=q.device)
        key_largest, value_largest = largest.split((batch * key_heads, batch * key_heads * head_dim))
        largest_kernel[(triton.cdiv(tokens, 128), batch * key_heads)](
            k, v, key_largest, value_largest, *k.stride()[:3], *v.stride()[:3], key_heads, tokens,
            HEAD_DIM=head_dim, BLOCK_TOKENS=128, num_warps=8,
        )  # fmt: skip
        query_scale = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        narrow_q, narrow_k = (torch.empty(x.shape, dtype=FP8, device=q.device) for x in (q, k))
        for x, out, group, queries in ((q, narrow_q, heads // key_heads, True), (k, narrow_k, 1, False)):
            rows = out.numel() // head_dim
            rows_kernel[(triton.cdiv(rows, 64),)](
                x, key_largest, out, query_scale, *x.stride()[:3], x.shape[1], group, tokens, rows,
                QUERIES=queries, HEAD_DIM=head_dim, BLOCK_ROWS=64, num_warps=4,
            )  # fmt: skip
        padded = -(-tokens // KEY_MULTIPLE) * KEY_MULTIPLE
        narrow_v = torch.empty((batch, key_heads, head_dim, padded), dtype=FP8, device=q.device)
        value_scale = torch.empty((batch, key_heads, head_dim), dtype=torch.float32, device=q.device)
        values_kernel[(triton.cdiv(padded, 128), batch * key_heads)](
            v, value_largest, narrow_v, value_scale, *v.stride()[:3], padded, key_heads, tokens,
            HEAD_DIM=head_dim, BLOCK_KEYS=128, num_warps=8,
        )  # fmt: skip
    return narrow_q, query_scale, narrow_k, narrow_v, value_scale


def blocks_of_queries(tokens, frame, frames, size):
    """Return how many blocks of queries the kernels want."""
    return triton.cdiv(tokens - frames * frame, size) + frames * triton.cdiv(frame, size)


def attention(q, k, v, frame=0, frames=0, radius=0, fp8=True, out=None):
    """`reference.attention` with fp8, for bf16 q, k, v with heads of 128; `out` takes the result if given."""
    assert fp8
    (batch, heads, tokens, head_dim), key_heads = q.shape, k.shape[1]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    narrow_q, query_scale, narrow_k, narrow_v, value_scale = quantised(q, k, v)
    keys = TensorDescriptor.from_tensor(narrow_k.view(-1, head_dim), [BLOCK_KEYS, head_dim])
    values = TensorDescriptor.from_tensor(narrow_v.view(-1, narrow_v.shape[-1]), [head_dim, BLOCK_KEYS])
    with torch.cuda.device_of(q):
        attention_kernel[(blocks_of_queries(tokens, frame, frames, BLOCK_QUERIES), batch * heads)](
            narrow_q, query_scale, keys, values, value_scale, out, *out.stride()[:3],
            heads, heads // key_heads, tokens, frame, frames, radius, head_dim**-0.5 * LOG2_E,
            SHIFT=SHIFT, HEAD_DIM=head_dim, BLOCK_QUERIES=BLOCK_QUERIES, BLOCK_KEYS=BLOCK_KEYS,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
