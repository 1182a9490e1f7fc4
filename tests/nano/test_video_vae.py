"""The steps between the stages of the VAE's training: frames to clips, and the latent turned to its main axes."""

from copy import deepcopy
from dataclasses import replace

import torch
from pack.model_loader.core_vae import VideoVAE, initialise
from pack.nano.train_video_vae import (
    CHANNELS,
    CONFIG,
    HELD,
    batch,
    held_loss,
    inflate,
    normalising_deviations,
    rotate_to_principal,
)


def test_an_inflated_vae_looks_at_the_present_only():
    torch.manual_seed(0)
    vae = initialise(VideoVAE(CONFIG)).vae
    clip = torch.randn(1, 3, 13, 32, 32)
    other = clip.clone()
    other[:, :, :5] = torch.randn(1, 3, 5, 32, 32)  # another past for the chunks after the second
    with torch.inference_mode():
        assert not torch.allclose(vae.encode(clip)[:, :, 2:], vae.encode(other)[:, :, 2:], atol=1e-4)
    inflate(vae)
    with torch.inference_mode():
        one, two = vae.encode(clip), vae.encode(other)
        torch.testing.assert_close(one[:, :, 2:], two[:, :, 2:], atol=1e-6, rtol=0)
        assert not torch.allclose(one[:, :, :2], two[:, :, :2], atol=1e-4)
        decoded = vae.decode(torch.cat([one[:, :, :2], two[:, :, 2:]], dim=2))
        torch.testing.assert_close(decoded, vae.decode(one), atol=1e-5, rtol=0)


def test_principal_axes_keep_what_varies_and_drop_the_rest():
    torch.manual_seed(0)
    vae = initialise(VideoVAE(CONFIG)).vae
    with torch.no_grad():  # a latent that varies along ten directions only
        vae.conv1.weight[:48] = (torch.randn(48, 10) @ torch.randn(10, 96) / 30)[..., None, None, None]
    clips = torch.randn(3, 3, 5, 64, 64)
    turned = deepcopy(vae)
    with torch.inference_mode():
        before = vae.encode(clips)
        raw = rotate_to_principal(turned, before)
        after = turned.encode(clips)
        whole = VideoVAE(replace(CONFIG, latent_std=normalising_deviations(raw)))
        whole.vae.load_state_dict(turned.state_dict())
        torch.testing.assert_close(turned.decode(after), vae.decode(before), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(whole.decode_raw(whole.encode(clips)), vae.decode(before), atol=1e-4, rtol=1e-3)
        noise_in_the_unused = torch.cat([torch.zeros(3, CHANNELS, 2, 4, 4), torch.randn(3, 48 - CHANNELS, 2, 4, 4)], 1)
        assert torch.equal(turned.decode(after + noise_in_the_unused), turned.decode(after))
    assert not after[:, CHANNELS:].any()
    deviations = after.std((0, 2, 3, 4))[:CHANNELS]
    torch.testing.assert_close(deviations, torch.tensor(raw), atol=1e-3, rtol=1e-3)
    assert deviations[9] > 10 * deviations[10] and list(deviations[:10]) == sorted(deviations[:10], reverse=True)


def test_every_step_sees_clips_of_its_own_at_either_size():
    small, again, other, large = batch(5, 2, 17), batch(5, 2, 17), batch(6, 2, 17), batch(5, 2, 5, scale=2)
    assert small.shape == (2, 3, 17, 96, 96) and large.shape == (2, 3, 5, 192, 192)
    assert torch.equal(small, again) and not torch.equal(small, other)
    assert small.min() >= -1 and small.max() <= 1


@torch.no_grad()
def test_the_latents_of_small_clips_are_held_and_those_of_large_ones_free():
    torch.manual_seed(0)
    whole = initialise(VideoVAE(CONFIG))
    before = deepcopy(whole)
    before.vae.conv1.bias[:CHANNELS] -= 1
    for scale, expected in ((1, HELD), (2, 0.0)):
        pixels, losses = batch(0, 1, 1, scale), []
        for other in (whole, before):
            torch.manual_seed(1)
            losses.append(held_loss(whole, other, pixels)[0])
        assert abs(losses[1] - losses[0] - expected) < 0.02
