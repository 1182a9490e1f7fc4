"""Weight files as they lie on disk: headers first, tensors one at a time, clear errors for files that are not whole."""

import json
import math
import mmap
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = (".ckpt", ".pth", ".pt", ".bin")
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
AGAIN = "Download it again."
KINDS = (  # how a file begins that is not what its name says: pattern, what it is, its rightful names, what to do
    (rb"version https://git-lfs", "a Git LFS pointer", (), "Run `git lfs pull`, or download the file itself."),
    (rb"\s*<", "a web page", (), "Download the file itself; its site may want a login or a licence accepted first."),
    (rb"GGUF", "a GGUF file", (".gguf",), "Rename it to .gguf."),
    (rb"PK\x03\x04", "a torch checkpoint", PICKLES, "Rename it to .ckpt."),
    (rb"(?s).{8}\{\s*\"", "a safetensors file", (".safetensors",), "Rename it to .safetensors."),
)


def label(path):
    """Return what messages call a file: its name with its folder's, because shards share their names."""
    return "/".join(path.parts[-2:])


class CheckpointError(RuntimeError):
    """A weight file is not what it should be; the message says what was wrong, what was expected and what to do."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """Named tensors of one file or one sharded folder: `headers` at once, `read(name)` on demand through mmap.

    `read_scaled(name)` returns (tensor as stored, fp32 scale or None), of whose product `read(name)` is the value.
    `blocks` is {name: kind} of the matrices that a .gguf file has in blocks (gguf_blocks.FORMATS), and
    `read_blocks(name)` returns one of those as it is stored, uint8 [rows, bytes of a row].
    """

    def __init__(self, path, headers, metadata, read, read_scaled=None, *, blocks=None, read_blocks=None):
        self.path = Path(path)
        self.headers = headers
        self.metadata = metadata
        self.read = read
        self.read_scaled = read_scaled or (lambda name: (read(name), None))
        self.blocks = blocks or {}
        self.read_blocks = read_blocks

    @property
    def label(self):
        """What messages call it."""
        return label(self.path)

    @classmethod
    def open(cls, path, tensor_at=None):
        """Open a .safetensors file, a shard or folder of shards, a torch pickle of tensors, or a .gguf file.

        Reads headers only (a pickle is mapped, not read). `tensor_at` maps tensors, a pickle's aside, in place of
        `map_tensor`, whose arguments it takes. CheckpointError for anything missing, truncated or unsafe.
        """
        tensor_at = tensor_at or map_tensor
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder. Check the path, or download the weights first.")
        if path.is_dir():
            return _open_folder(path, tensor_at)
        if path.name.endswith(".index.json"):
            return _open_index(path, tensor_at)
        if path.suffix == ".safetensors":
            shard = SHARD.fullmatch(path.name)
            if shard:
                return _open_shards(path.parent, shard[1], int(shard[2]), tensor_at)
            return _open_files(path, [path], tensor_at)
        if path.suffix in PICKLES:
            return _open_pickle(path)
        if path.suffix == ".gguf":
            from .gguf_file import open_gguf

            return open_gguf(path, tensor_at)
        raise CheckpointError(
            f"{path.name}: unknown kind of file; expected .safetensors, {', '.join(PICKLES)}, .gguf or a folder of "
            "one of the former."
        )

    @classmethod
    def of_tensors(cls, tensors, path="memory", metadata=None):
        """Wrap tensors that are already in memory."""
        headers = {name: TensorHeader(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        return cls(path, headers, metadata or {}, tensors.__getitem__)


def _open_folder(folder, tensor_at):
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _open_index(indices[0], tensor_at)
    for suffixes in ((".safetensors",), PICKLES, (".gguf",)):
        files = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if files:
            break
    shards = [SHARD.fullmatch(file.name) for file in files]
    if len(files) == 1 or files and all(shards) and len({shard[1] for shard in shards}) == 1:
        return Checkpoint.open(files[0], tensor_at)
    found = ", ".join(file.name for file in files[:4]) or "none"
    raise CheckpointError(
        f"{label(folder)}: expected one weight file or one sharded set in this folder, found {len(files)} files "
        f"({found}). Name the file instead of the folder, or the folder inside that holds the weights."
    )


def _open_index(path, tensor_at):
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {tensor: os.fspath(shard) for tensor, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{label(path)}: not a shard index (no readable `weight_map`). {AGAIN}") from None
    for tensor, shard in shards.items():
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{label(path)}: places {tensor} outside its folder ({shard}); such an index is not trusted. Use one "
                "that names files beside it."
            )
    files = [path.parent / shard for shard in sorted(set(shards.values()))]
    checkpoint = _open_files(path.parent, files, tensor_at)
    lost = sorted(set(shards) - set(checkpoint.headers))
    if lost:
        raise CheckpointError(
            f"{checkpoint.label}: {len(lost)} tensors of {path.name} are in no shard (first: {lost[0]}, expected in "
            f"{shards[lost[0]]}). Download that file again."
        )
    return checkpoint


def _open_shards(folder, stem, count, tensor_at):
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _open_index(index, tensor_at)
    files = [folder / f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return _open_files(folder, files, tensor_at)


def _open_files(path, files, tensor_at):
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"{label(path)}: {len(absent)} of {len(files)} shards are missing (first: {absent[0]}). "
            "Download them beside the others."
        )
    headers, metadata, where, starts = {}, {}, {}, {}
    for file in files:
        file_headers, file_metadata, file_starts = _read_safetensors_header(file)
        for name in file_headers.keys() & where.keys():
            raise CheckpointError(
                f"{label(file)}: {name} is in {where[name].name} too. Remove files that do not belong to the set, or "
                "download it again."
            )
        headers.update(file_headers)
        metadata.update(file_metadata)
        where.update(dict.fromkeys(file_headers, file))
        starts.update(file_starts)

    def read(name):
        return tensor_at(where[name], name, starts[name], headers[name])

    return Checkpoint(path, headers, metadata, read)


def map_tensor(path, name, start, header):
    """Map the tensor `name` of a file, copied where it is written to; CheckpointError where the file is gone or short.

    Each tensor by itself: where memory is smaller than a file, Linux refuses to map that as a whole in this way.
    """
    size = math.prod(header.shape) * header.dtype.itemsize
    if not size:
        return torch.empty(header.shape, dtype=header.dtype)
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=start - before)
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=before)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{label(path)}: {name} cannot be read any more ({error}). Has the file been replaced? Load it again."
        ) from None
    aligned = raw if start % header.dtype.itemsize == 0 else raw.clone()
    return aligned.view(header.dtype).reshape(header.shape)


def _read_safetensors_header(path):
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            refuse_other_kind(path)
            raise CheckpointError(
                f"{label(path)}: {size} bytes, too short for its own header; the file is empty, cut off or no "
                f"safetensors. {AGAIN}"
            )
        name = "none"
        try:
            header = json.loads(file.read(length))
            metadata, headers, starts, ends = header.pop("__metadata__", {}), {}, {}, {}
            for name, tensor in header.items():
                headers[name] = TensorHeader(tuple(tensor["shape"]), DTYPES[tensor["dtype"]])
                starts[name], ends[name] = (8 + length + offset for offset in tensor["data_offsets"])
                stored, needed = ends[name] - starts[name], math.prod(tensor["shape"]) * headers[name].dtype.itemsize
                if stored != needed:
                    raise ValueError(f"{stored} bytes for {tensor['dtype']} {tensor['shape']}, which take {needed}")
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{label(path)}: unreadable safetensors header (last tensor: {name}; {error!r}). {AGAIN}"
            ) from None
    if not headers:
        raise CheckpointError(f"{label(path)}: holds no tensors. {AGAIN}")
    whole = max(ends.values())
    if size < whole:
        cut = min((name for name in ends if ends[name] > size), key=ends.get)
        raise CheckpointError(
            f"{label(path)}: {size} bytes, but its header describes {whole}; the file is cut off in {cut}. {AGAIN}"
        )
    if size > whole:
        raise CheckpointError(
            f"{label(path)}: {size} bytes, but its header describes {whole}; something follows its last tensor, "
            f"{max(ends, key=ends.get)}. {AGAIN}"
        )
    return headers, metadata, starts


def refuse_other_kind(path):
    """Raise CheckpointError where a file that cannot be read begins as another kind does; return else."""
    with path.open("rb") as file:
        begin = file.read(64)
    for pattern, what, suffixes, advice in KINDS:
        if path.suffix not in suffixes and re.match(pattern, begin):
            raise CheckpointError(f"{label(path)}: is {what}, whatever its name says. {advice}")


def _open_pickle(path):
    if path.stat().st_size == 0:
        raise CheckpointError(f"{label(path)}: the file is empty. {AGAIN}")
    try:
        # Only zip archives, which torch has written since 1.6, can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refuse_other_kind(path)
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{label(path)}: holds more than plain tensors ({found[1] if found else 'no torch checkpoint at all'}). "
            "Other objects could run code, so it was not opened. Use a .safetensors file of the same weights."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{label(path)}: cut off, or not a torch checkpoint ({first_line}). {AGAIN}") from None
    for wrapper in ("ema_state_dict", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {n: t for n, t in content.items() if isinstance(t, torch.Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{label(path)}: holds no named tensors; expected a state dict. {AGAIN}")
    return Checkpoint.of_tensors(tensors, path)
