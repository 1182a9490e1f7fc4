"""The training loop: a resumed run ends where an uninterrupted one does."""

import pytest
import torch
from pack.nano import training


def run(folder, monkeypatch, stop_at=None):
    monkeypatch.setattr(training, "RUNS", folder)
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)

    def loss_of_step(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 3)
        return (module(x) - x.sum(1, keepdim=True)).square().mean(), {}

    return training.train("tiny", module, loss_of_step, steps=60, peak_rate=0.05, warmup=5, save_every=20)


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    whole = run(tmp_path / "a", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", monkeypatch, stop_at=47)
    resumed = run(tmp_path / "b", monkeypatch)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.allclose(whole.weight, torch.ones(1, 3), atol=0.2)
    assert not list((tmp_path / "b").glob("*.part"))


def test_rate_rises_then_falls():
    rates = [training.learning_rate(step, 1000, 1.0, warmup=100) for step in range(1000)]
    assert rates[0] < 0.02 and max(rates) == rates[99] and rates[-1] < 0.03
    assert all(a >= b for a, b in zip(rates[100:], rates[101:], strict=False))
