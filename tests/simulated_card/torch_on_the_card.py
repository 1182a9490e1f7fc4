"""Script: what torch does on the simulated card; asserts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "simulated_card"))
import card  # noqa: E402

driver = card.put_in(Path(sys.argv[1]), 1)

import torch  # noqa: E402  (after the card)
import torch.nn.functional as F  # noqa: E402


def raises(error, words, call):
    """Assert that a call fails, and how."""
    try:
        call()
    except error as caught:
        assert words in str(caught), caught
    else:
        raise AssertionError(f"no {error.__name__}")


def numbers(host, on_card):
    """Numbers are as on the CPU, and its tensors may not be mixed with the card's."""
    assert on_card.is_cuda and torch.equal(on_card.cpu(), host) and driver.card_used() == host.nbytes
    weight, bias = torch.randn(8, 16), torch.randn(8)
    kernel, clip = torch.randn(3, 2, 3, 3, 3), torch.randn(1, 2, 4, 5, 5)
    for function, tensors in (
        (F.linear, (host, weight, bias)),
        (F.conv3d, (clip, kernel)),
        (lambda x: F.scaled_dot_product_attention(x, x, x), (host,)),
        (lambda x: x.transpose(0, 1).reshape(6, -1)[1:, ::2] * 2 - x.sum(), (host,)),
        (lambda x: x[torch.tensor([2, 0])].masked_fill(x[:2] > 0, 0), (host,)),
        (lambda x: x.clone().mul_(3).to(torch.bfloat16), (host,)),
        (lambda x: torch.cat([x, -x]).view(torch.int32), (host,)),
        (lambda x: F.layer_norm(x, (16,)), (host,)),
    ):
        torch.testing.assert_close(function(*(t.cuda() for t in tensors)).cpu(), function(*tensors))
    raises(RuntimeError, "same device", lambda: on_card + host)
    raises(RuntimeError, "same device", lambda: F.linear(on_card, weight))
    raises(RuntimeError, "same device", lambda: F.scaled_dot_product_attention(on_card, host, host))
    noise = torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    assert torch.equal(noise.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(1)))


def memory(half):
    """Memory runs out."""
    raises(torch.OutOfMemoryError, "out of memory", lambda: torch.empty(2**29, device="cuda"))
    raises(torch.OutOfMemoryError, "out of memory", lambda: half + 1.0 + half)


host = torch.randn(4, 6, 16)
numbers(host, host.to("cuda"))
memory(torch.empty(2**27, device="cuda"))
assert driver.card_used() == 0 and 2**29 < driver.card_peak() <= 2**30
