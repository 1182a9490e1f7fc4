"""Noise schedules: the shifted flow schedule of the sampler, and the signal scales that start super-resolution."""

import torch

DEFAULT_SHIFT = 5.0
TIMESTEPS = 1000


def _exact_sigmas(steps, shift):
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 or more")
    if shift <= 0:
        raise ValueError(f"shift is {shift}; expected a positive number (the published networks use {DEFAULT_SHIFT})")
    first = torch.tensor(0.999, dtype=torch.float32).item()  # the published schedule starts from the fp32 rounding
    uniform = [first * (1 - index / steps) for index in range(steps)]
    return [shift * u / (1 + (shift - 1) * u) for u in uniform]


def flow_sigmas(steps, shift=DEFAULT_SHIFT, denoise=1.0):
    """Return the noise levels of `steps` steps and the final 0: fp32 [steps + 1], falling from 0.9998 (for shift 5).

    steps: 1 or more (published: 8 distill, 32 base, 5 super-resolution); shift: positive. denoise: above 0 and up to 1,
    the last part of a longer schedule, as core's KSampler takes it: steps / denoise, rounded down, of which the last
    `steps` are left. ValueError otherwise.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise}; expected above 0 and up to 1")
    levels = _exact_sigmas(int(steps / denoise), shift)[-steps:]
    return torch.tensor([*levels, 0.0], dtype=torch.float32)


def flow_timesteps(steps, shift=DEFAULT_SHIFT):
    """Return the published integer timesteps of `flow_sigmas` (1000 * sigma, truncated, no last 0): int64 [steps]."""
    return torch.tensor([int(TIMESTEPS * sigma) for sigma in _exact_sigmas(steps, shift)], dtype=torch.int64)


def zero_snr_signal_scales():
    """Return sqrt(alpha_bar) of the 1000-entry zero-terminal-SNR table: fp32 [1000], falling from 0.99957 to 0.

    The betas are the scaled-linear ones of Stable Diffusion (0.00085 to 0.012); arXiv 2305.08891 gives the rescaling.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    scales = (1 - betas).cumprod(0).float().double().sqrt().float()  # torch's fp32 sqrt rounds differently by machine
    first, last = scales[0].clone(), scales[-1].clone()
    return (scales - last) * (first / (first - last))
