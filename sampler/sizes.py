"""Sizes of clips: from ratio, pixels and seconds to latent sizes."""

import math

FPS = 25  # pixel frames a second, and audio latents a second (51200 Hz, 2048 samples each)
PIXELS_PER_LATENT = 16
PIXEL_MULTIPLE = 32  # a latent is cut into patches of 2x2

# The ratios that the cloud nodes offer, and the landscape size that names each resolution.
RATIOS = {
    "16:9": 16 / 9,
    "9:16": 9 / 16,
    "1:1": 1.0,
    "4:3": 4 / 3,
    "3:4": 3 / 4,
    "21:9": 21 / 9,
    "9:21": 9 / 21,
    "5:4": 5 / 4,
    "4:5": 4 / 5,
}
RESOLUTIONS = {"256p": (448, 256), "540p": (960, 544), "720p": (1280, 704), "1080p": (1920, 1088)}


def pixel_size(resolution, ratio):
    """Return (width, height) in pixels, multiples of 32: the named ratio at the area of the named resolution.

    resolution: a key of RESOLUTIONS; ratio: a key of RATIOS. Equal area keeps time and memory the same for every ratio.
    """
    area = math.prod(RESOLUTIONS[resolution])
    height = math.sqrt(area / RATIOS[ratio])
    width = height * RATIOS[ratio]
    return tuple(max(1, round(side / PIXEL_MULTIPLE)) * PIXEL_MULTIPLE for side in (width, height))


def latent_side(pixels):
    """Return the latent length of a side of `pixels` pixels, floored to whole patches; ValueError below 32 pixels."""
    if pixels < PIXEL_MULTIPLE:
        raise ValueError(f"a side of {pixels} pixels is too small; expected {PIXEL_MULTIPLE} or more")
    return pixels // PIXELS_PER_LATENT // 2 * 2


def audio_length(seconds):
    """Return the audio latents of a clip of `seconds`: 25 a second and one; ValueError if not positive."""
    if seconds <= 0:
        raise ValueError(f"seconds is {seconds}; expected a positive number")
    return round(FPS * seconds) + 1


def video_length(audio_latents):
    """Return the latent frames of a clip with that many audio latents; it decodes to 4 * frames - 3 pixel frames."""
    return (audio_latents - 1) // 4 + 1
