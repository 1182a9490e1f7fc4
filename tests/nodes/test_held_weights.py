"""A layer that takes a sequence in many pieces brings each weight once, and says what it says of the whole sequence."""

from collections import Counter

import comfy.ops
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from pack.model_loader import dit_layers, token_pieces
from pack.nodes import files, padded_rows
from pack.nodes.held_weights import held
from pack.nodes.host import load_model
from quantised_checks import CPU, STRENGTH, forward, relative

WAYS = {  # name: (file's style, quantised, whether a LoRA is added as the layers run)
    "int8": ("int8", "kept", False),
    "fp8": ("rows", "kept", False),
    "e5m2": ("wide", "kept", False),
    "fp8 fast": ("rows", "fp8 fast", False),
    "int8 fast": ("int8", "int8 fast", False),
    "int8, LoRA": ("int8", "kept", True),
    "wide, LoRA": (None, None, True),
}


@pytest.fixture
def pieces_of(monkeypatch):
    """Function: let at most so many tokens be one piece."""
    return lambda tokens: monkeypatch.setattr(token_pieces, "PIECE", tokens)


def linears_of(network):
    return {module: name for name, module in network.block.named_modules() if hasattr(module, "weight_function")}


@pytest.mark.parametrize("way", WAYS)
def test_pieces_bring_a_weight_once_and_say_the_same(way, quantised_files, weights, lora, pieces_of, monkeypatch):
    style, quantised, with_lora = WAYS[way]
    path = quantised_files[style] if style else weights / files.MODEL.nano
    model = load_model(path, torch.float32, quantised=quantised)
    if with_lora:
        model, _ = comfy.sd.load_lora_for_models(model, None, lora[0], STRENGTH, 0.0)
        model.load(CPU, lowvram_model_memory=1)
    network = model.model.diffusion_model
    linears = linears_of(network)
    pieces_of(3)  # 12 tokens of video, 5 of audio, 7 of text
    with torch.no_grad():
        assert [len(token_pieces.cut((12, 5, 7), experts)) for experts in (1, 3)] == [8, 4 + 2 + 3]
    with monkeypatch.context() as without:
        for layer in network.block.layers:
            without.setattr(layer.attention, "held", dit_layers.holding(torch.nn))
        every_time = forward(network)

    wide, added = Counter(), Counter()
    dequantize = comfy.quant_ops.QuantizedTensor.dequantize
    monkeypatch.setattr(
        comfy.quant_ops.QuantizedTensor, "dequantize", lambda self: wide.update([self.shape]) or dequantize(self)
    )
    for linear, name in linears.items():
        if linear.weight_function:
            linear.weight_function = [
                lambda weight, add=add, name=name: added.update([name]) or add(weight) for add in linear.weight_function
            ]
    found = forward(network)
    assert relative(found, every_time) == 0
    if quantised == "kept":
        assert 0 < wide.total() <= len(linears), "each weight is made wide once"
    if with_lora:
        assert added and set(added.values()) == {1}, "a LoRA is added to each weight once"
    assert relative(forward(network), found) == 0, "nothing is left behind"


def test_weights_that_are_where_they_should_be_are_left_alone(weights, pieces_of, monkeypatch):
    network = load_model(weights / files.MODEL.nano, torch.float32).model.diffusion_model
    whole = forward(network)
    pieces_of(3)
    monkeypatch.setattr("pack.nodes.held_weights._held", None)
    assert relative(forward(network), whole) < 1e-5


def test_an_error_inside_puts_the_weight_back(quantised_files, monkeypatch):
    model = load_model(quantised_files["int8"], torch.float32, quantised="kept")
    linear = next(iter(linears_of(model.model.diffusion_model)))
    own, given_back = linear.weight, []
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda layer, *brought: given_back.append(layer))
    with pytest.raises(MemoryError), held([linear], CPU):
        assert linear.weight is not own and not isinstance(linear.weight, comfy.quant_ops.QuantizedTensor)
        raise MemoryError
    assert linear.weight is own and given_back == [linear] and linear.weight_function == []


def test_operations_of_core_hold_nothing():
    assert padded_rows.Operations.HELD is held
    with dit_layers.holding(torch.nn)([], CPU):
        pass
