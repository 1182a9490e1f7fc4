"""Weight file to network: decide from headers, build on meta, check names and shapes, assign; and back to a file."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from . import row_scales
from .checkpoint import Checkpoint, CheckpointError
from .core_vae import AudioVAE, VideoVAE
from .detect import CONFIGS, describe
from .dit import DiT
from .key_map import KEY_MAPS, expert_names, split_names, stacked_name
from .layouts import FP8, SCALED, as_published
from .safetensors_writer import put_in_place
from .text_encoder import TextEncoder
from .tokenizer import tokenizer_definition
from .tokens import rotary_bands
from .turbo_vae import TurboVAE

SMALL = {"fp8": FP8, "int8": (torch.int8,)}  # what is that already; others become the first


def load_dit(path, *, variant=None, dtype=torch.bfloat16, device="cpu", operations=nn, quantised=None):
    """Load a transformer from a file, shard or folder; `dtype` is its linears', the rest stays fp32.

    path: or an open Checkpoint; variant: as `detect.describe`; quantised: as `fill`. Raises CheckpointError.
    """
    return _load(path, "dit", variant, dtype=dtype, device=device, operations=operations, quantised=quantised)


def load_text_encoder(path, *, dtype=torch.bfloat16, device="cpu", operations=nn, quantised=None):
    """Load a T5Gemma encoder from a file, shard or folder, or from an open Checkpoint; quantised: as `fill`.

    Raises CheckpointError.
    """
    return _load(path, "text_encoder", dtype=dtype, device=device, operations=operations, quantised=quantised)


def load_video_vae(path, *, dtype=torch.float32, device="cpu", operations=nn):
    """Load a VideoVAE (Wan2.2) or a TurboVAE (decoder only), whichever the file holds. Raises CheckpointError."""
    return _load(path, "video_vae", dtype=dtype, device=device, operations=operations)


def load_audio_vae(path, *, device="cpu"):
    """Load an AudioVAE (Oobleck), always fp32, alone or out of a stable-audio checkpoint. Raises CheckpointError."""
    return _load(path, "audio_vae", dtype=torch.float32, device=device)


def _load(path, part, variant=None, **options):
    checkpoint = as_published(path if isinstance(path, Checkpoint) else Checkpoint.open(path))
    found = describe(checkpoint, variant)
    if found.part != part:
        raise CheckpointError(
            f"{checkpoint.label}: holds a {found.part} ({found.network}), expected a {part}. Choose another file, or "
            "load this one where it belongs."
        )
    return fill(found.network, found.config, checkpoint, found.prefix, **options)


def build(network, config, *, dtype, device="meta", operations=nn):
    """Build an empty network: `network` is a key of KEY_MAPS; the VAEs of core choose their own operations."""
    if network == "oobleck":
        return AudioVAE(config, device=device)
    if network == "wan_vae":
        return VideoVAE(config, dtype=dtype, device=device)
    classes = {"dit": DiT, "text_encoder": TextEncoder, "turbo_vae": TurboVAE}
    return classes[network](config, operations=operations, dtype=dtype, device=device)


def expected_tensors(network, config, *, dtype):
    """Return {our name: meta tensor} of a network, without the wrapper's `vae.` of core's classes."""
    # Built with torch.nn, because some of comfy's operations own no weight before they are loaded.
    return {n.removeprefix("vae."): t for n, t in build(network, config, dtype=dtype).state_dict().items()}


def linear_weights(network, config):
    """Return our names of the weights that come in the network's `dtype`: the linears' but those that stay fp32."""
    modules = build(network, config, dtype=torch.bfloat16).named_modules()
    linears = {f"{name}.weight": module for name, module in modules if isinstance(module, nn.Linear)}
    return {name for name, module in linears.items() if module.weight.dtype == torch.bfloat16}


def fill(network, config, checkpoint, prefix="", *, dtype, device="cpu", operations=nn, quantised=None):
    """Build a network and give it a checkpoint's tensors: cast one at a time, never copied where dtype and device fit.

    Every tensor under `prefix` must have a place and every place a tensor of its shape; CheckpointError otherwise.
    quantised: None, and every weight is turned into `dtype`; "kept", and those of linears that are fp8, int8 or in
    blocks of GGUF in the file stay so; "fp8" or "int8", and what is not that becomes float8_e4m3fn or int8, a scale a
    row. `operations.Linear` must load such a `weight` and, beside fp8 and int8, `weight_scale`, fp32: one number [], or
    one a row [rows, 1]; beside blocks, uint8 [rows, bytes of a row], `weight_blocks`: the letters of their kind.
    Returns the network in eval mode without gradients.
    """
    wanted = expected_tensors(network, config, dtype=dtype)
    places = plan(network, checkpoint, prefix, wanted)
    linears = linear_weights(network, config) if quantised else ()
    state = {}
    for name, ours in places.items():
        linear = ours[0] in linears
        if linear and quantised == "kept" and name in checkpoint.blocks:
            tensor, kind = checkpoint.read_blocks(name), checkpoint.blocks[name]
            letters = torch.tensor(list(kind.encode()), dtype=torch.uint8)
            state.update({f"{part}_blocks": letters for part in ours})
        else:
            tensor, scale = checkpoint.read_scaled(name) if linear else (checkpoint.read(name), None)
            if linear and quantised in SMALL and tensor.dtype not in SMALL[quantised]:
                tensor, scale = row_scales.quantised(SMALL[quantised][0], tensor, scale)
            if linear and tensor.dtype in SCALED:
                scale = torch.ones(()) if scale is None else scale
                scales = [_one_number(part) for part in scale.expand(len(tensor), 1).chunk(len(ours))]
                state.update(zip([f"{part}_scale" for part in ours], scales, strict=True))
            else:
                tensor = row_scales.multiplied_out(tensor, scale).to(wanted[ours[0]].dtype)
        tensor = tensor.to(device)
        state.update(zip(ours, tensor.chunk(len(ours)), strict=True))  # experts are rows of one tensor, not copies
    module = build(network, config, dtype=dtype, operations=operations)
    target = module.vae if isinstance(module, (AudioVAE, VideoVAE)) else module
    target.load_state_dict(state, strict=True, assign=True)
    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    assert not left, left
    return module.eval().requires_grad_(False)


def _one_number(scale):
    """Return a scale [rows, 1] as [] where every row has the same."""
    return scale[0, 0] if (scale == scale[0]).all() else scale


def plan(network, checkpoint, prefix, wanted):
    """Return {file name: our names, in row order} that fills `wanted` exactly; CheckpointError where it cannot."""
    keys = KEY_MAPS[network]
    places, leftover, misshapen = {}, [], []
    for name, header in checkpoint.headers.items():
        inner = name[len(prefix) :]
        if not name.startswith(prefix) or inner in keys.computed:
            continue
        ours = split_names(keys.to_ours(inner), wanted)
        if not ours:
            leftover.append(name)
            continue
        shape = tuple(wanted[ours[0]].shape)
        shape = (shape[0] * len(ours), *shape[1:])
        if header.shape != shape:
            misshapen.append(f"{name} has shape {list(header.shape)}, expected {list(shape)}")
        places[name] = ours
    missing = sorted(set(wanted) - {ours for names in places.values() for ours in names})
    if missing:
        first = prefix + stacked_name(missing[0])
        _refuse(checkpoint, network, f"{len(missing)} tensors missing (first: {first})")
    if misshapen:
        _refuse(checkpoint, network, f"{len(misshapen)} tensors of another size (first: {misshapen[0]})")
    if leftover and not keys.extras:
        _refuse(checkpoint, network, f"{len(leftover)} tensors that have no place (first: {leftover[0]})")
    return places


def _refuse(checkpoint, network, fault):
    raise CheckpointError(
        f"{checkpoint.label}: {fault}; expected the {network} layout. Download it again, or check that it is not an "
        "adapter, one file of a set, or another model."
    )


def save_part(path, weights, part, config, variant, *, tokenizer=None):
    """Write one network as safetensors under its published tensor names, configuration in the header.

    weights: the module or its state dict. part: "dit", "text_encoder", "video_vae" or "audio_vae". tokenizer: a
    `tokenizer_definition` to carry along. The file appears whole or not at all; on Windows never in place of one that
    is loaded, here or elsewhere (PermissionError).
    """
    network = next(name for name, cls in CONFIGS.items() if isinstance(config, cls))
    if KEY_MAPS[network].part != part:
        raise ValueError(f"a {type(config).__name__} describes a {KEY_MAPS[network].part}, not a {part}")
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    metadata = part_metadata(part, config, variant, tokenizer)
    try:
        save_file(published_tensors(network, state, config), unfinished, metadata)
        put_in_place(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def part_metadata(part, config, variant, tokenizer=None):
    """Return the safetensors metadata of a file of ours, {str: str}; the arguments are those of `save_part`."""
    metadata = {
        "format": "pt",
        "happyhorse.part": part,
        "happyhorse.variant": variant,
        "happyhorse.config": json.dumps(config.to_dict()),
    }
    if tokenizer is not None:
        metadata["happyhorse.tokenizer"] = tokenizer
    return metadata


def published_tensors(network, state, config):
    """Return a state dict of ours under the published names, experts stacked, on the CPU."""
    state = {name.removeprefix("vae."): tensor.detach().cpu() for name, tensor in state.items()}
    published = {}
    for name in state:
        stacked = stacked_name(name)
        file_name = KEY_MAPS[network].to_file(stacked)
        if stacked == name:
            published[file_name] = state[name].contiguous()
        elif file_name not in published:
            published[file_name] = torch.cat([state[expert] for expert in expert_names(stacked)])
    if network == "dit":
        published["adapter.rope.bands"] = rotary_bands(config.head_dim)
    return published


def tokenizer_json(path):
    """Return the `tokenizer_definition` of a text encoder's file or folder; None without one."""
    return tokenizer_definition(Checkpoint.open(path))
