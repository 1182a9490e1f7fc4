"""What nano makes of given videos: `python as_package.py nano.given_videos` (through ComfyUI, two idle cores: minutes).

A sound for pictures: its loudness beside that of the sound that belongs to them, and of the next clip's; contacts that
are heard within 80 ms. Video to video at several `denoise`: a thing of another colour on another ground; loudness, and
whether the colours are those of the prompt. Other words for a face: its mouth beside the new sound and the old one.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..launch.client import Client
from ..launch.demo import clip_path
from ..launch.server import Server
from ..launch.workflows import twin_path
from ..sampler.mp4 import write_mp4
from . import world
from .cases import write_wav
from .measure import matched, observe, pearson, read_clip

FRAMES = 49
DENOISE = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
SLIGHT = (0.1, 0.2, 0.4, 1.0)


def draw_scenes(count):
    """Return `count` (scene, its prompt, the scene in two other colours, its prompt): ball, cube, face in turn."""
    drawn = []
    for number in range(count):
        rng = np.random.default_rng((75, number))
        scene = world.draw_scene(rng, kind=world.KINDS[number % 3], bounces=None)
        left = [colour for colour in world.COLOURS if colour not in (scene.colour, scene.background)]
        colour, background = rng.choice(left, 2, replace=False)
        other = replace(scene, colour=str(colour), background=str(background))
        drawn.append((scene, prompt_of(scene), other, prompt_of(other)))
    return drawn


def prompt_of(scene):
    """Return the plainest prompt for a scene."""
    does = f"says {' '.join(scene.syllables)}" if scene.kind == "face" else "bounces"
    return f"A {scene.colour} {scene.kind} {does} on a {scene.background} background"


def true_clip(scene):
    """Return the scene's frames uint8 [49,96,96,3], mono sound and its rate."""
    frames = (world.render_frames(scene, FRAMES) * 255 + 0.5).astype(np.uint8)
    return frames, world.render_sound(scene, FRAMES), world.SAMPLE_RATE


def write_scene(path, scene):
    """Write the scene's true clip as an mp4."""
    frames, sound, rate = true_clip(scene)
    audio = {"waveform": torch.from_numpy(sound)[None, None], "sample_rate": rate}
    write_mp4(path, [torch.from_numpy(frames)], world.SIZE, world.SIZE, FRAMES, audio)


class Maker:
    """Clips of given videos by a server: call with a template, the scene to read, a prompt, a seed -> Observation."""

    def __init__(self, server, folder):
        self.server, self.folder = server, folder
        self.client = Client(server.url, server.check_alive)

    def __call__(self, template, scene, prompt, seed, **sampler):
        write_scene(self.server.input / "given.mp4", scene)
        graph = json.loads(twin_path(template).read_text(encoding="utf-8"))
        values = {
            "LoadVideo": {"file": "given.mp4"},
            "LoadAudio": {"audio": "given.wav"},
            "HappyHorseEncodePrompt": {"text": prompt},
            "HappyHorseSampler": {"seed": seed, **sampler},
        }
        for node in graph.values():
            node["inputs"] |= values.get(node["class_type"], {})
        frames, sound, rate, _ = read_clip(clip_path(self.client.run(graph), self.folder))
        self.changed = np.abs(frames - true_clip(scene)[0].astype(float)).mean()  # 8-bit steps
        return observe(frames, sound, rate)


def sound_rows(make, scenes):
    """Yield the table's rows about sounds made for pictures."""
    truths = [observe(*true_clip(scene)) for scene, *_ in scenes]
    made = [make("nano_sound_for_a_video", scene, prompt, i) for i, (scene, prompt, *_) in enumerate(scenes)]
    own = [pearson(a.loudness, b.loudness) for a, b in zip(truths, made, strict=True)]
    # three on: the same kind of thing, another clip
    others = [pearson(a.loudness, made[(i + 3) % len(made)].loudness) for i, a in enumerate(truths)]
    things = [(a, b) for a, b in zip(truths, made, strict=True) if a.kind != "face"]
    heard = sum(matched(a.tones, b.tones) for a, b in things) / sum(len(a.tones) for a, _ in things)
    yield f"| sound for a video: loudness, r with its own / with another clip's | {mean(own)} / {mean(others)} |"
    yield f"| sound for a video: contacts heard within 80 ms | {100 * heard:.0f} % |"


def change_rows(make, scenes):
    """Yield the table's rows about videos that are changed."""
    for denoise in DENOISE:
        follows, colours, grounds = [], [], []
        for i, (scene, _, other, prompt) in enumerate(scenes):
            seen = make("nano_video_to_video", scene, prompt, i, denoise=denoise)
            follows.append(pearson(observe(*true_clip(scene)).loudness, seen.loudness))
            colours.append(seen.colour == other.colour)
            grounds.append(seen.background == other.background)
        yield (
            f"| denoise {denoise}: loudness, r with the old one / thing's colour / ground's colour | {mean(follows)} / "
            f"{100 * np.mean(colours):.0f} % / {100 * np.mean(grounds):.0f} % |"
        )


def word_rows(make, scenes):
    """Yield the table's rows about faces that are given other words."""
    faces = [scene for scene, *_ in scenes if scene.kind == "face"]
    for denoise in SLIGHT:
        new, old, changed = [], [], []
        for i, scene in enumerate(faces):
            other = faces[i - 1]
            said = replace(scene, syllables=other.syllables, start=other.start)
            write_wav(make.server.input / "given.wav", world.render_sound(said, FRAMES), world.SAMPLE_RATE)
            seen = make("nano_lip_sync_a_video", scene, prompt_of(said), i, denoise=denoise)
            new.append(pearson(seen.mouth, observe(*true_clip(said)).loudness))
            old.append(pearson(seen.mouth, observe(*true_clip(scene)).loudness))
            changed.append(make.changed)
        yield (
            f"| other words, denoise {denoise}: mouth, r with the new sound / the old one; picture changed by | "
            f"{mean(new)} / {mean(old)}; {mean(changed)} |"
        )


def mean(values):
    """Return the mean with two digits."""
    return f"{np.mean(values):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    scenes = draw_scenes(parser.parse_args().clips)
    with tempfile.TemporaryDirectory() as folder, Server(os.environ["COMFYUI_PATH"], Path(folder)) as server:
        make = Maker(server, Path(folder))
        print("| what | value |\n|---|---|")
        for rows in (sound_rows, change_rows, word_rows):
            for row in rows(make, scenes):
                print(row, flush=True)


if __name__ == "__main__":
    main()
