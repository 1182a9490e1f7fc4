"""What attention_hopper.py does alike in bf16 and fp8: which keys queries see, the warp that loads, rows in and out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

warps_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7


@gluon.jit
def range_of_block(tokens, frame, frames, radius, BLOCK_QUERIES: gl.constexpr):
    """Return what this program serves: its queries and its keys, `near` to `near_end` and `far` to the last."""
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
    """Return how many blocks serve keys `first` to `last`, which may be none: blocks start at multiples of 32."""
    blocks = gl.cdiv(last - first // 32 * 32, BLOCK_KEYS)
    if first >= last:
        blocks = 0
    return blocks


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
    """The loading warp: fill the rings of tiles as the two warpgroups empty them."""
    for number in range(blocks):
        stage = number % STAGES
        free = ((number // STAGES) & 1) ^ 1
        key, first, end = block_of_keys(number, near, near_end, far, tokens, BLOCK_KEYS)
        mbarrier.wait(keys_empty.index(stage), free)
        mbarrier.expect(keys_full.index(stage), keys.block_type.nbytes)
        tma.async_copy_global_to_shared(keys, [row_of_keys + key, 0], keys_full.index(stage), key_tiles.index(stage))
        place = [row_of_values + key, 0]
        if VALUES_TRANSPOSED:
            place = [row_of_values, key]
        mbarrier.wait(values_empty.index(stage), free)
        mbarrier.expect(values_full.index(stage), values.block_type.nbytes)
        tma.async_copy_global_to_shared(values, place, values_full.index(stage), value_tiles.index(stage))


@gluon.jit
def done_with(empty):
    """Tell the loading warp that this warpgroup has read a tile: all four warps have."""
    warps_barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def load_queries(q, query_tile, first_query, end_query, q_token):
    """Bring a warpgroup's queries into its tile [rows, head_dim]; zeros past the last one."""
    rows: gl.constexpr = query_tile.shape[0]
    head_dim: gl.constexpr = query_tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    query = first_query + gl.arange(0, rows, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, head_dim, layout=gl.SliceLayout(0, LAYOUT))
    queries = gl.load(
        q + gl.expand_dims(query.to(gl.int64) * q_token, 1) + gl.expand_dims(column, 0),
        mask=gl.expand_dims(query < end_query, 1), other=0.0,
    )  # fmt: skip
    query_tile.store(queries)
    fence_async_shared()
    warps_barrier()


@gluon.jit
def cut_off(scores, key, first, end):
    """Take the keys before `first` and from `end` on out of a block of scores [rows, keys] that starts with `key`."""
    keys: gl.constexpr = scores.shape[1]
    if (key < first) | (key + keys > end):
        at = key - first + gl.arange(0, keys, layout=gl.SliceLayout(0, scores.type.layout))
        inside = at.to(gl.uint32) < (end - first).to(gl.uint32)  # a key before the first one is a large number
        scores = gl.where(gl.expand_dims(inside, 0), scores, float("-inf"))
    return scores


@gluon.jit
def largest_of_rows(scores):
    """Return the largest score of every row [rows, keys] -> [rows]; in short chains, for each step of one waits."""
    rows: gl.constexpr = scores.shape[0]
    keys: gl.constexpr = scores.shape[1]
    largest = gl.max(gl.max(gl.max(scores.reshape([rows, keys // 32, 4, 4, 2]), axis=4), axis=2), axis=1)
    return gl.convert_layout(gl.max(largest, axis=1), gl.SliceLayout(1, scores.type.layout))


@gluon.jit
def by_rows(x, like):
    """Return x [rows] spread over the columns of `like` [rows, columns]."""
    x = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True), 1)
    x, like = gl.broadcast(x, like)
    return x


@gluon.jit
def store_rows(out, result, first_query, end_query, out_token):
    """Write result [rows, head_dim] to the rows of `out` that are this head's."""
    rows: gl.constexpr = result.shape[0]
    head_dim: gl.constexpr = result.shape[1]
    at = first_query + gl.arange(0, rows, layout=gl.SliceLayout(1, result.type.layout))
    column = gl.arange(0, head_dim, layout=gl.SliceLayout(0, result.type.layout))
    gl.store(
        out + gl.expand_dims(at.to(gl.int64) * out_token, 1) + gl.expand_dims(column, 0),
        result.to(out.dtype.element_ty), mask=gl.expand_dims(at < end_query, 1),
    )  # fmt: skip
