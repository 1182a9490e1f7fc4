"""A file whose numbers are damaged is named where it gives NaN; no black and silent clip is written."""

from pathlib import Path

import comfy.nested_tensor
import folder_paths
import pytest
import torch
from pack.nodes import files
from pack.nodes.clip import load_clip
from pack.nodes.decode import Decode, SaveVideo
from pack.nodes.finite import require_finite
from pack.nodes.host import load_model
from pack.nodes.prompt import EncodePrompt
from pack.nodes.sampling import Sampler
from pack.nodes.vae import load_audio, load_video
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TRANSFORMER = (
    r"The transformer gave NaN or infinite values.*Its file is probably damaged.*download it again\. If it is not the "
    r"file: take LoRAs away.*'HappyHorse Speed'"
)


@pytest.fixture(scope="module")
def damaged(weights, tmp_path_factory):
    """Return function(part) -> a copy of its file, in which one number is NaN: in a VAE one of its decoder."""
    folder = tmp_path_factory.mktemp("damaged")

    def copy(part):
        with safe_open(weights / part.nano, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(weights / part.nano)
        matrices = [n for n, tensor in tensors.items() if tensor.ndim > 1 and not n.startswith(("encoder", "embed"))]
        name = max(matrices)
        tensors[name].view(-1)[0] = torch.nan
        save_file(tensors, folder / part.nano, metadata)
        return folder / part.nano

    return copy


@pytest.fixture(scope="module")
def joint():
    generator = torch.Generator().manual_seed(2)
    streams = torch.randn(1, 48, 3, 2, 4, generator=generator), torch.randn(1, 64, 11, generator=generator)
    return {"samples": comfy.nested_tensor.NestedTensor(streams)}


def test_a_damaged_transformer_stops_at_its_first_step(damaged, prompt, latent):
    model, seen = load_model(damaged(files.MODEL), torch.float32), []
    model.model.diffusion_model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match=TRANSFORMER):
        Sampler.execute(model, prompt, latent, 5, 8, 5.0)
    assert len(seen) == 1


def test_a_damaged_text_encoder_is_named(damaged):
    with pytest.raises(ValueError, match="The text encoder gave NaN"):
        EncodePrompt.execute(load_clip(damaged(files.TEXT_ENCODER), "default"), "A red ball bounces")


def test_a_damaged_video_vae_leaves_no_file(damaged, loaded, joint):
    vae = load_video(damaged(files.VIDEO_VAE))
    with pytest.raises(ValueError, match="The video VAE gave NaN"):
        Decode.execute(joint, vae, loaded[3])
    with pytest.raises(ValueError, match="The video VAE gave NaN"):
        SaveVideo.execute("finite/clip", latent=joint, vae=vae, audio_vae=loaded[3])
    folder, *_ = folder_paths.get_save_image_path("finite/clip", folder_paths.get_output_directory())
    assert not any(path.is_file() for path in Path(folder).iterdir())


def test_a_damaged_audio_vae_is_named(damaged, loaded, joint):
    with pytest.raises(ValueError, match="The audio VAE gave NaN"):
        Decode.execute(joint, loaded[2], load_audio(damaged(files.AUDIO_VAE)))


def test_infinity_is_refused_and_the_rest_passes():
    good = torch.tensor([1.0, -2.0])
    assert require_finite(good, "It") is good
    for bad in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(ValueError, match="^It gave NaN or infinite values.*download it again.$"):
            require_finite(torch.tensor([1.0, bad]), "It")
