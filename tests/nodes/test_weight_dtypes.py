"""The number formats of the linears: what a choice does, what the default is where, and what fp16 cannot hold."""

import comfy.cli_args
import comfy.model_management
import pytest
import torch
from pack.nodes import files, weight_dtypes
from pack.nodes.loaders import LoadModel
from pack.nodes.sampling import Sampler
from quantised_checks import SHARED


def sample(model, prompt, latent):
    return Sampler.execute(model, prompt, latent, 0, 2, 5.0).args[0]["samples"].unbind()


def test_weight_dtype_is_the_linears_only(loaded, prompt, latent):
    model = LoadModel.execute(files.MODEL.nano, "bf16").args[0]
    dtypes = {name: weight.dtype for name, weight in model.model.diffusion_model.named_parameters()}
    assert dtypes["block.layers.1.attention.linear_qkv.weight"] == torch.bfloat16
    assert dtypes["adapter.video_embedder.weight"] == dtypes["final_linear_audio.weight"] == torch.float32
    assert model.model.get_dtype_inference() == torch.float32
    for a, b in zip(sample(loaded[0], prompt, latent), sample(model, prompt, latent), strict=True):
        assert 0 < (a - b).square().mean().sqrt() < 0.05 * a.square().mean().sqrt()


def test_the_default_without_a_gpu_is_bf16_where_the_processor_multiplies_it(weights, monkeypatch):
    def default():
        weight = LoadModel.execute(files.MODEL.nano, "default").args[0].model.diffusion_model
        return weight.get_submodule(SHARED).weight.dtype

    assert default() == torch.float32
    monkeypatch.setattr(weight_dtypes, "cpu_multiplies_bf16", lambda: True)
    assert default() == torch.bfloat16
    monkeypatch.setattr(comfy.cli_args.args, "fp32_unet", True)
    assert default() == torch.float32


@pytest.mark.parametrize(
    ("bf16", "fp16", "flag", "wanted"),
    [
        (True, True, None, torch.bfloat16),
        (False, True, None, torch.float16),  # RTX 20
        (False, False, None, torch.float32),  # GTX 16
        (True, True, "fp16_unet", torch.float16),
        (False, True, "fp32_unet", torch.float32),
        (True, True, "fp8_e4m3fn_unet", torch.bfloat16),  # which says how they are stored
    ],
)
def test_the_default_on_a_card_is_what_it_computes_quickly(bf16, fp16, flag, wanted, monkeypatch):
    management = comfy.model_management
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(management, "should_use_bf16", lambda *_, manual_cast=False, **__: bf16)
    monkeypatch.setattr(management, "should_use_fp16", lambda *_, manual_cast=False, **__: fp16)
    monkeypatch.setattr(management, "PRIORITIZE_FP16", True)  # as `--fast` sets it
    if flag:
        monkeypatch.setattr(comfy.cli_args.args, flag, True)
    assert weight_dtypes.default_wide() == wanted


def test_numbers_beyond_fp16_are_told_of(prompt, latent):
    model = LoadModel.execute(files.MODEL.nano, "fp16").args[0]
    assert all(part.isfinite().all() for part in sample(model, prompt, latent))
    with torch.no_grad():
        model.model.diffusion_model.get_submodule(SHARED).weight.fill_(6e4)
    with pytest.raises(ValueError, match="beyond fp16's 65504: weight_dtype fp32 or bf16 has room"):
        sample(model, prompt, latent)
