"""Measure nano on prompts that training has not seen: clips written by a real ComfyUI, read back, and judged.

python3 run.py evaluate                    64 clips from prompts, 16 each from image and soundtrack, by its API
python3 run.py evaluate --in-process       the same clips without a server (samples only, no mp4), quicker
... --in-process --teacher --guidance 3    the teacher of nano/runs with guided Euler steps, for comparison
"""

import argparse
import tempfile
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from ..model_loader.load import load_video_vae
from . import world
from .cases import InProcess, SuperResolution, clips_from_comfyui, draw_cases
from .latents import FRAMES
from .measure import matched, observe, pearson
from .training import WEIGHTS

SR_CLIPS = 18


class Tally:
    """Counts over clips, printed as one table."""

    def __init__(self):
        self.values = {}

    def add(self, name, value):
        """Add one observation: a truth value or a number."""
        self.values.setdefault(name, []).append(float(value))

    def judge(self, case, frames, sound, rate):
        """Add all that one clip shows to the counts."""
        scene, seen = case.scene, observe(frames, sound, rate)
        count = min(len(seen.mouth), len(seen.loudness))
        lips = pearson(seen.mouth[:count], seen.loudness[:count])
        hits = matched(seen.contacts, seen.tones)
        self.add("kind right", seen.kind == scene.kind)
        self.add("thing colour right", seen.colour == scene.colour)
        self.add("ground colour right", seen.background == scene.background)
        if case.sound is not None:
            either = max(1, len(seen.contacts) + len(seen.tones))
            self.add("follows the soundtrack", lips >= 0.5 if scene.kind == "face" else 2 * hits / either >= 0.5)
        if scene.kind == "face":
            self.add("mouth and loudness r", lips)
            told = "".join(syllable[1] for syllable in scene.syllables)
            self.add("number of syllables as told", len(seen.vowels) == len(told))
            for vowel, heard in zip_longest(told, seen.vowels):
                self.add("vowels as told", vowel == heard)
        else:
            for index in range(max(1, len(seen.contacts))):  # a thing that never lands has failed once
                self.add("contacts with a tone within 80 ms", index < hits)
            for index in range(len(seen.tones)):
                self.add("tones with a contact within 80 ms", index < hits)
            if scene.bounces is not None:
                self.add(
                    "number of contacts as told",
                    len(seen.contacts) == min(scene.bounces, len(world.contacts(scene, FRAMES / world.FPS))),
                )
        if case.image is not None:
            error = (frames[0].astype(float) - case.image.astype(float)) / 255
            self.add("first frame PSNR dB", -10 * np.log10((error**2).mean()))

    def rows(self):
        """Return (name, mean, count) of everything counted, shares in per cent."""
        shares = lambda name: name.split()[-1] not in ("r", "dB", "s")  # noqa: E731
        return [(n, 100 * np.mean(v) if shares(n) else np.mean(v), len(v)) for n, v in self.values.items()]


def psnr(a, b):
    """Return the PSNR in dB of two pixel tensors in [-1,1]."""
    return -10 * torch.log10(((a - b) / 2).square().mean()).item()


def super_resolution_psnr(count):
    """Return the mean PSNR in dB, against the true large clip, of the second stage and of bicubic enlargement."""
    refine = SuperResolution()
    values = [
        (psnr(refined, true), psnr(bicubic, true))
        for true, refined, bicubic in map(refine, draw_cases(count, "prompt"))
    ]
    return np.mean(values, axis=0)


def reconstruction_psnr(count=12):
    """Return the mean PSNR in dB of the video VAE on clips that its training has not seen."""
    vae = load_video_vae(WEIGHTS / "nano_video_vae.safetensors")
    values = []
    for number in range(count):
        scene = world.draw_scene(np.random.default_rng((73, number)), kind=world.KINDS[number % 3])
        pixels = torch.from_numpy(world.render_frames(scene, FRAMES)).permute(3, 0, 1, 2)[None] * 2 - 1
        with torch.inference_mode():
            values.append(psnr(vae.decode(vae.encode(pixels)), pixels))
    return float(np.mean(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64, help="from prompts alone")
    parser.add_argument("--image-clips", type=int, default=16, help="from a prompt and a first image")
    parser.add_argument("--sound-clips", type=int, default=16, help="from a prompt and a soundtrack")
    parser.add_argument("--in-process", action="store_true", help="no server, no mp4")
    parser.add_argument("--teacher", action="store_true", help="judge the teacher (with --in-process)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0, help="the teacher's")
    parser.add_argument("--weight-dtype", default="default", help="the loader's: fp8_e4m3fn, ...; not --in-process")
    parser.add_argument("--keep", type=Path, help="folder in which the clips stay")
    options = parser.parse_args()
    if options.teacher and not options.in_process:
        parser.error("--teacher needs --in-process: the teacher is no file that ComfyUI could load")
    if options.in_process and options.weight_dtype != "default":
        parser.error("--weight-dtype goes without --in-process: it is the loader's")
    print("| what | value | of |\n|---|---|---|")
    print(f"| VAE reconstruction PSNR dB | {reconstruction_psnr():.1f} | 12 |", flush=True)
    if (WEIGHTS / "nano_sr.safetensors").exists() and not options.teacher:
        refined, bicubic = super_resolution_psnr(SR_CLIPS)
        print(f"| super-resolution PSNR dB | {refined:.1f} | {SR_CLIPS} |")
        print(f"| bicubic enlargement PSNR dB | {bicubic:.1f} | {SR_CLIPS} |", flush=True)
    counts = {"prompt": options.clips, "image": options.image_clips, "soundtrack": options.sound_clips}
    for label, count in counts.items():
        cases, tally = draw_cases(count, label), Tally()
        if options.in_process:
            make = InProcess(options.teacher, options.steps, options.guidance) if cases else None
            for case in cases:
                tally.judge(case, *make(case))
        else:
            with tempfile.TemporaryDirectory() as scratch:
                folder = options.keep or Path(scratch)
                for case, *clip, seconds in clips_from_comfyui(cases, folder, options.weight_dtype):
                    tally.judge(case, *clip)
                    tally.add("queued to written s" if case.number else "first clip, loading included, s", seconds)
        for name, value, count in tally.rows():
            print(f"| {label}: {name} | {value:.2f} | {count} |", flush=True)


if __name__ == "__main__":
    main()
