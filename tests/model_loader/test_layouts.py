"""Others' layouts: fp8, int8 and split experts give the published weights, small if wanted, or a named fault."""

import json

import pytest
import torch
from layouts_on_disk import is_linear, split
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.layouts import as_published
from pack.model_loader.load import fill, load_dit, published_tensors
from pack.model_loader.row_scales import quantised, rotated_back
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
    """Operations of a host whose Linear takes an fp8 or int8 weight with its scale."""

    class Linear(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.scale = state_dict.pop(f"{prefix}weight_scale", None)
            self.weight.requires_grad_(False)  # which an int8 parameter cannot
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
        ({"{stem}.weight": torch.ones(2, 2, dtype=torch.uint8)}, "only fp8 and int8 matrices can be read"),
        ({"{stem}.weight": None}, "weight, which is not in the file"),
        ({"{stem}.weight_scale": None}, "1 quantised tensors have no scale"),
    ],
)
def test_bad_scales_name_file_and_tensor(tmp_path, dit, change, told):
    stored, _ = fp8(published(dit), ".weight_scale", per_row=False)
    stem = "block.layers.1.mlp.down_proj"
    stored |= {name.format(stem=stem): tensor for name, tensor in change.items()}
    save_file({n: t for n, t in stored.items() if t is not None}, tmp_path / "distill.safetensors")
    with pytest.raises(CheckpointError, match=rf"distill\.safetensors: (?=.*{stem}).*{told}"):
        load_dit(tmp_path / "distill.safetensors")


def int8(tensors, told=None, in_header=False):
    """Return ({name: tensor} with the linears in int8, a scale a row; their metadata); `told` says more of each."""
    stored, layers = dict(tensors), {}
    for name in filter(is_linear, tensors):
        layer = name.removesuffix(".weight")
        stored[name], stored[f"{name}_scale"] = quantised(torch.int8, tensors[name])
        layers[layer] = {"format": "int8_tensorwise"} | (told or {})
        if not in_header:
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
    return stored, {"_quantization_metadata": json.dumps({"layers": layers})} if in_header else {}


@pytest.mark.parametrize("in_header", [False, True])
def test_int8_loads_and_is_kept_without_a_copy(tmp_path, dit, in_header):
    stored, metadata = int8(published(dit), in_header=in_header)
    meant = {name: tensor for name, tensor in stored.items() if "comfy_quant" not in name and "_scale" not in name}
    meant |= {name: meant[name] * stored[f"{name}_scale"] for name in filter(is_linear, meant)}
    save_file(stored, tmp_path / "distill.safetensors", metadata)
    wanted = fill("dit", dit.config, Checkpoint.of_tensors(meant), dtype=torch.float32)
    found = load_dit(tmp_path / "distill.safetensors", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())
    places = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
    for name, linear in kept(stored, dit.config).items():
        assert linear.weight.dtype == torch.int8 and linear.weight.untyped_storage().data_ptr() in places
        assert torch.equal(linear.weight * linear.scale, wanted.get_submodule(name).weight)


@pytest.mark.parametrize("in_header", [False, True])
@pytest.mark.parametrize("told", [{"convrot": True, "convrot_groupsize": 16}, {"params": {"convrot": True}}])
def test_rotated_int8_is_rotated_back(dit, told, in_header):
    group = told.get("convrot_groupsize", 256)
    tensors = {name: tensor for name, tensor in published(dit).items() if tensor.shape[-1] % group == 0}
    if group == 256:
        tensors = {"block.layers.1.mlp.down_proj.weight": torch.randn(4, 512)}
    turned = {n: rotated_back(tensor, group) if is_linear(n) else tensor for n, tensor in tensors.items()}
    stored, metadata = int8(turned, told, in_header)
    checkpoint = as_published(Checkpoint.of_tensors(stored, metadata=metadata))
    linears = list(filter(is_linear, tensors))
    assert linears and checkpoint.headers.keys() == tensors.keys()
    for name in linears:
        exact = checkpoint.read(name)
        values, scale = checkpoint.read_scaled(name)
        assert values.dtype == torch.int8 and scale.shape == (len(values), 1)
        for found, bound in ((exact, 0.015), (values * scale, 0.02)):
            assert 0 < (found - tensors[name]).norm() / tensors[name].norm() < bound


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"format": "convrot_w4a4"}, "convrot_w4a4.*of ComfyUI's formats fp8 and int8 are read"),
        ({"convrot": True, "convrot_groupsize": 8}, "groups of 8 columns, which must be a power of four"),
        ({"convrot": True, "convrot_groupsize": 1024}, "groups of 1024 columns"),
        ({"convrot": True, "convrot_groupsize": "wide"}, "how .* is quantised cannot be read"),
    ],
)
def test_int8_that_cannot_be_read_is_refused_by_name(dit, told, expected):
    stored, metadata = int8(published(dit), told)
    with pytest.raises(CheckpointError, match=f"memory: (?=.*block.layers).*{expected}"):
        as_published(Checkpoint.of_tensors(stored, metadata=metadata))


def test_int8_without_scales_is_refused(dit):
    stored = {name: t.to(torch.int8) if is_linear(name) else t for name, t in published(dit).items()}
    with pytest.raises(CheckpointError, match="memory: .*quantised tensors have no scale"):
        as_published(Checkpoint.of_tensors(stored))


def test_an_incomplete_split_names_what_is_missing(tmp_path, dit):
    tensors = split(published(dit), dit.config)
    del tensors["block.layers.0.attention.linear_k_audio.weight"]
    save_file(tensors, tmp_path / "distill.safetensors")
    with pytest.raises(
        CheckpointError, match=r"distill\.safetensors: .*first: block.layers.0.attention.linear_k_audio"
    ):
        load_dit(tmp_path / "distill.safetensors")
