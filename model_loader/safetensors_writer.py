"""A safetensors file written piece by piece, so that no more than a piece of it is ever in memory."""

import json
import os

import torch

from .checkpoint import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """`with SafetensorsWriter(path, headers, metadata) as file: file.write(name, piece)`, tensors in any order.

    headers: {name: TensorHeader}, known in advance. metadata: {str: str}. Everything goes to `path`.part; only a block
    that ends without an exception makes it `path`, synced to disk, and any other removes it. The header is written
    last, so that the .part of a killed process is no readable file either.
    """

    def __init__(self, path, headers, metadata):
        self.path = path
        self.unfinished = path.with_name(path.name + ".part")
        self._cursors, self._ends, table, end = {}, {}, {}, 0
        # Widest first, as safetensors does: then every tensor is aligned to its own dtype.
        for name in sorted(headers, key=lambda name: (-headers[name].dtype.itemsize, name)):
            begin, end = end, end + _bytes_of(headers[name])
            self._cursors[name], self._ends[name] = begin, end
            dtype, shape = DTYPE_NAMES[headers[name].dtype], list(headers[name].shape)
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps({"__metadata__": metadata, **table}, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + end

    def __enter__(self):
        self._file = self.unfinished.open("wb")
        return self

    def write(self, name, piece):
        """Append a piece (a tensor on the CPU in the announced dtype, any shape) to a tensor, in row-major order."""
        raw = piece.contiguous().reshape(-1).view(torch.uint8)
        begin = self._cursors[name]
        self._cursors[name] = begin + raw.numel()
        assert self._cursors[name] <= self._ends[name], name
        self._file.seek(len(self._header) + begin)
        self._file.write(raw.numpy())

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                assert self._cursors == self._ends, "a tensor was not written whole"
                self._file.seek(0)
                self._file.write(self._header)
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                put_in_place(self.unfinished, self.path)
        finally:
            self._file.close()
            self.unfinished.unlink(missing_ok=True)


def put_in_place(unfinished, path):
    """Rename a complete file to `path`; PermissionError with what to do where Windows does not let go of that one."""
    try:
        os.replace(unfinished, path)
    except PermissionError as error:
        raise PermissionError(
            f"{path} cannot be replaced ({error.strerror}): a program has it open, such as a ComfyUI that loaded it. "
            "Close that, or choose another name."
        ) from error


def _bytes_of(header):
    return torch.Size(header.shape).numel() * header.dtype.itemsize
