"""Golden cases of pixels: cutting the first image to shape, and decoded video as 8-bit frames."""

import numpy as np
import torch
from PIL import Image

from ..sampler import media


def image_checks(case):
    """The crop (equal) and the tensor that the video VAE encodes, for every image and size of the case."""
    for name, pixels in case.under("in.").items():
        for height, width in case.config["sizes"]:
            cropped = media.crop_to_ratio(Image.fromarray(pixels.numpy()), height, width)
            yield case.check(f"out.{name}.{height}x{width}.cropped_u8", torch.from_numpy(np.array(cropped)), 0)
            yield case.check(f"out.{name}.{height}x{width}.tensor", media.first_image(pixels, height, width), 1e-6)


def video_checks(case):
    """Decoded video as 8-bit frames, and their resizing in every mode that the case holds; all equal."""
    frames = media.to_frames(case["in.decoded"][0])
    yield case.check("out.video_u8", frames, 0)
    for mode, golden in case.under("out.upsampled_").items():
        yield case.check(f"out.upsampled_{mode}", media.resize_frames(frames, *golden.shape[1:3], mode=mode), 0)


KINDS = {"image": image_checks, "video_post": video_checks}
