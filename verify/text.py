"""Golden cases of the T5Gemma encoder: every layer, padded batches, both attention styles, the pipeline's padding."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from ..model_loader.checkpoint import Checkpoint
from ..model_loader.config import T5GEMMA_9B
from ..model_loader.load import fill

FP32 = 1e-5
BF16 = 2e-2  # relative RMS


def config_of(case):
    """Return the TextEncoderConfig that a case's json describes in transformers' names."""
    fields = case.config["encoder_cfg"]
    return replace(
        T5GEMMA_9B,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_key_value_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        query_pre_attn_scalar=fields["query_pre_attn_scalar"],
        sliding_window=fields["sliding_window"],
        rope_theta=fields.get("rope_theta", T5GEMMA_9B.rope_theta),
        norm_eps=fields.get("rms_norm_eps", T5GEMMA_9B.norm_eps),
    )


def check_text(case):
    """Yield the checks of one encoder: `sdpa` as the pipeline runs it, `eager` with softcapping, the bf16 pipeline."""
    config = config_of(case)
    softcap = case.config["encoder_cfg"].get("attn_logit_softcapping")
    batches = [name.removesuffix("_ids") for name in case.under("in.") if name.endswith("_ids")]
    weights = Checkpoint.of_tensors(case.under("w."))
    for style, cap in (("sdpa", None), ("eager", softcap)):
        encoder = fill("text_encoder", replace(config, attention_softcap=cap), weights, "encoder.", dtype=torch.float32)
        for batch in batches:
            name = f"out.{style}.{batch}"
            if f"{name}.last_hidden_state" in case:
                ids, mask = case[f"in.{batch}_ids"], case[f"in.{batch}_mask"]
                yield case.check(f"{name}.last_hidden_state", encoder(ids, mask), FP32)
                yield from check_layers(case, encoder, name, ids, mask)
    encoder = fill("text_encoder", config, weights, "encoder.", dtype=torch.bfloat16)
    for batch in batches:
        yield from check_pipeline(case, encoder, batch)


def check_layers(case, encoder, name, ids, mask):
    """Yield the checks of every layer, fed the golden output of the layer before, so that no error is carried along."""
    if f"{name}.hidden0" not in case:
        return
    seen = {}

    def swap(i):
        def hook(module, inputs):
            seen[i] = inputs[0]
            return case[f"{name}.hidden{i}"], *inputs[1:]

        return hook

    hooks = [layer.register_forward_pre_hook(swap(i)) for i, layer in enumerate(encoder.layers)]
    seen[len(encoder.layers)] = encoder(ids, mask)  # the last golden state is the normed one
    for hook in hooks:
        hook.remove()
    for i, ours in seen.items():
        yield case.check(f"{name}.hidden{i}", ours, FP32)


def check_pipeline(case, encoder, batch):
    """Yield the checks of the pipeline's features: bf16 to half, then cut or padded to a length and widened to fp32."""
    if f"out.bf16.{batch}.encode_half" not in case:
        return
    features = encoder(case[f"in.{batch}_ids"], case[f"in.{batch}_mask"]).half()
    yield case.check_rms(f"out.bf16.{batch}.encode_half", features, BF16)
    if batch == "single":  # the pipeline encodes one prompt at a time
        for name in case.under("out.padded"):
            yield case.check_rms(f"out.padded{name}", cut_or_pad(features, int(name)).float(), BF16)


def cut_or_pad(features, length):
    """Cut features [B, n, D] to `length` tokens, or pad them with zeros."""
    return F.pad(features, (0, 0, 0, length - features.shape[1]))


KINDS = {"text": check_text}
