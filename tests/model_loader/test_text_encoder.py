"""The text encoder: padding, windows, gradients. Exactness is test_golden's."""

import pytest
import torch
from pack.model_loader.text_encoder import TextEncoder

IDS = torch.tensor([[5, 9, 1, 30, 2, 7, 44, 12], [3, 3, 8, 0, 0, 0, 0, 0]])


@torch.no_grad()
def test_padding_does_not_reach_the_tokens(text_encoder):
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    together = text_encoder(IDS, mask)
    torch.testing.assert_close(together[:1], text_encoder(IDS[:1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1:, :3], text_encoder(IDS[1:, :3]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_query_that_may_see_nothing_gives_zero_not_nan(text_encoder):
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]])  # in even layers the last tokens see nothing within 4
    seen = []
    text_encoder.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert text_encoder(IDS[:1], mask).isfinite().all()
    assert seen[0][0, 5:].abs().max() == 0 and seen[0][0, :5].abs().min(dim=-1).values.max() > 0


@torch.no_grad()
def test_even_layers_look_through_a_window_and_odd_layers_do_not(text_encoder):
    def reach(layer):
        x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
        cos, sin = text_encoder.rotary(8, x)
        allowed = text_encoder.allowed(8, None, x.device)[layer % 2]
        moved = x.clone()
        moved[0, 0] += 1
        change = text_encoder.layers[layer](moved, cos, sin, allowed) - text_encoder.layers[layer](x, cos, sin, allowed)
        return (change[0].abs().max(dim=-1).values > 1e-6).tolist()

    assert reach(0) == [True] * 4 + [False] * 4
    assert reach(1) == [True] * 8
    assert reach(2) == [True] * 4 + [False] * 4


@torch.no_grad()
def test_short_texts_need_no_mask(text_encoder):
    assert text_encoder.allowed(4, None, "cpu") == (None, None)
    assert text_encoder.allowed(5, None, "cpu")[0] is not None


def test_every_weight_gets_a_gradient(text_encoder):
    text_encoder(IDS, (IDS > 0).long()).square().mean().backward()
    assert all(parameter.grad.any() for parameter in text_encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_dtype_of_features_and_norms(text_encoder, dtype):
    encoder = TextEncoder(text_encoder.config, dtype=dtype)
    encoder.load_state_dict(text_encoder.state_dict())
    assert encoder(IDS).dtype == dtype
    assert encoder.norm.weight.dtype == torch.float32
    assert (encoder(IDS).float() - text_encoder(IDS)).norm() / text_encoder(IDS).norm() < 2e-2
