"""TurboVAED's biases, added in passing as on NVIDIA cards, with ComfyUI's own convolutions."""

from dataclasses import replace

import comfy.ops
import pytest
import torch
from pack.model_loader import turbo_vae
from pack.model_loader.config import TURBO_7_7
from pack.model_loader.turbo_vae import TurboVAE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["disable_weight_init", "manual_cast"])
def test_biases_are_added_in_passing_with_comfyuis_convolutions(kind, monkeypatch):
    """`turbo_pieces.Apart` steps in where they all end; manual_cast brings weights and biases over for every call."""
    torch.manual_seed(0)
    decoder = TurboVAE(replace(TURBO_7_7, block_out_channels=(16, 16, 8, 8)), operations=getattr(comfy.ops, kind))
    for parameter in decoder.parameters():
        parameter.normal_(0, 0.1)
    latent, calls = torch.randn(1, 48, 5, 2, 3), []
    expected = decoder.decode(latent)
    monkeypatch.setattr(turbo_vae, "takes_biases", lambda x: calls.append(x.shape) or True)
    assert (decoder.decode(latent) - expected).norm() < 1e-5 * expected.norm()
    assert calls
