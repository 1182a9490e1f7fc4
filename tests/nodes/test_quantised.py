"""fp8 and int8 files in a real ComfyUI: half of bf16's memory, the same velocities; LoRA, streaming, core's reader."""

import copy
import json
import logging

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.utils
import pytest
import torch
from pack.model_loader.checkpoint import Checkpoint
from pack.model_loader.convert import convert
from pack.model_loader.load import load_dit, load_text_encoder, tokenizer_json
from pack.model_loader.row_scales import rotated_back
from pack.nodes import files, loaders
from pack.nodes.clip import load_clip
from pack.nodes.host import load_model
from pack.nodes.loaders import LoadModel
from pack.nodes.sampling import Sampler
from quantised_checks import (
    BAR,
    SHARED,
    STYLES,
    block_bytes,
    check_lora,
    check_streaming,
    forward,
    int8_products,
    nano_inputs,
    relative,
)
from safetensors.torch import load_file

FP8 = torch.float8_e4m3fn
INT8_FAST = pytest.param("int8", "int8 fast", marks=int8_products)
NO_KITCHEN = (comfy.quant_ops, "QuantizedTensor", type("QuantizedTensor", (), {}), "comfy-kitchen is missing")


@pytest.mark.parametrize("style", STYLES)
def test_it_takes_half_the_memory_and_means_the_same(quantised_files, style):
    kept = load_model(quantised_files[style], torch.float32, quantised="kept")
    network, out = kept.model.diffusion_model, load_dit(quantised_files[style], dtype=torch.float32)
    half = block_bytes(load_dit(quantised_files[style], dtype=torch.bfloat16)) / 2
    assert half < block_bytes(network) < 1.1 * half  # norms stay fp32; scales and the format's name
    assert kept.model_size() == comfy.model_management.module_size(kept.model)
    if style == "int8_rotated":  # rotated back and rounded anew
        assert 0 < relative(forward(network), forward(out)) < 0.03
    else:
        for found, wanted in zip(forward(network), forward(out), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_computed_in_bf16_it_is_as_near_as_bf16_is(quantised_files, style):
    kept = load_model(quantised_files[style], torch.bfloat16, quantised="kept")
    network, out = kept.model.diffusion_model, forward(load_dit(quantised_files[style], dtype=torch.bfloat16))
    assert network.adapter.text_embedder.weight.dtype == network.final_linear_video.weight.dtype == torch.float32
    assert relative(forward(network), out) < (0.03 if style == "int8_rotated" else 0.01)


@pytest.mark.parametrize(("dtype", "bar"), [("fp8", BAR), ("int8", BAR / 3)])
def test_nano_is_within_the_bar(tmp_path, dtype, bar):
    """On pure noise, as the first step sees it, in bf16. Random weights are further off: fp8 has three bits."""
    nano = files.NANO_WEIGHTS / files.MODEL.nano
    convert(nano, tmp_path / "nano_dit.safetensors", dtype)
    inputs = nano_inputs()
    kept = load_model(tmp_path / "nano_dit.safetensors", torch.bfloat16, quantised="kept").model.diffusion_model
    assert 0 < relative(kept(*inputs), load_dit(nano)(*inputs)) < bar


@pytest.fixture(params=["fp8", "int8"])
def kind(request):
    """What `listed` is quantised as."""
    return request.param


@pytest.fixture
def listed(borrowed, quantised_files, kind):
    """The file that `convert` wrote, in ComfyUI's folder."""
    path = borrowed / f"distill_{kind}.safetensors"
    path.write_bytes(quantised_files["ours" if kind == "fp8" else "int8"].read_bytes())
    return path.name


def test_the_loader_keeps_them_unless_another_dtype_is_chosen_and_says_so(loaded, listed, kind, monkeypatch):
    told = []
    monkeypatch.setattr(loaders, "notice", lambda node, message: told.append(message))
    kept = LoadModel.execute(listed, "default").args[0]
    assert LoadModel.execute(listed, "default").args[0] is kept
    chosen = LoadModel.execute(listed, "bf16").args[0]
    LoadModel.execute(files.MODEL.nano, "default")
    assert told == [
        *[f"Variant: distill. Weights: {kind}, computed in fp32"] * 2, "Variant: distill. Weights: bf16",
        "Variant: distill. Weights: fp32",
    ]  # fmt: skip
    weight = "block.layers.1.mlp.down_proj.weight"
    found, meant = (model.model.diffusion_model.get_parameter(weight) for model in (kept, chosen))
    assert meant.dtype == torch.bfloat16 and found.nbytes * 2 == meant.nbytes
    assert torch.equal(found.dequantize().bfloat16(), meant)
    again = kept.cached_patcher_init
    assert block_bytes(again[0](*again[1]).model.diffusion_model) == block_bytes(kept.model.diffusion_model)


@pytest.mark.parametrize(
    ("kind", "place", "name", "stand_in", "reason"),
    [
        ("fp8", *NO_KITCHEN),
        ("fp8", comfy.model_management, "supports_cast", lambda device, dtype: dtype != FP8, "cpu does not know fp8"),
        ("int8", *NO_KITCHEN),
    ],
    indirect=["kind"],
)
def test_where_they_cannot_stay_they_are_multiplied_out_and_the_log_says_why(
    listed, kind, monkeypatch, caplog, place, name, stand_in, reason
):
    """What core has where comfy-kitchen is missing, and what it says of Apple's GPUs."""
    monkeypatch.setattr(place, name, stand_in)
    with caplog.at_level(logging.WARNING):
        model = LoadModel.execute(listed, "default").args[0]
    told = f"distill_{kind}.safetensors: its {kind} weights do not stay {kind} and take more memory, because "
    assert caplog.text.count(told + reason) == 1
    assert ("Choose weight_dtype int8" in caplog.text) == (reason == "cpu does not know fp8")
    assert model.model.diffusion_model.block.layers[1].mlp.down_proj.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("style", "mode"),
    [*((style, "kept") for style in STYLES), ("ours", "fp8 fast"), ("rows", "fp8 fast"), INT8_FAST],
)
def test_streamed_weights_give_the_same(quantised_files, style, mode):
    patcher = load_model(quantised_files[style], torch.bfloat16, quantised=mode)
    check_streaming(patcher)


def test_seeds_are_reproducible(quantised_files, latent, prompt):
    runs = []
    for _ in range(2):
        model = load_model(quantised_files["ours"], torch.bfloat16, quantised="kept")
        runs += [Sampler.execute(model, prompt, latent, 3, 2, 5.0).args[0]["samples"].unbind() for _ in range(2)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("style", STYLES[:-1])  # in memory rotated int8 is as any
def test_a_lora_is_added_to_the_weights_and_taken_off_again(quantised_files, lora, style):
    model = load_model(quantised_files[style], torch.float32, quantised="kept")
    by_hand = load_dit(quantised_files[style], dtype=torch.float32)

    def check_merged():
        for weight in (model.model.diffusion_model.get_submodule(layer).weight for layer in lora[1]):
            assert weight.nbytes == weight.numel()
            assert weight.params.scale.shape == (() if style == "wide" else (len(weight), 1))  # e5m2 is left to core

    check_lora(model, by_hand, lora, 0.08, check_merged)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_the_text_encoder_stays_quantised_too(weights, tmp_path, dtype):
    source, target = weights / files.TEXT_ENCODER.nano, tmp_path / "t5gemma.safetensors"
    convert(source, target, dtype)
    assert tokenizer_json(target) is not None
    found, wanted = load_clip(target, "default", "kept"), load_text_encoder(target, dtype=torch.float32)
    tokens = found.tokenize("a red ball")
    ids = torch.tensor([[entry[0] for entry in tokens["t5gemma"][0]]])
    network = found.cond_stage_model.network
    torch.testing.assert_close(found.encode_from_tokens_scheduled(tokens)[0][0], wanted(ids), atol=1e-6, rtol=1e-6)
    assert comfy.model_management.module_size(network.layers) < 0.3 * comfy.model_management.module_size(wanted.layers)


@pytest.mark.parametrize(("style", "form"), [("ours", "float8_e4m3fn"), ("int8", "int8_tensorwise")])
def test_core_itself_reads_the_layers_that_convert_writes(quantised_files, style, form):
    if form not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {form}")
    path, layer = quantised_files[style], SHARED
    state, _ = comfy.utils.convert_old_quants(load_file(path), metadata=dict(Checkpoint.open(path).metadata))
    assert json.loads(state[f"{layer}.comfy_quant"].numpy().tobytes()) == {"format": form}
    state = {name.removeprefix(f"{layer}."): tensor for name, tensor in state.items() if name.startswith(layer)}
    rows, width = state["weight"].shape
    linear = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear(width, rows, bias=False)
    linear.load_state_dict(copy.copy(state))
    meant = load_dit(path, dtype=torch.float32).get_submodule(layer).weight
    assert torch.equal(linear.weight.dequantize(), meant)


def test_int8_that_core_rotated_is_rotated_back():
    layout = getattr(comfy.quant_ops, "TensorWiseINT8Layout", None)
    if layout is None:
        pytest.skip("this ComfyUI has no int8_tensorwise")
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    values, params = layout.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=64)
    found = rotated_back(values * params.scale, 64)
    torch.testing.assert_close(found, layout.dequantize(values, params), atol=1e-5, rtol=1e-5)
    assert relative([found], [weight]) < 0.02
