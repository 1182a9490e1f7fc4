"""The base model: 32 FlowUniPC steps with a scale for each stream, from our node and from a stock graph."""

import comfy.sample
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from pack.nodes.conditioning import FirstImage
from pack.nodes.guidance import NEGATIVE_PROMPT, Guider, NegativePrompt
from pack.nodes.host import FIRST_IMAGE
from pack.nodes.prompt import EncodePrompt
from pack.nodes.sampling import Sampler, SamplerSelect, Sigmas
from pack.sampler.conditioning import base_video_scale, guided
from pack.sampler.denoise import denoise_unipc
from pack.sampler.schedule import flow_sigmas

SEED = 7


@pytest.fixture(scope="module")
def base(model_of):
    return model_of("base")


@pytest.fixture
def negative(loaded):
    return NegativePrompt.execute(loaded[1], "noise").args[0]


@pytest.fixture
def image_prompt(loaded, prompt, latent):
    image = torch.rand(1, 32, 64, 3, generator=torch.Generator().manual_seed(1))
    return FirstImage.execute(prompt, loaded[2], latent, image).args[0]


def sample(*arguments, **settings):
    return Sampler.execute(*arguments, **settings).args[0]["samples"].unbind()


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def velocity_of(network, text):
    def velocity(video, audio, sigma):
        v_video, v_audio = network(video, audio.transpose(1, 2), text)
        return v_video, v_audio.transpose(1, 2)

    return velocity


@pytest.mark.parametrize("shift", [5.0, 2.0])
def test_the_node_is_the_published_loop(base, image_prompt, negative, latent, shift):
    """Against `denoise_unipc` with `guided`, calling the network itself; rounding apart (1e-5 on values near 3).

    The negative has no first image of its own: it gets the positive's.
    """
    network = base.model.diffusion_model
    velocity = guided(
        velocity_of(network, image_prompt[0][0]), velocity_of(network, negative[0][0]), base_video_scale, 5.0
    )
    start = comfy.sample.prepare_noise(latent["samples"], SEED).unbind()
    loop = denoise_unipc(velocity, *start, flow_sigmas(8, shift), image=image_prompt[0][1][FIRST_IMAGE])
    node = sample(base, image_prompt, latent, SEED, 8, shift, negative)
    for a, b in zip(loop, node, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    assert torch.equal(node[0][:, :, :1], image_prompt[0][1][FIRST_IMAGE])


def test_a_stock_graph_gives_the_nodes_result(base, prompt, negative, latent):
    guider = Guider.execute(base, prompt, negative).args[0]
    sampler, sigmas = SamplerSelect.execute("unipc").args[0], Sigmas.execute(6, 5.0).args[0]
    noise = custom.RandomNoise.execute(SEED).args[0]
    stock = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"].unbind()
    assert equal(stock, sample(base, prompt, latent, SEED, 6, 5.0, negative))


def test_without_a_number_of_steps_it_takes_the_models_own(base, loaded, prompt, negative, latent, notices):
    assert equal(
        sample(base, prompt, latent, SEED, 0, 5.0, negative), sample(base, prompt, latent, SEED, 32, 5.0, negative)
    )
    assert equal(sample(loaded[0], prompt, latent, SEED, 0, 5.0), sample(loaded[0], prompt, latent, SEED, 8, 5.0))
    assert notices == ["32 steps, FlowUniPC"] * 2 + ["8 steps, distilled, without guidance"] * 2


def test_every_scale_counts(base, prompt, negative, latent):
    """Picture and sound hear each other, so a scale moves both; but in a single step only its own stream."""
    published = sample(base, prompt, latent, SEED, 1, 5.0, negative)
    louder = sample(base, prompt, latent, SEED, 1, 5.0, negative, audio_guidance=1.0)
    assert torch.equal(louder[0], published[0]) and not torch.equal(louder[1], published[1])
    milder = sample(base, prompt, latent, SEED, 1, 5.0, negative, guidance=1.5)
    assert torch.equal(milder[1], published[1]) and not torch.equal(milder[0], published[0])
    eight = sample(base, prompt, latent, SEED, 8, 5.0, negative)
    assert not equal(eight, sample(base, prompt, latent, SEED, 8, 5.0, negative, late_guidance=5.0))


def test_scales_of_one_need_no_negative_and_one_call_a_step(base, prompt, latent):
    network, calls = base.model.diffusion_model, []
    hook = network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    one = {"guidance": 1.0, "late_guidance": 1.0, "audio_guidance": 1.0}
    node = sample(base, prompt, latent, SEED, 4, 5.0, **one)
    hook.remove()
    start = comfy.sample.prepare_noise(latent["samples"], SEED).unbind()
    loop = denoise_unipc(velocity_of(network, prompt[0][0]), *start, flow_sigmas(4))
    assert calls == [1] * 4
    for a, b in zip(loop, node, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)


def test_a_missing_negative_is_named(base, prompt, latent):
    with pytest.raises(ValueError, match="`negative` is not connected. Connect 'HappyHorse Negative Prompt', or set"):
        Sampler.execute(base, prompt, latent, SEED, 2, 5.0)


def test_a_distilled_model_says_that_it_uses_no_negative(loaded, prompt, negative, latent, notices):
    given = sample(loaded[0], prompt, latent, SEED, 2, 5.0, negative)
    assert equal(given, sample(loaded[0], prompt, latent, SEED, 2, 5.0))
    plain = "2 steps, distilled, without guidance"
    assert notices == [f"{plain}: negative is not used", plain]


def test_the_negative_prompt_is_a_prompt_with_words_to_start_from(loaded):
    ours = NegativePrompt.execute(loaded[1], "blurred").args[0]
    assert torch.equal(ours[0][0], EncodePrompt.execute(loaded[1], "blurred").args[0][0][0])
    text = next(one for one in NegativePrompt.GET_SCHEMA().inputs if one.id == "text")
    assert text.default == NEGATIVE_PROMPT
    for fault in ("flicker", "fingers", "watermarks", "hiss", "lips", "robotic"):  # of picture, sound and delivery
        assert fault in NEGATIVE_PROMPT
