"""fp8 linears in the quickest way that a card and its torch have: scales of rows in the product, after it, or bf16."""

import functools
import logging

import torch
import torch.nn.functional as F

from . import reference
from .dispatch import FP8_CAPABILITY, capability_of, raise_if_full, scale_rows_and_columns
from .fp8 import aligned, dequantise_rows, multiplied, quantise_rows, quantise_weight


def by_rows(x, weight):
    """Multiply with a scale for each row of x and of weight: Ada from torch 2.7 on, Hopper."""
    return multiplied(x, weight, aligned(x.scale.flatten(0, -2)), weight.scale.t())


def by_tensor(x, weight):
    """Multiply with none and scale rows and columns after it: RTX 50 (pytorch issue 192707, torch 2.10)."""
    one = x.scale.new_ones(())
    product = multiplied(x, weight, one, one)  # a sum of products below 448 x 448: far from bf16's limit
    return scale_rows_and_columns(product, x.scale.flatten(0, -2), weight.scale.t())


WAYS = {"rows": by_rows, "tensor": by_tensor}  # by what a scale is for; the quickest first


@torch.no_grad()
def check(multiply, device="cuda"):
    """Run one of the WAYS on a few tokens; RuntimeError if the result is not the product of what it was given."""
    random = torch.Generator(device).manual_seed(0)
    x = quantise_rows(torch.randn(64, 256, generator=random, device=device))
    weight = quantise_weight(torch.randn(128, 256, generator=random, device=device))
    wanted = dequantise_rows(x, 256) @ dequantise_rows(weight, 256).T
    error = ((multiply(x, weight).float() - wanted).norm() / wanted.norm()).item()
    if not error < 0.02:
        raise RuntimeError(f"its result is off by {error:.0%}")


@functools.cache
def way_of(capability):
    """Return which of the WAYS works on a card of this capability, or None; tried once a process."""
    if torch.version.hip is not None or capability < FP8_CAPABILITY:
        return None
    faults = []
    for name, multiply in WAYS.items():
        try:
            check(multiply)
        except Exception as error:  # which kind depends on what refuses: torch, cuBLAS or the check
            raise_if_full(error)
            faults.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
        else:
            if faults:
                logging.info(f"happyhorse-local: fp8 is multiplied with a scale for the whole {name} ({faults[0]})")
            return name
    logging.warning(f"happyhorse-local: this torch multiplies no fp8 here ({'; '.join(faults)}); it is done in bf16")
    return None


@torch.compiler.assume_constant_result  # which it would not be with a cache of its own
def way_on(device):
    """Return what `way_of` does for a device."""
    return way_of(capability_of(device))


def fp8_linear(x, weight, out_features, out_dtype=torch.bfloat16):
    """See `reference.fp8_linear`; cards that multiply fp8 do so, others multiply the same values in bf16."""
    if not x.values.is_cuda:
        return reference.fp8_linear(x, weight, out_features, out_dtype)
    way = way_on(x.values.device)
    if way is not None:  # a slice of rows as wide as the padded weight is high
        return WAYS[way](x, weight).unflatten(0, x.values.shape[:-1])[..., :out_features].to(out_dtype)
    columns = x.values.shape[-1]
    wide = dequantise_rows(weight, columns)[:out_features].bfloat16()
    return F.linear(dequantise_rows(x, columns).bfloat16(), wide).to(out_dtype)
