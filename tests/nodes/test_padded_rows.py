"""Rows padded with zeros through core's Linears: resident, streamed, with a LoRA, of bf16 and of fp8."""

import pytest
import torch
import torch.nn.functional as F
from pack.nodes import padded_rows
from pack.nodes.quantised import quantised_operations

WIDE = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
PADDED = F.pad(X, (0, 12))


@pytest.fixture
def linear():
    module = padded_rows.Operations.Linear(20, 6, bias=False, dtype=torch.float32)
    module.load_state_dict({"weight": WIDE.clone()})
    return module


def test_a_resident_weight_is_padded_once(linear):
    torch.testing.assert_close(linear(PADDED), F.linear(X, WIDE))
    where = linear.weight.data_ptr()
    torch.testing.assert_close(linear(PADDED), F.linear(X, WIDE))
    assert linear.weight.data_ptr() == where and linear.weight.shape == (6, 20)
    torch.testing.assert_close(linear(X), F.linear(X, WIDE))


def test_a_weight_that_is_cast_for_the_call_stays_as_it_is(linear):
    linear.comfy_cast_weights = True
    found = linear(PADDED.bfloat16())
    torch.testing.assert_close(found, F.linear(X.bfloat16(), WIDE.bfloat16()))
    assert linear.weight.is_contiguous() and torch.equal(linear.weight, WIDE)


def test_what_is_added_to_a_weight_as_it_runs_counts(linear):
    linear.weight_function = [lambda weight: weight + 1]
    torch.testing.assert_close(linear(PADDED), F.linear(X, WIDE + 1))
    assert torch.equal(linear.weight, WIDE)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("fast", [False, True])
def test_quantised_linears_take_such_rows(fast, dtype):
    kind, largest = ("int8", 127) if dtype == torch.int8 else ("fp8", 448)
    operations = quantised_operations(torch.bfloat16, kind if fast else None)
    assert operations.TAKES_PADDED_ROWS
    linear = operations.Linear(20, 6, False, dtype=torch.bfloat16, device=None)
    scale = WIDE.abs().amax(1, keepdim=True) / largest
    values = (WIDE / scale).round().to(dtype) if dtype == torch.int8 else (WIDE / scale).to(dtype)
    linear.load_state_dict({"weight": values, "weight_scale": scale})
    found, wanted = linear(PADDED.bfloat16()), linear(X.bfloat16())
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    error = (wanted.float() - F.linear(X, WIDE)).norm() / F.linear(X, WIDE).norm()
    assert 0 < error < (0.02 if dtype == torch.int8 else 0.08)


def test_the_loader_builds_the_transformer_of_them(loaded):
    layers = loaded[0].model.diffusion_model.block.layers
    assert isinstance(layers[1].mlp.down_proj, padded_rows.PaddedRows)
