"""Attention in Triton with both products in fp8, full or within windows of frames, and what turns values into fp8."""

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
    x, largest, x_batch, x_head, x_token, heads, tokens, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr
):
    """Raise largest [batch, heads, HEAD_DIM], 0 before, to the largest magnitudes of the columns of values x.

    x [batch, heads, tokens, HEAD_DIM]; each program sees BLOCK_TOKENS tokens of one head.
    """
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    column = tl.arange(0, HEAD_DIM)
    at = tl.multiple_of(batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head + token * x_token, 8)
    values = tl.load(x + at[:, None] + column[None, :], mask=(token < tokens)[:, None], other=0.0).to(tl.float32)
    tl.atomic_max(largest + tl.program_id(1) * HEAD_DIM + column, tl.max(tl.abs(values), axis=0), sem="relaxed")


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


def quantised_values(v):
    """Return v [B, H, N, d] as fp8 [B, H, d, N rounded up], in the kernels' order of keys, and its scales [B, H, d]."""
    batch, heads, tokens, head_dim = v.shape
    padded = -(-tokens // KEY_MULTIPLE) * KEY_MULTIPLE
    with torch.cuda.device_of(v):
        largest = torch.zeros((batch, heads, head_dim), dtype=torch.float32, device=v.device)
        largest_kernel[(triton.cdiv(tokens, 128), batch * heads)](
            v, largest, *v.stride()[:3], heads, tokens, HEAD_DIM=head_dim, BLOCK_TOKENS=128, num_warps=8
        )
        narrow = torch.empty((batch, heads, head_dim, padded), dtype=FP8, device=v.device)
        scale = torch.empty_like(largest)
        values_kernel[(triton.cdiv(padded, 128), batch * heads)](
            v, largest, narrow, scale, *v.stride()[:3], padded, heads, tokens,
            HEAD_DIM=head_dim, BLOCK_KEYS=128, num_warps=8,
        )  # fmt: skip
    return narrow, scale


def blocks_of_queries(tokens, frame, frames, size):
    """Return how many blocks of queries the kernels want."""
    return triton.cdiv(tokens - frames * frame, size) + frames * triton.cdiv(frame, size)


def attention(q, k, v, frame=0, frames=0, radius=0, out=None):
    """`reference.attention` of q and k as `fp8.fp8_scores` gives them and bf16 v, with heads of 128.

    `out` takes the result if given.
    """
    (batch, heads, tokens, head_dim), key_heads = q.shape, k.shape[1]
    if out is None:
        out = torch.empty(q.shape, dtype=v.dtype, device=v.device)
    assert q.values.is_contiguous() and q.scale.is_contiguous() and k.is_contiguous()
    narrow_v, value_scale = quantised_values(v)
    keys = TensorDescriptor.from_tensor(k.view(-1, head_dim), [BLOCK_KEYS, head_dim])
    values = TensorDescriptor.from_tensor(narrow_v.view(-1, narrow_v.shape[-1]), [head_dim, BLOCK_KEYS])
    with torch.cuda.device_of(v):
        attention_kernel[(blocks_of_queries(tokens, frame, frames, BLOCK_QUERIES), batch * heads)](
            q.values, q.scale, keys, values, value_scale, out, *out.stride()[:3],
            heads, heads // key_heads, tokens, frame, frames, radius, head_dim**-0.5 * LOG2_E,
            SHIFT=SHIFT, HEAD_DIM=head_dim, BLOCK_QUERIES=BLOCK_QUERIES, BLOCK_KEYS=BLOCK_KEYS,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
