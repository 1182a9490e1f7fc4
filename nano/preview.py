"""Fit the preview colours of nano's latents and write them into the model's header, where the nodes look for them.

ComfyUI shows each step as a linear mix of the latent's channels. Core's factors belong to the Wan2.2 VAE; nano's has
channels of its own. Run it after each training of the video VAE or the transformer:

    python as_package.py nano.preview
"""

import json
import logging
import os

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..model_loader.load import load_video_vae
from . import world
from .training import WEIGHTS

KEY = "happyhorse.preview"
CLIPS = 64
HELD_OUT = 16  # of the clips, to measure the fit
RIDGE = 0.03  # as if every value were 0.17 off: previews show latents that are not clean yet


def pairs(vae, count):
    """Return `count` clips' latents [count,36,48] and the mean colours [count,36,3] in [-1,1] of their pixels."""
    rng = np.random.default_rng(51)
    latents, colours = [], []
    for _ in range(count):
        frames = torch.from_numpy(world.render_frames(world.draw_scene(rng), 5)).permute(3, 0, 1, 2) * 2 - 1
        latents.append(vae.encode(frames[None])[0, :, 1].flatten(1).T)
        colours.append(F.avg_pool2d(frames[:, 1:].mean(1), 16).flatten(1).T)
    return torch.stack(latents), torch.stack(colours)


def fit(latents, colours):
    """Return the rows [49,3] that turn latents [n,48] and a one into colours [n,3], by least squares with a ridge."""
    with_one = F.pad(latents, (0, 1), value=1.0)
    penalty = torch.eye(with_one.shape[1]) * RIDGE * len(latents)
    penalty[-1, -1] = 0
    return torch.linalg.solve(with_one.T @ with_one + penalty, with_one.T @ colours)


def main():
    """Fit, report the error on clips left out, rewrite the header."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    vae = load_video_vae(WEIGHTS / "nano_video_vae.safetensors")
    with torch.inference_mode():
        latents, colours = pairs(vae, CLIPS)
        rows = fit(latents[HELD_OUT:].flatten(0, 1), colours[HELD_OUT:].flatten(0, 1))
        error = F.pad(latents[:HELD_OUT], (0, 1), value=1.0) @ rows - colours[:HELD_OUT]
    logging.info("preview colours: %.3f RMS off, of %.3f", error.square().mean().sqrt(), colours[:HELD_OUT].std())
    path = WEIGHTS / "nano_dit.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata[KEY] = json.dumps([[round(x, 4) for x in row] for row in rows.tolist()])
    unfinished = path.with_name(path.name + ".part")
    save_file(load_file(path), unfinished, metadata)
    os.replace(unfinished, path)


if __name__ == "__main__":
    main()
