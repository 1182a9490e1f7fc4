"""Which kernel multiplies attention on a card: each is tried once a process, for only that shows what becomes of it."""

import functools
import importlib
import logging

import torch

from . import reference
from .dispatch import FP8_CAPABILITY, capability_of, raise_if_full, triton_kernels
from .fp8 import FP8, Fp8Rows, fp8_scores

ATTENTION_HEAD = 128  # columns of a head of the full-size network, the only size the attention kernels serve
WIDE, HALF = "attention_hopper", "attention_half_hopper"  # with scores in fp32 and in fp16


@torch.compiler.disable  # it would write a kernel of Gluon's down as one of Triton's
def run_attention(name, *arguments, **options):
    """Run the attention of one of the kernels' modules."""
    return importlib.import_module(f".{name}", __package__).attention(*arguments, **options)


@torch.no_grad()
def check_attention(kernel, fp8, device="cuda"):
    """Run an attention kernel on a few tokens; RuntimeError if the result is not the reference's."""
    random = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 300, ATTENTION_HEAD, generator=random, device=device).bfloat16()
    wanted = reference.attention(q.float(), k.float(), v.float())
    if fp8:
        q, k = fp8_scores(q, k, k.abs().amax().float())
    found = kernel(q, k, v).float()
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error < 0.1:
        raise RuntimeError(f"its result is off by {error:.0%}")


@torch.no_grad()
def half_scores_pay(run=run_attention, device="cuda", tokens=8192):
    """Tell whether scores in fp16 give what those in fp32 do, but for 2 %, in less than 97 % of the time: by trial.

    run: as `run_attention`. Emulated, the two differ by 0.3 % for queries of this size; both are off by 3 %.
    """
    random = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, ATTENTION_HEAD, generator=random, device=device).bfloat16()
        for heads in (16, 2, 2)
    )
    q, k = fp8_scores(2 * q, k, k.abs().amax().float())
    wide, half = (run(name, q, k, v).float() for name in (WIDE, HALF))
    difference = ((half - wide).norm() / wide.norm()).item()
    runs = [(milliseconds(run, WIDE, q, k, v), milliseconds(run, HALF, q, k, v)) for _ in range(5)]
    share = min(half for _, half in runs) / min(wide for wide, _ in runs)
    told = "happyhorse-local: fp8 attention takes %.0f %% of the time with scores in fp16, and differs by %.1f %%"
    logging.info(told, 100 * share, 100 * difference)
    return difference < 0.02 and share < 0.97


def milliseconds(run, *arguments):
    """Return the milliseconds that a card takes to run(*arguments)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def working_attention(capability, fp8):
    """Return the module with the quickest attention kernel that works on such a card, or None; tried once a process."""
    hopper = capability[0] == 9 and torch.version.hip is None
    candidates = [WIDE] * hopper + ["attention_fp8_triton"] * (fp8 and capability >= FP8_CAPABILITY)
    for name in candidates if triton_kernels() else ():
        if _works(name, lambda name=name: check_attention(functools.partial(run_attention, name), fp8)):
            return HALF if name == WIDE and fp8 and _works(HALF, half_scores_pay) else name
    return None


def _works(name, trial):
    """Return what a trial does but for None, which counts as True; False, and say why in the log, where it fails."""
    try:
        return trial() is not False
    except Exception as error:  # it asks for more than this Triton has, or this one compiles it wrongly
        raise_if_full(error)
        reason = f"{type(error).__name__}: {error}"
        logging.warning(f"happyhorse-local: kernels/{name}.py does not work here ({reason}); another way is taken")
        return False


@torch.compiler.assume_constant_result  # which it would not be with a cache of its own
def attention_on(device, fp8):
    """Return what `working_attention` does for a device."""
    return working_attention(capability_of(device), fp8)


def attention_kernel(q, k, v):
    """Return what computes `reference.attention` of q, k, v, or None: then torch has to, see model_loader.attention."""
    fp8 = isinstance(q, Fp8Rows)
    q, narrow = (q.values, FP8) if fp8 else (q, torch.bfloat16)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    served = not needs_gradient and all(
        tensor.is_cuda
        and tensor.dtype == dtype
        and tensor.shape[-1] == ATTENTION_HEAD
        and tensor.stride(-1) == 1
        and all(stride % 8 == 0 for stride in tensor.stride()[:-1])
        for tensor, dtype in ((q, narrow), (k, narrow), (v, torch.bfloat16))
    )
    name = attention_on(q.device, fp8) if served else None
    return None if name is None else functools.partial(run_attention, name)


def why_no_fp8_attention(device, head_dim):
    """Return why no kernel multiplies attention in fp8 on a device for heads of so many columns, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it wants an NVIDIA card, not '{device.type}'"
    capability = capability_of(device)
    if capability < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} does not multiply fp8 (compute capability {capability[0]}.{capability[1]}, it takes 8.9)"
    if head_dim != ATTENTION_HEAD:
        return f"the model's heads have {head_dim} columns, the kernel serves {ATTENTION_HEAD}"
    if attention_on(device, True) is None:
        return "Triton cannot run the kernel (ComfyUI's log says why)"
    return None
