"""Encode a soundtrack longer than 29 seconds in half-overlapping windows, as the published pipeline does."""

import math

import torch
import torch.nn.functional as F

SAMPLES_PER_LATENT = 2048
WINDOW_LATENTS = 725  # 29 seconds
OVERLAP = 0.5


def encode_in_windows(encode, waveform):
    """Encode `waveform` [B, 2, n] (51200 Hz) with encode([B, 2, m]) -> [B, C, m // 2048], in windows beyond 29 seconds.

    The last window is padded with silence; neighbours are cross-faded. Returns [B, C, n // 2048].
    """
    samples = waveform.shape[-1]
    window = WINDOW_LATENTS * SAMPLES_PER_LATENT
    if samples <= window:
        return encode(waveform)
    hop = round(window * (1 - OVERLAP))
    starts = [index * hop for index in range(math.ceil((samples - window) / hop) + 1)]
    pieces = [waveform[..., start : start + window] for start in starts]
    latents = [encode(F.pad(piece, (0, window - piece.shape[-1]))) for piece in pieces]
    return merge_windows(latents, axis=-1)[..., : samples // SAMPLES_PER_LATENT]


def merge_windows(windows, axis):
    """Join windows of one length along `axis`; neighbours share half of it and cross-fade linearly there."""
    shared = int(windows[0].shape[axis] * OVERLAP)
    merged = windows[0]
    for window in windows[1:]:
        merged = cross_fade(merged, window, shared, axis)
    return merged


def cross_fade(first, second, shared, axis):
    """Join two tensors along `axis`: the last `shared` places of the first fade linearly into as many of the second."""
    shape = [1] * first.ndim
    shape[axis] = shared
    rise = (torch.arange(shared, dtype=torch.float32, device=first.device) / shared).view(shape)
    before, fading = first.split([first.shape[axis] - shared, shared], dim=axis)
    growing, after = second.split([shared, second.shape[axis] - shared], dim=axis)
    return torch.cat([before, fading * (1 - rise) + growing * rise, after], dim=axis)
