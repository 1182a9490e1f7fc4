"""fp8 checkpoints of every style, a LoRA for them, and what two networks' outputs are compared by."""

import comfy.model_management
import torch
from pack.model_loader.checkpoint import Checkpoint
from pack.model_loader.convert import convert
from pack.nodes import files
from pack.nodes.clip import load_clip
from pack.nodes.lora import register_lora_names
from safetensors.torch import load_file, save_file

BAR = 0.04  # relative RMS a forward, fp8 against what it was made from
STYLES = ["ours", "magihuman", "plain", "rows", "wide"]
SHARED, EXPERTS = "block.layers.1.mlp.down_proj", "block.layers.0.attention.linear_proj"
ATTENTION = "block.layers.1.attention"


def is_linear(name):
    return name.startswith("block.") and "norm" not in name


def write_styles(source, folder):
    """Write the transformer `source` in fp8, once a style; return {style: path}."""
    convert(source, folder / "ours.safetensors", "fp8")
    metadata = Checkpoint.open(source).metadata
    plain, wide, magihuman, rows = ({} for _ in range(4))
    for name, tensor in load_file(source).items():
        for tensors in (plain, wide, magihuman, rows):
            tensors[name] = tensor
        if is_linear(name):
            plain[name], wide[name] = tensor.to(torch.float8_e4m3fn), tensor.to(torch.float8_e5m2)
            for tensors, scale, ending in (
                (magihuman, tensor.abs().max() / 448, ".__fp8_scale"),
                (rows, tensor.abs().amax(1, keepdim=True) / 448, "_scale"),
            ):
                tensors[name], tensors[name + ending] = (tensor / scale).to(torch.float8_e4m3fn), scale
    for name, tensors in {"plain": plain, "wide": wide, "magihuman": magihuman, "rows": rows}.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata)
    return {path.stem: path for path in folder.iterdir()}


def relative(found, wanted):
    """Return the relative RMS of two networks' outputs, the larger of picture and sound."""
    return max(((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(found, wanted, strict=True))


def forward(network):
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 48, 2, 4, 6), (1, 5, 64), (1, 7, network.config.text_in_channels))
    return network(*(torch.randn(shape, generator=generator) for shape in shapes))


def block_bytes(network):
    return comfy.model_management.module_size(network.block)


def nano_inputs():
    """Pure noise and a real prompt's features, as nano's first step sees them."""
    clip = load_clip(files.NANO_WEIGHTS / files.TEXT_ENCODER.nano, "default")
    text = clip.encode_from_tokens_scheduled(clip.tokenize("A red ball bounces. It beeps."))[0][0]
    generator = torch.Generator().manual_seed(1)
    return *(torch.randn(shape, generator=generator) for shape in ((1, 48, 13, 6, 6), (1, 51, 64))), text


def make_lora(network):
    """Return a LoRA on a shared layer, a stacked one of experts and the v rows of a fused one; the deltas it means."""
    register_lora_names()
    generator = torch.Generator().manual_seed(7)
    file, deltas = {}, {}
    width, rows_of_k = network.config.hidden_size, network.config.num_query_groups * network.config.head_dim

    def pair(name, rows, width):
        up, down = (torch.randn(shape, generator=generator) * 0.2 for shape in ((rows, 4), (4, width)))
        file[f"transformer.{name}.lora_B.weight"], file[f"transformer.{name}.lora_A.weight"] = up, down
        return up @ down

    deltas[SHARED] = pair(SHARED, *network.get_submodule(SHARED).weight.shape)
    for expert, delta in zip(("video", "audio", "text"), pair(EXPERTS, 3 * width, width).chunk(3), strict=True):
        deltas[f"{EXPERTS}.{expert}"] = delta
    fused = f"{ATTENTION}.linear_qkv"
    deltas[fused] = torch.zeros(network.get_submodule(fused).weight.shape)
    deltas[fused][width + rows_of_k :][:rows_of_k] = pair(f"{ATTENTION}.linear_v", rows_of_k, width)
    return file, deltas
