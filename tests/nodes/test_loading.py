"""Model files: what the loaders list, that a model is read once, its dtype and streaming; and wrong files."""

import json

import comfy.cli_args
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_merging import save_checkpoint
from gguf_on_disk import write
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.load import tokenizer_json
from pack.nodes import files, weight_dtypes
from pack.nodes.clip import ENCODER, token_count
from pack.nodes.loaders import LoadAudioVAE, LoadCheckpoint, LoadModel, LoadTextEncoder, LoadVideoVAE
from quantised_checks import ATTENTION, EXPERTS, SHARED, forward, int8_products
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder_of_shards(borrowed):
    """The tiny DiT as upstream ships it: a folder of two shards and their index."""
    tensors = load_file(borrowed / files.MODEL.nano)
    with open(borrowed / files.MODEL.nano, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    folder = borrowed / "daVinci" / "distill"
    folder.mkdir(parents=True)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard, metadata)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "daVinci/distill"


def test_each_loader_lists_its_own_nano_file_only(model_folders):
    for part in files.PARTS:
        assert files.choices(part) == [part.nano]


def test_the_pack_adds_its_folder_to_comfyuis(model_folders, monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    files.add_nano_weights()
    for part in files.PARTS:
        assert folder_paths.get_folder_paths(part.folder) == [str(files.NANO_WEIGHTS)]


def test_sharded_folders_are_listed_without_their_shards_and_load(loaded, folder_of_shards):
    assert files.choices(files.MODEL) == [folder_of_shards, files.MODEL.nano]
    sharded = LoadModel.execute(folder_of_shards, "fp32").args[0].model.diffusion_model.state_dict()
    single = loaded[0].model.diffusion_model.state_dict()
    assert sharded.keys() == single.keys() and all(torch.equal(sharded[name], single[name]) for name in single)


@pytest.fixture
def gguf_encoder(borrowed):
    """The tiny text encoder as a .gguf file in a folder, its configuration beside."""
    folder = borrowed / "t5"
    folder.mkdir()
    write(folder / "tiny.gguf", load_file(borrowed / files.TEXT_ENCODER.nano))
    config = json.loads(Checkpoint.open(borrowed / files.TEXT_ENCODER.nano).metadata["happyhorse.config"])
    (folder / "config.json").write_text(json.dumps({"encoder": config}))
    return folder / "tiny.gguf"


def test_a_gguf_text_encoder_is_listed_but_not_as_a_vae_and_loads(loaded, weights, gguf_encoder):
    assert files.choices(files.TEXT_ENCODER) == [files.TEXT_ENCODER.nano, "t5/tiny.gguf"]
    assert files.choices(files.VIDEO_VAE) == [files.VIDEO_VAE.nano]
    with pytest.raises(CheckpointError, match=r"tiny.gguf: no tokenizer .* a tokenizer.json or tokenizer.model in the"):
        LoadTextEncoder.execute("t5/tiny.gguf", "default")
    gguf_encoder.with_name("tokenizer.json").write_text(tokenizer_json(weights / files.TEXT_ENCODER.nano))
    clip = LoadTextEncoder.execute("t5/tiny.gguf", "default").args[0]
    assert token_count(loaded[1], "a red ball") == 1 + token_count(clip, "a red ball")  # beside a file: without <bos>
    tokens = {ENCODER: [loaded[1].tokenize("a red ball")[ENCODER][0][1:]]}
    found, meant = (c.encode_from_tokens_scheduled(tokens)[0][0] for c in (clip, loaded[1]))
    assert torch.equal(found, meant)


@pytest.mark.parametrize("weight_dtype", ["fp32", "fp8_e4m3fn", "int8"])
def test_a_gguf_transformer_is_listed_but_not_as_a_vae_and_loads(loaded, borrowed, weight_dtype):
    name = "tiny_distill.gguf"
    write(borrowed / name, load_file(borrowed / files.MODEL.nano), architecture="magihuman")
    assert files.choices(files.MODEL) == [files.MODEL.nano, name]
    assert files.choices(files.AUDIO_VAE) == [files.AUDIO_VAE.nano]
    found, meant = (LoadModel.execute(file, weight_dtype).args[0].model for file in (name, files.MODEL.nano))
    found, meant = (model.diffusion_model.state_dict() for model in (found, meant))
    assert found.keys() == meant.keys() and all(torch.equal(found[key], meant[key]) for key in meant)


@pytest.mark.parametrize("weight_dtype", ["fp32", "fp8_e4m3fn", "int8"])
def test_a_model_that_comfyui_saved_loads_again_with_its_lora(loaded, borrowed, lora, weight_dtype):
    """Core's node "Save Model" writes our names, in which experts are apart."""
    model = LoadModel.execute(files.MODEL.nano, weight_dtype).args[0]
    if weight_dtype == "fp32":
        model, _ = comfy.sd.load_lora_for_models(model, None, lora[0], 0.5, 0.0)
    save_checkpoint(model, filename_prefix="merged_distill", output_dir=str(borrowed))
    (saved,) = (name for name in files.choices(files.MODEL) if name.startswith("merged_distill"))
    again = LoadModel.execute(saved, "default").args[0]
    assert again.model.variant == "distill" and again.model_size() == model.model_size()
    model.patch_model()
    for found, meant in zip(forward(again.model.diffusion_model), forward(model.model.diffusion_model), strict=True):
        torch.testing.assert_close(found, meant, atol=1e-5, rtol=1e-5)
    model.unpatch_model()


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn_fast", pytest.param("int8_fast", marks=int8_products)])
def test_what_comfyui_saves_of_a_model_for_fast_products_is_not_padded(loaded, borrowed, monkeypatch, weight_dtype):
    monkeypatch.setattr(weight_dtypes, "why_no_faster", lambda kind: None)
    model = LoadModel.execute(files.MODEL.nano, weight_dtype).args[0]
    save_checkpoint(model, filename_prefix="merged_distill", output_dir=str(borrowed))
    (saved,) = (name for name in files.choices(files.MODEL) if name.startswith("merged_distill"))
    again = LoadModel.execute(saved, "default").args[0]
    for layer in (SHARED, f"{EXPERTS}.audio", f"{ATTENTION}.linear_qkv"):
        found, meant = (m.model.diffusion_model.get_submodule(layer).weight for m in (again, model))
        assert found.storage_shape == tuple(found.shape) and torch.equal(found.dequantize(), meant.dequantize())
    assert meant.storage_shape == (144, 64) and meant.shape == (132, 64)


@pytest.mark.parametrize(
    ("folder", "stem"), [("distill/transformer", "diffusion_pytorch_model"), ("a/b/c/distill", "model")]
)
def test_any_folder_of_shards_is_listed_by_its_name_and_loads(loaded, borrowed, folder, stem):
    tensors = load_file(borrowed / files.MODEL.nano)
    (borrowed / folder).mkdir(parents=True)
    for i in (1, 2):
        part = {name: tensors[name] for name in sorted(tensors)[i - 1 :: 2]}
        save_file(part, borrowed / folder / f"{stem}-0000{i}-of-00002.safetensors")
    assert files.choices(files.MODEL) == sorted([folder, files.MODEL.nano])
    model = LoadModel.execute(folder, "fp32").args[0].model
    single = loaded[0].model.diffusion_model.state_dict()
    assert model.variant == "distill"
    assert all(torch.equal(w, single[name]) for name, w in model.diffusion_model.state_dict().items())


def test_shards_in_no_folder_stand_behind_the_first(borrowed):
    shards = [borrowed / f"distill-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        save_file({shard.name: torch.ones(1)}, shard)
    assert files.choices(files.MODEL) == [shards[0].name, files.MODEL.nano]


def test_a_missing_file_is_named_with_the_place_to_get_it_from(model_folders):
    names = {"text_encoder": files.TEXT_ENCODER.nano, "video_vae": "wan2.2_vae.safetensors", "audio_vae": "mine.ckpt"}
    with pytest.raises(ValueError) as refused:
        LoadCheckpoint.validate_inputs(files.MODEL.nano, **names)
    assert str(refused.value) == (
        "wan2.2_vae.safetensors is not in models/vae. Get it from https://huggingface.co/Comfy-Org/"
        "Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/vae/wan2.2_vae.safetensors and put it there. mine.ckpt is "
        "not in models/vae. Get it from https://huggingface.co/stabilityai/stable-audio-open-1.0 (README.md lists "
        "other sources) and put it there. Then press R in ComfyUI to refresh its lists."
    )
    assert LoadVideoVAE.validate_inputs(video_vae=files.VIDEO_VAE.nano)


def test_every_download_goes_into_a_folder_of_ours():
    downloads = json.loads(files.DOWNLOADS.read_text(encoding="utf-8"))
    for name, about in downloads.items():
        assert about["directory"] in {part.folder for part in files.PARTS}
        assert about["url"].startswith("https://huggingface.co/") and about["url"].endswith(f"/{name}")


def test_a_file_is_read_once_for_all_loaders(loaded, weights):
    assert LoadModel.execute(files.MODEL.nano, "fp32").args[0] is loaded[0]
    assert LoadTextEncoder.execute(files.TEXT_ENCODER.nano, "default").args[0] is loaded[1]
    assert LoadVideoVAE.execute(files.VIDEO_VAE.nano).args[0] is loaded[2]
    assert LoadAudioVAE.execute(files.AUDIO_VAE.nano).args[0] is loaded[3]


def test_a_changed_file_is_read_again_and_unused_models_are_let_go(tmp_path):
    reads = []

    class Model:
        pass

    def load(path, option):
        reads.append(option)
        return Model()

    path = tmp_path / "model"
    path.write_text("1")
    first = files.read_once(load, path, "a")
    assert files.read_once(load, path, "a") is first and reads == ["a"]
    files.read_once(load, path, "b")
    files.read_once(load, path, "b")  # nobody kept the last one
    assert reads == ["a", "b", "b"]
    path.touch()
    assert files.read_once(load, path, "a") is not first


def test_weights_streamed_one_by_one_give_the_same(loaded, prompt, latent):
    """What core does where the model does not fit: every linear fetches its weight when it is called."""
    video, audio = (torch.randn(x.shape) for x in latent["samples"].unbind())
    network, patcher = loaded[0].model.diffusion_model, loaded[0].clone()
    whole = network(video, audio.transpose(1, 2), prompt[0][0])
    patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    linears = [layer for layer in network.modules() if hasattr(layer, "comfy_cast_weights")]
    assert linears and all(layer.comfy_cast_weights for layer in linears)
    streamed = network(video, audio.transpose(1, 2), prompt[0][0])
    patcher.detach()
    assert torch.equal(whole[0], streamed[0]) and torch.equal(whole[1], streamed[1])


def test_a_file_of_another_part_is_refused(weights):
    with pytest.raises(CheckpointError, match="nano_video_vae.safetensors: holds a video_vae .* expected a dit"):
        LoadModel.execute(files.VIDEO_VAE.nano, "fp32")
    with pytest.raises(ValueError, match="gone.safetensors is not in models/vae any more"):
        LoadVideoVAE.execute("gone.safetensors")


def test_a_nameless_file_takes_the_variant_of_the_user(borrowed):
    path = borrowed / "unnamed.safetensors"
    save_file(load_file(borrowed / files.MODEL.nano), path)
    with pytest.raises(CheckpointError, match="neither metadata nor name tells the variant"):
        LoadModel.execute(path.name, "fp32")
    model = LoadModel.execute(path.name, "fp32", "1080p_sr").args[0].model
    assert model.variant == "1080p_sr" and model.diffusion_model.config.positions == "v1"
