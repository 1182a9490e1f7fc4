"""Every published layout as a builder of its files, for tiny tensors and for full-size ones that have no content."""

import re
from collections import namedtuple

import torch

# Bounds on the relative rms error of a network's outputs.
EXACT = 0
BF16 = 5e-3  # measured: 1.9e-3 to 3.4e-3
FP8 = 5e-2  # e4m3; measured: 3.1e-2


def is_linear(name):
    return name.startswith("block.") and "norm" not in name


def bf16_linears(tensors):
    return {name: tensor.bfloat16() if is_linear(name) else tensor for name, tensor in tensors.items()}


def all_bf16(tensors, config=None):
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def shards(folder, tensors, stem="model", index=True):
    names = list(tensors)
    files = {f"{folder}/{stem}-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    weight_map = {name: file.rpartition("/")[2] for file, part in files.items() for name in part}
    found = {file: {name: tensors[name] for name in part} for file, part in files.items()}
    return found | ({f"{folder}/{stem}.safetensors.index.json": {"weight_map": weight_map}} if index else {})


def fp8(tensors, ending, extra=None):
    stored = dict(tensors)
    for name in filter(is_linear, tensors):
        scale = tensors[name].abs().max() / 448
        stored[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix(".weight") + ending] = scale
    return stored | (extra or {})


def split(tensors, config):
    """Name as WanGP does: q, k, v and gate apart, and the experts of an expert layer apart."""
    heads, groups, size = config.hidden_size // config.head_dim, config.num_query_groups, config.head_dim
    rows, result = (heads * size, groups * size, groups * size, heads), {}
    for name, tensor in tensors.items():
        if not is_linear(name):
            result[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        experts = ("_video", "_audio", "_text") if int(name.split(".")[2]) in config.expert_layers else ("",)
        for expert, part in zip(experts, tensor.chunk(len(experts)), strict=True):
            if stem.endswith("linear_qkv"):
                letters = zip("qkvg", part.split(rows), strict=True)
                result |= {f"{stem[:-3]}{letter}{expert}.weight": piece.clone() for letter, piece in letters}
            else:
                result[f"{stem}{expert}.weight"] = part.clone()
    return result


def renamed(tensors, patterns):
    result = {}
    for name, tensor in tensors.items():
        for pattern, new in patterns:
            name = re.sub(pattern, new, name)
        result[name] = tensor
    return result


def diffusers_wan(tensors, config):
    last = {"down": config.num_res_blocks, "up": config.num_res_blocks + 1}
    return renamed(
        tensors,
        [
            (r"^conv1\.", "quant_conv."),
            (r"^conv2\.", "post_quant_conv."),
            (r"coder\.conv1\.", "coder.conv_in."),
            (r"head\.0", "norm_out"),
            (r"head\.2", "conv_out"),
            *(
                (rf"{way}samples\.(\d)\.{way}samples\.{n}\.", rf"{way}_blocks.\1.{way}sampler.")
                for way, n in last.items()
            ),
            (r"(down|up)samples\.(\d)\.\1samples\.(\d)", r"\1_blocks.\2.resnets.\3"),
            (r"middle\.1", "mid_block.attentions.0"),
            (r"middle\.0", "mid_block.resnets.0"),
            (r"middle\.2", "mid_block.resnets.1"),
            (r"residual\.0", "norm1"),
            (r"residual\.2", "conv1"),
            (r"residual\.3", "norm2"),
            (r"residual\.6", "conv2"),
            (r"shortcut", "conv_shortcut"),
        ],
    )


def diffusers_oobleck(tensors, config):
    blocks = len(config.strides)
    unit = [("0", "snake1"), ("1", "conv1"), ("2", "snake2"), ("3", "conv2")]
    patterns = [(rf"(\.layers\.\d\.layers\.\d)\.layers\.{i}\.", rf"\1.{part}.") for i, part in unit]
    patterns += [(rf"encoder\.layers\.(\d)\.layers\.{i}\.", rf"encoder.layers.\1.{new}.") for i, new in
                 enumerate(("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"))]  # fmt: skip
    patterns += [(rf"decoder\.layers\.(\d)\.layers\.{i}\.", rf"decoder.layers.\1.{new}.") for i, new in
                 enumerate(("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"))]  # fmt: skip
    patterns += [(r"coder\.layers\.0", "coder.conv1"), (rf"coder\.layers\.{blocks + 1}", "coder.snake1")]
    patterns += [(rf"coder\.layers\.{blocks + 2}", "coder.conv2")]
    patterns += [(rf"coder\.layers\.{i + 1}\.", f"coder.block.{i}.") for i in range(blocks)]
    return {n: t[None, :, None] if "snake" in n else t for n, t in renamed(tensors, patterns).items()}


def t5gemma(encoder):
    """Return the whole T5Gemma: its decoder has the encoder's names and more."""
    decoder = {name.replace("model.encoder.", "model.decoder."): tensor + 1 for name, tensor in encoder.items()}
    cross = {"model.decoder.layers.0.cross_attn.q_proj.weight": torch.ones(4, 4)}
    return encoder | decoder | cross | {"lm_head.out_proj.weight": torch.ones(3, 3)}


def t5gemma_json(config):
    return {
        "encoder": {name: getattr(config, name) for name in ("head_dim", "query_pre_attn_scalar", "sliding_window")}
    }


def turbo_json(config):
    """Write a TurboVAEConfig as the published JSON, which lists from the pixels inwards."""
    return {
        "_class_name": "AutoencoderKLTurboVAED",
        "latent_channels": config.latent_channels,
        "out_channels": config.out_channels,
        "decoder_block_out_channels": config.block_out_channels[::-1],
        "decoder_layers_per_block": config.layers_per_block[::-1],
        "decoder_spatio_temporal_scaling": config.upsample[::-1],
        "decoder_spatio_only": config.upsample_space_only[::-1],
        "decoder_is_dw_conv": config.depthwise[::-1],
        "decoder_dw_kernel_size": config.depthwise_kernel_size,
        "decoder_causal": False,
        "patch_size": 2,
        "use_unpatchify": config.unpatchify,
        "resnet_norm_eps": config.norm_eps,
        "first_chunk_size": config.first_chunk_size,
        "step_size": config.step_size,
        "temporal_compression_ratio": config.temporal_compression,
    }


def turbo_ckpt(tensors):
    extra = {"module.encoder.conv_in.conv.weight": torch.ones(2), "module.decoder.aligned_head.weight": torch.ones(2)}
    return {"ema_state_dict": under("module.", tensors) | extra, "optimizer": None}


def stable_audio(tensors):
    others = {"model.model.transformer.x": torch.ones(2, 2), "conditioner.y": torch.ones(2)}
    return under("pretransform.model.", tensors) | others


def new_norm_names(tensors):
    ends = [(r"weight_g$", "parametrizations.weight.original0"), (r"weight_v$", "parametrizations.weight.original1")]
    return renamed(tensors, ends)


def one(file, change=lambda tensors, config: tensors):
    """Return a builder of one file."""
    return lambda tensors, config: {file: change(tensors, config)}


MARKER = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
QUANT = {"block.layers.0.mlp.down_proj.comfy_quant": torch.zeros(9, dtype=torch.uint8)}
CONFIGS = {"local": {"local_attn_layers": [0, 1, 2]}, "none": {"local_attn_layers": []}}
DIFFUSERS = "diffusion_pytorch_model"
SINGLE = f"{DIFFUSERS}.safetensors"
PREFIXED = "model.diffusion_model."

Layout = namedtuple("Layout", "network path bound build")
# What a loader is given -> network (a variant, or a part), its path, bound, builder of the files. c is a configuration.
LAYOUTS = {
    "upstream base": Layout("base", "base", BF16, lambda t, c: shards("base", bf16_linears(t))),
    "upstream distill": Layout("distill", "distill", EXACT, lambda t, c: shards("distill", t)),
    "upstream 540p_sr": Layout("540p_sr", "540p_sr", EXACT, lambda t, c: shards("540p_sr", t)),
    "upstream 1080p_sr": Layout("1080p_sr", "1080p_sr", EXACT, lambda t, c: shards("1080p_sr", t)),
    "a shard, no index": Layout(
        "distill", "distill/model-00002-of-00003.safetensors", EXACT, lambda t, c: shards("distill", t, index=False)
    ),
    "merged": Layout(
        "distill", "distill-merger_bf16.safetensors", BF16, one("distill-merger_bf16.safetensors", all_bf16)
    ),
    "merged 540p_sr": Layout(
        "540p_sr", "540p_sr_merge_bf16.safetensors", BF16, one("540p_sr_merge_bf16.safetensors", all_bf16)
    ),
    "model. prefix": Layout(
        "base", "base.safetensors", EXACT, one("base.safetensors", lambda t, c: under("model.", t))
    ),
    "diffusion_model. prefix": Layout(
        "base", "base.safetensors", EXACT, one("base.safetensors", lambda t, c: under("diffusion_model.", t))
    ),
    "both prefixes": Layout(
        "base", "base.safetensors", EXACT, one("base.safetensors", lambda t, c: under(PREFIXED, t))
    ),
    "davinci fp8": Layout("base", "base_fp8", FP8, lambda t, c: shards("base_fp8", fp8(t, ".weight.__fp8_scale"))),
    "davinci fp8 1080p_sr": Layout(
        "1080p_sr", "1080p_sr_fp8", FP8, lambda t, c: shards("1080p_sr_fp8", fp8(t, ".weight.__fp8_scale"))
    ),
    "comfy fp8, first": Layout(
        "distill",
        "distill_fp8.safetensors",
        FP8,
        one("distill_fp8.safetensors", lambda t, c: fp8(t, ".scale_weight", MARKER)),
    ),
    "comfy fp8, second, prefixed": Layout(
        "distill",
        "distill_fp8.safetensors",
        FP8,
        one("distill_fp8.safetensors", lambda t, c: under(PREFIXED, fp8(t, ".weight_scale", QUANT))),
    ),
    "WanGP distill": Layout(
        "distill", "magi_human_distill_bf16.safetensors", EXACT, one("magi_human_distill_bf16.safetensors", split)
    ),
    "WanGP base": Layout("base", "magi_human_bf16.safetensors", EXACT, one("magi_human_bf16.safetensors", split)),
    "WanGP 1080p_sr": Layout(
        "1080p_sr", "magi_human_sr1080_bf16.safetensors", EXACT, one("magi_human_sr1080_bf16.safetensors", split)
    ),
    "WanGP split in fp8": Layout(
        "base",
        "magi_human_bf16.safetensors",
        FP8,
        one("magi_human_bf16.safetensors", lambda t, c: fp8(split(t, c), ".scale_weight")),
    ),
    "diffusers transformer": Layout(
        "distill",
        "distill/transformer",
        EXACT,
        lambda t, c: shards("distill/transformer", t, DIFFUSERS) | {"distill/transformer/config.json": CONFIGS["none"]},
    ),
    "diffusers sr_transformer": Layout(
        "540p_sr", f"sr_540p/sr_transformer/{SINGLE}", EXACT, one(f"sr_540p/sr_transformer/{SINGLE}")
    ),
    "diffusers sr": Layout(
        "1080p_sr", "MagiHuman-Base-1080p/sr", EXACT, lambda t, c: shards("MagiHuman-Base-1080p/sr", t, DIFFUSERS)
    ),
    "diffusers local attention": Layout(
        "1080p_sr",
        "refiner/sr",
        EXACT,
        lambda t, c: shards("refiner/sr", t, DIFFUSERS) | {"refiner/sr/config.json": CONFIGS["local"]},
    ),
    "T5Gemma shards": Layout(
        "text_encoder",
        "t5gemma",
        EXACT,
        lambda t, c: shards("t5gemma", t5gemma(t)) | {"t5gemma/config.json": t5gemma_json(c)},
    ),
    "T5Gemma encoder alone": Layout(
        "text_encoder",
        "t5gemma-9b-9b-ul2_bf16.safetensors",
        BF16,
        lambda t, c: {"t5gemma-9b-9b-ul2_bf16.safetensors": all_bf16(t), "config.json": t5gemma_json(c)},
    ),
    "diffusers text_encoder": Layout(
        "text_encoder",
        "text_encoder",
        EXACT,
        lambda t, c: (
            shards("text_encoder", renamed(t, [("^model.", "")])) | {"text_encoder/config.json": t5gemma_json(c)}
        ),
    ),
    "TurboVAED .ckpt": Layout(
        "turbo",
        "checkpoint-340000.ckpt",
        EXACT,
        lambda t, c: {"checkpoint-340000.ckpt": turbo_ckpt(t), "TurboV3-Wan22-TinyShallow_7_7.json": turbo_json(c)},
    ),
    "TurboVAED .safetensors": Layout(
        "turbo", "turbo.safetensors", EXACT, lambda t, c: {"turbo.safetensors": t, "turbo.json": turbo_json(c)}
    ),
    "TurboVAED bare": Layout(
        "turbo", "turbo.safetensors", EXACT, one("turbo.safetensors", lambda t, c: renamed(t, [("^decoder.", "")]))
    ),
    "Wan2.2 .pth": Layout("wan", "Wan2.2_VAE.pth", EXACT, one("Wan2.2_VAE.pth")),
    "Wan2.2 .safetensors": Layout("wan", "wan2.2_vae.safetensors", EXACT, one("wan2.2_vae.safetensors")),
    "diffusers AutoencoderKLWan": Layout("wan", f"vae/{SINGLE}", EXACT, one(f"vae/{SINGLE}", diffusers_wan)),
    "stable-audio-open-1.0": Layout(
        "oobleck", "model.safetensors", EXACT, one("model.safetensors", lambda t, c: stable_audio(t))
    ),
    "Oobleck alone": Layout("oobleck", "sd_audio.safetensors", EXACT, one("sd_audio.safetensors")),
    "Oobleck, torch's new names": Layout(
        "oobleck", "vae.safetensors", EXACT, one("vae.safetensors", lambda t, c: new_norm_names(t))
    ),
    "diffusers AutoencoderOobleck": Layout("oobleck", "vae", EXACT, one(f"vae/{SINGLE}", diffusers_oobleck)),
}
