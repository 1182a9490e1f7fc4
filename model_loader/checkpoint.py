"""Weight files as they lie on disk: headers first, tensors one at a time, clear errors for files that are not whole."""

import json
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

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
    """

    def __init__(self, path, headers, metadata, read, read_scaled=None):
        self.path = Path(path)
        self.headers = headers
        self.metadata = metadata
        self.read = read
        self.read_scaled = read_scaled or (lambda name: (read(name), None))

    @property
    def label(self):
        """How messages call it: the file's name with its folder's, because shards share their names."""
        return "/".join(self.path.parts[-2:])

    @classmethod
    def open(cls, path):
        """Open a .safetensors file, a shard or folder of shards, a torch pickle of tensors, or a .gguf encoder.

        Reads headers only (a pickle is mapped, not read). CheckpointError for anything missing, truncated or unsafe.
        """
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder. Check the path, or download the weights first.")
        if path.is_dir():
            return _open_folder(path)
        if path.name.endswith(".index.json"):
            return _open_index(path)
        if path.suffix == ".safetensors":
            shard = SHARD.fullmatch(path.name)
            return _open_shards(path.parent, shard[1], int(shard[2])) if shard else _open_files(path, [path])
        if path.suffix in PICKLES:
            return _open_pickle(path)
        if path.suffix == ".gguf":
            from .gguf_file import open_gguf

            return open_gguf(path)
        raise CheckpointError(
            f"{path.name}: unknown kind of file; expected .safetensors, {', '.join(PICKLES)}, .gguf or a folder of "
            "one of the former."
        )

    @classmethod
    def of_tensors(cls, tensors, path="memory", metadata=None):
        """Wrap tensors that are already in memory."""
        headers = {name: TensorHeader(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        return cls(path, headers, metadata or {}, tensors.__getitem__)


def _open_folder(folder):
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _open_index(indices[0])
    files = sorted(folder.glob("*.safetensors")) or sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if files and all(SHARD.fullmatch(p.name) for p in files):
        return Checkpoint.open(files[0])
    if len(files) != 1:
        found = ", ".join(p.name for p in files[:4]) or "none"
        raise CheckpointError(
            f"{folder.name}: expected one weight file or one sharded set in this folder, found {len(files)} ({found}). "
            "Name the file instead of the folder."
        )
    return Checkpoint.open(files[0])


def _open_index(path):
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({os.fspath(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path.name}: not a shard index (no readable `weight_map`). {AGAIN}") from None
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{path.name}: names a shard outside its folder ({name}); such an index is not trusted."
            )
    checkpoint = _open_files(path.parent, [path.parent / name for name in names])
    lost = sorted(set(weight_map) - set(checkpoint.headers))
    if lost:
        raise CheckpointError(
            f"{checkpoint.label}: {len(lost)} tensors of {path.name} are in no shard (first: {lost[0]}). {AGAIN}"
        )
    return checkpoint


def _open_shards(folder, stem, count):
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _open_index(index)
    return _open_files(folder, [folder / f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)])


def _open_files(path, files):
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"{path.name}: {len(absent)} of {len(files)} shards are missing (first: {absent[0]}). "
            "Download them beside the others."
        )
    headers, metadata, where = {}, {}, {}
    for file in files:
        file_headers, file_metadata = _read_safetensors_header(file)
        headers.update(file_headers)
        metadata.update(file_metadata)
        where.update(dict.fromkeys(file_headers, file))
    handles = {}

    def read(name):
        file = where[name]
        if file not in handles:
            handles[file] = safe_open(file, framework="pt")
        return handles[file].get_tensor(name)

    return Checkpoint(path, headers, metadata, read)


def _read_safetensors_header(path):
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise CheckpointError(
                f"{path.name}: {size} bytes, too short for its own header; the file is empty, cut off or no "
                f"safetensors. {AGAIN}"
            )
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            headers = {n: TensorHeader(tuple(t["shape"]), DTYPES[t["dtype"]]) for n, t in header.items()}
            end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{path.name}: unreadable safetensors header ({error!r}). {AGAIN}") from None
    if not headers:
        raise CheckpointError(f"{path.name}: holds no tensors. {AGAIN}")
    if size != end:
        raise CheckpointError(
            f"{path.name}: {size} bytes, but its header describes {end}; the file is cut off. {AGAIN}"
        )
    return headers, metadata


def _open_pickle(path):
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path.name}: the file is empty. {AGAIN}")
    try:
        # Only zip archives, which torch has written since 1.6, can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path.name}: holds more than plain tensors, or is no torch checkpoint at all. Other objects could run "
            "code, so it was not opened. Use a .safetensors file of the same weights."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path.name}: cut off, or not a torch checkpoint ({first_line}). {AGAIN}") from None
    for wrapper in ("ema_state_dict", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {n: t for n, t in content.items() if isinstance(t, torch.Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path.name}: holds no named tensors; expected a state dict. {AGAIN}")
    return Checkpoint.of_tensors(tensors, path)
