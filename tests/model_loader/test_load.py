"""From files to networks: the published layouts and our own, precision, copies, and refusals."""

import json
import sys
import weakref
from dataclasses import asdict, replace

import pytest
import torch
from layouts_on_disk import turbo_json
from pack.model_loader import config as configs
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.detect import describe
from pack.model_loader.load import (
    fill,
    load_audio_vae,
    load_dit,
    load_text_encoder,
    load_video_vae,
    published_tensors,
    save_part,
)
from pack.model_loader.turbo_vae import TurboVAE
from safetensors.torch import load_file, save_file


def published(network, module):
    return published_tensors(network, module.state_dict(), module.config)


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def same_weights(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def shard(tensors, folder, count=3):
    folder.mkdir(parents=True)
    names, weight_map = list(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::count]}, folder / file)
        weight_map |= dict.fromkeys(names[i::count], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Our own files.


@pytest.mark.parametrize(
    ("fixture", "part", "load"),
    [
        ("dit", "dit", lambda path: load_dit(path, dtype=torch.float32)),
        ("sr_dit", "dit", lambda path: load_dit(path, dtype=torch.float32)),
        ("text_encoder", "text_encoder", lambda path: load_text_encoder(path, dtype=torch.float32)),
        ("turbo", "video_vae", load_video_vae),
        ("wan", "video_vae", load_video_vae),
        ("oobleck", "audio_vae", load_audio_vae),
    ],
)
def test_a_saved_part_comes_back(tmp_path, request, fixture, part, load):
    module = request.getfixturevalue(fixture)
    path = tmp_path / "weights.safetensors"
    save_part(path, module, part, module.config, "nano")
    found = load(path)
    assert type(found) is type(module) and found.config == module.config and same_weights(found, module)
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]
    description = describe(Checkpoint.open(path))
    assert (description.part, description.variant, description.config) == (part, "nano", module.config)


def test_saved_names_are_the_published_ones(tmp_path, dit, text_encoder, oobleck):
    save_part(tmp_path / "dit.safetensors", dit.state_dict(), "dit", dit.config, "distill")
    tensors = load_file(tmp_path / "dit.safetensors")
    assert tensors["block.layers.0.attention.linear_qkv.weight"].shape == (3 * (64 + 2 * 32 + 4), 64)
    assert tensors["block.layers.1.attention.linear_qkv.weight"].shape == (64 + 2 * 32 + 4, 64)
    up = dit.block.layers[0].mlp.up_gate_proj
    stacked = torch.cat([up.video.weight, up.audio.weight, up.text.weight])
    assert torch.equal(tensors["block.layers.0.mlp.up_gate_proj.weight"], stacked)
    torch.testing.assert_close(tensors["adapter.rope.bands"], torch.tensor([1.0, 0.01]))
    assert "model.encoder.layers.0.self_attn.q_proj.weight" in published("text_encoder", text_encoder)
    assert "decoder.layers.7.weight_v" in published("oobleck", oobleck)


def test_a_state_dict_in_any_order_and_a_loaded_file_can_be_saved(tmp_path, dit, text_encoder):
    backwards = dict(reversed(dit.state_dict().items()))
    save_part(tmp_path / "dit.safetensors", backwards, "dit", dit.config, "distill")
    found = load_dit(tmp_path / "dit.safetensors", dtype=torch.float32)
    assert same_weights(found, dit)
    save_part(tmp_path / "again.safetensors", found, "dit", dit.config, "distill")
    assert same_weights(load_dit(tmp_path / "again.safetensors", dtype=torch.float32), dit)
    save_part(tmp_path / "text.safetensors", text_encoder, "text_encoder", text_encoder.config, "nano")
    found = load_text_encoder(tmp_path / "text.safetensors", dtype=torch.float32)
    if sys.platform == "win32":
        with pytest.raises(
            PermissionError, match="text.safetensors cannot be replaced .*Close that, or choose another"
        ):
            save_part(tmp_path / "text.safetensors", found, "text_encoder", text_encoder.config, "nano")
        assert not list(tmp_path.glob("*.part"))
    else:
        save_part(tmp_path / "text.safetensors", found, "text_encoder", text_encoder.config, "nano")  # over itself
    assert same_weights(load_text_encoder(tmp_path / "text.safetensors", dtype=torch.float32), text_encoder)


def test_save_refuses_a_part_that_the_configuration_is_not(tmp_path, dit):
    with pytest.raises(ValueError, match="a DiTConfig describes a dit, not a video_vae"):
        save_part(tmp_path / "x.safetensors", dit, "video_vae", dit.config, "distill")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["DISTILL", "SR_1080P", "T5GEMMA_9B", "TURBO_7_7", "WAN22_VAE", "STABLE_AUDIO"])
def test_configurations_survive_json(name):
    preset = getattr(configs, name)
    assert type(preset).from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    with pytest.raises(ValueError, match="another version of this pack"):
        type(preset).from_dict({**asdict(preset), "newer_field": 1})


# Published layouts, without our metadata.


def test_dit_sharded_and_without_its_bands(tmp_path, dit):
    tensors = published("dit", dit)
    del tensors["adapter.rope.bands"]
    shard(tensors, tmp_path / "base")
    for path in (tmp_path / "base", tmp_path / "base" / "model-00002-of-00003.safetensors"):
        assert same_weights(load_dit(path, dtype=torch.float32), dit)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dit_precision(tmp_path, dit, stored):
    """Linears become bf16, the rest stays fp32, from the all-fp32 releases and from base, whose linears are bf16."""
    small = {n for n in published("dit", dit) if n.startswith(("adapter.", "final_")) or "norm" in n}
    save_file(
        {n: t if n in small else t.to(stored) for n, t in published("dit", dit).items()}, tmp_path / "base.safetensors"
    )
    found = load_dit(tmp_path / "base.safetensors").state_dict()
    for name, tensor in dit.state_dict().items():
        linear = "linear_" in name and "block" in name or "_proj" in name
        wanted = tensor.bfloat16() if linear else tensor
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name


def test_turbo_as_published_with_its_json(tmp_path, turbo):
    tensors = prefixed("module.", published("turbo_vae", turbo))
    extra = {"module.encoder.conv_in.conv.weight": torch.ones(2), "module.decoder.aligned_head.weight": torch.ones(2)}
    torch.save({"ema_state_dict": tensors | extra, "optimizer": None}, tmp_path / "checkpoint-340000.ckpt")
    (tmp_path / "TurboV3.json").write_text(json.dumps(turbo_json(turbo.config)))
    found = load_video_vae(tmp_path / "checkpoint-340000.ckpt")
    assert found.config == turbo.config and same_weights(found, turbo)


def test_turbo_options_come_from_shapes_too(turbo):
    config = replace(turbo.config, depthwise=(True, True, False, True, True), unpatchify=False)
    tensors = Checkpoint.of_tensors(published("turbo_vae", TurboVAE(config)))
    assert describe(tensors).config == replace(config, first_chunk_size=7, step_size=7)


# Memory.


def test_experts_are_views_of_one_tensor_and_nothing_is_copied(dit):
    tensors = published("dit", dit)
    network = fill("dit", dit.config, Checkpoint.of_tensors(tensors), dtype=torch.float32)
    stacked = tensors["block.layers.0.mlp.down_proj.weight"]
    for i, expert in enumerate(("video", "audio", "text")):
        weight = getattr(network.block.layers[0].mlp.down_proj, expert).weight
        assert weight.data_ptr() == stacked[i * 64 :].data_ptr() and weight.is_contiguous()
    assert network.final_norm_video.weight.data_ptr() == tensors["final_norm_video.weight"].data_ptr()


def test_tensors_are_read_one_at_a_time_and_cast_before_the_next(tmp_path, dit):
    save_file(published("dit", dit), tmp_path / "distill.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "distill.safetensors")
    alive = []

    def read(name, read=checkpoint.read):
        assert not [reference for reference in alive if reference() is not None], "an fp32 tensor outlives its cast"
        tensor = read(name)
        if "_proj" in name:
            alive.append(weakref.ref(tensor))
        return tensor

    watched = Checkpoint(checkpoint.path, checkpoint.headers, checkpoint.metadata, read)
    fill("dit", dit.config, watched, dtype=torch.bfloat16)
    assert len(alive) == 12


# Refusals.


def refusal(load, path, **options):
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    return str(caught.value)


def test_missing_left_over_and_misshapen_tensors_are_counted_and_named(tmp_path, dit):
    path = tmp_path / "distill.safetensors"
    whole = published("dit", dit)
    save_file({n: t for n, t in whole.items() if "layers.0.mlp" not in n and n != "final_norm_audio.weight"}, path)
    told = refusal(load_dit, path)
    assert "cannot be read" in told and "distill.safetensors" in told  # layer 0 is what sizes are read off

    save_file(
        {n: t for n, t in whole.items() if "layers.2.attention.k_norm" not in n and n != "final_norm_audio.weight"},
        path,
    )
    told = refusal(load_dit, path)
    assert "2 tensors missing (first: block.layers.2.attention.k_norm.weight); expected the dit layout" in told

    save_file(whole | {"block.layers.0.extra.weight": torch.ones(2), "lora_up": torch.ones(1)}, path)
    assert "2 tensors that have no place (first: block.layers.0.extra.weight)" in refusal(load_dit, path)

    save_file(whole | {"block.layers.3.attention.linear_proj.weight": torch.ones(64, 64)}, path)
    told = refusal(load_dit, path)
    assert "block.layers.3.attention.linear_proj.weight has shape [64, 64], expected [192, 64]" in told


def test_missing_expert_is_named_as_the_file_would(tmp_path, dit):
    tensors = published("dit", dit)
    del tensors["block.layers.0.attention.linear_proj.weight"]
    save_file(prefixed("model.", tensors), tmp_path / "distill.safetensors")
    told = refusal(load_dit, tmp_path / "distill.safetensors")
    assert "3 tensors missing" in told and "(first: model.block.layers.0.attention.linear_proj.weight)" in told


def test_another_part_or_another_model(tmp_path, wan, dit):
    save_part(tmp_path / "vae.safetensors", wan, "video_vae", wan.config, "wan2.2")
    assert "holds a video_vae (wan_vae), expected a dit" in refusal(load_dit, tmp_path / "vae.safetensors")
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    assert "not a part of this model (first tensor: transformer_blocks.0" in refusal(
        load_dit, tmp_path / "other.safetensors"
    )
