"""Quantised weights made wide in Triton, in one pass: int8 and fp8 with scales of rows, and blocks of .gguf files."""

import torch
import triton
import triton.language as tl

from .rows_triton import alignment

BLOCK_ROWS, BLOCK_COLUMNS = 8, 512
RUN, BLOCK_RUNS = 32, 64  # numbers that share a scale, or two; runs of a program
KINDS = {  # of blocks: their bytes, and how many runs they have
    "Q8_0": (34, 1), "Q4_0": (18, 1), "Q4_1": (20, 1), "Q5_0": (22, 1), "Q5_1": (24, 1),
    "Q4_K": (144, 8), "Q5_K": (176, 8), "Q6_K": (210, 8),
}  # fmt: skip


@triton.jit
def restore_rows_kernel(
    values, scale, out, rows, whole_words, scale_row,
    ALIGNMENT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program makes a tile of out [rows, columns]; whole_words: the columns in units of ALIGNMENT."""
    columns = whole_words * ALIGNMENT
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    factor = tl.load(scale + row * scale_row, mask=row < rows)[:, None]
    wide = tl.load(values + at, mask=inside).to(tl.float32) * factor
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


def restore_rows(values, scale, dtype):
    """`reference.restore_rows` of a matrix without gaps."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if values.numel() > 0:
        words = alignment(values)
        grid = triton.cdiv(values.shape[0], BLOCK_ROWS), triton.cdiv(values.shape[1], BLOCK_COLUMNS)
        with torch.cuda.device_of(values):
            restore_rows_kernel[grid](
                values, scale, out, values.shape[0], values.shape[1] // words, scale.stride(0) if scale.ndim else 0,
                ALIGNMENT=words, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=8,
            )  # fmt: skip
    return out


@triton.jit
def byte_at(at, inside):
    """Load bytes, as int32."""
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def half_at(at, inside):
    """Load the fp16 numbers that begin at these bytes, as fp32."""
    bits = byte_at(at, inside) | byte_at(at + 1, inside) << 8
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_and_offset(block, run, inside):
    """Return those of runs of Q4_K and Q5_K: two fp16 numbers scale the six bits of each."""
    place = block + 4 + run % 4
    first, second, third = byte_at(place, inside), byte_at(place + 4, inside), byte_at(place + 8, inside)
    scale = tl.where(run < 4, first & 63, third & 15 | first >> 6 << 4)
    offset = tl.where(run < 4, second & 63, third >> 4 | second >> 6 << 4)
    return half_at(block, inside) * scale.to(tl.float32), half_at(block + 2, inside) * offset.to(tl.float32)


@triton.jit
def restore_blocks_kernel(
    raw, out, runs,
    KIND: tl.constexpr, BYTES: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """Each program restores BLOCK_RUNS runs of RUN numbers; blocks of BYTES have RUNS runs. See gguf_blocks.py."""
    number_of_run = tl.program_id(0).to(tl.int64) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    here = number_of_run < runs
    start = raw + number_of_run // RUNS * BYTES
    run = (number_of_run % RUNS).to(tl.int32)
    i = tl.arange(0, RUN)[None, :]
    inside = here[:, None] & (i < RUN)
    block, run_of_block = start[:, None], run[:, None]
    if KIND == "Q8_0":
        small = byte_at(block + 2 + i, inside).to(tl.int8).to(tl.float32)
        wide = half_at(start, here)[:, None] * small
    elif KIND == "Q6_K":
        part, chunk = run_of_block % 4, run_of_block // 4
        low = byte_at(block + chunk * 64 + part % 2 * 32 + i, inside) >> part // 2 * 4 & 15
        high = byte_at(block + 128 + chunk * 32 + i, inside) >> 2 * part & 3
        of_scales, scales = half_at(start + 208, here), start + 192 + 2 * run
        first = of_scales * byte_at(scales, here).to(tl.int8).to(tl.float32)
        second = of_scales * byte_at(scales + 1, here).to(tl.int8).to(tl.float32)
        scale = tl.where(i < RUN // 2, first[:, None], second[:, None])
        wide = scale * ((low | high << 4) - 32).to(tl.float32)
    elif RUNS == 8:
        NUMBERS: tl.constexpr = BYTES - 128
        small = byte_at(block + NUMBERS + run_of_block // 2 * 32 + i, inside) >> run_of_block % 2 * 4 & 15
        if KIND == "Q5_K":
            small |= (byte_at(block + 16 + i, inside) >> run_of_block & 1) << 4
        scale, offset = scale_and_offset(start, run, here)
        wide = scale[:, None] * small.to(tl.float32) - offset[:, None]
    else:
        NUMBERS: tl.constexpr = BYTES - 16
        small = byte_at(block + NUMBERS + i % 16, inside) >> i // 16 * 4 & 15
        if KIND == "Q5_0" or KIND == "Q5_1":
            small |= (byte_at(block + NUMBERS - 4 + i // 8, inside) >> i % 8 & 1) << 4
        scale = half_at(start, here)[:, None]
        if KIND == "Q4_0":
            wide = scale * (small - 8).to(tl.float32)
        elif KIND == "Q5_0":
            wide = scale * (small - 16).to(tl.float32)
        else:
            wide = scale * small.to(tl.float32) + half_at(start + 2, here)[:, None]
    tl.store(out + number_of_run[:, None] * RUN + i, wide.to(out.dtype.element_ty), mask=inside)


def restore_blocks(raw, kind, dtype):
    """`model_loader.gguf_blocks.restore` of raw without gaps; kind: a key of KINDS."""
    size, runs = KINDS[kind]
    out = torch.empty(raw.shape[0], raw.shape[1] // size * runs * RUN, dtype=dtype, device=raw.device)
    if raw.numel() > 0:
        total = out.numel() // RUN
        with torch.cuda.device_of(raw):
            restore_blocks_kernel[(triton.cdiv(total, BLOCK_RUNS),)](
                raw, out, total, KIND=kind, BYTES=size, RUNS=runs, RUN=RUN, BLOCK_RUNS=BLOCK_RUNS,
                num_warps=4, enable_fp_fusion=False,  # a product and a sum round twice, as they do in torch
            )  # fmt: skip
    return out
