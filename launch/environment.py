"""Make `.venv`: a virtual environment with what ComfyUI, this pack and its tests need, at pinned versions."""

import contextlib
import hashlib
import importlib.util
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import ROOT, LaunchError
from .pip import pip, run_quietly

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

VENV = ROOT / ".venv"
UNFINISHED = "unfinished"
TESTED_COMFYUI = "0.30.0"  # the version that requirements-comfyui.txt pins
TORCH_FAMILY = {"torch", "torchvision", "torchaudio", "spandrel"}
WINDOWS_INDEX = "https://download.pytorch.org/whl/cu130"  # PyPI's for Windows has no CUDA
LEFT_OUT = {"comfyui-workflow-templates"}  # several hundred MB of pictures; ComfyUI starts without


@dataclass(frozen=True, slots=True)
class Plan:
    """What `.venv` must hold: requirement lines installed with what they need, and lines installed alone.

    index: a package index besides pip's own for torch and its companions, or "".
    """

    packages: tuple[str, ...]
    alone: tuple[str, ...]
    free_gb: int
    index: str = ""

    @property
    def stamp(self):
        """A hash of all that decides what is installed; `.venv` holds it once it is complete."""
        decides = [sys.version_info[:2], self.packages, self.alone, *filter(None, [self.index])]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @property
    def names(self):
        """The normalised names of the packages that every system gets."""
        return {package_name(line) for line in self.packages + self.alone if ";" not in line}


def has_nvidia():
    """Whether an NVIDIA driver is installed."""
    return shutil.which("nvidia-smi") is not None


def requirement_lines(path):
    """Return the requirement lines of a file without comments and blank lines."""
    lines = (line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def package_name(text):
    """Return the normalised package name at the start of a requirement line or of a `.dist-info` folder's name."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]*[A-Za-z0-9]", text)[0]).lower()


def torch_requirements(nvidia, system=sys.platform, version=sys.version_info):
    """Return (lines, lines to install alone) of torch and its companions for this kind of machine."""
    if nvidia:
        return ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0", "spandrel==0.4.2"), ()
    # torch's CPU build is asked for by exactly this version; their builds beside it are not on PyPI.
    # torchvision 0.16.2 imports with any torch (its compiled operators stay off), newer ones only with their own torch.
    torchvision = "0.16.2" if system == "linux" and version < (3, 12) else "0.28.0"
    torch = ("torch==2.13.0", "triton==3.7.1") if system == "linux" else ("torch==2.13.0",)
    return torch, (f"torchvision=={torchvision}", "torchaudio==2.11.0", "spandrel==0.4.2")


def plan(comfyui, comfyui_version):
    """Return the Plan for a ComfyUI folder: our pins where they were tested, else what that ComfyUI asks for itself."""
    here = Path(__file__).parent
    if comfyui_version == TESTED_COMFYUI and sys.version_info >= (3, 11):
        theirs = requirement_lines(here / "requirements-comfyui.txt")
    else:
        asked = requirement_lines(comfyui / "requirements.txt")
        theirs = tuple(line for line in asked if package_name(line) not in TORCH_FAMILY | LEFT_OUT)
    nvidia = has_nvidia()
    torch, alone = torch_requirements(nvidia)
    packages = torch + theirs + requirement_lines(here / "requirements-pack.txt")
    index = WINDOWS_INDEX if nvidia and sys.platform == "win32" else ""
    return Plan(packages, alone, free_gb=14 if nvidia else 5, index=index)


def uses_card(packages=None):
    """Whether there is an NVIDIA driver, and the torch of a site-packages folder (default: .venv's) is built for it."""
    version = (packages or site_packages()) / "torch" / "version.py"
    built = version.is_file() and re.search(r"^cuda\b.*= '", version.read_text(encoding="utf-8"), re.MULTILINE)
    return bool(built) and has_nvidia()


def python_of(venv=VENV):
    """Return the path of the environment's Python."""
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def site_packages(venv=VENV):
    """Return the folder that packages are installed into; it need not exist."""
    version = "python{}.{}".format(*sys.version_info)
    return venv / ("Lib/site-packages" if sys.platform == "win32" else f"lib/{version}/site-packages")


def stamp_file(venv=VENV):
    """Return the file that says whose the environment is and whether it is complete."""
    return venv / "happyhorse-local.stamp"


def why_not_ready(wanted, venv=VENV):
    """Return why the environment cannot be used as it is, in a few words, or None if it can."""
    if not venv.exists():
        return "it does not exist yet"
    stamp = stamp_file(venv).read_text() if stamp_file(venv).is_file() else None
    if stamp is None:
        raise LaunchError(f"{venv} was not made by run.py. Rename or delete it, and run the same command again.")
    if stamp == UNFINISHED:
        return "an earlier run did not finish it"
    if stamp != wanted.stamp:
        return "the Python or the requirements have changed"
    present = {package_name(folder.name.split("-")[0]) for folder in site_packages(venv).glob("*.dist-info")}
    missing = sorted(wanted.names - present)
    if missing or not python_of(venv).exists():
        return f"{', '.join(missing) or 'its Python'} was removed from it"
    return None


def create(venv=VENV):
    """Make an empty environment that counts as unfinished, in place of what is there.

    LaunchError, and nothing deleted, where that is what runs this very program.
    """
    if Path(sys.prefix).resolve() == venv.resolve():
        raise LaunchError(
            f"{venv} must be made anew, but its own Python runs run.py. Start run.py with your system's Python."
        )
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        package = "python{}.{}-venv".format(*sys.version_info)
        raise LaunchError(f"This Python cannot make virtual environments. On Debian and Ubuntu: apt install {package}")
    old = venv.with_name(venv.name + ".part")
    shutil.rmtree(old, ignore_errors=True)
    if venv.exists():
        venv.rename(old)  # so that a run interrupted while deleting leaves no .venv behind
        shutil.rmtree(old)
    venv.mkdir()
    stamp_file(venv).write_text(UNFINISHED)
    run_quietly([sys.executable, "-m", "venv", venv], "Virtual environment")


def install(wanted, venv=VENV):
    """Install all of the Plan into an environment that `create` made, and stamp it as complete."""
    free_gb = shutil.disk_usage(venv).free / 1e9
    if free_gb < wanted.free_gb:
        raise LaunchError(f"{wanted.free_gb} GB are needed in {venv.parent}, {free_gb:.1f} GB are free.")
    python = python_of(venv)
    command = ["install", "--no-compile"]  # Python compiles what is used when it is used: half the time, less disk
    if wanted.index:  # for these alone: where it cannot be reached, pip tries long for each package
        torch = [line for line in wanted.packages if package_name(line) in TORCH_FAMILY]
        pip(python, [*command, "--extra-index-url", wanted.index, *torch], "PyTorch for NVIDIA cards")
    pip(python, [*command, *wanted.packages], "PyTorch and what ComfyUI needs")
    if wanted.alone:
        pip(python, [*command, "--no-deps", *wanted.alone], "torchvision, torchaudio, spandrel")
    if next(site_packages(venv).glob("torch-*+cpu.dist-info"), None):
        # PyPI's torchaudio is built for CUDA: its compiled half fails beside a CPU torch, its Python half works.
        for library in (site_packages(venv) / "torchaudio" / "lib").glob("*.so"):
            library.unlink()
    if wanted.index and not uses_card(site_packages(venv)):
        print(f"  The card stays unused: {wanted.index} had no torch for it. To try once more, delete {venv} first.")
    stamp_file(venv).write_text(wanted.stamp)


@contextlib.contextmanager
def setup_lock(path=ROOT / ".comfyui" / "lock"):
    """Hold the lock under which .venv and .comfyui are changed; the system frees it however its holder ends."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        if not _try_lock(file):
            print("Another run.py is setting up this folder; waiting for it.", flush=True)
            while not _try_lock(file):
                time.sleep(0.5)
        yield


def _try_lock(file):
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True
