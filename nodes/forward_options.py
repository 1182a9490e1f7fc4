"""What a MODEL's options ask of every forward: another attention, a step cache. Nodes set them, `HappyHorse` obeys."""

import functools

import comfy.ldm.modules.attention as core_attention

ATTENTION = "optimized_attention_override"  # core's key in transformer_options, which other packs' nodes set as well
FP8_ATTENTION = "happyhorse_fp8_attention"  # key in transformer_options: True where our attention multiplies in fp8
STEP_CACHE = "happyhorse_step_cache"  # key in transformer_options: a StepCache


def of_forward(transformer_options):
    """Return the keyword arguments of `DiT.forward` that a MODEL's options ask for."""
    given = {}
    if ATTENTION in transformer_options:
        given["attention"] = functools.partial(_cores_attention, transformer_options)
    if FP8_ATTENTION in transformer_options:
        given["fp8_attention"] = transformer_options[FP8_ATTENTION]
    if STEP_CACHE in transformer_options:
        key = tuple(transformer_options["uuids"])  # core's names of the conditions in this batch
        given["step_cache"] = functools.partial(transformer_options[STEP_CACHE], key)
    return given


def _cores_attention(transformer_options, q, k, v):
    """Let core run whatever takes its attention's place on q [B, Hq, N, d], k and v [B, Hkv, N, d]."""
    return core_attention.attention_pytorch(
        q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, enable_gqa=q.shape[1] != k.shape[1],
        transformer_options=transformer_options,
    )  # fmt: skip
