"""fp8 and int8 checkpoints of every style, a LoRA, how networks are compared, and what every quantised one does."""

import json

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from pack.model_loader.checkpoint import Checkpoint
from pack.model_loader.convert import convert
from pack.model_loader.row_scales import quantised, rotated_back
from pack.nodes import files
from pack.nodes.clip import load_clip
from pack.nodes.lora import register_lora_names
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
STRENGTH = 0.7  # of the LoRA
BAR = 0.04  # relative RMS a forward, fp8 against what it was made from
FP8_STYLES = ["ours", "magihuman", "plain", "rows", "wide"]
INT8_STYLES = ["int8", "int8_one_scale", "int8_rotated"]
STYLES = [*FP8_STYLES, *INT8_STYLES]
SHARED, EXPERTS = "block.layers.1.mlp.down_proj", "block.layers.0.attention.linear_proj"
ATTENTION = "block.layers.1.attention"
int8_products = pytest.mark.skipif(
    not hasattr(comfy.quant_ops.ck, "int8_linear"), reason="this ComfyUI's comfy-kitchen has no int8 products"
)


def is_linear(name):
    return name.startswith("block.") and "norm" not in name


def write_styles(source, folder):
    """Write the transformer `source` in fp8 and int8, once a style; return {style: path}."""
    convert(source, folder / "ours.safetensors", "fp8")
    convert(source, folder / "int8.safetensors", "int8")
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
    for name, options in (("int8_one_scale", {}), ("int8_rotated", {"convrot": True, "convrot_groupsize": 4})):
        save_file(int8_as_comfyui_has_it(load_file(source), **options), folder / f"{name}.safetensors", metadata)
    return {path.stem: path for path in folder.iterdir()}


def int8_as_comfyui_has_it(tensors, **options):
    """Quantise the linears of {name: tensor} with one scale each, or one a row and rotated; `comfy_quant` beside."""
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if is_linear(name):
            scale = tensor.abs().max() / 127
            values = (tensor / scale).round().to(torch.int8)
            if options:
                values, scale = quantised(torch.int8, rotated_back(tensor, options["convrot_groupsize"]))
            told = json.dumps({"format": "int8_tensorwise"} | options)
            stored[name], stored[f"{name}_scale"] = values, scale
            stored[f"{name.removesuffix('.weight')}.comfy_quant"] = torch.tensor(list(told.encode()), dtype=torch.uint8)
    return stored


def relative(found, wanted):
    """Return the relative RMS of two networks' outputs, the larger of picture and sound."""
    return max(((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(found, wanted, strict=True))


def forward(network):
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 48, 2, 4, 6), (1, 5, 64), (1, 7, network.config.text_in_channels))
    return network(*(torch.randn(shape, generator=generator) for shape in shapes))


def block_bytes(network):
    return comfy.model_management.module_size(network.block)


def nano_inputs(seed=1):
    """Pure noise and a real prompt's features, as nano's first step sees them."""
    clip = load_clip(files.NANO_WEIGHTS / files.TEXT_ENCODER.nano, "default")
    text = clip.encode_from_tokens_scheduled(clip.tokenize("A red ball bounces. It beeps."))[0][0]
    generator = torch.Generator().manual_seed(seed)
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


def check_streaming(patcher):
    """Assert that a network says the same with its weights where they are, streamed in, and back again."""
    network = patcher.model.diffusion_model
    whole = forward(network)
    patcher.load(CPU, lowvram_model_memory=1)
    streamed = forward(network)
    patcher.detach()
    for found in (streamed, forward(network)):
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def check_lora(model, by_hand, lora, error, check_merged):
    """Assert that a LoRA is added to the weights of a MODEL, and taken off again; `by_hand`: the same network, wide.

    Merged, the sum is rounded anew, within `error` and each time alike, and `check_merged()` is called; streamed, it is
    added in full as the layer runs.
    """
    file, deltas = lora
    network = model.model.diffusion_model
    before = forward(network)
    for layer, delta in deltas.items():
        by_hand.get_submodule(layer).weight += STRENGTH * delta
    wanted = forward(by_hand)
    assert relative(before, wanted) > 0.2
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, STRENGTH, 0.0)
    assert len(patched.patches) == len(deltas)
    merged = []
    for _ in range(2):
        patched.patch_model()
        merged.append(forward(network))
        check_merged()
        patched.unpatch_model()
    assert error / 20 < relative(merged[0], wanted) < error
    assert all(torch.equal(a, b) for a, b in zip(*merged, strict=True))
    patched.load(CPU, lowvram_model_memory=1)
    streamed = forward(network)
    patched.detach()
    for found, meant in ((streamed, wanted), (forward(network), before)):
        for a, b in zip(found, meant, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
