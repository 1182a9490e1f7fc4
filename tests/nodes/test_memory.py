"""Memory through the nodes: what a MODEL tells core and the user, and that the text encoder makes room."""

import comfy.model_management
import pytest
import torch
from pack.nodes import files, loaders
from pack.nodes.clip import load_clip
from pack.nodes.loaders import LoadModel
from pack.nodes.prompt import EncodePrompt
from pack.nodes.sampling import Sampler
from pack.nodes.super_resolution import SuperResolution
from pack.sampler.memory import encode_bytes, sampling_bytes

CPU = torch.device("cpu")


@pytest.fixture
def memory_of(monkeypatch):
    """Return function(bytes): every device says that it has so many."""
    return lambda size: monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device=None: size)


def test_core_is_told_what_sampling_takes(loaded):
    happyhorse = loaded[0].model
    config = happyhorse.diffusion_model.config
    assert happyhorse.memory_required([2, 1, 192 * 1000]) == sampling_bytes(config, 2 * (1000 + 640))


def test_the_sampler_warns_before_a_clip_does_not_fit(loaded, prompt, latent, notices, memory_of):
    memory_of(2**40)
    Sampler.execute(loaded[0], prompt, latent, 0, 1, 5.0)
    memory_of(10**5)
    Sampler.execute(loaded[0], prompt, latent, 0, 1, 5.0)
    assert notices[0] == notices[1].splitlines()[0]
    assert notices[1].splitlines()[1].startswith("64x32 of this length takes 0.0 GB")


def test_super_resolution_warns_at_its_own_size(model_of, prompt, latent, notices, memory_of):
    model = model_of("540p_sr", positions="v1")
    memory_of(10**5)
    SuperResolution.execute(model, prompt, latent, 0, {"size": "factor", "factor": 2.0}, 1, 5.0, 220, True, 1.0)
    assert "128x64 of this length takes 0.0 GB" in notices[0]


def test_the_loader_warns_of_weights_that_fit_nowhere(loaded, monkeypatch, memory_of):
    told = []
    monkeypatch.setattr(loaders, "notice", lambda node, message: told.append(message))
    memory_of(1000)
    LoadModel.execute(files.MODEL.nano, "fp32")
    memory_of(2**40)
    LoadModel.execute(files.MODEL.nano, "fp32")
    assert "The weights take" in told[0] and told[1] == told[0].splitlines()[0]


def test_the_text_encoder_gives_its_memory_back_to_the_sampler(loaded):
    """What core does before it loads a model that needs the room; then the encoder loads again by itself."""
    clip = loaded[1]
    before = EncodePrompt.execute(clip, "a red ball").args[0][0][0]
    assert clip.patcher in [entry.model for entry in comfy.model_management.current_loaded_models]
    comfy.model_management.free_memory(1e15, CPU)
    assert clip.patcher not in [entry.model for entry in comfy.model_management.current_loaded_models]
    assert torch.equal(EncodePrompt.execute(clip, "a red ball").args[0][0][0], before)


def test_the_text_encoder_runs_where_it_is_told_to(weights, monkeypatch):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(comfy.model_management, "text_encoder_device", lambda: card)
    path = weights / files.TEXT_ENCODER.nano
    assert load_clip(path, "default").patcher.load_device == card
    chosen = load_clip(path, "cpu").patcher
    assert chosen.load_device == chosen.offload_device == CPU


def test_core_is_told_what_encoding_takes_a_picture_less_than_a_clip(loaded):
    vae = loaded[2]
    picture, clip = (vae.memory_used_encode((1, 3, frames, 32, 64), torch.bfloat16) for frames in (1, 9))
    assert picture == encode_bytes(vae.first_stage_model.config, 1, 64, 32, torch.bfloat16) < clip / 4
    assert clip < vae.memory_used_decode((1, 48, 3, 2, 4), torch.bfloat16)
