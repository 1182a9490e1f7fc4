"""GGUF files in a real ComfyUI: their blocks stay in memory and mean the same; streaming, LoRA, the text encoder."""

import json
import logging
import shutil
from dataclasses import replace

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_merging import save_checkpoint
from gguf_on_disk import write
from pack.model_loader.checkpoint import CheckpointError
from pack.model_loader.dit import DiT
from pack.model_loader.load import load_dit, load_text_encoder, published_tensors
from pack.model_loader.text_encoder import TextEncoder
from pack.nodes import loaders
from pack.nodes.clip import load_clip
from pack.nodes.host import load_model
from pack.nodes.loaders import LoadModel
from quantised_checks import block_bytes, check_lora, check_streaming, forward, make_lora

BITS = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "Q5_1": 6, "Q5_0": 5.5, "Q4_1": 5, "Q4_0": 4.5}


@pytest.fixture(scope="module")
def network(weights):
    """A transformer whose rows of 256 every kind of block fills; the MLP's, 680 columns, none: they become F16."""
    config = load_dit(weights / "nano_dit.safetensors").config
    torch.manual_seed(5)
    return DiT(replace(config, hidden_size=256, head_dim=32)).eval()


@pytest.fixture(scope="module")
def path_of(network, tmp_path_factory):
    """Function: kind -> the transformer as a .gguf file of it."""
    folder = tmp_path_factory.mktemp("gguf")

    def path_of(kind):
        path = folder / f"tiny_distill_{kind}.gguf"
        tensors = published_tensors("dit", network.state_dict(), network.config)
        return path if path.exists() else write(path, tensors, kind, "magihuman")

    return path_of


def blocks_of(network):
    return {name: w for name, w in network.named_parameters() if isinstance(w, comfy.quant_ops.QuantizedTensor)}


@pytest.mark.parametrize("kind", BITS)
def test_blocks_stay_as_they_are_and_mean_the_same(path_of, kind):
    for dtype in (torch.bfloat16, torch.float32):
        kept, wide = load_model(path_of(kind), dtype, quantised="kept"), load_dit(path_of(kind), dtype=dtype)
        network = kept.model.diffusion_model
        blocks, meant = blocks_of(network), dict(wide.named_parameters())
        assert len(blocks) > 10 and all(torch.equal(w.dequantize(), meant[name]) for name, w in blocks.items())
        saved = sum(meant[name].nbytes - w.numel() * BITS[kind] / 8 for name, w in blocks.items())
        assert (
            0 <= block_bytes(network) - (block_bytes(wide) - saved) <= 40 * len(blocks)
        )  # core keeps the format's name
        assert kept.model_size() == comfy.model_management.module_size(kept.model)
        for found, wanted in zip(forward(network), forward(wide), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_streamed_weights_give_the_same(path_of):
    check_streaming(load_model(path_of("Q4_K"), torch.bfloat16, quantised="kept"))


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.02), ("Q6_K", 0.06), ("Q4_K", 0.2), ("Q4_0", 0.25)])
def test_a_lora_is_added_to_the_weights_and_taken_off_again(network, path_of, kind, error):
    """Merged, the sum becomes blocks of the same kind."""
    path, dtype = path_of(kind), torch.float32
    model, by_hand = load_model(path, dtype, quantised="kept"), load_dit(path, dtype=dtype)
    size = block_bytes(model.model.diffusion_model)

    def check_merged():
        assert block_bytes(model.model.diffusion_model) == size

    check_lora(model, by_hand, make_lora(network), error, check_merged)


@pytest.fixture
def listed(borrowed, path_of):
    """A Q6_K file in ComfyUI's folder."""
    path = borrowed / "distill_q6.gguf"
    shutil.copy(path_of("Q6_K"), path)
    return path.name


def test_the_loader_keeps_blocks_unless_told_otherwise_and_says_so(loaded, listed, monkeypatch):
    told = []
    monkeypatch.setattr(loaders, "notice", lambda node, message: told.append(message))
    sizes = {}
    for choice in ("default", "bf16", "fp8_e4m3fn"):
        model = LoadModel.execute(listed, choice).args[0]
        sizes[choice] = block_bytes(model.model.diffusion_model)
        again = model.cached_patcher_init
        assert again[0](*again[1]).model_size() == model.model_size()
    assert sizes["default"] < 0.8 * sizes["bf16"] and sizes["fp8_e4m3fn"] < 0.6 * sizes["bf16"]
    ends = ("Weights: GGUF (Q6_K), computed in fp32", "Weights: bf16", "Weights: fp8, computed in fp32")
    assert all(message.endswith(end) for message, end in zip(told, ends, strict=True))


def test_what_comfyui_saves_of_it_is_refused_with_what_to_do(loaded, listed, borrowed):
    save_checkpoint(
        LoadModel.execute(listed, "default").args[0], filename_prefix="distill_saved", output_dir=str(borrowed)
    )
    (saved,) = (path.name for path in borrowed.glob("distill_saved*"))
    with pytest.raises(CheckpointError, match=f"{saved}: .* is quantised as .*HappyHorseGgufQ6_K.*weight_dtype bf16"):
        LoadModel.execute(saved, "default")


def test_without_comfy_kitchen_blocks_are_multiplied_out_and_the_log_says_why(loaded, listed, monkeypatch, caplog):
    monkeypatch.setattr(comfy.quant_ops, "QuantizedTensor", type("QuantizedTensor", (), {}))
    with caplog.at_level(logging.WARNING):
        model = LoadModel.execute(listed, "default").args[0]
    told = "distill_q6.gguf: its GGUF weights do not stay GGUF and take more memory, because "
    assert caplog.text.count(told + "comfy-kitchen is missing") == 1
    assert type(model.model.diffusion_model.block.layers[1].attention.linear_proj.weight) is torch.nn.Parameter


def test_the_text_encoder_stays_small_too(weights, tmp_path):
    config = load_text_encoder(weights / "nano_text_encoder.safetensors").config
    torch.manual_seed(6)
    encoder = TextEncoder(replace(config, hidden_size=256, intermediate_size=512)).eval()
    tensors = published_tensors("text_encoder", encoder.state_dict(), encoder.config)
    pieces = ["<unk>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789ABC"]
    path = write(tmp_path / "t5.gguf", tensors, "Q6_K", vocabulary=(pieces, [2, *[1] * (config.vocab_size - 1)]))
    (tmp_path / "config.json").write_text(json.dumps({"encoder": encoder.config.to_dict()}))
    found, wide = load_clip(path, "default", "kept"), load_text_encoder(path, dtype=torch.float32)
    tokens = found.tokenize("abc")
    ids = torch.tensor([[entry[0] for entry in tokens["t5gemma"][0]]])
    network = found.cond_stage_model.network
    torch.testing.assert_close(found.encode_from_tokens_scheduled(tokens)[0][0], wide(ids), atol=1e-6, rtol=1e-6)
    assert len(blocks_of(network)) == 6 * config.num_layers  # all but o_proj's, whose rows of 64 fill no block
    assert comfy.model_management.module_size(network.layers) < 0.25 * comfy.model_management.module_size(wide.layers)
