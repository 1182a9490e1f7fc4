"""Attention for Hopper in Gluon, Triton's lower level: one warp loads, two warpgroups multiply and take the softmax.

Queries are cut into blocks of 128, 64 for each warpgroup; keys and values come by TMA, 128 at a time. While the scores
of a block are softened, the values of the block before are multiplied; the warpgroups take turns in giving the tensor
cores work, so that one softens while the other's products run. On an H200, at 65,706 tokens: 610 TFLOP/s in bf16 and
833 in fp8, where a large matmul reaches 723 and 1,458 and cuDNN's attention 565 (benchmarks/results).

Tried on the card and slower: exponentials by a polynomial for one in four or eight, scores multiplied two blocks ahead
(no registers are left), one barrier for keys and values together, blocks of 64 keys. A third stage changed nothing.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_fp8_triton import LOG2_E, SHIFT, blocks_of_queries, quantised
from .attention_tiles_hopper import block_of_keys, blocks_of_range, load_blocks, range_of_block

warps_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7
BLOCK_QUERIES, BLOCK_KEYS = 128, 128
STAGES = 2  # tiles of keys and of values that are on their way or at work


@gluon.jit
def cut_off(scores, key, first, end, BLOCK_KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """Take the keys before `first` and from `end` on out of a block of scores."""
    if (key < first) | (key + BLOCK_KEYS > end):
        at = key + gl.arange(0, BLOCK_KEYS, layout=gl.SliceLayout(0, LAYOUT))
        inside = gl.expand_dims((at >= first) & (at < end), 0)
        scores = gl.where(inside, scores, float("-inf"))
    return scores


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, LAYOUT: gl.constexpr, FP8_PRODUCTS: gl.constexpr):
    """Return weights as what a product takes from registers.

    For fp8 products a thread must hold four neighbouring keys, and holds twice two: the keys change places, as the
    values have (`attention_fp8_triton.values_kernel`), and no weight has to move.
    """
    if FP8_PRODUCTS:
        rows: gl.constexpr = weights.shape[0]
        keys: gl.constexpr = weights.shape[1]
        weights = weights.reshape([rows, keys // 32, 2, 2, 4, 2]).permute((0, 1, 2, 4, 3, 5)).reshape([rows, keys])
        weights = gl.convert_layout(weights, LAYOUT, assert_trivial=True)
        operand = gl.inline_asm_elementwise(  # what a cast does, without taking bytes apart and together again
            """
            {
                .reg .b16 low, high;
                cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
                cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
                mov.b32 $0, {low, high};
            }
            """,
            "=r,r,r,r,r", [weights], dtype=gl.float8e4nv, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        operand = gl.convert_layout(weights, LAYOUT)
    return operand


@gluon.jit
def sums_of_threads(weights):
    """Return [rows, 4]: the sums over what each of a row's four threads holds, for which no thread asks another."""
    rows: gl.constexpr = weights.shape[0]
    keys: gl.constexpr = weights.shape[1]
    return gl.sum(gl.sum(weights.reshape([rows, keys // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def soften(scores, factor, largest, total, dtype: gl.constexpr, SHIFT: gl.constexpr):
    """Return a block's weights and what the running softmax becomes: largest score, sums, by what both shrink."""
    new_largest = gl.maximum(largest, gl.max(scores, axis=1) * factor)
    weights = gl.exp2(scores * gl.expand_dims(factor, 1) - gl.expand_dims(new_largest - SHIFT, 1))
    shrink = gl.exp2(largest - new_largest)
    sums = sums_of_threads(weights)
    total = total * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout)), 1) + sums
    if dtype == gl.bfloat16:  # fp8 is packed just before the product: bytes do not pass a loop's end in one register
        weights = weights.to(dtype)
    return weights, new_largest, total, shrink


@gluon.jit
def serve_queries(
    part, q, query_scale, value_scale, out, query_tile, key_tiles, value_tiles,
    keys_full, values_full, keys_empty, values_empty, turns,
    q_token, out_token, row, first_query, end_query, blocks, near, near_end, far, tokens, scale,
    FP8_PRODUCTS: gl.constexpr, SHIFT: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup, `part` 0 or 1: ROWS queries through all blocks of keys."""
    DEPTH: gl.constexpr = 32 if FP8_PRODUCTS else 16  # of a product, in keys or columns
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KEYS, DEPTH])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, DEPTH])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, DEPTH // 8)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = key_tiles.dtype

    first_query += part * ROWS
    query = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOADED))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LOADED))
    loaded = gl.load(
        q + gl.expand_dims(query.to(gl.int64) * q_token, 1) + gl.expand_dims(column, 0),
        mask=gl.expand_dims(query < end_query, 1), other=0.0,
    )  # fmt: skip
    query_tile.store(loaded)
    fence_async_shared()
    warps_barrier()
    at = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    factor = gl.full([ROWS], 1.0, gl.float32, layout=gl.SliceLayout(1, SCORES)) * scale
    if FP8_PRODUCTS:
        factor *= gl.load(query_scale + row * tokens + at, mask=at < end_query, other=1.0)
    largest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    nothing = gl.zeros([ROWS, BLOCK_KEYS], gl.float32, layout=SCORES)
    total = sums_of_threads(nothing)
    result = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=OUT)

    mbarrier.wait(keys_full.index(0), 0)
    scores = warpgroup_mma(query_tile, key_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores, key_tiles))[0]
    warps_barrier()
    mbarrier.arrive(keys_empty.index(0), count=1)
    key, first, end = block_of_keys(0, near, near_end, far, tokens, BLOCK_KEYS)
    scores = cut_off(scores, key, first, end, BLOCK_KEYS, SCORES)
    weights, largest, total, shrink = soften(scores, factor, largest, total, dtype, SHIFT)
    for number in range(1, blocks):
        stage = number % STAGES
        before = (number - 1) % STAGES
        mbarrier.wait(keys_full.index(stage), (number // STAGES) & 1)
        mbarrier.wait(turns.index(part), (number - part) & 1)
        next_scores = warpgroup_mma(
            query_tile, key_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        operand = as_operand(weights, dtype, OPERAND, FP8_PRODUCTS)
        mbarrier.wait(values_full.index(before), ((number - 1) // STAGES) & 1)
        value_tile = value_tiles.index(before)
        if FP8_PRODUCTS:
            value_tile = value_tile.permute((1, 0))
        product = warpgroup_mma(operand, value_tile, result, is_async=True)
        mbarrier.arrive(turns.index(1 - part), count=1)
        scores = warpgroup_mma_wait(1, deps=(next_scores, key_tiles))[0]
        warps_barrier()
        mbarrier.arrive(keys_empty.index(stage), count=1)
        key, first, end = block_of_keys(number, near, near_end, far, tokens, BLOCK_KEYS)
        scores = cut_off(scores, key, first, end, BLOCK_KEYS, SCORES)
        weights, largest, total, shrink = soften(scores, factor, largest, total, dtype, SHIFT)
        product = warpgroup_mma_wait(0, deps=(product, value_tiles))[0]
        warps_barrier()
        mbarrier.arrive(values_empty.index(before), count=1)
        result = product * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    stage = (blocks - 1) % STAGES
    value_tile = value_tiles.index(stage)
    if FP8_PRODUCTS:
        value_tile = value_tile.permute((1, 0))
    operand = as_operand(weights, dtype, OPERAND, FP8_PRODUCTS)
    mbarrier.wait(values_full.index(stage), ((blocks - 1) // STAGES) & 1)
    product = warpgroup_mma(operand, value_tile, result, is_async=True)
    result = warpgroup_mma_wait(0, deps=(product, value_tiles))[0]

    result = result / gl.expand_dims(gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, OUT)), 1)
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    if FP8_PRODUCTS:
        result *= gl.expand_dims(gl.load(value_scale + column), 0)
    at = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    gl.store(
        out + gl.expand_dims(at.to(gl.int64) * out_token, 1) + gl.expand_dims(column, 0),
        result.to(out.dtype.element_ty), mask=gl.expand_dims(at < end_query, 1),
    )  # fmt: skip


@gluon.jit
def attention_kernel(
    q, query_scale, keys, values, value_scale, out,
    q_batch, q_head, q_token, out_batch, out_head, out_token,
    query_heads, group, tokens, frame, frames, radius, scale,
    FP8_PRODUCTS: gl.constexpr, SHIFT: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_QUERIES: gl.constexpr,
    BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`attention_fp8_triton.attention_kernel`, or the same in bf16: values not transposed, scales not read."""
    first_query, end_query, near, near_end, far = range_of_block(tokens, frame, frames, radius, BLOCK_QUERIES)
    blocks = blocks_of_range(near, near_end, BLOCK_KEYS) + blocks_of_range(far, tokens, BLOCK_KEYS)
    head = gl.program_id(1) % query_heads
    batch = gl.program_id(1) // query_heads
    key_head = batch * (query_heads // group) + head // group
    row_of_keys = key_head * tokens
    row_of_values = row_of_keys
    if FP8_PRODUCTS:
        row_of_values = key_head * HEAD_DIM
    q += batch.to(gl.int64) * q_batch + head.to(gl.int64) * q_head
    out += batch.to(gl.int64) * out_batch + head.to(gl.int64) * out_head
    value_scale += key_head * HEAD_DIM
    row = (batch * query_heads + head).to(gl.int64)

    ROWS: gl.constexpr = BLOCK_QUERIES // 2
    dtype: gl.constexpr = keys.dtype
    QUERY_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    query_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], QUERY_TILE)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_KEYS, HEAD_DIM], keys.layout)
    value_tiles = gl.allocate_shared_memory(dtype, [STAGES] + values.block_type.shape, values.layout)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(keys_empty.index(stage), count=2)
        mbarrier.init(values_empty.index(stage), count=2)
    for part in gl.static_range(2):
        mbarrier.init(turns.index(part), count=1)
    gl.warp_specialize(
        [
            (serve_queries, (
                0, q, query_scale, value_scale, out, query_tiles.index(0), key_tiles, value_tiles,
                keys_full, values_full, keys_empty, values_empty, turns,
                q_token, out_token, row, first_query, end_query, blocks, near, near_end, far, tokens, scale,
                FP8_PRODUCTS, SHIFT, HEAD_DIM, ROWS, BLOCK_KEYS, STAGES,
            )),
            (serve_queries, (
                1, q, query_scale, value_scale, out, query_tiles.index(1), key_tiles, value_tiles,
                keys_full, values_full, keys_empty, values_empty, turns,
                q_token, out_token, row, first_query, end_query, blocks, near, near_end, far, tokens, scale,
                FP8_PRODUCTS, SHIFT, HEAD_DIM, ROWS, BLOCK_KEYS, STAGES,
            )),
            (load_blocks, (
                keys, values, key_tiles, value_tiles, keys_full, values_full, keys_empty, values_empty,
                row_of_keys, row_of_values, blocks, near, near_end, far, tokens,
                FP8_PRODUCTS, BLOCK_KEYS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def attention(q, k, v, frame=0, frames=0, radius=0, fp8=False, out=None):
    """`reference.attention` of bf16 q, k, v with heads of 128; `out` takes the result if given."""
    (batch, heads, tokens, head_dim), key_heads = q.shape, k.shape[1]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if fp8:
        q, query_scale, k, v, value_scale = quantised(q, k, v)
        value_rows, value_block, dtype = v.view(-1, v.shape[-1]), [head_dim, BLOCK_KEYS], gl.float8e4nv
    else:
        query_scale = value_scale = q
        value_rows, value_block, dtype = v.reshape(-1, head_dim), [BLOCK_KEYS, head_dim], gl.bfloat16
    key_block = [BLOCK_KEYS, head_dim]
    key_layout, value_layout = (
        gl.NVMMASharedLayout.get_default_for(block, dtype) for block in (key_block, value_block)
    )
    keys = TensorDescriptor.from_tensor(k.reshape(-1, head_dim), key_block, key_layout)
    values = TensorDescriptor.from_tensor(value_rows, value_block, value_layout)
    with torch.cuda.device_of(q):
        attention_kernel[(blocks_of_queries(tokens, frame, frames, BLOCK_QUERIES), batch * heads)](
            q, query_scale, keys, values, value_scale, out, *q.stride()[:3], *out.stride()[:3],
            heads, heads // key_heads, tokens, frame, frames, radius, head_dim**-0.5 * LOG2_E,
            FP8_PRODUCTS=fp8, SHIFT=SHIFT if fp8 else 0.0, HEAD_DIM=head_dim, BLOCK_QUERIES=BLOCK_QUERIES,
            BLOCK_KEYS=BLOCK_KEYS, STAGES=STAGES, num_warps=4,
        )  # fmt: skip
    return out
