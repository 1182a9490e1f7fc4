"""Predict the memory that a clip takes, stage by stage: `python as_package.py benchmarks.memory`.

    python as_package.py benchmarks.memory [--size 1080p] [--ratio 16:9] [--seconds 5] [--precision fp8] [--budget 24]
    python as_package.py benchmarks.memory --check

The formulas are sampler/memory.py's. Without a size: the sizes and budgets that the pack is made for. --check compares
the formulas with the tensors that are alive at the worst moment of a full-size forward and of a decoding step, counted
without computing anything (torch's meta device); it takes about a minute.
"""

import argparse

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model_loader.config import DISTILL, SR_540P, SR_1080P, T5GEMMA_9B, TURBO_7_7, WAN22_VAE
from ..model_loader.load import build
from ..sampler.memory import (
    LINEAR_BYTES,
    TEXT_TOKENS,
    Stage,
    activation_bytes,
    decode_bytes,
    encode_bytes,
    sampling_bytes,
    token_count,
    weight_bytes,
)
from ..sampler.sizes import PIXELS_PER_LATENT, RATIOS, RESOLUTIONS, audio_length, latent_side, pixel_size, video_length

TEXT_ENCODER_ACTIVATIONS = 200_000_000  # bytes: 640 tokens in fp32 at the MLP's width, a few times over
BUDGETS = (("1080p", "fp8", 24), ("540p", "fp8", 16), ("256p", "fp8", 12))
HEAD = ("clip", "stage", "weights GB", "activations GB", "all on the card GB", "of the weights in RAM GB")


def stages(resolution, ratio, seconds, precision):
    """Return the Stages of a clip: text, first pass at 256p, super-resolution to a larger size, either decoder."""
    width, height = pixel_size(resolution, ratio)
    found = [
        Stage("text encoder", *weight_bytes("text_encoder", T5GEMMA_9B, precision), TEXT_ENCODER_ACTIVATIONS),
        sampling("first pass", DISTILL, pixel_size("256p", ratio), seconds, precision),
    ]
    if resolution != "256p":
        config = SR_1080P if resolution == "1080p" else SR_540P
        found.append(sampling("super-resolution", config, (width, height), seconds, precision))
    for name, network, config in (("TurboVAED", "turbo_vae", TURBO_7_7), ("Wan2.2", "wan_vae", WAN22_VAE)):
        weights, layer = weight_bytes(network, config, "bf16")
        found.append(Stage(f"decode, {name}", weights, layer, decode_bytes(config, width, height, torch.bfloat16)))
    return found


def tokens_of(size, seconds):
    """Return the tokens of a clip of a size in pixels."""
    audio = audio_length(seconds)
    return token_count(*size, video_length(audio), audio)


def sampling(name, config, size, seconds, precision):
    """Return the Stage of sampling with a transformer at a size in pixels."""
    activations = sampling_bytes(config, tokens_of(size, seconds))
    return Stage(f"{name} {size[0]}x{size[1]}", *weight_bytes("dit", config, precision), activations)


def rows(resolution, ratio, seconds, precision, budget):
    """Yield the table's cells of a clip on a card of `budget` GiB."""
    clip = f"{resolution} {ratio}, {seconds:g} s, {precision}, {budget:g} GiB"
    for stage in stages(resolution, ratio, seconds, precision):
        waiting = stage.waiting(budget * 2**30)
        fits = "does not fit" if waiting is None else f"{waiting / 1e9:.1f}"
        sizes = (stage.weights, stage.activations, stage.weights + stage.activations)
        yield (clip, stage.name, *(f"{size / 1e9:.1f}" for size in sizes), fits)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive, and the most there were; weights are not counted."""

    def __init__(self):
        super().__init__()
        self.peak, self._alive, self._given = 0, {}, {}  # address -> (weak reference, bytes); address -> weak reference

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Run one operation and count what it made."""
        self._forget_the_dead()  # before a dead one's address is taken for another
        for storage in storages((arguments, options)):
            if storage._cdata not in self._alive:
                self._given[storage._cdata] = StorageWeakRef(storage)
        result = function(*arguments, **(options or {}))
        self._forget_the_dead()
        for storage in storages(result):
            if storage._cdata not in self._alive and storage._cdata not in self._given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result

    def _forget_the_dead(self):
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self._given = {key: storage for key, storage in self._given.items() if not storage.expired()}


def storages(values):
    """Return the storages of the tensors in nested containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def as_flash(q, k, v):
    """Attention's only tensor where no N x N scores are kept."""
    return torch.empty_like(q)


def as_sage(q, k, v):
    """The tensors of SageAttention 2 on RTX 40: queries and keys in int8, values the other way round and in fp8."""
    quantised = [torch.empty_like(x, dtype=torch.int8) for x in (q, k)]
    out, turned = torch.empty_like(q), torch.empty_like(v.transpose(2, 3))
    quantised.append(torch.empty_like(turned, dtype=torch.float8_e4m3fn))
    return out


def as_cores_sage(q, k, v):
    """The same behind ComfyUI's own way to it, which repeats keys and values for every head of queries."""
    return as_sage(q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)))


@torch.no_grad()
def forward_bytes(config, size, seconds, attention=as_flash):
    """Count the peak of a full-size forward of a DiT in bf16 at a size in pixels, with the longest prompt."""
    network = build("dit", config, dtype=torch.bfloat16)
    audio = audio_length(seconds)
    video = torch.empty(1, 48, video_length(audio), latent_side(size[1]), latent_side(size[0]), device="meta")
    sound, text = torch.empty(1, audio, 64, device="meta"), torch.empty(1, TEXT_TOKENS, 3584, device="meta")
    with LiveBytes() as live:
        network(video, sound, text, attention=attention)
    return live.peak


@torch.no_grad()
def step_bytes(network, config, size):
    """Count the peak of decoding with a full-size video VAE in bf16 at a size in pixels, frames taken as they come."""
    decoder = build(network, config, dtype=torch.bfloat16)
    if network == "wan_vae":  # core's attention asks how much memory the device has; it needs little
        decoder.vae.decoder.middle[1].optimized_attention = lambda q, k, v: torch.empty_like(q)
    latent = torch.empty(1, 48, 22, size[1] // PIXELS_PER_LATENT, size[0] // PIXELS_PER_LATENT, device="meta")
    with LiveBytes() as live:
        for pixels in decoder.decode_steps(latent):
            del pixels
    return live.peak


@torch.no_grad()
def encoding_bytes(config, frames, size):
    """Count the peak of encoding so many frames with a full-size Wan2.2 VAE in bf16 at a size in pixels."""
    vae = build("wan_vae", config, dtype=torch.bfloat16)
    vae.vae.encoder.middle[1].optimized_attention = lambda q, k, v: torch.empty_like(q)
    pixels = torch.empty(1, 3, frames, size[1], size[0], device="meta")
    with LiveBytes() as live:
        vae.encode_raw(pixels)
    return live.peak


def checks():
    """Yield (what, predicted bytes, counted bytes)."""
    for resolution, config in (("256p", DISTILL), ("540p", SR_540P), ("1080p", SR_1080P)):
        size = pixel_size(resolution, "16:9")
        predicted = activation_bytes(config, tokens_of(size, 5))
        yield f"forward, {resolution}, 5 s", predicted, forward_bytes(config, size, 5)
    size = pixel_size("1080p", "16:9")
    predicted = activation_bytes(SR_1080P, tokens_of(size, 5))
    for name, attention in (("SageAttention", as_sage), ("the same, ComfyUI's own way", as_cores_sage)):
        yield f"forward, 1080p, 5 s, {name}", predicted, forward_bytes(SR_1080P, size, 5, attention)
    for network, config in (("turbo_vae", TURBO_7_7), ("wan_vae", WAN22_VAE)):
        for resolution in ("256p", "540p", "1080p"):
            size = pixel_size(resolution, "16:9")
            yield (
                f"decode, {network}, {resolution}",
                decode_bytes(config, *size, torch.bfloat16),
                step_bytes(network, config, size),
            )
    for frames in (1, 9):
        size = pixel_size("1080p", "16:9")
        predicted = encode_bytes(WAN22_VAE, frames, *size, torch.bfloat16)
        yield f"encode, wan_vae, {frames} frames of 1080p", predicted, encoding_bytes(WAN22_VAE, frames, size)


def main(arguments=None):
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(RESOLUTIONS), help="default: the three budgets of the pack")
    parser.add_argument("--ratio", choices=list(RATIOS), default="16:9")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--precision", choices=list(LINEAR_BYTES), default="fp8", help="of the linear layers")
    parser.add_argument("--budget", type=float, default=24.0, metavar="GIB", help="memory of the card")
    parser.add_argument("--check", action="store_true", help="compare the formulas with counted tensors")
    options = parser.parse_args(arguments)
    if options.check:
        head, lines = ("what", "predicted GB", "counted GB"), checks()
        lines = ((what, f"{a / 1e9:.2f}", f"{b / 1e9:.2f}") for what, a, b in lines)
    else:
        asked = BUDGETS if options.size is None else ((options.size, options.precision, options.budget),)
        head, lines = HEAD, (row for clip in asked for row in rows(clip[0], options.ratio, options.seconds, *clip[1:]))
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
