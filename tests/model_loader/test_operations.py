"""The networks built from ComfyUI's operations compute the same numbers, whole and with streamed weights."""

import pytest
import torch
from pack.model_loader.core_vae import core_class
from pack.model_loader.load import load_dit, load_text_encoder, load_video_vae, save_part

OPERATIONS = ["disable_weight_init", "manual_cast"]


def operations(name):
    return core_class("comfy.ops", name)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_dit(tmp_path, dit, clip, name, dtype):
    save_part(tmp_path / "dit.safetensors", dit, "dit", dit.config, "distill")
    plain = load_dit(tmp_path / "dit.safetensors", dtype=dtype)
    hosted = load_dit(tmp_path / "dit.safetensors", dtype=dtype, operations=operations(name))
    linears = [module for module in hosted.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all(isinstance(linear, operations(name).Linear) for linear in linears)
    assert hosted.adapter.video_embedder.weight.dtype == torch.float32
    assert hosted.block.layers[1].mlp.down_proj.weight.dtype == dtype
    for found, wanted in zip(hosted(*clip), plain(*clip), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_text_encoder(tmp_path, text_encoder, name, dtype):
    save_part(tmp_path / "text.safetensors", text_encoder, "text_encoder", text_encoder.config, "nano")
    plain = load_text_encoder(tmp_path / "text.safetensors", dtype=dtype)
    hosted = load_text_encoder(tmp_path / "text.safetensors", dtype=dtype, operations=operations(name))
    assert isinstance(hosted.embed_tokens, operations(name).Embedding)
    ids = torch.tensor([[1, 7, 30, 2, 9, 11]])
    assert torch.equal(hosted(ids), plain(ids))


@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_turbo(tmp_path, turbo, name):
    save_part(tmp_path / "turbo.safetensors", turbo, "video_vae", turbo.config, "turbo")
    hosted = load_video_vae(tmp_path / "turbo.safetensors", operations=operations(name))
    latent = torch.randn(1, 48, 3, 2, 2)
    assert torch.equal(hosted.decode(latent), turbo.decode(latent))


@torch.no_grad()
def test_layers_that_own_no_weight_before_they_are_loaded(tmp_path, dit, clip, text_encoder, monkeypatch):
    """What core's layers do on NVIDIA cards, where weights are streamed from the file."""
    layers = operations("disable_weight_init")
    monkeypatch.setattr(core_class("comfy", "memory_management"), "aimdo_enabled", True)
    assert layers.Linear(2, 2, device="meta").weight is None
    save_part(tmp_path / "dit.safetensors", dit, "dit", dit.config, "distill")
    save_part(tmp_path / "text.safetensors", text_encoder, "text_encoder", text_encoder.config, "nano")
    hosted = load_dit(tmp_path / "dit.safetensors", dtype=torch.float32, operations=layers)
    assert all(torch.equal(a, b) for a, b in zip(hosted(*clip), dit(*clip), strict=True))
    hosted = load_text_encoder(tmp_path / "text.safetensors", dtype=torch.float32, operations=layers)
    assert torch.equal(hosted(torch.tensor([[1, 7, 30]])), text_encoder(torch.tensor([[1, 7, 30]])))


@torch.no_grad()
def test_a_linear_may_be_streamed_while_the_norms_are_resident(tmp_path, dit, clip):
    """What core's patcher does when a card is too small: some Linears cast their weights at every call."""
    save_part(tmp_path / "dit.safetensors", dit, "dit", dit.config, "distill")
    hosted = load_dit(tmp_path / "dit.safetensors", operations=operations("disable_weight_init"))
    wanted = hosted(*clip)
    for module in hosted.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    assert all(torch.equal(a, b) for a, b in zip(hosted(*clip), wanted, strict=True))
    assert not [
        name for name, module in hosted.named_modules() if "norm" in name and hasattr(module, "comfy_cast_weights")
    ]


@torch.no_grad()
def test_under_cores_model_patcher(tmp_path, dit, clip):
    """Loaded by the patcher, moved away and loaded again, the network gives the same velocities."""
    patcher_class = core_class("comfy.model_patcher", "ModelPatcher")
    save_part(tmp_path / "dit.safetensors", dit, "dit", dit.config, "distill")
    hosted = load_dit(tmp_path / "dit.safetensors", operations=operations("disable_weight_init"))
    wanted = hosted(*clip)
    cpu = torch.device("cpu")
    patcher = patcher_class(hosted, load_device=cpu, offload_device=cpu)
    patcher.patch_model(device_to=cpu, lowvram_model_memory=patcher.model_size() // 2)
    assert all(torch.equal(a, b) for a, b in zip(hosted(*clip), wanted, strict=True))
    patcher.detach()
    assert all(torch.equal(a, b) for a, b in zip(hosted(*clip), wanted, strict=True))
