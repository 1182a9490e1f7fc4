"""Pictures and sound: our decode against the stock nodes', encoding, TurboVAED, and the written file."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import comfy.model_management
import comfy.nested_tensor
import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras import nodes_audio, nodes_lt, nodes_video
from pack.model_loader.config import TURBO_7_7
from pack.model_loader.load import save_part
from pack.model_loader.turbo_vae import TurboVAE
from pack.nodes.conditioning import FirstImage
from pack.nodes.decode import Decode, SaveVideo, reported
from pack.nodes.host import FIRST_IMAGE
from pack.nodes.vae import load_video
from pack.sampler.media import first_image

import nodes as stock


@pytest.fixture(scope="module")
def sampled():
    generator = torch.Generator().manual_seed(2)
    video = torch.randn(1, 48, 3, 2, 4, generator=generator)
    audio = torch.randn(1, 64, 11, generator=generator)
    return {"samples": comfy.nested_tensor.NestedTensor((video, audio))}


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    """A tiny TurboVAED whose first window has 2 latent frames, later ones 1."""
    path = tmp_path_factory.mktemp("turbo") / "turbo.safetensors"
    config = replace(
        TURBO_7_7, block_out_channels=(24, 16, 12, 8), layers_per_block=(1, 1, 1, 1, 1), first_chunk_size=2, step_size=1
    )
    torch.manual_seed(3)
    save_part(path, TurboVAE(config), "video_vae", config, "turbo")
    return load_video(path)


def out_of_memory_at(call, module):
    """Make the call of that number of a module fail as on a full card, once; return the hook's handle."""
    calls = itertools.count(1)

    def fail(module, inputs):
        if next(calls) == call:
            raise torch.OutOfMemoryError("planted")

    return module.register_forward_pre_hook(fail)


def streams(path):
    """Return {type: (codec, start in s, seconds, rate)} of a media file, and its metadata."""
    with av.open(str(path)) as container:
        found = {}
        for stream in container.streams:
            rate = float(stream.average_rate) if stream.type == "video" else stream.rate
            start, seconds = (float(ticks * stream.time_base) for ticks in (stream.start_time, stream.duration))
            found[stream.type] = (stream.codec_context.name, start, seconds, rate)
        return found, dict(container.metadata)


def saved(output):
    entry = output.ui.as_dict()["images"][0]
    return Path(folder_paths.get_output_directory()) / entry["subfolder"] / entry["filename"]


def test_decode_gives_frames_and_sound(loaded, sampled):
    images, audio = Decode.execute(sampled, *loaded[2:]).args
    assert images.shape == (9, 32, 64, 3) and 0 <= images.min() < images.max() <= 1
    assert audio["sample_rate"] == 44100 and audio["waveform"].shape == (1, 2, 11 * 1764)


def test_stock_decode_nodes_give_the_same(loaded, sampled):
    images, audio = Decode.execute(sampled, *loaded[2:]).args
    video_latent, audio_latent = nodes_lt.LTXVSeparateAVLatent.execute(sampled).args
    assert torch.equal(stock.VAEDecode().decode(loaded[2], video_latent)[0], images)
    theirs = nodes_audio.VAEDecodeAudio.execute(loaded[3], audio_latent).args[0]
    assert theirs["sample_rate"] == 44100
    level = max(1.0, 5 * audio["waveform"].std().item())  # the stock node turns loud sound down, ours does not
    torch.testing.assert_close(theirs["waveform"], audio["waveform"] / level, atol=1e-6, rtol=1e-5)


def test_separate_and_concat_nodes(loaded, sampled):
    video, audio = nodes_lt.LTXVSeparateAVLatent.execute(sampled).args
    joined = nodes_lt.LTXVConcatAVLatent.execute(video, audio).args[0]
    for a, b in zip(joined["samples"].unbind(), sampled["samples"].unbind(), strict=True):
        assert torch.equal(a, b)
    tiled = stock.VAEDecodeTiled().decode(loaded[2], video, 64, overlap=16, temporal_size=8, temporal_overlap=4)[0]
    assert tiled.shape == (9, 32, 64, 3)


def test_stock_create_video(loaded, sampled, tmp_path):
    images, audio = Decode.execute(sampled, *loaded[2:]).args
    video = nodes_video.CreateVideo.execute(images, 25.0, audio).args[0]
    video.save_to(str(tmp_path / "stock.mp4"))
    assert video.get_dimensions() == (64, 32) and streams(tmp_path / "stock.mp4")[0].keys() == {"video", "audio"}


def test_encoding_is_normalised_and_stock_encode_crops(loaded):
    image = torch.rand(6, 40, 70, 3, generator=torch.Generator().manual_seed(4))
    latent = stock.VAEEncode().encode(loaded[2], image)[0]["samples"]
    network = loaded[2].first_stage_model
    cropped = image[:5, 4:36, 3:67] * 2 - 1  # 32 x 64 about the middle, 4k+1 frames
    mean, inverse_std = network.statistics("cpu")
    expected = (network.encode_raw(cropped.movedim(-1, 0)[None]) - mean) * inverse_std
    assert latent.shape == (1, 48, 2, 2, 4)
    torch.testing.assert_close(latent, expected, atol=1e-5, rtol=0)


def test_first_image_is_cropped_to_the_clips_ratio(loaded, prompt, latent):
    image = torch.rand(1, 50, 60, 3, generator=torch.Generator().manual_seed(4))
    conditioning = FirstImage.execute(prompt, loaded[2], latent, image).args[0]
    expected = loaded[2].first_stage_model.encode(first_image(image[0], 32, 64))
    torch.testing.assert_close(conditioning[0][1][FIRST_IMAGE], expected, atol=1e-5, rtol=0)
    assert FIRST_IMAGE not in prompt[0][1], "the prompt given must not change"


def test_stock_audio_encode_takes_any_rate(loaded, monkeypatch):
    """A tone at 48000 Hz reaches the network as the same tone at 51200 Hz, from both sides."""
    network, heard = loaded[3].first_stage_model.network, []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda waveform: heard.append(waveform) or encode(waveform))
    tone = torch.from_numpy(np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)).float()[None, None]
    latent = nodes_audio.VAEEncodeAudio.execute(loaded[3], {"waveform": tone, "sample_rate": 48000}).args[0]["samples"]
    expected = torch.from_numpy(np.sin(2 * np.pi * 440 * np.arange(51200) / 51200)).float().expand(1, 2, -1)
    assert latent.shape == (1, 64, 25)
    torch.testing.assert_close(heard[0][..., 500:-500], expected[..., 500:-500], atol=2e-3, rtol=0)


def test_turbo_vae_decodes_and_says_that_it_cannot_encode(turbo):
    assert turbo.decode(torch.randn(1, 48, 3, 2, 4)).shape == (1, 9, 32, 64, 3)
    with pytest.raises(ValueError, match="TurboVAED only decodes. To encode, load a Wan2.2 VAE"):
        turbo.encode(torch.rand(1, 32, 64, 3))


def test_frames_one_after_the_other_are_those_of_the_whole_decode(loaded, turbo):
    latent = torch.randn(2, 48, 4, 2, 4)
    for vae in (loaded[2], turbo):
        whole = (vae.decode(latent) * 255).to(torch.uint8).flatten(0, 1)
        pieces = list(vae.decode_frames(latent))
        assert all(piece.dtype == torch.uint8 and len(piece) == 1 for piece in pieces)
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("call", [1, 3])
def test_short_of_memory_the_rest_of_the_clip_is_decoded_in_strips(loaded, turbo, call):
    latent = torch.randn(1, 48, 4, 20, 2)  # 20 rows: two strips
    for vae, module in (
        (loaded[2], loaded[2].first_stage_model.vae.decoder),
        (turbo, turbo.first_stage_model.mid_block.resnets[0]),
    ):
        whole = torch.cat(list(vae.decode_frames(latent)))
        failing = out_of_memory_at(call, module)
        found = torch.cat(list(vae.decode_frames(latent)))
        failing.remove()
        before = 0 if call == 1 else 5  # what came before the failure is not decoded again
        assert found.shape == whole.shape and torch.equal(found[:before], whole[:before])
        assert not torch.equal(found[before:], whole[before:]), "strips differ near their seams"
        difference = (found[:, :160].float() - whole[:, :160].float()).abs().mean()
        assert difference < 0.1 * whole.float().std(), "far from the seam only attention over the frame differs"


def test_short_of_memory_decode_takes_cores_tiles(loaded):
    latent = torch.randn(1, 48, 3, 20, 20)
    vae = loaded[2]
    whole = vae.decode(latent)
    failing = out_of_memory_at(2, vae.first_stage_model.vae.decoder)
    tiled = vae.decode(latent)
    failing.remove()
    expected = vae.decode_tiled(latent, tile_x=16, tile_y=16, overlap=4)
    assert torch.equal(tiled, expected) and tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.2 * whole.std()


def test_what_is_no_lack_of_memory_is_not_caught(loaded):
    def fail(module, inputs):
        raise RuntimeError("a fault")

    hook = loaded[2].first_stage_model.vae.decoder.register_forward_pre_hook(fail)
    for run in (loaded[2].decode, lambda latent: list(loaded[2].decode_frames(latent))):
        with pytest.raises(RuntimeError, match="a fault"):
            run(torch.randn(1, 48, 2, 2, 2))
    hook.remove()


def test_saved_file(loaded, sampled):
    output = SaveVideo.execute("folder/clip", latent=sampled, vae=loaded[2], audio_vae=loaded[3])
    path = saved(output)
    found, _ = streams(path)
    assert path.name == "clip_00001_.mp4" and output.ui.as_dict()["animated"] == (True,)
    assert found["video"][0] == "h264" and found["video"][3] == 25
    assert found["audio"][0] == "aac" and found["audio"][3] == 44100
    assert found["video"][1] == found["audio"][1] == 0
    assert found["video"][2] == pytest.approx(9 / 25) and abs(found["video"][2] - found["audio"][2]) <= 1 / 25
    assert output.args[0].get_dimensions() == (64, 32)
    second = SaveVideo.execute("folder/clip", latent=sampled, vae=loaded[2], audio_vae=loaded[3])
    assert saved(second).name == "clip_00002_.mp4"


def test_saved_quality(loaded, sampled):
    for given in ({"latent": sampled, "vae": loaded[2], "audio_vae": loaded[3]}, {"images": torch.rand(5, 32, 64, 3)}):
        sizes = [saved(SaveVideo.execute("crf", crf=crf, **given)).stat().st_size for crf in (1, 51)]
        assert sizes[0] > 1.5 * sizes[1], given.keys()


def test_saved_sound_is_in_step_with_the_picture(loaded):
    """A click at 0.4 s is found there in the file, at its level."""
    images = torch.zeros(25, 32, 64, 3)
    waveform = torch.zeros(1, 2, 44100)
    waveform[..., 17640:17840] = 0.5 * torch.sin(torch.arange(200) / 5)
    path = saved(SaveVideo.execute("click", images=images, audio={"waveform": waveform, "sample_rate": 44100}))
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    start = frames[0].pts
    sound = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)[0]
    peak = np.abs(sound).argmax() + start
    assert 17640 - 100 <= peak <= 17840 + 100 and 0.3 < np.abs(sound).max() < 0.7


def test_the_graph_is_in_the_file(loaded, sampled, monkeypatch):
    monkeypatch.setattr(
        SaveVideo, "hidden", SimpleNamespace(prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}})
    )
    path = saved(SaveVideo.execute("graph", latent=sampled, vae=loaded[2], audio_vae=loaded[3]))
    _, metadata = streams(path)
    assert json.loads(metadata["prompt"]) == {"1": {}} and json.loads(metadata["workflow"]) == {"nodes": []}


def test_an_interrupt_stops_the_decoder_and_leaves_no_file(loaded, sampled):
    steps = itertools.count(1)

    def interrupt(module, inputs):
        if next(steps) == 2:
            comfy.model_management.interrupt_current_processing()

    hook = loaded[2].first_stage_model.vae.decoder.register_forward_pre_hook(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        SaveVideo.execute("stopped/clip", latent=sampled, vae=loaded[2], audio_vae=loaded[3])
    assert next(steps) == 3 and not list((Path(folder_paths.get_output_directory()) / "stopped").iterdir())
    steps = itertools.count(1)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Decode.execute(sampled, *loaded[2:])
    hook.remove()
    assert next(steps) == 3


def test_frames_are_reported_as_they_go_by(monkeypatch):
    seen = []
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    assert len(list(reported(torch.zeros(10, 2, 2, 3).split(5), 10))) == 2
    assert seen[-1] == (10, 10)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        list(reported(torch.zeros(10, 2, 2, 3).split(5), 10))


def test_1080p_is_cut_to_1080_rows_about_the_middle(loaded):
    latent = {
        "samples": comfy.nested_tensor.NestedTensor((torch.randn(1, 48, 1, 68, 120), torch.randn(1, 64, 1))),
    }
    images, _ = Decode.execute(latent, *loaded[2:]).args
    assert images.shape == (1, 1080, 1920, 3)
    assert torch.equal(images, loaded[2].decode(latent["samples"].unbind()[0])[0, :, 4:-4])
    output = SaveVideo.execute("full", latent=latent, vae=loaded[2], audio_vae=loaded[3])
    assert output.args[0].get_dimensions() == (1920, 1080)


def test_images_alone_are_silent(loaded):
    found, _ = streams(saved(SaveVideo.execute("silent", images=torch.zeros(5, 32, 64, 3))))
    assert found.keys() == {"video"}


def test_what_is_missing_or_wrong_is_named(loaded, sampled, latent):
    with pytest.raises(ValueError, match="nothing to save: connect the sampler's latent .with both VAEs., or images"):
        SaveVideo.execute("x")
    with pytest.raises(
        ValueError, match="The audio VAE input holds nothing. Connect the audio VAE of 'Load HappyHorse'"
    ):
        SaveVideo.execute("x", latent=sampled, vae=loaded[2])
    with pytest.raises(ValueError, match="The video VAE input holds a HappyHorse audio VAE"):
        Decode.execute(sampled, loaded[3], loaded[2])
    with pytest.raises(ValueError, match="The video VAE input holds another model's VAE"):
        Decode.execute(sampled, object(), loaded[3])
