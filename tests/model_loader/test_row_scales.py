"""Rows with scales: rounded to half a step, the same in pieces as whole, and whatever was stored before."""

import pytest
import torch
from pack.kernels import quantise_rows, quantise_weight
from pack.model_loader import row_scales
from pack.model_loader.row_scales import quantised, rotated_back

FP8 = torch.float8_e4m3fn


@pytest.fixture
def weight():
    """A matrix whose rows differ a millionfold, one of them zero."""
    size = torch.logspace(-3, 3, 7)[:, None]
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)) * size
    weight[3] = 0
    return weight


def test_int8_is_within_half_a_step(weight):
    values, scale = quantised(torch.int8, weight)
    assert values.dtype == torch.int8 and scale.shape == (7, 1) and scale.dtype == torch.float32
    assert ((values * scale - weight).abs() <= scale * 0.5001).all()
    assert values.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]


def test_fp8_is_what_the_kernels_make_of_a_weight_and_nearer_than_rows_of_448(weight):
    values, scale = quantised(FP8, weight)
    ours, rows = quantise_weight(weight), quantise_rows(weight)
    assert torch.equal(values.float(), ours.values[:7].float()) and torch.equal(scale, ours.scale[:7])
    off = [(found.float() * at - weight).norm(dim=1) for found, at in ((values, scale), rows)]
    assert (off[0] <= off[1]).all() and (off[0] / off[1]).nanmean() < 0.95  # a row of zeros is not off
    largest = values.float().abs().amax(1)
    assert ((largest > 224) == (weight.abs().amax(1) > 0)).all()


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5), torch.rand(7, 1) + 0.5], ids=["none", "one", "rows"])
def test_pieces_make_no_difference(weight, dtype, scale, monkeypatch):
    whole = quantised(dtype, weight if scale is None else weight * scale)
    for piece in (1, 100, 2**22):  # a row at a time, two, all
        monkeypatch.setattr(row_scales, "PIECE", piece)
        found = quantised(dtype, weight, scale)
        assert torch.equal(found[0].float(), whole[0].float()) and torch.equal(found[1], whole[1])
    assert weight.std() > 1, "the matrix itself is left as it was"


def test_other_axes_stay(weight):
    values, scale = quantised(torch.int8, weight[None, :, None].expand(2, 7, 3, 48))
    assert values.shape == (2, 7, 3, 48) and scale.shape == (2, 7, 3, 1)
    assert torch.equal(values[1, :, 2], quantised(torch.int8, weight)[0])


@pytest.mark.parametrize("group", [4, 16])
def test_rotating_twice_is_nothing(weight, group):
    turned = rotated_back(weight, group)
    assert (turned - weight).abs().max() > 1
    torch.testing.assert_close(rotated_back(turned, group), weight, atol=1e-3, rtol=1e-5)
