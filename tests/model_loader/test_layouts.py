"""Layouts of other packs: fp8 styles and split experts give the published weights, fp8 if wanted, or a named fault."""

import pytest
import torch
from layouts_on_disk import is_linear, split
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.layouts import as_published
from pack.model_loader.load import fill, load_dit, published_tensors
from safetensors.torch import save_file
from torch import nn

STYLES = {
    "davinci fp8": (".weight.__fp8_scale", {}),
    "comfy first": (".scale_weight", {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}),
    "comfy second": (".weight_scale", {"block.layers.0.mlp.down_proj.comfy_quant": torch.zeros(9, dtype=torch.uint8)}),
}


def published(dit):
    return published_tensors("dit", dit.state_dict(), dit.config)


def fp8(tensors, ending, per_row):
    """Quantise the block linears of {name: tensor}; returns the file's tensors and the weights that they stand for."""
    stored, meant = {}, dict(tensors)
    for name, tensor in tensors.items():
        if not is_linear(name):
            stored[name] = tensor
            continue
        largest = tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()
        scale = largest.clamp_min(1e-6) / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix(".weight") + ending] = scale
        meant[name] = stored[name].float() * scale
    return stored, meant


def assert_loads_as(path, tensors, dit):
    save_file(tensors[0], path)
    found = load_dit(path, dtype=torch.float32)
    assert found.config == dit.config
    found = published(found)
    assert found.keys() == tensors[1].keys()
    assert all(torch.equal(found[name], tensors[1][name]) for name in found)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_scaled_fp8_is_exactly_weight_times_scale(tmp_path, dit, style, per_row):
    ending, extra = STYLES[style]
    stored, meant = fp8(published(dit), ending, per_row)
    assert_loads_as(tmp_path / "distill_fp8.safetensors", (stored | extra, meant), dit)


def test_split_experts_are_the_published_weights(tmp_path, dit):
    tensors = published(dit)
    assert_loads_as(tmp_path / "magi_human_distill.safetensors", (split(tensors, dit.config), tensors), dit)


def test_split_experts_in_fp8(tmp_path, dit):
    stored, meant = fp8(split(published(dit), dit.config), ".weight_scale", per_row=True)
    network = as_published(Checkpoint.of_tensors(meant))
    meant = {name: network.read(name) for name in network.headers}
    assert_loads_as(tmp_path / "distill.safetensors", (stored, meant), dit)


class Host:
    """Operations of a host whose Linear takes an fp8 weight with its scale."""

    class Linear(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.scale = state_dict.pop(f"{prefix}weight_scale", None)
            super()._load_from_state_dict(state_dict, prefix, *args)


def kept(tensors, config):
    """Fill a network whose linears in the blocks stay fp8; return {our name of the linear: the linear}."""
    checkpoint = as_published(Checkpoint.of_tensors(tensors))
    network = fill("dit", config, checkpoint, dtype=torch.bfloat16, operations=Host, quantised="kept")
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    outside = {name: linear for name, linear in linears.items() if not name.startswith("block.")}
    assert len(outside) == 5 and all(linear.weight.dtype == torch.float32 for linear in outside.values())
    return {name: linear for name, linear in linears.items() if name not in outside}


def plain_cast(tensors):
    """Cast all of {name: tensor} to fp8, as tools do that know nothing of the network."""
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("style", [*STYLES, "plain cast"])
def test_fp8_is_kept_without_a_copy_and_scales_follow_the_experts(dit, style, per_row):
    if style == "plain cast":
        stored = plain_cast(published(dit))
        meant = {name: tensor.float() for name, tensor in stored.items()}
    else:
        ending, extra = STYLES[style]
        stored, meant = fp8(published(dit), ending, per_row)
        stored |= extra
    found, wanted = kept(stored, dit.config), fill("dit", dit.config, Checkpoint.of_tensors(meant), dtype=torch.float32)
    places = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
    for name, linear in found.items():
        assert linear.weight.dtype == torch.float8_e4m3fn
        assert linear.weight.untyped_storage().data_ptr() in places
        assert linear.scale.shape == ((len(linear.weight), 1) if per_row and style != "plain cast" else ())
        assert torch.equal(linear.weight.float() * linear.scale, wanted.get_submodule(name).weight)


def test_split_fp8_has_one_scale_an_expert_and_one_a_row_where_q_k_v_and_gate_differ(dit):
    stored, meant = fp8(split(published(dit), dit.config), ".weight_scale", per_row=False)
    network = as_published(Checkpoint.of_tensors(meant))
    wanted = fill("dit", dit.config, network, dtype=torch.float32)
    for name, linear in kept(stored, dit.config).items():
        assert linear.weight.dtype == torch.float8_e4m3fn
        assert linear.scale.shape == ((len(linear.weight), 1) if "qkv" in name else ())
        assert torch.equal(linear.weight.float() * linear.scale, wanted.get_submodule(name).weight)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_not_fp8_in_an_fp8_file_comes_in_the_networks_dtype(dit, scaled):
    """A gate left in bf16 beside q, k and v in fp8, which share a tensor of ours; and a layer left in bf16."""
    own = ("linear_g", "layers.2.mlp.down_proj")
    tensors = split(published(dit), dit.config)
    left = {name: tensors.pop(name).bfloat16() for name in list(tensors) if any(part in name for part in own)}
    stored, meant = fp8(tensors, ".weight_scale", per_row=False) if scaled else (plain_cast(tensors),) * 2
    network = as_published(Checkpoint.of_tensors({n: tensor.float() for n, tensor in (meant | left).items()}))
    wanted = fill("dit", dit.config, network, dtype=torch.bfloat16)
    for name, linear in kept(stored | left, dit.config).items():
        value = linear.weight if linear.scale is None else (linear.weight.float() * linear.scale).bfloat16()
        assert (linear.scale is None) == ("qkv" in name or own[1] in name)
        assert torch.equal(value, wanted.get_submodule(name).weight)


def test_a_published_file_is_left_alone(dit):
    checkpoint = Checkpoint.of_tensors(published(dit))
    assert as_published(checkpoint) is checkpoint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"{stem}.weight_scale": torch.tensor(float("nan"))}, "weight_scale holds a scale that is not finite"),
        ({"{stem}.weight_scale": torch.ones(5)}, r"weight_scale has shape \[5\], expected one number or one for each"),
        ({"{stem}.weight": torch.ones(2, 2, dtype=torch.uint8)}, "only fp8 matrices can be read"),
        ({"{stem}.weight": None}, "weight, which is not in the file"),
        ({"{stem}.weight_scale": None}, "1 fp8 tensors have no scale"),
    ],
)
def test_bad_scales_name_file_and_tensor(tmp_path, dit, change, told):
    stored, _ = fp8(published(dit), ".weight_scale", per_row=False)
    stem = "block.layers.1.mlp.down_proj"
    stored |= {name.format(stem=stem): tensor for name, tensor in change.items()}
    save_file({n: t for n, t in stored.items() if t is not None}, tmp_path / "distill.safetensors")
    with pytest.raises(CheckpointError, match=rf"distill\.safetensors: (?=.*{stem}).*{told}"):
        load_dit(tmp_path / "distill.safetensors")


def test_an_incomplete_split_names_what_is_missing(tmp_path, dit):
    tensors = split(published(dit), dit.config)
    del tensors["block.layers.0.attention.linear_k_audio.weight"]
    save_file(tensors, tmp_path / "distill.safetensors")
    with pytest.raises(
        CheckpointError, match=r"distill\.safetensors: .*first: block.layers.0.attention.linear_k_audio"
    ):
        load_dit(tmp_path / "distill.safetensors")
