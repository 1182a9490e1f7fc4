"""fp8 and int8 by choice, from any file: weights alone, or products in them too, inputs quantised row by row."""

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from pack.model_loader.fp8_linear import with_fp8_linears
from pack.model_loader.int8 import quantise_int8
from pack.model_loader.load import load_dit
from pack.nodes import files, loaders
from pack.nodes.host import load_model
from pack.nodes.loaders import LoadModel
from quantised_checks import (
    ATTENTION,
    BAR,
    CPU,
    FP8_STYLES,
    SHARED,
    block_bytes,
    forward,
    int8_products,
    nano_inputs,
    relative,
)

MODES = ["fp8", "fp8 fast", "int8", pytest.param("int8 fast", marks=int8_products)]


@pytest.mark.parametrize("style", [*FP8_STYLES, "wide_file"])
def test_products_in_fp8_are_those_of_our_own_fp8_linears(quantised_files, weights, style):
    """Against `with_fp8_linears`, which quantises row by row; the sizes are no multiples of 16, so rows are padded."""
    path = weights / files.MODEL.nano if style == "wide_file" else quantised_files[style]
    network = load_model(path, torch.bfloat16, quantised="fp8 fast").model.diffusion_model
    out = forward(load_dit(path, dtype=torch.bfloat16))
    assert 0 < relative(forward(network), out) < 0.2
    weight = network.block.layers[1].attention.linear_qkv.weight
    assert weight.shape == (132, 64) and weight.storage_shape == (144, 64) and weight.nbytes == 144 * 64
    if style in ("rows", "wide_file"):
        ours = with_fp8_linears(load_dit(path, dtype=torch.float32))
        assert relative(forward(network), forward(ours)) < 1e-2


@int8_products
def test_products_in_int8_are_of_rounded_rows(quantised_files):
    """A layer of 132 rows and the narrowest one, in fp32, where nothing but int8 is rounded."""
    for style in ("int8", "int8_one_scale"):
        network = load_model(quantised_files[style], torch.float32, quantised="int8 fast").model.diffusion_model
        wide = load_dit(quantised_files[style], dtype=torch.float32)
        for layer in (f"{ATTENTION}.linear_qkv", SHARED):
            linear, meant = network.get_submodule(layer), wide.get_submodule(layer).weight
            x = torch.randn(2, 5, meant.shape[1], generator=torch.Generator().manual_seed(0))
            values, scale = quantise_int8(x)
            torch.testing.assert_close(linear(x), (values * scale) @ meant.t(), atol=1e-4, rtol=1e-4)
            assert linear.weight.storage_shape == tuple(-(-size // 16) * 16 for size in meant.shape)


@pytest.mark.parametrize("mode", MODES)
def test_a_wide_file_becomes_small_in_memory(weights, mode):
    path = weights / files.MODEL.nano
    network = load_model(path, torch.bfloat16, quantised=mode).model.diffusion_model
    half = block_bytes(load_dit(path, dtype=torch.bfloat16)) / 2
    assert half < block_bytes(network) < 1.15 * half  # a scale for every row of these narrow layers, and what is padded
    error = relative(forward(network), forward(load_dit(path, dtype=torch.bfloat16)))
    assert 0 < error < (0.2 if "fp8" in mode else 0.06)
    assert network.adapter.text_embedder.weight.dtype == torch.float32


@pytest.mark.parametrize(("mode", "bar"), [("fp8 fast", BAR), pytest.param("int8 fast", BAR / 2, marks=int8_products)])
def test_nano_multiplied_in_them_is_near(loaded, mode, bar):
    nano = files.NANO_WEIGHTS / files.MODEL.nano
    fast = load_model(nano, torch.bfloat16, quantised=mode).model.diffusion_model
    inputs = nano_inputs()
    assert 0 < relative(fast(*inputs), load_dit(nano)(*inputs)) < bar


@pytest.mark.parametrize(("stored", "chosen"), [("ours", "int8"), ("int8", "fp8"), ("int8_rotated", "fp8")])
def test_a_file_of_one_kind_becomes_the_other(quantised_files, stored, chosen):
    network = load_model(quantised_files[stored], torch.float32, quantised=chosen).model.diffusion_model
    dtype = torch.int8 if chosen == "int8" else torch.float8_e4m3fn
    assert network.get_submodule(SHARED).weight.storage_dtype == dtype
    assert 0 < relative(forward(network), forward(load_dit(quantised_files[stored], dtype=torch.float32))) < 0.2


@int8_products
def test_the_loader_offers_int8(loaded, monkeypatch):
    told = []
    monkeypatch.setattr(loaders, "notice", lambda node, message: told.append(message))
    wide = LoadModel.execute(files.MODEL.nano, "default").args[0]
    for choice in ("int8", "int8_fast"):
        model = LoadModel.execute(files.MODEL.nano, choice).args[0]
        assert model.model_size() < 0.6 * wide.model_size()
        again = model.cached_patcher_init
        assert again[0](*again[1]).model_size() == model.model_size()
    assert told[1].endswith("Weights: int8, computed in fp32")
    assert "rounded to int8 for nothing, because comfy-kitchen has no int8 kernels here" in told[2]
    for disabled in (False, True):
        cuda = {"available": True, "disabled": disabled, "capabilities": ["int8_linear"]}
        backends = {"eager": cuda | {"disabled": False}, "cuda": cuda}
        monkeypatch.setattr(comfy.quant_ops.ck, "list_backends", lambda backends=backends: backends)
        LoadModel.execute(files.MODEL.nano, "int8_fast")
        assert told[-1].endswith("Weights: int8, multiplied in int8") != disabled
    monkeypatch.delattr(comfy.quant_ops.ck, "int8_linear")
    with pytest.raises(
        ValueError, match="int8_fast, but this ComfyUI's comfy-kitchen has no int8 products.*Choose int8"
    ):
        LoadModel.execute(files.MODEL.nano, "int8_fast")


def test_the_loader_offers_cores_names_for_fp8(loaded, monkeypatch):
    told = []
    monkeypatch.setattr(loaders, "notice", lambda node, message: told.append(message))
    wide = LoadModel.execute(files.MODEL.nano, "default").args[0]
    for choice in ("fp8_e4m3fn", "fp8_e4m3fn_fast"):
        model = LoadModel.execute(files.MODEL.nano, choice).args[0]
        assert model.model_size() < 0.6 * wide.model_size()
        again = model.cached_patcher_init
        assert again[0](*again[1]).model_size() == model.model_size()
    assert told[1].endswith("Weights: fp8, computed in fp32")
    assert "rounded to fp8 for nothing, because cpu does not multiply it" in told[2]
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: dtype.itemsize > 1)
    with pytest.raises(ValueError, match="fp8_e4m3fn, but cpu does not know fp8. Choose int8"):
        LoadModel.execute(files.MODEL.nano, "fp8_e4m3fn")


@pytest.mark.parametrize(
    ("style", "mode", "error"),
    [("rows", "fp8 fast", 0.2), pytest.param("int8", "int8 fast", 0.05, marks=int8_products)],
)
def test_a_lora_is_merged_into_what_is_multiplied_and_taken_off_again(quantised_files, lora, style, mode, error):
    file, deltas = lora
    model = load_model(quantised_files[style], torch.bfloat16, quantised=mode)
    network, by_hand = model.model.diffusion_model, load_dit(quantised_files[style], dtype=torch.float32)
    before = forward(network)
    for layer, delta in deltas.items():
        by_hand.get_submodule(layer).weight += 0.7 * delta
    wanted = forward(by_hand)
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, 0.7, 0.0)
    patched.patch_model()
    weight = network.get_submodule(f"{ATTENTION}.linear_qkv").weight
    assert weight.shape == (132, 64) and weight.storage_shape == (144, 64)
    merged = forward(network)
    patched.unpatch_model()
    assert relative(before, wanted) > error > relative(merged, wanted)
    assert all(torch.equal(a, b) for a, b in zip(forward(network), before, strict=True))
    patched.load(CPU, lowvram_model_memory=1)  # added as the layer runs, whose product is in bf16 then
    assert relative(forward(network), wanted) < error
    patched.detach()
