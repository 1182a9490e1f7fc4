"""Full-size model files that nobody trained: of zeros, which take no room on the disk, or of random numbers."""

import json
import math
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from ..model_loader.checkpoint import Checkpoint, CheckpointError, TensorHeader
from ..model_loader.convert import FORMATS, LINEARS
from ..model_loader.safetensors_writer import SafetensorsWriter
from ..model_loader.tokenizer import tokenizer_definition

ROOT = Path(__file__).parent.parent
MANIFEST = ROOT / "tests" / "golden" / "manifest_full.json"
TOKENIZER = ROOT / "nano" / "weights" / "nano_text_encoder.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FILES = {  # name: (ComfyUI's folder, component of the manifest)
    "distill": ("diffusion_models", "dit"),
    "540p_sr": ("diffusion_models", "dit"),
    "1080p_sr": ("diffusion_models", "dit"),
    "t5gemma": ("text_encoders", "t5gemma_9b_encoder"),
    "wan2.2_vae": ("vae", "wan2.2_vae"),
    "turbo_vae": ("vae", "turbo_vaed"),
    "sd_audio": ("vae", "oobleck"),
}
UNTRAINED = "happyhorse.untrained"  # key in the header of files that may be written over
QUANTISED = ("dit", "t5gemma_9b_encoder")
SCALE = ".weight_scale"
ONES = ".weight_g"  # lengths of the audio VAE's weights
VALUES = 2**22  # random numbers that are drawn; the files repeat them
DEVIATION = {torch.int8: 40.0, torch.float8_e4m3fn: 64.0}  # of what is stored


class SparseWriter(SafetensorsWriter):
    """A safetensors file of zeros, with scales of one."""

    def write_all(self, headers, bar):
        """Write the file at once."""
        with self.path.open("wb") as self._file:
            self._file.write(self._header)
            self._file.truncate(self.size)
            for name, header in headers.items():
                if name.endswith(SCALE):
                    self.write(name, torch.ones(header.shape))


class RandomWriter(SafetensorsWriter):
    """A safetensors file of normally distributed weights by which a layer keeps its input's size; biases are zero."""

    def write_all(self, headers, bar):
        """Write the file piece by piece; `bar` is told the bytes."""
        drawn = {dtype: random_values(dtype) for dtype in (*DTYPES.values(), *DEVIATION)}
        with self:
            for name, header in headers.items():
                count = torch.Size(header.shape).numel()
                weight = headers.get(name.removesuffix("_scale")) if name.endswith(SCALE) else None
                if weight is not None:
                    values = torch.full((count,), 1 / DEVIATION[weight.dtype] / math.sqrt(weight.shape[1]))
                elif name.endswith(ONES):
                    values = torch.ones(count, dtype=header.dtype)
                elif len(header.shape) < 2:
                    values = torch.zeros(count, dtype=header.dtype)
                else:
                    values = drawn[header.dtype]
                    if header.dtype not in DEVIATION:
                        values = values / math.sqrt(math.prod(header.shape[1:]))
                for start in range(0, count, len(values)):
                    piece = values[: count - start]
                    self.write(name, piece)
                    bar.update(piece.nbytes)


def random_values(dtype):
    """Return VALUES normally distributed numbers in a dtype: with a deviation of 1, or of DEVIATION where it is small.

    None is infinite or no number.
    """
    values = torch.randn(VALUES, generator=torch.manual_seed(0))
    if dtype in DEVIATION:
        values = (values * DEVIATION[dtype]).clamp_(-127, 127)
    return values.to(dtype)


def headers_of(component, precision="bf16"):
    """Return (headers, metadata) of a file of a component of the manifest.

    precision: of a transformer's or text encoder's linears, "bf16", or "int8" or "fp8" as `convert` writes them.
    """
    headers, formats = {}, {}
    prefix, linears = component.get("checkpoint_prefix", "").split("*")[0], LINEARS[precision]
    for name, (shape, dtype) in component["state_dict"].items():
        wanted = DTYPES[dtype]
        if name.endswith(".weight") and len(shape) == 2 and "layers." in name:
            layer, wanted = prefix + name.removesuffix(".weight"), linears
            if linears in FORMATS:
                formats[layer] = {"format": FORMATS[linears]}
                scales = (shape[0], 1) if linears == torch.int8 else ()
                headers[layer + SCALE] = TensorHeader(scales, torch.float32)
        headers[prefix + name] = TensorHeader(tuple(shape), wanted)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})} if formats else {}
    return headers, metadata


def write_models(folder, precision, writer=SparseWriter, names=tuple(FILES)):
    """Write these of FILES below `folder`, in ComfyUI's folders, and nano's tokenizer beside T5Gemma.

    precision: as `headers_of`. Files of ours that are there already, of the right size, are left as they are.
    ValueError where one is not ours, which is never written over, or where the disk has no room.
    """
    components = json.loads(MANIFEST.read_text(encoding="utf-8"))["components"]
    files = []
    for name in names:
        place, component = FILES[name]
        path = folder / place / f"{name}.safetensors"
        headers, metadata = headers_of(components[component], precision if component in QUANTISED else "bf16")
        file = writer(path, headers, metadata | {UNTRAINED: writer.__name__})
        if not _is_ours(path) or path.stat().st_size != file.size:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append((file, headers))
    tokenizer = tokenizer_definition(Checkpoint.open(TOKENIZER)).encode()
    beside = folder / "text_encoders" / "tokenizer.json"
    if beside.exists() and beside.read_bytes() != tokenizer:
        raise _somebodys(beside)
    size, free = sum(file.size for file, _ in files), shutil.disk_usage(folder).free
    if writer is RandomWriter and size > free:
        raise ValueError(
            f"{folder}: needs {size / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free. Make room, or name a folder "
            "on another disk."
        )
    with tqdm(total=size, desc=str(folder), unit="B", unit_scale=True, disable=writer is SparseWriter or None) as bar:
        for file, headers in files:
            file.write_all(headers, bar)
    if "t5gemma" in names:
        beside.write_bytes(tokenizer)


def _is_ours(path):
    """Tell whether a file was written here; False where there is none, ValueError where it is somebody's."""
    if not path.exists():
        return False
    try:
        ours = UNTRAINED in Checkpoint.open(path).metadata
    except CheckpointError:
        ours = False
    if not ours:
        raise _somebodys(path)
    return True


def _somebodys(path):
    return ValueError(f"{path}: is no file of random numbers and stays as it is. Name another folder.")
