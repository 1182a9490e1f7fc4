"""The scales of rows and columns of an fp8 product that was made without, in Triton: in place, in one pass."""

import torch
import triton
import triton.language as tl

from .rows_triton import alignment

BLOCK_ROWS, BLOCK_COLUMNS = 8, 512


@triton.jit
def scale_kernel(
    x, row_scale, column_scale, rows, whole_words, row_stride, column_stride,
    ALIGNMENT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program scales a tile of x [rows, columns], which has no gaps; the strides are those of the two scales.

    whole_words: the columns in units of ALIGNMENT, so many of which are read and written at once.
    """
    columns = whole_words * ALIGNMENT
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_inside, column_inside = row < rows, column < columns
    inside = row_inside[:, None] & column_inside[None, :]
    at = x + row[:, None] * columns + column[None, :]
    factor = tl.load(row_scale + row * row_stride, mask=row_inside)[:, None]
    values = tl.load(at, mask=inside).to(tl.float32) * factor
    values *= tl.load(column_scale + column * column_stride, mask=column_inside)[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=inside)


def scale_rows_and_columns(x, rows, columns):
    """`reference.scale_rows_and_columns`, rounded once: x [R, C] without gaps, rows [R, 1] and columns [1, C] fp32."""
    if x.numel() > 0:
        words = alignment(x)
        grid = triton.cdiv(x.shape[0], BLOCK_ROWS), triton.cdiv(x.shape[1], BLOCK_COLUMNS)
        with torch.cuda.device_of(x):
            scale_kernel[grid](
                x, rows, columns, x.shape[0], x.shape[1] // words, rows.stride(0), columns.stride(1),
                ALIGNMENT=words, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=8,
            )  # fmt: skip
    return x
