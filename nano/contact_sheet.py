"""Draw clips as one picture: a row of frames each, the sound below it; for the README and the templates.

python as_package.py nano.contact_sheet web/nano_result.jpg output/video/*.mp4
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from .measure import read_clip

FRAMES = 8  # a row
SOUND_HEIGHT = 28  # pixels
PAPER, INK = 250, (40, 90, 160)


def strip(frames, sound):
    """Return one clip as uint8 [H,W,3]: FRAMES frames spread over its length, and the envelope of its sound below."""
    chosen = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    row = np.concatenate(list(chosen), axis=1)
    width = row.shape[1]
    peaks = np.abs(sound[: len(sound) // width * width]).reshape(width, -1).max(1)
    half = np.maximum(1, peaks / 0.8 * SOUND_HEIGHT / 2)
    distance = np.abs(np.arange(SOUND_HEIGHT) - (SOUND_HEIGHT - 1) / 2)[:, None]
    wave = np.where((distance < half)[..., None], np.array(INK), PAPER).astype(np.uint8)
    return np.concatenate([row, wave], axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("clips", type=Path, nargs="+")
    options = parser.parse_args()
    strips = [strip(frames, sound) for frames, sound, *_ in map(read_clip, options.clips)]
    gap = np.full((8, strips[0].shape[1], 3), PAPER, np.uint8)
    rows = [part for one in strips for part in (one, gap)][:-1]
    Image.fromarray(np.concatenate(rows)).save(options.picture, quality=90)


if __name__ == "__main__":
    main()
