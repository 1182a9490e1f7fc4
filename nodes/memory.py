"""What will not fit, told before it fails: ComfyUI keeps weights in RAM where they must wait, but not activations."""

import comfy.model_management
import torch
from comfy.model_management import module_size

from ..sampler.memory import Stage, clip_too_large, model_too_large, sampling_bytes, token_count
from .host import require_happyhorse


def clip_remarks(model, width, height, frames, audio):
    """Return what to tell before a MODEL samples width x height pixels, `frames` latent frames and `audio` latents.

    A list of lines, empty where it fits.
    """
    happyhorse = require_happyhorse(model)
    network = happyhorse.diffusion_model
    activations = sampling_bytes(network.config, token_count(width, height, frames, audio))
    largest = max(module_size(part) for part in network.modules() if not any(part.children()))
    stage = Stage(f"{width}x{height} of this length", module_size(happyhorse), largest, activations)
    have = comfy.model_management.get_total_memory(model.load_device)
    return clip_too_large(stage, have, on_card=_has_memory_of_its_own(model.load_device))


def model_remarks(model):
    """Return what to tell of a loaded MODEL; a list of lines, empty where it fits."""
    have = comfy.model_management.get_total_memory(torch.device("cpu"))
    if _has_memory_of_its_own(model.load_device):
        have += comfy.model_management.get_total_memory(model.load_device)
    return model_too_large(module_size(require_happyhorse(model)), have)


def _has_memory_of_its_own(device):
    return device.type not in ("cpu", "mps")
