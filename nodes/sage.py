"""SageAttention, where it is installed, on queries, keys and values as they are: it takes fewer heads of the latter.

ComfyUI's own way to it repeats keys and values for every head of queries: 2.8 GB more at five seconds of 1080p.
"""

import functools
import logging

import torch

from ..kernels import raise_if_full


@torch.compiler.disable  # some versions ask for the card's name on the way, which cannot be traced
def sage_attention(q, k, v):
    """Attention in 8 bits: q [B, Hq, N, d], k and v [B, Hkv, M, d] in fp16 or bf16 on a card. Returns [B, Hq, N, d].

    ImportError without the package; what its version cannot do raises errors of many types, see `why_no_sage`.
    """
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="HND", is_causal=False, smooth_k=False)


@torch.compiler.assume_constant_result  # which it would not be with a cache of its own
def why_no_sage(device, dtype, head_dim):
    """Return why SageAttention cannot run on tensors of that kind, or None; it is tried once for each kind."""
    return _fault(device, dtype, head_dim)


@functools.cache
def _fault(device, dtype, head_dim):
    q = torch.ones(1, 2, 256, head_dim, dtype=dtype, device=device)  # early versions want more than 128 tokens
    try:
        sage_attention(q, q[:, :1], q[:, :1])
    except Exception as error:  # assertions, missing kernels, unknown cards: each version has its own
        raise_if_full(error)
        fault = str(error).rstrip(".") or type(error).__name__
        logging.warning("SageAttention cannot run on %s, %s, with heads of %d: %s", device, dtype, head_dim, fault)
        return fault
    return None


def sage_or(attend, q, k, v):
    """Let SageAttention run q, k and v (see `sage_attention`), or where it cannot `attend(q, k, v)`."""
    fault = why_no_sage(q.device, q.dtype, q.shape[-1])
    return sage_attention(q, k, v) if fault is None else attend(q, k, v)
