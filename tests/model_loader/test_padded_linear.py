"""Linears that take rows padded with zeros: the same numbers, and the weight stays what it was to everybody else."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pack.model_loader import dit_layers, padded_linear
from pack.model_loader.config import DISTILL
from pack.model_loader.dit import DiT
from pack.model_loader.padded_linear import Linear, keep_padded, padded_weight


@pytest.fixture
def linear():
    return Linear(20, 5, dtype=torch.float64)


def test_padded_rows_give_what_the_rows_give(linear):
    x = torch.randn(3, 20, dtype=torch.float64)
    wanted = linear(x)
    torch.testing.assert_close(linear(F.pad(x, (0, 12))), wanted)
    torch.testing.assert_close(linear(x), wanted)  # the weight has other strides now


def test_the_weight_keeps_its_shape_and_its_padding_until_it_moves(linear):
    before = copy.deepcopy(linear.weight)
    wide = keep_padded(linear.weight)
    assert wide.shape == (5, 32) and not wide[:, 20:].any()
    assert isinstance(linear.weight, torch.nn.Parameter) and torch.equal(linear.weight, before)
    assert keep_padded(linear.weight).data_ptr() == wide.data_ptr() == linear.weight.data_ptr()
    linear.to(torch.float32)
    assert keep_padded(linear.weight).dtype == torch.float32
    slices = torch.nn.Parameter(torch.ones(7, 32)[:, :20])  # of somebody's wider matrix, with the same strides
    slices.data = torch.ones(8, 32)[:7, :20]
    assert not keep_padded(slices)[:, 20:].any()


def test_a_weight_that_needs_no_padding_is_as_it_was():
    weight = torch.nn.Parameter(torch.randn(5, 32))
    assert keep_padded(weight).data_ptr() == weight.data_ptr()
    assert torch.equal(padded_weight(weight), weight)


def test_only_rows_that_are_no_whole_blocks_are_padded_and_only_for_linears_that_take_them():
    factory = {"dtype": torch.bfloat16, "device": "meta"}
    shared, first = (dit_layers.MLP(DISTILL, layer, operations=padded_linear, **factory) for layer in (7, 0))
    assert shared.padded and not first.padded  # 13652 and 20480 columns
    assert not dit_layers.MLP(DISTILL, 7, operations=torch.nn, **factory).padded


@torch.no_grad()
def test_a_network_of_padded_rows_gives_the_same(dit, clip, monkeypatch):
    """On a CPU rows are not padded, so the padding is asked for here: 212 columns are no multiple of 8."""
    config = replace(dit.config, hidden_size=80, num_query_groups=1)
    plain, padded = DiT(config), DiT(config, operations=padded_linear)
    padded.load_state_dict(plain.state_dict())
    asked = []

    def swiglu7(x, out_dtype, wish):
        asked.append(wish)
        return dit_layers.swiglu7(x, out_dtype, True)

    for layer in padded.block.layers:
        if layer.mlp.padded:
            layer.mlp.activation = swiglu7
    for found, wanted in zip(padded(*clip), plain(*clip), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(asked) >= 3 and not any(asked)
