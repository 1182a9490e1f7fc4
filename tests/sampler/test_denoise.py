"""The loops: conditioning that stays clean, noise order, progress, and errors."""

import pytest
import torch
from pack.sampler.conditioning import base_video_scale, guided, sr_video_scale
from pack.sampler.denoise import denoise_renoise, denoise_unipc, seeded_noise
from pack.sampler.schedule import flow_sigmas, flow_timesteps

SIGMAS = flow_sigmas(4)


@pytest.fixture
def latents():
    noise = seeded_noise(3)
    return noise(torch.empty(2, 8, 3, 4, 6)), noise(torch.empty(2, 9, 64))


def network(video, audio, sigma):
    """A velocity that depends on everything, so that a wrong input shows."""
    return torch.tanh(video) + audio.mean() + sigma, torch.tanh(audio) - video.mean()


def run(loop, video, audio, **settings):
    if loop is denoise_renoise:
        settings["noise"] = seeded_noise(7)
    return loop(settings.pop("velocity", network), video, audio, SIGMAS, **settings)


LOOPS = pytest.mark.parametrize("loop", [denoise_renoise, denoise_unipc])


@LOOPS
def test_the_first_image_is_what_the_network_sees_and_what_comes_back(loop, latents):
    video, audio = latents
    image = torch.randn(1, 8, 1, 4, 6)
    seen = []
    found, _ = run(loop, video, audio, image=image, on_step=lambda step: seen.append(step.video[:, :, :1]))
    assert len(seen) == 4
    for frame in [*seen, found[:, :, :1]]:
        assert torch.equal(frame, image.expand(2, -1, -1, -1, -1))
    assert not torch.allclose(run(loop, video, audio)[0][:, :, 1:], found[:, :, 1:])


@LOOPS
def test_a_driving_soundtrack_stays_and_comes_back_untouched(loop, latents):
    video, audio = latents
    heard = []
    _, kept = run(loop, video, audio, keep_audio=True, on_step=lambda step: heard.append(step.audio))
    assert all(torch.equal(each, audio) for each in [*heard, kept])
    assert not torch.equal(run(loop, video, audio)[1], audio)


@LOOPS
def test_steps_are_reported_in_order_with_their_prediction(loop, latents):
    video, audio = latents
    clean = torch.randn_like(video)
    steps = []
    run(
        loop,
        video,
        audio,
        velocity=lambda video, audio, sigma: ((video - clean) / sigma, audio),
        on_step=steps.append,
    )
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.sigma for step in steps] == SIGMAS[:-1].tolist()
    for step in steps:
        torch.testing.assert_close(step.denoised_video, clean, rtol=0, atol=1e-5)


@LOOPS
def test_clips_of_a_batch_do_not_mix(loop, latents):
    video, audio = latents

    def apart(video, audio, sigma):
        return torch.tanh(video) + sigma, torch.tanh(audio)

    noise = torch.randn(2, 8, 3, 4, 6), torch.randn(2, 9, 64)

    def run_with(keep):
        draws = [part[keep] for part in noise] * 4
        settings = {"noise": lambda like: draws.pop(0)} if loop is denoise_renoise else {}
        return loop(apart, video[keep], audio[keep], SIGMAS, **settings)

    for one, both in zip(run_with(slice(1, 2)), run_with(slice(0, 2)), strict=True):
        torch.testing.assert_close(one, both[1:2])


def test_renoise_draws_video_noise_first_and_at_every_step(latents):
    shapes = []

    def noise(like):
        shapes.append(tuple(like.shape))
        return torch.zeros_like(like)

    denoise_renoise(network, *latents, SIGMAS, noise=noise)
    assert shapes == [(2, 8, 3, 4, 6), (2, 9, 64)] * 4


def test_a_seed_gives_the_same_noise_and_another_seed_another():
    like = torch.empty(2, 8, 3, 4, 6)
    first = seeded_noise(11)
    again = seeded_noise(11)
    assert torch.equal(first(like), again(like)) and torch.equal(first(like), again(like))
    assert not torch.equal(seeded_noise(11)(like), seeded_noise(12)(like))


def test_guidance_of_scale_one_and_zero_are_the_two_prompts(latents):
    def negative(video, audio, sigma):
        return -video, -audio

    for scale, expected in ((1.0, network), (0.0, negative)):
        found = guided(network, negative, lambda sigma, scale=scale: scale, scale)(*latents, 0.5)
        for ours, theirs in zip(found, expected(*latents, 0.5), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_published_guidance_schedule():
    scales = [base_video_scale(sigma) for sigma in flow_sigmas(32)[:-1].tolist()]
    assert scales == [5.0] * 27 + [2.0] * 5
    assert [scale == 5.0 for scale in scales] == (flow_timesteps(32) > 500).tolist()
    assert sr_video_scale(15).flatten().tolist() == [2.0] * 13 + [3.5] * 2
    assert sr_video_scale(3, scale=1.5).flatten().tolist() == [1.5] * 3


def test_bad_shapes_say_what_was_expected(latents):
    video, audio = latents
    with pytest.raises(ValueError, match="expected .B, C, T, H, W. and .B, L, C. of one batch size"):
        denoise_unipc(network, video, audio[:1], SIGMAS)
    with pytest.raises(ValueError, match="first image latent has shape .1, 8, 1, 4, 4.; expected .2, 8, 1, 4, 6."):
        denoise_unipc(network, video, audio, SIGMAS, image=torch.zeros(1, 8, 1, 4, 4))
