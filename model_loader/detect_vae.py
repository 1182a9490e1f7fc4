"""Sizes of the autoencoders, read off the names and shapes of their tensors or off the JSON published beside them."""

import json
from dataclasses import replace

from .config import (
    STABLE_AUDIO,
    TURBO_7_7,
    WAN22_LATENT_MEAN,
    WAN22_LATENT_STD,
    TurboVAEConfig,
    WanVAEConfig,
)


def count(shapes, stem):
    """Return how many different numbers follow `stem` in the names."""
    return len({name[len(stem) :].split(".")[0] for name in shapes if name.startswith(stem)})


def json_beside(path, key):
    """Return the first JSON object beside a file (or in a folder) that has `key`; {} without one."""
    folder = path if path.is_dir() else path.parent
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # some other program's file
        if isinstance(content, dict) and key in content:
            return content
    return {}


def wan_config(shapes):
    """Read a WanVAEConfig off {name: shape}; latent statistics are the published ones."""
    dim = shapes["encoder.conv1.weight"][0]
    stages = count(shapes, "encoder.downsamples.")
    blocks = count(shapes, f"encoder.downsamples.{stages - 1}.downsamples.")  # the last stage ends in no down-sampler
    stage = "encoder.downsamples.{}.downsamples.{}.".format
    return WanVAEConfig(
        dim=dim,
        dec_dim=shapes["decoder.head.0.gamma"][0],
        z_dim=shapes["conv2.weight"][0],
        dim_mult=tuple(shapes[stage(i, 0) + "residual.6.weight"][0] // dim for i in range(stages)),
        num_res_blocks=blocks,
        temporal_downsample=tuple(stage(i, blocks) + "time_conv.weight" in shapes for i in range(stages - 1)),
        latent_mean=WAN22_LATENT_MEAN,
        latent_std=WAN22_LATENT_STD,
    )


def turbo_config(shapes, beside):
    """Read a TurboVAEConfig off the published JSON, or off {name: shape} where that is {}.

    What leaves no trace in the shapes (chunk sizes, norm eps) is then the released model's.
    """
    if beside:
        return turbo_config_from_json(beside)
    blocks = ["mid_block", *(f"up_blocks.{i}" for i in range(count(shapes, "up_blocks.")))]
    separable = [f"{block}.resnets.0.conv1.depthwise_conv.weight" for block in blocks]
    kernels = [shapes[name][-1] for name in separable if name in shapes]
    upsampler = "{}.upsamplers.0.".format
    upsample = [upsampler(block) + "resample.1.weight" in shapes for block in blocks[1:]]
    in_time = [upsampler(block) + "time_conv.conv.weight" in shapes for block in blocks[1:]]
    unpatchify = "upsampler2d_1.conv.weight" not in shapes
    widths = [shapes["conv_in.conv.weight"][0]]
    for block in blocks[1:]:  # a block changes its width on entry or keeps the one before
        entry = (f"{block}.conv_in.conv2.conv.bias", f"{block}.conv_in.conv2.pointwise_conv.bias")
        widths.append(next((shapes[name][0] for name in entry if name in shapes), widths[-1]))
    return replace(
        TURBO_7_7,
        latent_channels=shapes["conv_in.conv.weight"][1],
        out_channels=shapes["conv_out.conv.weight"][0] // (4 if unpatchify else 1),
        block_out_channels=tuple(widths[1:]),
        layers_per_block=tuple(count(shapes, f"{block}.resnets.") for block in blocks),
        upsample=tuple(upsample),
        upsample_space_only=tuple(up and not time for up, time in zip(upsample, in_time, strict=True)),
        depthwise=tuple(name in shapes for name in separable),
        depthwise_kernel_size=kernels[0] if kernels else TURBO_7_7.depthwise_kernel_size,
        unpatchify=unpatchify,
    )


def turbo_config_from_json(fields):
    """Read the published TurboVAED JSON, whose lists start at the pixels, into a TurboVAEConfig."""

    def decoder_order(name):
        return tuple(reversed(fields[name]))

    if fields["decoder_causal"] or fields["patch_size"] != 2:
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
        first_chunk_size=fields.get("first_chunk_size", 3),  # the published code's own defaults
        step_size=fields.get("step_size", 5),
        temporal_compression=fields["temporal_compression_ratio"],
        latent_mean=WAN22_LATENT_MEAN,
        latent_std=WAN22_LATENT_STD,
    )


def oobleck_config(shapes):
    """Read an OobleckConfig off {name: shape}, under either name of the weight norm's direction."""
    weight = "weight_v" if "encoder.layers.0.weight_v" in shapes else "parametrizations.weight.original1"
    channels = shapes["encoder.layers.1.layers.0.layers.0.alpha"][0]
    stages = count(shapes, "encoder.layers.") - 3  # between one layer in and two out
    down = [shapes[f"encoder.layers.{i + 1}.layers.4.{weight}"] for i in range(stages)]
    return replace(
        STABLE_AUDIO,
        channels=channels,
        latent_dim=shapes[f"decoder.layers.0.{weight}"][1],
        c_mults=tuple(shape[0] // channels for shape in down),
        strides=tuple(shape[2] // 2 for shape in down),  # kernels are twice the stride
    )
