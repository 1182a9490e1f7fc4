"""The node for what makes a forward faster and is off by default: another attention, compiled layers, a step cache."""

import comfy.ldm.modules.attention as core_attention
import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper

from ..kernels import why_no_fp8_attention
from ..sampler.step_cache import StepCache
from .forward_options import ATTENTION, FP8_ATTENTION, STEP_CACHE
from .host import require_happyhorse
from .notice import notice
from .sage import sage_attention, why_no_sage

CORES = {"int8": "comfy_kitchen_int8", "sage": "sage", "flash": "flash"}  # our choice -> core's name of an attention
COMPILATIONS = 64  # of layers, at most; two models at two sizes take 10
PACKAGES = {"sage": "sageattention", "flash": "flash-attn"}  # what pip calls the packages that core looks for


def with_fp8_attention(model):
    """Return the MODEL with our own attention, both products in fp8; ValueError where the card or Triton cannot."""
    head_dim = model.model.diffusion_model.config.head_dim
    fault = why_no_fp8_attention(model.load_device, head_dim)
    if fault is not None:
        raise ValueError(f"attention is 'fp8', which cannot run here: {fault}. Choose 'default'.")
    faster = model.clone()
    faster.model_options["transformer_options"][FP8_ATTENTION] = True
    return faster


def with_attention(model, choice):
    """Return the MODEL with core's attention, a key of CORES; ValueError where this ComfyUI has none of that name."""
    function = core_attention.get_attention_function(CORES[choice], default=None)
    if function is None and choice not in PACKAGES:
        raise ValueError(
            f"attention is '{choice}', which a current ComfyUI has by itself (its package comfy-kitchen), on NVIDIA "
            "cards from RTX 20 on and AMD's from RX 7000 on. This one has not: update ComfyUI with its requirements, "
            "or choose 'default'."
        )
    if function is None:
        raise ValueError(
            f"attention is '{choice}', which needs the package {PACKAGES[choice]}, and ComfyUI could not import that. "
            f"Install it with ComfyUI's own Python (python -m pip install {PACKAGES[choice]}) and start ComfyUI again, "
            "or choose 'default'."
        )
    if choice == "sage":
        function = sage_for(model)
    faster = model.clone()
    faster.model_options["transformer_options"][ATTENTION] = lambda _, *args, **options: function(*args, **options)
    return faster


def sage_for(model):
    """Return SageAttention with the arguments of core's attentions; ValueError where it cannot run a MODEL's heads."""
    config = model.model.diffusion_model.config
    fault = why_no_sage(model.load_device, model.model.get_dtype(), config.head_dim)
    if fault is not None:
        raise ValueError(f"attention is 'sage', and SageAttention cannot run here ({fault}). Choose 'default'.")
    return lambda q, k, v, *_, **__: sage_attention(q, k, v)


def with_compiled_layers(model, backend="inductor"):
    """Return the MODEL with every layer compiled by torch when it first runs; `backend` is torch.compile's.

    Kinds of layers, models and sizes share one count of compilations: past torch's 8 the rest would run uncompiled.
    """
    limits = torch._dynamo.config
    limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    setattr(limits, limit, max(getattr(limits, limit), COMPILATIONS))
    count = len(model.model.diffusion_model.block.layers)
    faster = model.clone(disable_dynamic=True)
    keys = [f"diffusion_model.block.layers.{number}" for number in range(count)]
    set_torch_compile_wrapper(model=faster, backend=backend, keys=keys)
    return faster


def with_step_cache(model, threshold, tell):
    """Return the MODEL with a StepCache for every run of a sampler; `tell(line)` gets its report when the run ends."""

    def sample(executor, *args, **kwargs):
        guider, cache = executor.class_obj, StepCache(threshold)
        options = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(options)
        guider.model_options["transformer_options"][STEP_CACHE] = cache
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options = options
            tell(cache.report())

    faster = model.clone()
    faster.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, STEP_CACHE, sample)
    return faster


class Speed(io.ComfyNode):
    """Settings that trade accuracy, memory or a long first run for speed."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseSpeed",
            display_name="HappyHorse Speed",
            category="HappyHorse/model",
            description="Makes sampling faster at a price. As it stands, everything is off and nothing changes.",
            search_aliases=["sageattention", "torch compile", "teacache", "first block cache", "happyhorse fast"],
            inputs=[
                io.Model.Input("model", tooltip="From Load HappyHorse."),
                io.Combo.Input(
                    "attention",
                    options=["default", "fp8", *CORES],
                    default="default",
                    tooltip="default: exact, unless ComfyUI was started with --use-sage-attention or the like. fp8: "
                    "products in fp8, on an H200 1.6 times as fast; RTX 40 or later. int8: ComfyUI's own, in newer "
                    "versions; RTX 20 or later. sage: SageAttention, 8-bit; flash: FlashAttention; either must be "
                    "installed in ComfyUI's Python.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    tooltip="Compile every layer with torch.compile. The first run of each size takes minutes more; "
                    "needs a C compiler and keeps the whole model on the card.",
                ),
                io.Float.Input(
                    "step_cache",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 is off. Skips the layers that all modalities share in steps where the layers before "
                    "them changed by less than this share. For the base model's 32 steps; 0.05 is a start. How much "
                    "was skipped and how far off it was appears on the node after the run.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="Connect to HappyHorse Sampler or any guider.")],
        )

    @classmethod
    def execute(cls, model, attention="default", compile=False, step_cache=0.0):
        """Apply what is switched on."""
        require_happyhorse(model)
        if attention == "fp8":
            model = with_fp8_attention(model)
        elif attention != "default":
            model = with_attention(model, attention)
        if compile:
            model = with_compiled_layers(model)
        if step_cache > 0:
            node = cls  # with the id of this run
            model = with_step_cache(model, step_cache, lambda line: notice(node, line))
        on = [f"{attention} attention"] * (attention != "default") + ["compiled layers"] * compile
        on += [f"step cache up to {100 * step_cache:.0f} %"] * (step_cache > 0)
        notice(cls, ", ".join(on) or "everything off")
        return io.NodeOutput(model)
