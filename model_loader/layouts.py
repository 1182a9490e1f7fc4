"""Other people's layouts seen as the published one: fp8 and int8 weights with their scales, split experts stacked."""

import json
import math
import re

import torch

from .checkpoint import Checkpoint, CheckpointError, TensorHeader
from .diffusers_names import in_published_names
from .dit_layers import MODALITIES
from .row_scales import multiplied_out, quantised, rotated_back

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALED = (*FP8, torch.int8)  # what a weight with a scale is stored as
INT8_FORMAT = "int8_tensorwise"  # ComfyUI's name for int8 with one scale, or one a row
# What a weight's scale is called: daVinci-MagiHuman-FP8, Comfy's first generation, its second.
SCALE_ENDINGS = (".weight.__fp8_scale", ".scale_weight", ".weight_scale")
# What else such files hold beside their weights; activations are not quantised here.
NOT_WEIGHTS = re.compile(r"(.*\.)?(scaled_fp8|comfy_quant|scale_input|input_scale)")
# WanGP's experts end in `_video`, those of a model that ComfyUI's own nodes have saved in `.video`.
SPLIT = re.compile(
    r"(.+\.(?:attention|mlp))\.(linear_[qkvg]|linear_qkv|linear_proj|up_gate_proj|down_proj)"
    rf"([_.](?:{'|'.join(MODALITIES)}))?\.weight"
)
# Rows of the published linear_qkv, in order. WanGP's network runs the four apart: their names tell which is which.
QKV = ("linear_q", "linear_k", "linear_v", "linear_g")


def as_published(checkpoint):
    """Return a Checkpoint with the published names and plain weights; the same object where it has them already.

    Nothing is read here but what says how a layer is quantised. `read` gives a scaled fp8 or int8 weight [rows,
    columns] in fp32, times its scale; `read_scaled` gives it as it is, with its scale: one number [], or one a row
    [rows, 1]. int8 that ConvRot has rotated is rotated back, and for `read_scaled` rounded to int8 again. A split
    weight is stacked when it is read. Where no weight has a scale, fp8 is a plain cast and stays as it is.
    CheckpointError names the file and tensor: for an incomplete set or an unknown format here, for a scale that is not
    finite and positive when it is read.
    """
    return _stacked(_with_scales(in_published_names(checkpoint)))


def stored_as(checkpoint):
    """Tell from the headers what an open Checkpoint's weights are quantised as: "GGUF", "fp8", "int8" or None."""
    if checkpoint.blocks:
        return "GGUF"
    dtypes = {header.dtype for name, header in checkpoint.headers.items() if name.endswith(".weight")}
    return "int8" if torch.int8 in dtypes else "fp8" if dtypes.intersection(FP8) else None


def _told_format(checkpoint, weight):
    """Return how a file says that ComfyUI quantised a weight, and its groups of rotated columns; None for either."""
    layer = weight.removesuffix(".weight")
    try:
        if f"{layer}.comfy_quant" in checkpoint.headers:
            told = json.loads(bytes(checkpoint.read(f"{layer}.comfy_quant").tolist()))
        else:
            told = json.loads(checkpoint.metadata.get("_quantization_metadata", "{}")).get("layers", {}).get(layer, {})
        told |= told.get("params") or {}
        return told.get("format"), int(told.get("convrot_groupsize", 256)) if told.get("convrot") else None
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(
            f"{checkpoint.label}: how {weight} is quantised cannot be read from the file. Download it again, or use "
            "another one."
        ) from None


def _rotations(checkpoint):
    """Return {int8 weight that ConvRot has rotated: columns in a group}; CheckpointError for formats we cannot read.

    Those are ComfyUI's nvfp4 and convrot_w4a4, and blocks of GGUF that it saved.
    """
    rotations = {}
    for name, header in checkpoint.headers.items():
        if header.dtype not in (torch.uint8, torch.int8) or not name.endswith(".weight"):
            continue
        form, group = _told_format(checkpoint, name)
        if form not in (None, INT8_FORMAT):
            raise CheckpointError(
                f"{checkpoint.label}: {name} is quantised as {form}; of ComfyUI's formats fp8 and int8 are read. Use "
                "an fp8, int8, bf16 or .gguf file of the same model, or save it again from one loaded with "
                "weight_dtype bf16."
            )
        if group is not None:
            if group < 4 or 4 ** round(math.log(group, 4)) != group or header.shape[-1] % group:
                raise CheckpointError(
                    f"{checkpoint.label}: {name} was rotated in groups of {group} columns, which must be a power of "
                    f"four and divide its {header.shape[-1]}. Download it again, or use another file."
                )
            rotations[name] = group
    return rotations


def _with_scales(checkpoint):
    rotations = _rotations(checkpoint)
    scales = {}
    for name, header in checkpoint.headers.items():
        ending = next((ending for ending in SCALE_ENDINGS if name.endswith(ending)), None)
        if ending:
            weight = name.removesuffix(ending) + ".weight"
            _check_scale(checkpoint, name, header, weight)
            scales[weight] = name
    headers = {
        name: TensorHeader(header.shape, torch.float32) if name in scales else header
        for name, header in checkpoint.headers.items()
        if name not in scales.values() and not NOT_WEIGHTS.fullmatch(name)
    }
    needing = SCALED if scales else (torch.int8,)
    lost = [name for name, header in headers.items() if header.dtype in needing]
    if lost:
        raise CheckpointError(
            f"{checkpoint.label}: {len(lost)} quantised tensors have no scale (first: {lost[0]}); without it their "
            "values are wrong. Download the file again, or use another one."
        )
    if len(headers) == len(checkpoint.headers):
        return checkpoint

    def stored(name):
        scale = checkpoint.read(scales[name]).float()
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise CheckpointError(
                f"{checkpoint.label}: {scales[name]} holds a scale that is not finite and positive; its weight cannot "
                "be restored. Download the file again, or use another one."
            )
        return checkpoint.read(name), scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())

    def read(name):
        if name not in scales:
            return checkpoint.read(name)
        wide = multiplied_out(*stored(name))
        return rotated_back(wide, rotations[name]) if name in rotations else wide

    def read_scaled(name):
        if name in rotations:
            return quantised(torch.int8, read(name))
        return stored(name) if name in scales else (checkpoint.read(name), None)

    return Checkpoint(checkpoint.path, headers, checkpoint.metadata, read, read_scaled)


def _check_scale(checkpoint, name, header, weight):
    stored = checkpoint.headers.get(weight)
    if stored is None:
        raise CheckpointError(
            f"{checkpoint.label}: {name} scales {weight}, which is not in the file. Download it again."
        )
    if stored.dtype not in SCALED or len(stored.shape) != 2:
        raise CheckpointError(
            f"{checkpoint.label}: {weight} is {stored.dtype} {list(stored.shape)} with a scale; of quantised weights "
            "only fp8 and int8 matrices can be read. Use an fp8, int8 or bf16 file of the same model."
        )
    rows = stored.shape[0]
    if header.shape not in ((), (1,), (rows,), (rows, 1)):
        raise CheckpointError(
            f"{checkpoint.label}: {name} has shape {list(header.shape)}, expected one number or one for each of the "
            f"{rows} rows of {weight}. Use another fp8, int8 or bf16 file of the same model."
        )


def _stacked(checkpoint):
    pieces, headers = {}, {}
    for name, header in checkpoint.headers.items():
        split = SPLIT.fullmatch(name)
        if split and (split[2] in QKV or split[3]):
            published = f"{split[1]}.{'linear_qkv' if split[2] in QKV else split[2]}.weight"
            pieces.setdefault(published, set()).add(name)
        else:
            headers[name] = header
    if not pieces:
        return checkpoint
    order = {published: _rows_in_order(checkpoint, published, names) for published, names in pieces.items()}
    for published, names in order.items():
        shapes = [checkpoint.headers[name].shape for name in names]
        for name, shape in zip(names, shapes, strict=True):
            if len(shape) != 2 or shape[1] != shapes[0][-1]:
                raise CheckpointError(
                    f"{checkpoint.label}: {name} has shape {list(shape)}, expected a matrix of {shapes[0][-1:]} "
                    "columns as in the other parts of its layer. Download the file again."
                )
        rows = sum(shape[0] for shape in shapes)
        headers[published] = TensorHeader((rows, shapes[0][1]), checkpoint.headers[names[0]].dtype)

    def read_scaled(name):
        if name not in order:
            return checkpoint.read_scaled(name)
        return _joined([checkpoint.read_scaled(part) for part in order[name]])

    def read(name):
        return multiplied_out(*read_scaled(name)) if name in order else checkpoint.read(name)

    return Checkpoint(checkpoint.path, headers, checkpoint.metadata, read, read_scaled)


def _joined(parts):
    tensors, scales = zip(*parts, strict=True)
    alike = len({tensor.dtype for tensor in tensors}) == 1
    if alike and all(scale is not None for scale in scales):
        return torch.cat(tensors), torch.cat([scale.expand(len(tensor), 1) for tensor, scale in parts])
    if not alike:  # fp8 beside bf16, which torch does not join
        tensors = [multiplied_out(*part).float() for part in parts]
    return torch.cat(tensors), None


def _rows_in_order(checkpoint, published, names):
    _, part, ending = SPLIT.fullmatch(min(names)).groups()
    experts = [f"{ending[0]}{modality}" for modality in MODALITIES] if ending else [""]
    owner, linear, _ = published.rsplit(".", 2)
    linears = QKV if part in QKV else (linear,)
    wanted = [f"{owner}.{part}{expert}.weight" for expert in experts for part in linears]
    faults = [name for name in wanted if name not in names] or sorted(names.difference(wanted))
    if faults or published in checkpoint.headers:
        raise CheckpointError(
            f"{checkpoint.label}: the parts of {published} are incomplete or twice there (first: "
            f"{(faults or [published])[0]}). Download the file again."
        )
    return wanted
