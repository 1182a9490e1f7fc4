"""What makes forwards faster: another attention, compiled layers and a step cache change what they say, no more."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import comfy.ldm.modules.attention as core_attention
import pytest
import torch
from comfy.cli_args import args
from pack.nodes import sage, speed
from pack.nodes.conditioning import EmptyLatent
from pack.nodes.prompt import EncodePrompt
from pack.nodes.sampling import Sampler
from pack.nodes.speed import Speed, with_compiled_layers, with_step_cache
from pack.nodes.super_resolution import SuperResolution

SEED = 9


def sample(model, prompt, latent, steps=8, **inputs):
    return Sampler.execute(model, prompt, latent, SEED, steps, 5.0, **inputs).args[0]["samples"].unbind()


def counted(model, steps, *arguments, **inputs):
    """Return the result and how often the first layer and a middle one ran."""
    runs = [0, 0]
    hooks = []
    for slot, number in enumerate((0, 1)):

        def count(module, given, slot=slot):
            runs[slot] += 1

        hooks.append(model.model.diffusion_model.block.layers[number].register_forward_pre_hook(count))
    result = sample(model, *arguments, steps, **inputs)
    for hook in hooks:
        hook.remove()
    return result, runs


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(speed, "notice", lambda node, line: lines.append(line))
    return lines


def test_as_it_stands_nothing_changes(loaded, told):
    assert Speed.execute(loaded[0]).args[0] is loaded[0]
    assert told == ["everything off"]


def test_an_attention_of_cores_is_asked_and_gives_its_result(loaded, prompt, latent, told, monkeypatch):
    calls = []

    def flash(q, k, v, heads, **options):
        calls.append((q.shape, k.shape, heads))
        return core_attention.attention_pytorch(q, k, v, heads, **options)

    monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "flash", flash)
    faster = Speed.execute(loaded[0], attention="flash").args[0]
    result = sample(faster, prompt, latent)
    assert len(calls) == 8 * 4 and told == ["flash attention"]
    (_, heads, tokens, size), shape_of_keys, told_heads = calls[0]
    assert shape_of_keys == (1, heads // 2, tokens, size) and told_heads == heads
    for a, b in zip(result, sample(loaded[0], prompt, latent), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "flash", lambda q, *_, **__: torch.zeros_like(q))
    assert not equal(sample(Speed.execute(loaded[0], attention="flash").args[0], prompt, latent), result)


def test_a_missing_attention_is_named_with_its_package(loaded):
    with pytest.raises(ValueError, match="'flash'.*pip install flash-attn"):
        Speed.execute(loaded[0], attention="flash")
    with pytest.raises(ValueError, match="'int8', which a current ComfyUI has.*update ComfyUI"):
        Speed.execute(loaded[0], attention="int8")


def test_int8_attention_is_the_one_that_core_has_from_comfy_kitchen(loaded, prompt, latent, told, monkeypatch):
    functions = core_attention.REGISTERED_ATTENTION_FUNCTIONS
    monkeypatch.setitem(functions, "comfy_kitchen_int8", lambda q, *_, **__: torch.zeros_like(q))
    faster = Speed.execute(loaded[0], attention="int8").args[0]
    assert told == ["int8 attention"]
    assert not equal(sample(faster, prompt, latent), sample(loaded[0], prompt, latent))


@pytest.mark.parametrize("flag", ["use_flash_attention", "use_ck_attention"])
def test_the_attention_that_comfyui_was_started_with_is_taken(loaded, prompt, latent, flag, monkeypatch):
    exact, calls = sample(loaded[0], prompt, latent), []

    def chosen(q, k, v, heads, **options):
        calls.append(heads)
        return core_attention.attention_pytorch(q, k, v, heads, **options)

    monkeypatch.setattr(core_attention, "optimized_attention", chosen)
    assert equal(sample(loaded[0], prompt, latent), exact) and not calls, "what core chooses by itself is not asked"
    monkeypatch.setattr(args, flag, True, raising=False)
    for found, wanted in zip(sample(loaded[0], prompt, latent), exact, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert len(calls) == 8 * 4
    monkeypatch.setattr(speed, "why_no_fp8_attention", lambda device, head_dim: None)
    sample(Speed.execute(loaded[0], attention="fp8").args[0], prompt, latent)
    assert len(calls) == 8 * 4, "the node's choice counts more"


def test_fp8_attention_is_refused_where_no_card_multiplies_it(loaded):
    with pytest.raises(ValueError, match="'fp8', which cannot run here: it wants an NVIDIA card, not 'cpu'.*'default'"):
        Speed.execute(loaded[0], attention="fp8")


def test_fp8_attention_reaches_every_forward_and_no_other_model(loaded, prompt, latent, told, monkeypatch):
    monkeypatch.setattr(
        speed, "why_no_fp8_attention", lambda device, head_dim: None
    )  # torch then takes what fp8 leaves
    faster, exact = Speed.execute(loaded[0], attention="fp8").args[0], sample(loaded[0], prompt, latent)
    for found, wanted in zip(sample(faster, prompt, latent), exact, strict=True):
        assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.2
    assert told == ["fp8 attention"] and equal(sample(loaded[0], prompt, latent), exact)


def test_compiled_layers_give_the_same_clip(loaded, prompt, latent):
    """Captured by torch.compile, run without its code generator: that takes minutes."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = with_compiled_layers(loaded[0], backend)
    assert equal(sample(compiled, prompt, latent), sample(loaded[0], prompt, latent))
    assert len(graphs) == 3, (
        "one for the layer with gelu7 and experts, one for shared ones, one for experts with swiglu7"
    )
    before = len(graphs)
    sample(loaded[0], prompt, latent)
    assert len(graphs) == before, "the model that came in is not compiled"


def test_two_models_at_two_sizes_stay_compiled(model_of, prompt):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        first = with_compiled_layers(model_of("distill"), "eager")
        local = {"local_attention_layers": (1, 2), "positions": "v1", "frame_receptive_field": 2}
        second = with_compiled_layers(model_of("1080p_sr", **local), "eager")
        for seconds in (0.4, 1.0):
            empty = EmptyLatent.execute({"size": "custom", "width": 64, "height": 32}, seconds).args[0]
            clip = Sampler.execute(first, prompt, empty, SEED, 2, 5.0).args[0]
            size = {"size": "custom", "width": 128, "height": 64}
            refined = SuperResolution.execute(second, prompt, clip, SEED, size, 2, 5.0, 220, True, 1.0).args[0]
            assert all(part.isfinite().all() for part in refined["samples"].unbind())


@pytest.fixture
def sageattention(monkeypatch):
    """The calls of a stand-in for the package: exact, and on any device; its real self runs on the simulated card."""
    calls = []

    def sageattn(q, k, v, **options):
        calls.append((q.shape, k.shape, options))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "sage", None)
    sage._fault.cache_clear()
    yield calls
    sage._fault.cache_clear()


@pytest.mark.parametrize("way", ["node", "flag"])
def test_sageattention_gets_keys_of_fewer_heads(loaded, prompt, latent, told, sageattention, way, monkeypatch):
    model, exact = loaded[0], sample(loaded[0], prompt, latent)
    if way == "node":
        monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "sage", lambda *_, **__: 1 / 0)
        model = Speed.execute(model, attention="sage").args[0]
        assert told == ["sage attention"]
    else:
        monkeypatch.setattr(args, "use_sage_attention", True)
    found = sample(model, prompt, latent)
    assert len(sageattention) == 1 + 8 * 4, "one trial, then every layer of every step"
    queries, keys, options = sageattention[-1]
    assert keys == (1, queries[1] // 2, *queries[2:]) and options["tensor_layout"] == "HND"
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    asked = len(sageattention)
    monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "flash", core_attention.attention_pytorch)
    sample(Speed.execute(model, attention="flash").args[0], prompt, latent)
    assert len(sageattention) == asked, "the last choice counts, and more than the flag"
    torch._dynamo.reset()
    graphs = []
    compiled = with_compiled_layers(model, lambda graph, inputs: graphs.append(graph) or graph.forward)
    for count in (6, 6):
        assert equal(sample(compiled, prompt, latent), found)
        assert len(graphs) == count, "three kinds of layers, cut in two by what is not traced; compiled once"


def test_where_sageattention_cannot_run_the_node_says_so_and_the_flag_does_without(
    loaded, prompt, latent, monkeypatch, caplog
):
    def sageattn(q, k, v, **options):
        raise AssertionError("Input tensors must be on cuda.")

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "sage", core_attention.attention_pytorch)
    sage._fault.cache_clear()
    with pytest.raises(
        ValueError, match=r"'sage', and SageAttention cannot run here \(Input.*cuda\)\. Choose 'default'"
    ):
        Speed.execute(loaded[0], attention="sage")
    exact = sample(loaded[0], prompt, latent)
    monkeypatch.setattr(args, "use_sage_attention", True)
    monkeypatch.setattr(core_attention, "optimized_attention", lambda *_, **__: 1 / 0)  # core's own way to it
    for a, b in zip(sample(loaded[0], prompt, latent), exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert caplog.text.count("SageAttention cannot run on cpu") == 1
    sage._fault.cache_clear()


def test_sageattention_is_tried_again_where_the_card_was_full(loaded, told, sageattention, monkeypatch):
    monkeypatch.setitem(core_attention.REGISTERED_ATTENTION_FUNCTIONS, "sage", core_attention.attention_pytorch)
    full = Mock(side_effect=torch.cuda.OutOfMemoryError("CUDA out of memory."))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=full))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            Speed.execute(loaded[0], attention="sage")
    Speed.execute(loaded[0], attention="sage")
    assert told == ["sage attention"]


@pytest.mark.parametrize(("variant", "threshold"), [("base", 0.03), ("distill", 0.5)])
def test_a_step_cache_skips_middle_layers_and_tells_how_far_off(loaded, model_of, prompt, latent, variant, threshold):
    model, lines = model_of(variant), []
    inputs = {"negative": EncodePrompt.execute(loaded[1], "dull").args[0]} if variant == "base" else {}
    plain, runs = counted(model, 12, prompt, latent, **inputs)
    forwards = runs[0]
    assert runs == [forwards, forwards] and forwards == (24 if variant == "base" else 12)
    strict, runs = counted(with_step_cache(model, 1e-9, lines.append), 12, prompt, latent, **inputs)
    assert runs == [forwards, forwards] and equal(strict, plain) and "nothing skipped" in lines[-1]
    loose, runs = counted(with_step_cache(model, threshold, lines.append), 12, prompt, latent, **inputs)
    assert runs[0] == forwards and 2 <= runs[1] < forwards
    assert f"{forwards - runs[1]} of {forwards} forwards" in lines[-1]
    assert not equal(loose, plain) and all(part.isfinite().all() for part in loose)
    again, _ = counted(with_step_cache(model, threshold, lines.append), 12, prompt, latent, **inputs)
    assert equal(again, loose)
    assert equal(sample(model, prompt, latent, 12, **inputs), plain), "the model that came in has no cache"
