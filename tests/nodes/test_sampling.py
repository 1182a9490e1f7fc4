"""Sampling through core's guiders with random weights: our sampler, core's, first image, guidance, interrupt."""

import comfy.model_management
import comfy.model_sampling
import comfy.nested_tensor
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from pack.nodes.conditioning import EmptyLatent, FirstImage
from pack.nodes.host import FIRST_IMAGE
from pack.nodes.prompt import EncodePrompt
from pack.nodes.sampling import Sampler, SamplerSelect, Sigmas, sample_renoise
from pack.nodes.super_resolution import SuperResolution
from pack.sampler.denoise import denoise_renoise
from pack.sampler.schedule import flow_sigmas

import nodes as stock

SEED = 5


def sample(loaded, conditioning, latent, seed=SEED, steps=8):
    return Sampler.execute(loaded[0], conditioning, latent, seed, steps, 5.0).args[0]["samples"].unbind()


def sample_custom_advanced(loaded, conditioning, latent, sampler, sigmas, seed=SEED):
    guider = custom.BasicGuider.execute(loaded[0], conditioning).args[0]
    noise = custom.RandomNoise.execute(seed).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"].unbind()


@pytest.fixture
def image():
    return torch.rand(1, 48, 80, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def image_prompt(loaded, prompt, latent, image):
    return FirstImage.execute(prompt, loaded[2], latent, image).args[0]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_result_is_a_joint_latent_of_the_asked_size(loaded, prompt, latent):
    video, audio = sample(loaded, prompt, latent)
    assert video.shape == (1, 48, 3, 2, 4) and audio.shape == (1, 64, 11)
    assert video.dtype == audio.dtype == torch.float32 and video.isfinite().all() and audio.isfinite().all()
    assert video.std() > 0 and audio.std() > 0


def test_cores_lcm_gives_the_result_of_our_sampler(loaded, prompt, latent):
    lcm = custom.KSamplerSelect.execute("lcm").args[0]
    theirs = sample_custom_advanced(loaded, prompt, latent, lcm, flow_sigmas(8))
    assert equal(sample(loaded, prompt, latent), theirs)


def test_sampler_and_sigmas_nodes_do_what_the_sampler_node_does(loaded, prompt, latent):
    sampler, sigmas = SamplerSelect.execute().args[0], Sigmas.execute(6, 5.0).args[0]
    assert equal(
        sample(loaded, prompt, latent, steps=6), sample_custom_advanced(loaded, prompt, latent, sampler, sigmas)
    )


def test_our_sampler_is_the_published_loop(loaded, prompt, latent, image_prompt):
    """Against `denoise_renoise` calling the network itself, with the same noise."""
    network = loaded[0].model.diffusion_model
    start = comfy.sample.prepare_noise(latent["samples"], SEED).unbind()
    draws = [torch.randn(1, 1, sum(x.numel() for x in start)) for _ in range(8)]
    shapes = [x.shape for x in start]
    unpacked = [x for draw in draws for x in comfy.utils.unpack_latents(draw, shapes)]

    def velocity(video, audio, sigma):
        v_video, v_audio = network(video, audio.transpose(1, 2), image_prompt[0][0])
        return v_video, v_audio.transpose(1, 2)

    ours = denoise_renoise(
        velocity, *start, flow_sigmas(8), noise=lambda like: unpacked.pop(0), image=image_prompt[0][1][FIRST_IMAGE]
    )
    given = iter(draws)
    sampler = comfy.samplers.KSAMPLER(sample_renoise, {"noise_sampler": lambda sigma, sigma_next: next(given)})
    hosted = sample_custom_advanced(loaded, image_prompt, latent, sampler, flow_sigmas(8))
    for a, b in zip(ours, hosted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 8, 20])  # divisors of 1000: core picks from a table of 1000 levels
def test_cores_simple_scheduler_is_our_schedule(loaded, steps):
    simple = comfy.samplers.calculate_sigmas(loaded[0].get_model_object("model_sampling"), "simple", steps)
    torch.testing.assert_close(simple, flow_sigmas(steps), atol=1e-6, rtol=0)


def test_stock_ksampler(loaded, prompt, latent):
    negative = EncodePrompt.execute(loaded[1], "noise").args[0]
    lcm = stock.KSampler().sample(loaded[0], SEED, 8, 1.0, "lcm", "simple", prompt, negative, latent)[0]
    for a, b in zip(sample(loaded, prompt, latent), lcm["samples"].unbind(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    euler = stock.KSampler().sample(loaded[0], SEED, 4, 3.0, "euler", "simple", prompt, negative, latent)[0]
    assert all(x.isfinite().all() for x in euler["samples"].unbind())


def test_seed_decides(loaded, prompt, latent):
    first = sample(loaded, prompt, latent)
    assert equal(first, sample(loaded, prompt, latent))
    assert not torch.equal(first[0], sample(loaded, prompt, latent, seed=SEED + 1)[0])


@pytest.mark.parametrize("variant", ["distill", "base", "540p_sr"])
def test_a_model_read_afresh_gives_the_same_clip_from_the_same_seed(model_of, prompt, latent, variant):
    def clip(model, seed):
        if variant != "540p_sr":
            return Sampler.execute(model, prompt, latent, seed, 4, 5.0, prompt).args[0]["samples"].unbind()
        size = {"size": "factor", "factor": 2.0}
        return (
            SuperResolution.execute(model, prompt, latent, seed, size, 2, 5.0, 220, True, 1.0)
            .args[0]["samples"]
            .unbind()
        )

    changes = {"positions": "v1"} if variant == "540p_sr" else {}
    models = model_of(variant, **changes), model_of(variant, **changes)
    first = clip(models[0], SEED)
    torch.rand(5)  # whatever else draws in the process
    assert models[0].model is not models[1].model and equal(first, clip(models[1], SEED))
    assert equal(first, clip(models[0], SEED)) and not torch.equal(first[0], clip(models[0], SEED + 1)[0])


def test_prompt_and_first_image_have_an_effect(loaded, prompt, latent, image_prompt):
    first = sample(loaded, prompt, latent)
    other = EncodePrompt.execute(loaded[1], "a green cube").args[0]
    assert not torch.equal(first[0], sample(loaded, other, latent)[0])
    assert not torch.equal(first[0][:, :, 1:], sample(loaded, image_prompt, latent)[0][:, :, 1:])


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    # core's uni_pc ends at sigma 0.001 in place of 0, so a thousandth of the noise stays
    [("happyhorse", 0), ("lcm", 0), ("euler", 1e-5), ("dpmpp_2m", 1e-5), ("uni_pc", 5e-3)],
)
def test_every_sampler_honours_the_first_image(loaded, latent, image_prompt, sampler, tolerance):
    node = SamplerSelect.execute if sampler == "happyhorse" else lambda: custom.KSamplerSelect.execute(sampler)
    video, _ = sample_custom_advanced(loaded, image_prompt, latent, node().args[0], flow_sigmas(4))
    torch.testing.assert_close(video[:, :, :1], image_prompt[0][1][FIRST_IMAGE], atol=tolerance, rtol=0)


def test_a_stock_noise_mask_over_frame_0_does_the_same(loaded, prompt, latent, image_prompt):
    video, audio = (x.clone() for x in latent["samples"].unbind())
    video[:, :, :1] = image_prompt[0][1][FIRST_IMAGE]
    mask = torch.ones(1, 1, *video.shape[2:])
    mask[:, :, :1] = 0
    masked = {
        "samples": comfy.nested_tensor.NestedTensor((video, audio)),
        "noise_mask": comfy.nested_tensor.NestedTensor((mask, torch.ones(1, 1, audio.shape[2]))),
    }
    for a, b in zip(sample(loaded, prompt, masked), sample(loaded, image_prompt, latent), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_guidance_with_prompts_of_different_length_pads_neither(loaded, prompt, latent):
    """uncond + 3 (cond - uncond) from the network's own calls; the negative is twice as long, which core would pad."""
    model = loaded[0].model
    negative = EncodePrompt.execute(loaded[1], "x" * 37).args[0]
    assert negative[0][0].shape[1] == 2 * prompt[0][0].shape[1]
    guider = custom.CFGGuider.execute(loaded[0], prompt, negative, 3.0).args[0]
    start = comfy.sample.prepare_noise(latent["samples"], SEED)
    one_step = torch.tensor([flow_sigmas(8)[0], 0.0])
    sampled = guider.sample(start, latent["samples"], comfy.samplers.ksampler("euler"), one_step).unbind()
    video, audio = start.unbind()
    cond, uncond = (model.diffusion_model(video, audio.transpose(1, 2), text[0][0]) for text in (prompt, negative))
    for x, a, b, ours in (
        (video, cond[0], uncond[0], sampled[0]),
        (audio, cond[1].transpose(1, 2), uncond[1].transpose(1, 2), sampled[1]),
    ):
        torch.testing.assert_close(ours, x - one_step[0] * (b + 3.0 * (a - b)), atol=1e-4, rtol=0)


def test_a_batch_is_sampled_clip_by_clip(loaded, prompt, latent):
    both = comfy.nested_tensor.NestedTensor([x.repeat(2, *[1] * (x.ndim - 1)) for x in latent["samples"].unbind()])
    video, audio = sample(loaded, prompt, {"samples": both})
    assert video.shape[0] == audio.shape[0] == 2 and not torch.equal(video[0], video[1])


def test_interrupt_stops_between_steps_and_the_next_run_works(loaded, prompt, latent, monkeypatch):
    steps = []
    prepare = latent_preview.prepare_callback

    def interrupting(*arguments):
        callback = prepare(*arguments)

        def step(number, *rest):
            callback(number, *rest)
            steps.append(number)
            if number == 2:
                comfy.model_management.interrupt_current_processing()

        return step

    monkeypatch.setattr(latent_preview, "prepare_callback", interrupting)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(loaded, prompt, latent)
    assert steps == [0, 1, 2]
    monkeypatch.undo()
    assert sample(loaded, prompt, latent)[0].isfinite().all()


@pytest.mark.parametrize(
    ("size", "seconds", "video", "audio"),
    [
        ({"size": "nano 96x96"}, 2.0, (1, 48, 13, 6, 6), (1, 64, 51)),
        ({"size": "256p", "ratio": "16:9"}, 5.0, (1, 48, 32, 16, 28), (1, 64, 126)),
        ({"size": "256p", "ratio": "9:16"}, 1.0, (1, 48, 7, 28, 16), (1, 64, 26)),
        ({"size": "1080p", "ratio": "16:9"}, 0.2, (1, 48, 2, 68, 120), (1, 64, 6)),
        ({"size": "custom", "width": 100, "height": 70}, 0.2, (1, 48, 2, 4, 6), (1, 64, 6)),
    ],
)
def test_sizes(size, seconds, video, audio):
    samples = EmptyLatent.execute(size, seconds).args[0]["samples"].unbind()
    assert tuple(samples[0].shape) == video and tuple(samples[1].shape) == audio


def test_what_does_not_fit_is_named(loaded, prompt, latent):
    other_model = type("OtherModel", (), {"model": torch.nn.Identity()})()
    with pytest.raises(
        ValueError, match="The model is Identity, expected HappyHorse. Connect the MODEL of 'Load Happy"
    ):
        Sampler.execute(other_model, prompt, latent, 0, 8, 5.0)
    silent = {"samples": latent["samples"].unbind()[0]}
    with pytest.raises(ValueError, match=r"shape \[1, 48, 3, 2, 4\] and no sound.*Empty Latent"):
        Sampler.execute(loaded[0], prompt, silent, 0, 8, 5.0)
    with pytest.raises(ValueError, match="expected video .*Concat AV Latent"):
        stock.KSampler().sample(loaded[0], SEED, 2, 1.0, "euler", "simple", prompt, prompt, silent)
    foreign = [[torch.zeros(1, 4, 77), {}]]
    with pytest.raises(ValueError, match="77 features a token, this model reads 48. Encode it with the model's own"):
        Sampler.execute(loaded[0], foreign, latent, 0, 8, 5.0)


def test_a_first_image_of_another_size_is_refused(loaded, image_prompt):
    other = EmptyLatent.execute({"size": "custom", "width": 96, "height": 32}, 0.4).args[0]
    with pytest.raises(ValueError, match="prepared for 64 x 32 pixels, but the latent is 96 x 32"):
        sample(loaded, image_prompt, other)


def test_an_unknown_size_is_refused_before_the_run():
    with pytest.raises(ValueError, match="size is unknown; expected one of nano 96x96, 256p"):
        EmptyLatent.validate_inputs()
    assert EmptyLatent.validate_inputs({"size": "256p", "ratio": "16:9"}) is True
