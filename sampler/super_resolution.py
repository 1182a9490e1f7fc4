"""How super-resolution starts from the base stage's latents; its loop is `denoise_unipc` with `keep_audio`."""

import math

import torch.nn.functional as F

from .schedule import TIMESTEPS, zero_snr_signal_scales
from .sizes import PIXEL_MULTIPLE, RATIOS, RESOLUTIONS, pixel_size

# Published settings: 5 steps, noise level 220 of 1000 on the video; the network hears 0.3 of the sound in 0.7 of noise.
STEPS = 5
NOISE_LEVEL = 220
AUDIO_NOISE_SHARE = 0.7


def scaled_size(width, height, factor):
    """Return (width, height) in pixels times `factor`, each to the nearest multiple of 32."""
    return tuple(max(1, round(side * factor / PIXEL_MULTIPLE)) * PIXEL_MULTIPLE for side in (width, height))


def size_at(resolution, width, height):
    """Return (width, height) of a named resolution, a key of RESOLUTIONS, at the ratio of a clip's width and height.

    A clip of a named ratio gets that ratio's size, so 448x256 becomes 960x544; any other the same area at its own.
    """
    for ratio in RATIOS:
        if (width, height) in (pixel_size(name, ratio) for name in RESOLUTIONS):
            return pixel_size(resolution, ratio)
    return scaled_size(width, height, math.sqrt(math.prod(RESOLUTIONS[resolution]) / (width * height)))


def upsample_latent(video, height, width, align_corners=True):
    """Resize a video latent in space, trilinear: [B, C, T, H, W] -> [B, C, T, height, width] (latent units).

    align_corners: True as published; False removes ghosting on frames 2 to 5 in some users' clips.
    """
    size = (video.shape[2], height, width)
    return F.interpolate(video, size=size, mode="trilinear", align_corners=align_corners)


def noised_latent(video, noise, noise_level=NOISE_LEVEL):
    """Mix noise into an upsampled latent: s*video + sqrt(1-s^2)*noise, s the signal scale of `noise_level`.

    video, noise: same shape, fp32; noise_level: 0 (video as it is) to 999 (noise alone). ValueError outside.
    """
    if not 0 <= noise_level < TIMESTEPS:
        raise ValueError(f"noise level is {noise_level}; expected 0 to {TIMESTEPS - 1} (published: {NOISE_LEVEL})")
    if noise_level == 0:
        return video
    signal = zero_snr_signal_scales()[noise_level].to(video)
    return video * signal + noise * (1 - signal**2) ** 0.5


def start_super_resolution(video, audio, height, width, noise, *, noise_level=NOISE_LEVEL, align_corners=True):
    """Return the latents that super-resolution denoises from: the video resized and noised, the soundtrack it hears.

    video [B, C, T, H, W], audio [B, L, C]: the base stage's results, normalised, fp32; height, width: latent size of
    the result; noise: function(like) -> normal noise, called for the video (unless noise_level is 0), then the audio.
    """
    video = upsample_latent(video, height, width, align_corners)
    if noise_level != 0:
        video = noised_latent(video, noise(video), noise_level)
    return video, AUDIO_NOISE_SHARE * noise(audio) + (1 - AUDIO_NOISE_SHARE) * audio
