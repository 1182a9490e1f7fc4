"""Any transformer or text encoder that we can read, to one safetensors file of published names: bf16, int8 or fp8."""

import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoint import Checkpoint, CheckpointError, TensorHeader
from .detect import DIT_VARIANTS, describe
from .key_map import KEY_MAPS, stacked_name
from .layouts import INT8_FORMAT, as_published
from .load import expected_tensors, linear_weights, part_metadata, plan
from .row_scales import quantised
from .safetensors_writer import SafetensorsWriter
from .tokenizer import tokenizer_definition
from .tokens import rotary_bands

FP8_DTYPE = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FP8_DTYPE).max
FORMATS = {torch.int8: INT8_FORMAT, FP8_DTYPE: "float8_e4m3fn"}  # ComfyUI's names
LINEARS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": FP8_DTYPE}
PIECE = 2**22  # elements that are cast at a time
REOPEN = 2**28  # bytes read after which the source is opened anew


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to write: its name in the source, its shape, the dtype that it gets."""

    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def convert(source, destination, dtype, *, variant=None, force=False):
    """Write a DiT's or a text encoder's checkpoint as one safetensors file; return that file's size in bytes.

    source: any file or folder that `load` reads; variant: as `detect.describe`. dtype: "bf16", "int8" or "fp8", of the
    linears; what the networks keep in fp32 stays fp32, the text encoder's embedding is bf16. int8 has an fp32 scale for
    every row of a stored weight [rows, 1], largest magnitude / 127; fp8 is float8_e4m3fn with one fp32 scale a stored
    weight [], largest magnitude / 448. Both are in the quantised formats of ComfyUI's QUANTIZATION.md:
    `<layer>.weight_scale`, and the layers by name in the header. The header also has what `save_part` writes, the
    tokenizer included, and `happyhorse.source_headers_sha256` (see `headers_sha256`).

    Holds about one tensor at a time. The file appears whole or not at all. CheckpointError for a source that does not
    load, or holds a value that is not finite; ValueError for a destination that will not do.
    """
    source, destination = Path(source), Path(destination)
    original = Checkpoint.open(source)
    _check_destination(destination, source, original.path, force)
    checkpoint = as_published(original)
    found = describe(checkpoint, variant)
    if found.part not in ("dit", "text_encoder"):
        raise CheckpointError(
            f"{checkpoint.label}: holds a {found.part} ({found.network}); only transformers and text encoders are "
            "converted. The VAEs are small: use their files as they are."
        )
    entries = _entries(found, checkpoint, dtype)
    headers, formats = {name: TensorHeader(entry.shape, entry.dtype) for name, entry in entries.items()}, {}
    for name, entry in entries.items():
        if entry.dtype in FORMATS:
            layer = name.removesuffix(".weight")
            formats[layer] = {"format": FORMATS[entry.dtype]}
            shape = (entry.shape[0], 1) if entry.dtype == torch.int8 else ()
            headers[f"{layer}.weight_scale"] = TensorHeader(shape, torch.float32)
    bands = rotary_bands(found.config.head_dim) if found.part == "dit" else None
    if bands is not None:
        headers["adapter.rope.bands"] = TensorHeader(tuple(bands.shape), bands.dtype)
    tokenizer = tokenizer_definition(original) if found.part == "text_encoder" else None
    metadata = part_metadata(found.part, found.config, found.variant, tokenizer)
    metadata["happyhorse.source_headers_sha256"] = headers_sha256(original)
    if formats:
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": formats})
    writer = SafetensorsWriter(destination, headers, metadata)
    _check_space(writer)
    label = checkpoint.label
    del original, checkpoint  # _read_in_turn opens its own
    with writer, tqdm(total=writer.size, desc=destination.name, unit="B", unit_scale=True, disable=None) as bar:
        if bands is not None:
            writer.write("adapter.rope.bands", bands)
        for name, tensor in _read_in_turn(source, entries):
            _write_tensor(writer, label, name, tensor, entries[name], bar)
            del tensor  # before the next one is read
        bar.update(bar.total - bar.n)  # header and scales
    return writer.size


def headers_sha256(checkpoint):
    """Hash what a checkpoint's headers say: names, shapes, dtypes, metadata. Cheap, and blind to the values."""
    tensors = [[name, list(header.shape), str(header.dtype)] for name, header in sorted(checkpoint.headers.items())]
    return hashlib.sha256(json.dumps([tensors, sorted(checkpoint.metadata.items())]).encode()).hexdigest()


def _check_destination(destination, source, opened, force):
    if destination.suffix != ".safetensors":
        raise ValueError(f"{destination}: the new file's name must end in .safetensors")
    if not destination.parent.is_dir():
        raise ValueError(f"{destination.parent}: no such folder. Make it first, or name another one.")
    resolved = destination.resolve()
    for place in {source.resolve(), opened.resolve()}:
        if resolved == place or place in resolved.parents:
            raise ValueError(f"{destination}: lies in what is to be converted. Name a file elsewhere.")
    if destination.is_dir():
        raise ValueError(f"{destination}: is a folder; name the new file.")
    if destination.exists() and not force:
        raise ValueError(f"{destination}: exists already. Name another file, or add --force to replace it.")


def _check_space(writer):
    left_behind = writer.unfinished.stat().st_size if writer.unfinished.is_file() else 0
    free = shutil.disk_usage(writer.path.parent).free + left_behind
    if free < writer.size:
        raise ValueError(
            f"{writer.path}: needs {writer.size / 2**30:.2f} GiB, but its disk has {free / 2**30:.2f} GiB free. Make "
            "room, or name a file on another disk."
        )


def _entries(found, checkpoint, dtype):
    wanted = expected_tensors(found.network, found.config, dtype=torch.bfloat16)
    linears = linear_weights(found.network, found.config)
    entries = {}
    for name, ours in plan(found.network, checkpoint, found.prefix, wanted).items():
        kept = wanted[ours[0]].dtype  # fp32 but for embedding and linears, and for some of those too
        published = KEY_MAPS[found.network].to_file(stacked_name(ours[0]))
        stored = LINEARS[dtype] if ours[0] in linears else kept
        entries[published] = Entry(name, checkpoint.headers[name].shape, stored)
    return entries


def _read_in_turn(source, entries):
    """Yield (name, tensor); the source is opened anew now and then, because mapped pages stay in memory until then."""
    checkpoint, read = as_published(Checkpoint.open(source)), 0
    for name, entry in entries.items():
        if read > REOPEN:
            checkpoint, read = as_published(Checkpoint.open(source)), 0
        read += torch.Size(entry.shape).numel() * checkpoint.headers[entry.source].dtype.itemsize
        yield name, checkpoint.read(entry.source)


def _write_tensor(writer, label, name, tensor, entry, bar):
    rows = tensor.reshape(entry.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(-1)
    pieces = rows.split(max(PIECE // max(rows[:1].numel(), 1), 1))
    largest = torch.zeros(())  # not a list of all results: they would lie between freed pieces and keep the heap large
    for piece in pieces:
        largest = torch.maximum(largest, piece.float().abs().amax())  # NaN wins
    if not torch.isfinite(largest):
        raise CheckpointError(
            f"{label}: {entry.source} holds NaN or infinite values, so nothing was written. Download it again, or use "
            "another file of the same model."
        )
    if entry.dtype == FP8_DTYPE:
        scale = largest / FP8_LARGEST
        scale = scale if scale > 0 else torch.ones(())
        writer.write(f"{name}_scale", scale)
    for piece in pieces:
        if entry.dtype == FP8_DTYPE:
            piece = (piece.float() / scale).clamp_(-FP8_LARGEST, FP8_LARGEST)
        elif entry.dtype == torch.int8:
            piece, scale = quantised(torch.int8, piece)
            writer.write(f"{name}_scale", scale)
        writer.write(name, piece.to(entry.dtype))
        bar.update(piece.numel() * entry.dtype.itemsize)


def main(arguments=None):
    """Convert what the command line names; SystemExit with a message where that cannot be done."""
    parser = argparse.ArgumentParser(prog="run.py convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", type=Path, help="file, shard or folder of shards")
    parser.add_argument("destination", metavar="DST", type=Path, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=tuple(LINEARS), required=True, help="of the linear layers")
    parser.add_argument("--variant", choices=DIT_VARIANTS, help="where neither the source nor its name tells")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    words = parser.parse_args(arguments)
    try:
        size = convert(words.source, words.destination, words.dtype, variant=words.variant, force=words.force)
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"convert: {error}")
    except KeyboardInterrupt:
        sys.exit("\nconvert: stopped; nothing was written.")
    sys.stdout.write(f"{words.destination}: {size / 2**20:,.1f} MiB\n")


if __name__ == "__main__":
    main()
