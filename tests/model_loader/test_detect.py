"""What a file is, from its headers alone: sizes, variants, and configurations that are not ours."""

import pytest
from pack.model_loader import config as configs
from pack.model_loader import detect
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.detect import DIT_VARIANTS, describe, variant_from_name
from pack.model_loader.key_map import KEY_MAPS
from pack.model_loader.load import load_dit, published_tensors, save_part
from safetensors.torch import save_file


def published(dit):
    return published_tensors("dit", dit.state_dict(), dit.config)


def refusal(path, **options):
    with pytest.raises(CheckpointError) as caught:
        load_dit(path, **options)
    return str(caught.value)


def test_full_sizes_are_read_off_the_manifest(manifest):
    presets = {
        "dit": configs.DISTILL,
        "wan2.2_vae": configs.WAN22_VAE,
        "oobleck": configs.STABLE_AUDIO,
        "turbo_vaed": configs.TURBO_7_7,
        "t5gemma_9b_encoder": configs.T5GEMMA_9B,
    }
    for name, preset in presets.items():
        assert describe(manifest(name), "distill" if name == "dit" else None).config == preset, name


@pytest.mark.parametrize("variant", DIT_VARIANTS)
def test_a_variant_sets_what_keys_cannot_tell(manifest, variant):
    found = describe(manifest("dit"), variant)
    assert found.config == DIT_VARIANTS[variant] and found.variant == variant


def test_1080p_local_layers():
    assert len(configs.SR_1080P.local_attention_layers) == 32
    assert not {3, 7, 11, 15, 19, 23, 27, 31} & set(configs.SR_1080P.local_attention_layers)


@pytest.mark.parametrize(
    ("path", "variant"),
    [
        ("distill", "distill"),
        ("base/model.safetensors", "base"),
        ("540p_sr/model-00001-of-00013.safetensors", "540p_sr"),
        ("540p_sr_merge_bf16.safetensors", "540p_sr"),
        ("distill-merger_bf16.safetensors", "distill"),
        ("MagiHuman/magi_human_sr1080_bf16.safetensors", "1080p_sr"),
        ("MagiHuman/magi_human_bf16.safetensors", "base"),
        ("1080p_sr_fp8", "1080p_sr"),
        ("base/magi_human_distill_bf16.safetensors", "distill"),
        ("diffusion_models/model.safetensors", None),
        ("MagiHuman-Diffusers/distill/transformer", "distill"),
        ("MagiHuman-Diffusers/sr_540p/sr_transformer/diffusion_pytorch_model.safetensors", "540p_sr"),
        ("MagiHuman-Diffusers/sr_1080p/sr_transformer", "1080p_sr"),
        ("MagiHuman-Diffusers/sr_1080p/transformer", None),
        ("daVinci-MagiHuman-Base-1080p/sr", "1080p_sr"),
        ("daVinci-MagiHuman-Base-1080p/transformer", "base"),
        ("database/weights/model.safetensors", None),
    ],
)
def test_variants_are_read_off_names(tmp_path, path, variant):
    assert variant_from_name(tmp_path / path) == variant


def test_metadata_decides_and_is_not_contradicted_then_the_user_then_the_name(tmp_path, dit):
    ours, published_file = tmp_path / "ours_base.safetensors", tmp_path / "base.safetensors"
    save_part(ours, dit, "dit", dit.config, "distill")
    assert describe(Checkpoint.open(ours)).variant == describe(Checkpoint.open(ours), "distill").variant == "distill"
    assert "its header says distill, but 540p_sr was asked for" in refusal(ours, variant="540p_sr")
    save_file(published(dit), published_file)
    assert describe(Checkpoint.open(published_file)).variant == "base"
    assert describe(Checkpoint.open(published_file), "540p_sr").variant == "540p_sr"


def test_a_nameless_dit_asks_for_its_variant(tmp_path, dit):
    path = tmp_path / "weights.safetensors"
    save_file(published(dit), path)
    assert "neither metadata nor name tells the variant; expected one of distill, base" in refusal(path)
    assert "unknown variant turbo" in refusal(path, variant="turbo")
    assert load_dit(path, variant="1080p_sr").config.positions == "v1"


def test_every_network_has_its_configuration():
    assert detect.CONFIGS.keys() == KEY_MAPS.keys()


def test_a_config_from_another_version_is_refused(tmp_path, dit):
    path = tmp_path / "distill.safetensors"
    metadata = {"happyhorse.variant": "distill", "happyhorse.config": '{"hidden_size": 64}'}
    save_file(published(dit), path, metadata)
    assert "written for another version of this pack" in refusal(path)
