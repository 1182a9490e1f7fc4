"""The training of super-resolution, and of the decoder on what it leaves: paths, walks, windows of pixels."""

import numpy as np
import pytest
import torch
from pack.model_loader.load import load_video_vae
from pack.nano import train_refined_decoder, world
from pack.nano.latents import scene_of
from pack.nano.train_refined_decoder import refined
from pack.nano.train_super_resolution import (
    SEEN,
    SEEN_WEIGHT,
    decode_window,
    draw_window,
    on_the_path,
    own_walk,
    pixels_of,
    with_pixels,
)
from pack.nano.train_video_vae import CHANNELS
from pack.nano.training import WEIGHTS, bf16_matmuls
from pack.sampler.schedule import flow_sigmas
from pack.sampler.super_resolution import upsample_latent


@pytest.fixture(scope="module")
def vae():
    """Return nano's video VAE."""
    return load_video_vae(WEIGHTS / "nano_video_vae.safetensors").requires_grad_(False)


def test_super_resolutions_path_leads_from_the_start_to_the_large_clip():
    start, large = torch.randn(2, 48, 3, 12, 12), torch.randn(2, 48, 3, 12, 12)
    x, velocity = on_the_path(start, large, torch.tensor([1.0, 0.3]))
    torch.testing.assert_close(x[0], start[0])
    torch.testing.assert_close(x[0] - velocity[0], large[0])
    torch.testing.assert_close(x[1] - 0.3 * velocity[1], large[1])


@pytest.mark.parametrize("image_given", [False, True])
def test_the_sampler_walks_while_it_is_taught(image_given):
    """A network that answers right at each step has no loss and walks to the clip; one that is off learns at each."""
    torch.manual_seed(0)
    large, start = torch.randn(2, 48, 3, 4, 4), torch.randn(2, 48, 3, 4, 4)
    heard, seen = torch.randn(2, 5, 64), []
    off = torch.zeros(1, requires_grad=True)
    levels = iter(flow_sigmas(5)[:-1])

    def network(x, audio):
        assert torch.equal(audio, heard) and not x.requires_grad
        seen.append(x)
        return (x - large) / next(levels) + off, torch.zeros_like(audio)

    loss, end = own_walk(network, start, heard, large, image_given, torch.eye(CHANNELS))
    assert loss.item() == pytest.approx(0, abs=1e-9) and len(seen) == 5
    assert torch.allclose(end, large, atol=1e-5)
    assert (seen[-1] - large)[:, :, 1:].abs().mean() < (seen[0] - large)[:, :, 1:].abs().mean()
    assert torch.equal(seen[0][:, :, :1], (large if image_given else start)[:, :, :1])
    levels, off.data = iter(flow_sigmas(5)[:-1]), torch.ones(1)
    loss, end = own_walk(network, start, heard, large, image_given, torch.eye(CHANNELS))
    last = flow_sigmas(5)[-2].item()
    assert torch.allclose(end[:, :, 1:], (large - last)[:, :, 1:], atol=1e-5)
    assert torch.equal(end[:, :, :1], large[:, :, :1]) == image_given
    (ends,) = torch.autograd.grad(end.sum(), off, retain_graph=True)
    assert ends.item() == pytest.approx(
        -last * end[:, :, int(image_given) :].numel(), rel=1e-5
    )  # of the last step alone
    loss.backward()
    assert loss.item() == pytest.approx(1) and off.grad.item() == pytest.approx(2)


def test_the_decoder_sees_where_the_sampler_ends_and_the_clip_it_should_be():
    torch.manual_seed(0)
    small, large, audio, text = (
        torch.randn(shape) for shape in ((1, 48, 13, 6, 6), (1, 48, 13, 12, 12), (1, 51, 64), (1, 9, 96))
    )
    began = []

    class Known:
        def draw(self, rng, count):
            assert count == 1
            return small, large, audio, text, np.array([7])

    def straight_to_the_clip(x, heard, features, attention):
        began.append(x)
        assert torch.equal(features, text) and not torch.equal(heard, audio)
        return began[0] - large, torch.zeros_like(heard)

    latent, window, pixels = refined(straight_to_the_clip, Known(), np.random.default_rng(0))
    assert torch.allclose(latent, large, atol=3e-3) and len(began) == 5  # levels begin at 0.9998
    assert (began[0] - upsample_latent(small, 12, 12, False)).abs()[:, :CHANNELS].mean() < 0.1
    assert len(window) == 5 and torch.equal(pixels, pixels_of(7, window))


def test_where_a_walk_ends_its_pixels_count(vae):
    """The loss is the error of decoded windows, of the clips that SEEN names, and reaches nothing beyond them."""
    clips, latents = SEEN
    torch.manual_seed(0)
    end = (0.1 * torch.randn(4, 48, 13, 12, 12)).requires_grad_()
    scenes = np.array([3, 5, 7, 9])
    loss, numbers = with_pixels(torch.tensor(0.25), end, scenes, vae, np.random.default_rng(4))
    rng = np.random.default_rng(4)
    windows = [draw_window(rng, latents) for _ in range(clips)]
    with torch.no_grad():
        shown = [decode_window(vae, clip, window) for clip, window in zip(end[:clips].split(1), windows, strict=True)]
    errors = [
        (a - pixels_of(i, w)).square().mean().item() for a, i, w in zip(shown, scenes[:clips], windows, strict=True)
    ]
    assert loss.item() == pytest.approx(0.25 + SEEN_WEIGHT * np.mean(errors), rel=1e-4)
    assert numbers == {"walk": 0.25, "psnr": pytest.approx(-10 * np.log10(np.mean(errors) / 4), rel=1e-4)}
    loss.backward()
    taught = (end.grad != 0).any(1).flatten(2).any(2)
    for clip, window in enumerate(windows):
        assert [t for t in range(13) if taught[clip, t]] == list(window)
    assert not taught[clips:].any()


def test_a_decoded_window_shows_what_the_whole_clip_does(vae):
    frames = torch.from_numpy(world.render_frames(scene_of(3), 33)).permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.no_grad(), bf16_matmuls():
        latent = vae.encode(frames)
        whole = vae.decode_raw(latent).float()
        beginning, later, latest = (
            decode_window(vae, latent, window) for window in (range(3), range(2, 5), range(6, 9))
        )
    assert torch.equal(beginning, whole[:, :, :9]) and torch.equal(later, whole[:, :, 5:17])
    assert latest.shape[2] == 12 and (latest - whole[:, :, 21:]).square().mean() < 4 * 10**-3.5  # 35 dB


def test_windows_lie_anywhere():
    rng = np.random.default_rng(0)
    starts = {draw_window(rng, 3).start for _ in range(300)}
    assert starts == set(range(11)) and len(draw_window(rng, 5)) == 5


def test_the_decoder_learns_from_refined_clips_and_from_both_sizes(monkeypatch, vae):
    """Every other step is where super-resolution ends; the others are clips of either size, encoded with noise."""
    monkeypatch.setattr(train_refined_decoder, "refined", lambda network, pairs, rng: (network, range(2, 7), pairs))
    steps = [train_refined_decoder.lesson(step, vae, "latent", "pixels") for step in range(4)]
    assert [name for name, *_ in steps] == ["192", "refined", "96", "refined"]
    assert steps[1] == steps[3] == ("refined", "latent", range(2, 7), "pixels")
    for (_, latent, window, pixels), side in ((steps[0], 192), (steps[2], 96)):
        assert pixels.shape[2:] == (17, side, side) and window == range(5) and latent.shape[2] == 5
        with torch.no_grad():
            assert decode_window(vae, latent, window).shape == pixels.shape


def test_a_training_clip_is_compared_with_its_own_picture():
    whole = torch.from_numpy(world.render_frames(scene_of(5), 49, 2)).permute(3, 0, 1, 2)[None] * 2 - 1
    for window, frames in ((range(3), slice(0, 9)), (range(4, 7), slice(13, 25)), (range(10, 13), slice(37, 49))):
        torch.testing.assert_close(pixels_of(5, window), whole[:, :, frames], atol=1e-6, rtol=0)
