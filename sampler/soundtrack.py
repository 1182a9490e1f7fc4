"""A driving soundtrack as the audio VAE hears it: mono, 51200 Hz, as long as whole groups of pictures."""

import math

import torch.nn.functional as F

from ..model_loader.core_vae import resample
from .audio_windows import SAMPLES_PER_LATENT
from .sizes import FPS


def covering_frames(samples, rate):
    """Return the least number of pixel frames, 4k + 1 as the video VAE has them, that lasts `samples` at `rate` Hz.

    ValueError where there is no sound.
    """
    if samples < 1 or rate < 1:
        raise ValueError(f"the soundtrack has {samples} samples at {rate} Hz; expected at least one")
    return math.ceil((math.ceil(samples * FPS / rate) - 1) / 4) * 4 + 1


def fit_sound(waveform, rate, frames):
    """Return `waveform` [..., n] at `rate` Hz as long as `frames` pixel frames: silence added, or the end cut off."""
    return F.pad(waveform, (0, math.ceil(frames * rate / FPS) - waveform.shape[-1]))


def encoder_sound(waveform, frames):
    """Return what the audio VAE makes one latent a frame of: stereo [1, 2, 2048 * frames] at 51200 Hz, sides alike.

    waveform: [C, n] at any rate, n lasting `frames` pixel frames (see `fit_sound`); its channels are averaged.
    """
    return resample(waveform.float().mean(0), frames * SAMPLES_PER_LATENT).expand(1, 2, -1)
