"""Predicted memory: against published sizes and counted tensors, and what is said where a card is too small."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pack.benchmarks.memory import (
    LiveBytes,
    as_cores_sage,
    as_sage,
    encoding_bytes,
    forward_bytes,
    main,
    step_bytes,
    tokens_of,
)
from pack.model_loader.config import DISTILL, SR_540P, SR_1080P, T5GEMMA_9B, TURBO_7_7, WAN22_VAE
from pack.sampler.memory import (
    Stage,
    activation_bytes,
    clip_too_large,
    decode_bytes,
    encode_bytes,
    model_too_large,
    sampling_bytes,
    token_count,
    weight_bytes,
)

GB = 10**9


def test_weights_are_as_large_as_published():
    fp32, bf16, fp8 = (weight_bytes("dit", DISTILL, precision) for precision in ("fp32", "bf16", "fp8"))
    assert bf16[0] == pytest.approx(30.6 * GB, rel=0.01) and fp8[0] == pytest.approx(15.3 * GB, rel=0.01)
    assert fp32[0] == pytest.approx(57 * 2**30, rel=0.01)
    assert bf16[1] == pytest.approx(3 * 2 * 5120 * (7208 + 5120 + 8 * 5120), rel=0.01), "a layer of three experts"
    whole, embedding = weight_bytes("text_encoder", T5GEMMA_9B, "fp8")
    assert embedding == 256000 * 3584 * 2 and whole < 0.6 * weight_bytes("text_encoder", T5GEMMA_9B, "bf16")[0]


def test_activations_of_1080p_are_below_4_gb_and_grow_with_the_tokens():
    tokens = token_count(1920, 1088, 32, 126)
    assert tokens == 65280 + 126 + 640
    assert activation_bytes(DISTILL, tokens) == pytest.approx(3.25 * GB, rel=0.01)
    held = 2 * 5120 * (5120 + 2 * 13652 + 13652)
    assert sampling_bytes(DISTILL, tokens) == pytest.approx((3.25 + 0.97) * GB + held, rel=0.01), "with latents"
    short = token_count(448, 256, 32, 126)
    latents = short * 192 * 4 * 19
    assert sampling_bytes(DISTILL, short) == activation_bytes(DISTILL, short) + latents, "no weights are held"
    assert activation_bytes(DISTILL, 2 * tokens) > 1.99 * activation_bytes(DISTILL, tokens), "attention's"
    assert activation_bytes(DISTILL, 2 * short) < 1.5 * activation_bytes(DISTILL, short), "a piece's, mostly"


@pytest.mark.parametrize(
    ("config", "size", "seconds"),
    [
        pytest.param(DISTILL, (448, 256), 5, id="256p"),
        pytest.param(SR_540P, (960, 544), 5, id="540p"),
        pytest.param(SR_1080P, (1920, 1088), 5, id="1080p, with local layers"),
        pytest.param(SR_1080P, (1920, 1088), 15, id="15 seconds of it"),
    ],
)
def test_a_forward_takes_what_is_predicted(config, size, seconds):
    """Counted over ten layers, among which every kind is: the last one has experts with swiglu7."""
    local = tuple(layer for layer in config.local_attention_layers if layer < 10)
    few = replace(config, num_layers=10, expert_layers=(0, 1, 2, 3, 9), local_attention_layers=local)
    counted = forward_bytes(few, size, seconds)
    assert 0.95 * counted < activation_bytes(config, tokens_of(size, seconds)) < 1.1 * counted


def test_sageattention_takes_little_more_as_keys_are_not_repeated():
    few = replace(SR_1080P, num_layers=4, expert_layers=(0,), local_attention_layers=())
    predicted = activation_bytes(few, tokens_of((1920, 1088), 5))
    counted = forward_bytes(few, (1920, 1088), 5, as_sage)
    assert predicted < counted < 1.15 * predicted
    assert forward_bytes(few, (1920, 1088), 5, as_cores_sage) > 1.8 * predicted


@pytest.mark.parametrize(("network", "config"), [("turbo_vae", TURBO_7_7), ("wan_vae", WAN22_VAE)])
def test_decoding_takes_what_is_predicted(network, config):
    for size in ((448, 256), (960, 544)):
        predicted, counted = decode_bytes(config, *size, torch.bfloat16), step_bytes(network, config, size)
        assert 0.9 * counted < predicted < 1.15 * counted


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encoding_takes_what_is_predicted(frames):
    size = (448, 256)
    predicted = encode_bytes(WAN22_VAE, frames, *size, torch.bfloat16)
    assert 0.9 * encoding_bytes(WAN22_VAE, frames, size) < predicted < 1.15 * encoding_bytes(WAN22_VAE, frames, size)


def test_counting_live_bytes():
    weight = torch.zeros(1000)
    with LiveBytes() as live:
        weight.view(10, 100).view(1000)  # what was there before is not counted
        a = weight * 2
        b = a.view(10, 100)[:5] + 1  # a view is not counted again
        assert live.peak == 4000 + 2000
        del a
        torch.cat([b, b, b])  # 2000 + 6000, where `a` would have made 12000
    assert live.peak == 8000
    with LiveBytes() as live:
        for _ in range(20):  # whose addresses the next ones may get
            torch.from_numpy(np.zeros(1000, np.float32)).view(10, 100)
        made = [torch.zeros(1000) for _ in range(20)]
    assert live.peak == 4000 * len(made)


def test_what_waits_in_ram():
    stage = Stage("clip", weights=15 * GB, layer=GB // 2, activations=6 * GB)
    assert stage.least == 6 * GB + GB + 3 * GB // 2
    assert stage.waiting(24 * GB) == 0 and stage.waiting(20 * GB) == 5 * GB // 2 and stage.waiting(8 * GB) is None
    small = Stage("clip", weights=GB // 10, layer=GB // 10, activations=0)
    assert small.least == GB // 10 + 3 * GB // 2


def test_what_does_not_fit_is_said():
    stage = Stage("1920x1088 of this length", weights=15 * GB, layer=GB // 2, activations=6 * GB)
    assert not clip_too_large(stage, 9 * GB, on_card=True) and not clip_too_large(stage, 21 * GB, on_card=False)
    (card,) = clip_too_large(stage, 8 * GB, on_card=True)
    assert card.startswith("1920x1088 of this length takes 8.5 GB of the card, which has 8.0: expect it to run out")
    assert "a smaller size or fewer seconds" in card and "fp8" in card
    (ram,) = clip_too_large(stage, 16 * GB, on_card=False)
    assert "takes 21.0 GB of RAM, which has 16.0" in ram
    assert not model_too_large(30 * GB, 32 * GB)
    (weights,) = model_too_large(30 * GB, 20 * GB)
    assert weights.startswith("The weights take 30.0 GB, this computer has 20.0 for them") and "fp8" in weights


def test_the_command_prints_a_stage_a_line(capsys):
    main(["--size", "540p", "--precision", "fp8", "--budget", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5 and all("540p 16:9, 5 s, fp8, 16 GiB" in line for line in lines[2:])
    assert "super-resolution 960x544 | 15.4 | 2.2" in lines[4]
