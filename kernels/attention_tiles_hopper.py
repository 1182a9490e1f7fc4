"""Which keys a block of queries sees, and the warp that loads them: the outer half of attention_hopper.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


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
