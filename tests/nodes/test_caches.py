"""Core's step caches work on our MODEL, and leave it as it was."""

import comfy_extras.nodes_easycache as caches
import pytest
import torch
from pack.nodes.sampling import Sampler

SEED = 9


def sample(model, prompt, latent):
    calls = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    samples = Sampler.execute(model, prompt, latent, SEED, 12, 5.0).args[0]["samples"].unbind()
    hook.remove()
    return samples, len(calls)


@pytest.mark.parametrize("cache", [caches.EasyCacheNode, caches.LazyCacheNode])
def test_a_cache_skips_steps_and_a_strict_one_changes_nothing(loaded, prompt, latent, cache):
    plain, calls = sample(loaded[0], prompt, latent)
    assert calls == 12
    strict, calls = sample(cache.execute(loaded[0], 0.0, 0.1, 0.9, False).args[0], prompt, latent)
    assert calls == 12 and all(torch.equal(a, b) for a, b in zip(strict, plain, strict=True))
    loose, calls = sample(cache.execute(loaded[0], 1.0, 0.1, 0.9, False).args[0], prompt, latent)
    assert calls < 12 and [part.shape for part in loose] == [part.shape for part in plain]
    assert all(part.isfinite().all() for part in loose)
