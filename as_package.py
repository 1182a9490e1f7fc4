"""Load this folder as the package `pack`, the way ComfyUI loads it by path, and run one of its modules.

    python as_package.py nano.evaluate --help

ComfyUI imports the folder under a name of its own choosing, so every import inside the pack is relative; this is the
one place that gives the package a name outside ComfyUI (tests, training, `run.py verify`).
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def comfyui_folder():
    """Return the ComfyUI that $COMFYUI_PATH names, else one around or beside this pack, else run.py's own; or None."""
    named = os.environ.get("COMFYUI_PATH")
    ours = ROOT / ".comfyui" / "ComfyUI"
    candidates = [Path(named).resolve()] if named else [ROOT.parent.parent, ROOT.parent / "ComfyUI", ours]
    return next((folder for folder in candidates if (folder / "comfy" / "sd.py").is_file()), None)


def load_pack():
    """Register the root `__init__.py` as package `pack`, put ComfyUI at the end of sys.path, return the package."""
    if "pack" in sys.modules:
        return sys.modules["pack"]
    comfyui = comfyui_folder()
    if comfyui is not None and str(comfyui) not in sys.path:
        sys.path.append(str(comfyui))
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    package = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = package
    spec.loader.exec_module(package)
    return package


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    load_pack()
    module = "pack." + sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
