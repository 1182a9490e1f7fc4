"""Weights of linears that wait elsewhere or are quantised, brought and made wide once for many pieces of a sequence."""

import contextlib

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor


@contextlib.contextmanager
def held(linears, device):
    """Inside, the Linears of comfy.ops have their weights on `device` as they multiply by them, LoRAs included.

    A 1080p clip passes a layer in 16 pieces: by themselves, the linears would bring a weight that waits in RAM, turn
    int8, fp8 or .gguf blocks into bf16 and add a LoRA as often. Weights that are where they should be are left alone.
    """
    with contextlib.ExitStack() as stack:
        for linear in linears:
            if not _is_ready(linear, device):
                stack.enter_context(_held(linear, device))
        yield


def multiplies_quantised(linear):
    """Tell whether a Linear multiplies by its quantised weight as it is."""
    return getattr(linear, "MULTIPLIES_QUANTISED", False)


def _is_ready(linear, device):
    waits = linear.weight.device != device or linear.weight_function
    return not waits and (multiplies_quantised(linear) or not isinstance(linear.weight, QuantizedTensor))


@contextlib.contextmanager
def _held(linear, device):
    own, dtype, functions = linear.weight, linear.weight.dtype, linear.weight_function
    weight, bias, lent = comfy.ops.cast_bias_weight(
        linear, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True, compute_dtype=dtype,
        want_requant=multiplies_quantised(linear),
    )  # fmt: skip
    brought = weight
    if isinstance(weight, QuantizedTensor) and not multiplies_quantised(linear):
        weight = weight.dequantize()
    elif _in_a_buffer(lent):
        weight = weight.clone()
    kept = weight is brought
    if not kept:
        comfy.ops.uncast_bias_weight(linear, brought, bias, lent)
    linear.weight, linear.weight_function = torch.nn.Parameter(weight, requires_grad=False), []
    try:
        yield
    finally:
        linear.weight, linear.weight_function = own, functions
        if kept:
            comfy.ops.uncast_bias_weight(linear, brought, bias, lent)


def _in_a_buffer(lent):
    """Tell whether core brought a weight into the buffer of a stream, of which there are two, used in turn.

    Otherwise it lies where it was before, or in a page of comfy-aimdo's, which stays until it is given back.
    """
    stream, place, _ = lent
    return stream is not None and not isinstance(place, torch.device)
