"""Tiny networks of every kind, with random weights from a fixed seed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pack.model_loader.checkpoint import Checkpoint
from pack.model_loader.config import DISTILL, SR_1080P, STABLE_AUDIO, T5GEMMA_9B, TURBO_7_7, WAN22_VAE
from pack.model_loader.core_vae import AudioVAE, VideoVAE, initialise
from pack.model_loader.detect import DIT_VARIANTS
from pack.model_loader.dit import DiT
from pack.model_loader.text_encoder import TextEncoder
from pack.model_loader.turbo_vae import TurboVAE
from pack.verify.case import GOLDEN

sys.path.append(str(Path(__file__).parent))  # for the files written by *_on_disk.py

TINY = {
    "num_layers": 4,
    "hidden_size": 64,
    "head_dim": 16,
    "num_query_groups": 2,
    "text_in_channels": 24,
    "expert_layers": (0, 3),
    "gelu7_layers": (0,),
}
TINY_DIT = replace(DISTILL, **TINY)
TINY_SR = replace(SR_1080P, **TINY, local_attention_layers=(0, 1, 2), frame_receptive_field=1)
TINY_TEXT = replace(
    T5GEMMA_9B,
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=20,
    sliding_window=4,
)
TINY_TURBO = replace(
    TURBO_7_7, block_out_channels=(16, 12, 8, 8), layers_per_block=(2, 1, 1, 2, 1), first_chunk_size=2, step_size=3
)
TINY_WAN = replace(WAN22_VAE, dim=4, dec_dim=8, num_res_blocks=1)
TINY_OOBLECK = replace(STABLE_AUDIO, channels=2, c_mults=(1, 2, 2, 3, 4))


def scatter_norms(network):
    """Move norm weights off zero, so that a mix-up of experts or a lost weight shows."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.3)
    return network


@pytest.fixture
def dit():
    torch.manual_seed(0)
    return scatter_norms(DiT(TINY_DIT)).eval()


@pytest.fixture
def sr_dit():
    torch.manual_seed(1)
    return scatter_norms(DiT(TINY_SR)).eval()


@pytest.fixture
def text_encoder():
    torch.manual_seed(2)
    return scatter_norms(TextEncoder(TINY_TEXT)).eval()


@pytest.fixture
def turbo():
    torch.manual_seed(3)
    return TurboVAE(TINY_TURBO).eval()


@pytest.fixture
def wan():
    torch.manual_seed(4)
    return initialise(VideoVAE(TINY_WAN)).eval()


@pytest.fixture
def oobleck():
    torch.manual_seed(5)
    return initialise(AudioVAE(TINY_OOBLECK)).eval()


@pytest.fixture
def tiny(request):
    """Return function(network) -> a tiny one: a DiT's variant, or a part as its published files describe it."""

    def make(network):
        if network == "turbo":  # chunks of the released size, which files without a JSON are taken to have
            turbo = TurboVAE(replace(TINY_TURBO, first_chunk_size=7, step_size=7)).eval()
            turbo.load_state_dict(request.getfixturevalue("turbo").state_dict())
            return turbo
        if network not in DIT_VARIANTS:
            return request.getfixturevalue(network)
        torch.manual_seed(7)
        preset = DIT_VARIANTS[network]
        local = tuple(i for i in preset.local_attention_layers if i < TINY["num_layers"])
        return scatter_norms(DiT(replace(preset, **TINY, local_attention_layers=local))).eval()

    return make


@pytest.fixture
def clip():
    """Return video [2, 48, 5, 4, 6], audio [2, 17, 64] and text [2, 6, 24]: two different clips of one size."""
    random = torch.Generator().manual_seed(6)
    shapes = ((2, 48, 5, 4, 6), (2, 17, 64), (2, 6, 24))
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


@pytest.fixture
def manifest():
    """Return function(component) -> Checkpoint of a full-size network's published names, on meta."""
    components = json.loads((GOLDEN / "manifest_full.json").read_text())["components"]

    def checkpoint(name):
        state = components[name]["state_dict"]
        return Checkpoint.of_tensors(
            {key: torch.empty(shape, device="meta") for key, (shape, _) in state.items()}, name
        )

    return checkpoint
