"""The step cache's rule: what it skips, what it adds instead, what it measures."""

import pytest
import torch
from pack.model_loader import token_pieces
from pack.model_loader.dit import DiT
from pack.model_loader.tokens import patchify
from pack.nano.train_dit import CONFIG, initialise
from pack.sampler.step_cache import StepCache


def call(cache, change, x, key="prompt", factor=2.0):
    ran = []

    def middle(x):
        ran.append(True)
        return factor * x

    return cache(key, torch.full((1, 3, 4), change), torch.full((1, 3, 4), x), middle), bool(ran)


def test_it_adds_what_the_middle_layers_added_last_while_the_drift_is_small():
    cache = StepCache(0.1)
    assert call(cache, 1.0, 5.0)[1]
    out, ran = call(cache, 1.05, 6.0)
    assert not ran and torch.equal(out, torch.full((1, 3, 4), 11.0))  # 6 and the 5 that were added before
    out, ran = call(cache, 1.15, 6.0)
    assert ran and torch.equal(out, torch.full((1, 3, 4), 12.0)), "small drifts add up"
    out, ran = call(cache, 1.2, 7.0)
    assert not ran and torch.equal(out, torch.full((1, 3, 4), 13.0))
    assert "2 of 4 forwards" in cache.report() and "5.0 % at most" in cache.report()


def test_keys_and_sizes_are_kept_apart():
    cache = StepCache(0.1)
    call(cache, 1.0, 5.0)
    assert call(cache, 1.0, 5.0, key="negative")[1] and not call(cache, 1.0, 5.0)[1]
    with pytest.raises(ValueError, match="new one for every clip"):
        cache("prompt", torch.ones(1, 2, 4), torch.ones(1, 2, 4), lambda x: x)


def test_zero_skips_nothing():
    cache = StepCache(0.0)
    assert call(cache, 1.0, 5.0)[1] and call(cache, 1.0, 5.0)[1]
    assert "nothing skipped in 2" in cache.report()


@pytest.mark.parametrize("piece", [token_pieces.PIECE, 5])
@torch.no_grad()
def test_a_dit_whose_middle_always_runs_is_unchanged(piece, monkeypatch):
    """In pieces too, with which layers write into what they are given."""
    monkeypatch.setattr(token_pieces, "PIECE", piece)
    torch.manual_seed(0)
    dit = initialise(DiT(CONFIG, dtype=torch.float32)).requires_grad_(False)
    torch.nn.init.normal_(dit.final_linear_video.weight, std=0.1)
    inputs = torch.randn(1, 48, 2, 4, 4), torch.randn(1, 5, 64), torch.randn(1, 4, 96)
    seen = []

    def always(change, x, middle):
        seen.append((change.shape, x.shape))
        before = change.clone(), x.clone()
        out = middle(x)
        assert torch.equal(change, before[0]) and torch.equal(x, before[1]) and not torch.equal(x, out)
        torch.testing.assert_close(x - change, dit.adapter(patchify(inputs[0]), *inputs[1:]))
        return out

    for a, b in zip(dit(*inputs), dit(*inputs, step_cache=always), strict=True):
        assert torch.equal(a, b)
    assert seen == [((1, 17, 160), (1, 17, 160))]
    assert (dit.middle.start, dit.middle.stop) == (1, 7)
    skipped = dit(*inputs, step_cache=lambda change, x, middle: x)
    assert not torch.equal(skipped[0], dit(*inputs)[0])
