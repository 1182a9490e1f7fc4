"""The quantised matrices of .gguf files as they lie there: bytes to numbers on any device, and numbers back to bytes.

A row is a run of blocks of 32 or 256 numbers, each small integers with a scale and, in some, an offset. ggml
(github.com/ggml-org/ggml, ggml-quants) defines them; the package `gguf` has the same in numpy, on the processor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels import restore_blocks

# Numbers that are restored at a time: on a processor what its caches hold, on a card enough to keep it busy. In fp32 a
# whole matrix never exists.
PIECE, CARD_PIECE = 2**20, 2**24


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """`numbers` in a block, `bytes` it takes; functions from bytes [..., bytes] to fp32 [..., numbers] and back."""

    numbers: int
    bytes: int
    restore: Callable
    quantise: Callable


def restore(raw, kind, dtype):
    """Return the matrix [rows, columns] in `dtype` of raw uint8 [rows, bytes of a row]; kind: a key of FORMATS."""
    restored = restore_blocks(raw, kind, dtype)
    return restore_by_torch(raw, kind, dtype) if restored is None else restored


@torch.no_grad()
def restore_by_torch(raw, kind, dtype):
    """Do what `restore` does without a kernel."""
    form, rows = FORMATS[kind], len(raw)
    blocks = raw.view(rows, -1, form.bytes)
    restored = torch.empty(rows, blocks.shape[1] * form.numbers, dtype=dtype, device=raw.device)
    step = _rows_at_a_time(restored)
    for start in range(0, rows, step):
        restored[start : start + step] = form.restore(blocks[start : start + step]).flatten(1)
    return restored


@torch.no_grad()
def quantise(matrix, kind):
    """Return uint8 [rows, bytes of a row] of a matrix [rows, columns], as `restore` takes it; columns: whole blocks.

    Each block is fitted to its own smallest and largest number; llama.cpp searches for better fits in its K types.
    """
    form = FORMATS[kind]
    pieces = matrix.split(_rows_at_a_time(matrix))
    return torch.cat([form.quantise(p.float().view(len(p), -1, form.numbers)).flatten(1) for p in pieces])


def _rows_at_a_time(matrix):
    return max(1, (PIECE if matrix.device.type == "cpu" else CARD_PIECE) // matrix.shape[1])


def _halves(raw, start, count=1):
    """Return `count` fp16 numbers [..., count], in fp32, that begin at byte `start`."""
    return raw[..., start : start + 2 * count].contiguous().view(torch.float16).float()


def _bytes(half):
    """Return numbers [..., n] as bytes of fp16 [..., 2n]."""
    return half.half().contiguous().view(torch.uint8)


def _nibbles(raw):
    """Return the low halves of bytes [..., n], then the high ones [..., 2n]."""
    return torch.cat((raw & 15, raw >> 4), -1)


def _in_nibbles(small):
    """Return numbers below 16 [..., 2n] as bytes [..., n], the second half of them high."""
    low, high = small.chunk(2, -1)
    return low | high << 4


def _shifts(step, device):
    return torch.arange(0, 8, step, dtype=torch.uint8, device=device)


def _bits(raw):
    """Return bytes [..., n] as their bits [..., 8n], the lowest of each byte first."""
    return (raw[..., None] >> _shifts(1, raw.device) & 1).flatten(-2)


def _in_bits(bits):
    """Return bits [..., 8n] as bytes [..., n]."""
    return _summed(bits.unflatten(-1, (-1, 8)) << _shifts(1, bits.device), -1)


def _summed(parts, axis):
    return parts.sum(axis, dtype=torch.uint8)


def _ratio(numbers, scale):
    """Return numbers / scale, 0 where the scale is."""
    return torch.where(scale == 0, 0, numbers / scale)


def _rounded(numbers, low, high):
    return numbers.round().clamp(low, high)


# Q8_0, Q4_0, Q5_0: scale times a signed number.


def _restore_q8_0(raw):
    return _halves(raw, 0) * raw[..., 2:].view(torch.int8)


def _quantise_q8_0(x):
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    return torch.cat((_bytes(scale), _rounded(_ratio(x, scale), -128, 127).to(torch.int8).view(torch.uint8)), -1)


def _restore_q4_0(raw):
    return _halves(raw, 0) * (_nibbles(raw[..., 2:]).float() - 8)


def _signed(x, half):
    """Return (fp16 scale, numbers 0 to 2*half-1); the largest in size of x [..., n] is -half times the scale."""
    scale = (x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -half).half().float()
    return _bytes(scale), _rounded(_ratio(x, scale) + half, 0, 2 * half - 1).to(torch.uint8)


def _quantise_q4_0(x):
    scale, small = _signed(x, 8)
    return torch.cat((scale, _in_nibbles(small)), -1)


def _restore_q5_0(raw):
    return _halves(raw, 0) * ((_nibbles(raw[..., 6:]) | _bits(raw[..., 2:6]) << 4).float() - 16)


def _quantise_q5_0(x):
    scale, small = _signed(x, 16)
    return torch.cat((scale, _in_bits(small >> 4), _in_nibbles(small & 15)), -1)


# Q4_1, Q5_1: the smallest number of the block plus scale times a number.


def _restore_q4_1(raw):
    scale, least = _halves(raw, 0, 2).split(1, -1)
    return scale * _nibbles(raw[..., 4:]) + least


def _above_least(x, most):
    """Return (fp16 scale and smallest number of x [..., n], numbers 0 to `most`)."""
    least, largest = x.aminmax(dim=-1, keepdim=True)
    fields = torch.cat(((largest - least) / most, least), -1).half()
    scale, least = fields.float().split(1, -1)
    return _bytes(fields), _rounded(_ratio(x - least, scale), 0, most).to(torch.uint8)


def _quantise_q4_1(x):
    fields, small = _above_least(x, 15)
    return torch.cat((fields, _in_nibbles(small)), -1)


def _restore_q5_1(raw):
    scale, least = _halves(raw, 0, 2).split(1, -1)
    return scale * (_nibbles(raw[..., 8:]) | _bits(raw[..., 4:8]) << 4) + least


def _quantise_q5_1(x):
    fields, small = _above_least(x, 31)
    return torch.cat((fields, _in_bits(small >> 4), _in_nibbles(small & 15)), -1)


# Q4_K, Q5_K: eight runs of 32, a scale and an offset of 6 bits each, which two fp16 numbers scale.


def _restore_runs(raw, small):
    """Return scale * small - offset, from a block's first 16 bytes and its numbers [..., 8, 32]."""
    first, second, third = raw[..., 4:16].chunk(3, -1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    offsets = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    of_scales, of_offsets = _halves(raw, 0, 2).split(1, -1)
    return ((of_scales * scales)[..., None] * small - (of_offsets * offsets)[..., None]).flatten(-2)


def _quantise_runs(x, most):
    """Return (a block's first 16 bytes, numbers 0 to `most` [..., 8, 32]) of x [..., 256]."""
    x = x.unflatten(-1, (8, 32))
    offset = (-x.amin(-1)).clamp(min=0)
    scale = (x.amax(-1) + offset).clamp(min=0) / most
    fields = torch.stack((scale.amax(-1), offset.amax(-1)), -1).div(63).half()
    of_scales, of_offsets = fields.float().split(1, -1)
    scales, offsets = (
        _rounded(_ratio(wide, of), 0, 63).to(torch.uint8) for wide, of in ((scale, of_scales), (offset, of_offsets))
    )
    small = _ratio(x + (of_offsets * offsets)[..., None], (of_scales * scales)[..., None])
    (low_scales, high_scales), (low_offsets, high_offsets) = scales.chunk(2, -1), offsets.chunk(2, -1)
    packed = (
        low_scales | high_scales >> 4 << 6,
        low_offsets | high_offsets >> 4 << 6,
        high_scales & 15 | (high_offsets & 15) << 4,
    )
    return torch.cat((_bytes(fields), *packed), -1), _rounded(small, 0, most).to(torch.uint8)


def _restore_q4_k(raw):
    return _restore_runs(raw, _nibbles(raw[..., 16:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2))


def _quantise_q4_k(x):
    fields, small = _quantise_runs(x, 15)
    return torch.cat((fields, _in_nibbles(small.flatten(-2).unflatten(-1, (4, 64))).flatten(-2)), -1)


def _restore_q5_k(raw):
    low = _nibbles(raw[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    high = raw[..., None, 16:48] >> _shifts(1, raw.device)[:, None] & 1
    return _restore_runs(raw, low | high << 4)


def _quantise_q5_k(x):
    fields, small = _quantise_runs(x, 31)
    high = _summed(small >> 4 << _shifts(1, x.device)[:, None], -2)
    low = _in_nibbles((small & 15).flatten(-2).unflatten(-1, (4, 64))).flatten(-2)
    return torch.cat((fields, high, low), -1)


# Q6_K: sixteen runs of 16 signed numbers, a scale of 8 bits each, which one fp16 number scales.


def _restore_q6_k(raw):
    low = _nibbles(raw[..., :128].unflatten(-1, (2, 64)))
    high = (raw[..., 128:192].unflatten(-1, (2, 1, 32)) >> _shifts(2, raw.device)[:, None] & 3).flatten(-2)
    small = ((low | high << 4).flatten(-2).float() - 32).unflatten(-1, (16, 16))
    return ((_halves(raw, 208) * raw[..., 192:208].view(torch.int8))[..., None] * small).flatten(-2)


def _quantise_q6_k(x):
    x = x.unflatten(-1, (16, 16))
    wide = x.abs().amax(-1) / 31
    of_scales = (wide.amax(-1, keepdim=True) / 127).half().float()
    scales = _rounded(_ratio(wide, of_scales), 0, 127)
    small = (_rounded(_ratio(x, (of_scales * scales)[..., None]), -32, 31) + 32).to(torch.uint8)
    small = small.flatten(-2).unflatten(-1, (2, 128))
    high = _summed((small >> 4).unflatten(-1, (4, 32)) << _shifts(2, x.device)[:, None], -2)
    scales = scales.to(torch.int8).view(torch.uint8)
    return torch.cat((_in_nibbles(small & 15).flatten(-2), high.flatten(-2), scales, _bytes(of_scales)), -1)


FORMATS = {
    "Q8_0": BlockFormat(32, 34, _restore_q8_0, _quantise_q8_0),
    "Q6_K": BlockFormat(256, 210, _restore_q6_k, _quantise_q6_k),
    "Q5_K": BlockFormat(256, 176, _restore_q5_k, _quantise_q5_k),
    "Q4_K": BlockFormat(256, 144, _restore_q4_k, _quantise_q4_k),
    "Q5_1": BlockFormat(32, 24, _restore_q5_1, _quantise_q5_1),
    "Q5_0": BlockFormat(32, 22, _restore_q5_0, _quantise_q5_0),
    "Q4_1": BlockFormat(32, 20, _restore_q4_1, _quantise_q4_1),
    "Q4_0": BlockFormat(32, 18, _restore_q4_0, _quantise_q4_0),
}
