"""Measure the RAM and time that saving a clip takes: `python as_package.py benchmarks.saving`.

    python as_package.py benchmarks.saving [--size 1080p] [--seconds 15] [--decoder {blocks,card,nano}] [--waiting 64]

Decodes a random latent as HappyHorse Save Video does, frame by frame into the mp4 writer, and prints how much memory
and time that took. blocks: a decoder that only enlarges, so that the memory is the writer's; card: frames that glide,
after waits as long as TurboVAED's on an H200, which leave the processor to x264; nano: the built-in video VAE, which
adds its own buffers (slow: minutes for a second of 1080p). --waiting: MiB of frames that may wait for x264.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from ..model_loader.load import load_video_vae
from ..sampler import mp4
from ..sampler.media import crop_middle, frames_one_by_one
from ..sampler.sizes import (
    FPS,
    PIXELS_PER_LATENT,
    RESOLUTIONS,
    audio_length,
    pixel_frames,
    pixel_size,
    shown_size,
    video_length,
)

NANO = Path(__file__).resolve().parent.parent / "nano" / "weights" / "nano_video_vae.safetensors"


def blocks(latent):
    """Yield pixels as a video VAE's `decode_steps`: each latent value a block of 16 x 16, with a little noise."""
    for t in range(latent.shape[2]):
        frame = latent[:, :3, t : t + 1]
        pixels = F.interpolate(frame, scale_factor=(1 if t == 0 else 4, PIXELS_PER_LATENT, PIXELS_PER_LATENT))
        yield pixels.add_(0.05 * torch.randn(pixels.shape[-2:]))
        del pixels


def card(latent, window=28, seconds=0.6):
    """Yield frames as uint8 [1,H,W,3]; every `window` of them keeps us waiting for as long as 1080p takes an H200."""
    small = (latent[0, :3, 0].movedim(0, -1) * 64 + 128).clamp(0, 255).to(torch.uint8)
    wide = small.repeat_interleave(PIXELS_PER_LATENT, 0).repeat_interleave(PIXELS_PER_LATENT, 1)
    wide = torch.cat([wide, wide[:, :64]], 1)
    wide = wide // 8 * 8 + torch.randint(0, 8, wide.shape, dtype=torch.uint8)
    for t in range(pixel_frames(latent.shape[2])):
        if t % window == 0:
            time.sleep(seconds)
        yield wide[None, :, t % 64 : t % 64 + wide.shape[1] - 64].clone()


def peak_bytes():
    """Return the most RAM that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def main(arguments=None):
    """Save a clip into a temporary folder and print what that took."""
    parser = argparse.ArgumentParser(prog="benchmarks.saving", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(RESOLUTIONS), default="1080p")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--decoder", choices=("blocks", "card", "nano"), default="blocks")
    parser.add_argument("--waiting", type=int, default=mp4.WAITING >> 20, help="MiB of frames that may wait for x264")
    options = parser.parse_args(arguments)
    width, height = pixel_size(options.size, "16:9")
    shown, audio = shown_size(width, height), audio_length(options.seconds)
    latent = torch.randn(1, 48, video_length(audio), height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT) * 0.5
    sound = {"waveform": 0.1 * torch.randn(1, 2, 44100 * audio // FPS), "sample_rate": 44100}
    if options.decoder == "card":
        decoded = card(latent)
    else:
        decode_steps = blocks if options.decoder == "blocks" else load_video_vae(NANO).decode_steps
        decoded = frames_one_by_one(decode_steps(latent))
    mp4.WAITING = options.waiting << 20
    pieces = (crop_middle(frame, *shown) for frame in decoded)
    frames = pixel_frames(latent.shape[2])
    before, start = peak_bytes(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        mp4.write_mp4(path, pieces, *shown, frames, sound)
        written = path.stat().st_size
    seconds, grown = time.perf_counter() - start, peak_bytes() - before
    print(
        f"{frames} frames of {shown[0]}x{shown[1]}, decoder {options.decoder}: {grown / 1e6:.0f} MB more RAM, "
        f"{seconds:.1f} s, file of {written / 1e6:.0f} MB; all frames in fp32 would be "
        f"{frames * shown[0] * shown[1] * 12 / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
