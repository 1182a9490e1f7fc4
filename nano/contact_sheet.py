"""Draw clips as one picture, a row of frames each with the sound below; or the pictures of nano's templates.

python as_package.py nano.contact_sheet web/nano_result.jpg output/video/*.mp4
python as_package.py nano.contact_sheet --templates     runs every nano template, writes workflows/nano_*.jpg
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..launch.client import Client
from ..launch.demo import clip_path
from ..launch.server import Server
from ..launch.thumbnails import SIDE
from ..launch.workflows import WORKFLOWS, names, twin_path
from .measure import read_clip

FRAMES = 8  # a row
SOUND_HEIGHT = 28  # pixels
PAPER, INK = 250, (40, 90, 160)


def spread(frames, count):
    """Return `count` of the frames, spread over the clip."""
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def strip(frames, sound):
    """Return one clip as uint8 [H,W,3]: FRAMES frames spread over its length, and the envelope of its sound below."""
    row = np.concatenate(list(spread(frames, FRAMES)), axis=1)
    width = row.shape[1]
    peaks = np.abs(sound[: len(sound) // width * width]).reshape(width, -1).max(1)
    half = np.maximum(1, peaks / 0.8 * SOUND_HEIGHT / 2)
    distance = np.abs(np.arange(SOUND_HEIGHT) - (SOUND_HEIGHT - 1) / 2)[:, None]
    wave = np.where((distance < half)[..., None], np.array(INK), PAPER).astype(np.uint8)
    return np.concatenate([row, wave], axis=0)


def draw_sheet(picture, clips):
    """Write a picture with one strip a clip."""
    strips = [strip(frames, sound) for frames, sound, *_ in map(read_clip, clips)]
    gap = np.full((8, strips[0].shape[1], 3), PAPER, np.uint8)
    rows = [part for one in strips for part in (one, gap)][:-1]
    Image.fromarray(np.concatenate(rows)).save(picture, quality=90)


def draw_templates():
    """Run nano's templates on a server of our own and write the picture of each: four frames of its clip."""
    with tempfile.TemporaryDirectory() as scratch, Server(os.environ["COMFYUI_PATH"], scratch) as server:
        client = Client(server.url, server.check_alive)
        for name in (name for name in names() if name.startswith("nano_")):
            outputs = client.run(json.loads(twin_path(name).read_text(encoding="utf-8")))
            frames, *_ = read_clip(clip_path(outputs, Path(scratch)))
            first, second, third, fourth = spread(frames, 6)[:4]
            grid = np.concatenate([np.concatenate([first, second], 1), np.concatenate([third, fourth], 1)])
            path = WORKFLOWS / f"{name}.jpg"
            Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(path, quality=88)
            print(path.name, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("clips", type=Path, nargs="*")
    parser.add_argument("--templates", action="store_true", help="write workflows/nano_*.jpg")
    options = parser.parse_args()
    if options.templates:
        draw_templates()
    elif options.clips:
        draw_sheet(options.picture, options.clips)
    else:
        parser.error("give a picture to write and the clips to draw, or --templates")


if __name__ == "__main__":
    main()
