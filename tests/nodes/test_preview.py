"""Pictures of a clip while it is sampled, and what a small decoder for them is given."""

import json

import comfy.utils
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from pack.model_loader.config import WAN22_LATENT_MEAN, WAN22_LATENT_STD
from pack.nodes import files
from pack.nodes.host import PREVIEW, LatentFormat, load_model
from pack.nodes.sampling import Sampler
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def test_preview_shows_the_middle_frame(loaded, latent, monkeypatch):
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    previewer = latent_preview.get_previewer(torch.device("cpu"), loaded[0].model.latent_format)
    video = torch.zeros(1, 48, 3, 2, 4)
    dark = previewer.decode_latent_to_preview(video).getpixel((0, 0))
    video[:, :, 1] = 5
    assert previewer.decode_latent_to_preview(video).size == (4, 2)
    assert previewer.decode_latent_to_preview(video).getpixel((0, 0)) != dark


def test_every_step_has_a_preview_also_where_core_shows_packed_streams(loaded, prompt, latent, monkeypatch):
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    shown = []
    absolute = comfy.utils.ProgressBar.update_absolute
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, value, total=None, preview=None: [shown.append(preview), absolute(self, value, total, preview)],
    )
    sampled = Sampler.execute(loaded[0], prompt, latent, 5, 8, 5.0).args[0]
    video, audio = sampled["samples"].unbind()
    width, height = video.shape[4], video.shape[3]
    assert len(shown) == 8 and all(picture.size == (width, height) for _, picture, _ in shown)
    previewer = latent_preview.get_previewer(torch.device("cpu"), loaded[0].model.latent_format)
    packed, _ = comfy.utils.pack_latents([video, audio])  # what ComfyUI 0.24 gives
    expected = previewer.decode_latent_to_preview(video)
    assert previewer.decode_latent_to_preview(packed).tobytes() == expected.tobytes()


def test_a_model_file_brings_its_own_preview_colours(weights, tmp_path, monkeypatch):
    with safe_open(weights / files.MODEL.nano, "pt") as file:
        metadata = file.metadata()
    rows = [[0.0, 0.0, 0.0]] * 48 + [[1.0, -1.0, -1.0]]  # the bias alone: red
    tensors = load_file(weights / files.MODEL.nano)
    save_file(tensors, tmp_path / "red.safetensors", {**metadata, PREVIEW: json.dumps(rows)})
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    latent_format = load_model(tmp_path / "red.safetensors", torch.float32).model.latent_format
    previewer = latent_preview.get_previewer(torch.device("cpu"), latent_format)
    assert previewer.decode_latent_to_preview(torch.randn(1, 48, 3, 2, 4)).getpixel((0, 0)) == (255, 0, 0)
    assert latent_format.taesd_decoder_name is None  # the small decoder is for another VAE's latents


def test_a_small_decoder_gets_latents_as_wan22_has_them_before_they_are_normalised(loaded):
    """ComfyUI since 0.36 asks the format for them; what is sampled, and every LATENT, stays as it is."""
    latent_format, normalised = LatentFormat(), torch.randn(1, 48, 1, 2, 3)
    mean, std = (torch.tensor(numbers).view(1, 48, 1, 1, 1) for numbers in (WAN22_LATENT_MEAN, WAN22_LATENT_STD))
    torch.testing.assert_close(latent_format.process_out(normalised), normalised * std + mean)
    assert latent_format.taesd_decoder_name == "lighttaew2_2"
    model = loaded[0].model
    assert model.process_latent_in(normalised) is normalised and model.process_latent_out(normalised) is normalised
