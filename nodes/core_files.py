"""Weight files as core reads its own under dynamic VRAM: mapped for reading only, and told where each weight lies.

A mapping that may be written to, model_loader's own, counts as used memory on Windows from the start: 31 GB of page
file for a bf16 model. And core brings a weight that it can read from its file from there to the card at once, without
the detour through the mapping's pages.
"""

import ctypes
import math
import threading
import warnings

import comfy.memory_management
import comfy.model_management
import torch
from comfy.memory_management import TensorFileSlice
from comfy.quant_ops import QuantizedTensor

from ..model_loader.checkpoint import Checkpoint, map_tensor

SLICE, REFERENCES = "_comfy_tensor_file_slice", "_comfy_tensor_mmap_refs"  # what core looks for on a tensor's storage


def open_checkpoint(path):
    """Open a weight file as `Checkpoint.open` does, with its tensors mapped as core wants them.

    Not where it brings weights without streams (--disable-async-offload): comfy-aimdo 0.4 then leaves zeros there.
    """
    as_core = comfy.memory_management.aimdo_enabled and comfy.model_management.NUM_STREAMS > 0
    return Checkpoint.open(path, _CoreFiles().tensor_at if as_core else None)


def with_own_slices(network):
    """Return a loaded network in which every weight that is some rows of a stored tensor, an expert's, is by itself.

    Core reads only whole storages from their file.
    """
    for module in network.modules():
        weight = getattr(module, "weight", None)
        quantised = isinstance(weight, QuantizedTensor)
        data = weight._qdata if quantised else weight
        if not isinstance(data, torch.Tensor) or data.is_meta:
            continue
        stored = getattr(data.untyped_storage(), SLICE, None)
        if stored is None or data.nbytes == stored.size or not data.is_contiguous():
            continue
        start = stored.offset + data.storage_offset() * data.itemsize
        references = getattr(data.untyped_storage(), REFERENCES)
        own = _mapped(*references, stored.lock, start, data.nbytes).view(data.dtype).view(data.shape)
        if quantised:
            weight._qdata = own
        else:
            module.weight = torch.nn.Parameter(own, requires_grad=False)
    return network


class _CoreFiles:
    """The files of one checkpoint, each mapped whole by comfy-aimdo when its first tensor is."""

    def __init__(self):
        self.files = {}  # path -> (ModelMMAP, its bytes, a lock)

    def tensor_at(self, path, name, start, header):
        """See `model_loader.checkpoint.map_tensor`, which serves what cannot be had in this way."""
        size = math.prod(header.shape) * header.dtype.itemsize
        file = self._file(path)
        if file is None or not size or start % header.dtype.itemsize or start + size > len(file[1]):
            return map_tensor(path, name, start, header)
        return _mapped(*file, start, size).view(header.dtype).view(header.shape)

    def _file(self, path):
        if path not in self.files:
            self.files[path] = _map_file(path)
        return self.files[path]


def _map_file(path):
    import comfy_aimdo.model_mmap

    try:
        mapping, size = comfy_aimdo.model_mmap.ModelMMAP(str(path)), path.stat().st_size
    except (RuntimeError, OSError):  # comfy-aimdo says no more than that it failed
        return None
    return mapping, memoryview((ctypes.c_uint8 * size).from_address(mapping.get())), threading.Lock()


def _mapped(mapping, content, lock, start, size):
    """Return `size` bytes of a mapped file as a tensor uint8 [size] of a storage of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        tensor = torch.frombuffer(content, dtype=torch.uint8, count=size, offset=start)
    storage = tensor.untyped_storage()
    setattr(storage, SLICE, TensorFileSlice(mapping.get_file_handle(), lock, start, size))
    setattr(storage, REFERENCES, (mapping, content))  # keeps the file mapped
    return tensor
