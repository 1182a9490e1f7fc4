"""Which network a file holds, and of what size: from its metadata where we wrote it, else from names and shapes."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import CheckpointError
from .config import (
    BASE,
    DISTILL,
    SR_540P,
    SR_1080P,
    STABLE_AUDIO,
    T5GEMMA_9B,
    TURBO_7_7,
    WAN22_LATENT_MEAN,
    WAN22_LATENT_STD,
    DiTConfig,
    OobleckConfig,
    TextEncoderConfig,
    TurboVAEConfig,
    WanVAEConfig,
)
from .key_map import KEY_MAPS

CONFIGS = {
    "dit": DiTConfig,
    "text_encoder": TextEncoderConfig,
    "wan_vae": WanVAEConfig,
    "turbo_vae": TurboVAEConfig,
    "oobleck": OobleckConfig,
}
DIT_VARIANTS = {"distill": DISTILL, "base": BASE, "540p_sr": SR_540P, "1080p_sr": SR_1080P}
VARIANT_NAMES = (  # how published files and folders call them
    ("1080p_sr", re.compile(r"1080p?[_-]?sr|sr[_-]?1080")),
    ("540p_sr", re.compile(r"540p?[_-]?sr|sr[_-]?540")),
    ("distill", re.compile(r"distill")),
    ("base", re.compile(r"base")),
)


@dataclass(frozen=True, slots=True)
class Description:
    """What a file holds: `network` is a key of KEY_MAPS, `part` the role it plays, `prefix` what precedes its names."""

    network: str
    part: str
    variant: str
    config: object
    prefix: str


def describe(checkpoint, variant=None):
    """Return the Description of an open Checkpoint; nothing is read but headers, and a config JSON beside the file.

    `variant` names the DiT's ("distill", "base", "540p_sr", "1080p_sr") and outranks the file's metadata and name, in that
    order: the names and shapes of the four are the same. CheckpointError where the file holds none of our networks, or
    nothing tells its variant.
    """
    for network, keys in KEY_MAPS.items():
        prefix = keys.prefix(checkpoint.headers)
        if prefix is not None:
            break
    else:
        first = next(iter(checkpoint.headers))
        raise CheckpointError(
            f"{checkpoint.label}: not a part of this model (first tensor: {first}); expected a daVinci-MagiHuman transformer, "
            "a T5Gemma encoder, a Wan2.2 or Turbo video VAE, or the stable-audio VAE."
        )
    shapes = {n[len(prefix) :]: h.shape for n, h in checkpoint.headers.items() if n.startswith(prefix)}
    try:
        config, variant = READERS[network](checkpoint, shapes, variant)
    except (KeyError, ZeroDivisionError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.label}: looks like a {network} file, but its size cannot be read from it ({error!r}); the file is "
            "incomplete or of another model. Download it again, or choose another file."
        ) from None
    return Description(network, keys.part, variant, config, prefix)


def _from_metadata(checkpoint, network):
    text = checkpoint.metadata.get("happyhorse.config")
    return CONFIGS[network].from_dict(json.loads(text)) if text else None


def _count(shapes, stem):
    """Return how many consecutive numbers follow `stem` in the names."""
    numbers = {int(n[len(stem) :].split(".")[0]) for n in shapes if n.startswith(stem)}
    return len(numbers)


def _dit(checkpoint, shapes, variant):
    written = checkpoint.metadata.get("happyhorse.variant")
    config = _from_metadata(checkpoint, "dit")
    if config is not None:
        return config, variant or written
    variant = variant or written or variant_from_name(checkpoint.path)
    if variant not in DIT_VARIANTS:
        raise CheckpointError(
            f"{checkpoint.label}: {'unknown variant ' + variant if variant else 'neither metadata nor name tells the variant'}; "
            f"expected one of {', '.join(DIT_VARIANTS)}. Choose the variant by hand, or name the file after it."
        )
    preset = DIT_VARIANTS[variant]
    layers = _count(shapes, "block.layers.")
    hidden = shapes["adapter.video_embedder.weight"][0]
    experts = {i: shapes[f"block.layers.{i}.attention.pre_norm.weight"][0] // hidden for i in range(layers)}
    head_dim = shapes["block.layers.0.attention.q_norm.weight"][0] // experts[0]
    heads = hidden // head_dim
    rows = shapes["block.layers.0.attention.linear_qkv.weight"][0] // experts[0]  # q, k, v and one gate per head

    def is_gelu7(i):
        up, down = (shapes[f"block.layers.{i}.mlp.{n}.weight"] for n in ("up_gate_proj", "down_proj"))
        return up[0] // experts[i] == down[1]

    config = DiTConfig(
        num_layers=layers,
        hidden_size=hidden,
        head_dim=head_dim,
        num_query_groups=(rows - heads * head_dim - heads) // (2 * head_dim),
        video_in_channels=shapes["adapter.video_embedder.weight"][1],
        audio_in_channels=shapes["adapter.audio_embedder.weight"][1],
        text_in_channels=shapes["adapter.text_embedder.weight"][1],
        expert_layers=tuple(i for i in range(layers) if experts[i] > 1),
        gelu7_layers=tuple(i for i in range(layers) if is_gelu7(i)),
        local_attention_layers=tuple(i for i in preset.local_attention_layers if i < layers),
        frame_receptive_field=preset.frame_receptive_field,
        positions=preset.positions,
    )
    return config, variant


def variant_from_name(path):
    """Guess the DiT variant from a file's name, else from its folder's; None where neither says."""
    for name in (path.name.lower(), path.parent.name.lower()):
        for variant, pattern in VARIANT_NAMES:
            if pattern.search(name):
                return variant
    return None


def _text_encoder(checkpoint, shapes, variant):
    config = _from_metadata(checkpoint, "text_encoder")
    if config is None:
        # Head size, window and scale leave no trace in the shapes; the whole T5Gemma family shares these.
        beside = _json_beside(checkpoint.path, "encoder")
        hf = beside.get("encoder") or {}
        head_dim = hf.get("head_dim", T5GEMMA_9B.head_dim)
        config = replace(
            T5GEMMA_9B,
            vocab_size=shapes["embed_tokens.weight"][0],
            hidden_size=shapes["embed_tokens.weight"][1],
            intermediate_size=shapes["layers.0.mlp.gate_proj.weight"][0],
            num_layers=_count(shapes, "layers."),
            num_heads=shapes["layers.0.self_attn.q_proj.weight"][0] // head_dim,
            num_key_value_heads=shapes["layers.0.self_attn.k_proj.weight"][0] // head_dim,
            head_dim=head_dim,
            query_pre_attn_scalar=hf.get("query_pre_attn_scalar", T5GEMMA_9B.query_pre_attn_scalar),
            sliding_window=hf.get("sliding_window", T5GEMMA_9B.sliding_window),
        )
    return config, checkpoint.metadata.get("happyhorse.variant", "t5gemma")


def _json_beside(path, key):
    """Return the first JSON object beside a file (or in its folder) that has `key`; {} without one."""
    folder = path if path.is_dir() else path.parent
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and key in content:
            return content
    return {}


def _wan_vae(checkpoint, shapes, variant):
    config = _from_metadata(checkpoint, "wan_vae")
    if config is None:
        dim = shapes["encoder.conv1.weight"][0]
        stages = _count(shapes, "encoder.downsamples.")
        blocks = _count(shapes, f"encoder.downsamples.{stages - 1}.downsamples.")
        stage = "encoder.downsamples.{}.downsamples.{}.".format
        config = WanVAEConfig(
            dim=dim,
            dec_dim=shapes["decoder.head.0.gamma"][0],
            z_dim=shapes["conv2.weight"][0],
            dim_mult=tuple(shapes[stage(i, 0) + "residual.6.weight"][0] // dim for i in range(stages)),
            num_res_blocks=blocks,
            temporal_downsample=tuple(stage(i, blocks) + "time_conv.weight" in shapes for i in range(stages - 1)),
            latent_mean=WAN22_LATENT_MEAN,
            latent_std=WAN22_LATENT_STD,
        )
    return config, checkpoint.metadata.get("happyhorse.variant", "wan2.2")


def _turbo_vae(checkpoint, shapes, variant):
    config = _from_metadata(checkpoint, "turbo_vae")
    if config is None:
        beside = _json_beside(checkpoint.path, "decoder_block_out_channels")
        config = turbo_config_from_json(beside) if beside else _turbo_config_from_shapes(shapes)
    return config, checkpoint.metadata.get("happyhorse.variant", "turbo")


def turbo_config_from_json(fields):
    """Read the published TurboVAED JSON, whose lists start at the pixels, into a TurboVAEConfig."""

    def decoder_order(name):
        return tuple(reversed(fields[name]))

    if fields.get("decoder_causal", False) or fields.get("patch_size", 2) != 2:
        raise ValueError("a causal decoder, or a patch_size other than 2, is not TurboVAED's")
    return TurboVAEConfig(
        latent_channels=fields["latent_channels"],
        out_channels=fields["out_channels"],
        block_out_channels=decoder_order("decoder_block_out_channels"),
        layers_per_block=decoder_order("decoder_layers_per_block"),
        upsample=decoder_order("decoder_spatio_temporal_scaling"),
        upsample_space_only=decoder_order("decoder_spatio_only"),
        depthwise=decoder_order("decoder_is_dw_conv"),
        depthwise_kernel_size=fields["decoder_dw_kernel_size"],
        unpatchify=fields["use_unpatchify"],
        norm_eps=fields["resnet_norm_eps"],
        first_chunk_size=fields.get("first_chunk_size", 3),
        step_size=fields.get("step_size", 5),
        temporal_compression=fields["temporal_compression_ratio"],
        latent_mean=WAN22_LATENT_MEAN,
        latent_std=WAN22_LATENT_STD,
    )


def _turbo_config_from_shapes(shapes):
    """Read sizes off the shapes; what leaves no trace there (chunk sizes, norm eps) is the released model's."""
    blocks = _count(shapes, "up_blocks.")
    depthwise = [f"{block}.resnets.0.conv1.depthwise_conv.weight" for block in _turbo_blocks(blocks)]
    upsampler = "up_blocks.{}.upsamplers.0.".format
    upsample = tuple(upsampler(i) + "resample.1.weight" in shapes for i in range(blocks))
    time = tuple(upsampler(i) + "time_conv.conv.weight" in shapes for i in range(blocks))
    unpatchify = "upsampler2d_1.conv.weight" not in shapes
    width = shapes["conv_in.conv.weight"][0]
    widths = []
    for i in range(blocks):
        width = shapes.get(f"up_blocks.{i}.conv_in.conv1.conv.bias", (width,))[0]
        widths.append(width)
    kernels = [shapes[name][-1] for name in depthwise if name in shapes]
    return replace(
        TURBO_7_7,
        latent_channels=shapes["conv_in.conv.weight"][1],
        out_channels=shapes["conv_out.conv.weight"][0] // (4 if unpatchify else 1),
        block_out_channels=tuple(widths),
        layers_per_block=tuple(_count(shapes, f"{block}.resnets.") for block in _turbo_blocks(blocks)),
        upsample=upsample,
        upsample_space_only=tuple(up and not t for up, t in zip(upsample, time, strict=True)),
        depthwise=tuple(name in shapes for name in depthwise),
        depthwise_kernel_size=kernels[0] if kernels else TURBO_7_7.depthwise_kernel_size,
        unpatchify=unpatchify,
    )


def _turbo_blocks(count):
    return ["mid_block", *(f"up_blocks.{i}" for i in range(count))]


def _oobleck(checkpoint, shapes, variant):
    config = _from_metadata(checkpoint, "oobleck")
    if config is None:
        channels = shapes["encoder.layers.1.layers.0.layers.0.alpha"][0]
        stages = _count(shapes, "encoder.layers.") - 3  # input, activation and output frame the stages
        weight = "weight_v" if "encoder.layers.0.weight_v" in shapes else "parametrizations.weight.original1"
        down = [shapes[f"encoder.layers.{i + 1}.layers.4.{weight}"] for i in range(stages)]
        config = replace(
            STABLE_AUDIO,
            channels=channels,
            latent_dim=shapes[f"decoder.layers.0.{weight}"][1],
            c_mults=tuple(shape[0] // channels for shape in down),
            strides=tuple(shape[2] // 2 for shape in down),
        )
    return config, checkpoint.metadata.get("happyhorse.variant", "stable_audio")


READERS = {
    "dit": _dit,
    "text_encoder": _text_encoder,
    "wan_vae": _wan_vae,
    "turbo_vae": _turbo_vae,
    "oobleck": _oobleck,
}
