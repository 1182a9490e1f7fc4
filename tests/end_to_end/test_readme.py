"""The README's program, as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_program_queues_a_clip(server, client):
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    before = set(server.output.rglob("*.mp4"))
    command = [sys.executable, "-c", program.replace("http://127.0.0.1:8188", server.url)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_PROXY": "*"})
    assert run.returncode == 0, run.stderr
    outputs = client.outputs(run.stdout.strip(), patience=120)
    (clip,) = set(server.output.rglob("*.mp4")) - before
    assert clip.name in str(outputs) and clip.stat().st_size > 1000
