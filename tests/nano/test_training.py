"""The training loop: a resumed run ends where an uninterrupted one does; and what the teacher and its walks rest on."""

import pytest
import torch
from pack.model_loader.attention import grouped_attention
from pack.model_loader.dit import DiT
from pack.nano import training
from pack.nano.pixel_metric import nano_metric, pixel_metric, weighted_square
from pack.nano.train_distill import own_states, walk
from pack.nano.train_dit import CONFIG, FIRST_FRAME, initialise, noised
from pack.nano.train_video_vae import CHANNELS
from pack.sampler.denoise import denoise_renoise
from pack.sampler.schedule import flow_sigmas


def run(folder, monkeypatch, stop_at=None):
    monkeypatch.setattr(training, "RUNS", folder)
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)

    def loss_of_step(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 3)
        return (module(x) - x.sum(1, keepdim=True)).square().mean(), {}

    return training.train("tiny", module, loss_of_step, steps=60, peak_rate=0.05, warmup=5, save_every=20)


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    whole = run(tmp_path / "a", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", monkeypatch, stop_at=47)
    resumed = run(tmp_path / "b", monkeypatch)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.allclose(whole.weight, torch.ones(1, 3), atol=0.2)
    assert not list((tmp_path / "b").glob("*.part"))


def test_the_slow_part_learns_at_a_fifth(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "RUNS", tmp_path)
    module = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)])
    before = [part.weight.item() for part in module]
    training.train(
        "tiny", module, lambda step: (sum(part.weight.sum() for part in module), {}),
        steps=1, peak_rate=0.1, warmup=1, weight_decay=0.0, slow=module[1],
    )  # fmt: skip
    fast, slow = (was - part.weight.item() for was, part in zip(before, module, strict=True))
    assert fast == pytest.approx(0.1, rel=1e-3) and slow == pytest.approx(0.02, rel=1e-3)


def test_matrices_learn_by_muon_and_the_rest_by_adamw(tmp_path, monkeypatch):
    """Muon moves along every direction of a gradient alike, AdamW every number alike."""
    monkeypatch.setattr(training, "RUNS", tmp_path)
    torch.manual_seed(0)
    part, other = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8, bias=False)
    before = [p.detach().clone() for p in (part.weight, part.bias, other.weight)]
    gradient = torch.linalg.qr(torch.randn(8, 4)).Q @ torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1]))
    training.train(
        "tiny", torch.nn.ModuleList([part, other]),
        lambda step: ((gradient * part.weight).sum() + part.bias.sum() + (gradient * other.weight).sum(), {}),
        steps=1, peak_rate=0.1, warmup=1, weight_decay=0.0, muon=part,
    )  # fmt: skip
    moved = [was - now.detach() for was, now in zip(before, (part.weight, part.bias, other.weight), strict=True)]
    assert torch.allclose(moved[1], torch.full((8,), 0.1), rtol=1e-3)
    assert torch.allclose(moved[2], 0.1 * gradient.sign(), rtol=1e-3)
    sizes = torch.linalg.svdvals(moved[0]) / (0.1 * 0.2 * 8**0.5)  # 0.2 * sqrt(rows): the step is as large as AdamW's
    assert sizes.min() > 0.6 and sizes.max() < 1.3


def test_rate_rises_then_falls():
    rates = [training.learning_rate(step, 1000, 1.0, warmup=100) for step in range(1000)]
    assert rates[0] < 0.02 and max(rates) == rates[99] and rates[-1] < 0.03
    assert all(a >= b for a, b in zip(rates[100:], rates[101:], strict=False))


def test_plain_attention_is_the_networks_own():
    torch.manual_seed(0)
    for heads, groups in ((5, 1), (6, 2)):
        q, k, v = torch.randn(2, heads, 9, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
        torch.testing.assert_close(training.plain_attention(q, k, v), grouped_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_unused_channels_stay_out_of_the_transformer():
    torch.manual_seed(0)
    dit = initialise(DiT(CONFIG, dtype=torch.float32))
    torch.nn.init.normal_(dit.final_linear_video.weight, std=0.1)
    clean = torch.zeros(1, 48, 3, 6, 6)
    clean[:, :CHANNELS] = torch.randn(1, CHANNELS, 3, 6, 6)
    x, velocity = noised(clean, torch.tensor([0.5]), FIRST_FRAME)
    assert not x[:, CHANNELS:].any() and not velocity[:, CHANNELS:].any()
    assert torch.equal(x[:, :, 0], clean[:, :, 0]) and not torch.equal(x[:, :, 1], clean[:, :, 1])
    disturbed = x.clone()
    disturbed[:, CHANNELS:] += 5
    audio, text = torch.randn(1, 10, 64), torch.randn(1, 4, 96)
    with torch.inference_mode():
        for one, other in zip(dit(x, audio, text), dit(disturbed, audio, text), strict=True):
            assert torch.equal(one, other)


def test_a_walk_along_the_true_velocity_ends_at_the_clip():
    torch.manual_seed(0)
    video, audio = torch.randn(1, 48, 3, 2, 2), torch.randn(1, 5, 64)
    noise_video, noise_audio = torch.randn_like(video), torch.randn_like(audio)
    first = torch.randn(1, 48, 1, 2, 2)
    sigmas = flow_sigmas(8)
    start = [sigmas[0] * n + (1 - sigmas[0]) * c for n, c in ((noise_video, video), (noise_audio, audio))]
    start[0][:, :, :1] = first
    states = list(walk(lambda v, a: (noise_video - video, noise_audio - audio), *start, sigmas, image_given=True))
    assert len(states) == 9
    for (x_video, x_audio), sigma in zip(states, sigmas, strict=True):
        torch.testing.assert_close(x_video[:, :, 1:], (sigma * noise_video + (1 - sigma) * video)[:, :, 1:])
        torch.testing.assert_close(x_audio, sigma * noise_audio + (1 - sigma) * audio)
        assert torch.equal(x_video[:, :, :1], first)
    *_, (_, kept) = walk(lambda v, a: (v, a), *start, sigmas, sound_given=True)
    assert torch.equal(kept, start[1])


def test_own_states_are_those_that_the_samplers_network_sees():
    """Against the sampler itself, fed the same noise: with and without what is given."""
    torch.manual_seed(0)
    start = torch.zeros(2, 48, 3, 2, 2), torch.randn(2, 5, 64)
    start[0][:, :CHANNELS] = torch.randn(2, CHANNELS, 3, 2, 2)
    image = start[0][:, :, :1].clone()
    velocity = lambda v, a: (0.7 * v, a.flip(1))  # noqa: E731
    sigmas = flow_sigmas(8)
    for given in ({"image_given": False, "sound_given": False}, {"image_given": True, "sound_given": True}):
        seen = []

        def network(video, audio, sigma, seen=seen):
            seen.append((video, audio))
            return velocity(video, audio)

        def noise(like):
            drawn = torch.randn_like(like)
            if like.ndim == 5:
                drawn[:, CHANNELS:] = 0
            return drawn

        torch.manual_seed(1)
        states = own_states(velocity, *start, sigmas, **given)
        if given["sound_given"]:  # the sampler draws no noise for a sound that stays, so later pictures differ
            states = states[:1]
        torch.manual_seed(1)
        denoise_renoise(
            network, *start, sigmas, noise=noise, keep_audio=given["sound_given"],
            image=image if given["image_given"] else None,
        )  # fmt: skip
        for mine, theirs in zip(states, seen, strict=False):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    states = own_states(velocity, *start, sigmas, image_given=True, sound_given=True)
    assert len(states) == 8
    assert all(torch.equal(video[:, :, :1], image) and torch.equal(audio, start[1]) for video, audio in states)


def test_an_error_counts_as_the_pixels_it_moves():
    torch.manual_seed(0)
    weights = torch.randn(3, 48)
    decode = lambda z: torch.einsum("oc,bcthw->bothw", weights, z)  # noqa: E731
    expected = (weights.T @ weights)[:CHANNELS, :CHANNELS]
    metric = pixel_metric(decode, torch.randn(1, 48, 2, 3, 3))
    torch.testing.assert_close(metric, expected / expected.diagonal().mean(), atol=1e-4, rtol=1e-4)


def test_a_latents_error_counts_each_cell_by_the_metric():
    torch.manual_seed(0)
    error, root = torch.randn(2, 48, 3, 2, 2), torch.randn(CHANNELS, CHANNELS)
    moved = torch.einsum("oc,bcthw->bothw", root, error[:, :CHANNELS])
    torch.testing.assert_close(weighted_square(error, root.T @ root), moved.square().mean())


def test_nanos_metric_forgets_no_channel():
    metric = nano_metric(torch.randn(2, 48, 5, 6, 6).numpy(), clips=2)
    assert metric.diagonal().mean() == pytest.approx(1, abs=1e-4)
    values = torch.linalg.eigvalsh(metric)
    assert values[0] > 0.05 and values[-1] > 20 * values[0]
