"""Scores in fp16, two in a register, for attention_fp8_hopper.py: their softmax takes 300 instructions instead of 405.

Hopper returns fp8 products in fp16 as well as in fp32, and an H200's schedulers are busier with the softmax than its
tensor cores with the products. The largest score that 128 columns can give must fit: queries are scaled to 14 and keys
to 28 (`fp8.fp8_scores`), and 14 * 28 * 128 is 50,176 of 65,504. In fp16 a row's largest score of 50,000 rounds by
at most 16, which is 0.013 of an octave where that score is 2**40 times a weight of 1, and drowns in what fp8 rounds.

Between a product and its softmax scores are kept as int32: single numbers the compiler moves about in other pairs than
the product's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .attention_tiles_hopper import by_rows

AN_OCTAVE = gl.constexpr(8 / 126)  # of e4m3's byte n, in units of the largest finite one


@gluon.jit
def in_pairs(scores):
    """Return scores [rows, keys] in fp16 as int32 [rows, keys / 2], two neighbours in each, the first one below."""
    even, odd = gl.split(scores.reshape([scores.shape[0], scores.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def apart(pairs):
    """Return the first and the second one of all pairs, of any shape, in fp16."""
    return gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )


@gluon.jit
def one_by_one(pairs):
    """Undo `in_pairs`."""
    even, odd = apart(pairs)
    return gl.join(even, odd).reshape([pairs.shape[0], pairs.shape[1] * 2])


@gluon.jit
def cut_off_pairs(pairs, key, first, end):
    """`attention_tiles_hopper.cut_off` of pairs."""
    keys: gl.constexpr = 2 * pairs.shape[1]
    if (key < first) | (key + keys > end):
        at = key - first + 2 * gl.arange(0, keys // 2, layout=gl.SliceLayout(0, pairs.type.layout))
        length = (end - first).to(gl.uint32)
        inside = gl.where(at.to(gl.uint32) < length, 0xFFFF, 0) | gl.where((at + 1).to(gl.uint32) < length, -0x10000, 0)
        inside = gl.expand_dims(inside, 0)
        pairs = (pairs & inside) | (~inside & -0x3FF0400)  # minus infinity, twice
    return pairs


@gluon.jit
def larger(a, b):
    """Return the larger ones of two pairs."""
    return gl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def largest_of_pairs(pairs):
    """Return the largest score of every row in fp32: pairs [rows, keys / 2] -> [rows]; in short chains."""
    largest = pairs.reshape([pairs.shape[0], pairs.shape[1] // 16, 4, 4])
    largest = gl.reduce(gl.reduce(gl.reduce(largest, 2, larger), 1, larger), 1, larger)
    even, odd = apart(largest)
    return gl.maximum(even.to(gl.float32), odd.to(gl.float32))


@gluon.jit
def weights_of_halves(scores, factor, largest):
    """Return e4m3 with the bytes n = 126 + 8 (scores factor - largest), 0 at least; scores fp16 [rows, keys].

    factor and largest: fp32 [rows]. 126 is the byte of the largest finite number; a saturating fma leaves none above.
    """
    slope, offset = (factor * AN_OCTAVE).to(gl.float16), (1 - largest * AN_OCTAVE).to(gl.float16)
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b32 a, b, c, d;
            fma.rn.sat.f16x2 a, $1, $3, $5;
            fma.rn.sat.f16x2 b, $2, $4, $6;
            mov.b32 c, 0x57E057E0;  // 126, twice
            mov.b32 d, 0x64006400;  // 1024: n is the last byte
            fma.rn.f16x2 a, a, c, d;
            fma.rn.f16x2 b, b, c, d;
            prmt.b32 $0, a, b, 0x6420;
        }
        """,
        "=r,r,r,r,r,r,r", [scores, by_rows(slope, scores), by_rows(offset, scores)],
        dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip
