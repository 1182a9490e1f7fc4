"""fp8 by choice, from any file: weights alone, or products in fp8 too, with inputs quantised row by row."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from pack.model_loader.fp8_linear import with_fp8_linears
from pack.model_loader.load import load_dit
from pack.nodes import files, loaders
from pack.nodes.host import load_model
from pack.nodes.loaders import LoadModel
from quantised_checks import BAR, SHARED, STYLES, block_bytes, forward, nano_inputs, relative


@pytest.mark.parametrize("style", [*STYLES, "wide_file"])
def test_products_in_fp8_are_those_of_our_own_fp8_linears(fp8_files, weights, style):
    """Against `with_fp8_linears`, which quantises row by row; the sizes are no multiples of 16, so rows are padded."""
    path = weights / files.MODEL.nano if style == "wide_file" else fp8_files[style]
    network = load_model(path, torch.bfloat16, quantised="fp8 fast").model.diffusion_model
    out = forward(load_dit(path, dtype=torch.bfloat16))
    assert 0 < relative(forward(network), out) < 0.2
    weight = network.block.layers[1].attention.linear_qkv.weight
    assert weight.shape == (132, 64) and weight.storage_shape == (144, 64) and weight.nbytes == 144 * 64
    if style in ("rows", "wide_file"):
        ours = with_fp8_linears(load_dit(path, dtype=torch.float32))
        assert relative(forward(network), forward(ours)) < 1e-2


@pytest.mark.parametrize("mode", ["fp8", "fp8 fast"])
def test_a_wide_file_becomes_fp8_in_memory(weights, mode):
    path = weights / files.MODEL.nano
    network = load_model(path, torch.bfloat16, quantised=mode).model.diffusion_model
    half = block_bytes(load_dit(path, dtype=torch.bfloat16)) / 2
    assert half < block_bytes(network) < 1.15 * half  # a scale for every row of these narrow layers, and what is padded
    assert 0 < relative(forward(network), forward(load_dit(path, dtype=torch.bfloat16))) < 0.2
    assert network.adapter.text_embedder.weight.dtype == torch.float32


def test_nano_multiplied_in_fp8_is_near(loaded):
    nano = files.NANO_WEIGHTS / files.MODEL.nano
    fast = load_model(nano, torch.bfloat16, quantised="fp8 fast").model.diffusion_model
    inputs = nano_inputs()
    assert 0 < relative(fast(*inputs), load_dit(nano)(*inputs)) < BAR


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
    with pytest.raises(ValueError, match="fp8_e4m3fn, but cpu does not know fp8. Choose bf16"):
        LoadModel.execute(files.MODEL.nano, "fp8_e4m3fn")


def test_a_lora_is_merged_into_what_is_multiplied_and_taken_off_again(fp8_files, lora):
    file, deltas = lora
    model = load_model(fp8_files["rows"], torch.bfloat16, quantised="fp8 fast")
    network, by_hand = model.model.diffusion_model, load_dit(fp8_files["rows"], dtype=torch.float32)
    before = forward(network)
    for layer, delta in deltas.items():
        by_hand.get_submodule(layer).weight += 0.7 * delta
    wanted = forward(by_hand)
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, 0.7, 0.0)
    patched.patch_model()
    weight = network.get_submodule(f"{SHARED.rsplit('.', 2)[0]}.attention.linear_qkv").weight
    assert weight.shape == (132, 64) and weight.storage_shape == (144, 64)
    merged = forward(network)
    patched.unpatch_model()
    assert relative(before, wanted) > 0.2 > relative(merged, wanted)
    assert all(torch.equal(a, b) for a, b in zip(forward(network), before, strict=True))
