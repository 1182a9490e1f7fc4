"""Properties of the one-step updates that hold for any correct implementation."""

import math

import pytest
import torch
from pack.sampler.schedule import flow_sigmas
from pack.sampler.steps import UniPC, renoise_step, sde_step


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 3, 4, 5, generator=generator) for _ in range(3)]


def solve(velocity, x, sigmas):
    solver = UniPC(sigmas)
    for sigma in sigmas[:-1].tolist():
        x = solver.step(x, x - sigma * velocity(x, sigma))
    return x


def test_the_last_renoise_step_is_the_prediction(draws):
    x, velocity, noise = draws
    torch.testing.assert_close(renoise_step(x, velocity, noise, 0.4, 0.0), x - 0.4 * velocity, rtol=0, atol=0)


def test_renoise_keeps_the_path_of_the_true_velocity(draws):
    clean, noise, fresh = draws
    x = 0.7 * noise + 0.3 * clean
    stepped = renoise_step(x, noise - clean, fresh, 0.7, 0.5)
    torch.testing.assert_close(stepped, 0.5 * fresh + 0.5 * clean)


def test_sde_goes_from_the_straight_step_to_the_renoise_step(draws):
    x, velocity, noise = draws
    straight = x + (0.5 - 0.7) * velocity
    torch.testing.assert_close(sde_step(x, velocity, noise, 0.7, 0.5, 0.0), straight)
    torch.testing.assert_close(sde_step(x, velocity, noise, 0.7, 0.5, 1.0), renoise_step(x, velocity, noise, 0.7, 0.5))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 32])
def test_unipc_is_exact_for_a_network_that_knows_the_clean_latent(draws, steps):
    clean, noise, _ = draws
    found = solve(lambda x, sigma: (x - clean) / sigma, noise, flow_sigmas(steps))
    torch.testing.assert_close(found, clean, rtol=0, atol=2e-6)


def test_unipc_converges_with_second_order():
    """Clean latent c and noise n drawn as N(0, s^2) and N(0, 1): the exact flow scales x by sqrt(s^2(1-t)^2 + t^2)."""
    spread = 0.5

    def width(sigma):
        return math.sqrt(spread**2 * (1 - sigma) ** 2 + sigma**2)

    def velocity(x, sigma):
        return x * (sigma - spread**2 * (1 - sigma)) / width(sigma) ** 2

    def error(steps):
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        start = torch.ones(1, dtype=torch.float64)
        return abs(solve(velocity, start, sigmas).item() - width(0.1) / width(0.9))

    assert error(32) < error(16) / 3.5


def test_unipc_accepts_pure_noise_as_its_first_level(draws):
    clean, noise, _ = draws
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    torch.testing.assert_close(solve(lambda x, sigma: (x - clean) / sigma, noise, sigmas), clean, rtol=0, atol=2e-6)


def test_unipc_says_what_is_wrong(draws):
    x, denoised, _ = draws
    for sigmas in ([0.5], [0.5, 0.5, 0.0], [0.5, 0.7, 0.0], [1.1, 0.0]):
        with pytest.raises(ValueError, match="falling"):
            UniPC(sigmas)
    solver = UniPC([0.5, 0.0])
    with pytest.raises(ValueError, match="denoised has shape"):
        solver.step(x, denoised[:1])
    solver.step(x, denoised)
    with pytest.raises(ValueError, match="all 1 steps are taken"):
        solver.step(x, denoised)
