"""Triton kernels against the reference; `test_triton.py` runs this file in processes of its own.

Under TRITON_INTERPRET=1 (read when a kernel is defined, hence the own process) tensors are on the CPU, else on the GPU.
"""

import os

import pytest
import torch
from pack.kernels import (
    activation_triton,
    add_channels_triton,
    add_triton,
    channel_norm_triton,
    reference,
    renoise_triton,
    rms_norm_triton,
    scale_triton,
)
from pack.kernels.fp8 import FP8, Fp8Rows, padded_columns
from rounding import round_as_cards_do

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    round_as_cards_do()
DEVICE = "cpu" if INTERPRETED else "cuda"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NO_FP8 = not INTERPRETED and torch.cuda.get_device_capability() < (8, 9)
DTYPES = pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (FP32, FP32),
        (FP32, BF16),
        (BF16, BF16),
        (BF16, FP32),
        (FP16, FP16),
        *(
            pytest.param(dtype, FP8, marks=pytest.mark.skipif(NO_FP8, reason="needs a card with fp8"))
            for dtype in (FP32, BF16)
        ),
    ],
    ids=str,
)


def draw(*shape, dtype=FP32, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def plain(x):
    return x


def as_slice(x):
    """The same values as a slice of a wider tensor, as q and k are slices of the qkv rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def transposed(x):
    """The same values with the first and last axes swapped in memory: no axis has stride 1 where it matters."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = pytest.mark.parametrize("layout", [plain, as_slice, transposed], ids=lambda layout: layout.__name__)


def unwritten(*shape, dtype):
    """An output full of NaN, so that what a kernel leaves out is noticed."""
    if dtype != FP8:
        return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    values = torch.full((*shape[:-1], padded_columns(shape[-1])), float("nan"), dtype=FP8, device=DEVICE)
    return Fp8Rows(values, torch.full((*shape[:-1], 1), float("nan"), device=DEVICE))


def check(found, expected, dtype):
    """Equal to within one rounding of the output's dtype; fails on what was never written (NaN)."""
    if dtype == FP8:
        return check_fp8(found, expected)
    ulp = {FP32: 4e-6, BF16: 2**-7, FP16: 2**-10}[dtype]
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=ulp, atol=1e-6)


def check_fp8(found, expected):
    """Scales are equal, values within one rounding of e4m3 and nearly all the same; columns past the row are 0."""
    torch.testing.assert_close(found.scale, expected.scale, rtol=4e-6, atol=0)
    assert found.values.dtype == FP8 and found.values.shape == expected.values.shape
    values, wanted = found.values.float(), expected.values.float()
    torch.testing.assert_close(values, wanted, rtol=2**-3, atol=2**-9)
    assert (values != wanted).float().mean() < 0.01


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
        ((3, 13, 5, 44), (1, 1, 11)),  # ragged: rows and columns fill no block
        ((1, 1, 1), (1,)),
    ],
    ids=str,
)
def test_rms_norm_spans(shape, spans, layout, dtype, out_dtype):
    x, weight = draw(*shape, dtype=dtype, scale=3.0), draw(len(spans), shape[-1])
    out = unwritten(*shape, dtype=out_dtype)
    found = rms_norm_triton.rms_norm_spans(layout(x), layout(weight), spans, out=out)
    assert found is out
    check(found, reference.rms_norm_spans(x, weight, spans, out_dtype=out_dtype), out_dtype)


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (2, 3, 4, 48), (0, 48)], ids=str)
def test_rms_norm_of_any_rank(shape):
    x, weight = draw(*shape), draw(48)
    check(rms_norm_triton.rms_norm(x, weight), reference.rms_norm(x, weight), FP32)


def test_rms_norm_writes_into_strided_outputs_and_nowhere_else():
    x, weight = draw(2, 5, 3, 48), draw(48)
    around = torch.full((2, 5, 3, 60), float("nan"), device=DEVICE)
    rms_norm_triton.rms_norm(x, weight, out=around[..., 4:52])
    check(around[..., 4:52].contiguous(), reference.rms_norm(x, weight), FP32)
    assert around[..., :4].isnan().all() and around[..., 52:].isnan().all()


def test_rms_norm_eps_and_range():
    tiny = torch.full((1, 2, 48), 1e-12, device=DEVICE)
    weight = torch.zeros(48, device=DEVICE)
    for x in (tiny, tiny * 0, tiny * 1e22):
        for eps in (1e-6, 1e-3):
            check(rms_norm_triton.rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps), FP32)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "spans"),
    [((1, 6, 5120), (3, 2, 1)), ((1, 5, 5120), (5,)), ((2, 11, 44), (0, 10, 1)), ((3, 7, 16), (7,))],
    ids=str,
)
def test_add_rms_norm_spans(shape, spans, layout, dtype, out_dtype):
    x, delta = draw(*shape, scale=3.0), draw(*shape, dtype=dtype, scale=2.0).flip(1)
    weight = draw(len(spans), shape[-1])
    out = unwritten(*shape, dtype=out_dtype)
    place = layout(x.clone())
    found = rms_norm_triton.add_rms_norm_spans(place, layout(delta), layout(weight), spans, out=out, total=place)
    assert found[0] is place and torch.equal(found[0], x + delta)
    found = rms_norm_triton.add_rms_norm_spans(layout(x), layout(delta), layout(weight), spans, out=out)
    wanted = reference.add_rms_norm_spans(x, delta, weight, spans, out_dtype=out_dtype)
    assert torch.equal(found[0], wanted[0]) and found[1] is out
    check(found[1], wanted[1], out_dtype)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 3, 27304), (2, 5, 2048), (3, 7, 2), (2, 3, 5, 254)], ids=str)
def test_swiglu7(shape, layout, dtype, out_dtype):
    x = draw(*shape, dtype=dtype, scale=6.0)  # a quarter beyond the clamps
    out = unwritten(*shape[:-1], shape[-1] // 2, dtype=out_dtype)
    assert activation_triton.swiglu7(layout(x), out=out) is out
    check(out, reference.swiglu7(x, out_dtype), out_dtype)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 3, 20480), (2, 5, 640), (3, 7, 1), (2, 3, 5, 254)], ids=str)
def test_gelu7(shape, layout, dtype, out_dtype):
    x = draw(*shape, dtype=dtype, scale=6.0)
    out = unwritten(*shape, dtype=out_dtype)
    assert activation_triton.gelu7(layout(x), out=out) is out
    check(out, reference.gelu7(x, out_dtype), out_dtype)


@DTYPES
@pytest.mark.parametrize("columns", [13652, 16, 5])
def test_activations_pad_their_rows_with_zeros(columns, dtype, out_dtype):
    x = draw(2, 3, 2 * columns, dtype=dtype, scale=2.0)
    for mine, plain in ((activation_triton.swiglu7, reference.swiglu7), (activation_triton.gelu7, reference.gelu7)):
        found, expected = mine(x, out_dtype, padded=True), plain(x, out_dtype, padded=True)
        count = columns if mine is activation_triton.swiglu7 else 2 * columns
        assert found.shape == expected.shape == (2, 3, padded_columns(count))
        check(found, expected, out_dtype)
        assert out_dtype == FP8 or not found[..., count:].any()


def test_activations_pass_nan_on_as_torch_does():
    x = torch.tensor([[[float("nan"), 1.0, 1.0, float("nan"), float("inf"), float("-inf")]]], device=DEVICE)
    found, expected = activation_triton.swiglu7(x), reference.swiglu7(x)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert expected.isnan().tolist() == [[[True, True, False]]]
    torch.testing.assert_close(activation_triton.gelu7(x[..., :5]), reference.gelu7(x[..., :5]), equal_nan=True)


@LAYOUTS
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7, 5120), (2, 3, 50), (1, 1), (0, 3)], ids=str)
def test_add(shape, dtype, layout):
    x, delta = draw(*shape, scale=3.0), draw(*shape, dtype=dtype).flip(-1)
    out = unwritten(*shape, dtype=FP32)
    assert add_triton.add(layout(x), layout(delta), out) is out
    assert torch.equal(out, reference.add(x, delta)) and torch.equal(add_triton.add(x, delta), out)


@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 48, 3, 6, 6), (2, 51, 64), (1, 1, 1), (0, 3)], ids=str)
def test_renoise_step(shape, layout):
    x, velocity, noise = draw(*shape), draw(*shape).flip(-1), draw(*shape).flip(1)
    for sigma, sigma_next in ((0.9997998476028442, 0.9720060229301453), (0.4163888096809387, 0.0)):
        out = unwritten(*shape, dtype=FP32)
        found = renoise_triton.renoise_step(layout(x), layout(velocity), layout(noise), sigma, sigma_next, out=out)
        assert found is out
        check(found, reference.renoise_step(x, velocity, noise, sigma, sigma_next), FP32)


def channels_last(x):
    """The same values with the channels side by side, as some of the frames of a longer clip."""
    wide = torch.full((*x.shape[:2], x.shape[2] + 3, *x.shape[3:]), float("nan"), dtype=x.dtype, device=x.device)
    wide = wide.contiguous(memory_format=torch.channels_last_3d)
    wide[:, :, 1:-2] = x
    return wide[:, :, 1:-2]


@pytest.mark.parametrize("shape", [(1, 16), (9, 528), (40, 1024)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_scale_rows_and_columns(shape, dtype):
    x, rows, columns = draw(*shape, dtype=dtype), draw(shape[0], 1), draw(shape[1], 1).t()
    wanted = (x.float() * rows * columns).to(dtype)
    assert scale_triton.scale_rows_and_columns(x, rows, columns) is x
    check(x, wanted, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("ends", [(0, 0), (1, 1), (0, 2)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 2, 12, 20), (1, 128, 3, 4, 7), (1, 256, 2, 5, 8), (1, 512, 2, 3, 5), (2, 12, 3, 9, 31), (1, 1, 1, 1, 1)],
    ids=str,
)
def test_channel_norm(shape, ends, dtype):
    x = draw(*shape, dtype=dtype, scale=3.0)
    out_shape = shape[0], shape[1], sum(ends) + shape[2], *shape[3:]
    found = {}
    for activation in reference.ACTIVATIONS:
        out = channels_last(unwritten(*out_shape, dtype=dtype))
        found[activation] = channel_norm_triton.channel_norm(channels_last(x), 1e-6, activation, *ends, out=out)
        assert found[activation] is out
    check(found[None], reference.channel_norm(x, 1e-6, None, *ends), dtype)
    assert torch.equal(found["relu"], found[None].relu())
    wanted = reference.ACTIVATIONS["silu"](found[None])
    check(found["silu"], wanted, dtype)
    if dtype != FP32:
        assert (found["silu"] != wanted).float().mean() < 0.002, "silu of the norm before it was rounded"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 2, 12, 20), (1, 128, 3, 4, 7), (2, 12, 3, 9, 31), (1, 1, 1, 1, 1)], ids=str)
def test_biases_of_channels(shape, dtype):
    """Added before the norm, and with what is added to a part of the frames; the rest stays as it was."""
    x, delta, bias = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype).flip(3), draw(shape[1], dtype=dtype)
    found = channel_norm_triton.channel_norm(channels_last(x), 1e-6, "relu", 1, 0, bias=bias)
    check(found, reference.channel_norm(x, 1e-6, "relu", 1, 0, bias), dtype)
    around = channels_last(torch.full((shape[0], shape[1], shape[2] + 2, *shape[3:]), 7.0).to(DEVICE, dtype))
    around[:, :, 1:-1] = x
    part = around[:, :, 1:-1]
    assert add_channels_triton.add_channels(part, channels_last(delta), bias) is part
    check(part, reference.add_channels(x.clone(), delta, bias), dtype)
    assert (around[:, :, :1] == 7).all() and (around[:, :, -1:] == 7).all()


def test_channel_norm_writes_its_frames_and_no_others():
    x = draw(2, 12, 3, 4, 5)
    around = torch.full((2, 7, 4, 5, 12), float("nan"), device=DEVICE).permute(0, 4, 1, 2, 3)
    channel_norm_triton.channel_norm(channels_last(x), 1e-6, before=1, out=around[:, :, 2:6])
    check(around[:, :, 2:6], reference.channel_norm(x, 1e-6, before=1), FP32)
    assert around[:, :, :2].isnan().all() and around[:, :, 6:].isnan().all()


def test_channel_norm_of_pixels_that_lie_apart():
    x = draw(1, 16, 2, 6, 8).contiguous(memory_format=torch.channels_last_3d)
    for part in (x[:, :, :, 1:5, 2:7], x[:, :8]):
        found = channel_norm_triton.channel_norm(part, 1e-6, "silu")
        assert found.is_contiguous(memory_format=torch.channels_last_3d)
        check(found, reference.channel_norm(part, 1e-6, "silu"), FP32)


def test_channel_norm_eps_and_nan():
    x = channels_last(torch.tensor([1e-6, float("nan"), 0.0], device=DEVICE).repeat(1, 4, 1, 1, 1))
    for eps in (1e-8, 1e-3):
        for activation in reference.ACTIVATIONS:
            found = channel_norm_triton.channel_norm(x, eps, activation)
            torch.testing.assert_close(found, reference.channel_norm(x, eps, activation), equal_nan=True)
            assert found.isnan().any()
