"""The schedules against the numbers that the specification states."""

import pytest
import torch
from pack.sampler.schedule import flow_sigmas, flow_timesteps, zero_snr_signal_scales


def test_eight_steps_are_the_published_ones():
    stated = [0.9997998, 0.9720060, 0.9372655, 0.8926018, 0.8330554, 0.7496998, 0.6246874, 0.4163888, 0]
    torch.testing.assert_close(flow_sigmas(8), torch.tensor(stated), rtol=0, atol=1e-7)
    assert flow_timesteps(8).tolist() == [999, 972, 937, 892, 833, 749, 624, 416]


@pytest.mark.parametrize("steps", [1, 2, 5, 32, 1000])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_sigmas_fall_from_below_one_to_zero(steps, shift):
    sigmas = flow_sigmas(steps, shift)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] < 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_higher_shift_spends_longer_in_noise():
    assert (flow_sigmas(8, 8.0)[1:-1] > flow_sigmas(8, 5.0)[1:-1]).all()


def test_zero_snr_table():
    scales = zero_snr_signal_scales()
    assert scales.shape == (1000,) and (scales.diff() < 0).all() and scales[-1] == 0
    assert scales[220].item() == pytest.approx(0.8389104, abs=1e-7)


def test_bad_requests_say_what_was_expected():
    with pytest.raises(ValueError, match="steps is 0; expected 1 or more"):
        flow_sigmas(0)
    with pytest.raises(ValueError, match="shift is -1"):
        flow_sigmas(8, -1)


def test_denoise_takes_the_end_of_a_longer_schedule():
    torch.testing.assert_close(flow_sigmas(4, 5.0, 0.5), flow_sigmas(8)[4:])
    assert torch.equal(flow_sigmas(8, 5.0, 0.3), flow_sigmas(26)[18:])
    assert torch.equal(flow_sigmas(8, 5.0, 1.0), flow_sigmas(8))
    for denoise in (0, 1.1, -0.5):
        with pytest.raises(ValueError, match=f"denoise is {denoise}; expected above 0 and up to 1"):
            flow_sigmas(8, 5.0, denoise)
