"""Let attention_backends.py import what backends.py draws and checks with."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
