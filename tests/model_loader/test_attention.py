"""Grouped heads and local attention against full softmax attention with a mask written out token by token."""

import pytest
import torch
import torch.nn.functional as F
from pack.kernels import reference
from pack.kernels.fp8 import fp8_scores
from pack.model_loader import attention
from pack.model_loader.attention import by_frames, frame_windows, grouped_attention, joint_attention, local_attention
from pack.model_loader.tokens import TokenLayout

LAYOUT = TokenLayout(frames=5, rows=2, columns=3, audio=4, text=2)
TOTAL = sum(LAYOUT.spans)


@pytest.fixture
def qkv():
    random = torch.Generator().manual_seed(0)
    heads = ((2, 6, TOTAL, 8), (2, 2, TOTAL, 8), (2, 2, TOTAL, 8))
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in heads]


def full_attention(q, k, v, may_see):
    """Loop over heads: softmax over every allowed key, query head h with key/value head h // 3."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = q[b, h] @ k[b, h // 3].T / q.shape[-1] ** 0.5
            out[b, h] = scores.masked_fill(~may_see, -torch.inf).softmax(-1) @ v[b, h // 3]
    return out


def local_mask(radius):
    may_see = torch.ones(TOTAL, TOTAL, dtype=torch.bool)
    for query in range(LAYOUT.video):
        for key in range(LAYOUT.video):
            may_see[query, key] = abs(query // 6 - key // 6) <= radius
    return may_see


@pytest.mark.parametrize("takes_groups", [True, False])
def test_keys_are_repeated_where_torch_would_keep_every_score_otherwise(qkv, takes_groups, monkeypatch):
    """RTX 20 has no FlashAttention, the only one of torch's that takes groups of heads as they are."""
    given, attend = [], F.scaled_dot_product_attention

    def seen(q, k, v, **options):
        given.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(attention, "takes_groups", lambda device, dtype, head_dim: takes_groups)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    mask = local_mask(1)
    torch.testing.assert_close(grouped_attention(*qkv, mask=mask), full_attention(*qkv, mask))
    assert given == ([(2, 2, True)] if takes_groups else [(6, 6, False)])


def test_grouped_heads_share_neighbouring_queries(qkv):
    torch.testing.assert_close(
        grouped_attention(*qkv), full_attention(*qkv, torch.ones(TOTAL, TOTAL, dtype=torch.bool))
    )


def test_mask_and_scale(qkv):
    mask = local_mask(1)
    torch.testing.assert_close(grouped_attention(*qkv, mask=mask), full_attention(*qkv, mask))
    q, k, v = qkv
    torch.testing.assert_close(grouped_attention(q, k, v, scale=0.5), grouped_attention(q * 0.5 * 8**0.5, k, v))


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 4, 11])
def test_local_attention_is_full_attention_under_a_mask(qkv, radius):
    torch.testing.assert_close(local_attention(*qkv, LAYOUT, radius), full_attention(*qkv, local_mask(radius)))


def test_local_attention_never_asks_for_all_keys_at_once(qkv):
    asked = []

    def attend(q, k, v):
        asked.append((q.shape[2], k.shape[2]))
        return grouped_attention(q, k, v)

    local_attention(*qkv, LAYOUT, 1, attend)
    assert asked == [(6, 18), (6, 24), (6, 24), (6, 24), (6, 18), (6, TOTAL)]


def test_windows_stop_at_the_ends():
    assert frame_windows(4, 1) == ((0, 2), (0, 3), (1, 4), (2, 4))
    assert frame_windows(3, 11) == ((0, 3),) * 3


def joint(q, k, v, radius=None, **options):
    return joint_attention(q, k, v, LAYOUT, radius, **options)


@pytest.mark.parametrize("radius", [None, 0, 1, 4, 11])
def test_joint_attention_is_the_references(qkv, radius):
    window = () if radius is None else (LAYOUT.frame, LAYOUT.frames, radius)
    torch.testing.assert_close(joint(*qkv, radius), reference.attention(*qkv, *window))
    full = full_attention(*qkv, local_mask(11 if radius is None else radius))
    torch.testing.assert_close(joint(*qkv, radius), full)


@pytest.mark.parametrize("radius", [None, 1])
def test_joint_attention_in_fp8_takes_what_fp8_leaves(qkv, radius):
    q, k, v = (tensor.float() for tensor in qkv)
    v[..., 3] *= 1e4  # a column of values has a scale of its own
    window = () if radius is None else (LAYOUT.frame, LAYOUT.frames, radius)
    narrow = fp8_scores(q, k, k.abs().amax())
    found, exact = joint(*narrow, v, radius), reference.attention(q, k, v, *window)
    torch.testing.assert_close(found, reference.attention(*narrow, v, *window), rtol=1e-4, atol=1e-4)
    off = (found - exact).norm(dim=2) / exact.norm(dim=2)
    assert 5e-3 < off.mean() < 6e-2 and off.max() < 0.15


def test_by_frames_gives_a_callers_attention_the_windows(qkv):
    asked = []

    def attend(q, k, v):
        asked.append((q.shape[2], k.shape[2]))
        return grouped_attention(q, k, v)

    torch.testing.assert_close(by_frames(attend)(*qkv, LAYOUT, 1), joint(*qkv, 1))
    torch.testing.assert_close(by_frames(attend)(*qkv, LAYOUT), joint(*qkv))
    assert asked[0] == (6, 18) and asked[-1] == (TOTAL, TOTAL)
