"""Autoencoders in diffusers' names (AutoencoderKLWan, AutoencoderOobleck) seen under the published ones."""

import re

from .checkpoint import Checkpoint, TensorHeader

WAN_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
WAN_RESNET = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
OOBLECK_UNIT = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
OOBLECK_BLOCK = {"encoder": {"snake1": 3, "conv1": 4}, "decoder": {"snake1": 0, "conv_t1": 1}}
FIRST_UNIT = {"encoder": 0, "decoder": 2}


def in_published_names(checkpoint):
    """Return the Checkpoint under published names; the same object where it is no autoencoder of diffusers'.

    Names without a place keep theirs. diffusers stores Oobleck's alpha and beta as [1, channels, 1]: they are read as
    [channels].
    """
    rename = next((rename for signature, rename in RENAMES.items() if signature in checkpoint.headers), None)
    if rename is None:
        return checkpoint
    own = {rename(name, checkpoint.headers): name for name in checkpoint.headers}
    headers = {}
    for name, stored in own.items():
        header = checkpoint.headers[stored]
        headers[name] = TensorHeader(_vector(header.shape), header.dtype)

    def read(name):
        return checkpoint.read(own[name]).reshape(headers[name].shape)

    return Checkpoint(checkpoint.path, headers, checkpoint.metadata, read)


def _vector(shape):
    return shape[1:2] if len(shape) == 3 and shape[0] == shape[2] == 1 else shape


def _wan_name(name, names):
    layer, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"(post_)?quant_conv", layer):
        layer = "conv2" if match[1] else "conv1"
    elif match := re.fullmatch(rf"(\w+)\.({'|'.join(WAN_ENDS)})", layer):
        layer = f"{match[1]}.{WAN_ENDS[match[2]]}"
    elif match := re.fullmatch(rf"(\w+)\.mid_block\.resnets\.([01])\.({'|'.join(WAN_RESNET)})", layer):
        layer = f"{match[1]}.middle.{2 * int(match[2])}.{WAN_RESNET[match[3]]}"
    elif match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(\w+)", layer):
        layer = f"{match[1]}.middle.1.{match[2]}"
    elif match := re.fullmatch(rf"(\w+)\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.({'|'.join(WAN_RESNET)})", layer):
        half, way, block, resnet, part = match.groups()
        layer = f"{half}.{way}samples.{block}.{way}samples.{resnet}.{WAN_RESNET[part]}"
    elif match := re.fullmatch(r"((\w+)\.(down|up)_blocks\.(\d+)\.)\3sampler\.(.+)", layer):
        stem, half, way, block, part = match.groups()
        last = _count(f"{stem}resnets.", names)  # published: numbered on after the block's resnets
        layer = f"{half}.{way}samples.{block}.{way}samples.{last}.{part}"
    return f"{layer}.{leaf}"


def _oobleck_name(name, names):
    layer, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"(\w+)\.(conv1|snake1|conv2)", layer):
        blocks = _count(f"{match[1]}.block.", names)
        layer = f"{match[1]}.layers.{ {'conv1': 0, 'snake1': blocks + 1, 'conv2': blocks + 2}[match[2]] }"
    elif match := re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.res_unit(\d)\.(snake[12]|conv[12])", layer):
        half, block, unit, part = match.groups()
        unit = FIRST_UNIT[half] + int(unit) - 1
        layer = f"{half}.layers.{int(block) + 1}.layers.{unit}.layers.{OOBLECK_UNIT[part]}"
    elif match := re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.(snake1|conv1|conv_t1)", layer):
        half, block, part = match.groups()
        layer = f"{half}.layers.{int(block) + 1}.layers.{OOBLECK_BLOCK[half][part]}"
    return f"{layer}.{leaf}"


def _count(stem, names):
    return len({name[len(stem) :].split(".")[0] for name in names if name.startswith(stem)})


RENAMES = {  # a tensor that every file of it holds -> how its names are changed
    "decoder.mid_block.resnets.0.norm1.gamma": _wan_name,
    "encoder.block.0.res_unit1.snake1.alpha": _oobleck_name,
}
