"""Long video: the next clip begins with the end of the last one, and both join to the frame and the sample."""

import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from pack.nodes.conditioning import FirstImage
from pack.nodes.decode import Decode
from pack.nodes.extend import Continue, Join
from pack.nodes.sampling import Sampler, Sigmas

SEED = 4


def clip(frames, rate=44100, seed=0, height=32, width=64):
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(frames, height, width, 3, generator=random)
    waveform = torch.rand(1, 2, frames * rate // 25, generator=random) - 0.5
    return images, {"waveform": waveform, "sample_rate": rate}


def continued(loaded, images, audio, seconds=0.32, overlap=5):
    return Continue.execute(images, audio, *loaded[2:], seconds, overlap).args


def test_the_latent_begins_with_the_end_of_the_clip(loaded):
    images, audio = clip(21)
    latent, overlap = continued(loaded, images, audio)
    video, sound = latent["samples"].unbind()
    assert overlap == 5 and video.shape == (1, 48, 4, 2, 4) and sound.shape == (1, 64, 13)
    assert torch.equal(video[:, :, :2], loaded[2].encode(images[-5:])) and not video[:, :, 2:].any()
    video_mask, sound_mask = latent["noise_mask"].unbind()
    assert video_mask[0, 0, :, 0, 0].tolist() == [0, 0, 1, 1] and sound_mask[0, 0].tolist() == [0] * 5 + [1] * 8


def test_the_sound_is_that_of_the_last_pictures(loaded, monkeypatch):
    """The encoder hears two tones up to their last sample, both sides, with two seconds before the shared frames."""
    network, heard = loaded[3].first_stage_model.network, []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda waveform: heard.append(waveform) or encode(waveform))
    images, _ = clip(101)

    def tones(samples, rate):
        time = torch.arange(samples, dtype=torch.float64) / rate
        return torch.stack([torch.sin(2000 * time), torch.sin(3000 * time)])[None].float()

    audio = {"waveform": tones(101 * 1764, 44100), "sample_rate": 44100}
    sound = continued(loaded, images, audio)[0]["samples"].unbind()[1]
    assert heard[0].shape == (1, 2, 55 * 2048)
    error = (heard[0] - tones(101 * 2048, 51200)[..., -55 * 2048 :]).abs()
    assert error[..., 2048:-50].max() < 2e-3 and error[..., -50:].max() < 2e-2
    assert torch.equal(sound[..., :5], encode(heard[0])[..., -5:])


def test_a_sound_longer_than_its_pictures_still_fits(loaded):
    """A sampled clip of 126 audio latents has 125 pictures; the last latent belongs to none of them."""
    images, audio = clip(21)
    longer = {**audio, "waveform": torch.cat([audio["waveform"], torch.rand(1, 2, 1764)], dim=-1)}
    for a, b in zip(*(continued(loaded, images, one)[0]["samples"].unbind() for one in (audio, longer)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sampler", [None, "euler"])
def test_the_held_start_is_what_comes_back(loaded, prompt, sampler):
    latent, _ = continued(loaded, *clip(21))
    if sampler is None:
        made = Sampler.execute(loaded[0], prompt, latent, SEED, 4, 5.0).args[0]["samples"].unbind()
    else:
        guider = custom.BasicGuider.execute(loaded[0], prompt).args[0]
        noise, sigmas = custom.RandomNoise.execute(SEED).args[0], Sigmas.execute(4, 5.0).args[0]
        chosen = custom.KSamplerSelect.execute(sampler).args[0]
        sampled = custom.SamplerCustomAdvanced.execute(noise, guider, chosen, sigmas, latent).args[0]
        made = sampled["samples"].unbind()
    tolerance = 0 if sampler is None else 1e-6
    for ours, given, held in zip(made, latent["samples"].unbind(), (2, 5), strict=True):
        torch.testing.assert_close(ours[:, :, :held], given[:, :, :held], atol=tolerance, rtol=tolerance)
        assert ours[:, :, held:].std() > 0


def test_the_start_steers_the_rest(loaded, prompt):
    first, second = (
        Sampler.execute(loaded[0], prompt, continued(loaded, *clip(21, seed=seed))[0], SEED, 4, 5.0).args[0]
        for seed in (0, 1)
    )
    for a, b in zip(first["samples"].unbind(), second["samples"].unbind(), strict=True):
        assert not torch.equal(a[:, :, -1:], b[:, :, -1:])


def test_two_beginnings_are_refused(loaded, prompt):
    images, audio = clip(21)
    latent, _ = continued(loaded, images, audio)
    both = FirstImage.execute(prompt, loaded[2], latent, images[:1]).args[0]
    with pytest.raises(ValueError, match="The clip begins twice: .*Give the sampler the prompt without"):
        Sampler.execute(loaded[0], both, latent, SEED, 2, 5.0)


def test_a_clip_longer_than_the_training_is_told(loaded, notices):
    continued(loaded, *clip(9), seconds=10.0)
    continued(loaded, *clip(9))
    assert notices == [
        "The new clip has 253 pictures, 10.12 s, more than the 10 s of the training; 5 are the old one's.",
        "The new clip has 13 pictures, 0.52 s; 5 are the old one's.",
    ]


@pytest.mark.parametrize("rate", [44100, 48000, 22050])
def test_joined_to_the_frame_and_to_the_sample(rate):
    """The parts outside the seam are the clips' own, bit for bit, and nothing is there twice."""
    (images, audio), (more, sound) = clip(13, rate), clip(9, rate, seed=1)
    joined, mixed = Join.execute(images, audio, more, sound, 5).args
    assert joined.shape[0] == 17 and mixed["sample_rate"] == rate
    assert torch.equal(joined[:9], images[:9]) and torch.equal(joined[13:], more[5:])
    one, seam = rate // 25, 12 * rate // 25
    waveform = mixed["waveform"]
    assert waveform.shape[-1] == 17 * one
    assert torch.equal(waveform[..., :seam], audio["waveform"][..., :seam])
    assert torch.equal(waveform[..., seam + one :], sound["waveform"][..., 5 * one :])


def test_shared_pictures_fade_from_the_old_clip_to_the_new():
    sound = {"waveform": torch.zeros(1, 2, 13 * 1764), "sample_rate": 44100}
    black, white = torch.zeros(13, 4, 4, 3), torch.ones(13, 4, 4, 3)
    joined = Join.execute(black, sound, white, sound, 5).args[0]
    levels = [0.0] * 8 + [0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 8
    torch.testing.assert_close(joined, torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 4, 4, 3))


def test_the_same_thing_joins_without_a_trace():
    """Cut in two with shared frames, a clip comes back as it was."""
    images, audio = clip(21)
    step = 44100 // 25
    first = {**audio, "waveform": audio["waveform"][..., : 13 * step]}
    second = {**audio, "waveform": audio["waveform"][..., 8 * step :]}
    joined, mixed = Join.execute(images[:13], first, images[8:], second, 5).args
    torch.testing.assert_close(joined, images, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed["waveform"], audio["waveform"], atol=1e-6, rtol=0)


def test_sounds_of_other_rates_channels_and_lengths_join():
    (images, audio), (more, sound) = clip(13), clip(9, 48000, seed=1)
    mono = {"waveform": sound["waveform"][:, :1, :-100], "sample_rate": 48000}
    short = {**audio, "waveform": audio["waveform"][..., : 10 * 1764]}
    waveform = Join.execute(images, short, more, mono, 1).args[1]["waveform"]
    assert waveform.shape == (1, 2, 21 * 1764)
    assert not waveform[..., 10 * 1764 : 12 * 1764].any(), "silence where the first clip had no sound"


def test_a_whole_chain_runs(loaded, prompt, latent):
    first = Decode.execute(Sampler.execute(loaded[0], prompt, latent, SEED, 2, 5.0).args[0], *loaded[2:]).args
    following, overlap = continued(loaded, *first, seconds=0.16)
    second = Decode.execute(Sampler.execute(loaded[0], prompt, following, SEED, 2, 5.0).args[0], *loaded[2:]).args
    images, audio = Join.execute(*first, *second, overlap).args
    assert images.shape[0] == 13 and audio["waveform"].shape == (1, 2, 13 * 1764)


def test_what_does_not_fit_is_named(loaded):
    images, audio = clip(21)
    with pytest.raises(ValueError, match="overlap is 4; expected 1, 5, 9"):
        continued(loaded, images, audio, overlap=4)
    with pytest.raises(ValueError, match="a clip of 3 frames cannot share 5; choose a smaller overlap"):
        continued(loaded, images[:3], audio)
    with pytest.raises(ValueError, match="the pictures are 64x48; expected multiples of 32"):
        continued(loaded, *clip(21, height=48))
    with pytest.raises(ValueError, match="The clips are 64x32 and 96x32; expected one size"):
        Join.execute(images, audio, *clip(21, width=96), 5)
