"""A video as the start of a clip: its length and rate, changed in part (denoise), its picture or its sound kept."""

import av
import comfy.samplers
import comfy.utils
import numpy as np
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from pack.nodes.conditioning import EmptyLatent
from pack.nodes.decode import Decode, SaveVideo
from pack.nodes.encode import Encode, pick, resized, times_at_25
from pack.nodes.held import PICTURE, original
from pack.nodes.sampling import Sampler, SamplerSelect, Sigmas
from pack.nodes.soundtrack import Soundtrack
from pack.sampler.schedule import flow_sigmas
from pack.sampler.soundtrack import at_encoder_rate

SEED = 3


def video(frames, rate=44100, height=32, width=64, seconds=None, seed=0):
    """Pictures at 25 a second and their sound."""
    random = torch.Generator().manual_seed(seed)
    samples = round((seconds or frames / 25) * rate)
    sound = {"waveform": torch.rand(1, 2, samples, generator=random) - 0.5, "sample_rate": rate}
    return torch.rand(frames, height, width, 3, generator=random), sound


def encoded(loaded, latent, images, audio=None, frame_rate=25.0, keep="nothing", mask=None):
    return Encode.execute(latent, images, *loaded[2:], audio, mask, frame_rate, keep).args[0]


def sampled(loaded, prompt, latent, denoise=1.0, seed=SEED, steps=4):
    return Sampler.execute(loaded[0], prompt, latent, seed, steps, 5.0, denoise=denoise).args[0]


def masks(latent):
    return [[*part.unique().tolist()] for part in latent["noise_mask"].unbind()]


def test_picture_and_sound_are_those_of_the_vaes(loaded, latent):
    images, audio = video(9)
    made = encoded(loaded, latent, images, audio)
    picture, sound = made["samples"].unbind()
    assert picture.shape == (1, 48, 3, 2, 4) and sound.shape == (1, 64, 9) and masks(made) == [[1], [1]]
    assert torch.equal(picture, loaded[2].encode(images))
    assert torch.equal(sound, loaded[3].encode_soundtrack(at_encoder_rate(audio["waveform"], 9)))


@pytest.mark.parametrize(
    ("frames", "seconds", "taken", "told"),
    [
        (9, 0.4, 9, "9 pictures, 0.36 s"),
        (11, 0.4, 9, "9 pictures, 0.36 s"),
        (30, 0.4, 9, "9 pictures, 0.36 s: the latent has no room for the other 21 of the video."),
        (6, 0.4, 5, "5 pictures, 0.20 s: the video has no more, the latent room for 9."),
        (1, 0.4, 1, "1 pictures, 0.04 s: the video has no more, the latent room for 9."),
    ],
)
def test_length_is_the_shorter_ones_in_groups_of_4(loaded, notices, frames, seconds, taken, told):
    empty = EmptyLatent.execute({"size": "custom", "width": 64, "height": 32}, seconds).args[0]
    picture, sound = encoded(loaded, empty, *video(frames))["samples"].unbind()
    assert picture.shape[2] == (taken + 3) // 4 and sound.shape[2] == taken
    assert notices == [told]


def test_other_frame_rates_keep_their_speed():
    numbered = torch.arange(60.0)[:, None, None, None].expand(-1, 2, 2, 3)
    at = {rate: times_at_25(60, rate, 200) for rate in (25.0, 50.0, 30.0, 24.0, 12.5, 29.97)}
    shown = {rate: pick(numbered, times)[:, 0, 0, 0] for rate, (times, _) in at.items()}
    assert shown[50.0].tolist() == list(range(0, 60, 2))
    assert shown[12.5].tolist()[:5] == [0, 0, 1, 2, 2] and len(shown[12.5]) == 120
    for rate, numbers in shown.items():
        assert len(numbers) == at[rate][1] == int(60 * 25 / rate)
        assert (numbers / rate - torch.arange(len(numbers)) / 25).abs().max() <= 0.5 / rate + 1e-6


@pytest.mark.parametrize(("height", "width"), [(90, 120), (64, 128), (200, 90), (33, 65), (16, 40)])
def test_another_shape_is_cut_in_the_middle_and_resized(height, width):
    """Waves a few pixels long come out as core's Lanczos gives them; a chequerboard, which has no room, even grey."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = 0.5 + 0.25 * torch.stack([(x / 9).sin() + (y / 7).cos(), (y / 11).sin(), (x / 8).cos()], dim=-1)
    images = waves.expand(20, -1, -1, -1)
    ours = resized(images, 32, 64)
    theirs = comfy.utils.common_upscale(images.movedim(-1, 1), 64, 32, "lanczos", "center").movedim(1, -1)
    assert ours.shape == (20, 32, 64, 3) and (ours - theirs).abs()[:, 2:-2, 2:-2].max() < 0.04
    if height > 64:
        fine = ((x + y) % 2).float()[None, ..., None].expand(1, -1, -1, 3)
        assert (resized(fine, 32, 64) - 0.5).abs()[:, 2:-2, 2:-2].max() < 0.1


@pytest.mark.parametrize("rate", [25.0, 30.0])
def test_what_a_long_video_has_too_much_is_not_copied(rate):
    endless = torch.zeros(1, 2, 2, 3).expand(10**9, -1, -1, -1)
    times, count = times_at_25(10**9, rate, 9)
    assert pick(endless, times).shape[0] == 9 and count == int(10**9 * 25 / rate)


def test_the_right_size_stays_as_it_is():
    images = torch.rand(3, 32, 64, 3)
    assert resized(images, 32, 64) is images


def test_the_network_sees_the_resized_pictures(loaded, latent):
    images, audio = video(9, height=90, width=120)
    picture, _ = encoded(loaded, latent, images, audio)["samples"].unbind()
    assert torch.equal(picture, loaded[2].encode(resized(images, 32, 64)))
    with_alpha = torch.cat([images, images[..., :1]], dim=-1)
    assert torch.equal(encoded(loaded, latent, with_alpha, audio)["samples"].unbind()[0], picture)


def test_a_kept_picture_comes_back_as_it_was_and_the_sound_is_new(loaded, prompt, latent):
    images, audio = video(9, height=90, width=120)
    kept = encoded(loaded, latent, images, audio, keep="picture")
    assert masks(kept) == [[0], [1]]
    first, second = (sampled(loaded, prompt, kept, seed=seed) for seed in (1, 2))
    shown, heard = Decode.execute(first, *loaded[2:]).args
    assert torch.equal(shown, images)
    assert torch.equal(first["samples"].unbind()[0], kept["samples"].unbind()[0])
    assert not torch.equal(heard["waveform"], Decode.execute(second, *loaded[2:]).args[1]["waveform"])
    other, _ = video(9, seed=7)
    unlike = sampled(loaded, prompt, encoded(loaded, latent, other, audio, keep="picture"), seed=1)
    assert not torch.equal(unlike["samples"].unbind()[1], first["samples"].unbind()[1]), "the picture drives the sound"


def test_the_file_has_the_kept_pictures_at_their_own_size(loaded, prompt, latent):
    ramp = torch.linspace(0, 1, 120).expand(9, 90, 120)[..., None].expand(-1, -1, -1, 3)
    made = sampled(loaded, prompt, encoded(loaded, latent, ramp, keep="picture"))
    file = SaveVideo.execute("kept", latent=made, vae=loaded[2], audio_vae=loaded[3]).args[0]
    with av.open(file.get_stream_source()) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.audio
    assert len(frames) == 9 and frames[0].shape == (90, 120, 3)
    assert np.abs(frames[4] / 255 - ramp[4].numpy()).mean() < 0.02


def test_a_changed_picture_is_decoded(loaded, latent):
    images, audio = video(9)
    kept = encoded(loaded, latent, images, audio, keep="picture")
    assert original(kept, PICTURE) is not None
    picture, sound = kept["samples"].unbind()
    changed = {**kept, "samples": type(kept["samples"])((picture + 0.1, sound))}
    assert original(changed, PICTURE) is None
    assert not torch.equal(Decode.execute(changed, *loaded[2:]).args[0], images)


@pytest.mark.parametrize("rate", [44100, 8000, 44101, 22049])
def test_a_kept_sound_comes_back_as_it_was(loaded, prompt, latent, rate):
    images, audio = video(9, rate=rate, seconds=2.0)
    made = sampled(loaded, prompt, encoded(loaded, latent, images, audio, keep="sound"))
    assert [part.shape[2] for part in made["samples"].unbind()] == [3, 9]
    heard = Decode.execute(made, *loaded[2:]).args[1]
    length = heard["waveform"].shape[-1]
    assert heard["sample_rate"] == rate and 9 * rate // 25 <= length <= 9 * rate // 25 + 1
    same = audio["waveform"][..., : 9 * rate // 25]
    assert torch.equal(heard["waveform"][..., : 9 * rate // 25], same)


def test_what_is_cut_off_a_kept_sound_is_told(loaded, latent, notices):
    images, audio = video(9, seconds=2.0)
    for keep, sound in (("sound", audio), ("nothing", audio), ("sound", video(9)[1])):
        encoded(loaded, latent, images, sound, keep=keep)
    assert notices == [
        "9 pictures, 0.36 s\n1.64 s of the sound are cut off.",
        "9 pictures, 0.36 s",
        "9 pictures, 0.36 s",
    ]


def test_a_soundtrack_after_it_keeps_the_last_picture(loaded, latent):
    made = encoded(loaded, latent, *video(9))
    longer = Soundtrack.execute(made, video(17)[1], loaded[3]).args[0]
    before, after = made["samples"].unbind()[0], longer["samples"].unbind()[0]
    assert torch.equal(after[:, :, :3], before) and torch.equal(
        after[:, :, 3:], before[:, :, -1:].expand_as(after[:, :, 3:])
    )


def test_without_sound_there_is_silence_and_none_to_keep(loaded, latent):
    images, _ = video(9)
    silence = {"waveform": torch.zeros(1, 1, 100), "sample_rate": 8000}
    without, silent = (encoded(loaded, latent, images, audio)["samples"].unbind()[1] for audio in (None, silence))
    torch.testing.assert_close(without, silent)
    with pytest.raises(ValueError, match="There is no sound to keep: the video has none. Connect audio"):
        encoded(loaded, latent, images, keep="sound")


def test_a_batch_of_clips_begins_alike(loaded, prompt, latent):
    parts = (part.repeat(2, *[1] * (part.ndim - 1)) for part in latent["samples"].unbind())
    images, audio = video(9)
    kept = encoded(loaded, {"samples": type(latent["samples"])(tuple(parts))}, images, audio, keep="picture")
    assert [part.shape[0] for part in kept["samples"].unbind()] == [2, 2]
    assert torch.equal(Decode.execute(sampled(loaded, prompt, kept), *loaded[2:]).args[0], images.repeat(2, 1, 1, 1))


def test_less_denoise_stays_nearer(loaded, prompt, latent):
    start = encoded(loaded, latent, *video(9))
    off = [
        [(a - b).std().item() for a, b in zip(made["samples"].unbind(), start["samples"].unbind(), strict=True)]
        for made in (sampled(loaded, prompt, start, denoise) for denoise in (0.05, 0.3, 1.0))
    ]
    assert off[0][0] < off[1][0] < off[2][0] and off[0][1] < off[1][1] < off[2][1]


def test_denoise_1_does_not_see_the_start(loaded, prompt, latent):
    one, other = (sampled(loaded, prompt, encoded(loaded, latent, *video(9, seed=seed))) for seed in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(one["samples"].unbind(), other["samples"].unbind(), strict=True))


@pytest.mark.parametrize("denoise", [0.3, 0.75, 1.0])
def test_the_levels_are_those_of_cores_ksampler(loaded, denoise):
    core = comfy.samplers.KSampler(loaded[0], 8, "cpu", "euler", "simple", denoise)
    level = 5e-3  # core's `simple` takes the nearest of a thousand, which are so far apart towards 0
    torch.testing.assert_close(core.sigmas.float(), flow_sigmas(8, 5.0, denoise), atol=level, rtol=0)


def test_sampler_custom_advanced_does_the_same(loaded, prompt, latent):
    start = encoded(loaded, latent, *video(9))
    sigmas = Sigmas.execute(4, 5.0, 0.4).args[0]
    guider, noise = custom.BasicGuider.execute(loaded[0], prompt).args[0], custom.RandomNoise.execute(SEED).args[0]
    theirs = custom.SamplerCustomAdvanced.execute(noise, guider, SamplerSelect.execute().args[0], sigmas, start).args[0]
    ours = sampled(loaded, prompt, start, 0.4)
    assert all(torch.equal(*pair) for pair in zip(ours["samples"].unbind(), theirs["samples"].unbind(), strict=True))


def test_an_empty_latent_with_less_denoise_is_told(loaded, prompt, latent, notices):
    sampled(loaded, prompt, latent, 0.5)
    sampled(loaded, prompt, latent, 1.0)
    sampled(loaded, prompt, encoded(loaded, latent, *video(9)), 0.5)
    grey = "The latent is empty: with denoise below 1 the clip stays grey."
    assert [grey in told for told in notices] == [True, False, False, False]


def test_a_latent_without_sound_is_refused(loaded):
    with pytest.raises(ValueError, match="no sound, expected a joint one"):
        encoded(loaded, {"samples": torch.zeros(1, 48, 3, 2, 4)}, *video(9))


def test_a_mask_says_where_the_picture_changes(loaded, prompt, latent):
    """The right half may change, in the picture's own pixels 120 wide: two of the four latents of a row."""
    images, audio = video(9, height=60, width=120)
    right = torch.zeros(1, 60, 120)
    right[..., 60:] = 1.0
    start = encoded(loaded, latent, images, audio, mask=right)
    assert start["noise_mask"].unbind()[0].shape == (1, 1, 3, 2, 4)
    assert (start["noise_mask"].unbind()[0] == torch.tensor([0.0, 0, 1, 1])).all()
    before, after = (part["samples"].unbind()[0] for part in (start, sampled(loaded, prompt, start)))
    assert torch.equal(after[..., :2], before[..., :2]) and not torch.isclose(after[..., 2:], before[..., 2:]).any()


def test_a_mask_may_move_and_keeps_time_with_the_pictures(loaded, latent):
    """18 pictures at 50 a second; what is white from the 10th on is white from the 5th of 25 a second on."""
    images, audio = video(18, seconds=0.36)
    late = torch.zeros(18, 32, 64)
    late[10:] = 1.0
    made = encoded(loaded, latent, images, audio, frame_rate=50.0, mask=late)["noise_mask"].unbind()[0]
    assert made[0, 0, :, 0, 0].tolist() == [0, 0, 1]
    late[8] = 1.0  # shown as the last picture of the second group
    made = encoded(loaded, latent, images, audio, frame_rate=50.0, mask=late)["noise_mask"].unbind()[0]
    assert made[0, 0, :, 0, 0].tolist() == [0, 1, 1]


def test_a_hairline_of_a_mask_is_not_lost(loaded, latent):
    """One white pixel in 300x600, an area that the latent's 32x64 pixels have no room for."""
    images, audio = video(9, height=300, width=600)
    dot = torch.zeros(1, 300, 600)
    dot[0, 10, 460] = 1.0
    made = encoded(loaded, latent, images, audio, mask=dot)["noise_mask"].unbind()[0]
    assert (made == torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0]])).all()


def test_a_masked_picture_can_follow_a_kept_sound(loaded, prompt, latent):
    images, audio = video(9)
    lower = torch.zeros(1, 32, 64)
    lower[:, 16:] = 1.0
    start = encoded(loaded, latent, images, audio, keep="sound", mask=lower)
    made = sampled(loaded, prompt, start)["samples"].unbind()
    assert torch.equal(made[1], start["samples"].unbind()[1])
    assert torch.equal(made[0][..., :1, :], start["samples"].unbind()[0][..., :1, :])


def test_masks_that_do_not_fit_are_refused(loaded, latent):
    images, audio = video(9)
    with pytest.raises(ValueError, match="The mask has 4 pictures; expected 1, or 9 as the video has"):
        encoded(loaded, latent, images, audio, mask=torch.ones(4, 32, 64))
    with pytest.raises(ValueError, match="The mask is black, so nothing may change. Make white what may"):
        encoded(loaded, latent, images, audio, mask=torch.zeros(1, 64, 64))  # Load Image's, of a picture without alpha
    with pytest.raises(ValueError, match="The mask is 64x64 and the video 64x32; expected the same shape"):
        encoded(loaded, latent, images, audio, mask=torch.ones(1, 64, 64))
    assert encoded(loaded, latent, images, audio, mask=torch.ones(1, 333, 667))["noise_mask"].unbind()[0].all()
    with pytest.raises(ValueError, match="The mask says where the picture changes, and keep is picture"):
        encoded(loaded, latent, images, audio, keep="picture", mask=torch.ones(1, 32, 64))
