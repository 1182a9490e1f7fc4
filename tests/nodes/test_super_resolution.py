"""Super-resolution: the published second stage from one node, its sizes, its first image, its untouched sound."""

import gc
import weakref

import comfy.model_management
import comfy.nested_tensor
import pytest
import torch
from pack.nodes.conditioning import FirstImage
from pack.nodes.host import FIRST_IMAGE
from pack.nodes.sampling import Sampler
from pack.nodes.soundtrack import Soundtrack
from pack.nodes.super_resolution import SuperResolution, target_size
from pack.sampler.conditioning import guided, sr_video_scale
from pack.sampler.denoise import denoise_unipc, seeded_noise
from pack.sampler.schedule import flow_sigmas
from pack.sampler.super_resolution import start_super_resolution

SEED = 11
LOCAL = {"positions": "v1", "local_attention_layers": (0, 1, 3), "frame_receptive_field": 1}
DOUBLE = {"size": "factor", "factor": 2.0}


@pytest.fixture(scope="module")
def refiner(model_of):
    return model_of("1080p_sr", **LOCAL)


@pytest.fixture
def clip(loaded, prompt, latent):
    return Sampler.execute(loaded[0], prompt, latent, SEED, 2, 5.0).args[0]


@pytest.fixture
def image_prompt(loaded, prompt, latent):
    image = torch.rand(1, 64, 128, 3, generator=torch.Generator().manual_seed(1))
    return FirstImage.execute(prompt, loaded[2], latent, image).args[0]


def refine(model, positive, clip, size=DOUBLE, steps=5, noise_level=220, corners=True, guidance=1.0, **settings):
    return SuperResolution.execute(
        model, positive, clip, SEED, size, steps, 5.0, noise_level, corners, guidance, **settings
    ).args[0]


def published(model, clip, *, text, negative=None, image=None, noise_level=220, align_corners=True, steps=5):
    """Return the video of the published stage, calling the network itself."""
    video, audio = clip["samples"].unbind()
    height, width = 2 * video.shape[3], 2 * video.shape[4]
    start, heard = start_super_resolution(
        video, audio.transpose(1, 2), height, width, seeded_noise(SEED),
        noise_level=noise_level, align_corners=align_corners,
    )  # fmt: skip
    network = model.model.diffusion_model

    def velocity_of(features):
        return lambda video, audio, sigma: network(video, audio, features)

    velocity = velocity_of(text)
    if negative is not None:
        scales = sr_video_scale(video.shape[2], 3.5)
        velocity = guided(velocity, velocity_of(negative), lambda sigma: scales)
    return denoise_unipc(velocity, start, heard, flow_sigmas(steps), image=image, keep_audio=True)[0]


def test_the_node_is_the_published_stage_with_local_attention(refiner, prompt, clip):
    assert refiner.model.diffusion_model.config.local_attention_layers == (0, 1, 3)
    video, audio = refine(refiner, prompt, clip)["samples"].unbind()
    torch.testing.assert_close(video, published(refiner, clip, text=prompt[0][0]), atol=1e-5, rtol=0)
    assert video.shape == (1, 48, 3, 4, 8) and torch.equal(audio, clip["samples"].unbind()[1])


def test_noise_level_corners_and_steps(refiner, prompt, clip):
    for settings in ({"noise_level": 0}, {"noise_level": 500}, {"align_corners": False}, {"steps": 3}):
        expected = published(refiner, clip, text=prompt[0][0], **settings)
        if "align_corners" in settings:
            settings = {"corners": settings["align_corners"]}
        video = refine(refiner, prompt, clip, **settings)["samples"].unbind()[0]
        torch.testing.assert_close(video, expected, atol=1e-5, rtol=0)


def test_guidance_is_the_published_alternative(refiner, loaded, prompt, clip):
    negative = [[prompt[0][0].flip(1), {}]]
    expected = published(refiner, clip, text=prompt[0][0], negative=negative[0][0])
    video = refine(refiner, prompt, clip, guidance=3.5, negative=negative)["samples"].unbind()[0]
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="guidance is 3.5 and `negative` is not connected"):
        refine(refiner, prompt, clip, guidance=3.5)


def test_the_first_image_is_encoded_again_at_the_new_size(refiner, loaded, latent, image_prompt, notices):
    clip = Sampler.execute(loaded[0], image_prompt, latent, SEED, 2, 5.0).args[0]
    larger = {"samples": comfy.nested_tensor.NestedTensor((torch.zeros(1, 48, 3, 4, 8), torch.zeros(1, 64, 11)))}
    image = torch.rand(1, 64, 128, 3, generator=torch.Generator().manual_seed(1))
    expected = FirstImage.execute(image_prompt, loaded[2], larger, image).args[0][0][1][FIRST_IMAGE]
    video = refine(refiner, image_prompt, clip, vae=loaded[2])["samples"].unbind()[0]
    assert torch.equal(video[:, :, :1], expected)
    without = published(refiner, clip, text=image_prompt[0][0], image=expected)
    torch.testing.assert_close(video, without, atol=1e-5, rtol=0)
    assert not any("first image" in note for note in notices)


def test_a_first_image_without_a_vae_is_left_out_and_told(refiner, image_prompt, clip, notices):
    video = refine(refiner, image_prompt, clip)["samples"].unbind()[0]
    torch.testing.assert_close(video, published(refiner, clip, text=image_prompt[0][0]), atol=1e-5, rtol=0)
    assert "The first image is not used, because no video VAE is connected" in notices[-1]


def test_a_driving_soundtrack_passes_on(refiner, loaded, prompt, latent):
    time = torch.arange(22050) / 44100
    audio = {"waveform": torch.sin(2000 * time)[None, None], "sample_rate": 44100}
    driven = Soundtrack.execute(latent, audio, loaded[3]).args[0]
    clip = Sampler.execute(loaded[0], prompt, driven, SEED, 2, 5.0).args[0]
    refined = refine(refiner, prompt, clip)
    assert torch.equal(refined["samples"].unbind()[1], driven["samples"].unbind()[1])
    assert "noise_mask" not in refined and refined.keys() == clip.keys() - {"noise_mask"}


@pytest.mark.parametrize(
    ("clip", "size", "expected"),
    [
        ((16, 28), {"size": "540p"}, (960, 544)),
        ((16, 28), {"size": "1080p"}, (1920, 1088)),
        ((28, 16), {"size": "540p"}, (544, 960)),
        ((16, 28), {"size": "720p"}, (1280, 704)),
        ((10, 20), {"size": "1080p"}, (2048, 1024)),
        ((6, 6), {"size": "factor", "factor": 2.0}, (192, 192)),
        ((16, 28), {"size": "custom", "width": 700, "height": 300}, (672, 288)),
    ],
)
def test_sizes(clip, size, expected):
    assert target_size(size, torch.empty(1, 48, 2, *clip, device="meta")) == expected


def test_sizes_outside_the_training_and_stretched_ones_are_told(refiner, prompt, clip, notices):
    refine(refiner, prompt, clip, {"size": "custom", "width": 128, "height": 128}, steps=1)
    assert notices[-1].startswith("128x128\n")
    assert "128x128 is not what the 1080p_sr model was trained for (2048x1024): expect artefacts." in notices[-1]
    assert "its width grows 0.50 times as much as its height" in notices[-1]


def test_an_unknown_size_is_refused_before_the_run():
    with pytest.raises(ValueError, match="size is unknown; expected one of 540p, 720p, 1080p, factor, custom"):
        SuperResolution.validate_inputs()
    assert SuperResolution.validate_inputs(DOUBLE) is True


def test_the_wrong_model_is_named(refiner, loaded, prompt, clip, latent):
    with pytest.raises(ValueError, match="The model is distill, which makes clips from noise; super-resolution wants"):
        refine(loaded[0], prompt, clip)
    with pytest.raises(ValueError, match="for super-resolution: it refines a finished clip. Connect it to 'Happy"):
        Sampler.execute(refiner, prompt, latent, SEED, 2, 5.0)


def test_nothing_of_ours_keeps_the_first_network(model_of, refiner, prompt, latent):
    """Between the stages the base network can go: what is left of it is a latent."""
    base = model_of("base")
    network = weakref.ref(base.model.diffusion_model)
    clip = Sampler.execute(base, prompt, latent, SEED, 2, 5.0, prompt).args[0]
    comfy.model_management.unload_all_models()
    del base
    gc.collect()
    comfy.model_management.cleanup_models()
    assert network() is None
    assert refine(refiner, prompt, clip, steps=1)["samples"].unbind()[0].isfinite().all()
