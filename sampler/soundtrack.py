"""Given sound as the audio VAE wants it: 51200 Hz, two channels, as long as whole groups of pictures."""

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


def at_encoder_rate(waveform, frames):
    """Resample a waveform [B, C, n] of `frames` pixel frames to 51200 Hz: [B, C, 2048 * frames], one latent a frame.

    The ends are held for a frame on either side meanwhile: the spectrum takes the end to be followed by the start, and
    where these differ both would ring (measured: a tenth of the amplitude of a tone, within 1 ms of the end).
    """
    held = F.pad(waveform.float(), (waveform.shape[-1] // frames,) * 2, mode="replicate")
    return resample(held, (frames + 2) * SAMPLES_PER_LATENT)[..., SAMPLES_PER_LATENT:-SAMPLES_PER_LATENT]


def mono(waveform):
    """Return the mean of a waveform's channels [B, C, n] on both sides: [B, 2, n], as a soundtrack drives the model."""
    return waveform.mean(1, keepdim=True).expand(-1, 2, -1)


def stereo(waveform):
    """Return a waveform [B, C, n] as [B, 2, n]: itself if it has two channels, else `mono`."""
    return waveform if waveform.shape[1] == 2 else mono(waveform)
