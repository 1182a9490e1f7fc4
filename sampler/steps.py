"""One-step updates of a latent from noise level sigma to sigma_next; scalars are Python floats (float64)."""

import math

from ..kernels import renoise_step

__all__ = ["UniPC", "renoise_step", "sde_step"]


def sde_step(x, velocity, noise, sigma, sigma_next, theta):
    """Step to `sigma_next`, turning the predicted noise by `theta` quarter turns towards fresh noise (0: none, 1: all).

    x, velocity, noise: same shape, fp32; sigma, sigma_next in [0, 1]; theta in [0, 1]. Returns x's shape.
    """
    cos, sin = math.cos(theta * math.pi / 2), math.sin(theta * math.pi / 2)
    denoised = x - sigma * velocity
    return (1 - sigma_next + sigma_next * cos) * denoised + sigma_next * cos * velocity + sigma_next * sin * noise


def _log_snr(sigma):
    """Half the log signal-to-noise ratio of a flow latent; -inf at pure noise, inf at the clean end."""
    signal = -math.inf if sigma >= 1 else math.log1p(-sigma)
    return signal - (math.log(sigma) if sigma > 0 else -math.inf)


class UniPC:
    """UniPC (arXiv 2302.04867) of order 2, B(h) = e^h - 1, predicting the clean latent: one object a latent and run.

    sigmas [steps + 1]: falling, in [0, 1]; ValueError if not. The corrector refines each input with what the network
    predicted at it, at no extra call; the first step and a step to 0 are of order 1.
    """

    def __init__(self, sigmas):
        self.sigmas = [float(sigma) for sigma in sigmas]
        falls = all(high > low for high, low in zip(self.sigmas, self.sigmas[1:], strict=False))
        if len(self.sigmas) < 2 or not falls or self.sigmas[0] > 1 or self.sigmas[-1] < 0:
            raise ValueError(f"sigmas {self.sigmas}: expected at least 2, falling from at most 1 to at least 0")
        self.log_snr = [_log_snr(sigma) for sigma in self.sigmas]
        self.index = 0
        self.order = 0  # of the last prediction
        self.denoised = []  # predictions of the clean latent at the last two noise levels, newest last
        self.last = None  # corrected latent that the last step started from

    def step(self, x, denoised):
        """Return the latent at the next noise level; call once a noise level, in order.

        x: latent at the present level, as the last call returned it; denoised: x - sigma * velocity. Same shape.
        """
        if self.index + 1 == len(self.sigmas):
            raise ValueError(f"all {self.index} steps are taken; make a new UniPC for another run")
        if denoised.shape != x.shape:
            raise ValueError(f"denoised has shape {list(denoised.shape)}; expected that of x, {list(x.shape)}")
        if self.index > 0:
            x = self._correct(denoised)
        self.denoised = [*self.denoised[-1:], denoised]
        self.last = x
        steps = len(self.sigmas) - 1
        self.order = min(2, steps - self.index, self.index + 1)
        self.index += 1
        if self.sigmas[self.index] == 0:
            return denoised
        return self._predict(x)

    def _correct(self, denoised):
        """Redo the last step to the present level, now that the prediction `denoised` at its end is known."""
        now = self.index
        h = self.log_snr[now] - self.log_snr[now - 1]
        b = math.expm1(-h)
        signal = 1 - self.sigmas[now]
        previous = self.denoised[-1]
        base = self.sigmas[now] / self.sigmas[now - 1] * self.last - signal * b * previous
        change = denoised - previous
        if self.order == 1:
            return base - signal * b * 0.5 * change
        r = (self.log_snr[now - 2] - self.log_snr[now - 1]) / h
        older_change = (self.denoised[-2] - previous) / r
        q1 = b / -h - 1
        q2 = q1 / -h - 0.5
        b1, b2 = q1 / b, 2 * q2 / b
        older_weight = (b1 - b2) / (1 - r)
        return base - signal * b * (older_weight * older_change + (b1 - older_weight) * change)

    def _predict(self, x):
        """Step from the corrected `x` to the level that `self.index` points at."""
        target = self.index
        h = self.log_snr[target] - self.log_snr[target - 1]
        b = math.expm1(-h)
        signal = 1 - self.sigmas[target]
        newest = self.denoised[-1]
        base = self.sigmas[target] / self.sigmas[target - 1] * x - signal * b * newest
        if self.order == 1:
            return base
        r = (self.log_snr[target - 2] - self.log_snr[target - 1]) / h
        return base - signal * b * 0.5 * (self.denoised[-2] - newest) / r
