"""fp8 and int8 by choice, from any file: weights alone, or products in them too, inputs quantised row by row."""

import statistics

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from comfy.model_management import module_size
from pack.model_loader import token_pieces
from pack.model_loader.fp8_linear import with_fp8_linears
from pack.model_loader.load import load_dit
from pack.model_loader.row_scales import quantised
from pack.nodes import files, loaders, weight_dtypes
from pack.nodes.host import load_model
from pack.nodes.loaders import LoadCheckpoint, LoadModel, LoadTextEncoder
from pack.nodes.scaled_rows import Fp8ScaledRows, Int8ScaledRows
from pack.nodes.weight_dtypes import why_no_faster
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
            values, scale = quantised(torch.int8, x)
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


NANO_BARS = [
    *[("fp8", BAR), ("fp8 fast", BAR), ("int8", BAR / 3)],
    pytest.param("int8 fast", BAR / 2, marks=int8_products),
]


@pytest.mark.parametrize(("mode", "bar"), NANO_BARS)
def test_nano_in_them_is_near(loaded, mode, bar):
    nano = files.NANO_WEIGHTS / files.MODEL.nano
    small, wide = load_model(nano, torch.bfloat16, quantised=mode).model.diffusion_model, load_dit(nano)
    errors = [relative(small(*inputs), wide(*inputs)) for inputs in map(nano_inputs, range(8))]
    assert 0 < min(errors) and statistics.fmean(errors) < bar  # with other noise int8 fast is off by 1.6 to 2.2 %


@pytest.mark.parametrize(("stored", "chosen"), [("ours", "int8"), ("int8", "fp8"), ("int8_rotated", "fp8")])
def test_a_file_of_one_kind_becomes_the_other(quantised_files, stored, chosen):
    network = load_model(quantised_files[stored], torch.float32, quantised=chosen).model.diffusion_model
    dtype = torch.int8 if chosen == "int8" else torch.float8_e4m3fn
    assert network.get_submodule(SHARED).weight.storage_dtype == dtype
    assert 0 < relative(forward(network), forward(load_dit(quantised_files[stored], dtype=torch.float32))) < 0.2


@pytest.mark.parametrize("piece", [token_pieces.PIECE, 10])
@pytest.mark.parametrize("mode", [*MODES, None])
def test_a_layer_is_compiled_whole(weights, monkeypatch, mode, piece):
    monkeypatch.setattr(token_pieces, "PIECE", piece)  # tokens: 10 of 24, so that there are several
    network = load_model(weights / files.MODEL.nano, torch.bfloat16, quantised=mode).model.diffusion_model
    before = forward(network)
    torch.compiler.reset()
    for layer in network.block.layers[:2]:  # with experts, and without
        layer.compile(backend="eager", fullgraph=True)  # raises where it would have to break it
    assert relative(forward(network), before) < 1e-2


@pytest.fixture
def told(monkeypatch):
    """List that collects what the loader tells."""
    lines = []
    monkeypatch.setattr(loaders, "notice", lambda node, message: lines.append(message))
    return lines


@pytest.mark.parametrize("kind", ["fp8_e4m3fn", pytest.param("int8", marks=int8_products)])
def test_the_loader_multiplies_in_them_where_that_is_faster_and_says_so(loaded, told, monkeypatch, kind):
    word = kind[:4].rstrip("_")
    wide = LoadModel.execute(files.MODEL.nano, "default").args[0]
    weights = LoadModel.execute(files.MODEL.nano, kind).args[0]
    assert weights.model_size() < 0.6 * wide.model_size()
    assert LoadModel.execute(files.MODEL.nano, f"{kind}_fast").args[0] is weights
    reason = (
        "cpu, or its PyTorch, does not do that" if word == "fp8" else "comfy-kitchen has no kernels for that on cpu"
    )
    assert told[1].endswith(f"Weights: {word}, computed in fp32")
    assert f"Weights: {word}, computed in fp32; not multiplied in {word}, because {reason}" in told[2]
    monkeypatch.setattr(weight_dtypes, "why_no_faster", lambda kind: None)
    fast = LoadModel.execute(files.MODEL.nano, f"{kind}_fast").args[0]
    assert told[3].endswith(f"Weights: {word}, multiplied in {word}")
    again = fast.cached_patcher_init
    assert again[1][-1] == f"{word} fast" and again[0](*again[1]).model_size() == fast.model_size()


@int8_products
def test_int8_products_are_comfy_kitchens_wherever_it_has_kernels(monkeypatch):
    for name, disabled, faster in (("cuda", False, True), ("cuda", True, False), ("eager", False, False)):
        backends = {name: {"available": True, "disabled": disabled, "capabilities": ["int8_linear"]}}
        monkeypatch.setattr(comfy.quant_ops.ck, "list_backends", lambda backends=backends: backends)
        assert (why_no_faster("int8") is None) == faster


def test_what_cannot_be_had_is_refused_with_what_can(loaded, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: dtype.itemsize > 1)
    with pytest.raises(ValueError, match="fp8_e4m3fn, but cpu does not know fp8. Choose int8"):
        LoadModel.execute(files.MODEL.nano, "fp8_e4m3fn")
    monkeypatch.delattr(comfy.quant_ops.ck, "int8_linear", raising=False)
    with pytest.raises(
        ValueError, match="int8_fast, but this ComfyUI's comfy-kitchen has no int8 products.*Choose int8"
    ):
        LoadModel.execute(files.MODEL.nano, "int8_fast")
    monkeypatch.setattr(comfy.quant_ops, "QuantizedTensor", type("QuantizedTensor", (), {}))
    with pytest.raises(ValueError, match="int8, but comfy-kitchen is missing.*Choose default"):
        LoadModel.execute(files.MODEL.nano, "int8")


@pytest.mark.parametrize("choice", ["int8", "fp8_e4m3fn"])
def test_the_text_encoder_becomes_small_by_choice_from_either_loader(loaded, choice):
    wide = LoadTextEncoder.execute(files.TEXT_ENCODER.nano, "default").args[0]
    small = LoadTextEncoder.execute(files.TEXT_ENCODER.nano, "default", choice).args[0]
    names = [part.nano for part in files.PARTS]
    again = LoadCheckpoint.execute(*names, "default", "default", text_encoder_dtype=choice).args[1]
    assert again is small and wide is not small
    sizes = [module_size(clip.cond_stage_model.network.layers) for clip in (small, wide)]
    assert sizes[0] < 0.35 * sizes[1]
    features = [clip.encode_from_tokens_scheduled(clip.tokenize("a red ball"))[0][0] for clip in (small, wide)]
    assert 0 < relative([features[0]], [features[1]]) < (0.02 if choice == "int8" else 0.08)


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


@pytest.mark.parametrize("layout", [Int8ScaledRows, Fp8ScaledRows])
def test_after_a_lora_numbers_are_rounded_up_or_down_by_chance(layout):
    """So that what is smaller than half a step is not lost everywhere; core gives a seed for each layer."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

    def rounded(seed):
        values, params = layout.quantize(weight, scale="recalculate", stochastic_rounding=seed)
        return layout.dequantize(values, params)

    assert torch.equal(rounded(7), rounded(7)) and not torch.equal(rounded(7), rounded(8))
    mean = torch.stack([rounded(seed) for seed in range(1, 65)]).mean(0)
    assert (mean - weight).norm() < 0.3 * (rounded(0) - weight).norm()
