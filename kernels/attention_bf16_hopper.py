"""What a warpgroup of attention_hopper.py does with bf16: 64 queries through all blocks of keys.

While the scores of a block are softened, the values of the block before are multiplied. The queries stay in registers,
which costs less power than reading them from shared memory for every block, and power is what limits the card.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .attention_tiles_hopper import (
    block_of_keys,
    by_rows,
    cut_off,
    done_with,
    largest_of_rows,
    load_queries,
    store_rows,
)


@gluon.jit
def sums_of_threads(weights):
    """Return [rows, 4]: the sums over what each of a row's four threads holds, for which no thread asks another."""
    rows: gl.constexpr = weights.shape[0]
    keys: gl.constexpr = weights.shape[1]
    return gl.sum(gl.sum(weights.reshape([rows, keys // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def soften(scores, scale, largest, total):
    """Return a block's weights and what the running softmax becomes: largest score, sums, by what both shrink."""
    new_largest = gl.maximum(largest, largest_of_rows(scores) * scale)
    weights = gl.exp2(scores * scale - gl.expand_dims(new_largest, 1))
    shrink = gl.exp2(largest - new_largest)
    sums = sums_of_threads(weights)
    total = total * by_rows(shrink, sums) + sums
    return weights.to(gl.bfloat16), new_largest, total, shrink


@gluon.jit
def serve_queries(
    part, q, out, query_tiles, key_tiles, value_tiles, keys_full, values_full, keys_empty, values_empty,
    q_token, out_token, first_query, end_query, blocks, near, near_end, far, tokens, scale, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup, `part` 0 or 1."""
    query_tile = query_tiles.index(part)
    ROWS: gl.constexpr = query_tile.shape[0]
    HEAD_DIM: gl.constexpr = query_tile.shape[1]
    BLOCK_KEYS: gl.constexpr = key_tiles.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)

    first_query += part * ROWS
    load_queries(q, query_tile, first_query, end_query, q_token)
    queries = query_tile.load(gl.DotOperandLayout(0, SCORES, 2))
    largest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    nothing = gl.zeros([ROWS, BLOCK_KEYS], gl.float32, layout=SCORES)
    total = sums_of_threads(nothing)
    result = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=OUT)

    mbarrier.wait(keys_full.index(0), 0)
    scores = warpgroup_mma(queries, key_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores, key_tiles))[0]
    done_with(keys_empty.index(0))
    key, first, end = block_of_keys(0, near, near_end, far, tokens, BLOCK_KEYS)
    weights, largest, total, shrink = soften(cut_off(scores, key, first, end), scale, largest, total)
    for number in range(1, blocks):
        stage = number % STAGES
        before = (number - 1) % STAGES
        values_turn = ((number - 1) // STAGES) & 1
        mbarrier.wait(keys_full.index(stage), (number // STAGES) & 1)
        scores = warpgroup_mma(queries, key_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        operand = gl.convert_layout(weights, OPERAND)
        mbarrier.wait(values_full.index(before), values_turn)
        product = warpgroup_mma(operand, value_tiles.index(before), result, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores, key_tiles))[0]
        done_with(keys_empty.index(stage))
        key, first, end = block_of_keys(number, near, near_end, far, tokens, BLOCK_KEYS)
        weights, largest, total, shrink = soften(cut_off(scores, key, first, end), scale, largest, total)
        # Full already; but the assembler moves the wait for the product no further up than to here.
        mbarrier.wait(values_full.index(before), values_turn)
        product = warpgroup_mma_wait(0, deps=(product, value_tiles))[0]
        done_with(values_empty.index(before))
        result = product * by_rows(shrink, result)
    stage = (blocks - 1) % STAGES
    mbarrier.wait(values_full.index(stage), ((blocks - 1) // STAGES) & 1)
    product = warpgroup_mma(gl.convert_layout(weights, OPERAND), value_tiles.index(stage), result, is_async=True)
    result = warpgroup_mma_wait(0, deps=(product, value_tiles))[0]
    total = gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, OUT))
    store_rows(out, result / gl.expand_dims(total, 1), first_query, end_query, out_token)
