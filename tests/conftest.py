"""Give tests workflows, and the pack as package `pack`, never as loose folders on sys.path (ComfyUI owns `nodes`)."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
runpy.run_path(str(ROOT / "as_package.py"))["load_pack"]()


@pytest.fixture
def graph():
    """Function that reads workflows/api/<name>.json."""
    return lambda name: json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
