"""A ComfyUI server on the simulated card."""

import json
from pathlib import Path

from ...launch.server import Server


class CardServer(Server):
    """`launch.server.Server` with a card of `gib` GiB; COMFYUI_PATH must name the ComfyUI.

    built: the folder of `card.build`. numbers: as `card.put_in`. arguments: more words for ComfyUI's main.py, such as
    --disable-dynamic-vram.
    """

    def __init__(self, built, output, gib, arguments=(), numbers=True):
        self.report = Path(output) / "nodes.jsonl"
        words = ["--card-built", str(built), "--card-gib", str(gib), "--card-report", str(self.report)]
        words += [] if numbers else ["--card-without-numbers"]
        super().__init__(Path(__file__).parent, output, [*words, *arguments])

    def nodes(self):
        """Return what the nodes used so far: [{"node", "peak", "after", "moved", "seconds"}], bytes."""
        return [json.loads(line) for line in self.report.read_text().splitlines()] if self.report.exists() else []
