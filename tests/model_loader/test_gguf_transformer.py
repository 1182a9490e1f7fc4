"""Transformers as GGUF: published names, rows that no block fills."""

from dataclasses import replace

import pytest
import torch
from gguf_on_disk import write, write_sparse
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.config import DISTILL, SR_1080P
from pack.model_loader.detect import describe
from pack.model_loader.dit import DiT
from pack.model_loader.load import expected_tensors, load_dit, plan, published_tensors

ERRORS = {
    "BF16": 5e-3,
    "Q8_0": 1e-2,
    "Q6_K": 4e-2,
    "Q4_K": 0.15,
    "Q4_0": 0.18,
}  # of a velocity; measured: half to two thirds


@pytest.fixture(scope="module")
def network():
    """A transformer whose rows of 256 K-quants fill, all but the MLP's: 680 columns, as 13,652 of the full size."""
    torch.manual_seed(3)
    small = {"num_layers": 4, "hidden_size": 256, "head_dim": 32, "num_query_groups": 2, "text_in_channels": 24}
    return DiT(replace(DISTILL, **small, expert_layers=(0, 3), gelu7_layers=(0,))).eval()


def tensors_of(network, prefix=""):
    published = published_tensors("dit", network.state_dict(), network.config)
    return {prefix + name: tensor for name, tensor in published.items()}


def velocity_error(found, meant):
    worst = 0.0
    for a, b in zip(found, meant, strict=True):
        worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ERRORS)
@torch.no_grad()
def test_each_quantisation_gives_the_velocities_within_its_error(tmp_path, network, clip, kind, prefix):
    path = write(tmp_path / f"tiny_distill_{kind}.gguf", tensors_of(network, prefix), kind, "magihuman")
    found = load_dit(path, dtype=torch.float32)
    off = velocity_error(found(*clip), network(*clip))
    assert ERRORS[kind] / 30 < off <= ERRORS[kind]


@pytest.mark.parametrize(("name", "config"), [("distill", DISTILL), ("1080p_sr", SR_1080P)])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_full_size_headers_are_recognised_and_every_tensor_has_its_place(tmp_path, manifest, kind, name, config):
    tensors = {key: torch.empty(header.shape, device="meta") for key, header in manifest("dit").headers.items()}
    checkpoint = Checkpoint.open(write_sparse(tmp_path / f"{name}-{kind}.gguf", tensors, kind, "magihuman"))
    found = describe(checkpoint)
    assert found.config == config and found.variant == name
    wanted = expected_tensors(found.network, found.config, dtype=torch.bfloat16)
    assert plan(found.network, checkpoint, found.prefix, wanted).keys() == tensors.keys() - {"adapter.rope.bands"}
    with pytest.raises(CheckpointError, match="neither metadata nor name tells the variant"):
        describe(Checkpoint.open(checkpoint.path.rename(tmp_path / "model.gguf")))
