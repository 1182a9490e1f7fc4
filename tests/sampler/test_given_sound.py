"""Sound that is given: lengths, resampling up to its ends, joining."""

import pytest
import torch
from pack.model_loader.core_vae import resample
from pack.sampler.joining import join_sound
from pack.sampler.soundtrack import at_encoder_rate, covering_frames, fit_sound, mono, stereo


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000, 44101])
@pytest.mark.parametrize("samples", [1, 4410, 44100, 100000])
def test_frames_cover_the_sound_and_no_more(rate, samples):
    frames = covering_frames(samples, rate)
    assert frames % 4 == 1 and frames / 25 >= samples / rate
    assert frames == 1 or (frames - 4) / 25 < samples / rate
    fitted = fit_sound(torch.ones(2, samples), rate, frames)
    assert fitted.shape[-1] >= samples and fitted[:, :samples].all() and not fitted[:, samples:].any()


def test_no_sound_is_named():
    with pytest.raises(ValueError, match="the soundtrack has 0 samples at 8000 Hz; expected at least one"):
        covering_frames(0, 8000)


@pytest.mark.parametrize("rate", [16000, 44100, 96000])
def test_resampling_keeps_a_tone_and_does_not_ring_at_its_ends(rate):
    """It ends where it does not start, which a spectrum alone would take for a step."""

    def tone(samples, rate):
        return torch.cos(2000 * torch.arange(samples, dtype=torch.float64) / rate).float()[None, None]

    found = at_encoder_rate(tone(rate, rate), 25)
    error = (found - tone(25 * 2048, 51200)).abs()
    given = 25 * 2048 - 51200 // rate - 1  # what lies after the last given sample can only be guessed
    assert found.shape == (1, 1, 25 * 2048)
    assert error[..., 100:-100].max() < 2e-3 and error[..., :given].max() < 4e-2
    spectrum_alone = (resample(tone(rate, rate), 25 * 2048) - tone(25 * 2048, 51200)).abs()
    assert spectrum_alone[..., :given].max() > 4e-2


def test_one_frame_can_be_resampled():
    assert at_encoder_rate(torch.ones(1, 2, 320), 1).shape == (1, 2, 2048)


def test_channels():
    sides = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    assert torch.equal(mono(sides), torch.tensor([[[2.0, 4.0], [2.0, 4.0]]]))
    assert stereo(sides) is sides and torch.equal(stereo(sides[:, :1]), sides[:, :1].expand(-1, 2, -1))


@pytest.mark.parametrize("overlap", [1, 9])
def test_joined_sound_is_as_long_as_its_pictures(overlap):
    first, second = torch.ones(1, 2, 20 * 1764 + 500), torch.full((1, 2, 17 * 1764 - 900), 3.0)
    joined = join_sound(first, second, 44100, (20, 17), overlap)
    assert joined.shape == (1, 2, (37 - overlap) * 1764)
    assert (joined[..., : 19 * 1764] == 1).all() and (joined[..., 20 * 1764 : -900] == 3).all()
    seam = joined[0, 0, 19 * 1764 : 20 * 1764]
    assert (seam.diff() >= 0).all() and seam[0] == 1 and seam[-1] < 3
