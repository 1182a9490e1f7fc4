"""Decoding a clip in horizontal strips, joined in a file on disk: for cards too small to decode whole frames."""

import tempfile

import numpy as np
import torch

from .media import to_frames
from .sizes import PIXELS_PER_LATENT

STRIP = 16  # latent rows: 256 pixel rows, and
OVERLAP = 4  # 64 of them shared with the strip above, where the two fade into each other


def strips(rows):
    """Return the (first, last + 1) latent rows of each strip that `rows` latent rows are decoded in."""
    starts = range(0, max(1, rows - OVERLAP), STRIP - OVERLAP)
    return [(start, min(start + STRIP, rows)) for start in starts]


def decode_in_strips(decode_steps, latent, folder):
    """Yield the frames of a latent [1,C,T,h,w], uint8 [n,H,W,3] on the CPU, each strip decoded through the whole clip.

    decode_steps: a video VAE's, called once a strip. In time this is exact; the picture differs near the seams, and all
    over where the decoder attends to whole frames, as Wan2.2's does at the latent's own resolution. Rows decoded so far
    wait, in 8 bits, in a nameless temporary file in `folder`: card and memory hold no more than a step of one strip.
    """
    height, width = (PIXELS_PER_LATENT * side for side in latent.shape[3:])
    frame_bytes, row_bytes = height * width * 3, width * 3
    fade = torch.linspace(0, 1, OVERLAP * PIXELS_PER_LATENT + 2)[1:-1].view(-1, 1, 1)
    with tempfile.TemporaryFile(dir=folder) as file:
        for first, last in strips(latent.shape[3]):
            lengths, frame = [], 0
            for pixels in decode_steps(latent[:, :, :, first:last]):
                rows = to_frames(pixels[0]).cpu().contiguous()
                lengths.append(len(rows))
                for picture in rows:
                    file.seek(frame * frame_bytes + first * PIXELS_PER_LATENT * row_bytes)
                    if first:
                        above = np.frombuffer(file.read(len(fade) * row_bytes), np.uint8).reshape(-1, width, 3)
                        above = torch.from_numpy(above.copy()).float()
                        picture[: len(fade)] = torch.lerp(above, picture[: len(fade)].float(), fade).round().byte()
                        file.seek(-len(fade) * row_bytes, 1)
                    file.write(picture.numpy())
                    frame += 1
        file.seek(0)
        for length in lengths:
            pictures = np.frombuffer(file.read(length * frame_bytes), np.uint8)
            yield torch.from_numpy(pictures.copy()).view(length, height, width, 3)
