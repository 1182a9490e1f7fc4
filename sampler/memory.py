"""How much memory a clip takes, before anything is loaded: weights, activations, decoding, and what a budget allows."""

from dataclasses import dataclass

import torch

from ..model_loader.config import TurboVAEConfig
from ..model_loader.load import expected_tensors
from ..model_loader.token_pieces import PIECE
from ..model_loader.turbo_pieces import PIECE_BYTES as DECODE_PIECE_BYTES
from .sizes import PIXEL_MULTIPLE

LINEAR_BYTES = {
    "int8": 1,
    "fp8": 1,
    "bf16": 2,
    "fp32": 4,
}  # a weight of the linear layers; the rest has a dtype of its own
TEXT_TOKENS = 640  # at most
# Peak of one forward in plain torch, in bytes for every hidden channel of every token: in attention, which holds the
# residual, queries, keys, values and outputs; or after it, with the residual, outputs and what the tokens that pass the
# linears at a time take (model_loader/token_pieces.py). 3.2 GB for five seconds of 1080p. Counted tensor by tensor by
# `benchmarks.memory --check`.
ATTENTION_BYTES, TOKEN_BYTES, PIECE_BYTES = 9.6, 6.3, 42
# fp32 copies of the latent that ComfyUI's sampling and our solver hold beside a forward, such as noise, start and
# estimates: 0.9 GB for 1080p super-resolution (benchmarks.budgets).
LATENT_COPIES = 19
# Peak of one step of decoding in values for every pixel of the picture and channel of the widest full-size layer: 4
# frames and what the convolutions keep of the step before (Wan2.2).
WAN_VALUES = 16
# The same of encoding, per channel of the encoder's first layer: 4 frames and what is kept of those before, or 1 frame.
WAN_ENCODED_VALUES, WAN_ENCODED_PICTURE_VALUES = 9.6, 2.1
# The same for one tensor of a window of 9 latent frames (TurboVAED), 36 frames of half the width and height and twice
# the channels, and for 2 of its frames. A residual block has two such tensors, a piece of one that is normed, with a
# frame more on either side, and that piece convolved.
TURBO_VALUES, TURBO_MARGIN_VALUES = 18, 1
# Bytes of a card that are never ours: the driver's context, the screen, and what ComfyUI keeps free (0.8 GB).
RESERVED = 1_500_000_000


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a clip, all in bytes: its weights, the largest layer or so of them, and its activations."""

    name: str
    weights: int
    layer: int
    activations: int

    @property
    def least(self):
        """What a card must have: weights can wait in RAM but for two layers, one that runs and one on its way."""
        return RESERVED + self.activations + min(self.weights, 2 * self.layer)

    def waiting(self, card):
        """Return the bytes of weights that wait in RAM with a card of `card` bytes; None if even so it cannot run."""
        if self.least > card:
            return None
        return max(0, RESERVED + self.activations + self.weights - card)


def clip_too_large(stage, have, on_card):
    """Return, in a list of lines, that a stage lacks memory and what to do; nothing where it fits.

    have: bytes of the device that runs it, a card (`on_card`) or the RAM.
    """
    needed = stage.least if on_card else stage.weights + stage.activations
    if needed <= have:
        return []
    return [
        f"{stage.name} takes {needed / 1e9:.1f} GB of {'the card' if on_card else 'RAM'}, which has {have / 1e9:.1f}: "
        "expect it to run out of memory. Choose a smaller size or fewer seconds; int8 or fp8 weights take less too."
    ]


def model_too_large(weights, have):
    """Return, in a list of lines, that weights fit nowhere; have: bytes of card and RAM together."""
    if weights <= have:
        return []
    return [
        f"The weights take {weights / 1e9:.1f} GB, this computer has {have / 1e9:.1f} for them: expect it to fail or "
        "crawl. Use an int8 or fp8 file (`python3 run.py convert` makes one)."
    ]


def token_count(width, height, frames, audio):
    """Return the tokens of a clip of width x height pixels, `frames` latent frames, `audio` latents and a long text."""
    return width // PIXEL_MULTIPLE * (height // PIXEL_MULTIPLE) * frames + audio + TEXT_TOKENS


def activation_bytes(config, tokens):
    """Return the peak bytes of activations in one forward of a DiT (DiTConfig) over so many tokens."""
    linears = tokens * TOKEN_BYTES + min(tokens, PIECE) * PIECE_BYTES
    return config.hidden_size * int(max(tokens * ATTENTION_BYTES, linears))


def held_bytes(config):
    """Return the most bytes of a layer's weights that are brought or made wide for all pieces of a long sequence, bf16.

    They are those after attention, see model_loader/dit_layers.py.
    """
    per_input = (
        config.hidden_size + (2 if layer in config.gelu7_layers else 3) * config.mlp_width(layer)
        for layer in range(config.num_layers)
    )
    return 2 * config.hidden_size * max(per_input)


def sampling_bytes(config, tokens):
    """Return the peak bytes beyond weights while ComfyUI samples so many tokens: a forward's, and latents.

    The prompt counts with its longest, with which a clip may become two pieces and weights are held for both.
    """
    held = held_bytes(config) if tokens > PIECE else 0
    latents = int(tokens) * config.video_in_channels * 4 * LATENT_COPIES
    return activation_bytes(config, tokens) + held + latents


def decode_bytes(config, width, height, dtype):
    """Return the peak bytes of a step of a video decoder (WanVAEConfig or TurboVAEConfig) at width x height pixels.

    dtype: what it computes in. The clip's length does not matter.
    """
    values = width * height * dtype.itemsize
    if isinstance(config, TurboVAEConfig):
        values *= config.block_out_channels[-1]
        window = TURBO_VALUES * values
        return 2 * window + 2 * min(window, DECODE_PIECE_BYTES) + TURBO_MARGIN_VALUES * values
    return values * WAN_VALUES * config.dec_dim


def encode_bytes(config, frames, width, height, dtype):
    """Return the peak bytes of a step of the Wan2.2 encoder (WanVAEConfig) at width x height pixels; as decode_bytes.

    frames: 1 takes a quarter of what more take, however many they are.
    """
    values = WAN_ENCODED_PICTURE_VALUES if frames == 1 else WAN_ENCODED_VALUES
    return int(width * height * dtype.itemsize * config.dim * values)


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
