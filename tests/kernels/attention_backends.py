"""The kernels of attention against the reference; `test_triton.py` runs this file beside backends.py."""

import pytest
import torch
from backends import BF16, DEVICE, DTYPES, FP16, FP32, INTERPRETED, LAYOUTS, check, draw, unwritten
from pack.kernels import attention_fp8_triton, attention_inputs_triton, gate_heads_triton, reference

HOPPER = not INTERPRETED and torch.cuda.get_device_capability()[0] == 9
if HOPPER:
    from pack.kernels import attention_hopper
# How far fp8 and bf16 may be from their references, as a relative RMS: weights take one more rounding, averaged over
# the keys. Triton's interpreter halves what an fp8 rounding brings up to a power of two, one value in fifty. Hopper's
# weights are rounded by 3.1 % instead of 2.6: emulated, these sizes are off by 2.0 to 2.9 % instead of 1.7 to 2.4.
NEAR = {True: 0.16 if INTERPRETED else 3.2e-2 if HOPPER else 2.5e-2, False: 2.5e-3}

SIZES = pytest.mark.parametrize(
    ("batch", "heads", "tokens", "window"),
    [
        (1, (5, 1), 300, ()),
        (2, (4, 2), 129, ()),
        (1, (2, 1), 24, ()),  # less than a block of queries or keys
        (1, (2, 1), 4 * 45 + 17, (45, 4, 1)),  # frames that start at no multiple of 32
        (1, (2, 1), 3 * 130 + 150, (130, 3, 0)),
        (2, (2, 2), 5 * 63, (63, 5, 2)),  # nothing but frames
    ],
    ids=str,
)


def draw_heads(batch, heads, tokens):
    """q, k, v of uneven magnitudes: rows of q, heads of k and columns of v have scales of their own."""
    random = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(batch, count, tokens, 128, generator=random) for count in (heads[0], heads[1], heads[1]))
    q *= torch.linspace(0.5, 1.5, tokens)[:, None]
    k *= torch.linspace(0.5, 1.5, heads[1])[:, None, None]
    v = v * torch.linspace(0.1, 10, 128) + 0.3
    return [tensor.to(DEVICE, BF16) for tensor in (q, k, v)]


def check_attention(found, q, k, v, window, fp8):
    wanted = reference.attention(q.float(), k.float(), v.float(), *window, fp8=fp8)
    assert found.dtype == BF16 and found.shape == q.shape
    assert (found.float() - wanted).norm() < NEAR[fp8] * wanted.norm()
    off, size = (torch.linalg.vector_norm(x, dim=(0, 1, 2)) for x in (found.float() - wanted, wanted))
    assert (off / size).max() < 3 * NEAR[fp8]  # no column has another one's scale


@SIZES
def test_fp8_attention(batch, heads, tokens, window):
    q, k, v = draw_heads(batch, heads, tokens)
    out = torch.full_like(q, float("nan"))
    assert attention_fp8_triton.attention(q, k, v, *window, out=out) is out
    check_attention(out, q, k, v, window, True)


def test_fp8_attention_of_tensors_that_lie_otherwise():
    q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in draw_heads(2, (4, 2), 70))
    check_attention(attention_fp8_triton.attention(q, k, v), q, k, v, (), True)


def test_quantised_scales_and_places():
    q, k, v = draw_heads(2, (4, 2), 70)
    narrow_q, query_scale, narrow_k, narrow_v, value_scale = attention_fp8_triton.quantised(q, k, v)
    key_scale = k.float().abs().amax((2, 3)) / 448
    scaled = narrow_q.float() * (query_scale / key_scale.repeat_interleave(2, dim=1)[..., None])[..., None]
    assert_rounded(scaled, q.float())
    assert_rounded(narrow_k.float() * key_scale[..., None, None], k.float())
    assert narrow_v.shape == (2, 2, 128, 96) and not narrow_v[..., :70].float().isnan().any()
    places = torch.arange(96).view(-1, 2, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten()  # the key at every place
    wide = narrow_v.float() * value_scale[..., None]
    assert_rounded(wide[..., places.argsort()][..., :70], v.float().mT)
    assert not wide[..., places >= 70].any()


def assert_rounded(found, wanted):
    """Within an e4m3 rounding, but for what the interpreter halves."""
    if INTERPRETED:
        found = torch.where((2 * found - wanted).abs() <= wanted.abs() / 16, wanted, found)
    torch.testing.assert_close(found, wanted, rtol=2**-4, atol=2e-2)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper card")
@pytest.mark.parametrize("fp8", [False, True])
@SIZES
def test_attention_on_hopper(batch, heads, tokens, window, fp8):
    q, k, v = draw_heads(batch, heads, tokens)
    out = torch.full_like(q, float("nan"))
    assert attention_hopper.attention(q, k, v, *window, fp8=fp8, out=out) is out
    check_attention(out, q, k, v, window, fp8)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper card")
@pytest.mark.parametrize("fp8", [False, True])
def test_attention_on_hopper_adds_up_many_values_that_are_not_centred(fp8):
    """Hopper adds fp8 products up with 14 bits: in sums over 65,706 keys 42 % of them were lost."""
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 65_706, 128, generator=random).to(DEVICE, BF16)
    found = attention_hopper.attention(1.5 * q, k, v + 3, fp8=fp8)[:, :, ::97].float()
    wanted = torch.nn.functional.scaled_dot_product_attention(1.5 * q[:, :, ::97], k, v + 3).float()
    assert (found - wanted).norm() < (1e-2 if fp8 else 2e-3) * wanted.norm()


@LAYOUTS
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("batch", "spans", "heads", "head_dim"),
    [
        (1, (3, 2, 1), (40, 8), 128),  # the network's, three experts
        (1, (5,), (40, 8), 128),
        (2, (0, 8, 1), (4, 2), 16),  # golden, two clips, an empty span
        (1, (11,), (5, 1), 32),  # nano
        (3, (1, 5, 2), (6, 3), 24),  # ragged
    ],
    ids=str,
)
def test_attention_inputs(batch, spans, heads, head_dim, dtype, layout):
    tokens, (query_heads, key_heads) = sum(spans), heads
    rows = draw(batch, tokens, (query_heads + 2 * key_heads) * head_dim + query_heads, dtype=dtype, scale=3.0)
    weights = draw(len(spans), head_dim), draw(len(spans), head_dim).flip(-1)
    angles = draw(tokens, 3 * (head_dim // 8))
    sin_cos = torch.cat([angles.sin(), angles.cos()], dim=1)
    shapes = [(batch, count, tokens, head_dim) for count in (query_heads, key_heads, key_heads)]
    out = (*(unwritten(*shape, dtype=dtype) for shape in shapes), unwritten(batch, tokens, query_heads, dtype=FP32))
    found = attention_inputs_triton.attention_inputs(
        layout(rows), *map(layout, weights), spans, layout(sin_cos), heads, out=out
    )
    wanted = reference.attention_inputs(rows, *weights, spans, sin_cos, heads)
    assert all(mine is given for mine, given in zip(found, out, strict=True))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol={FP32: 4e-6, BF16: 2**-7, FP16: 2**-10}[mine.dtype], atol=4e-6)
    assert torch.equal(found[2], wanted[2])


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 40, 5, 128), (2, 4, 9, 16), (1, 5, 11, 32), (3, 3, 7, 20)], ids=str)
def test_gate_heads(shape, layout, dtype, out_dtype):
    batch, heads, tokens, head_dim = shape
    x, gate = draw(*shape, dtype=dtype, scale=3.0), draw(batch, tokens, heads).sigmoid()
    out = unwritten(batch, tokens, heads * head_dim, dtype=out_dtype)
    assert gate_heads_triton.gate_heads(layout(x), layout(gate), out=out) is out
    check(out, reference.gate_heads(x, gate, out_dtype), out_dtype)
