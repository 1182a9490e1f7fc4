"""Pick the backend of each op: Triton where its limits hold, else the plain torch of `reference`."""

import functools
import logging
from dataclasses import dataclass

import torch

from . import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a Triton kernel accepts; beyond it the reference runs."""

    dtypes: tuple[torch.dtype, ...]  # of input, weight and output
    max_axes: int
    max_columns: int
    min_capability: tuple[int, int]

    def hold(self, x, weights, out_dtype, capability):
        """Tell whether the kernel serves input `x`, its weights and the asked dtype on a card of this capability."""
        tensors = (x, *weights)
        dtypes = [tensor.dtype for tensor in tensors] + [out_dtype or x.dtype]
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return (
            not needs_gradient
            and all(dtype in self.dtypes for dtype in dtypes)
            and all(tensor.device == x.device for tensor in weights)
            and x.ndim <= self.max_axes
            and x.shape[-1] <= self.max_columns
            and capability >= self.min_capability
        )


LIMITS = {
    "rms_norm": Limits(dtypes=FLOATS, max_axes=4, max_columns=16384, min_capability=(8, 0)),
    "swiglu7": Limits(dtypes=FLOATS, max_axes=4, max_columns=2**20, min_capability=(8, 0)),
}


@functools.cache
def triton_kernels():
    """Import the Triton kernels and run one, once a process; return {op: module}, or None where that does not work."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    try:
        from . import rms_norm_triton, swiglu7_triton

        # Triton builds its launcher with a C compiler, which may be missing: that shows only when a kernel runs.
        rms_norm_triton.rms_norm(torch.ones(1, 16, device="cuda"), torch.zeros(16, device="cuda"))
    except Exception as error:  # whatever is broken, torch still works
        reason = f"{type(error).__name__}: {error}"
        logging.warning(f"happyhorse-local: Triton does not work here ({reason}); torch runs its ops, more slowly")
        return None
    return {"rms_norm": rms_norm_triton, "swiglu7": swiglu7_triton}


def triton_kernel(op, x, out_dtype, *weights):
    """Return the Triton module that serves `op` on these tensors; None on the CPU, beyond LIMITS or without Triton."""
    if not x.is_cuda or not LIMITS[op].hold(x, weights, out_dtype, torch.cuda.get_device_capability(x.device)):
        return None
    kernels = triton_kernels()
    return kernels and kernels[op]


def rms_norm(x, weight, eps=1e-6, out_dtype=None):
    """See `reference.rms_norm`."""
    backend = triton_kernel("rms_norm", x, out_dtype, weight) or reference
    return backend.rms_norm(x, weight, eps, out_dtype)


def rms_norm_spans(x, weight, spans, eps=1e-6, out_dtype=None):
    """See `reference.rms_norm_spans`; Triton serves at most three spans."""
    backend = (len(spans) <= 3 and triton_kernel("rms_norm", x, out_dtype, weight)) or reference
    return backend.rms_norm_spans(x, weight, spans, eps, out_dtype)


def swiglu7(x, out_dtype=None):
    """See `reference.swiglu7`."""
    backend = triton_kernel("swiglu7", x, out_dtype) or reference
    return backend.swiglu7(x, out_dtype)
