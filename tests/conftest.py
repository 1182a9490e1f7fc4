"""Give the tests the pack as package `pack`, never as loose folders on sys.path (ComfyUI owns `nodes`)."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
runpy.run_path(str(ROOT / "as_package.py"))["load_pack"]()
