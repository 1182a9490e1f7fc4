"""Which network a file holds, and of what size: from its metadata where we wrote it, else from names and shapes."""

import json
import re
from dataclasses import dataclass, replace

from .checkpoint import CheckpointError
from .config import (
    BASE,
    DISTILL,
    SR_540P,
    SR_1080P,
    T5GEMMA_9B,
    DiTConfig,
    OobleckConfig,
    TextEncoderConfig,
    TurboVAEConfig,
    WanVAEConfig,
)
from .detect_vae import count, json_beside, oobleck_config, turbo_config, wan_config
from .key_map import KEY_MAPS

CONFIGS = {
    "dit": DiTConfig,
    "text_encoder": TextEncoderConfig,
    "wan_vae": WanVAEConfig,
    "turbo_vae": TurboVAEConfig,
    "oobleck": OobleckConfig,
}
DIT_VARIANTS = {"distill": DISTILL, "base": BASE, "540p_sr": SR_540P, "1080p_sr": SR_1080P}
TRANSFORMER_FOLDERS = ("transformer", "sr", "sr_transformer")  # of diffusers' layout: the folder above them tells
VARIANT_NAMES = (  # how published files and folders call them; an sr_540p folder holds the first stage as transformer
    ("1080p_sr", re.compile(r"1080p?[_/-]?sr|sr[_-]?1080(?!p?/transformer)")),
    ("540p_sr", re.compile(r"540p?[_/-]?sr|sr[_-]?540(?!p?/transformer)")),
    ("distill", re.compile(r"distill")),
    ("base", re.compile(r"base|^magi_human_bf16")),  # WanGP's base model is the one without a word of its own
)


@dataclass(frozen=True, slots=True)
class Description:
    """What a file holds: `network` is a key of KEY_MAPS, `part` the role it plays, `prefix` what precedes its names."""

    network: str
    part: str
    variant: str
    config: DiTConfig | TextEncoderConfig | WanVAEConfig | TurboVAEConfig | OobleckConfig
    prefix: str


def describe(checkpoint, variant=None):
    """Return the Description of an open Checkpoint from its headers, and from a config JSON beside the file.

    A DiT's variant ("distill", "base", "540p_sr", "1080p_sr") leaves no trace in names and shapes: it comes from the
    file's metadata, else from `variant`, else from a config.json with local attention beside it, else from the name of
    the file or its folder. CheckpointError where the file holds none of our networks, where nothing tells its
    variant, or where its metadata contradicts `variant`.
    """
    network, prefix = _find(checkpoint)
    written = checkpoint.metadata.get("happyhorse.variant")
    if network != "dit":
        variant = written or network
    elif written is None:
        variant = _choose_variant(checkpoint, variant)
    elif variant in (None, written):
        variant = written
    else:
        raise CheckpointError(
            f"{checkpoint.label}: its header says {written}, but {variant} was asked for. Choose another file, or "
            "leave the variant to the file."
        )
    try:
        config = _config(checkpoint, network, prefix, variant)
    except (KeyError, ZeroDivisionError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.label}: looks like a {network} file, but its size cannot be read from it ({error!r}); the "
            "file is incomplete or of another model. Download it again, or choose another file."
        ) from None
    return Description(network, KEY_MAPS[network].part, variant, config, prefix)


def _find(checkpoint):
    for network, keys in KEY_MAPS.items():
        prefix = keys.prefix(checkpoint.headers)
        if prefix is not None:
            return network, prefix
    raise CheckpointError(
        f"{checkpoint.label}: not a part of this model (first tensor: {next(iter(checkpoint.headers))}); expected a "
        "daVinci-MagiHuman transformer, a T5Gemma encoder, a Wan2.2 or Turbo video VAE, or the stable-audio VAE."
    )


def _choose_variant(checkpoint, variant):
    if variant is None:  # diffusers' config.json; only 1080p super-resolution has such layers
        local = json_beside(checkpoint.path, "local_attn_layers").get("local_attn_layers")
        variant = "1080p_sr" if local else variant_from_name(checkpoint.path)
    if variant not in DIT_VARIANTS:
        fault = f"unknown variant {variant}" if variant else "neither metadata nor name tells the variant"
        raise CheckpointError(
            f"{checkpoint.label}: {fault}; expected one of {', '.join(DIT_VARIANTS)}. Choose the variant by hand, or "
            "name the file after it."
        )
    return variant


def variant_from_name(path):
    """Guess the DiT variant from a file's name, else with its folder's; None where neither says."""
    file, folder, above = (part.lower() for part in (path.name, path.parent.name, path.parent.parent.name))
    names = [file, f"{folder}/{file}"]
    if folder in TRANSFORMER_FOLDERS:
        names.append(f"{above}/{folder}/{file}")
    for name in names:
        for variant, pattern in VARIANT_NAMES:
            if pattern.search(name):
                return variant
    return None


def _config(checkpoint, network, prefix, variant):
    written = checkpoint.metadata.get("happyhorse.config")
    if written is not None:
        return CONFIGS[network].from_dict(json.loads(written))
    shapes = {n[len(prefix) :]: h.shape for n, h in checkpoint.headers.items() if n.startswith(prefix)}
    readers = {
        "dit": lambda: dit_config(shapes, DIT_VARIANTS[variant]),
        "text_encoder": lambda: text_encoder_config(shapes, json_beside(checkpoint.path, "encoder")),
        "wan_vae": lambda: wan_config(shapes),
        "turbo_vae": lambda: turbo_config(shapes, json_beside(checkpoint.path, "decoder_block_out_channels")),
        "oobleck": lambda: oobleck_config(shapes),
    }
    return readers[network]()


def dit_config(shapes, preset):
    """Read a DiTConfig off {name: shape}; what leaves no trace there is the preset's."""
    layers = count(shapes, "block.layers.")
    hidden = shapes["adapter.video_embedder.weight"][0]
    experts = [shapes[f"block.layers.{i}.attention.pre_norm.weight"][0] // hidden for i in range(layers)]
    head_dim = shapes["block.layers.0.attention.q_norm.weight"][0] // experts[0]
    heads = hidden // head_dim
    rows = shapes["block.layers.0.attention.linear_qkv.weight"][0] // experts[0]  # q, k, v and one gate per head
    up = [shapes[f"block.layers.{i}.mlp.up_gate_proj.weight"][0] // experts[i] for i in range(layers)]
    down = [shapes[f"block.layers.{i}.mlp.down_proj.weight"][1] for i in range(layers)]
    return DiTConfig(
        num_layers=layers,
        hidden_size=hidden,
        head_dim=head_dim,
        num_query_groups=(rows - heads * head_dim - heads) // (2 * head_dim),
        video_in_channels=shapes["adapter.video_embedder.weight"][1],
        audio_in_channels=shapes["adapter.audio_embedder.weight"][1],
        text_in_channels=shapes["adapter.text_embedder.weight"][1],
        expert_layers=tuple(i for i in range(layers) if experts[i] > 1),
        gelu7_layers=tuple(i for i in range(layers) if up[i] == down[i]),
        local_attention_layers=tuple(i for i in preset.local_attention_layers if i < layers),
        frame_receptive_field=preset.frame_receptive_field,
        positions=preset.positions,
    )


def text_encoder_config(shapes, beside):
    """Read a TextEncoderConfig off {name: shape} and the published config.json (or {}).

    Head size, window and scale leave no trace in the shapes; without the JSON they are those of the T5Gemma family.
    """
    written = beside.get("encoder", {})
    head_dim = written.get("head_dim", T5GEMMA_9B.head_dim)
    return replace(
        T5GEMMA_9B,
        vocab_size=shapes["embed_tokens.weight"][0],
        hidden_size=shapes["embed_tokens.weight"][1],
        intermediate_size=shapes["layers.0.mlp.gate_proj.weight"][0],
        num_layers=count(shapes, "layers."),
        num_heads=shapes["layers.0.self_attn.q_proj.weight"][0] // head_dim,
        num_key_value_heads=shapes["layers.0.self_attn.k_proj.weight"][0] // head_dim,
        head_dim=head_dim,
        query_pre_attn_scalar=written.get("query_pre_attn_scalar", T5GEMMA_9B.query_pre_attn_scalar),
        sliding_window=written.get("sliding_window", T5GEMMA_9B.sliding_window),
    )
