"""Adding to the fp32 residual stream in Triton: torch takes twice as long where the two dtypes differ."""

import torch
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def add_kernel(x, delta, out, count, BLOCK: tl.constexpr):
    """Each program adds BLOCK elements."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    total = tl.load(x + element, mask=inside).to(tl.float32) + tl.load(delta + element, mask=inside).to(tl.float32)
    tl.store(out + element, total, mask=inside)


def add(x, delta, out=None):
    """`reference.add`; what is not contiguous is copied first. `out`, contiguous, takes the sum if given."""
    if out is None:
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    x, delta = x.contiguous(), delta.contiguous()
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            add_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, delta, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out
