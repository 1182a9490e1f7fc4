"""The simulated card of benchmarks/, built once; scripts and servers run on it in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pack.benchmarks.simulated_card import card
from pack.benchmarks.simulated_card.server import CardServer
from pack.launch.client import Client

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Folder of the compiled card."""
    os.environ.get("COMFYUI_PATH") or pytest.skip("COMFYUI_PATH is not set; run.py test sets it")
    reason = card.why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("card")
    card.build(folder)
    return folder


@pytest.fixture(scope="session")
def run_script(built):
    """Function: script of this folder and its arguments -> what it printed; fails with its errors."""

    def run(script, *arguments):
        command = [sys.executable, HERE / script, built, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture
def serve(built, tmp_path):
    """Function: GiB, words for ComfyUI, graphs -> their outputs and what each node used, from a server on the card."""

    def serve(gib, arguments, graphs, numbers=True):
        with CardServer(built, tmp_path / "output", gib, arguments, numbers) as server:
            client = Client(server.url, server.check_alive)
            return [client.run(graph) for graph in graphs], server.nodes()

    return serve
