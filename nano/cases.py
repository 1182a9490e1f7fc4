"""The clips that nano is judged by: their prompts, images and soundtracks, made by a real ComfyUI or in process."""

import copy
import json
import os
import time
import wave
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from ..launch import ROOT
from ..launch.client import Client
from ..launch.demo import clip_path, fill
from ..launch.server import Server
from ..model_loader.load import load_audio_vae, load_dit, load_text_encoder, load_video_vae, tokenizer_json
from ..sampler.denoise import denoise_renoise, denoise_unipc, seeded_noise
from ..sampler.schedule import flow_sigmas
from ..sampler.super_resolution import STEPS, start_super_resolution
from . import world
from .latents import FRAMES, LATENTS, SOUNDS, empty_prompt
from .measure import read_clip
from .prompts import draw_prompt
from .train_distill import guided_velocity, load_teacher, walk
from .train_super_resolution import OWN_START
from .training import WEIGHTS

SECONDS = 2.0
SEEDS = {"prompt": 71, "image": 72, "soundtrack": 74}  # what is given -> stream of random numbers


@dataclass(frozen=True, slots=True)
class Case:
    """One clip to make: its number (also the seed), the scene of its prompt, and what it is given besides, if any.

    image: uint8 [96,96,3]; sound: float32 mono at world.SAMPLE_RATE, as long as the clip.
    """

    number: int
    scene: world.Scene
    prompt: str
    image: np.ndarray | None = None
    sound: np.ndarray | None = None


def draw_cases(count, given):
    """Return `count` cases, kinds in turn, every prompt from the evaluation share and naming both colours.

    given: a key of SEEDS.
    """
    cases = []
    for number in range(count):
        rng = np.random.default_rng((SEEDS[given], number))
        scene = world.draw_scene(rng, kind=world.KINDS[number % 3])
        prompt = draw_prompt(scene, rng, evaluation=True)
        while scene.background not in prompt:
            prompt = draw_prompt(scene, rng, evaluation=True)
        image = (world.render_frames(scene, 1)[0] * 255 + 0.5).astype(np.uint8) if given == "image" else None
        sound = world.render_sound(scene, SOUNDS) if given == "soundtrack" else None
        cases.append(Case(number, scene, prompt, image, sound))
    return cases


def workflow(case):
    """Return the API graph for a case: the template with image and soundtrack, without the nodes it does not need."""
    name = "nano_t2v" if case.image is None and case.sound is None else "nano_image_and_soundtrack"
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    unwanted = {"HappyHorseFirstImage": case.image is None, "HappyHorseSoundtrack": case.sound is None}
    for number, node in list(graph.items()):
        if unwanted.get(node["class_type"]):
            without(graph, number)
    return graph


def without(graph, number):
    """Take a node out of an API graph; the `conditioning` or `latent` it was given goes where its output went."""
    node = graph.pop(number)
    source = node["inputs"]["conditioning" if node["class_type"] == "HappyHorseFirstImage" else "latent"]
    for other in graph.values():
        for name, value in other["inputs"].items():
            if value == [number, 0]:
                other["inputs"][name] = source


def write_wav(path, sound, rate):
    """Write mono float32 samples in [-1,1] as 16-bit wav."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 32767).round().astype("<i2").tobytes())


def clips_from_comfyui(cases, folder, weight_dtype="default"):
    """Yield (case, frames, mono sound, rate, seconds from queued to written) of clips made through ComfyUI's API.

    folder: where the clips are written; weight_dtype: the loader's.
    """
    with Server(os.environ["COMFYUI_PATH"], folder) as server:
        client = Client(server.url, server.check_alive)
        for case in cases:
            values = {"text": case.prompt, "seed": case.number, "seconds": SECONDS, "weight_dtype": weight_dtype}
            if case.image is not None:
                values["image"] = f"case{case.number}.png"
                Image.fromarray(case.image).save(server.input / values["image"])
            if case.sound is not None:
                values["audio"] = f"case{case.number}.wav"
                write_wav(server.input / values["audio"], case.sound, world.SAMPLE_RATE)
            graph = fill(copy.deepcopy(workflow(case)), values)
            began = time.time()
            outputs = client.run(graph)
            seconds = time.time() - began
            frames, sound, rate, _ = read_clip(clip_path(outputs, folder))
            yield case, frames, sound, rate, seconds


class InProcess:
    """nano without ComfyUI: the same networks, loops and seeds, decoded frames instead of an mp4."""

    def __init__(self, teacher=False, steps=8, guidance=1.0):
        self.teacher, self.guidance, self.sigmas = teacher, guidance, flow_sigmas(steps)
        self.dit = load_teacher() if teacher else load_dit(WEIGHTS / "nano_dit.safetensors")
        path = WEIGHTS / "nano_text_encoder.safetensors"
        self.text_encoder, self.tokenizer = load_text_encoder(path), Tokenizer.from_str(tokenizer_json(path))
        self.video_vae = load_video_vae(WEIGHTS / "nano_video_vae.safetensors")
        self.audio_vae = load_audio_vae(WEIGHTS / "nano_audio_vae.safetensors")
        self.empty = empty_prompt()

    @torch.inference_mode()
    def __call__(self, case):
        """Return (frames uint8 [49,96,96,3], mono sound, rate)."""
        text, noise = self.text(case.prompt), seeded_noise(case.number)
        side = world.SIZE // 16
        video, audio = noise(torch.empty(1, 48, LATENTS, side, side)), noise(torch.empty(1, SOUNDS, 64))
        image, sound_given = None, case.sound is not None
        if case.image is not None:
            pixels = torch.from_numpy(case.image).float().permute(2, 0, 1)[None, :, None] / 127.5 - 1
            image = self.video_vae.encode(pixels)
        if sound_given:
            audio = self.heard(case.sound)
        if self.teacher:
            if image is not None:
                video[:, :, :1] = image
            velocity = lambda v, a: guided_velocity(self.dit, v, a, text, self.empty, self.guidance)  # noqa: E731
            *_, (video, audio) = walk(velocity, video, audio, self.sigmas, image is not None, sound_given)
        else:
            video, audio = denoise_renoise(
                lambda v, a, sigma: self.dit(v, a, text), video, audio, self.sigmas,
                noise=noise, image=image, keep_audio=sound_given,
            )  # fmt: skip
        frames = ((self.video_vae.decode(video)[0].permute(1, 2, 3, 0) * 0.5 + 0.5) * 255).round().to(torch.uint8)
        if sound_given:
            return frames.numpy(), case.sound, world.SAMPLE_RATE
        sound = self.audio_vae.decode_for_playback(audio.transpose(1, 2))[0].mean(0)
        return frames.numpy(), sound.numpy(), 44100

    def text(self, prompt):
        """Return the features [1,n,96] of a prompt."""
        return self.text_encoder(torch.tensor([self.tokenizer.encode(prompt).ids])).float()

    def heard(self, sound):
        """Return the latents [1,L,64] of mono samples at world.SAMPLE_RATE."""
        return self.audio_vae.encode(torch.from_numpy(sound)[None, None].repeat(1, 2, 1)).transpose(1, 2)


class SuperResolution(InProcess):
    """nano's second stage on true clips: what of the large picture it restores from the latents of the small one."""

    def __init__(self):
        super().__init__()
        self.dit = load_dit(WEIGHTS / "nano_sr.safetensors")

    @torch.inference_mode()
    def __call__(self, case):
        """Return (true, refined, bicubic) clips [3,49,192,192] in [-1,1]; bicubic: of the small clip, decoded."""

        def pixels(scale):
            frames = torch.from_numpy(world.render_frames(case.scene, FRAMES, scale))
            return frames.permute(3, 0, 1, 2)[None] * 2 - 1

        small, noise = self.video_vae.encode(pixels(1)), seeded_noise(case.number)
        side = world.SIZE * 2 // 16
        start, heard = start_super_resolution(
            small, self.heard(world.render_sound(case.scene, SOUNDS)), side, side, noise, **OWN_START
        )
        text = self.text(case.prompt)
        refined, _ = denoise_unipc(
            lambda v, a, sigma: self.dit(v, a, text), start, heard, flow_sigmas(STEPS), keep_audio=True
        )
        frames = self.video_vae.decode(small)[0].transpose(0, 1)
        bicubic = torch.nn.functional.interpolate(frames, scale_factor=2, mode="bicubic").transpose(0, 1)
        return pixels(2)[0], self.video_vae.decode(refined)[0], bicubic.clamp(-1, 1)
