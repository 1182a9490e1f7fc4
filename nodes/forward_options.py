"""What a MODEL's options ask of every forward: another attention, a step cache. Nodes set them, `HappyHorse` obeys."""

import functools

import comfy.ldm.modules.attention as core_attention
from comfy.cli_args import args

from .sage import sage_or

ATTENTION = "optimized_attention_override"  # core's key in transformer_options, which other packs' nodes set as well
FP8_ATTENTION = "happyhorse_fp8_attention"  # key in transformer_options: True where our attention multiplies in fp8
FLAGS = ("use_sage_attention", "use_flash_attention", "use_ck_attention")  # with which ComfyUI is started
STEP_CACHE = "happyhorse_step_cache"  # key in transformer_options: a StepCache


def of_forward(transformer_options):
    """Return the keyword arguments of `DiT.forward` that a MODEL's options, or else ComfyUI's flags, ask for."""
    given = {}
    flagged = any(getattr(args, flag, False) for flag in FLAGS)
    if ATTENTION not in transformer_options and FP8_ATTENTION in transformer_options:
        given["fp8_attention"] = transformer_options[FP8_ATTENTION]
    elif ATTENTION not in transformer_options and args.use_sage_attention:
        exact = functools.partial(_cores_attention, core_attention.attention_pytorch, transformer_options)
        given["attention"] = functools.partial(sage_or, exact)
    elif ATTENTION in transformer_options or flagged:
        function = core_attention.optimized_attention if flagged else core_attention.attention_pytorch
        given["attention"] = functools.partial(_cores_attention, function, transformer_options)
    if STEP_CACHE in transformer_options:
        key = tuple(transformer_options["uuids"])  # core's names of the conditions in this batch
        given["step_cache"] = functools.partial(transformer_options[STEP_CACHE], key)
    return given


def _cores_attention(function, transformer_options, q, k, v):
    """Let an attention of core's, or what takes its place, run q [B, Hq, N, d], k and v [B, Hkv, N, d]."""
    return function(
        q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, enable_gqa=q.shape[1] != k.shape[1],
        transformer_options=transformer_options,
    )  # fmt: skip
