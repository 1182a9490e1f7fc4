"""Random weights of nano's architecture, and ComfyUI set up in this process on the CPU."""

import gc
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "model_loader")]  # for random_weights, quantised_checks, gguf_on_disk
cli_args = pytest.importorskip("comfy.cli_args", reason="no ComfyUI: set COMFYUI_PATH, or `python3 run.py test`")
cli_args.args.cpu = True

import comfy.model_management  # noqa: E402  (reads args.cpu while it is imported)
import folder_paths  # noqa: E402
from pack.model_loader import config as configs  # noqa: E402
from pack.model_loader.core_vae import AudioVAE, VideoVAE  # noqa: E402
from pack.model_loader.dit import DiT  # noqa: E402
from pack.model_loader.load import save_part  # noqa: E402
from pack.model_loader.text_encoder import TextEncoder  # noqa: E402
from pack.nodes import files  # noqa: E402
from random_weights import random_weights  # noqa: E402

DIT = configs.DiTConfig(
    num_layers=4, hidden_size=64, head_dim=16, num_query_groups=2, video_in_channels=192, audio_in_channels=64,
    text_in_channels=48, expert_layers=(0, 3), gelu7_layers=(0,), local_attention_layers=(), frame_receptive_field=11,
    positions="v2",
)  # fmt: skip
TEXT = configs.TextEncoderConfig(
    vocab_size=40, hidden_size=48, intermediate_size=96, num_layers=2, num_heads=4, num_key_value_heads=2, head_dim=16,
    query_pre_attn_scalar=16, sliding_window=64, attention_softcap=None, rope_theta=10000.0, norm_eps=1e-6,
)  # fmt: skip
VIDEO = configs.WanVAEConfig(
    dim=8, dec_dim=8, z_dim=48, dim_mult=(1, 2, 4, 4), num_res_blocks=1, temporal_downsample=(False, True, True),
    latent_mean=(0.1,) * 48, latent_std=(0.5,) * 48,
)  # fmt: skip
AUDIO = configs.OobleckConfig(
    channels=4, latent_dim=64, c_mults=(1, 2, 4, 8, 16), strides=(2, 4, 4, 8, 8), sample_rate=51200
)
# One token a letter and <bos> in front, so that lengths are easy to count.
BOS = {"id": "<bos>", "type_id": 0}
WORDS = ["<pad>", "<unk>", "<bos>", *' abcdefghijklmnopqrstuvwxyz,.:"()<>']
TOKENIZER = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "decoder": None,
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
    "post_processor": {
        "type": "TemplateProcessing", "single": [{"SpecialToken": BOS}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    },
    "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "<unk>"},
})  # fmt: skip


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Folder of four tiny files under nano's names."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    parts = (
        (files.MODEL, DiT(DIT), "dit", DIT, "distill", None),
        (files.TEXT_ENCODER, TextEncoder(TEXT), "text_encoder", TEXT, "t5gemma", TOKENIZER),
        (files.VIDEO_VAE, random_weights(VideoVAE(VIDEO)), "video_vae", VIDEO, "wan22", None),
        (files.AUDIO_VAE, random_weights(AudioVAE(AUDIO)), "audio_vae", AUDIO, "stable_audio", None),
    )
    for part, network, name, config, variant, tokenizer in parts:
        save_part(folder / part.nano, network, name, config, variant, tokenizer=tokenizer)
    return folder


@pytest.fixture
def borrowed(weights):
    """The same folder for files of one test: what it adds is removed afterwards."""
    before = set(weights.iterdir())
    yield weights
    gc.collect()  # Windows keeps a file as long as a tensor is mapped from it
    for path in set(weights.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="session", autouse=True)
def model_folders(weights, tmp_path_factory):
    """Make ComfyUI look for models in the weights' folder only, and write to a temporary one."""
    for part in files.PARTS:
        folder_paths.folder_names_and_paths[part.folder] = ([str(weights)], {".safetensors", ".ckpt", ".pth"})
    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch):
    """Let every processor be one without bf16, so that the loaders' default is the same on all."""
    from pack.nodes import weight_dtypes

    monkeypatch.setattr(weight_dtypes, "cpu_multiplies_bf16", lambda: False)


@pytest.fixture(scope="session")
def loaded(model_folders):
    """MODEL, CLIP, video VAE and audio VAE of the tiny files, from the loader node."""
    from pack.nodes.loaders import LoadCheckpoint

    names = [part.nano for part in files.PARTS]
    return LoadCheckpoint.execute(*names, weight_dtype="fp32", text_encoder_device="default").args


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    """Return function(variant, **changes) -> a fresh MODEL of the tiny transformer as that variant."""
    from pack.nodes.host import load_model

    def make(variant, **changes):
        torch.manual_seed(1)
        config = replace(DIT, **changes)
        path = tmp_path_factory.mktemp("variants") / f"{variant}.safetensors"
        save_part(path, DiT(config), "dit", config, variant)
        return load_model(path, torch.float32)

    return make


@pytest.fixture(scope="session")
def quantised_files(weights, tmp_path_factory):
    """The tiny transformer in fp8 and int8, by style: {style: path}."""
    from quantised_checks import write_styles

    return write_styles(weights / files.MODEL.nano, tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="session")
def lora(weights):
    """A LoRA for the tiny transformer, and the deltas it means: {layer: [rows, columns]}."""
    from pack.model_loader.load import load_dit
    from quantised_checks import make_lora

    return make_lora(load_dit(weights / files.MODEL.nano))


@pytest.fixture
def notices(monkeypatch):
    """List that collects what nodes tell the user while they run."""
    from pack.nodes import encode, extend, prompt, sampling, soundtrack, super_resolution

    told = []
    for room in (encode, extend, prompt, sampling, soundtrack, super_resolution):
        monkeypatch.setattr(room, "notice", lambda node, message: told.append(message))
    return told


@pytest.fixture
def latent():
    """A short joint latent, 64x32 pixels."""
    from pack.nodes.conditioning import EmptyLatent

    return EmptyLatent.execute({"size": "custom", "width": 64, "height": 32}, 0.4).args[0]


@pytest.fixture
def prompt(loaded):
    """Conditioning of a short prompt."""
    from pack.nodes.prompt import EncodePrompt

    return EncodePrompt.execute(loaded[1], "a red ball bounces").args[0]


@pytest.fixture(autouse=True)
def as_comfyui_runs_nodes():
    """Run under inference mode, as ComfyUI does, and leave no interrupt behind for the next test."""
    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)
