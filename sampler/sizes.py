"""Sizes of clips: from ratio, pixels and seconds to latent sizes."""

import itertools
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
# Sizes that no latent has: made larger, and cut out of the middle once they are decoded. The published 540p keeps 544.
SHOWN = {(1920, 1088): (1920, 1080), (1088, 1920): (1080, 1920)}
RATIO_WEIGHT = 2.0  # with 1, 5:4 at 256p would be 384x288, which is 4:3; with 3, areas would differ by 12 %

TRAINED_SECONDS = 10  # longest clip of the training
TRAINED_PIXELS = 352 * 352  # 1:1, the largest of the 256p sizes; 448x256 is the published one


def pixel_size(resolution, ratio):
    """Return (width, height) in pixels, multiples of 32: the named ratio at the area of the named resolution.

    resolution: a key of RESOLUTIONS; ratio: a key of RATIOS. Equal area keeps time and memory the same for every ratio.
    16:9 and 9:16 are the published sizes; others are the pair around the exact one that is nearest in ratio and area,
    an error of the ratio counting RATIO_WEIGHT times one of the area.
    """
    landscape = RESOLUTIONS[resolution]
    if ratio in ("16:9", "9:16"):
        return landscape if ratio == "16:9" else landscape[::-1]
    area, wanted = math.prod(landscape), RATIOS[ratio]
    columns, rows = math.sqrt(area * wanted) // PIXEL_MULTIPLE, math.sqrt(area / wanted) // PIXEL_MULTIPLE

    def error(size):
        width, height = size
        return RATIO_WEIGHT * abs(math.log(width / height / wanted)) + abs(math.log(width * height / area))

    around = itertools.product((columns, columns + 1), (rows, rows + 1))
    return min(((int(w) * PIXEL_MULTIPLE, int(h) * PIXEL_MULTIPLE) for w, h in around), key=error)


def shown_size(width, height):
    """Return (width, height) in pixels of what is shown of a decoded clip: 1080 of 1088, else all of it."""
    return SHOWN.get((width, height), (width, height))


def outside_training(width, height, seconds):
    """Return what a full-size base clip of width x height pixels and `seconds` was not trained for: a list of lines."""
    found = []
    if width * height > TRAINED_PIXELS:
        found.append(
            f"{width}x{height} is larger than the 256p that the models make clips at: expect doubled shapes. Use 256p, "
            "then super-resolution."
        )
    if seconds > TRAINED_SECONDS:
        found.append(
            f"{seconds:g} s is longer than the {TRAINED_SECONDS} s of the training: expect drift. Continue a shorter "
            "clip instead."
        )
    return found


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


def pixel_frames(latent_frames):
    """Return the pixel frames that so many latent frames decode to."""
    return 4 * latent_frames - 3
