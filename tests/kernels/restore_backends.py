"""Quantised weights made wide by Triton against plain torch; `test_triton.py` runs this file beside backends.py."""

import pytest
import torch
from backends import BF16, DEVICE, FP16, FP32, NO_FP8
from pack.kernels import reference, restore_triton
from pack.kernels.fp8 import FP8
from pack.model_loader.gguf_blocks import FORMATS, restore

DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)


def check(found, wanted, dtype):
    assert found.dtype == dtype and torch.equal(found, wanted)


@DTYPES
@pytest.mark.parametrize("one_scale", [False, True], ids=["a scale a row", "one scale"])
@pytest.mark.parametrize("shape", [(9, 48), (17, 1300), (1, 512), (3, 7)], ids=str)
@pytest.mark.parametrize(
    "kind", [torch.int8, pytest.param(FP8, marks=pytest.mark.skipif(NO_FP8, reason="needs a card with fp8"))], ids=str
)
def test_restore_rows(kind, shape, one_scale, dtype):
    random = torch.Generator().manual_seed(shape[1])
    values = (40 * torch.randn(shape, generator=random)).clamp(-127, 127).to(kind).to(DEVICE)
    scale = torch.tensor(0.03) if one_scale else torch.rand(shape[0], 1, generator=random) + 0.01
    check(
        restore_triton.restore_rows(values, scale.to(DEVICE), dtype),
        reference.restore_rows(values, scale.to(DEVICE), dtype),
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("kind", FORMATS)
def test_restore_blocks(kind, dtype):
    """Random bytes, the fp16 numbers among them finite; more than a program has, and no whole number of programs."""
    form, random = FORMATS[kind], torch.Generator().manual_seed(len(kind))
    raw = torch.randint(0, 256, (5, 29, form.bytes), generator=random, dtype=torch.uint8)
    starts = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(kind, (0,))
    for start in starts:
        halves = torch.randn(5, 29, 1, generator=random).half()
        raw[..., start : start + 2] = halves.view(torch.uint8)
    raw = raw.flatten(1)
    assert restore_triton.KINDS[kind] == (form.bytes, form.numbers // restore_triton.RUN)
    check(restore_triton.restore_blocks(raw.to(DEVICE), kind, dtype).cpu(), restore(raw, kind, dtype), dtype)


def test_restore_nothing():
    empty = torch.empty(0, 144, dtype=torch.uint8, device=DEVICE)
    assert restore_triton.restore_blocks(empty, "Q4_K", BF16).shape == (0, 256)
    assert restore_triton.restore_rows(empty.view(torch.int8), torch.ones(0, 1, device=DEVICE), BF16).shape == (0, 144)
