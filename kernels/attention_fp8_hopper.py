"""What a warpgroup of attention_hopper.py does with fp8: 64 queries through all blocks of keys.

A block's scores are softened, then its values and the next block's scores are multiplied in one go while the other
warpgroup softens. Hopper adds fp8 products up with 14 bits only, so that over 65,000 keys the sums of values that are
not centred lost 42 % of themselves: every block has sums of its own, added up in fp32.

Exponentials take an H200 as long as fp8's products do, and weights are rounded to three bits after the point anyway: a
weight's byte is read off its exponent instead, a straight line between powers of two. That rounds by 3.1 % instead
of 2.6; in nano and golden's networks the difference drowns in what queries, keys and values lose.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .attention_pairs_hopper import cut_off_pairs, in_pairs, largest_of_pairs, one_by_one, weights_of_halves
from .attention_tiles_hopper import (
    block_of_keys,
    by_rows,
    cut_off,
    done_with,
    largest_of_rows,
    load_queries,
    store_rows,
)

ONE = gl.constexpr(0x38)  # e4m3's byte for 1
# e4m3's byte n is 2 ** (n / 8 - 7), but for the straight line between powers of two; 126 is the largest that is finite.
# It is computed as n / 128, for an fma that saturates cuts off what is below 0 by itself.
LARGEST_WEIGHT = gl.constexpr(126 / 128)
AN_OCTAVE = gl.constexpr(8 / 128)


@gluon.jit
def weights_of(scores, slope, offset):
    """Return the bytes n = 128 (scores slope + offset) as e4m3; all [rows, keys], four neighbours in a thread."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .f32 a, b, c, d;
            .reg .b32 i, j, k, l;
            fma.rn.sat.f32 a, $1, $5, $9;
            fma.rn.sat.f32 b, $2, $5, $9;
            fma.rn.sat.f32 c, $3, $5, $9;
            fma.rn.sat.f32 d, $4, $5, $9;
            fma.rn.f32 a, a, 0f43000000, 0f4B400000;  // 128 a + 1.5 * 2 ** 23: n is the last byte
            fma.rn.f32 b, b, 0f43000000, 0f4B400000;
            fma.rn.f32 c, c, 0f43000000, 0f4B400000;
            fma.rn.f32 d, d, 0f43000000, 0f4B400000;
            mov.b32 i, a;
            mov.b32 j, b;
            mov.b32 k, c;
            mov.b32 l, d;
            prmt.b32 i, i, j, 0x0040;
            prmt.b32 k, k, l, 0x0040;
            prmt.b32 $0, i, k, 0x5410;
        }
        """,
        "=r,f,f,f,f,f,f,f,f,f,f,f,f", [scores, slope, offset], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def soften(scores, key, first, end, factor, largest, OPERAND: gl.constexpr):
    """Return a block's weights as a product takes them, the largest scores so far, and by what sums before shrink.

    Scores come in fp32, or in fp16 and pairs. For a product a thread must hold four neighbouring keys, and holds twice
    two: the keys change places, as the values have (`attention_fp8_triton.values_kernel`), and no number has to move.
    """
    PAIRS: gl.constexpr = scores.dtype == gl.int32
    if PAIRS:
        scores = cut_off_pairs(scores, key, first, end)
        of_block = gl.convert_layout(largest_of_pairs(scores), largest.type.layout)
        scores = one_by_one(scores)
    else:
        scores = cut_off(scores, key, first, end)
        of_block = largest_of_rows(scores)
    new_largest = gl.maximum(largest, of_block * factor)
    shrink = gl.exp2(largest - new_largest)
    rows: gl.constexpr = scores.shape[0]
    keys: gl.constexpr = scores.shape[1]
    scores = scores.reshape([rows, keys // 32, 2, 2, 4, 2]).permute((0, 1, 2, 4, 3, 5)).reshape([rows, keys])
    scores = gl.convert_layout(scores, OPERAND, assert_trivial=True)
    if PAIRS:
        weights = weights_of_halves(scores, factor, new_largest)
    else:
        slope, offset = factor * AN_OCTAVE, LARGEST_WEIGHT - new_largest * AN_OCTAVE
        weights = weights_of(scores, by_rows(slope, scores), by_rows(offset, scores))
    return weights, new_largest, shrink


@gluon.jit
def weighted(weights, value_tile, ones, nothing, no_sums):
    """Start the products of weights with values and, for their sums, with ones."""
    SUM_OPERAND: gl.constexpr = gl.DotOperandLayout(0, no_sums.type.layout, 4)
    product = warpgroup_mma(weights, value_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    weights = gl.convert_layout(weights, SUM_OPERAND, assert_trivial=True)
    sums = warpgroup_mma(weights, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
    return product, sums


@gluon.jit
def serve_queries(
    part, HALF_SCORES: gl.constexpr, q, query_scale, value_scale, out, query_tiles, key_tiles, value_tiles, ones,
    keys_full, values_full, keys_empty, values_empty,
    q_token, out_token, first_query, end_query, blocks, near, near_end, far, tokens, scale,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup, `part` 0 or 1."""
    query_tile = query_tiles.index(part)
    ROWS: gl.constexpr = query_tile.shape[0]
    HEAD_DIM: gl.constexpr = query_tile.shape[1]
    BLOCK_KEYS: gl.constexpr = key_tiles.shape[1]
    COLUMNS: gl.constexpr = ones.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KEYS, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 32])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)

    first_query += part * ROWS
    load_queries(q, query_tile, first_query, end_query, q_token)
    at = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    factor = gl.load(query_scale + at, mask=at < end_query, other=1.0) * scale
    largest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    no_scores = gl.zeros([ROWS, BLOCK_KEYS], gl.float32, layout=SCORES)
    if HALF_SCORES:
        no_scores = gl.zeros([ROWS, BLOCK_KEYS], gl.float16, layout=SCORES)
    nothing = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=OUT)
    no_sums = gl.zeros([ROWS, COLUMNS], gl.float32, layout=SUMS)
    result = nothing
    total = no_sums

    mbarrier.wait(keys_full.index(0), 0)
    scores = warpgroup_mma(query_tile, key_tiles.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores, key_tiles))[0]
    if HALF_SCORES:
        scores = in_pairs(scores)
    done_with(keys_empty.index(0))
    for number in range(blocks - 1):
        stage = number % STAGES
        after = (number + 1) % STAGES
        key, first, end = block_of_keys(number, near, near_end, far, tokens, BLOCK_KEYS)
        weights, largest, shrink = soften(scores, key, first, end, factor, largest, OPERAND)
        mbarrier.wait(values_full.index(stage), (number // STAGES) & 1)
        mbarrier.wait(keys_full.index(after), ((number + 1) // STAGES) & 1)
        product, sums = weighted(weights, value_tiles.index(stage), ones, nothing, no_sums)
        ahead = warpgroup_mma(
            query_tile, key_tiles.index(after).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        product, sums = warpgroup_mma_wait(1, deps=(product, sums, value_tiles))[:2]
        done_with(values_empty.index(stage))
        result = gl.fma(result, by_rows(shrink, result), product)
        total = gl.fma(total, by_rows(shrink, total), sums)
        scores = warpgroup_mma_wait(0, deps=(ahead, key_tiles))[0]
        if HALF_SCORES:
            scores = in_pairs(scores)
        done_with(keys_empty.index(after))
    stage = (blocks - 1) % STAGES
    key, first, end = block_of_keys(blocks - 1, near, near_end, far, tokens, BLOCK_KEYS)
    weights, largest, shrink = soften(scores, key, first, end, factor, largest, OPERAND)
    mbarrier.wait(values_full.index(stage), ((blocks - 1) // STAGES) & 1)
    product, sums = weighted(weights, value_tiles.index(stage), ones, nothing, no_sums)
    product, sums = warpgroup_mma_wait(0, deps=(product, sums, value_tiles))[:2]
    result = gl.fma(result, by_rows(shrink, result), product)
    total = gl.fma(total, by_rows(shrink, total), sums)

    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    result *= gl.expand_dims(gl.load(value_scale + column), 0)  # every column of `total` has the same sums
    total = gl.convert_layout(gl.max(total, axis=1), gl.SliceLayout(1, OUT))
    store_rows(out, result / gl.expand_dims(total, 1), first_query, end_query, out_token)
