"""The transformer as a whole: batches, experts, dtypes, gradients, refusals. Exactness is test_golden's."""

import contextlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pack.model_loader import dit_layers, token_pieces
from pack.model_loader.attention import grouped_attention
from pack.model_loader.dit import DiT
from pack.model_loader.fp8_linear import with_fp8_linears
from pack.model_loader.load import load_dit, load_text_encoder, tokenizer_json
from pack.model_loader.tokens import TokenLayout
from pack.sampler.denoise import seeded_noise
from pack.sampler.memory import TEXT_TOKENS
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

LAST_BIT = 1e-6 if sys.platform == "win32" else 0  # in which torch's products of other sizes differ there


@pytest.mark.parametrize("network", ["dit", "sr_dit"])
@torch.no_grad()
def test_a_batch_equals_its_clips_one_by_one(network, clip, request):
    network = request.getfixturevalue(network)
    together = network(*clip)
    for i in range(2):
        alone = network(*(stream[i : i + 1] for stream in clip))
        for joint, single in zip(together, alone, strict=True):
            torch.testing.assert_close(joint[i : i + 1], single, rtol=0, atol=2e-5)


@torch.no_grad()
def test_velocities_have_the_latents_shapes_and_are_fp32(dit, clip):
    v_video, v_audio = dit(*clip)
    assert v_video.shape == clip[0].shape and v_audio.shape == clip[1].shape
    assert v_video.dtype == v_audio.dtype == torch.float32


@torch.no_grad()
def test_bf16_keeps_its_fp32_islands_and_stays_near_fp32(dit, clip):
    half = DiT(dit.config, dtype=torch.bfloat16)
    half.load_state_dict(dit.state_dict())
    wide = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {n for n, _ in half.named_parameters() if n.startswith(("adapter.", "final_")) or "norm" in n}
    v_video, v_audio = half(*clip)
    assert v_video.dtype == torch.float32
    wanted, _ = dit(*clip)
    assert 0 < (v_video - wanted).norm() / wanted.norm() < 2e-2


def test_every_weight_gets_a_gradient(dit, clip, monkeypatch):
    monkeypatch.setattr(token_pieces, "PIECE", 16)  # which does not count then: pieces are written to their place
    v_video, v_audio = dit(*clip)
    (v_video.square().mean() + v_audio.square().mean()).backward()
    still = {name for name, parameter in dit.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    # Text rows of the last layer reach no output.
    assert still == {
        f"block.layers.3.{n}.text.weight" for n in ("attention.linear_proj", "mlp.up_gate_proj", "mlp.down_proj")
    }


@torch.no_grad()
def test_each_modality_has_its_expert(dit, clip):
    before = dit(*clip)
    dit.block.layers[3].mlp.down_proj.audio.weight.zero_()
    after = dit(*clip)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@torch.no_grad()
def test_local_layers_are_the_ones_the_configuration_names(sr_dit, clip):
    everywhere = DiT(replace(sr_dit.config, frame_receptive_field=4))
    everywhere.load_state_dict(sr_dit.state_dict())
    nowhere = DiT(replace(sr_dit.config, local_attention_layers=()))
    nowhere.load_state_dict(sr_dit.state_dict())
    torch.testing.assert_close(everywhere(*clip)[0], nowhere(*clip)[0])
    assert (sr_dit(*clip)[0] - nowhere(*clip)[0]).abs().max() > 1e-2
    assert [layer.attention.radius for layer in sr_dit.block.layers] == [1, 1, 1, None]


@pytest.mark.parametrize("experts", [1, 3])
@torch.no_grad()
def test_pieces_hold_at_most_so_many_tokens_of_one_expert(monkeypatch, experts):
    monkeypatch.setattr(token_pieces, "PIECE", 10)
    pieces = token_pieces.cut((25, 0, 4), experts)
    assert [sum(piece) for piece in pieces] == ([9, 10, 10] if experts == 1 else [8, 8, 9, 4])
    assert all(len(piece) == experts and sum(length > 0 for length in piece) == 1 for piece in pieces)
    assert experts == 1 or [piece[2] for piece in pieces] == [0, 0, 0, 4]
    assert token_pieces.cut((5, 0, 4), experts) == ([(9,)] if experts == 1 else [(5, 0, 4)])
    assert token_pieces.cut((5, 0, 4), experts, True) == ([(9,)] if experts == 1 else [(5, 0, 0), (0, 0, 4)])


@torch.no_grad()
def test_five_seconds_of_256p_are_one_piece_with_the_longest_prompt():
    assert len(token_pieces.cut((3584, 126, TEXT_TOKENS), 1)) == 1


@torch.no_grad()
def test_weights_are_held_for_several_pieces_only(dit, clip, monkeypatch):
    held = []

    @contextlib.contextmanager
    def hold(linears, device):
        held.append(len(linears))
        yield

    network = DiT(dit.config, operations=SimpleNamespace(Linear=torch.nn.Linear, HELD=hold)).eval()
    network.load_state_dict(dit.state_dict())
    spans = TokenLayout.of(*clip).spans
    monkeypatch.setattr(token_pieces, "PIECE", max(spans))
    network(*clip)
    experts, shared = len(dit.config.expert_layers), dit.config.num_layers - len(dit.config.expert_layers)
    assert held.count(0) == 2 * experts * sum(span > 0 for span in spans)  # one piece for each modality
    assert held.count(1) == held.count(3) == shared


@torch.no_grad()
def test_what_a_layer_adds_is_added_by_the_norm_that_follows(dit, clip, monkeypatch):
    added, add = [], dit_layers.add
    monkeypatch.setattr(dit_layers, "add", lambda *tensors, **place: added.append(1) or add(*tensors, **place))
    dit(*clip)
    assert len(added) == 1  # the last layer's


@pytest.mark.parametrize("fp8_attention", [False, True])
@pytest.mark.parametrize("name", ["dit", "sr_dit"])
@torch.no_grad()
def test_pieces_change_nothing(name, clip, request, monkeypatch, fp8_attention):
    network = partial(request.getfixturevalue(name), fp8_attention=fp8_attention)
    whole = network(*clip)
    for piece in (32, 48):
        monkeypatch.setattr(token_pieces, "PIECE", piece)
        for in_pieces, at_once in zip(network(*clip), whole, strict=True):
            torch.testing.assert_close(in_pieces, at_once, rtol=0, atol=LAST_BIT)


@torch.no_grad()
def test_fp8_linears_stay_near_nano_in_bf16():
    """The bar of fp8 against bf16, a relative RMS below 4 % of a forward, in the first step from a prompt."""
    weights = Path(__file__).parents[2] / "nano" / "weights"
    nano, encoder = load_dit(weights / "nano_dit.safetensors"), weights / "nano_text_encoder.safetensors"
    ids = Tokenizer.from_str(tokenizer_json(encoder)).encode("A red ball bounces on a blue floor").ids
    text = load_text_encoder(encoder, dtype=torch.float32)(torch.tensor([ids]))
    narrow = with_fp8_linears(nano)
    assert narrow.block.layers[1].attention.linear_qkv.weight.dtype == torch.float8_e4m3fn
    noise = seeded_noise(0)
    clip = noise(torch.empty(1, 48, 13, 6, 6)), noise(torch.empty(1, 51, 64)), text
    for found, wanted in zip(narrow(*clip), nano(*clip), strict=True):
        assert 0 < (found - wanted).norm() / wanted.norm() < 4e-2


class NothingIsRead(TorchDispatchMode):
    """Fails where a value of a tensor is asked for: a card would be waited for, and a CUDA graph not recorded."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["dit", "sr_dit"])
def test_a_forward_does_not_wait_for_its_values(name, clip, request):
    network = request.getfixturevalue(name)
    before = network(*clip)  # makes the table of positions, once for all steps
    with NothingIsRead():
        after = network(*clip)
        with pytest.raises(AssertionError):
            after[0].sum().item()
    assert torch.equal(before[0], after[0])


@torch.no_grad()
def test_an_attention_of_the_callers_choice_is_used_in_every_layer(dit, clip):
    calls = []

    def attention(q, k, v):
        calls.append((q.shape[1], k.shape[1]))
        return grouped_attention(q, k, v)

    found, wanted = dit(*clip, attention=attention), dit(*clip)
    assert calls == [(4, 2)] * 4
    assert torch.equal(found[0], wanted[0])


def test_inputs_of_another_model_are_refused(dit, clip):
    video, audio, text = clip
    with pytest.raises(ValueError, match=r"video latent of shape \[2, 16, .*48 channels"):
        dit(video[:, :16], audio, text)
    with pytest.raises(ValueError, match=r"audio latent of shape \[2, 64, 17\].*64 channels"):
        dit(video, audio.transpose(1, 2), text)
    with pytest.raises(ValueError, match=r"text features of shape \[6, 24\]"):
        dit(video, audio, text[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 60}, "must be heads x head_dim"),
        ({"num_query_groups": 3}, "multiple of num_query_groups"),
        ({"head_dim": 4, "hidden_size": 64}, "multiple of 8"),
        ({"video_in_channels": 50}, "4 x latent channels"),
        ({"positions": "v3"}, "positions must be"),
        ({"expert_layers": (4,)}, "expert_layers names layer 4"),
    ],
)
def test_configurations_that_cannot_be_are_refused(dit, change, message):
    with pytest.raises(ValueError, match=message):
        replace(dit.config, **change)
