"""Measure nano on prompts that training has not seen: clips written by a real ComfyUI, read back, and judged.

python3 run.py evaluate                    64 clips from prompts, 16 from a first image, through ComfyUI's API
python3 run.py evaluate --in-process       the same clips without a server (samples only, no mp4), quicker
... --in-process --teacher --steps 8       the many-step teacher with Euler steps, for comparison (needs nano/runs)
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..launch import ROOT
from ..launch.client import Client
from ..launch.demo import clip_path, fill
from ..launch.server import Server
from ..model_loader.load import load_audio_vae, load_dit, load_text_encoder, load_video_vae, tokenizer_json
from ..sampler.denoise import denoise_renoise, seeded_noise
from ..sampler.schedule import flow_sigmas
from . import world
from .measure import matched, observe, pearson, read_clip
from .prompts import draw_prompt
from .training import WEIGHTS

SECONDS, FRAMES, LATENTS, SOUNDS = 2.0, 49, 13, 51


@dataclass(frozen=True, slots=True)
class Case:
    """One clip to make: its number (also the seed), the scene of its prompt, the picture it starts from, if any."""

    number: int
    scene: world.Scene
    prompt: str
    image: np.ndarray | None


def draw_cases(count, with_image):
    """Return `count` cases, kinds in turn, every prompt from the evaluation share and naming both colours."""
    cases = []
    for number in range(count):
        rng = np.random.default_rng((71 + with_image, number))
        scene = world.draw_scene(rng, kind=world.KINDS[number % 3])
        prompt = draw_prompt(scene, rng, evaluation=True)
        while scene.background not in prompt:
            prompt = draw_prompt(scene, rng, evaluation=True)
        image = (world.render_frames(scene, 1)[0] * 255 + 0.5).astype(np.uint8) if with_image else None
        cases.append(Case(number, scene, prompt, image))
    return cases


def clips_from_comfyui(cases, folder):
    """Yield (case, frames, mono sound, rate, seconds from queued to written) of clips made through ComfyUI's API."""
    workflows = {
        kind: json.loads((ROOT / "workflows" / "api" / f"nano_{kind}.json").read_text("utf-8"))
        for kind in ("t2v", "i2v")
    }
    with Server(os.environ["COMFYUI_PATH"], folder) as server:
        client = Client(server.url, server.check_alive)
        for case in cases:
            values = {"text": case.prompt, "seed": case.number, "seconds": SECONDS}
            if case.image is not None:
                values["image"] = f"case{case.number}.png"
                Image.fromarray(case.image).save(server.input / values["image"])
            graph = fill(json.loads(json.dumps(workflows["t2v" if case.image is None else "i2v"])), values)
            began = time.time()
            outputs = client.run(graph)
            seconds = time.time() - began
            frames, sound, rate, _ = read_clip(clip_path(outputs, folder))
            yield case, frames, sound, rate, seconds


class InProcess:
    """nano without ComfyUI: the same networks, loops and seeds, decoded frames instead of an mp4."""

    def __init__(self, teacher=False, steps=8):
        if teacher:
            from .train_distill import load_teacher

            self.dit = load_teacher()
        else:
            self.dit = load_dit(WEIGHTS / "nano_dit.safetensors")
        path = WEIGHTS / "nano_text_encoder.safetensors"
        self.text_encoder, self.tokenizer = load_text_encoder(path), tokenizer_json(path)
        self.video_vae = load_video_vae(WEIGHTS / "nano_video_vae.safetensors")
        self.audio_vae = load_audio_vae(WEIGHTS / "nano_audio_vae.safetensors")
        self.teacher, self.sigmas = teacher, flow_sigmas(steps)

    @torch.inference_mode()
    def __call__(self, case):
        """Return (frames uint8 [49,96,96,3], mono sound, rate)."""
        from tokenizers import Tokenizer

        ids = torch.tensor([Tokenizer.from_str(self.tokenizer).encode(case.prompt).ids])
        text = self.text_encoder(ids).float()
        noise = seeded_noise(case.number)
        side = world.SIZE // 16
        video, audio = noise(torch.empty(1, 48, LATENTS, side, side)), noise(torch.empty(1, SOUNDS, 64))
        image = None
        if case.image is not None:
            pixels = torch.from_numpy(case.image).float().permute(2, 0, 1)[None, :, None] / 127.5 - 1
            image = self.video_vae.encode(pixels)
        if self.teacher:
            video, audio = self.euler(video, audio, text, image)
        else:
            video, audio = denoise_renoise(
                lambda v, a, sigma: self.dit(v, a, text), video, audio, self.sigmas, noise=noise, image=image
            )
        frames = ((self.video_vae.decode(video)[0].permute(1, 2, 3, 0) * 0.5 + 0.5) * 255).round().to(torch.uint8)
        sound = self.audio_vae.decode_for_playback(audio.transpose(1, 2))[0].mean(0)
        return frames.numpy(), sound.numpy(), 44100

    def euler(self, video, audio, text, image):
        """Return both latents after plain Euler steps of the teacher, without guidance."""
        for sigma, following in zip(self.sigmas[:-1].tolist(), self.sigmas[1:].tolist(), strict=True):
            if image is not None:
                video[:, :, :1] = image
            v_video, v_audio = self.dit(video, audio, text)
            video, audio = video + (following - sigma) * v_video, audio + (following - sigma) * v_audio
        if image is not None:
            video[:, :, :1] = image
        return video, audio


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
        self.add("kind right", seen.kind == scene.kind)
        self.add("thing colour right", seen.colour == scene.colour)
        self.add("ground colour right", seen.background == scene.background)
        if scene.kind == "face":
            count = min(len(seen.mouth), len(seen.loudness))
            self.add("mouth and loudness r", pearson(seen.mouth[:count], seen.loudness[:count]))
        else:
            hits = matched(seen.contacts, seen.tones)
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


def reconstruction_psnr(count=12):
    """Return the mean PSNR in dB of the video VAE on clips that its training has not seen."""
    vae = load_video_vae(WEIGHTS / "nano_video_vae.safetensors")
    values = []
    for number in range(count):
        scene = world.draw_scene(np.random.default_rng((73, number)), kind=world.KINDS[number % 3])
        pixels = torch.from_numpy(world.render_frames(scene, FRAMES)).permute(3, 0, 1, 2)[None] * 2 - 1
        with torch.inference_mode():
            error = (vae.decode(vae.encode(pixels)) - pixels) / 2
        values.append(-10 * torch.log10(error.square().mean()).item())
    return float(np.mean(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64, help="from prompts alone")
    parser.add_argument("--image-clips", type=int, default=16, help="from a prompt and a first image")
    parser.add_argument("--in-process", action="store_true", help="no server, no mp4")
    parser.add_argument("--teacher", action="store_true", help="judge the teacher (with --in-process)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="folder in which the clips stay")
    options = parser.parse_args()
    if options.teacher and not options.in_process:
        parser.error("--teacher needs --in-process: the teacher is no file that ComfyUI could load")
    print("| what | value | of |\n|---|---|---|")
    print(f"| VAE reconstruction PSNR dB | {reconstruction_psnr():.1f} | 12 |", flush=True)
    for label, cases in (
        ("prompt", draw_cases(options.clips, False)),
        ("image", draw_cases(options.image_clips, True)),
    ):
        tally = Tally()
        if options.in_process:
            make = InProcess(options.teacher, options.steps) if cases else None
            for case in cases:
                tally.judge(case, *make(case))
        else:
            with tempfile.TemporaryDirectory() as scratch:
                for case, *clip, seconds in clips_from_comfyui(cases, options.keep or Path(scratch)):
                    tally.judge(case, *clip)
                    tally.add("queued to written s" if case.number else "first clip, loading included, s", seconds)
        for name, value, count in tally.rows():
            print(f"| {label}: {name} | {value:.2f} | {count} |", flush=True)


if __name__ == "__main__":
    main()
