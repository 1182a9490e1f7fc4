"""Which backend serves which tensors, and what a machine without working Triton is told."""

import logging

import pytest
import torch
from pack import kernels
from pack.kernels import dispatch, reference

X = torch.randn(2, 5, 48)
WEIGHT = torch.randn(3, 48)
HOPPER = (9, 0)


def hold(x=X, weights=(WEIGHT,), out_dtype=None, capability=HOPPER):
    return dispatch.LIMITS["rms_norm"].hold(x, weights, out_dtype, capability)


def test_limits():
    assert hold() and hold(out_dtype=torch.bfloat16) and hold(X.bfloat16())
    assert not hold(X.double())
    assert not hold(weights=(WEIGHT.double(),))
    assert not hold(out_dtype=torch.float64)
    assert not hold(X[None, None])  # five axes
    assert not hold(torch.empty(1, 1, 16385))
    assert not hold(weights=(WEIGHT.to("meta"),))
    assert not hold(capability=(7, 5))


def test_gradients_go_through_the_reference():
    trained = WEIGHT.clone().requires_grad_()
    assert not hold(weights=(trained,))
    with torch.no_grad():
        assert hold(weights=(trained,))


def test_cpu_tensors_give_the_reference_result_and_gradient():
    trained = WEIGHT.clone().requires_grad_()
    found = kernels.rms_norm_spans(X, trained, (2, 2, 1), out_dtype=torch.float64)
    assert found.dtype == torch.float64 and found.requires_grad
    torch.testing.assert_close(found, reference.rms_norm_spans(X, WEIGHT, (2, 2, 1), out_dtype=torch.float64))
    torch.testing.assert_close(kernels.rms_norm(X, WEIGHT[0], 1e-3), reference.rms_norm(X, WEIGHT[0], 1e-3))
    torch.testing.assert_close(kernels.swiglu7(X, torch.bfloat16), reference.swiglu7(X, torch.bfloat16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows a machine whose GPU cannot run Triton")
def test_a_machine_where_triton_fails_says_so_once_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dispatch.triton_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert dispatch.triton_kernels() is None and dispatch.triton_kernels() is None
    dispatch.triton_kernels.cache_clear()
    (record,) = caplog.records
    assert "Triton does not work here" in record.message and "torch runs its ops" in record.message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gets_triton_inside_the_limits_only():
    x, weight = X.cuda(), WEIGHT.cuda()
    assert dispatch.triton_kernel("rms_norm", x, None, weight).__name__.endswith("rms_norm_triton")
    assert dispatch.triton_kernel("swiglu7", x, torch.bfloat16).__name__.endswith("swiglu7_triton")
    assert dispatch.triton_kernel("rms_norm", x.double(), None, weight) is None
    four_spans = kernels.rms_norm_spans(x, weight[[0, 1, 2, 0]], (1, 1, 1, 2))
    torch.testing.assert_close(four_spans.cpu(), reference.rms_norm_spans(X, WEIGHT[[0, 1, 2, 0]], (1, 1, 1, 2)))
