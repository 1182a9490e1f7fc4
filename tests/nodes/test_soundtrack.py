"""A driving soundtrack: length, encoding, held in every sampler, and back in the file as it was given."""

import av
import comfy.nested_tensor
import numpy as np
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_lt
from pack.nodes.conditioning import FirstImage
from pack.nodes.decode import Decode, SaveVideo
from pack.nodes.held import SOUND, original
from pack.nodes.host import FIRST_IMAGE
from pack.nodes.sampling import Sampler, SamplerSelect, Sigmas
from pack.nodes.soundtrack import Soundtrack

SEED = 3


def tone(seconds, rate, hertz=440.0, channels=1):
    time = torch.arange(round(seconds * rate)) / rate
    return {"waveform": 0.3 * torch.sin(2 * np.pi * hertz * time).expand(1, channels, -1), "sample_rate": rate}


def driven(loaded, latent, audio):
    return Soundtrack.execute(latent, audio, loaded[3]).args[0]


@pytest.fixture
def soundtrack(loaded, latent):
    return driven(loaded, latent, tone(0.5, 48000, channels=2))


@pytest.mark.parametrize(
    ("seconds", "rate", "frames"), [(0.5, 48000, 13), (0.52, 44100, 13), (0.521, 16000, 17), (0.01, 8000, 1)]
)
def test_whole_groups_of_pictures_cover_the_sound(loaded, latent, notices, seconds, rate, frames):
    audio = tone(seconds, rate)
    made = driven(loaded, latent, audio)
    video, sound = made["samples"].unbind()
    assert video.shape == (1, 48, (frames + 3) // 4, 2, 4) and sound.shape == (1, 64, frames)
    kept = original(made, SOUND)
    samples = audio["waveform"].shape[-1]
    assert kept["sample_rate"] == rate and kept["waveform"].shape[-1] == frames * rate // 25 >= samples
    assert torch.equal(kept["waveform"][..., :samples], audio["waveform"])
    assert not kept["waveform"][..., samples:].any()
    assert notices == [f"The clip takes the length of the soundtrack: {frames / 25:.2f} s."]


def test_the_network_hears_mono_at_51200_hz_whatever_the_rate(loaded, latent, monkeypatch):
    network, heard = loaded[3].first_stage_model.network, []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda waveform: heard.append(waveform) or encode(waveform))
    left, right = tone(1.0, 48000), tone(1.0, 48000, hertz=880.0)
    both = {"waveform": torch.cat([left["waveform"], right["waveform"]], dim=1), "sample_rate": 48000}
    driven(loaded, latent, both)
    time = torch.arange(51200) / 51200
    expected = 0.15 * (torch.sin(2 * np.pi * 440 * time) + torch.sin(2 * np.pi * 880 * time))
    assert heard[0].shape == (1, 2, 25 * 2048)
    torch.testing.assert_close(heard[0][0, 0, 500:-500], expected[500:-500], atol=2e-3, rtol=0)
    assert torch.equal(heard[0][:, 0], heard[0][:, 1])


def test_a_soundtrack_over_29_seconds_is_encoded_in_windows_and_warned_of(loaded, latent, monkeypatch, notices):
    network, lengths = loaded[3].first_stage_model.network, []
    quick = torch.nn.functional.avg_pool1d
    monkeypatch.setattr(
        network,
        "encode",
        lambda waveform: lengths.append(waveform.shape[-1]) or quick(waveform[:, :1], 2048).expand(-1, 64, -1),
    )
    made = driven(loaded, latent, tone(30.0, 8000))
    assert lengths == [725 * 2048] * 2 and made["samples"].unbind()[1].shape == (1, 64, 753)
    assert notices == ["The clip takes the length of the soundtrack: 30.12 s, more than the 10 s of the training."]


def test_the_models_own_sampler_returns_the_sound_untouched(loaded, prompt, soundtrack):
    sound = soundtrack["samples"].unbind()[1]
    network, heard = loaded[0].model.diffusion_model, []
    hook = network.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[1].transpose(1, 2)))
    made = Sampler.execute(loaded[0], prompt, soundtrack, SEED, 4, 5.0).args[0]
    hook.remove()
    assert len(heard) == 4 and all(torch.equal(each, sound) for each in heard)
    assert torch.equal(made["samples"].unbind()[1], sound)


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    # the others subtract a velocity times sigma from the noisy latent, which rounds
    [("renoise", 0), ("unipc", 0), ("lcm", 0), ("euler", 1e-6), ("dpmpp_2m", 1e-6), ("res_multistep", 1e-6)],
)
def test_every_sampler_honours_it(loaded, prompt, soundtrack, sampler, tolerance):
    ours = sampler in ("renoise", "unipc")
    chosen = SamplerSelect.execute(sampler) if ours else custom.KSamplerSelect.execute(sampler)
    guider = custom.BasicGuider.execute(loaded[0], prompt).args[0]
    noise, sigmas = custom.RandomNoise.execute(SEED).args[0], Sigmas.execute(4, 5.0).args[0]
    made = custom.SamplerCustomAdvanced.execute(noise, guider, chosen.args[0], sigmas, soundtrack).args[0]
    kept, sound = made["samples"].unbind()[1], soundtrack["samples"].unbind()[1]
    torch.testing.assert_close(kept, sound, atol=tolerance, rtol=tolerance)
    assert Decode.execute(made, *loaded[2:]).args[1] is original(made, SOUND)


def test_it_drives_the_picture_and_goes_with_a_first_image(loaded, prompt, latent, soundtrack):
    image = torch.rand(1, 32, 64, 3, generator=torch.Generator().manual_seed(1))
    both = FirstImage.execute(prompt, loaded[2], soundtrack, image).args[0]
    made = Sampler.execute(loaded[0], both, soundtrack, SEED, 4, 5.0).args[0]["samples"].unbind()
    assert torch.equal(made[0][:, :, :1], both[0][1][FIRST_IMAGE])
    assert torch.equal(made[1], soundtrack["samples"].unbind()[1])
    other = driven(loaded, latent, tone(0.5, 48000, hertz=3000.0))
    otherwise = Sampler.execute(loaded[0], both, other, SEED, 4, 5.0).args[0]["samples"].unbind()
    assert not torch.equal(otherwise[0], made[0])


def test_the_base_model_keeps_it_too(model_of, loaded, prompt, soundtrack):
    made = Sampler.execute(model_of("base"), prompt, soundtrack, SEED, 3, 5.0, prompt).args[0]["samples"].unbind()
    assert torch.equal(made[1], soundtrack["samples"].unbind()[1]) and made[0].isfinite().all()


def test_a_batch_of_clips_shares_it(loaded, prompt, latent):
    both = comfy.nested_tensor.NestedTensor(
        [part.repeat(2, *[1] * (part.ndim - 1)) for part in latent["samples"].unbind()]
    )
    made = driven(loaded, {"samples": both}, tone(0.5, 48000))
    sampled = Sampler.execute(loaded[0], prompt, made, SEED, 2, 5.0).args[0]["samples"].unbind()
    assert sampled[0].shape[0] == 2 and torch.equal(sampled[1][0], sampled[1][1])


def test_frames_that_were_held_before_stay_held(loaded, prompt, latent):
    video, audio = (part.clone() for part in latent["samples"].unbind())
    video[:, :, :1] = 2.0
    mask = torch.ones(1, 1, *video.shape[2:])
    mask[:, :, :1] = 0
    nested = comfy.nested_tensor.NestedTensor
    held = {"samples": nested((video, audio)), "noise_mask": nested((mask, torch.ones(1, 1, audio.shape[2])))}
    made = driven(loaded, held, tone(0.9, 48000))
    assert made["noise_mask"].unbind()[0].shape == (1, 1, 7, 2, 4)
    sampled = Sampler.execute(loaded[0], prompt, made, SEED, 2, 5.0).args[0]["samples"].unbind()
    assert (sampled[0][:, :, 0] == 2.0).all() and torch.equal(sampled[1], made["samples"].unbind()[1])


def test_the_file_holds_the_original_sound_and_not_the_vaes(loaded, soundtrack):
    """The random VAE would give noise; the file gives back a 440 Hz tone of 0.5 s, at 48000 Hz."""
    output = SaveVideo.execute("driven", latent=soundtrack, vae=loaded[2], audio_vae=loaded[3])
    with av.open(output.args[0].get_stream_source()) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(audio=0))
        pictures = container.streams.video[0].frames
    sound = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)[0]
    assert stream.rate == 48000 and pictures == 13
    given = original(soundtrack, SOUND)["waveform"][0, 0].numpy()
    start = frames[0].pts
    middle = slice(4000, 20000)
    error = sound[middle.start - start : middle.stop - start] - given[middle]
    assert np.sqrt(np.mean(error**2)) < 0.1 * np.sqrt(np.mean(given[middle] ** 2))


def test_a_rate_that_no_mp4_has_is_resampled_for_the_file(loaded):
    audio = tone(0.2, 51200)
    output = SaveVideo.execute("rate", images=torch.zeros(5, 32, 64, 3), audio=audio)
    with av.open(output.args[0].get_stream_source()) as container:
        assert container.streams.audio[0].rate == 48000
        assert float(container.streams.audio[0].duration * container.streams.audio[0].time_base) == pytest.approx(
            0.2, abs=0.03
        )


def test_another_sound_in_the_latent_is_decoded_not_replaced(loaded, soundtrack):
    video, audio = nodes_lt.LTXVSeparateAVLatent.execute(soundtrack).args
    other = {"samples": torch.randn(1, 64, 13, generator=torch.Generator().manual_seed(2))}
    joined = nodes_lt.LTXVConcatAVLatent.execute(video, other).args[0]
    assert Decode.execute(joined, *loaded[2:]).args[1]["sample_rate"] == 44100
    same = nodes_lt.LTXVConcatAVLatent.execute(video, audio).args[0]
    assert Decode.execute(same, *loaded[2:]).args[1]["sample_rate"] == 48000


def test_what_does_not_fit_is_named(loaded, latent):
    with pytest.raises(ValueError, match="the soundtrack has 0 samples at 48000 Hz; expected at least one"):
        driven(loaded, latent, {"waveform": torch.zeros(1, 1, 0), "sample_rate": 48000})
    with pytest.raises(ValueError, match="The audio VAE input holds a HappyHorse video VAE"):
        Soundtrack.execute(latent, tone(0.2, 8000), loaded[2])
    silent = {"samples": latent["samples"].unbind()[0]}
    with pytest.raises(ValueError, match="and no sound, expected a joint one"):
        driven(loaded, silent, tone(0.2, 8000))
