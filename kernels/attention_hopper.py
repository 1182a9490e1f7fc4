"""Attention for Hopper in Gluon, Triton's lower level: one warp loads, two warpgroups multiply and take the softmax."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

warps_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the name before Triton 3.7


@gluon.jit
def range_of_block(tokens, frame, frames, radius, BLOCK_QUERIES: gl.constexpr):
    """Return what this program serves: its queries and both ranges of keys, `near` to `near_end` and `far` to tokens."""
    video = frames * frame
    blocks_of_rest = gl.cdiv(tokens - video, BLOCK_QUERIES)  # the longest work comes first
    block = gl.program_id(0) - blocks_of_rest
    first_query = video + (block + blocks_of_rest) * BLOCK_QUERIES
    end_query = tokens
    near, near_end, far = 0, tokens, tokens
    if block >= 0:
        blocks_of_frame = gl.cdiv(frame, BLOCK_QUERIES)
        at = block // blocks_of_frame
        first_query = at * frame + (block % blocks_of_frame) * BLOCK_QUERIES
        end_query = (at + 1) * frame
        near = gl.maximum(at - radius, 0) * frame
        near_end = gl.minimum(at + radius + 1, frames) * frame
        far = video
    return first_query, end_query, near, near_end, far


@gluon.jit
def blocks_of_range(first, last, BLOCK_KEYS: gl.constexpr):
    """Return how many blocks serve keys `first` to `last`: blocks start at multiples of 32."""
    return gl.cdiv(last - first // 32 * 32, BLOCK_KEYS)


@gluon.jit
def block_of_keys(number, near, near_end, far, tokens, BLOCK_KEYS: gl.constexpr):
    """Return where block `number` starts, and the range of keys that it is part of."""
    in_near = blocks_of_range(near, near_end, BLOCK_KEYS)
    key = near // 32 * 32 + number * BLOCK_KEYS
    first, end = near, near_end
    if number >= in_near:
        key = far // 32 * 32 + (number - in_near) * BLOCK_KEYS
        first, end = far, tokens
    return key, first, end


@gluon.jit
def load_blocks(
    keys, values, key_tiles, value_tiles, keys_full, values_full, keys_empty, values_empty,
    row_of_keys, row_of_values, blocks, near, near_end, far, tokens,
    VALUES_TRANSPOSED: gl.constexpr, BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: fill the ring of tiles as the two warpgroups empty it."""
    for number in range(blocks):
        stage = number % STAGES
        phase = (number // STAGES) & 1
        key, first, end = block_of_keys(number, near, near_end, far, tokens, BLOCK_KEYS)
        mbarrier.wait(keys_empty.index(stage), phase ^ 1)
        mbarrier.expect(keys_full.index(stage), keys.block_type.nbytes)
        tma.async_copy_global_to_shared(keys, [row_of_keys + key, 0], keys_full.index(stage), key_tiles.index(stage))
        mbarrier.wait(values_empty.index(stage), phase ^ 1)
        mbarrier.expect(values_full.index(stage), values.block_type.nbytes)
        if VALUES_TRANSPOSED:
            tma.async_copy_global_to_shared(
                values, [row_of_values, key], values_full.index(stage), value_tiles.index(stage)
            )
        else:
            tma.async_copy_global_to_shared(
                values, [row_of_values + key, 0], values_full.index(stage), value_tiles.index(stage)
            )


@gluon.jit
def cut_off(scores, key, first, end, BLOCK_KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """Take the keys before `first` and from `end` on out of a block of scores."""
    if (key < first) | (key + BLOCK_KEYS > end):
        at = key + gl.arange(0, BLOCK_KEYS, layout=gl.SliceLayout(0, LAYOUT))
        inside = gl.expand_dims((at >= first) & (at < end), 0)
        scores = gl.where(inside, scores, float("-inf"))
    return scores


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, LAYOUT: gl.constexpr, REORDER: gl.constexpr):
    """Return weights as what a product takes from registers.

    REORDER: fp8 products want four neighbouring keys in a thread, which holds twice two: the keys change places
    (`fp8_attention.reordered`) and no weight has to.
    """
    if REORDER:
        rows: gl.constexpr = weights.shape[0]
        keys: gl.constexpr = weights.shape[1]
        weights = weights.reshape([rows, keys // 32, 2, 2, 4, 2]).permute((0, 1, 2, 4, 3, 5)).reshape([rows, keys])
        weights = gl.convert_layout(weights, LAYOUT, assert_trivial=True)
        return gl.inline_asm_elementwise(  # what a cast does, without taking bytes apart and together again
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
    return gl.convert_layout(weights.to(dtype), LAYOUT)


def powers(count):
    """Return the assembly that turns `count` numbers x <= 8 into 2 ** x, the first of them by a polynomial.

    2 ** x = 2 ** whole * 2 ** part, part in [-0.5, 0.5]; of degree 3 the polynomial is off by 1e-4 of its value at
    most, far less than what rounding to fp8 or bf16 takes.
    """
    lines = [
        ".reg .f32 x, whole, part, power; .reg .b32 bits;",
        f"max.ftz.f32 x, ${count}, 0fC2FC0000;",  # -126
        "add.rn.ftz.f32 whole, x, 0f4B400000;",  # 1.5 * 2 ** 23 rounds to whole numbers, in the lowest bits
        "sub.rn.ftz.f32 part, whole, 0f4B400000;",
        "sub.rn.ftz.f32 part, x, part;",
        "fma.rn.ftz.f32 power, part, 0f3D615091, 0f3E7805EE;",  # 0.0550085, 0.2422101
        "fma.rn.ftz.f32 power, power, part, 0f3F317AFD;",  # 0.6932829
        "fma.rn.ftz.f32 power, power, part, 0f3F800000;",
        "mov.b32 bits, whole;",
        "shl.b32 bits, bits, 23;",
        "mov.b32 $0, power;",
        "add.s32 $0, $0, bits;",
    ]
    lines += [f"ex2.approx.ftz.f32 ${i}, ${count + i};" for i in range(1, count)]
    return "{" + " ".join(lines) + "}"


POWERS_OF_4, POWERS_OF_8 = gl.constexpr(powers(4)), gl.constexpr(powers(8))
REGISTERS_OF_4 = gl.constexpr(",".join(["=r"] * 4 + ["r"] * 4))
REGISTERS_OF_8 = gl.constexpr(",".join(["=r"] * 8 + ["r"] * 8))


@gluon.jit
def powers_of_two(x, EMULATED: gl.constexpr):
    """Return 2 ** x for x <= 8: EMULATED of eight powers are a polynomial's, because the card's unit has no time left."""
    if EMULATED == 1:
        return gl.inline_asm_elementwise(
            POWERS_OF_8, REGISTERS_OF_8, [x], dtype=gl.float32, is_pure=True, pack=8
        )
    if EMULATED == 2:
        return gl.inline_asm_elementwise(
            POWERS_OF_4, REGISTERS_OF_4, [x], dtype=gl.float32, is_pure=True, pack=4
        )
    return gl.exp2(x)


@gluon.jit
def sums_of_threads(weights):
    """Return [rows, 4]: the sums over what each of a row's four threads holds, for which no thread asks another."""
    rows: gl.constexpr = weights.shape[0]
    keys: gl.constexpr = weights.shape[1]
    return gl.sum(gl.sum(weights.reshape([rows, keys // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def soften(scores, factor, largest, total, SHIFT: gl.constexpr, EMULATED: gl.constexpr):
    """Return a block's weights and what the running softmax becomes: the largest score, the sum, by what both shrink."""
    new_largest = gl.maximum(largest, gl.max(scores, axis=1) * factor)
    weights = powers_of_two(
        scores * gl.expand_dims(factor, 1) - gl.expand_dims(new_largest - SHIFT, 1), EMULATED
    )
    shrink = gl.exp2(largest - new_largest)
    sums = sums_of_threads(weights)
    total = total * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout)), 1) + sums
    return weights, new_largest, total, shrink


@gluon.jit
def serve_queries(
    part, q, query_scale, value_scale, out, query_tile, key_tiles, value_tiles,
    keys_full, values_full, keys_empty, values_empty, turns,
    q_token, out_token, row, first_query, end_query, blocks, near, near_end, far, tokens, scale,
    FP8_PRODUCTS: gl.constexpr, SHIFT: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr, IN_TURN: gl.constexpr, EMULATED: gl.constexpr,
    PER_32: gl.constexpr,
):  # fmt: skip
    """One warpgroup: ROWS queries through all blocks; the scores of the next block are multiplied meanwhile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KEYS, 32 // (1 + (PER_32 == 2))])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 32 // (1 + (PER_32 == 2))])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, PER_32)
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
    weights, largest, total, shrink = soften(scores, factor, largest, total, SHIFT, EMULATED)
    if not FP8_PRODUCTS:
        weights = weights.to(dtype)
    for number in range(1, blocks):
        stage = number % STAGES
        before = (number - 1) % STAGES
        mbarrier.wait(keys_full.index(stage), (number // STAGES) & 1)
        if IN_TURN:
            mbarrier.wait(turns.index(part), (number - part) & 1)
        next_scores = warpgroup_mma(
            query_tile, key_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        operand = as_operand(weights, dtype, WEIGHTS, FP8_PRODUCTS)
        mbarrier.wait(values_full.index(before), ((number - 1) // STAGES) & 1)
        if FP8_PRODUCTS:
            tile = value_tiles.index(before).permute((1, 0))
        else:
            tile = value_tiles.index(before)
        product = warpgroup_mma(operand, tile, result, is_async=True)
        if IN_TURN:
            mbarrier.arrive(turns.index(1 - part), count=1)
        scores = warpgroup_mma_wait(1, deps=(next_scores, key_tiles))[0]
        warps_barrier()
        mbarrier.arrive(keys_empty.index(stage), count=1)
        key, first, end = block_of_keys(number, near, near_end, far, tokens, BLOCK_KEYS)
        scores = cut_off(scores, key, first, end, BLOCK_KEYS, SCORES)
        weights, largest, total, shrink = soften(scores, factor, largest, total, SHIFT, EMULATED)
        if not FP8_PRODUCTS:
            weights = weights.to(dtype)
        product = warpgroup_mma_wait(0, deps=(product, value_tiles))[0]
        warps_barrier()
        mbarrier.arrive(values_empty.index(before), count=1)
        result = product * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    stage = (blocks - 1) % STAGES
    operand = as_operand(weights, dtype, WEIGHTS, FP8_PRODUCTS)
    mbarrier.wait(values_full.index(stage), ((blocks - 1) // STAGES) & 1)
    if FP8_PRODUCTS:
        tile = value_tiles.index(stage).permute((1, 0))
    else:
        tile = value_tiles.index(stage)
    product = warpgroup_mma(operand, tile, result, is_async=True)
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
    BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr, IN_TURN: gl.constexpr, EMULATED: gl.constexpr,
):  # fmt: skip
    """`attention_triton.attention_kernel` with loads, products and softmax overlapped by hand."""
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
    PER_32: gl.constexpr = 4 if FP8_PRODUCTS else 2
    QUERY_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    query_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], QUERY_TILE)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_KEYS, HEAD_DIM], keys.layout)
    value_tiles = gl.allocate_shared_memory(dtype, [STAGES] + values.block_type.shape, values.layout)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(keys_empty.index(stage), count=2)
        mbarrier.init(values_empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (serve_queries, (
                0, q, query_scale, value_scale, out, query_tiles.index(0), key_tiles, value_tiles,
                keys_full, values_full, keys_empty, values_empty, turns,
                q_token, out_token, row, first_query, end_query, blocks, near, near_end, far, tokens, scale,
                FP8_PRODUCTS, SHIFT, HEAD_DIM, ROWS, BLOCK_KEYS, STAGES, IN_TURN, EMULATED, PER_32,
            )),
            (serve_queries, (
                1, q, query_scale, value_scale, out, query_tiles.index(1), key_tiles, value_tiles,
                keys_full, values_full, keys_empty, values_empty, turns,
                q_token, out_token, row, first_query, end_query, blocks, near, near_end, far, tokens, scale,
                FP8_PRODUCTS, SHIFT, HEAD_DIM, ROWS, BLOCK_KEYS, STAGES, IN_TURN, EMULATED, PER_32,
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


def attention(q, k, v, frame=0, frames=0, radius=0, *, fp8=True, block_keys=128, stages=2, in_turn=True, emulated=1):
    """Attention."""
    import triton
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .attention_triton import LOG2_E, SHIFT as FP8_SHIFT, blocks_of_queries, quantised

    (batch, heads, tokens, head_dim), key_heads = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if fp8:
        q, query_scale, k, v, value_scale = quantised(q, k, v)
        values, value_block = v.view(-1, v.shape[-1]), [head_dim, block_keys]
    else:
        query_scale = value_scale = q
        values, value_block = v.contiguous().view(-1, head_dim), [block_keys, head_dim]
    dtype = gl.float8e4nv if fp8 else gl.bfloat16
    keys, key_block = k.contiguous().view(-1, head_dim), [block_keys, head_dim]
    keys = TensorDescriptor.from_tensor(keys, key_block, gl.NVMMASharedLayout.get_default_for(key_block, dtype))
    values = TensorDescriptor.from_tensor(values, value_block, gl.NVMMASharedLayout.get_default_for(value_block, dtype))
    grid = blocks_of_queries(tokens, frame, frames, 128), batch * heads
    with torch.cuda.device_of(q):
        attention_kernel[grid](
            q, query_scale, keys, values, value_scale, out, *q.stride()[:3], *out.stride()[:3],
            heads, heads // key_heads, tokens, frame, frames, radius, head_dim**-0.5 * LOG2_E,
            FP8_PRODUCTS=fp8, SHIFT=FP8_SHIFT if fp8 else 0.0, HEAD_DIM=head_dim, BLOCK_QUERIES=128,
            BLOCK_KEYS=block_keys, STAGES=stages, IN_TURN=in_turn, EMULATED=emulated, num_warps=4,
        )  # fmt: skip
    return out
