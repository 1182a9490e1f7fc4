"""Build and put in the simulated card, before torch is imported: torch.cuda is then a device in this computer's RAM."""

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
NAME = "simulated card"
CAPABILITY = (8, 9)  # Ada: an RTX 40, the smallest that multiplies fp8


def why_not():
    """Return why this computer cannot have one, or None: it takes Linux, compilers, and torch without CUDA."""
    if sys.platform != "linux":
        return "a simulated card needs Linux"
    for compiler in ("gcc", "g++"):
        if shutil.which(compiler) is None:
            return f"a simulated card needs {compiler}"
    version = (_torch() / "version.py").read_text(encoding="utf-8")
    return None if "cuda: Optional[str] = None" in version else "a simulated card needs a torch without CUDA"


def _torch():
    return Path(importlib.util.find_spec("torch").origin).parent


def build(folder):
    """Compile driver and backend into a folder, about ten seconds; what is there already is left as it is."""
    driver, backend, torch = folder / "libcuda.so.1", folder / "backend.so", _torch()
    shared = ["-shared", "-fPIC", "-w", "-O1"]
    if not driver.exists():
        hookable = ["-fpatchable-function-entry=32", "-Wl,-soname,libcuda.so.1"]
        _compile(["gcc", *shared, *hookable, HERE / "driver.c", "-ldl", "-lpthread"], driver)
    if not backend.exists():
        headers = [f"-I{torch / 'include'}", f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
        libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}:{folder}", "-ltorch_cpu", "-lc10"]
        libraries += [f"-L{folder}", "-l:libcuda.so.1"]
        _compile(["g++", "-std=c++20", *shared, *headers, HERE / "backend.cpp", *libraries], backend)


def _compile(command, target):
    part = target.with_suffix(".part")
    done = subprocess.run([*command, "-o", part], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{target.name} of the simulated card does not compile:\n{done.stderr[-2000:]}")
    part.rename(target)


def put_in(folder, gib, numbers=True):
    """Make torch.cuda a card of `gib` GiB from what `build` left in a folder; return its driver's calls.

    numbers: False computes no large tensor, only its size: networks of any size run in seconds, and give zeros.
    RuntimeError where torch is imported already: it looks for a card once.
    """
    if "torch" in sys.modules:
        raise RuntimeError("put the simulated card in before torch is imported")
    driver = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    driver.card_set.argtypes = [ctypes.c_uint64, ctypes.c_int]
    for name in ("card_budget", "card_used", "card_peak", "card_moved"):
        getattr(driver, name).restype = ctypes.c_uint64
    total = int(gib * 2**30)
    driver.card_set(total, int(numbers))
    ctypes.CDLL(str(folder / "backend.so"), mode=ctypes.RTLD_GLOBAL)

    import torch

    torch.version.cuda = "12.8"
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # Triton imports it
    for name, value in _torch_cuda(driver, total).items():
        setattr(torch.cuda, name, value)
    torch.cuda.memory.memory_summary = torch.cuda.memory_summary  # ComfyUI logs it when memory ran out
    torch.backends.cuda.can_use_flash_attention = lambda *_: True  # backend.cpp's keeps no scores
    _let_aimdo_make_tensors()
    return driver


class Stream:
    """A stream that is always done."""

    cuda_stream = 1  # to comfy-aimdo 0 is none at all

    def __init__(self, *_, **__):
        pass

    def __eq__(self, other):
        return isinstance(other, Stream)

    __hash__ = object.__hash__

    def _nothing(self, *_, **__):
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def query(self):
        """Tell that all work is done."""
        return True

    def record_event(self, *_):
        """Return an event, done as well."""
        return Stream()


def _torch_cuda(driver, total):
    def memory_stats(device=None):
        return {f"{kind}_bytes.all.current": driver.card_used() for kind in ("active", "reserved", "allocated")}

    about = {"name": NAME, "total_memory": total, "gcnArchName": "", "multi_processor_count": 128, "warp_size": 32}
    properties = SimpleNamespace(major=CAPABILITY[0], minor=CAPABILITY[1], **about)
    host_calls = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    constants = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": NAME,
        "get_device_capability": CAPABILITY, "get_device_properties": properties, "get_allocator_backend": "native",
        "is_bf16_supported": True, "is_current_stream_capturing": False, "cudart": host_calls,
        "current_stream": Stream(), "default_stream": Stream(), "stream": contextlib.nullcontext(),
        "memory_summary": NAME, "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    calls = {name: lambda *_, value=value, **__: value for name, value in constants.items()}
    idle = (
        "init",
        "_lazy_init",
        "set_device",
        "synchronize",
        "empty_cache",
        "ipc_collect",
        "manual_seed",
        "set_rng_state",
    )
    calls |= {name: lambda *_, **__: None for name in (*idle, "manual_seed_all")}
    calls["get_rng_state"] = lambda *_: b""
    calls["mem_get_info"] = lambda *_: (driver.card_budget() - driver.card_used(), driver.card_budget())
    calls["max_memory_allocated"] = lambda *_: driver.card_peak()
    calls["memory_allocated"] = lambda *_: driver.card_used()
    calls["reset_peak_memory_stats"] = lambda *_: driver.card_reset_peak()
    return calls | {"memory_stats": memory_stats, "Stream": Stream, "Event": Stream}


def _let_aimdo_make_tensors():
    """comfy-aimdo asks for tensors at its addresses through an interface that torch has in its CUDA build only."""
    import comfy_aimdo.torch
    import torch

    def at_address(address, size, device):
        storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cuda", 0), size)
        return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage)

    comfy_aimdo.torch.get_tensor_from_raw_ptr = at_address
