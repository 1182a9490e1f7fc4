"""Triton kernels against the reference; `test_triton.py` runs this file in processes of its own.

Under TRITON_INTERPRET=1 (read when a kernel is defined, hence the own process) tensors are on the CPU, else on the GPU.
"""

import os

import pytest
import torch
from pack.kernels import reference, rms_norm_triton, swiglu7_triton

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=str,
)


def draw(*shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def as_slice(x):
    """The same values as a slice of a wider tensor, as q and k are slices of the qkv rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def transposed(x):
    """The same values with the first and last axes swapped in memory: no axis has stride 1 where it matters."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def check(found, expected, dtype):
    """Equal to within one rounding of the output's dtype; fails on what was never written (NaN)."""
    ulp = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=ulp, atol=1e-6)


LAYOUTS = pytest.mark.parametrize("layout", [lambda x: x, as_slice, transposed], ids=["plain", "slice", "transposed"])


@DTYPES
@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "spans"),
    [
        ((1, 6, 5120), (3, 2, 1)),  # a layer with three experts
        ((1, 5, 5120), (5,)),  # a shared layer
        ((1, 7, 40, 128), (4, 2, 1)),  # query heads
        ((2, 9, 8, 128), (6, 2, 1)),  # key heads of two clips
        ((2, 11, 16), (0, 10, 1)),  # golden head, an empty span
        ((3, 13, 5, 48), (1, 1, 11)),  # ragged: rows and columns fill no block
        ((1, 1, 1), (1,)),
    ],
    ids=str,
)
def test_rms_norm_spans(shape, spans, layout, dtype, out_dtype):
    x, weight = draw(*shape, dtype=dtype, scale=3.0), draw(len(spans), shape[-1])
    out = torch.full(shape, float("nan"), dtype=out_dtype, device=DEVICE)
    found = rms_norm_triton.rms_norm_spans(layout(x), layout(weight), spans, out=out)
    assert found is out
    check(out, reference.rms_norm_spans(x, weight, spans, out_dtype=out_dtype), out_dtype)


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (2, 3, 4, 48), (0, 48)], ids=str)
def test_rms_norm_of_any_rank(shape):
    x, weight = draw(*shape), draw(48)
    check(rms_norm_triton.rms_norm(x, weight), reference.rms_norm(x, weight), torch.float32)


def test_rms_norm_writes_into_strided_outputs_and_nowhere_else():
    x, weight = draw(2, 5, 3, 48), draw(48)
    around = torch.full((2, 5, 3, 60), float("nan"), device=DEVICE)
    rms_norm_triton.rms_norm(x, weight, out=around[..., 4:52])
    check(around[..., 4:52].contiguous(), reference.rms_norm(x, weight), torch.float32)
    assert around[..., :4].isnan().all() and around[..., 52:].isnan().all()


def test_rms_norm_eps_and_range():
    tiny = torch.full((1, 2, 48), 1e-12, device=DEVICE)
    weight = torch.zeros(48, device=DEVICE)
    for x in (tiny, tiny * 0, tiny * 1e22):
        for eps in (1e-6, 1e-3):
            check(rms_norm_triton.rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps), torch.float32)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 3, 27304), (2, 5, 2048), (3, 7, 2), (2, 3, 5, 254)], ids=str)
def test_swiglu7(shape, layout, dtype, out_dtype):
    x = draw(*shape, dtype=dtype, scale=6.0)  # a quarter beyond the clamps
    out = torch.full((*shape[:-1], shape[-1] // 2), float("nan"), dtype=out_dtype, device=DEVICE)
    assert swiglu7_triton.swiglu7(layout(x), out=out) is out
    check(out, reference.swiglu7(x, out_dtype), out_dtype)


def test_swiglu7_passes_nan_on_as_torch_does():
    x = torch.tensor([[[float("nan"), 1.0, 1.0, float("nan"), float("inf"), float("-inf")]]], device=DEVICE)
    found, expected = swiglu7_triton.swiglu7(x), reference.swiglu7(x)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert expected.isnan().tolist() == [[[True, True, False]]]
