"""Sizes of clips, super-resolution start, audio windows and pixel conversions."""

import math

import pytest
import torch
from pack.sampler.audio_windows import SAMPLES_PER_LATENT, WINDOW_LATENTS, encode_in_windows, merge_windows
from pack.sampler.media import crop_middle, first_image, resize_frames, to_frames
from pack.sampler.sizes import (
    RATIOS,
    RESOLUTIONS,
    audio_length,
    latent_side,
    outside_training,
    pixel_frames,
    pixel_size,
    shown_size,
    video_length,
)
from pack.sampler.super_resolution import noised_latent, start_super_resolution, upsample_latent


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_ratio_keeps_shape_and_area(resolution):
    sizes = {ratio: pixel_size(resolution, ratio) for ratio in RATIOS}
    assert len(set(sizes.values())) == len(RATIOS), "two ratios must not give the same picture"
    for ratio, (width, height) in sizes.items():
        assert width % 32 == 0 and height % 32 == 0
        assert width / height == pytest.approx(RATIOS[ratio], rel=0.045)
        assert width * height == pytest.approx(math.prod(RESOLUTIONS[resolution]), rel=0.085)
        turned = ":".join(reversed(ratio.split(":")))
        assert sizes[turned] == (height, width)


def test_published_sizes():
    assert pixel_size("256p", "16:9") == (448, 256) and pixel_size("256p", "9:16") == (256, 448)
    assert pixel_size("540p", "16:9") == (960, 544) and pixel_size("1080p", "16:9") == (1920, 1088)
    assert pixel_size("256p", "5:4") == (384, 320) and pixel_size("256p", "4:3") == (384, 288)
    assert audio_length(5) == 126 and video_length(126) == 32 and pixel_frames(32) == 125
    assert audio_length(1) == 26 and video_length(26) == 7 and video_length(1) == 1
    assert [latent_side(pixels) for pixels in (32, 100, 170, 256, 1088)] == [2, 6, 10, 16, 68]


def test_only_1080p_is_shown_smaller_than_it_is_decoded():
    assert shown_size(1920, 1088) == (1920, 1080) and shown_size(1088, 1920) == (1080, 1920)
    for resolution, ratio in (
        (r, a) for r in RESOLUTIONS for a in RATIOS if (r, a) not in (("1080p", "16:9"), ("1080p", "9:16"))
    ):
        assert shown_size(*pixel_size(resolution, ratio)) == pixel_size(resolution, ratio)
    rows = torch.arange(8).view(1, 8, 1, 1).expand(2, 8, 6, 3)
    assert crop_middle(rows, 6, 4)[0, :, 0, 0].tolist() == [2, 3, 4, 5]
    assert crop_middle(rows.transpose(1, 2), 4, 6)[0, 0, :, 0].tolist() == [2, 3, 4, 5]


def test_what_is_outside_the_training_is_said():
    assert all(not outside_training(*pixel_size("256p", ratio), 10) for ratio in RATIOS)
    assert all(len(outside_training(*pixel_size("540p", ratio), 10)) == 1 for ratio in RATIOS)
    large, long = outside_training(960, 544, 10.2)
    assert large.startswith("960x544 is larger than the 256p") and long.startswith("10.2 s is longer than the 10 s")


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="31 pixels is too small"):
        latent_side(31)
    with pytest.raises(ValueError, match="seconds is 0"):
        audio_length(0)


def test_super_resolution_draws_for_the_video_then_for_the_audio():
    drawn = []

    def noise(like):
        drawn.append(tuple(like.shape))
        return torch.full_like(like, float(len(drawn)))

    video, audio = torch.ones(1, 8, 3, 4, 6), torch.ones(1, 9, 64)
    start, heard = start_super_resolution(video, audio, 6, 10, noise)
    assert drawn == [(1, 8, 3, 6, 10), (1, 9, 64)]
    torch.testing.assert_close(heard, torch.full_like(heard, 0.7 * 2 + 0.3))
    torch.testing.assert_close(start, torch.full_like(start, 0.8389104 + (1 - 0.8389104**2) ** 0.5))
    drawn.clear()
    untouched, _ = start_super_resolution(video, audio, 6, 10, noise, noise_level=0)
    assert drawn == [(1, 9, 64)] and torch.equal(untouched, torch.ones(1, 8, 3, 6, 10))


def test_super_resolution_options():
    video = torch.randn(1, 8, 3, 4, 6)
    corners = upsample_latent(video, 7, 11)
    torch.testing.assert_close(corners[..., ::2, ::2], video)  # 7 = 2 * 4 - 1: every other value is an old one
    assert not torch.allclose(upsample_latent(video, 7, 11, align_corners=False), corners)
    with pytest.raises(ValueError, match="noise level is 1000; expected 0 to 999"):
        noised_latent(video, video, 1000)


def test_short_soundtracks_are_encoded_whole():
    lengths = []

    def encode(waveform):
        lengths.append(waveform.shape[-1])
        return waveform[:, :1, ::SAMPLES_PER_LATENT]

    window = WINDOW_LATENTS * SAMPLES_PER_LATENT
    assert encode_in_windows(encode, torch.zeros(1, 2, window)).shape == (1, 1, WINDOW_LATENTS)
    assert lengths == [window]


@pytest.mark.parametrize("latents", [726, 900, 1087, 1088, 1500])
def test_long_soundtracks_come_back_whole_and_in_time(latents):
    """An encoder that returns the time of each latent: joined windows must give one clock, within half a latent."""
    lengths = []

    def encode(waveform):
        lengths.append(waveform.shape[-1])
        return waveform[:, :1].unflatten(-1, (-1, SAMPLES_PER_LATENT)).amax(-1) / SAMPLES_PER_LATENT

    clock = torch.arange(latents * SAMPLES_PER_LATENT, dtype=torch.float32).expand(1, 2, -1)
    found = encode_in_windows(encode, clock)[0, 0]
    assert found.shape == (latents,) and set(lengths) == {WINDOW_LATENTS * SAMPLES_PER_LATENT}
    assert (found[:-1] - torch.arange(1, latents)).abs().max() <= 0.51 * len(lengths)


def test_merged_windows_of_one_constant_stay_constant():
    assert torch.equal(merge_windows([torch.ones(1, 4, 9)] * 3, axis=-1), torch.ones(1, 4, 19))


def test_first_image_takes_files_and_comfyui_images_alike():
    pixels = torch.randint(0, 256, (50, 91, 3), dtype=torch.uint8)
    from_file = first_image(pixels, 64, 32)
    assert from_file.shape == (1, 3, 1, 64, 32) and from_file.min() >= -1 and from_file.max() <= 1
    assert torch.equal(first_image(pixels.float() / 255, 64, 32), from_file)
    with pytest.raises(ValueError, match=r"image has shape \[50, 91, 4\]"):
        first_image(torch.zeros(50, 91, 4), 64, 32)


def test_frames_clamp_and_resize():
    decoded = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(3, 2, 4, 5)
    frames = to_frames(decoded)
    assert frames.shape == (2, 4, 5, 3) and frames[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255]
    assert resize_frames(frames, 8, 10).shape == (2, 8, 10, 3)
