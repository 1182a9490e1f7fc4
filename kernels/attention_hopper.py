"""Attention for Hopper in Gluon, Triton's lower level: one warp loads, two warpgroups multiply and take the softmax.

Queries are cut into blocks of 128, 64 for each warpgroup; keys and values come by TMA, 128 at a time. What a warpgroup
does with them is in attention_bf16_hopper.py and attention_fp8_hopper.py, the rest in attention_tiles_hopper.py. With
65,706 tokens an H200 reaches 650 TFLOP/s in bf16 and 1,045 in fp8, where a large matmul reaches 745 and 1,516. What was
tried and was no faster is in benchmarks/README.md.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import attention_bf16_hopper, attention_fp8_hopper
from .attention_fp8_triton import LOG2_E, blocks_of_queries, quantised_values
from .attention_tiles_hopper import blocks_of_range, load_blocks, range_of_block
from .fp8 import Fp8Rows

BLOCK_QUERIES, BLOCK_KEYS = 128, 128
STAGES = 2  # tiles of keys and of values that are on their way or at work
serve_bf16, serve_fp8 = attention_bf16_hopper.serve_queries, attention_fp8_hopper.serve_queries
ONE = attention_fp8_hopper.ONE


@gluon.jit
def attention_kernel(
    q, query_scale, keys, values, value_scale, out,
    q_batch, q_head, q_token, out_batch, out_head, out_token,
    query_heads, group, tokens, frame, frames, radius, scale,
    FP8_PRODUCTS: gl.constexpr, HALF_SCORES: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_QUERIES: gl.constexpr, BLOCK_KEYS: gl.constexpr, STAGES: gl.constexpr,
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
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(keys_empty.index(stage), count=2)
        mbarrier.init(values_empty.index(stage), count=2)
    loader = (
        keys, values, key_tiles, value_tiles, keys_full, values_full, keys_empty, values_empty,
        row_of_keys, row_of_values, blocks, near, near_end, far, tokens, FP8_PRODUCTS, BLOCK_KEYS, STAGES,
    )  # fmt: skip
    if FP8_PRODUCTS:
        row = (batch * query_heads + head).to(gl.int64)
        query_scale += row * tokens
        value_scale += key_head * HEAD_DIM
        ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BLOCK_KEYS], dtype)
        ones = gl.allocate_shared_memory(dtype, [8, BLOCK_KEYS], ONES)
        # As bytes: the assembler of CUDA 12.8 gets a constant 1.0 wrong that becomes four numbers of e4m3.
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        ones.store(gl.full([8, BLOCK_KEYS], ONE, gl.int8, layout=LAYOUT).to(dtype, bitcast=True))
        fence_async_shared()
        arguments = (
            q, query_scale, value_scale, out, query_tiles, key_tiles, value_tiles, ones,
            keys_full, values_full, keys_empty, values_empty,
            q_token, out_token, first_query, end_query, blocks, near, near_end, far, tokens, scale, STAGES,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (serve_fp8, (0, HALF_SCORES) + arguments),
                (serve_fp8, (1, HALF_SCORES) + arguments),
                (load_blocks, loader),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        arguments = (
            q, out, query_tiles, key_tiles, value_tiles, keys_full, values_full, keys_empty, values_empty,
            q_token, out_token, first_query, end_query, blocks, near, near_end, far, tokens, scale, STAGES,
        )  # fmt: skip
        gl.warp_specialize(
            [(serve_bf16, (0,) + arguments), (serve_bf16, (1,) + arguments), (load_blocks, loader)], [4, 1], [240, 24]
        )


def attention(q, k, v, frame=0, frames=0, radius=0, out=None, half_scores=False, block_keys=BLOCK_KEYS):
    """`reference.attention` with heads of 128: q, k, v in bf16, or q and k as `fp8.fp8_scores` gives them.

    `out` takes the result if given. half_scores: scores in fp16, of q and k in fp8 (attention_pairs_hopper.py);
    block_keys: 128, or with half_scores 256, which nobody asks for yet.
    """
    (batch, heads, tokens, head_dim), key_heads = q.shape, k.shape[1]
    if out is None:
        out = torch.empty(q.shape, dtype=v.dtype, device=v.device)
    fp8 = isinstance(q, Fp8Rows)
    if fp8:
        assert q.scale.is_contiguous()
        (q, query_scale), (v, value_scale) = q, quantised_values(v)
        value_rows, value_block, dtype = v.view(-1, v.shape[-1]), [head_dim, block_keys], gl.float8e4nv
    else:
        query_scale = value_scale = q
        value_rows, value_block, dtype = v.reshape(-1, head_dim), [block_keys, head_dim], gl.bfloat16
    key_block = [block_keys, head_dim]
    key_layout, value_layout = (
        gl.NVMMASharedLayout.get_default_for(block, dtype) for block in (key_block, value_block)
    )
    keys = TensorDescriptor.from_tensor(k.reshape(-1, head_dim), key_block, key_layout)
    values = TensorDescriptor.from_tensor(value_rows, value_block, value_layout)
    with torch.cuda.device_of(q):
        attention_kernel[(blocks_of_queries(tokens, frame, frames, BLOCK_QUERIES), batch * heads)](
            q, query_scale, keys, values, value_scale, out, *q.stride()[:3], *out.stride()[:3],
            heads, heads // key_heads, tokens, frame, frames, radius, head_dim**-0.5 * LOG2_E,
            FP8_PRODUCTS=fp8, HALF_SCORES=half_scores, HEAD_DIM=head_dim,
            BLOCK_QUERIES=BLOCK_QUERIES, BLOCK_KEYS=block_keys, STAGES=STAGES, num_warps=4,
        )  # fmt: skip
    return out
