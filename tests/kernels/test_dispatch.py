"""Which backend serves which tensors, and what a machine without working Triton is told."""

import logging
from unittest.mock import Mock

import pytest
import torch
from pack import kernels
from pack.kernels import FP8, attention_choice, dispatch, fp8_matmul, reference
from pack.kernels.fp8 import fp8_scores

X = torch.randn(2, 5, 48)
WEIGHT = torch.randn(3, 48)
HOPPER = (9, 0)


def hold(x=X, weight=WEIGHT, columns=48, out_dtype=None, capability=HOPPER):
    return dispatch.LIMITS["rms_norm"].hold((x, weight), columns, out_dtype, capability)


def test_limits():
    assert hold() and hold(out_dtype=torch.bfloat16) and hold(X.bfloat16())
    assert not hold(X.double())
    assert not hold(weight=WEIGHT.double())
    assert not hold(out_dtype=torch.float64)
    assert not hold(X[None, None])  # five axes
    assert hold(columns=16384) and not hold(columns=16385)
    assert not hold(weight=WEIGHT.to("meta"))
    assert not hold(capability=(7, 5))


def test_fp8_rows_want_a_card_that_multiplies_them():
    assert hold(out_dtype=FP8) and hold(out_dtype=FP8, capability=(8, 9))
    assert hold(capability=(8, 6)) and not hold(out_dtype=FP8, capability=(8, 6))
    limits = dispatch.LIMITS["activation"]
    assert limits.hold((X,), 2**16, FP8, HOPPER) and limits.hold((X,), 2**16 + 2, torch.bfloat16, HOPPER)
    assert not limits.hold((X,), 2**16 + 2, FP8, HOPPER)


def test_gradients_go_through_the_reference():
    trained = WEIGHT.clone().requires_grad_()
    assert not hold(weight=trained)
    with torch.no_grad():
        assert hold(weight=trained)


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


FULL = [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")]


@pytest.mark.parametrize("error", FULL, ids=["torch", "Triton"])
@pytest.mark.parametrize("trial", ["attention", "fp8 products"])
def test_a_card_that_is_full_when_a_kernel_is_tried_tries_it_again(trial, error, monkeypatch):
    cached = attention_choice.working_attention if trial == "attention" else fp8_matmul.way_of
    owner, check = (attention_choice, "check_attention") if trial == "attention" else (fp8_matmul, "check")
    monkeypatch.setattr(attention_choice, "triton_kernels", lambda: {"op": dispatch})
    monkeypatch.setattr(owner, check, Mock(side_effect=[error, None]))
    arguments = ((8, 9), True) if trial == "attention" else ((8, 9),)
    cached.cache_clear()
    with pytest.raises(type(error), match="out of memory"):
        cached(*arguments)
    assert cached(*arguments) == ("attention_fp8_triton" if trial == "attention" else "rows")
    cached.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows a card that this machine does not have")
def test_a_full_card_is_no_reason_to_do_without_triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=FULL[0]))
    dispatch.triton_kernels.cache_clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        dispatch.triton_kernels()
    assert dispatch.triton_kernels.cache_info().currsize == 0
    dispatch.triton_kernels.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gets_triton_inside_the_limits_only():
    x, weight = X.cuda(), WEIGHT.cuda()
    assert dispatch.backend("rms_norm", x, weight).__name__.endswith("rms_norm_triton")
    assert dispatch.backend("activation", x, out_dtype=torch.bfloat16).__name__.endswith("activation_triton")
    assert dispatch.backend("rms_norm", x.double(), weight) is reference
    assert dispatch.backend("activation", x, columns=2**20 + 1) is reference
    channels_last = torch.zeros(1, 64, 2, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last_3d)
    assert dispatch.backend("channel_norm", channels_last, columns=64).__name__.endswith("channel_norm_triton")
    four_spans = kernels.rms_norm_spans(x, weight[[0, 1, 2, 0]], (1, 1, 1, 2))
    torch.testing.assert_close(four_spans.cpu(), reference.rms_norm_spans(X, WEIGHT[[0, 1, 2, 0]], (1, 1, 1, 2)))


def in_fp8(q, k):
    return fp8_scores(q, k, k.abs().amax().float())


def test_attention_goes_to_a_kernel_on_the_cards_that_have_one_only():
    q = torch.zeros(1, 2, 8, 128, dtype=torch.bfloat16)
    assert kernels.attention_kernel(q, q, q) is None
    assert kernels.attention_kernel(*in_fp8(q, q), q) is None
    assert "it wants an NVIDIA card, not 'cpu'" in kernels.why_no_fp8_attention(q.device, 128)


def test_an_attention_kernel_that_a_compiler_got_wrong_is_noticed():
    attention_choice.check_attention(reference.attention, True, "cpu")
    for wrong in (lambda q, k, v: v, lambda q, k, v: q * float("nan")):
        with pytest.raises(RuntimeError, match="its result is off by"):
            attention_choice.check_attention(wrong, False, "cpu")


@pytest.mark.parametrize(
    ("off", "milliseconds", "pays"),
    [(0.001, (10, 8), True), (0.001, (10, 9.9), False), (0.001, (8, 10), False), (0.1, (10, 5), False)],
    ids=["quicker", "hardly quicker", "slower", "wrong"],
)
def test_scores_in_fp16_are_taken_where_they_are_quicker_and_right(off, milliseconds, pays, monkeypatch, caplog):
    def run(name, q, k, v):
        return reference.attention(q, k, v) * (1 + off * (name == attention_choice.HALF))

    times = dict(zip((attention_choice.WIDE, attention_choice.HALF), milliseconds, strict=True))
    monkeypatch.setattr(attention_choice, "milliseconds", lambda run, name, *arguments: times[name])
    with caplog.at_level(logging.INFO):
        assert attention_choice.half_scores_pay(run, "cpu", tokens=64) is pays
    assert f"takes {100 * milliseconds[1] / milliseconds[0]:.0f} % of the time" in caplog.text


@pytest.mark.parametrize(
    ("trial", "chosen"),
    [(lambda: True, "attention_half_hopper"), (lambda: False, "attention_hopper"), (lambda: 1 / 0, "attention_hopper")],
    ids=["it pays", "it does not", "it fails"],
)
def test_a_hopper_card_gets_the_quicker_of_its_kernels(trial, chosen, monkeypatch):
    monkeypatch.setattr(attention_choice, "triton_kernels", lambda: {"op": dispatch})
    monkeypatch.setattr(attention_choice, "check_attention", lambda kernel, fp8: None)
    monkeypatch.setattr(attention_choice, "half_scores_pay", trial)
    attention_choice.working_attention.cache_clear()
    assert attention_choice.working_attention(HOPPER, True) == chosen
    assert attention_choice.working_attention(HOPPER, False) == "attention_hopper"
    assert attention_choice.working_attention((8, 9), True) == "attention_fp8_triton"
    assert attention_choice.working_attention((8, 9), False) is None
    attention_choice.working_attention.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_attention_on_a_gpu():
    capability = torch.cuda.get_device_capability()
    q = torch.randn(1, 2, 300, 128, dtype=torch.bfloat16, device="cuda")
    assert (kernels.attention_kernel(q, q, q) is not None) == (capability[0] == 9)
    assert (kernels.attention_kernel(*in_fp8(q, q), q) is not None) == (capability >= (8, 9))
    assert kernels.attention_kernel(q.float(), q.float(), q.float()) is None
    assert kernels.attention_kernel(*[q[..., :64].contiguous()] * 3) is None
    assert kernels.attention_kernel(*[q.clone().requires_grad_()] * 3) is None
    assert (kernels.why_no_fp8_attention(q.device, 128) is None) == (capability >= (8, 9))
    assert kernels.why_no_fp8_attention(q.device, 64) is not None


def test_adding_to_the_stream_takes_the_place_it_is_given():
    x, delta = torch.randn(2, 5, 48), torch.randn(2, 5, 48).bfloat16()
    place = torch.empty(2, 9, 48)
    found = kernels.add(x, delta, place[:, 2:7])
    assert torch.equal(found, x + delta) and torch.equal(place[:, 2:7], found)


def test_a_processor_is_asked_for_what_multiplies_bf16(monkeypatch):
    """The functions of torch.cpu are undocumented: where they are gone, the answer is no."""
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert dispatch.cpu_multiplies_bf16() is has
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert dispatch.cpu_multiplies_bf16() is False
