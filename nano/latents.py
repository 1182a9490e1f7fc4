"""The training set of nano's transformer: clips of the world as normalised latents, their prompts as text features."""

import argparse
from collections import defaultdict

import numpy as np
import torch
from tokenizers import Tokenizer

from ..model_loader.load import load_audio_vae, load_text_encoder, load_video_vae, tokenizer_json
from . import world
from .prompts import draw_prompt
from .training import RUNS, WEIGHTS

FRAMES, LATENTS, SOUNDS = 49, 13, 51  # of a two-second clip: pixel frames, latent frames, audio latents


def scene_of(index):
    """Return scene `index` of the training set."""
    return world.draw_scene(np.random.default_rng((41, index)))


def encode_clips(count, scale=1, size=8, first=0):
    """Return (video [count,48,13,6*scale,6*scale], audio [count,51,64]) of `count` scenes from number `first` on.

    float16 on disk; goes on where a killed run stopped. scale: of the pictures' sides, 1 or 2.
    """
    RUNS.mkdir(exist_ok=True)
    name = (f"from{first}_" if first else "") + str(count) + (f"_x{scale}" if scale > 1 else "")
    done_file = RUNS / f"latents_done_{name}.txt"
    side = world.SIZE * scale // 16
    shapes = {"video": (count, 48, LATENTS, side, side), "audio": (count, SOUNDS, 64)}
    done = int(done_file.read_text()) if done_file.exists() else 0
    kept = {}
    for part, shape in shapes.items():
        path = RUNS / f"latents_{part}_{name}.npy"
        fresh = not path.exists()
        done = 0 if fresh else done
        kept[part] = np.lib.format.open_memmap(path, mode="w+" if fresh else "r+", dtype=np.float16, shape=shape)
    if done >= count:
        return kept["video"], kept["audio"]
    video_vae, audio_vae = (
        load(WEIGHTS / f"nano_{part}_vae.safetensors")
        for load, part in ((load_video_vae, "video"), (load_audio_vae, "audio"))
    )
    with torch.no_grad():
        for start in range(done, count, size):
            scenes = [scene_of(first + i) for i in range(start, min(count, start + size))]
            pixels = torch.from_numpy(np.stack([world.render_frames(s, FRAMES, scale) for s in scenes])) * 2 - 1
            sound = torch.from_numpy(np.stack([world.render_sound(s, SOUNDS) for s in scenes]))
            with torch.autocast("cpu", torch.bfloat16):
                video = video_vae.encode(pixels.permute(0, 4, 1, 2, 3))
            kept["video"][start : start + size] = video.float().numpy()
            kept["audio"][start : start + size] = (
                audio_vae.encode(sound[:, None].repeat(1, 2, 1)).transpose(1, 2).numpy()
            )
            done_file.write_text(str(min(count, start + size)))
    return kept["video"], kept["audio"]


def encode_prompts(count, each=4, first=0):
    """Return {token count: (clips [n], features float16 [n,tokens,96])} of `each` prompts a clip, twice that of a face.

    What a face says is the hardest to learn of all that a prompt tells, so that half of the examples are faces.

    clips: places among those that `encode_clips` returns for the same arguments.
    """
    path = WEIGHTS / "nano_text_encoder.safetensors"
    encoder = load_text_encoder(path, dtype=torch.float32)
    tokenizer = Tokenizer.from_str(tokenizer_json(path))
    rng = np.random.default_rng((42, first) if first else 42)
    shares = [2 if scene_of(first + i).kind == "face" else 1 for i in range(count)]
    clips = np.repeat(np.arange(count), np.multiply(each, shares))
    prompts = [draw_prompt(scene_of(first + i), rng) for i in clips]
    buckets = defaultdict(list)
    for clip, coded in zip(clips, tokenizer.encode_batch(prompts), strict=True):
        buckets[len(coded.ids)].append((clip, coded.ids))
    features = {}
    with torch.no_grad():
        for length, rows in buckets.items():
            if len(rows) >= 32:
                parts = torch.tensor([ids for _, ids in rows]).split(256)
                coded = np.concatenate([encoder(ids).half().numpy() for ids in parts])
                features[length] = (np.array([clip for clip, _ in rows]), coded)
    return features


def empty_prompt():
    """Return the features [1,1,96] of the empty prompt."""
    path = WEIGHTS / "nano_text_encoder.safetensors"
    ids = Tokenizer.from_str(tokenizer_json(path)).encode("").ids
    with torch.no_grad():
        return load_text_encoder(path, dtype=torch.float32)(torch.tensor([ids]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=12000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    options = parser.parse_args()
    video, audio = encode_clips(options.clips, first=options.first)
    print(
        "video", video.shape, "std", float(np.float32(video[:200]).std()), "audio", float(np.float32(audio[:200]).std())
    )


if __name__ == "__main__":
    main()
