"""How much memory a clip takes, before anything is loaded: weights, activations, decoding, and what a budget allows."""

from dataclasses import dataclass

import torch

from ..model_loader.config import PATCH, TurboVAEConfig
from ..model_loader.load import expected_tensors
from .sizes import audio_length, latent_side, video_length

LINEAR_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4}  # a weight of the linear layers; the rest has a dtype of its own
TEXT_TOKENS = 640  # at most
# Peak of one forward, in bytes for every token and hidden channel: about 6 GB for five seconds of 1080p.
ACTIVATION_BYTES = 18
# Peak of one step of decoding, in values for every pixel of the picture and channel of the widest full-size layer: 4
# frames and what the convolutions keep of the step before (Wan2.2), a window of 9 latent frames (TurboVAED).
WAN_VALUES = 16
TURBO_VALUES = 48
# Bytes of a card that are never ours: the driver's context, the screen, and what ComfyUI keeps free (0.8 GB).
RESERVED = 1.5e9


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a clip: bytes of its weights, of the largest part of them that runs at once, and of activations."""

    name: str
    weights: int
    part: int
    activations: int

    def waiting(self, budget):
        """Return the bytes of weights that must wait in RAM on a card of `budget` bytes; None if even so it cannot run.

        ComfyUI brings waiting weights to the card part by part, the next one while one runs.
        """
        room = budget - RESERVED - self.activations
        if room < min(self.weights, 2 * self.part):
            return None
        return max(0, self.weights - int(room))


def token_count(width, height, seconds):
    """Return the video and audio tokens of a clip, and the longest text's."""
    _, rows, columns = PATCH
    audio = audio_length(seconds)
    frame = latent_side(width) // columns * (latent_side(height) // rows)
    return frame * video_length(audio) + audio + TEXT_TOKENS


def activation_bytes(config, tokens):
    """Return the peak bytes of activations in one forward of a DiT (DiTConfig) over so many tokens."""
    return tokens * config.hidden_size * ACTIVATION_BYTES


def decode_bytes(config, width, height, value_bytes):
    """Return the peak bytes of a step of a video decoder (WanVAEConfig or TurboVAEConfig) at width x height pixels.

    value_bytes: of the dtype it computes in. The clip's length does not matter.
    """
    if isinstance(config, TurboVAEConfig):
        values = TURBO_VALUES * config.block_out_channels[-1]
    else:
        values = WAN_VALUES * config.dec_dim
    return values * width * height * value_bytes


def weight_bytes(network, config, precision):
    """Return the bytes of a network's weights, and of the largest group of them that runs at once: a layer.

    network: a key of KEY_MAPS; precision: a key of LINEAR_BYTES.
    """
    groups = {}
    for name, tensor in expected_tensors(network, config, dtype=torch.bfloat16).items():
        linear = tensor.dtype == torch.bfloat16 and not name.endswith("embed_tokens.weight")
        group = ".".join(name.split(".")[:3])
        size = tensor.numel() * (LINEAR_BYTES[precision] if linear else tensor.dtype.itemsize)
        groups[group] = groups.get(group, 0) + size
    return sum(groups.values()), max(groups.values())
