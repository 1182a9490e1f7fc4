"""One step of the 8-step sampler in Triton: three latents read once, one written."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def renoise_kernel(x, velocity, noise, out, count, sigma, sigma_next, clean, BLOCK: tl.constexpr):
    """Each program steps BLOCK elements; `clean` is 1 - sigma_next."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    denoised = tl.load(x + element, mask=inside) - sigma * tl.load(velocity + element, mask=inside)
    fresh = sigma_next * tl.load(noise + element, mask=inside)
    tl.store(out + element, fresh + clean * denoised, mask=inside)


def renoise_step(x, velocity, noise, sigma, sigma_next, out=None):
    """`reference.renoise_step` for fp32 latents and float sigmas; what is not contiguous is copied first.

    `out`, contiguous, takes the result if given.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, velocity, noise = (latent.contiguous() for latent in (x, velocity, noise))
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            renoise_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, velocity, noise, out, x.numel(), sigma, sigma_next, 1 - sigma_next, BLOCK=BLOCK, num_warps=4
            )
    return out
