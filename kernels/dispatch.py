"""Pick the backend of each op: Triton where its limits hold, else the plain torch of `reference`."""

import functools
import logging
from dataclasses import dataclass

import torch

from . import reference
from .fp8 import FP8

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8_CAPABILITY = (8, 9)  # Ada and later multiply e4m3


def cpu_multiplies_bf16():
    """Tell whether the processor has instructions for products of bf16 matrices; ask torch, as far as it knows."""
    return any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a Triton kernel accepts; beyond it the reference runs."""

    dtypes: tuple[torch.dtype, ...]  # of inputs, weights and output
    max_axes: int
    max_columns: int  # of a row of x
    max_fp8_columns: int  # of a row of x where the output is Fp8Rows: one program holds a whole row; 0: no such output
    min_capability: tuple[int, int]

    def hold(self, tensors, columns, out_dtype, capability):
        """Tell whether the kernel serves inputs of `columns` a row and this output on a card of this capability."""
        quantise = out_dtype == FP8
        dtypes = [tensor.dtype for tensor in tensors] + [out_dtype or tensors[0].dtype] * (not quantise)
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return (
            not needs_gradient
            and all(dtype in self.dtypes for dtype in dtypes)
            and all(tensor.device == tensors[0].device for tensor in tensors)
            and tensors[0].ndim <= self.max_axes
            and columns <= (self.max_fp8_columns if quantise else self.max_columns)
            and capability >= (FP8_CAPABILITY if quantise else self.min_capability)
        )


LIMITS = {
    "rms_norm": Limits(FLOATS, max_axes=4, max_columns=16384, max_fp8_columns=16384, min_capability=(8, 0)),
    "activation": Limits(FLOATS, max_axes=4, max_columns=2**20, max_fp8_columns=2**16, min_capability=(8, 0)),
    "attention_inputs": Limits(FLOATS, max_axes=3, max_columns=16384, max_fp8_columns=16384, min_capability=(8, 0)),
    "gate_heads": Limits(FLOATS, max_axes=4, max_columns=16384, max_fp8_columns=16384, min_capability=(8, 0)),
    "channel_norm": Limits(FLOATS, max_axes=5, max_columns=4096, max_fp8_columns=0, min_capability=(8, 0)),
    "add_channels": Limits(FLOATS, max_axes=5, max_columns=4096, max_fp8_columns=0, min_capability=(8, 0)),
    "add": Limits(FLOATS, max_axes=8, max_columns=2**40, max_fp8_columns=0, min_capability=(8, 0)),
    "renoise": Limits((torch.float32,), max_axes=8, max_columns=2**40, max_fp8_columns=0, min_capability=(8, 0)),
    "scale": Limits(FLOATS, max_axes=2, max_columns=2**24, max_fp8_columns=0, min_capability=(8, 0)),
}


def raise_if_full(error):
    """Raise an error again that says that the card is full, so that a trial is made another time, not given up."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
        raise error


@functools.cache
def triton_kernels():
    """Import the Triton kernels and run one, once a process; return {op: module}, or None where that does not work."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    try:
        from . import (
            activation_triton,
            add_channels_triton,
            add_triton,
            attention_inputs_triton,
            channel_norm_triton,
            gate_heads_triton,
            renoise_triton,
            restore_triton,
            rms_norm_triton,
            scale_triton,
        )

        # Triton builds its launcher with a C compiler, which may be missing: that shows only when a kernel runs.
        rms_norm_triton.rms_norm(torch.ones(1, 16, device="cuda"), torch.zeros(16, device="cuda"))
    except Exception as error:  # whatever is broken, torch still works
        raise_if_full(error)
        reason = f"{type(error).__name__}: {error}"
        logging.warning(f"happyhorse-local: Triton does not work here ({reason}); torch runs its ops, more slowly")
        return None
    return {
        "add": add_triton,
        "rms_norm": rms_norm_triton,
        "activation": activation_triton,
        "attention_inputs": attention_inputs_triton,
        "gate_heads": gate_heads_triton,
        "channel_norm": channel_norm_triton,
        "add_channels": add_channels_triton,
        "renoise": renoise_triton,
        "restore": restore_triton,
        "scale": scale_triton,
    }


@functools.cache
def capability_of(device):
    """Return the compute capability of a card: asked for once, for every launch wants it."""
    return torch.cuda.get_device_capability(device)


def backend(op, *tensors, columns=None, out_dtype=None):
    """Return the Triton module that serves `op` on these tensors; `reference` on the CPU, beyond LIMITS or without it.

    torch.compile gets the reference too, which it fuses itself.

    columns: of the rows that the kernel works on (default: those of the first tensor).
    """
    columns = tensors[0].shape[-1] if columns is None else columns
    if not tensors[0].is_cuda or torch.compiler.is_compiling():
        return reference
    if not LIMITS[op].hold(tensors, columns, out_dtype, capability_of(tensors[0].device)):
        return reference
    kernels = triton_kernels()
    return kernels[op] if kernels else reference


def rms_norm(x, weight, eps=1e-6, out_dtype=None):
    """See `reference.rms_norm`."""
    return backend("rms_norm", x, weight, out_dtype=out_dtype).rms_norm(x, weight, eps, out_dtype)


def rms_norm_spans(x, weight, spans, eps=1e-6, out_dtype=None):
    """See `reference.rms_norm_spans`; Triton serves at most three spans."""
    chosen = backend("rms_norm", x, weight, out_dtype=out_dtype) if len(spans) <= 3 else reference
    return chosen.rms_norm_spans(x, weight, spans, eps, out_dtype)


def add(x, delta, out=None):
    """See `reference.add`; Triton serves an `out` without gaps."""
    served = x.dtype == torch.float32 and (out is None or out.is_contiguous())
    return (backend("add", x, delta) if served else reference).add(x, delta, out)


def add_rms_norm_spans(x, delta, weight, spans, eps=1e-6, out_dtype=None, total=None):
    """See `reference.add_rms_norm_spans`; Triton serves at most three spans."""
    chosen = backend("rms_norm", x, delta, weight, out_dtype=out_dtype) if len(spans) <= 3 else reference
    return chosen.add_rms_norm_spans(x, delta, weight, spans, eps, out_dtype, total)


def swiglu7(x, out_dtype=None, padded=False):
    """See `reference.swiglu7`."""
    return backend("activation", x, out_dtype=out_dtype).swiglu7(x, out_dtype, padded)


def gelu7(x, out_dtype=None, padded=False):
    """See `reference.gelu7`."""
    return backend("activation", x, out_dtype=out_dtype).gelu7(x, out_dtype, padded)


def attention_inputs(rows, q_weight, k_weight, spans, sin_cos, heads, eps=1e-6, out=None, fp8=False):
    """See `reference.attention_inputs`; Triton serves at most three spans. `out` takes the four results if given."""
    tensors = (rows, q_weight, k_weight, sin_cos)
    served = len(spans) <= 3
    chosen = backend("attention_inputs", *tensors, out_dtype=FP8 if fp8 else None) if served else reference
    return chosen.attention_inputs(rows, q_weight, k_weight, spans, sin_cos, heads, eps, out, fp8)


def gate_heads(x, gate, out_dtype=None):
    """See `reference.gate_heads`."""
    chosen = backend("gate_heads", x, gate, columns=x.shape[1] * x.shape[3], out_dtype=out_dtype)
    return chosen.gate_heads(x, gate, out_dtype)


def channel_norm(x, eps, activation=None, before=0, after=0, bias=None):
    """See `reference.channel_norm`; Triton serves x whose channels lie side by side."""
    channels_last = reference.memory_format_of(x) == torch.channels_last_3d
    chosen = backend("channel_norm", x, columns=x.shape[1]) if channels_last else reference
    return chosen.channel_norm(x, eps, activation, before, after, bias)


def takes_biases(x):
    """Tell whether Triton serves channel_norm and add_channels for x: there a bias costs nothing."""
    channels_last = reference.memory_format_of(x) == torch.channels_last_3d
    return channels_last and backend("add_channels", x, columns=x.shape[1]) is not reference


def add_channels(x, delta, bias):
    """See `reference.add_channels`; Triton serves tensors whose channels lie side by side."""
    channels_last = all(reference.memory_format_of(tensor) == torch.channels_last_3d for tensor in (x, delta))
    chosen = backend("add_channels", x, delta, bias, columns=x.shape[1]) if channels_last else reference
    return chosen.add_channels(x, delta, bias)


def renoise_step(x, velocity, noise, sigma, sigma_next):
    """See `reference.renoise_step`; Triton serves float sigmas."""
    floats = isinstance(sigma, float) and isinstance(sigma_next, float)
    chosen = backend("renoise", x, velocity, noise) if floats else reference
    return chosen.renoise_step(x, velocity, noise, sigma, sigma_next)


def scale_rows_and_columns(x, rows, columns):
    """See `reference.scale_rows_and_columns`; Triton serves x without gaps."""
    chosen = backend("scale", x) if x.is_contiguous() else reference
    return chosen.scale_rows_and_columns(x, rows, columns)


def _restorer(values):
    """Return the Triton module that makes `values` wide, or None: on the CPU, with gaps or for torch.compile."""
    if not values.is_cuda or not values.is_contiguous() or torch.compiler.is_compiling():
        return None
    if capability_of(values.device) < (FP8_CAPABILITY if values.dtype == FP8 else (8, 0)):
        return None
    kernels = triton_kernels()
    return kernels["restore"] if kernels else None


def restore_rows(values, scale, dtype):
    """See `reference.restore_rows`."""
    return (_restorer(values) or reference).restore_rows(values, scale, dtype)


def restore_blocks(raw, kind, dtype):
    """Return what `model_loader.gguf_blocks.restore` does, by a kernel, or None where none serves."""
    restorer = _restorer(raw)
    return restorer and restorer.restore_blocks(raw, kind, dtype)
