"""Pixels at both ends: the first image cut to the clip's shape, and decoded video as 8-bit frames."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def crop_to_ratio(image, height, width):
    """Return the centre of a PIL image at the ratio height : width, as large as fits (no letterbox)."""
    have_width, have_height = image.size
    if have_height / have_width > height / width:
        keep_width, keep_height = have_width, int(have_width * height / width)
    else:
        keep_width, keep_height = int(have_height * width / height), have_height
    left, top = (have_width - keep_width) / 2, (have_height - keep_height) / 2
    # PIL rounds the four edges itself, halves to even: the published crop, at most a pixel off where a margin is odd.
    return image.crop((left, top, left + keep_width, top + keep_height))


def first_image(pixels, height, width):
    """Return the first image as the video VAE wants it: [1, 3, 1, height, width] fp32 in [-1, 1].

    pixels: uint8 [H, W, 3], or float [H, W, 3] in [0, 1] (rounded to 8 bits, as a picture file is); cropped to the
    target's ratio, then Lanczos. ValueError on another shape.
    """
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"image has shape {list(pixels.shape)}; expected [height, width, 3] (RGB without alpha)")
    if pixels.is_floating_point():
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    image = crop_to_ratio(Image.fromarray(pixels.cpu().numpy()), height, width)
    resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    scaled = torch.from_numpy(resized.astype(np.float32)) / 255 * 2 - 1
    return scaled.permute(2, 0, 1)[None, :, None].contiguous()


def to_frames(decoded):
    """Return a decoder's output as 8-bit frames: [3, F, H, W] nominally in [-1, 1] -> uint8 [F, H, W, 3], truncated."""
    return ((decoded.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 3, 0)


def frames_one_by_one(steps):
    """Yield a decoder's steps, [1, 3, n, H, W] nominally in [-1, 1], as uint8 [1, H, W, 3] on the CPU, truncated."""
    for pixels in steps:
        for frame in pixels.split(1, dim=2):
            yield to_frames(frame[0]).cpu()
        del pixels, frame  # the next step needs the room


def eight_bit(images, count=8):
    """Yield float images [F, H, W, C >= 3] in [0, 1] as uint8 [n <= count, H, W, 3] on the CPU, truncated."""
    for piece in images[..., :3].split(count):
        yield (piece.float() * 255).clamp(0, 255).to("cpu", torch.uint8)


def crop_middle(frames, width, height):
    """Return the middle width x height pixels of frames [..., H, W, C], a view of them."""
    top, left = (frames.shape[-3] - height) // 2, (frames.shape[-2] - width) // 2
    return frames[..., top : top + height, left : left + width, :]


def resize_frames(frames, height, width, mode="bicubic"):
    """Resize 8-bit frames: uint8 [F, H, W, 3] -> [F, height, width, 3]; mode is bicubic, bilinear or nearest."""
    scaled = frames.permute(0, 3, 1, 2).float() / 255
    if mode == "bilinear":
        resized = bilinear(scaled, height, width)
    else:
        resized = F.interpolate(scaled, (height, width), mode=mode, align_corners=False if mode == "bicubic" else None)
    return (resized * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def bilinear(frames, height, width):
    """Resize fp32 [F, C, H, W] -> [F, C, height, width] as torch's own does on processors that fuse their products.

    Its builds for Windows and for older processors round once more, which may cost a truncated value a step of 8 bits.
    """
    above, below, first = neighbours(frames.shape[-2], height)
    left, right, second = neighbours(frames.shape[-1], width)
    corners = [frames[:, :, rows][..., columns] for rows in (above, below) for columns in (left, right)]
    weights = [row[:, None] * column for row in (1 - first, first) for column in (1 - second, second)]
    total = fused(corners[0], weights[0], corners[1] * weights[1])
    return fused(corners[3], weights[3], fused(corners[2], weights[2], total))


def neighbours(have, want):
    """Return, for each of `want` points, the two of `have` that it lies between and how far it is from the first."""
    place = torch.arange(want) + 0.5
    place = fused(torch.tensor(have) / want, place, torch.tensor(-0.5)).clamp(min=0)
    first = place.long()
    return first, (first + 1).clamp(max=have - 1), place - first


def fused(x, y, z):
    """Return the fp32 x * y + z, rounded once."""
    return (x.double() * y.double() + z.double()).float()
