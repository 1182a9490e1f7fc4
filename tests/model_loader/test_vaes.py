"""The autoencoders: shapes, windows, normalisation, resampling, refusals. Exactness is test_golden's."""

import copy
from dataclasses import replace

import pytest
import torch
from pack.model_loader import turbo_pieces, turbo_vae
from pack.model_loader.core_vae import VideoVAE, resample
from pack.model_loader.turbo_vae import TurboVAE


@torch.no_grad()
def test_wan_shapes_and_range(wan):
    latent = wan.encode(torch.rand(2, 3, 5, 32, 48) * 2 - 1)
    assert latent.shape == (2, 48, 2, 2, 3) and latent.dtype == torch.float32
    pixels = wan.decode(latent * 100)
    assert pixels.shape == (2, 3, 5, 32, 48) and pixels.abs().max() <= 1


@torch.no_grad()
def test_wan_normalises_by_its_own_statistics(wan):
    pixels = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    other = VideoVAE(replace(wan.config, latent_mean=(0.5,) * 48, latent_std=(2.0,) * 48))
    other.load_state_dict(wan.state_dict())
    torch.testing.assert_close(other.encode(pixels), (wan.encode_raw(pixels) - 0.5) / 2)
    torch.testing.assert_close(other.decode(other.encode(pixels)), wan.decode(wan.encode(pixels)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_wan_steps_are_the_whole_decode_bit_for_bit(wan):
    latent = torch.randn(2, 48, 4, 2, 3)
    steps = list(wan.decode_steps(latent))
    mean, inverse_std = wan.statistics("cpu")
    whole = wan.vae.decode(latent / inverse_std + mean)  # core's own loop
    assert [step.shape[2] for step in steps] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(steps, dim=2), whole) and torch.equal(wan.decode_raw(latent), whole)


@pytest.mark.parametrize("latents", [1, 4])
def test_convolutions_in_onednn_and_plain_norms_have_cores_own_result(wan, latents):
    plain = copy.deepcopy(wan)
    for layer in plain.modules():
        for quick in ("_conv_forward", "forward"):
            vars(layer).pop(quick, None)
    latent, calls = torch.randn(1, 48, latents, 2, 3), []
    with torch.inference_mode():
        for network in (wan, plain):
            with torch.profiler.profile() as seen:
                result = network.decode_raw(latent)
            calls.append((result, {event.key for event in seen.key_averages()}))
        (quick, ours), (own, theirs) = calls
        torch.testing.assert_close(quick, own, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(wan.encode(own.clamp(-1, 1)), plain.encode(own.clamp(-1, 1)), atol=1e-5, rtol=1e-5)
    if torch.backends.mkldnn.is_available():
        assert "aten::mkldnn_convolution" in ours and "aten::slow_conv3d" not in ours
    assert "aten::linalg_vector_norm" not in ours and "aten::linalg_vector_norm" in theirs
    taught = [latent.clone().requires_grad_() for _ in range(2)]
    for network, start in zip((wan, plain), taught, strict=True):  # convolutions are torch's, which have a backward
        network.decode_raw(start).square().mean().backward()
    assert taught[0].grad.abs().sum() > 0
    torch.testing.assert_close(taught[0].grad, taught[1].grad, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_steps_decode_no_further_than_they_are_asked(wan, turbo):
    for network, calls, expected in ((wan, wan.vae.decoder, [1, 2, 3]), (turbo, turbo.mid_block.resnets[0], [1, 2, 3])):
        seen = []
        calls.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[2]))
        steps = network.decode_steps(torch.randn(1, 48, 9, 2, 2))
        assert [next(steps) is not None and len(seen) for _ in range(3)] == expected


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 32), (1, 3, 5, 40, 32), (1, 3, 5, 32, 40)])
def test_wan_refuses_sizes_it_would_cut(wan, shape):
    with pytest.raises(ValueError, match=r"expected 4k\+1 frames and sides that are multiples of 16"):
        wan.encode(torch.zeros(shape))


def test_vaes_train(wan, oobleck):
    wan.decode_raw(wan.encode(torch.rand(1, 3, 5, 32, 32))).square().mean().backward()
    oobleck.decode(oobleck.encode(torch.randn(1, 2, 4096))).square().mean().backward()
    for vae in (wan, oobleck):
        assert all(parameter.grad is not None for parameter in vae.parameters())


@torch.no_grad()
def test_audio_shapes_and_noise(oobleck):
    waveform = torch.randn(2, 2, 3 * 2048)
    mean, scale = oobleck.encode_raw(waveform)
    assert oobleck.hop == 2048 and mean.shape == (2, 64, 3)
    assert torch.equal(oobleck.encode(waveform), mean)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(oobleck.encode(waveform, noise), mean + noise * (torch.log1p(scale.exp()) + 1e-4))
    assert oobleck.decode(mean).shape == (2, 2, 3 * 2048)
    assert oobleck.decode_for_playback(mean).shape == (2, 2, 3 * 2048 * 441 // 512)


@pytest.mark.parametrize(("samples", "to"), [(512, 441), (5000, 4306), (441, 512), (101, 50), (50, 101), (64, 64)])
def test_resampling_keeps_a_tone_that_both_rates_can_hold(samples, to):
    def tone(n):
        return torch.sin(2 * torch.pi * 7 * torch.arange(n, dtype=torch.float64) / n + 0.4).float()

    torch.testing.assert_close(resample(tone(samples)[None], to), tone(to)[None], rtol=0, atol=2e-6)


def test_resampling_halves_the_bin_at_half_the_lower_rate():
    fast = torch.cos(torch.pi * torch.arange(8) / 2)
    slow = torch.tensor([1.0, -1.0, 1.0, -1.0])  # as scipy.signal.resample(fast, 4) gives it
    torch.testing.assert_close(resample(fast, 4), slow, rtol=0, atol=1e-6)
    torch.testing.assert_close(resample(slow, 8), fast, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 9])
@torch.no_grad()
def test_turbo_gives_four_frames_a_latent_less_three(turbo, frames):
    latent = torch.randn(1, 48, frames, 2, 3)
    pixels = turbo.decode(latent)
    assert pixels.shape == (1, 3, 4 * frames - 3, 32, 48)
    if frames <= turbo.config.first_chunk_size:
        padded = torch.cat([latent, latent[:, :, -1:].expand(-1, -1, 2 - frames, -1, -1)], dim=2)
        whole = turbo.decode_window(turbo.denormalise(padded), first=True)
        assert torch.equal(pixels, whole[:, :, : 4 * frames - 3])


@pytest.mark.parametrize(
    ("frames", "lengths"), [(1, [1]), (2, [5]), (4, [5, 8]), (9, [5, 12, 12, 4]), (11, [5, 12, 12, 12])]
)
@torch.no_grad()
def test_turbo_steps_are_the_published_windows(turbo, frames, lengths):
    """Windows of 2, then 3 latent frames, with one more on either side, whose pixel frames are thrown away."""
    latent = torch.randn(1, 48, frames, 2, 3)
    steps = list(turbo.decode_steps(latent))
    assert [step.shape[2] for step in steps] == lengths
    z = turbo.denormalise(torch.cat([latent, latent[:, :, -1:].expand(-1, -1, 3, -1, -1)], dim=2))
    for i, step in enumerate(steps):
        first, last = (0, 2) if i == 0 else (3 * i - 1, 3 * i + 2)
        at_end = last >= frames
        window = turbo.decode_window(z[:, :, max(0, first - 1) : last if at_end else last + 1], first=i == 0)
        assert torch.equal(step, window[:, :, 4 if i else 0 :][:, :, : step.shape[2]])
    assert torch.equal(torch.cat(steps, dim=2), turbo.decode(latent))


@torch.no_grad()
def test_turbo_windows_never_exceed_a_step_and_its_margins(turbo):
    lengths = []
    turbo.mid_block.resnets[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[2]))
    turbo.decode(torch.randn(1, 48, 9, 2, 2))  # first 2, step 3: padded to 11
    assert lengths == [3, 5, 5, 4]


@torch.no_grad()
def test_turbo_layers_run_in_pieces_of_any_size(turbo, monkeypatch):
    """One frame at a time, with its neighbours, as the whole window: what a large picture is decoded with."""
    for decoder in (turbo, TurboVAE(replace(turbo.config, depthwise=(True,) * 5, unpatchify=False))):
        latent = torch.randn(1, 48, 5, 2, 3)
        whole = decoder.decode(latent)
        with monkeypatch.context() as patch:
            patch.setattr(turbo_pieces, "PIECE_BYTES", 1)
            torch.testing.assert_close(decoder.decode(latent), whole, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("piece_bytes", [1, turbo_pieces.PIECE_BYTES])
def test_turbo_keeps_channels_last_all_the_way(turbo, monkeypatch, piece_bytes):
    """As on an NVIDIA card: where one layer got its pixels side by side, it and what follows would convert them."""
    assert turbo_vae.preferred_format(torch.device("cuda")) == torch.channels_last_3d or torch.version.hip
    latent = torch.randn(1, 48, 5, 2, 3)
    expected = turbo.decode(latent)
    monkeypatch.setattr(turbo_pieces, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(turbo_vae, "preferred_format", lambda device: torch.channels_last_3d)
    formats = {torch.nn.Conv2d: torch.channels_last, torch.nn.Conv3d: torch.channels_last_3d}
    convolutions = {name: module for name, module in turbo.named_modules() if type(module) in formats}
    kept = {name: [] for name in convolutions}
    for name, module in convolutions.items():
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: kept[name].append(
                inputs[0].is_contiguous(memory_format=formats[type(module)])
            )
        )
    torch.testing.assert_close(turbo.decode(latent), expected, rtol=0, atol=1e-5)
    assert all(calls and all(calls) for calls in kept.values()), kept


@torch.no_grad()
def test_turbo_decodes_two_clips_as_each_alone_in_either_format(turbo, monkeypatch):
    latent = torch.randn(2, 48, 4, 2, 3)
    alone = torch.cat([turbo.decode(clip) for clip in latent.split(1)])
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        monkeypatch.setattr(turbo_vae, "preferred_format", lambda device, chosen=memory_format: chosen)
        torch.testing.assert_close(turbo.decode(latent), alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("piece_bytes", [1, turbo_pieces.PIECE_BYTES])
def test_turbo_adds_biases_in_passing_as_convolutions_add_them(turbo, monkeypatch, piece_bytes):
    """As on an NVIDIA card, where the kernels that take biases serve."""
    left_out = []
    for decoder in (turbo, TurboVAE(replace(turbo.config, depthwise=(True,) * 5, unpatchify=False))):
        latent = torch.randn(2, 48, 5, 2, 3)
        expected = decoder.decode(latent)
        residuals = [module for module in decoder.modules() if isinstance(module, turbo_vae.Residual)]
        with monkeypatch.context() as patch:
            patch.setattr(turbo_vae, "takes_biases", lambda x: True)
            patch.setattr(turbo_vae, "Apart", lambda conv: left_out.append(conv) or turbo_pieces.Apart(conv))
            patch.setattr(turbo_vae, "preferred_format", lambda device: torch.channels_last_3d)
            patch.setattr(turbo_pieces, "PIECE_BYTES", piece_bytes)
            torch.testing.assert_close(decoder.decode(latent), expected, rtol=0, atol=1e-5)
            for residual in residuals:  # a bias counts, and once
                residual.conv1.last.bias.add_(1)
                residual.conv2.last.bias.add_(2)
            shifted = decoder.decode(latent)
        assert {id(conv) for conv in left_out} >= {id(r.conv1) for r in residuals} | {id(r.conv2) for r in residuals}
        assert not any("_conv_forward" in vars(conv.last) for conv in left_out)
        torch.testing.assert_close(shifted, decoder.decode(latent), rtol=0, atol=1e-4)
        assert (shifted - expected).abs().max() > 0.1


@torch.no_grad()
def test_turbo_options_without_goldens_have_their_published_names_and_shapes(turbo):
    separable = replace(turbo.config, depthwise=(True,) * 5, unpatchify=False)
    decoder = TurboVAE(separable)
    names = dict(decoder.named_parameters())
    assert names["mid_block.resnets.0.conv1.depthwise_conv.weight"].shape == (16, 1, 5, 5, 5)
    assert names["up_blocks.1.conv_in.conv_shortcut.depthwise_conv.weight"].shape == (16, 1, 1, 1, 1)
    assert names["up_blocks.1.conv_in.conv_shortcut.pointwise_conv.weight"].shape == (12, 16, 1, 1, 1)
    assert names["upsampler2d_1.conv.weight"].shape == (8, 8, 3, 3)
    assert names["conv_out.conv.weight"].shape == (3, 2, 3, 3, 3)
    assert decoder.decode(torch.randn(1, 48, 3, 2, 2)).shape == (1, 3, 9, 32, 32)
