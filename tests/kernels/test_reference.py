"""The reference ops against their formulas in float64, written out independently."""

import pytest
import torch
from pack.kernels import reference


@pytest.fixture
def x():
    return torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(0)) * 6


def close(found, wanted, dtype=torch.float32):
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5
    )


def test_rms_norm_scales_by_weight_plus_one(x):
    weight = torch.linspace(-2, 2, 16)
    wanted = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())
    close(reference.rms_norm(x, weight), wanted)
    close(reference.rms_norm(x, weight, out_dtype=torch.bfloat16), wanted, torch.bfloat16)


def test_rms_norm_of_bf16_keeps_fp32_inside():
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)  # the squares' sum would stall in bf16
    close(reference.rms_norm(x, torch.zeros(4096)), torch.ones(1, 4096), torch.bfloat16)


def test_every_span_has_its_weight(x):
    weight = torch.randn(3, 16)
    wanted = torch.cat(
        [reference.rms_norm(x[:, a:b], weight[e]) for e, (a, b) in enumerate(((0, 4), (4, 5), (5, 7)))], dim=1
    )
    assert torch.equal(reference.rms_norm_spans(x, weight, (4, 1, 2)), wanted)
    with pytest.raises(RuntimeError):
        reference.rms_norm_spans(x, weight, (4, 1, 1))
    with pytest.raises(ValueError):
        reference.rms_norm_spans(x, weight[:2], (4, 1, 2))


def test_an_empty_span_is_allowed(x):
    assert torch.equal(reference.rms_norm_spans(x, torch.zeros(2, 16), (0, 7)), reference.rms_norm(x, torch.zeros(16)))


def test_swiglu7_reads_even_columns_as_gates_and_clamps_both(x):
    gate, linear = x[..., 0::2].double(), x[..., 1::2].double()
    gate, linear = torch.minimum(gate, torch.tensor(7.0)), torch.clamp(linear, -7, 7)
    close(reference.swiglu7(x), gate / (1 + torch.exp(-1.702 * gate)) * (linear + 1))
    assert (x.abs() > 7).any()  # or the clamps would not be tested


def test_gelu7_clamps_from_above_only(x):
    wide = torch.minimum(x.double(), torch.tensor(7.0))
    close(reference.gelu7(x), wide / (1 + torch.exp(-1.702 * wide)))
    close(reference.gelu7(x, torch.bfloat16), wide / (1 + torch.exp(-1.702 * wide)), torch.bfloat16)


def test_rotate_turns_pairs_and_leaves_the_last_quarter(x):
    angles = torch.randn(7, 6)
    turned = reference.rotate(x, torch.cat([angles.sin(), angles.cos()], dim=1))
    for k in range(6):  # channel k is paired with k + 6
        pair = torch.complex(x[..., k].double(), x[..., k + 6].double()) * torch.exp(1j * angles[:, k, None].double())
        close(turned[..., k], pair.real)
        close(turned[..., k + 6], pair.imag)
    assert torch.equal(turned[..., 12:], x[..., 12:])


def test_gate_heads_is_one_scalar_a_head_and_lays_heads_side_by_side(x):
    heads, gate = x.transpose(1, 2), torch.rand(2, 7, 3)
    close(reference.gate_heads(heads, gate), (x.double() * gate.double()[..., None]).reshape(2, 7, 48))
    assert reference.gate_heads(heads.bfloat16(), gate).dtype == torch.bfloat16


def test_add_rms_norm_spans_norms_the_sum(x):
    x, weight = x.flatten(2), torch.randn(3, 48)
    delta = torch.randn(2, 7, 48).bfloat16()
    total, normed = reference.add_rms_norm_spans(x, delta, weight, (4, 1, 2), out_dtype=torch.bfloat16)
    close(total, x.double() + delta.double())
    gain = torch.repeat_interleave(weight.double() + 1, torch.tensor([4, 1, 2]), dim=0)
    sums = x.double() + delta.double()
    close(normed, sums / (sums.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [True, False])
def test_activations_leave_their_input_as_it_is_and_keep_its_dtype(dtype, gradients):
    x = 4 * torch.randn(3, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    for op in (reference.swiglu7, reference.gelu7):
        given = x.clone().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            out = op(given)
        assert torch.equal(given, x) and out.dtype == dtype and out.requires_grad == gradients
        assert torch.equal(out, op(x))


@pytest.mark.parametrize("spans", [(4, 1, 2), (7,)])
def test_attention_inputs_norm_then_turn_queries_and_keys_head_by_head(spans):
    random = torch.Generator().manual_seed(2)
    rows = torch.randn(2, 7, (3 + 2) * 16 + 3, generator=random) * 4  # three query heads, one key head
    q_weight, k_weight = torch.randn(2, len(spans), 16, generator=random)
    angles = torch.randn(7, 6, generator=random)
    sin_cos = torch.cat([angles.sin(), angles.cos()], dim=1)
    q, k, v, gate = reference.attention_inputs(rows, q_weight, k_weight, spans, sin_cos, (3, 1))
    expert = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(spans))
    for head, weight, column in ((q[:, 0], q_weight, 0), (q[:, 2], q_weight, 32), (k[:, 0], k_weight, 48)):
        wide = rows[..., column : column + 16].double()
        normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double()[expert])
        turned = torch.complex(normed[..., :6], normed[..., 6:12]) * torch.exp(1j * angles.double())
        close(head, torch.cat([turned.real, turned.imag, normed[..., 12:]], dim=-1))
    assert torch.equal(v[:, 0], rows[..., 64:80])
    close(gate, 1 / (1 + torch.exp(-rows[..., 80:].double())))
    assert all(part.is_contiguous() for part in (q, k, v, gate))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("piece", [1, 2**24])
def test_channel_norm_rounds_twice_and_repeats_the_ends(memory_format, piece, monkeypatch):
    monkeypatch.setattr(reference, "CHANNEL_NORM_BYTES", piece)
    x = torch.randn(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(3)) * 3
    x = x.to(torch.bfloat16).contiguous(memory_format=memory_format)
    long = x[:, :, [0, 0, 0, 1, 2, 2]]
    wanted = long.double() / (long.double().pow(2).mean(1, keepdim=True) + 0.1).sqrt()
    activations = {
        None: lambda wide: wide,
        "relu": lambda wide: wide.clamp(min=0),
        "silu": lambda wide: wide * wide.sigmoid(),
    }
    for activation, formula in activations.items():
        found = reference.channel_norm(x, 0.1, activation, before=2, after=1)
        assert found.is_contiguous(memory_format=memory_format)
        assert torch.equal(found, formula(wanted.to(torch.bfloat16).double()).to(torch.bfloat16))


def test_renoise_step_ends_clean():
    x, velocity, noise = torch.randn(3, 2, 4)
    close(reference.renoise_step(x, velocity, noise, 0.8, 0.0), x.double() - 0.8 * velocity.double())
    close(
        reference.renoise_step(x, velocity, noise, 0.8, 0.5),
        0.5 * noise.double() + 0.5 * (x.double() - 0.8 * velocity.double()),
    )


@pytest.mark.parametrize("op", ["rms_norm", "swiglu7", "gelu7", "rotate", "gate_heads"])
def test_ops_are_differentiable(op):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 2, 8, generator=random, dtype=torch.float64, requires_grad=True)
    second = {
        "rms_norm": torch.randn(8, generator=random, dtype=torch.float64, requires_grad=True),
        "rotate": torch.randn(3, 6, generator=random, dtype=torch.float64),
        "gate_heads": torch.randn(1, 2, 3, generator=random, dtype=torch.float64, requires_grad=True),
    }.get(op)
    function = getattr(reference, op)
    result = function(x) if second is None else function(x, second)
    result.sum().backward()
    assert x.grad.abs().sum() > 0
    if second is not None and second.requires_grad:
        assert second.grad.abs().sum() > 0


def test_scales_of_rows_and_columns_are_multiplied_in():
    x, rows, columns = torch.randn(3, 5), torch.randn(3, 1), torch.randn(1, 5)
    wanted = x.double() * rows.double() * columns.double()
    assert reference.scale_rows_and_columns(x, rows, columns) is x
    close(x, wanted)


def test_fp8_weights_are_powers_of_two_and_straight_lines_between_them():
    whole = torch.arange(-6.0, 9.0)
    assert torch.equal(reference.fp8_weights(whole), 2**whole)
    assert reference.fp8_weights(torch.tensor([8.75, -7.1, -torch.inf])).tolist() == [448, 0, 0]
    exponents = torch.linspace(-6, 8, 100_000)
    found, wanted = reference.fp8_weights(exponents), 2**exponents
    assert torch.equal(found, found.to(torch.float8_e4m3fn).float()) and (found.diff() >= 0).all()
    off = found / wanted / (found.sum() / wanted.sum()) - 1  # a factor of all weights is divided out
    assert 3.0e-2 < off.square().mean().sqrt() < 3.3e-2
